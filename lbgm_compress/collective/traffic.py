"""Counts of what a rank has sent."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lbgm_compress.endpoints import TensorReport

__all__ = ["Traffic"]


@dataclass
class Counts:
    """Bytes and recycled tensors of one parameter, summed over the steps so far."""

    message_bytes: int = 0
    dense_bytes: int = 0
    recycled: int = 0
    steps: int = 0

    def stats(self) -> dict[str, float]:
        """Return the sums, the ratio of the bytes, and the share of recycled tensors."""
        return {
            "message_bytes": self.message_bytes,
            "dense_bytes": self.dense_bytes,
            "ratio": self.message_bytes / self.dense_bytes if self.dense_bytes else 0.0,
            "recycled_share": self.recycled / self.steps if self.steps else 0.0,
        }


class Traffic:
    """Bytes and recycled tensors of all messages of a rank.

    Parameters
    ----------
    names
        Names of the parameters.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._parameters = {name: Counts() for name in names}
        self._message_bytes = 0

    def count(
        self, size: int, grads: Mapping[str, Tensor], reports: Mapping[str, TensorReport]
    ) -> None:
        """Count a message of `size` bytes for some gradients."""
        self._message_bytes += size
        for name, report in reports.items():
            counts = self._parameters[name]
            counts.message_bytes += report.bytes
            counts.dense_bytes += grads[name].numel() * grads[name].element_size()
            counts.recycled += report.recycled
            counts.steps += 1

    def stats(self) -> dict[str, Any]:
        """Return the sums, and those of each parameter: see `Averager.stats`."""
        total = Counts(message_bytes=self._message_bytes)
        for counts in self._parameters.values():
            total.dense_bytes += counts.dense_bytes
            total.recycled += counts.recycled
            total.steps += counts.steps
        parameters = {name: counts.stats() for name, counts in self._parameters.items()}
        return {**total.stats(), "parameters": parameters}
