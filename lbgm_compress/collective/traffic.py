"""Counts of what a rank has sent."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from torch import Tensor

from lbgm_compress.endpoints.tensors import Sent
from lbgm_compress.wire.message import recycles

__all__ = ["Traffic"]


class Traffic:
    """Bytes and recycled tensors of all messages of a rank.

    Parameters
    ----------
    names
        Names of the parameters.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._positions = {name: position for position, name in enumerate(names)}
        # Bytes sent, bytes of the gradients, recycled gradients and steps of each parameter.
        self._counts = np.zeros((len(self._positions), 4), np.int64)
        self._message_bytes = 0

    def count(self, size: int, grads: Mapping[str, Tensor], sent: Sent) -> None:
        """Count a message of `size` bytes for some gradients."""
        self._message_bytes += size
        dense = [grads[name].numel() * grads[name].element_size() for name in sent.names]
        recycled = [recycles(kind) for kind in sent.kinds]
        positions = [self._positions[name] for name in sent.names]
        self._counts[positions] += np.stack([sent.sizes, dense, recycled, np.ones_like(dense)], 1)

    def stats(self, by_parameter: bool = False) -> dict[str, Any]:
        """Return the sums, and those of each parameter if asked: see `Averager.stats`."""
        total: dict[str, Any] = _stats(self._message_bytes, *self._counts[:, 1:].sum(0).tolist())
        if by_parameter:
            parameters = zip(self._positions, self._counts.tolist(), strict=True)
            total["parameters"] = {name: _stats(*of) for name, of in parameters}
        return total


def _stats(message_bytes: int, dense_bytes: int, recycled: int, steps: int) -> dict[str, float]:
    """Return sums, the ratio of the bytes, and the share of recycled tensors."""
    return {
        "message_bytes": message_bytes,
        "dense_bytes": dense_bytes,
        "ratio": message_bytes / dense_bytes if dense_bytes else 0.0,
        "recycled_share": recycled / steps if steps else 0.0,
    }
