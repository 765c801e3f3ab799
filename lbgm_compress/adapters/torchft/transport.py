"""The transport between the replicas of a quorum."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lbgm_compress.collective.transport import Transport

__all__ = ["ReplicaTransport", "StepFailed"]

# Messages are the only sends of the group, unless a program makes some itself.
TAG = 1_000_003


class StepFailed(RuntimeError):
    """Raised if a step failed, and can be tried again by the replicas of a new quorum."""


class ReplicaTransport(Transport):
    """The replicas of a quorum, by sends and receives on the process group that torchft made.

    The group is not one that `torch.distributed` knows. Each replica sends its message straight to
    each other one.
    """

    def __init__(self, group: Any, rank: int, size: int) -> None:
        self.group, self.rank, self.size = group, rank, size

    def gather_equal(self, data: Tensor) -> Tensor:
        rows = data.new_empty(self.size, data.numel())
        rows[self.rank] = data
        self.gather_unequal(list(rows))
        return rows

    def gather_unequal(self, parts: Sequence[Tensor]) -> None:
        peers = [(self.rank + step) % self.size for step in range(1, self.size)]
        try:
            works = [
                self.group.recv([parts[peer]], peer, TAG)
                for peer in reversed(peers)
                if parts[peer].numel()
            ]
            if parts[self.rank].numel():
                works += [self.group.send([parts[self.rank]], peer, TAG) for peer in peers]
            for work in works:
                work.wait()
        except RuntimeError as error:
            raise StepFailed(f"a replica is gone or cannot be reached: {error}") from error
