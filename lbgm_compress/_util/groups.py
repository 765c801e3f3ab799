"""Process groups."""

from __future__ import annotations

import datetime
from typing import Any

import torch
import torch.distributed as dist

__all__ = ["check_group", "default_group", "group_like"]


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
    timeout = _timeout(group)
    made = dist.new_group(
        dist.get_process_group_ranks(group) if ranks is None else ranks,
        timeout=None if timeout is None else timeout * patience,
        backend=dist.get_backend(group),
        use_local_synchronization=True,
    )
    assert isinstance(made, dist.ProcessGroup)
    return made


def _timeout(group: dist.ProcessGroup) -> datetime.timedelta | None:
    """Return the time-out that a group was made with, or None if its backend does not tell."""
    backend = "cuda" if dist.get_backend(group) == "nccl" else "cpu"
    try:
        timeout = group._get_backend(torch.device(backend)).options._timeout
    except (AttributeError, RuntimeError):
        return None
    return timeout if isinstance(timeout, datetime.timedelta) else None
