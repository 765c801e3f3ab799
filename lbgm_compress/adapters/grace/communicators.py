"""Refusal of GRACE's communicators that cannot carry messages."""

from __future__ import annotations

import inspect
from typing import Any

import torch

__all__ = ["calling_communicator", "check_communicator"]


def calling_communicator(compressor: Any) -> object | None:
    """Return the object that holds a compressor and is calling it, or None if none is found.

    GRACE's protocol does not tell a compressor which communicator will move its tensors. The
    communicator holds the compressor, but not the other way round, and between ``compress()`` and
    the first collective some communicators read nothing of the compressor at all: Broadcast of
    ``grace_dl.torch`` and Allreduce of ``grace_dl.dist``. The latter aborts a process, or lets
    other ranks hang, if sizes differ, so that an error on arrival would come too late. Therefore
    the call stack is searched for the object whose attribute ``compressor`` is this one.

    An object that is not found is not an error. What a communicator then makes of a payload, such
    as a sum, is refused when it is decompressed.
    """
    try:
        frame = inspect.currentframe()
        while frame is not None:
            caller = frame.f_locals.get("self")
            if getattr(caller, "__dict__", {}).get("compressor") is compressor:
                return caller
            frame = frame.f_back
    except Exception:  # Attributes of foreign objects may raise anything.
        pass
    return None


def check_communicator(communicator: object, same_sizes: bool, device: torch.device) -> None:
    """Raise `TypeError` if a communicator of GRACE's cannot carry messages.

    Parameters
    ----------
    communicator
        Any object. It is accepted if neither its class nor a base class is one of GRACE's.
    same_sizes
        Whether payloads have one size on all ranks.
    device
        The device of the gradients.
    """
    for base in type(communicator).__mro__:
        if base.__module__.startswith("grace_dl."):
            _check(base.__name__, base.__module__, same_sizes, device)


def _check(kind: str, module: str, same_sizes: bool, device: torch.device) -> None:
    if kind in ("Allreduce", "AllToAll"):
        raise TypeError(
            f"GRACE's {kind} adds up what it moves, and messages do not add up to a message: "
            "use GRACE's Allgather"
        )
    if same_sizes:
        return
    if kind == "Broadcast":
        raise TypeError(
            "GRACE's Broadcast needs payloads of one size on all ranks, and those of this "
            "compressor differ: use GRACE's Allgather"
        )
    if kind == "Allgather" and module.startswith("grace_dl.dist.") and device.type == "cpu":
        raise TypeError(
            "grace_dl.dist gathers tensors of unequal size on GPUs only (it calls .cuda()): on "
            "the CPU use lbgm_compress.adapters.ddp, or grace_dl.torch with Horovod"
        )
