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
    """Tensors that are summed in one exchange, which begins when the first result is needed.

    Parameters
    ----------
    exchange
        Replaces tensors by their sums.
    note
        Called with the error of the batch each time that `run` finds one.
    """

    def __init__(
        self,
        exchange: Callable[[Sequence[Tensor]], None],
        note: Callable[[Exception], None],
    ) -> None:
        self.tensors: list[Tensor] = []
        self._exchange, self._note = exchange, note
        self._done = False
        self._failure: Exception | None = None

    @classmethod
    def failed(cls, error: Exception, note: Callable[[Exception], None]) -> Batch:
        """Return a batch that does no exchange, and has failed with an error."""
        batch = cls(lambda tensors: None, note)
        batch._done, batch._failure = True, error
        return batch

    def run(self) -> bool:
        """Do the exchange unless it is done, and return whether it succeeded."""
        if not self._done:
            self._done = True
            try:
                self._exchange(self.tensors)
            except Exception as error:
                logger.error("a compressed sum failed: %s", error)
                self._failure = error
        if self._failure is not None:
            self._note(self._failure)
        return self._failure is None

    def cancel(self) -> None:
        """Give up an exchange that has not begun."""
        self._done, self._failure = True, RuntimeError("a new quorum began before this sum")


class SumWork(dist._Work):  # type: ignore[name-defined]
    """The sum of some tensors of a batch, for which torchft waits.

    A failure is not raised here, since the communication hook of torchft's
    `DistributedDataParallel` cannot go on from an error. The group reports it at the end of the
    step.
    """

    def __init__(self, batch: Batch, tensors: list[Tensor]) -> None:
        super().__init__()
        self._batch, self._tensors = batch, tensors

    def wait(self, timeout: Any = None) -> bool:
        return self._batch.run()

    def block_current_stream(self) -> None:
        self.wait()

    def get_future(self) -> torch.futures.Future[Any]:
        self._batch.run()
        future: torch.futures.Future[Any] = torch.futures.Future()
        future.set_result(self._tensors)
        return future
