"""An average of gradients that has begun, and how it is finished."""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lbgm_compress.collective.transport import Pending
from lbgm_compress.decoded import Decoded, Dense, add_all
from lbgm_compress.endpoints import Receiver
from lbgm_compress.wire.errors import OutOfSyncError

__all__ = ["Average", "CompressedAverage", "DenseAverage", "RanksDiffer", "sum_dtype"]


class RanksDiffer(RuntimeError):
    """Raised on all ranks if one of them asks to compare states before the step goes on.

    `Averager.average` and `BackgroundAverager` do so, and begin the step again.
    """


class Average(abc.ABC):
    """An average whose exchange has begun: see `Averager.begin`."""

    adds: bool = True
    """Whether `finish` adds to `into`, which must then hold zeros."""

    def __init__(
        self,
        pending: Pending[Any],
        grads: Mapping[str, Tensor],
        fail: Callable[[BaseException], None],
    ) -> None:
        self._pending = pending
        self._grads = grads
        self._fail = fail

    def ready(self) -> bool:
        """Return whether the data of all ranks is here, so that `finish` would not wait."""
        return self._pending.ready()

    def finish(self, into: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Wait for the other ranks, and return the averages by name. Call it once.

        Parameters
        ----------
        into
            Tensors by name, with the shapes of the gradients and the dtype that `sum_dtype`
            returns for theirs: the sums are taken there. They hold zeros, unless `adds` is False.
            New ones unless given.

        Returns
        -------
        dict
            The averages by name, with the dtypes of the gradients. With `into`, they have its
            dtypes, and are its tensors or others.

        Raises
        ------
        PayloadError
            If a message cannot be decoded, or another rank has another release of this package.
        RuntimeError
            If another rank could not encode its gradients, or cannot be reached.
        """
        try:
            averages = self._finish(into)
        except RanksDiffer:
            raise
        except BaseException as error:
            self._fail(error)
            raise
        if into is None:
            return {name: average.to(self._grads[name].dtype) for name, average in averages.items()}
        return averages

    @abc.abstractmethod
    def own(self) -> Mapping[str, Decoded]:
        """Return what the others decode of this rank's gradients, by name."""

    @abc.abstractmethod
    def _finish(self, into: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        """Return the averages in the dtype of the sums or of the gradients."""


class DenseAverage(Average):
    """An average by one all-reduce, whose pending result is all gradients end to end."""

    adds = False

    def own(self) -> Mapping[str, Decoded]:
        return {name: Dense(grad) for name, grad in self._grads.items()}

    def _finish(self, into: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        parts = torch.split(self._pending.result(), [g.numel() for g in self._grads.values()])
        return {
            name: part.view(grad.shape).to((into or self._grads)[name].dtype)
            for (name, grad), part in zip(self._grads.items(), parts, strict=True)
        }


class CompressedAverage(Average):
    """An average of messages, one of each rank, of which this rank's own is not decoded."""

    def __init__(
        self,
        pending: Pending[list[Tensor]],
        grads: Mapping[str, Tensor],
        fail: Callable[[BaseException], None],
        own: Mapping[str, Decoded],
        uncompressed: Sequence[str],
        receiver: Receiver,
        shares: Sequence[float],
        rank: int,
        spoil: Callable[[], None],
    ) -> None:
        super().__init__(pending, grads, fail)
        self._own = own
        self._uncompressed = uncompressed
        self._spoil = spoil
        self._receiver = receiver
        self._shares = shares
        self._rank = rank

    def own(self) -> Mapping[str, Decoded]:
        return self._own

    def _finish(self, into: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        messages = self._pending.result()
        sums = _zeros(self._grads) if into is None else into
        uncompressed = set(self._uncompressed)
        for rank, (message, share) in enumerate(zip(messages, self._shares, strict=True)):
            if rank == self._rank:
                add_all(list(self._own.values()), [sums[name] for name in self._own], share)
            else:
                try:
                    found = self._receiver.accumulate(rank, message, sums, share, names=self._grads)
                except OutOfSyncError:
                    raise OutOfSyncError(
                        f"rank {rank} recycles look-back gradients that this rank does not hold, "
                        "as after a sender was changed by hand: load a checkpoint on every rank"
                    ) from None
                uncompressed.update(found)
        # The sums have the same bits on all ranks, so that all ranks come to the same conclusion.
        if not all(sums[name].isfinite().all() for name in uncompressed):
            self._spoil()
        return self._receiver.finish({name: sums[name] for name in self._grads})


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which gradients of `dtype` are added up: at least float32."""
    return torch.float32 if dtype.itemsize < 4 else dtype


def _zeros(grads: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: torch.zeros(grad.shape, dtype=sum_dtype(grad.dtype), device=grad.device)
        for name, grad in grads.items()
    }
