"""The tensors of a message, as both ends know them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from lbgm_compress.compressor import Compressor
from lbgm_compress.wire.message import layout_hash, recycles

__all__ = ["Sent", "TensorReport", "layout_of"]


@dataclass(frozen=True)
class TensorReport:
    """Statistics of one tensor in the last message."""

    recycled: bool
    """True if the look-back gradient was used and no new one was sent."""
    phase_error: float | None
    """sin^2 of the angle to the look-back gradient; None without one."""
    bytes: int
    """Bytes of the tensor's payload, without the header of the message."""


class Sent(NamedTuple):
    """Statistics of the tensors in a message, as columns."""

    names: Sequence[str]
    kinds: Sequence[int]
    """The first byte of each payload."""
    phase_errors: Sequence[float | None]
    sizes: Sequence[int]

    def report(self) -> dict[str, TensorReport]:
        """Return the statistics by name."""
        return {
            name: TensorReport(recycles(kind), phase_error, size)
            for name, kind, phase_error, size in zip(*self, strict=True)
        }


def layout_of(
    known: dict[tuple[str, ...], int], compressor: Compressor, tensors: Mapping[str, Tensor]
) -> int:
    """Return the hash of the tensors of a message, from `known` if it is there."""
    # A name keeps its shape and dtype, so that the names identify a layout.
    names = tuple(tensors)
    if names not in known:
        described = ((name, tensor.shape, tensor.dtype) for name, tensor in tensors.items())
        known[names] = layout_hash(repr(compressor), described)
    return known[names]
