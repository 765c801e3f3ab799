"""Content of gradients that compressors do not get to see: inf, nan, and zeros alone."""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lbgm_compress._util.batches import by_batch, is_small, rows, stack

__all__ = ["Content", "all_finite", "contents", "nonzero", "square_sum"]


class Content(enum.Enum):
    """Content of a gradient."""

    NUMBERS = enum.auto()
    """Finite, and not all zero."""
    ZERO = enum.auto()
    """Zero in all elements, or without elements."""
    NOT_FINITE = enum.auto()
    """With inf or nan."""


def contents(tensors: Sequence[Tensor]) -> list[Content]:
    """Return the content of each tensor, with one device synchronisation."""
    return by_batch(_contents, tensors)


def _contents(tensors: Sequence[Tensor]) -> list[Content]:
    if is_small(tensors[0]):
        matrix = rows(stack(tensors))
        finite, used = matrix.isfinite().all(1).tolist(), matrix.any(1).tolist()
        return [
            (Content.NUMBERS if nonzero else Content.ZERO) if numbers else Content.NOT_FINITE
            for numbers, nonzero in zip(finite, used, strict=True)
        ]
    # One read gives the sum of squares, which is finite and above 0 in nearly all cases. Else it
    # may come from overflow or underflow, and needs a second look.
    sums = torch.stack([square_sum(tensor) for tensor in tensors]).tolist()
    return [
        Content.NUMBERS if 0 < total < math.inf else _content(tensor)
        for tensor, total in zip(tensors, sums, strict=True)
    ]


def _content(tensor: Tensor) -> Content:
    if not tensor.isfinite().all():
        return Content.NOT_FINITE
    return Content.NUMBERS if tensor.any() else Content.ZERO


def all_finite(tensors: Sequence[Tensor]) -> list[bool]:
    """Return whether each tensor is finite (no inf, no nan), with one device synchronisation."""
    return [content is not Content.NOT_FINITE for content in contents(tensors)]


def square_sum(tensor: Tensor) -> Tensor:
    """Return the sum of squares (0-d, float64), without a device synchronisation."""
    flat = tensor.reshape(-1)
    if flat.dtype.itemsize < 4:
        flat = flat.float()
    return torch.dot(flat, flat).double()


def nonzero(tensors: Sequence[Tensor]) -> list[bool]:
    """Return whether an element of each tensor is not zero, with one device synchronisation."""
    return by_batch(_nonzero, tensors)


def _nonzero(tensors: Sequence[Tensor]) -> list[bool]:
    first = tensors[0]
    if is_small(first):
        return [bool(used) for used in rows(stack(tensors)).any(1).tolist()]
    if first.is_cpu:
        # Hardly ever are all of a few elements zero, and not the others.
        flat = first.reshape(-1)
        return [bool(flat[:: max(flat.numel() // 16, 1)].any()) or bool(flat.any())]
    return [bool(used) for used in torch.stack([tensor.any() for tensor in tensors]).tolist()]
