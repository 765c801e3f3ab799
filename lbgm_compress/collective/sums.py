"""Sums over ranks of the numbers of many tensors, in one precision.

- float32 (float64 for tensors of that dtype): as the numbers are.
- float16 has 11 bits, and holds numbers up to 65,504. The numbers of each tensor are multiplied by
  a power of two that brings the largest number of the last average near 2^8: an average may be 256
  times as large as the last one, and what is more than 2^22 times smaller than its largest number
  is rounded away.
- int8: each of K ranks sends whole numbers up to 127 / K, so that their sum is at most 127. Their
  unit is such that numbers of sqrt(K) times the last average's largest number are in range, since
  noise of single ranks is larger than that of their average. Larger ones are cut off. What a rank
  sent is known to it, so that error feedback keeps the rest. Two further numbers for each tensor
  say how many ranks have something else than zero, and how many cannot send it in this unit.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from lbgm_compress.collective.transport import Pending, Transport
from lbgm_compress.reducible import Term, Total

__all__ = ["MOST_RANKS", "SUMS", "TARGET", "HalfSum", "Int8Sum", "Sum"]

# Exponent of the largest number of an average, scaled for float16.
TARGET = 8
# A scaled average in float16 whose largest number is smaller is summed again.
SMALLEST = 2.0**-8
# Sums of more ranks are not made in int8, since a rank could send -3 to 3 alone.
MOST_RANKS = 16
# An average in int8 whose largest number is this many times smaller than the last one, or a number
# this many times larger than the largest in range, is summed again.
FACTOR = 16


class Sum:
    """Terms of one precision, end to end, which are added up as they are.

    Parameters
    ----------
    terms
        The terms by name.
    dtype
        The dtype of the sum.
    exponents
        For each term, the exponent of its scale.
    share
        This rank's share of the average.
    size
        The number of ranks.
    notice
        Numbers at the front of the sum.
    """

    FLAGS: ClassVar[int] = 0
    """Further numbers for each term, at the front of the sum."""
    pending: Pending[Tensor]
    _summed: Tensor

    def __init__(
        self,
        terms: Mapping[str, Term],
        dtype: torch.dtype,
        exponents: Sequence[int],
        share: float,
        size: int,
        notice: Sequence[float],
    ) -> None:
        self._terms = terms
        self._share = share
        self._size = size
        self._front = len(notice)
        self._prepare(exponents)
        tensors = [term.tensor.reshape(-1) for term in terms.values()]
        # The widest dtype of the terms.
        self._wide = functools.reduce(torch.promote_types, (t.dtype for t in tensors))
        self._sizes = [len(t) for t in tensors]
        front = [*notice, *self._flags(tensors)]
        self._flat = tensors[0].new_empty(len(front) + sum(self._sizes), dtype=dtype)
        self._start = len(front)
        if front:
            self._flat[: self._start] = torch.tensor(front, dtype=dtype)
        parts = torch.split(self._flat[self._start :], self._sizes)
        for i, (part, tensor) in enumerate(zip(parts, tensors, strict=True)):
            self._encode(i, tensor, part)
        self._sent = self._kept()
        self.bytes = self._flat.numel() * self._flat.element_size()

    def begin(self, transport: Transport, key: str) -> None:
        """Begin to add up."""
        self.pending = transport.begin_all_reduce(self._flat, key)

    def wait(self) -> None:
        """Wait until all ranks have added up."""
        self._summed = self.pending.result()

    def collect(
        self, totals: dict[str, Total], read_notice: Callable[[float, float, float], None]
    ) -> dict[str, Term]:
        """Fill in totals, after `wait`, and return the terms whose sum is not of use."""
        summed = self._summed.to(self._wide)
        parts = torch.split(summed[self._start :], self._sizes)
        # In two passes that need no memory, with one synchronisation.
        ends = [end.view(1) for part in parts if part.numel() for end in (part.amin(), part.amax())]
        numbers = torch.cat([summed[: self._start], *ends]).tolist()
        if self._front:
            read_notice(*numbers[: self._front])
        flags, found = numbers[self._front : self._start], iter(numbers[self._start :])
        again = {}
        for i, (name, part) in enumerate(zip(self._terms, parts, strict=True)):
            # Both are nan if one element is.
            top = max(-next(found), next(found)) if part.numel() else 0.0
            term = self._terms[name]
            if not math.isfinite(top) or self._useless(i, top, flags):
                again[name] = term
                continue
            unit = self._unit(i)
            if unit != 1:
                part = part.mul_(unit)
            part = part.to(term.tensor.dtype).view(term.tensor.shape)
            make_sent = functools.partial(self._as_sent, i, term.tensor)
            totals[name] = Total(part, make_sent, top * unit)
        return again

    def _as_sent(self, i: int, term: Tensor) -> Tensor:
        """Return a term as it was rounded for the sum."""
        if self._sent is None:
            return term
        part = self._sent[i].to(self._wide).mul_(self._unit(i) / self._share)
        return part.to(term.dtype).view(term.shape)

    # --- what depends on the precision ------------------------------------------------------------

    def _prepare(self, exponents: Sequence[int]) -> None:
        """Take the exponents."""

    def _flags(self, tensors: Sequence[Tensor]) -> Sequence[int]:
        """Return further numbers at the front of the sum."""
        return ()

    def _encode(self, i: int, tensor: Tensor, part: Tensor) -> None:
        """Write the numbers of a term that are added up to `part`."""
        part.copy_(tensor if self._share == 1 else tensor * self._share)

    def _kept(self) -> Sequence[Tensor] | None:
        """Return the numbers of each term as they are sent, if that is not what the terms are."""
        return None

    def _useless(self, i: int, top: float, flags: Sequence[float]) -> bool:
        """Return whether a sum, whose largest magnitude is `top`, has to be made again."""
        return False

    def _unit(self, i: int) -> float:
        """Return the factor from a number in the sum to one in the average."""
        return 1.0


class HalfSum(Sum):
    """Terms that are added up in float16."""

    def _prepare(self, exponents: Sequence[int]) -> None:
        self._scales = [2.0**exponent for exponent in exponents]

    def _encode(self, i: int, tensor: Tensor, part: Tensor) -> None:
        factor = self._share * self._scales[i]
        part.copy_(tensor if factor == 1 else tensor * factor)

    def _kept(self) -> Sequence[Tensor] | None:
        # The sum may be taken in place.
        return torch.split(self._flat[self._start :].clone(), self._sizes)

    def _useless(self, i: int, top: float, flags: Sequence[float]) -> bool:
        return 0 < top < SMALLEST

    def _unit(self, i: int) -> float:
        return 1 / self._scales[i]


class Int8Sum(HalfSum):
    """Terms that are added up as whole numbers of eight bits."""

    FLAGS = 2

    def _prepare(self, exponents: Sequence[int]) -> None:
        self._limit = 127 // self._size
        self._margin = 2.0 ** math.ceil(math.log2(self._size) / 2)
        # A number is sent times its rank's share, which is 1 / K where all weights are equal.
        per_number = self._limit * self._size / self._margin
        self._scales = [2.0 ** (exponent - TARGET) * per_number for exponent in exponents]

    def _flags(self, tensors: Sequence[Tensor]) -> Sequence[int]:
        ends = [end.view(1) for t in tensors if t.numel() for end in (t.amin(), t.amax())]
        numbers = iter(torch.cat(ends).tolist() if ends else ())
        flags = []
        for tensor, scale in zip(tensors, self._scales, strict=True):
            top = max(-next(numbers), next(numbers)) if tensor.numel() else 0.0
            # Written so that it holds for nan.
            fits = top * scale * self._share <= FACTOR * self._limit
            flags += [int(top != 0), int(not fits)]
        return flags

    def _encode(self, i: int, tensor: Tensor, part: Tensor) -> None:
        scaled = tensor * (self._share * self._scales[i])
        part.copy_(scaled.round_().clamp_(-self._limit, self._limit).nan_to_num_(0.0))

    def _useless(self, i: int, top: float, flags: Sequence[float]) -> bool:
        used, unfit = flags[2 * i : 2 * i + 2]
        least = self._limit * self._size / (self._margin * FACTOR)
        return bool(unfit) or bool(used and top < least)


SUMS: Mapping[torch.dtype, type[Sum]] = {torch.float16: HalfSum, torch.int8: Int8Sum}
"""The kinds of sums that are not made in the dtype of the terms."""
