"""The interface of engines with ranks."""

from __future__ import annotations

import abc
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common.baselines import Counter

__all__ = ["Engine"]


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
    ) -> tuple[nn.Module, torch.optim.Optimizer, Counter]:
        """Return a module and an optimizer that average gradients, and a counter of messages.

        `compression` holds ``compressor``, ``named_parameters`` and ``weight``, as the adapters
        take them.
        """
