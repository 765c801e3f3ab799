"""Gradients whose inner products and dense copies are computed once for all thresholds."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lbgm_compress.compressor import owned
from lbgm_compress.compressors.lbgm import LookBack
from lbgm_compress.compressors.numerics import SQUARES
from lbgm_compress.decoded import Decoded, Dense, working_dtype

__all__ = ["CachedDecoded", "GradientStatistics", "dot64", "gradient_statistics"]


class CachedDecoded(Decoded):
    """The decoded form of `grad`, made dense once and multiplied once with each other tensor.

    Thresholds that send a gradient in full then share one dense look-back gradient.
    """

    def __init__(self, decoded: Decoded, grad: Tensor) -> None:
        self._decoded, self._grad = decoded, grad
        self._dense: Tensor | None = None
        # Other tensors live as long as the round, so that no identity is used twice.
        self._products: dict[int, tuple[Tensor, Tensor]] = {}

    def dense(self) -> Tensor:
        if self._dense is None:
            # Look-back gradients outlive the buffer that the gradient is in.
            self._dense = owned(self._decoded, self._grad)
        return self._dense

    def dots(self, other: Tensor | None) -> tuple[Tensor, Tensor]:
        if id(other) not in self._products:
            self._products[id(other)] = self._decoded.dots(other)
        return self._products[id(other)]


class GradientStatistics(Decoded):
    """A finite gradient, its square norm, and its inner products with other tensors.

    Parameters
    ----------
    grad
        The gradient g; it must not change before the round ends.
    square
        |g|^2 in float32 or float64 (0-d).
    value
        The number in `square`.
    """

    def __init__(self, grad: Tensor, square: Tensor, value: float) -> None:
        self._grad = grad
        self._copy: Tensor | None = None
        self._square = square
        self._products: dict[int, Tensor] = {}
        # Outside this range, float32 has lost bits to underflow or overflowed.
        self._in_float64 = not SQUARES[0] < value < SQUARES[1]
        self.square = float(dot64(grad, grad)) if self._in_float64 else value

    def dense(self) -> Tensor:
        if self._copy is None:
            self._copy = self._grad.clone(memory_format=torch.contiguous_format)
        return self._copy

    def dots(self, other: Tensor | None) -> tuple[Tensor, Tensor]:
        if other is None:
            return self._square, self._square
        if id(other) not in self._products:
            dtype = working_dtype(self._grad)
            a, b = (tensor.reshape(-1).to(dtype) for tensor in (self._grad, other))
            self._products[id(other)] = torch.dot(a, b)
        return self._square, self._products[id(other)]

    def products(self, look_back: LookBack) -> tuple[Tensor | None, float]:
        """Return <g, l> (0-d) and |l|^2; None for <g, l> if l is this gradient itself."""
        if look_back.gradient is self._copy:
            return None, look_back.square_norm
        if self._in_float64:
            product = dot64(self._grad, look_back.gradient)
            return product, float(dot64(look_back.gradient, look_back.gradient))
        return self.dots(look_back.gradient)[1], look_back.square_norm


def gradient_statistics(grads: Sequence[Tensor]) -> list[GradientStatistics] | None:
    """Return the statistics of gradients, with one synchronisation; None if any is not finite."""
    squares = [Dense(grad).dots(None)[0].double() for grad in grads]
    values = torch.stack(squares).tolist()
    # A finite square means finite entries; only an infinite one needs a closer look.
    for grad, value in zip(grads, values, strict=True):
        if not math.isfinite(value) and not bool(grad.isfinite().all()):
            return None
    return [GradientStatistics(*of) for of in zip(grads, squares, values, strict=True)]


def dot64(a: Tensor, b: Tensor) -> Tensor:
    """Return the inner product of two tensors in float64 (0-d)."""
    return torch.dot(a.reshape(-1).double(), b.reshape(-1).double())
