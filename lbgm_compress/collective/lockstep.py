"""Averages by sums over workers of one process, for simulations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lbgm_compress.algorithm import Algorithm, check_algorithm
from lbgm_compress.collective.summed import Rounds
from lbgm_compress.collective.transport import Pending, Transport
from lbgm_compress.endpoints.contributor import Contributor

__all__ = ["Lockstep"]


class Lockstep:
    """Workers of one process whose contributions are added up, as on as many ranks.

    Parameters
    ----------
    algorithm
        A `Reducible`, or `ErrorFeedback` around one.
    size
        The number of workers.

    Attributes
    ----------
    workers : list of Contributor
        The end of each worker.
    bytes : int
        What a worker adds to sums in one round: the bytes of the last round.

    Raises
    ------
    TypeError
        If `algorithm` is of another kind.
    """

    def __init__(self, algorithm: Algorithm, size: int) -> None:
        check_algorithm(algorithm)
        if not algorithm.adds_up:
            raise TypeError(f"{algorithm!r} makes messages: give each worker a Sender of its own")
        self.workers = [Contributor(algorithm) for _ in range(size)]
        self.bytes = 0

    def average(
        self, grads: Sequence[Mapping[str, Tensor]], shares: Sequence[float] | None = None
    ) -> dict[str, Tensor]:
        """Return the weighted average of the workers' gradients by name: one round.

        A tensor with inf or nan on one worker is nan in the average, and the states of all workers
        are then those from before the round.

        Parameters
        ----------
        grads
            The gradients of each worker, with the same names, shapes and dtypes.
        shares
            The share of each worker in the average; equal ones unless given.
        """
        size = len(self.workers)
        shares = shares or [1 / size] * size
        for worker in self.workers:
            worker.begin_step()
        meeting = Meeting(size)
        rounds = [
            Rounds(meeting.transport(rank), worker, worker.begin(given), share)
            for rank, (worker, given, share) in enumerate(
                zip(self.workers, grads, shares, strict=True)
            )
        ]
        while rounds[0].running:
            for one in rounds:
                one.step()
        for worker, given, one in zip(self.workers, grads, rounds, strict=True):
            worker.keep(given, one.found, one.exponents, one.sizes)
        if rounds[0].not_finite:
            # As on ranks, the round is taken back.
            for worker in self.workers:
                worker.undo()
        self.bytes = rounds[0].bytes
        return {
            name: rounds[0].average(name, torch.empty_like(like)) for name, like in grads[0].items()
        }


class Meeting:
    """Sums of workers that run one after the other."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._waiting: dict[str, list[Tensor]] = {}

    def transport(self, rank: int) -> Transport:
        """Return the transport of a worker."""
        return MeetingTransport(self, rank, self._size)

    def add(self, data: Tensor, key: str) -> Pending[Tensor]:
        """Add data of one worker; all have added theirs before one asks for the sum."""
        parts = self._waiting.setdefault(key, [])
        parts.append(data)

        def result() -> Tensor:
            if len(parts) > 1:
                total = parts[0].clone()
                for part in parts[1:]:
                    # Rounded after each addition, as on a ring.
                    total += part
                parts[:] = [total]
                self._waiting.pop(key, None)
            return parts[0].clone()

        return Pending(lambda: True, result)


class MeetingTransport(Transport):
    """The transport of a worker of a `Meeting`."""

    def __init__(self, meeting: Meeting, rank: int, size: int) -> None:
        self._meeting = meeting
        self.rank, self.size = rank, size

    def gather_equal(self, data: Tensor) -> Tensor:
        raise NotImplementedError("workers of one process only add up")

    def begin_all_reduce(self, data: Tensor, key: str) -> Pending[Tensor]:
        return self._meeting.add(data, key)
