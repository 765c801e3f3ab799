"""Decoded tensors, which need not be dense in memory.

Both ends build the same object from the same bytes, so that its dense form, its multiples and its
sums have the same bits.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lbgm_compress._util.batches import by_batch, copies, is_small, rows, stack

__all__ = [
    "Decoded",
    "Dense",
    "Late",
    "LowRank",
    "Scaled",
    "Sparse",
    "Zero",
    "add_all",
    "flat_dots",
    "missing_from_all",
    "stacked",
    "working_dtype",
]


def flat_dots(a: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return <a, a> and <a, b> (or <a, a> again) as 0-d tensors, float32 or float64.

    There is no device synchronisation.
    """
    a = _flat(a)
    square = torch.dot(a, a)
    return square, square if b is None else torch.dot(a, _flat(b))


def _flat(tensor: Tensor) -> Tensor:
    # Products in half precision would be slow, and wrong in the third digit.
    flat = tensor.reshape(-1)
    return flat.float() if flat.dtype.itemsize < 4 else flat


class Decoded(abc.ABC):
    """A tensor as a receiver decodes it."""

    __slots__ = ()

    @abc.abstractmethod
    def dense(self) -> Tensor:
        """Return the dense tensor, which may share memory with this object."""

    @classmethod
    def dense_stack(cls, decoded: Sequence[Any]) -> Tensor:
        """Return the dense tensors of several objects of this class, of one shape, stacked."""
        return stack([one.dense() for one in decoded])

    def add_to(self, out: Tensor, weight: float) -> None:
        """Add `weight` times the tensor to `out`, rounding after the product and after the sum."""
        # A fused `alpha=` rounds only once on some processors, and so gives other bits there.
        out.add_(self.dense().to(out.dtype) * weight)

    def write_to(self, out: Tensor) -> None:
        """Write the tensor to `out`, of the same shape."""
        out.copy_(self.dense().view(out.shape))

    def subtract_from(self, tensor: Tensor) -> None:
        """Subtract the tensor from a contiguous one, in place."""
        self.add_to(tensor, -1.0)

    def missing_from(self, tensor: Tensor) -> Tensor:
        """Return `tensor` minus this one, contiguous and in memory of its own.

        `tensor` may have a wider dtype. The bits may differ from those of `add_to`, since only one
        end computes the difference.
        """
        rest = tensor.clone(memory_format=torch.contiguous_format)
        self.add_to(rest, -1.0)
        return rest

    def dots(self, other: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the inner products with itself and with dense `other` (None: itself), 0-d."""
        return flat_dots(self.dense(), other)

    def scaled(self, factor: float) -> Decoded:
        """Return `factor` times the tensor."""
        return Scaled(self, factor)


class Dense(Decoded):
    """A dense tensor."""

    __slots__ = ("tensor",)

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def dense(self) -> Tensor:
        return self.tensor

    def subtract_from(self, tensor: Tensor) -> None:
        if self.tensor.data_ptr() == tensor.data_ptr():
            # A sum without rounding sends a gradient as it is.
            self.tensor = self.tensor.clone()
        super().subtract_from(tensor)

    @classmethod
    def dense_stack(cls, decoded: Sequence[Dense]) -> Tensor:
        return stack([one.tensor for one in decoded])


class Late(Dense):
    """A dense tensor that is made when it is first asked for."""

    __slots__ = ("_made", "_make")

    def __init__(self, make: Callable[[], Tensor]) -> None:
        self._make = make
        self._made: Tensor | None = None

    @property
    def tensor(self) -> Tensor:
        if self._made is None:
            self._made = self._make()
        return self._made

    @tensor.setter
    def tensor(self, tensor: Tensor) -> None:
        self._made = tensor


class Scaled(Decoded):
    """A multiple of a tensor, with positive zeros."""

    __slots__ = ("factor", "tensor")

    def __init__(self, tensor: Decoded, factor: float) -> None:
        self.tensor = tensor
        self.factor = factor

    def dense(self) -> Tensor:
        # Adding zero turns -0.0, which a sparse tensor does not keep, into 0.0.
        return (self.tensor.dense() * self.factor).add_(0.0)

    @classmethod
    def dense_stack(cls, decoded: Sequence[Scaled]) -> Tensor:
        unscaled = stacked([one.tensor for one in decoded])
        # As with a number, products are computed in float32 at least, and rounded once.
        factors = torch.tensor([one.factor for one in decoded], dtype=working_dtype(unscaled))
        products = rows(unscaled) * factors[:, None]
        return products.to(unscaled.dtype).add_(0.0).view(unscaled.shape)


class Sparse(Decoded):
    """A tensor of a shape with `values` (k) at the flat `indices` (k), and zeros elsewhere."""

    __slots__ = ("indices", "shape", "values")

    def __init__(self, indices: Tensor, values: Tensor, shape: torch.Size) -> None:
        self.indices = indices
        self.values = values
        self.shape = shape

    def dense(self) -> Tensor:
        out = self.values.new_zeros(self.shape)
        out.view(-1)[self.indices] = self.values
        return out

    @classmethod
    def dense_stack(cls, decoded: Sequence[Sparse]) -> Tensor:
        first, size = decoded[0], decoded[0].shape.numel()
        out = first.values.new_zeros((len(decoded), *first.shape))
        counts = torch.tensor([one.indices.numel() for one in decoded])
        starts = (torch.arange(len(decoded)) * size).repeat_interleave(counts)
        indices = torch.cat([one.indices for one in decoded]).add_(starts)
        out.view(-1)[indices] = torch.cat([one.values for one in decoded])
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


class Zero(Decoded):
    """Zeros, in the shape and dtype of `like`."""

    def __init__(self, like: Tensor) -> None:
        self.shape, self.dtype, self.device = like.shape, like.dtype, like.device

    def dense(self) -> Tensor:
        return torch.zeros(self.shape, dtype=self.dtype, device=self.device)

    @classmethod
    def dense_stack(cls, decoded: Sequence[Zero]) -> Tensor:
        first = decoded[0]
        shape = len(decoded), *first.shape
        return torch.zeros(shape, dtype=first.dtype, device=first.device)

    def add_to(self, out: Tensor, weight: float) -> None:
        pass

    def scaled(self, factor: float) -> Decoded:
        return self


def working_dtype(like: Tensor) -> torch.dtype:
    """Return the dtype of a tensor's factors: float32, or float64 for float64."""
    return torch.float64 if like.dtype == torch.float64 else torch.float32


class LowRank(Decoded):
    """`left` (m x r) times the transpose of `right` (n x r), in the shape of `like`."""

    def __init__(self, left: Tensor, right: Tensor, like: Tensor) -> None:
        self.left = left
        self.right = right
        self.shape, self.dtype = like.shape, like.dtype

    def dense(self) -> Tensor:
        product = self.left @ self.right.T
        if not self._within_range():
            # An element may be larger than any element of the compressed tensor.
            limit = torch.finfo(self.dtype).max
            product.clamp_(-limit, limit)
        return product.to(self.dtype).view(self.shape)

    def add_to(self, out: Tensor, weight: float) -> None:
        # The product is in memory of its own.
        out.add_(self.dense().to(out.dtype).mul_(weight))

    def write_to(self, out: Tensor) -> None:
        if out.is_contiguous() and out.dtype == self.left.dtype and self._within_range():
            torch.mm(self.left, self.right.T, out=out.view(len(self.left), len(self.right)))
        else:
            super().write_to(out)

    def missing_from(self, tensor: Tensor) -> Tensor:
        if tensor.dtype != self.left.dtype or not self._within_range():
            return super().missing_from(tensor)
        matrix = tensor.reshape(len(self.left), len(self.right))
        return torch.addmm(matrix, self.left, self.right.T, alpha=-1).view(self.shape)

    def subtract_from(self, tensor: Tensor) -> None:
        if tensor.dtype != self.left.dtype or not self._within_range():
            super().subtract_from(tensor)
        else:
            matrix = tensor.view(len(self.left), len(self.right))
            matrix.addmm_(self.left, self.right.T, alpha=-1)

    def _within_range(self) -> bool:
        """Return whether all elements are known to be within the range of the dtype.

        On a device False, since it is not known without a synchronisation.
        """
        if self.left.device.type != "cpu" or not self.left.numel():
            return False
        largest = float(self.left.abs().max()) * float(self.right.abs().max())
        return largest * self.left.shape[1] < 0.5 * torch.finfo(self.dtype).max


def stacked(decoded: Sequence[Decoded]) -> Tensor:
    """Return the dense tensors of several of one shape and dtype, stacked in new memory."""
    classes = {type(one) for one in decoded}
    if len(classes) == 1:
        return classes.pop().dense_stack(decoded)
    parts = []
    order: list[int] = []
    for each in classes:
        positions = [i for i, one in enumerate(decoded) if type(one) is each]
        parts.append(each.dense_stack([decoded[i] for i in positions]))
        order += positions
    whole = torch.cat(parts)
    ordered = torch.empty_like(whole)
    ordered[order] = whole
    return ordered


def add_all(decoded: Sequence[Decoded], outs: Sequence[Tensor], weight: float) -> None:
    """Call `Decoded.add_to` for several tensors of any shapes.

    Where `out` holds -0.0 and a small tensor 0.0, the sum may be 0.0.
    """
    by_batch(lambda outs, decoded: _add(decoded, outs, weight), outs, decoded)


def _add(decoded: Sequence[Decoded], outs: Sequence[Tensor], weight: float) -> Sequence[None]:
    if is_small(outs[0]):
        terms = stacked(decoded).to(outs[0].dtype).mul_(weight)
        torch._foreach_add_(list(outs), list(terms.unbind()))
    else:
        for one, out in zip(decoded, outs, strict=True):
            one.add_to(out, weight)
    return [None] * len(outs)


def missing_from_all(decoded: Sequence[Decoded], tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return what `Decoded.missing_from` returns, for several tensors of any shapes."""
    return by_batch(_missing, tensors, decoded)


def _missing(tensors: Sequence[Tensor], decoded: Sequence[Decoded]) -> Sequence[Tensor]:
    if not is_small(tensors[0]) or any(isinstance(one, LowRank) for one in decoded):
        return [one.missing_from(tensor) for one, tensor in zip(decoded, tensors, strict=True)]
    rest = stack(tensors)
    return copies(rest.sub_(stacked(decoded).to(rest.dtype)))
