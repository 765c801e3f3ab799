"""Heads of messages between ranks: sizes of bodies, and notices in the place of a message."""

from __future__ import annotations

import torch
from torch import Tensor

from lbgm_compress.collective.average import RanksDiffer
from lbgm_compress.wire.message import body_size

__all__ = ["DIFFERS", "FAILED", "body_length", "notice"]

# No message has version 0.
FAILED, DIFFERS = bytes(8), b"\0\1" + bytes(6)


def notice(beginning: bytes, head_size: int, device: torch.device) -> Tensor:
    """Return a head (flat uint8) that begins with FAILED or DIFFERS, and says so to all ranks."""
    return torch.tensor(list(beginning.ljust(head_size, b"\0")), dtype=torch.uint8).to(device)


def body_length(head: bytes, rank: int) -> int:
    """Return how many bytes of a rank's message follow its head.

    Raises
    ------
    PayloadError
        If the message has another version of the wire format.
    RuntimeError
        If the rank could not encode its gradients.
    RanksDiffer
        If the rank asks to compare states.
    """
    if head[:8] == FAILED:
        raise RuntimeError(f"rank {rank} failed before it could send: see the error there")
    if head[:8] == DIFFERS:
        raise RanksDiffer(f"rank {rank} asks to compare states")
    return body_size(head)
