"""Sums that begin when the first of their results is needed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["Batch", "SumWork"]

logger = logging.getLogger(__name__)


class Batch:
    """Tensors that are summed in one exchange, which begins when the first result is needed."""

    def __init__(self, exchange: Callable[[Sequence[Tensor]], None]) -> None:
        self.tensors: list[Tensor] = []
        self._exchange = exchange
        self._done = False
        self._failure: Exception | None = None

    def run(self) -> Exception | None:
        """Do the exchange unless it is done, and return its error."""
        if not self._done:
            self._done = True
            try:
                self._exchange(self.tensors)
            except Exception as error:
                logger.error("a compressed sum failed: %s", error)
                self._failure = error
        return self._failure

    def cancel(self) -> None:
        """Give up an exchange that has not begun."""
        self._done, self._failure = True, RuntimeError("a new quorum began before this sum")


class SumWork(dist._Work):  # type: ignore[name-defined]
    """What torchft waits for: the sum of some tensors of a batch."""

    def __init__(self, batch: Batch, tensors: list[Tensor]) -> None:
        super().__init__()
        self._batch, self._tensors = batch, tensors

    def wait(self, timeout: Any = None) -> bool:
        failure = self._batch.run()
        if failure is not None:
            raise failure
        return True

    def block_current_stream(self) -> None:
        self.wait()

    def get_future(self) -> torch.futures.Future[Any]:
        future: torch.futures.Future[Any] = torch.futures.Future()
        failure = self._batch.run()
        if failure is None:
            future.set_result(self._tensors)
        else:
            future.set_exception(failure)
        return future
