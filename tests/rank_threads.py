"""Ranks as threads of one process, for runs that are too long for processes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from lbgm_compress.collective import Transport

__all__ = ["Ranks"]

# Seconds after which a rank that waits for the others raises `threading.BrokenBarrierError`.
TIMEOUT = 20.0


class Ranks:
    """Ranks that run side by side in threads.

    A rank that raises breaks the exchange of the others, which raise then, too.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.barrier = threading.Barrier(size, timeout=TIMEOUT)
        self.slots: list[Any] = [None] * size
        self.transports = [ThreadTransport(self, rank) for rank in range(size)]
        self._pool = ThreadPoolExecutor(size)

    def run(self, function: Callable[..., Any], *arguments: Sequence[Any]) -> list[Any]:
        """Run ``function(rank, *of_rank)`` on all ranks, and return the results in rank order.

        `arguments` are sequences with one item for each rank. The first error is raised, and then
        the ranks can run again.
        """

        def guarded(rank: int) -> Any:
            try:
                return function(rank, *(of[rank] for of in arguments))
            except BaseException:
                self.barrier.abort()
                raise

        futures = [self._pool.submit(guarded, rank) for rank in range(self.size)]
        errors = [future.exception() for future in futures]
        if any(errors):
            self.barrier.reset()
            # A broken barrier is the consequence of another error.
            found = [error for error in errors if error is not None]
            broken = threading.BrokenBarrierError
            raise next((e for e in found if not isinstance(e, broken)), found[0])
        return [future.result() for future in futures]

    def close(self) -> None:
        self._pool.shutdown()


class ThreadTransport(Transport):
    """The transport of one rank."""

    def __init__(self, ranks: Ranks, rank: int) -> None:
        self._ranks = ranks
        self.rank, self.size = rank, ranks.size

    def gather_equal(self, data: Tensor) -> Tensor:
        slots = self._ranks.slots
        slots[self.rank] = data
        self._ranks.barrier.wait()
        sizes = {slot.numel() for slot in slots}
        assert len(sizes) == 1, f"the ranks exchange data of {sizes} bytes at one time"
        rows = torch.stack(list(slots))
        self._ranks.barrier.wait()
        return rows
