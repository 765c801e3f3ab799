"""Subspaces that all ranks share: a round sums coefficients alone."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass

from torch import Tensor

from lbgm_compress._util.checks import check_whole
from lbgm_compress.algorithm import State
from lbgm_compress.decoded import LowRank
from lbgm_compress.reducible import Contribution, Reducible, Sums, Term, Total
from lbgm_compress.reducibles.matrices import (
    as_matrix,
    check_precision,
    dense_round,
    orthonormal,
    random_rows,
    unused,
)

__all__ = ["SharedSubspace"]

# A direction that holds less than this share of a matrix's energy is not worth having.
NEGLIGIBLE = 1e-12


@dataclass(frozen=True, repr=False)
class SharedSubspace(Reducible):
    """Averages matrices within a few directions that all ranks hold.

    A gradient is a matrix M (m x n): its first dimension, and all others, transposed if the first
    is longer, so that n >= m. All ranks share r orthonormal directions, the rows of V (r x n). A
    round sums the coefficients C = V M^T (r x m), and the average is C^T V.

    Directions follow the gradient. The first round, and each of the first `warm_up` rounds, is one
    of `PowerSGD`: a power step moves all directions, and takes the sum of r n numbers beside that
    of r m. Later, in every `refresh_every`-th round, the weakest direction, whose coefficients are
    c, is replaced by the sum of R^T c (n numbers), where R is what the other directions miss.

    Use it as ``ErrorFeedback(SharedSubspace(8))``: what the directions miss is then averaged later.
    Tensors with fewer than two dimensions, or for which coefficients are no smaller, are averaged
    as they are.

    Parameters
    ----------
    rank
        Number of directions r of a tensor, at least 1.
    refresh_every
        Number of rounds from one replaced direction to the next, at least 1.
    values
        Precision of the sums: "float16", "float32", or "int8", which belongs inside
        `ErrorFeedback`. Numbers are scaled first, so that they are in its range; see
        `lbgm_compress.collective.sums`.
    warm_up
        Number of rounds at the beginning in which all directions move. They cost more bytes, and
        error feedback catches up sooner: it pays in runs of some hundred rounds.

    Raises
    ------
    ValueError
        If an argument is out of range.
    """

    rank: int = 8
    refresh_every: int = 4
    values: str = "float16"
    warm_up: int = 0

    def __post_init__(self) -> None:
        check_whole("rank", self.rank, 1)
        check_whole("refresh_every", self.refresh_every, 1)
        check_whole("warm_up", self.warm_up, 0)
        check_precision(self.values)

    def initial_state(self, seed: int) -> State:
        return {"seed": seed}

    def forget(self, state: State) -> State:
        return {"seed": state["seed"]} if "seed" in state else {}

    def average(self, grad: Tensor, state: State) -> Sums:
        rank = self._rank(grad)
        if not rank:
            return (yield from dense_round(grad, state, self.values))
        columns = _long_columns(grad)
        if "directions" not in state or state["age"] + 1 < self.warm_up:
            return (yield from self._move_all(grad, columns, rank, state))
        directions: Tensor = state["directions"]
        total = yield Term(directions @ columns, self.values)
        if total.largest == 0:
            return unused(grad, state)
        age = state["age"] + 1
        new = directions
        if age % self.refresh_every == 0:
            new = yield from self._replace_weakest(columns, directions, total)
        average = _product(total.tensor, directions, grad)
        own = _product(total.sent, directions, grad)
        state = {**state, "directions": new, "age": age}
        return Contribution(average, own, state, recycled=new is directions)

    def _move_all(self, grad: Tensor, columns: Tensor, rank: int, state: State) -> Sums:
        start, age = state.get("directions"), state.get("age", -1) + 1
        if start is None:
            start = random_rows(rank, len(columns), state, columns)
        total = yield Term(start @ columns, self.values)
        if total.largest == 0:
            return unused(grad, state)
        short = orthonormal(total.tensor.T).T.contiguous()
        total = yield Term(short @ columns.T, self.values)
        if total.largest == 0:
            return unused(grad, state)
        directions = orthonormal(total.tensor.T).T.contiguous()
        average = _product(short, total.tensor, grad)
        own = _product(short, total.sent, grad)
        return Contribution(average, own, {**state, "directions": directions, "age": age})

    def _replace_weakest(
        self, columns: Tensor, directions: Tensor, total: Total
    ) -> Generator[Term, Total, Tensor]:
        energies = total.tensor.square().sum(1)
        weakest = int(energies.argmin())
        kept = [i for i in range(len(directions)) if i != weakest]
        others = directions[kept]
        start = total.tensor[weakest]
        norm = start.norm()
        if not norm > 0:
            # The weakest direction holds nothing: any other start will do.
            start, norm = total.tensor[int(energies.argmax())], energies.max().sqrt()
        start = start / norm
        missed = columns @ start - (total.sent[kept] @ start) @ others
        found = yield Term(missed, self.values)
        row = found.tensor - (others @ found.tensor) @ others
        length = row.norm()
        if not length * length > NEGLIGIBLE * energies.sum():
            return directions
        new = directions.clone()
        new[weakest] = row / length
        return new

    def _rank(self, grad: Tensor) -> int:
        """Return the number of directions for a gradient, 0 if it is averaged as it is."""
        if grad.dim() < 2 or not grad.numel():
            return 0
        m, n = len(grad), grad.numel() // len(grad)
        rank = min(self.rank, m, n)
        return rank if rank * min(m, n) + max(m, n) / self.refresh_every < m * n else 0


def _long_columns(grad: Tensor) -> Tensor:
    """Return a gradient as a matrix (n x m) whose columns are along its longer side."""
    matrix = as_matrix(grad)
    return matrix if matrix.shape[0] > matrix.shape[1] else matrix.T


def _product(short: Tensor, long: Tensor, grad: Tensor) -> LowRank:
    """Return the product of factors (r x m) of the short side and (r x n) of the long one."""
    tall = len(grad) > grad.numel() // len(grad)
    left, right = (long, short) if tall else (short, long)
    return LowRank(left.T, right.T, grad)
