"""Process groups."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

__all__ = ["check_group", "default_group", "group_like", "part_like"]


def check_group(group: Any) -> None:
    """Raise `TypeError` or `ValueError` unless this is a process group that has this rank."""
    if group == dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError("this rank is not in process_group: build the state on its ranks alone")
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"process_group must be a torch.distributed.ProcessGroup, not {group!r}: give "
            "model.process_group"
        )


def default_group() -> dist.ProcessGroup:
    """Return the group of all ranks."""
    group = dist.group.WORLD
    assert group is not None
    return group


def group_like(
    group: dist.ProcessGroup, ranks: list[int] | None = None, patience: int = 1
) -> dist.ProcessGroup:
    """Return a new group with the backend of `group`, and `patience` times its time-out.

    Its ranks are those of `group`, or `ranks`, which are numbers in the default group. The averages
    need one of their own: two users of one group would mix up their collectives.
    """
    whole = ranks is None and _has_all_ranks(group)
    members = dist.get_process_group_ranks(group) if ranks is None else ranks
    made = _new_group(group, members, patience, local=not whole)
    assert isinstance(made, dist.ProcessGroup)
    return made


def part_like(
    group: dist.ProcessGroup,
    parts: Sequence[Sequence[int]],
    like: dist.ProcessGroup,
    patience: int = 1,
) -> dist.ProcessGroup:
    """Return a new group of this rank's part, with the backend of `like`.

    All ranks of `group` call it together. Each is in exactly one of `parts`, which are lists of
    numbers in the default group.
    """
    whole, mine = _has_all_ranks(group), None
    for ranks in parts:
        local = not whole or len(ranks) == 1
        if dist.get_rank() in ranks:
            mine = _new_group(like, ranks, patience, local)
        elif not local:
            _new_group(like, ranks, patience, local)
    assert isinstance(mine, dist.ProcessGroup)
    return mine


def _has_all_ranks(group: dist.ProcessGroup) -> bool:
    return dist.get_world_size(group) == dist.get_world_size()


def _new_group(
    like: dist.ProcessGroup, ranks: Sequence[int], patience: int, local: bool
) -> dist.ProcessGroup | int | None:
    """Return a new group; if `local`, its ranks alone call this, else all ranks of the job.

    A local group is named after the number of groups that a rank is in, which must be the same on
    its ranks: they do not find each other otherwise.
    """
    timeout = _timeout(like)
    made: dist.ProcessGroup | int | None = dist.new_group(
        list(ranks),
        timeout=None if timeout is None else timeout * patience,
        backend=dist.get_backend(like),
        use_local_synchronization=local,
    )
    return made


def _timeout(group: dist.ProcessGroup) -> datetime.timedelta | None:
    """Return the time-out that a group was made with, or None if its backend does not tell."""
    backend = "cuda" if dist.get_backend(group) == "nccl" else "cpu"
    try:
        timeout = group._get_backend(torch.device(backend)).options._timeout
    except (AttributeError, RuntimeError):
        return None
    return timeout if isinstance(timeout, datetime.timedelta) else None
