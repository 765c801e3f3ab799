"""Saved states of ranks, one for each rank or one for all."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lbgm_compress.collective.ends import Ends
from lbgm_compress.collective.transport import Transport

__all__ = ["check_saved", "gather_states", "part_of_rank", "place_of", "save_rank"]

FORMAT = 1
STATE_KEYS = frozenset({"format", "rank", "world_size", "step", "sender", "receiver"})
GATHERED_KEYS = frozenset({"format", "world_size", "step", "senders", "held"})
PIECE = 1 << 22
# What is held of the first rank is asked of `Ends.witness`: the first does not hold its own.
FIRST = 0


def save_rank(rank: int, size: int, step: int, ends: Ends) -> dict[str, Any]:
    """Return the state of one rank."""
    return {
        "format": FORMAT,
        "rank": rank,
        "world_size": size,
        "step": step,
        **ends.state_dict(),
    }


def check_saved(state: Any, owner: str) -> None:
    """Raise `ValueError` unless `state` is that of one rank or of all, in a format read here."""
    keys = set(state) if isinstance(state, Mapping) else set()
    if not (keys >= STATE_KEYS or keys >= GATHERED_KEYS):
        # As ranks other than the first get it.
        hint = ": load the one that gather_state_dict() returned on rank 0" if state == {} else ""
        raise ValueError(f"this is not a state that {owner}.state_dict() returned{hint}")
    if state["format"] != FORMAT:
        raise ValueError(f"the state has format {state['format']}, this release reads {FORMAT}")


def gather_states(
    transport: Transport, step: int, ends: Ends, device: torch.device
) -> dict[str, Any]:
    """Return the states of all ranks on rank 0, and an empty dict on the others.

    All ranks call it together. All receivers hold the same of a sender, so that it is kept once.
    """
    rank, size = transport.rank, transport.size
    if rank == FIRST:
        held = {other: one for r in range(1, size) for other, one in ends.held_of(r).items()}
    else:
        held = dict(ends.held_of(FIRST)) if rank == ends.witness else {}
    file = io.BytesIO()
    torch.save({"sender": ends.state_dict()["sender"], "held": held}, file)
    gathered = _gather_to_first(transport, file.getvalue(), device)
    if gathered is None:
        return {}
    # In the memory of the host, as there are as many states as ranks.
    parts = [
        torch.load(io.BytesIO(data), map_location="cpu", weights_only=True) for data in gathered
    ]
    return {
        "format": FORMAT,
        "world_size": size,
        "step": step,
        **({"nodes": ends.nodes} if ends.nodes else {}),
        "senders": {other: part["sender"] for other, part in enumerate(parts)},
        "held": {other: one for part in parts for other, one in part["held"].items()},
    }


def part_of_rank(state: Mapping[str, Any], rank: int, ends: Ends) -> Mapping[str, Any]:
    """Return a rank's part of a state that `gather_states` returned; any other as it is."""
    if not set(state) >= GATHERED_KEYS:
        return state
    # A rank that was not there has no part, and is given another's to look at.
    owner = rank if rank in state["senders"] else min(state["senders"])
    return {
        "format": state["format"],
        "rank": owner,
        "world_size": state["world_size"],
        "step": state["step"],
        **({"nodes": state["nodes"]} if "nodes" in state else {}),
        **ends.part(state["senders"][owner], state["held"], rank),
    }


def place_of(rank: int, size: int, nodes: Sequence[Sequence[int]]) -> str:
    """Return the place of a rank in words."""
    return f"rank {rank} of {size}" + (f" in nodes {nodes}" if nodes else "")


def _gather_to_first(transport: Transport, data: bytes, device: torch.device) -> list[bytes] | None:
    """Return the data of all ranks in rank order on rank 0, and None on the others.

    All ranks call it together. At most one piece of `PIECE` bytes is on the way at a time.
    """
    length = torch.tensor([len(data)]).view(torch.uint8).to(device)
    lengths = transport.gather_equal(length).cpu().view(torch.int64).view(-1).tolist()
    nothing = torch.empty(0, dtype=torch.uint8, device=device)
    gathered = []
    for owner, total in enumerate(lengths):
        pieces = []
        for start in range(0, total, PIECE):
            piece = torch.empty(min(PIECE, total - start), dtype=torch.uint8, device=device)
            if owner == transport.rank:
                own = bytearray(data[start : start + PIECE])
                piece.copy_(torch.frombuffer(own, dtype=torch.uint8))
            parts = [piece if rank == owner else nothing for rank in range(transport.size)]
            transport.gather_unequal(parts)
            if transport.rank == 0:
                pieces.append(_bytes(piece))
        gathered.append(b"".join(pieces))
    return gathered if transport.rank == 0 else None


def _bytes(data: Tensor) -> bytes:
    return data.cpu().numpy().tobytes()
