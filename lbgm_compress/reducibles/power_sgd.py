"""PowerSGD: the leading singular directions of the average, by one step of power iteration."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lbgm_compress._util.checks import check_whole
from lbgm_compress.algorithm import State
from lbgm_compress.decoded import LowRank
from lbgm_compress.reducible import Contribution, Reducible, Sums, Term
from lbgm_compress.reducibles.matrices import (
    as_matrix,
    check_precision,
    dense_round,
    orthonormal,
    random_rows,
    unused,
)

__all__ = ["PowerSGD"]


@dataclass(frozen=True, repr=False)
class PowerSGD(Reducible):
    """Averages matrices of rank `rank` (PowerSGD, arXiv 1905.13727, algorithm 1).

    A gradient is a matrix M (m x n): the first dimension, and all others. All ranks share Q (n x r)
    of the last round. P, the sum of M Q, is made orthonormal, the next Q is the sum of M^T P, and
    the average is P Q^T. A round sums r (m + n) numbers.

    Use it as ``ErrorFeedback(PowerSGD(4))``, as its paper does. Tensors with fewer than two
    dimensions, or for which P and Q are no smaller, are averaged as they are.

    Parameters
    ----------
    rank
        Number of directions r, at least 1.
    values
        Precision of the sums: "float16", "float32", or "int8", which belongs inside
        `ErrorFeedback`. Numbers are scaled first, so that they are in its range; see
        `lbgm_compress.collective.sums`.

    Raises
    ------
    ValueError
        If an argument is out of range.
    """

    rank: int = 4
    values: str = "float16"

    def __post_init__(self) -> None:
        check_whole("rank", self.rank, 1)
        check_precision(self.values)

    def initial_state(self, seed: int) -> State:
        return {"seed": seed}

    def forget(self, state: State) -> State:
        return {"seed": state["seed"]} if "seed" in state else {}

    def average(self, grad: Tensor, state: State) -> Sums:
        rank = self._rank(grad)
        if not rank:
            return (yield from dense_round(grad, state, self.values))
        matrix = as_matrix(grad)
        # Factors are held transposed: products of few rows and a matrix take less time.
        right = state.get("right")
        if right is None:
            right = random_rows(rank, matrix.shape[1], state, matrix)
        total = yield Term(right @ matrix.T, self.values)
        if total.largest == 0:
            return unused(grad, state)
        left = orthonormal(total.tensor.T)
        total = yield Term(left.T @ matrix, self.values)
        if total.largest == 0:
            return unused(grad, state)
        return Contribution(
            LowRank(left, total.tensor.T, grad),
            LowRank(left, total.sent.T, grad),
            # Its span is what counts; so the next sums are of the size of the gradient, too.
            {**state, "right": total.tensor / total.largest},
        )

    def _rank(self, grad: Tensor) -> int:
        """Return the rank for a gradient, 0 if it is averaged as it is."""
        if grad.dim() < 2 or not grad.numel():
            return 0
        m, n = len(grad), grad.numel() // len(grad)
        rank = min(self.rank, m, n)
        return rank if rank * (m + n) < m * n else 0
