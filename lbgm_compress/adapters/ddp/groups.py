"""Process groups."""

from __future__ import annotations

import datetime

import torch
import torch.distributed as dist

__all__ = ["default_group", "group_like"]


def default_group() -> dist.ProcessGroup:
    """Return the group of all ranks."""
    group = dist.group.WORLD
    assert group is not None
    return group


def group_like(group: dist.ProcessGroup) -> dist.ProcessGroup:
    """Return a new group of the same ranks, with the same backend and time-out.

    The averages need one of their own: two users of one group would mix up their collectives.
    """
    ranks = dist.get_process_group_ranks(group)
    made = dist.new_group(
        ranks,
        timeout=_timeout(group),
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
