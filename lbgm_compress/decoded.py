"""What a payload stands for: a tensor that need not be dense in memory.

Both ends build the same object from the same bytes, so that they agree bit for bit on its dense
form, on multiples of it and on sums.
"""

from __future__ import annotations

import abc

import torch
from torch import Tensor

__all__ = ["Decoded", "Dense", "Scaled", "Sparse", "flat_dots"]


def flat_dots(a: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return <a, a> and <a, b> as 0-d tensors, in float32 at least, without synchronisation."""
    a = _flat(a)
    square = torch.dot(a, a)
    return square, square if b is None else torch.dot(a, _flat(b))


def _flat(tensor: Tensor) -> Tensor:
    # Products of half precision would be slow, and wrong in the third digit.
    flat = tensor.reshape(-1)
    return flat.float() if flat.dtype.itemsize < 4 else flat


class Decoded(abc.ABC):
    """A tensor as a receiver knows it."""

    @abc.abstractmethod
    def dense(self) -> Tensor:
        """Return the dense tensor; it may share memory with what it was made from."""

    def add_to(self, out: Tensor, weight: float) -> None:
        """Add `weight` times the tensor to `out`, rounding once a product and once a sum."""
        # A fused `alpha=` would round only once on some processors, and differently elsewhere.
        out.add_(self.dense().to(out.dtype) * weight)

    def dots(self, other: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the inner products (0-d) with itself and with dense `other` (None: itself)."""
        return flat_dots(self.dense(), other)

    def scaled(self, factor: float) -> Decoded:
        """Return `factor` times the tensor."""
        return Scaled(self, factor)


class Dense(Decoded):
    """A dense tensor."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def dense(self) -> Tensor:
        return self.tensor


class Scaled(Decoded):
    """A multiple of a tensor, whose zeros are positive."""

    def __init__(self, tensor: Decoded, factor: float) -> None:
        self.tensor = tensor
        self.factor = factor

    def dense(self) -> Tensor:
        # Adding zero turns -0.0, which a sparse form would not show, into 0.0.
        return (self.tensor.dense() * self.factor).add_(0.0)


class Sparse(Decoded):
    """A tensor of the given shape that is zero but for `values` (k) at flat `indices` (k)."""

    def __init__(self, indices: Tensor, values: Tensor, shape: torch.Size) -> None:
        self.indices = indices
        self.values = values
        self.shape = shape

    def dense(self) -> Tensor:
        out = self.values.new_zeros(self.shape)
        out.view(-1)[self.indices] = self.values
        return out

    def add_to(self, out: Tensor, weight: float) -> None:
        if not out.is_contiguous():
            super().add_to(out, weight)
            return
        flat = out.view(-1)
        flat[self.indices] = flat[self.indices] + self.values.to(out.dtype) * weight

    def dots(self, other: Tensor | None) -> tuple[Tensor, Tensor]:
        return flat_dots(self.values, None if other is None else other.reshape(-1)[self.indices])

    def scaled(self, factor: float) -> Decoded:
        return Sparse(self.indices, (self.values * factor).add_(0.0), self.shape)
