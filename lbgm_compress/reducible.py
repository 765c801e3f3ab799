"""The contract of algorithms whose contributions add up over ranks: its rules and its laws.

A reducible is a frozen dataclass of hyper-parameters, as a compressor is. All ranks share what they
look back at, so that a sum over ranks, which the engine's own all-reduce makes, is all that they
exchange: the cost of a rank does not grow with their number, and nothing is decoded once a rank.

Algorithms do not communicate. `Reducible.average` is a generator: it yields a `Term`, which is to
be added up over all ranks, is sent the `Total`, may yield further terms, and returns a
`Contribution`. A driver runs the generators of many tensors side by side, lays what they yield at
one time end to end, and asks the engine for one sum (`lbgm_compress.collective.summed`).

Rules for `average`:

- The state of a tensor may be ``{}`` as well as what `initial_state` returned. It is not modified
  in place, and neither is the gradient.
- What is yielded is linear in the gradient, given what all ranks share. The driver weights it with
  the rank's share, so that a total is the term of the weighted average.
- If a total is zero everywhere (`Total.largest`), all ranks go on with the state that they had:
  then no rank used the parameter.
- A gradient with inf or nan in any element makes a total that is not finite. The driver then ends
  the generator, and the average of the tensor is nan on all ranks. Totals that are sent are finite.
- Randomness comes from a generator that is seeded from the state, with the same seed on all ranks.

The laws (`tests.reducible_laws` checks them), with the numbers of `lbgm_compress.compressor`:

1. The average has the same bits on all ranks, and is the weighted average of what the ranks
   contributed, up to the rounding of the sums.
2. `average` is pure: same input, same state, same totals, same terms and result.
3. ``eval(repr(r)) == r``.
4. A state survives `torch.save` and ``torch.load(weights_only=True)`` and the run goes on
   bit-exactly.
5. Shapes and dtypes come back as they went.
7. How many terms are yielded, their shapes and their precision depend on what all ranks share
   alone: hyper-parameters, shapes, totals received so far. So no rank waits for a sum that another
   does not make.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
from collections.abc import Callable, Generator
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from lbgm_compress.algorithm import Algorithm, State
from lbgm_compress.decoded import Decoded

__all__ = [
    "PRECISIONS",
    "Contribution",
    "Reducible",
    "Sums",
    "Term",
    "Total",
]

PRECISIONS = {"float16": torch.float16, "float32": torch.float32, "int8": torch.int8}


class Term(NamedTuple):
    """Numbers of a rank that are to be added up over all ranks."""

    tensor: Tensor
    """The numbers, of any shape; float32 or float64."""
    values: str = "float32"
    """The precision of the sum, a key of `PRECISIONS`."""


class Total:
    """The weighted average of a term over all ranks, with the shape and dtype of the term.

    Attributes
    ----------
    tensor : Tensor
        The average, with the same bits on all ranks.
    sent : Tensor
        This rank's term, as it was rounded for the sum. It is made when it is first asked for.
    largest : float
        The largest magnitude in the average, the same on all ranks.
    """

    def __init__(self, tensor: Tensor, make_sent: Callable[[], Tensor], largest: float) -> None:
        self.tensor = tensor
        self.largest = largest
        self._make_sent = make_sent

    @functools.cached_property
    def sent(self) -> Tensor:
        return self._make_sent()


class Contribution(NamedTuple):
    """The result of a round for one tensor."""

    average: Decoded
    """The average over all ranks, in the shape of the gradient."""
    own: Decoded
    """What this rank contributed to it: the average of these over all ranks is `average`."""
    state: State
    """The state for the next round; it takes effect only if the caller keeps it."""
    recycled: bool = False
    """True if the average is made of what all ranks held before, and of coefficients."""
    phase_error: float | None = None
    """sin^2 of the angle of the average to the look-back gradient; None without one."""


Sums: TypeAlias = Generator[Term, Total, Contribution]


@dataclasses.dataclass(frozen=True, repr=False)
class Reducible(Algorithm, abc.ABC):
    """Averages gradients over ranks by sums: the rules and laws are above."""

    @property
    def adds_up(self) -> bool:
        return True

    @abc.abstractmethod
    def average(self, grad: Tensor, state: State) -> Sums:
        """Average one gradient over all ranks.

        Parameters
        ----------
        grad
            This rank's gradient, of any shape; float32, float16, bfloat16 or float64. It does not
            change until the generator has ended.
        state
            The state that the last round returned, or `initial_state` in the first.

        Yields
        ------
        Term
            What is to be added up; a `Total` is sent back.

        Returns
        -------
        Contribution
            The average, this rank's part of it, and the new state.
        """

    def shared_state(self, state: State) -> State:
        """Return the part of a state that all ranks share: the state of a rank that joins."""
        return state
