"""The two ends of one replica for one batch of tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lbgm_compress.collective.average import sum_dtype
from lbgm_compress.compressor import Compressor
from lbgm_compress.decoded import add_all
from lbgm_compress.endpoints import Receiver, Sender

__all__ = ["BatchEnds"]


class BatchEnds:
    """The sender and the receiver of one batch."""

    def __init__(self, compressor: Compressor, tensors: Sequence[Tensor], seed: int) -> None:
        self._names = [f"tensor {index}" for index in range(len(tensors))]
        like = self._by_name(tensors)
        self.sender = Sender(compressor, seed=seed)
        self.receiver = Receiver(compressor, like)
        self._compressor = compressor
        self._own: Mapping[str, Any] = {}
        self._zeros = {
            name: torch.zeros((), dtype=sum_dtype(t.dtype), device=t.device).expand(t.shape)
            for name, t in like.items()
        }

    def _by_name(self, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
        return dict(zip(self._names, tensors, strict=True))

    def encode(self, tensors: Sequence[Tensor], loss_scale: float) -> Tensor:
        message, self._own = self.sender.encode(self._by_name(tensors), loss_scale=loss_scale)
        return message

    def add_up(self, messages: Sequence[Tensor | None], rank: int) -> tuple[list[Tensor], bool]:
        """Return the sums of what messages decode to, and whether all are finite."""
        sums = {name: zeros.clone() for name, zeros in self._zeros.items()}
        uncompressed: set[str] = set()
        for replica, message in enumerate(messages):
            if message is None:
                continue
            if replica == rank:
                add_all([self._own[name] for name in sums], list(sums.values()), 1.0)
                uncompressed.update(self.sender.uncompressed())
            else:
                uncompressed.update(self.receiver.accumulate(replica, message, sums, 1.0))
        self._own = {}
        finite = all(bool(sums[name].isfinite().all()) for name in uncompressed)
        count = len(messages) - messages.count(None)
        if self._compressor.finishes_average and count:
            # torchft divides by the number of replicas that took part.
            means = {name: total / count for name, total in sums.items()}
            sums = {name: t * count for name, t in self.receiver.finish(means).items()}
        return [sums[name] for name in self._names], finite

    def begin_step(self) -> None:
        self.sender.begin_step()
        self.receiver.begin_step()

    def undo(self) -> None:
        self.sender.undo()
        self.receiver.undo()

    def commit(self) -> None:
        self.sender.commit()
        self.receiver.commit()

    def forget(self) -> None:
        """Drop look-back gradients, and keep the residual."""
        self.sender.reset()
        for replica in self.receiver.senders():
            self.receiver.drop(replica)
