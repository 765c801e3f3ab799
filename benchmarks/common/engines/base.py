"""What a worker needs of an engine with ranks."""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lbgm_compress.collective.averager import Averager

__all__ = ["Counts", "Engine", "counts_of"]

# Returns the bytes sent so far and, for the last round, the recycled tensors and all tensors.
Counts = Callable[[], tuple[int, int, int]]


class Engine(abc.ABC):
    """An engine with ranks, as one of its workers uses it."""

    rank: int
    size: int

    @classmethod
    @abc.abstractmethod
    def command(cls, workers: int) -> list[str]:
        """Return the command that starts the workers; arguments of `worker` are appended to it."""

    @abc.abstractmethod
    def broadcast(self, value: Any) -> Any:
        """Return the first rank's value on every rank."""

    @abc.abstractmethod
    def total(self, numbers: Tensor) -> Tensor:
        """Return the sum over all ranks of `numbers` (int64)."""

    @abc.abstractmethod
    def wrap(
        self, module: nn.Module, optimizer: torch.optim.Optimizer, compression: dict[str, Any]
    ) -> tuple[nn.Module, torch.optim.Optimizer, Counts]:
        """Return a module and an optimizer that average gradients, and a counter of their bytes.

        `compression` are the arguments of the adapter: ``compressor``, ``named_parameters`` and
        ``weight``.
        """


def counts_of(averager: Averager) -> Counts:
    """Return the counter of an averager's bytes and tensors."""

    def counts() -> tuple[int, int, int]:
        report = averager.sender.report().values()
        recycled = sum(tensor.recycled for tensor in report)
        return int(averager.stats()["message_bytes"]), recycled, len(report)

    return counts
