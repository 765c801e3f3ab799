"""LBGM with a look-back gradient that all ranks share: the last average that was summed in full."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lbgm_compress._util.checks import check_number
from lbgm_compress.algorithm import State
from lbgm_compress.decoded import Dense, Late
from lbgm_compress.reducible import Contribution, Reducible, Sums, Term
from lbgm_compress.reducibles.matrices import check_precision, dense_round, unused, wide

__all__ = ["SharedLBGM"]

# Numbers of a sketch. The relative standard error of a squared norm is sqrt(2 / WIDTH), 9 %.
WIDTH = 256
# Rows of random signs that are used again and again, each time with other signs of the sums.
ROWS = 1024


@dataclass(frozen=True, repr=False)
class SharedLBGM(Reducible):
    """Averages by one coefficient where the average is nearly parallel to an earlier one.

    The look-back gradient l is the last average that was summed in full, which all ranks hold.
    While averages are near to it, the ranks sum <g, l> / |l| and a sketch of g. Then all know the
    coefficient rho = <mean, l> / |l|^2 of the average, and sin^2 of its angle to l (arXiv
    2202.00280, algorithm 1). If that is at most `delta`, the average is rho l. Else g is summed in
    full.

    So the angle is that of the average, which has less noise than the gradient of one rank, and a
    full round is an ordinary all-reduce. If a look-back gradient is never used, rounds are full
    without a sketch, until an average is again near to the one before.

    What the average and rho l differ in is known from the sketch: `WIDTH` sums of the elements with
    random signs, the same on all ranks, whose squared norm has a relative standard error of 9 %.
    The error of sin^2 is 9 % of sin^2 cos^2. Tensors no larger than a sketch are averaged as they
    are.

    Parameters
    ----------
    delta
        Threshold of sin^2, from 0 to 1.
    values
        Precision of the sums: "float16", "float32", or "int8", which belongs inside
        `ErrorFeedback`. Numbers are scaled first, so that they are in its range; see
        `lbgm_compress.collective.sums`.

    Raises
    ------
    ValueError
        If an argument is out of range.
    """

    delta: float = 0.2
    values: str = "float16"

    def __post_init__(self) -> None:
        check_number("delta", self.delta)
        if not 0 <= self.delta <= 1:
            raise ValueError(f"delta must be from 0 to 1, not {self.delta}")
        check_precision(self.values)

    def forget(self, state: State) -> State:
        return {}

    def average(self, grad: Tensor, state: State) -> Sums:
        if grad.numel() <= WIDTH:
            return (yield from dense_round(grad, state, self.values))
        if "sketch" not in state:
            return (yield from self._full(grad, state))
        flat, look_back = wide(grad).reshape(-1), state["look_back"]
        along = torch.dot(flat, look_back.view(-1)) / state["norm"]
        total = yield Term(torch.cat([along.view(1), _sketch(flat)]), self.values)
        if total.largest == 0:
            return unused(grad, state)
        rho = float(total.tensor[0]) / state["norm"]
        sketch = total.tensor[1:].clone()
        missed = float((sketch - rho * state["sketch"]).square().sum())
        square = float(total.tensor[0]) ** 2 + missed
        phase_error = missed / square if square else 1.0
        if phase_error > self.delta:
            return (yield from self._full(grad, state, sketch, phase_error))
        held, own = Dense(look_back), float(total.sent[0]) / state["norm"]
        state = {**state, "used": True}
        return Contribution(held.scaled(rho), held.scaled(own), state, True, phase_error)

    def _full(
        self,
        grad: Tensor,
        state: State,
        sketch: Tensor | None = None,
        phase_error: float | None = None,
    ) -> Sums:
        total = yield Term(wide(grad), self.values)
        if total.largest == 0:
            return unused(grad, state)
        flat = total.tensor.view(-1)
        norm = float(flat.norm())
        look_back = state.get("look_back")
        # A sketch pays again after a look-back gradient that was used, or one that could have been.
        pays = look_back is None or state["used"]
        if look_back is not None and phase_error is None:
            cosine = float(torch.dot(flat, look_back.view(-1))) / (norm * state["norm"] or math.inf)
            phase_error = min(1.0, max(0.0, 1 - cosine**2))
            pays = phase_error <= self.delta
        new: State = {}
        if 0 < norm < math.inf:
            new = {"look_back": total.tensor, "norm": norm, "used": False}
            if pays:
                new["sketch"] = _sketch(flat) if sketch is None else sketch
        return Contribution(Dense(total.tensor), Late(lambda: total.sent), new, False, phase_error)


def _sketch(flat: Tensor) -> Tensor:
    """Return `WIDTH` sums of the elements with random signs, of which all ranks have the same."""
    signs, of_sums = _signs(-(-flat.numel() // (ROWS * WIDTH)), flat.device)
    sums = flat.new_zeros(WIDTH)
    for part, sign in zip(torch.split(flat, ROWS * WIDTH), of_sums, strict=True):
        rows = -(-part.numel() // WIDTH)
        whole = torch.nn.functional.pad(part, (0, rows * WIDTH - part.numel()))
        sums += (whole.view(rows, WIDTH) * signs[:rows]).sum(0) * sign
    return sums


@functools.lru_cache(maxsize=64)
def _signs(parts: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return random signs of elements (ROWS x WIDTH), and of the sums of each part, float32."""
    generator = torch.Generator().manual_seed(0)
    shape = ROWS + parts, WIDTH
    signs = torch.randint(0, 2, shape, generator=generator).mul_(2).sub_(1).float().to(device)
    return signs[:ROWS], signs[ROWS:]
