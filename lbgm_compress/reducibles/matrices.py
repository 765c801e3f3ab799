"""Gradients as matrices, and dense rounds."""

from __future__ import annotations

import torch
from torch import Tensor

from lbgm_compress.algorithm import State
from lbgm_compress.decoded import Dense, Late, Zero, working_dtype
from lbgm_compress.reducible import PRECISIONS, Contribution, Sums, Term

__all__ = [
    "as_matrix",
    "check_precision",
    "dense_round",
    "orthonormal",
    "random_rows",
    "unused",
    "wide",
]


def wide(grad: Tensor) -> Tensor:
    """Return a gradient in float32, or in float64 if it has that dtype."""
    return grad.to(working_dtype(grad))


def as_matrix(grad: Tensor) -> Tensor:
    """Return a gradient as a matrix: its first dimension, and all others."""
    return wide(grad).reshape(len(grad), -1)


def dense_round(grad: Tensor, state: State, values: str) -> Sums:
    """Average a gradient as it is: a tensor on which nothing would be saved."""
    total = yield Term(wide(grad), values)
    if total.largest == 0:
        return unused(grad, state)
    return Contribution(Dense(total.tensor), Late(lambda: total.sent), state)


def unused(grad: Tensor, state: State) -> Contribution:
    """Return the result where no rank used the parameter."""
    return Contribution(Zero(grad), Zero(grad), state)


def orthonormal(columns: Tensor) -> Tensor:
    """Return a matrix (n x r, r <= n) with orthonormal columns, which span those of `columns`."""
    basis: Tensor = torch.linalg.qr(columns).Q
    return basis


def random_rows(rank: int, length: int, state: State, like: Tensor) -> Tensor:
    """Return random orthonormal rows (rank x length), the same on all ranks.

    `state` has the seed, and `like` gives dtype and device.
    """
    generator = torch.Generator().manual_seed(state.get("seed", 0))
    start = torch.randn(length, rank, generator=generator, dtype=like.dtype)
    return orthonormal(start).T.to(like.device)


def check_precision(values: str) -> None:
    """Raise `ValueError` unless `values` is a precision of sums."""
    if not isinstance(values, str) or values not in PRECISIONS:
        known = " or ".join(map(repr, PRECISIONS))
        raise ValueError(f"values must be {known}, not {values!r}")
