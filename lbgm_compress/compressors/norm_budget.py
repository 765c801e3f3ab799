"""A threshold on the error of recycling, instead of one on the angle."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lbgm_compress._util.checks import check_number, check_whole

__all__ = ["NormBudget"]


@dataclass(frozen=True, repr=False)
class NormBudget:
    """Lets LBGM recycle a gradient while the norm of the error is within a budget.

    This is the condition of theorem 1, the convergence theorem of arXiv 2202.00280, for each
    tensor. With the accumulated gradient g of tau local steps and the look-back phase error
    sin^2(alpha), a gradient is recycled if

        |g / tau|^2 sin^2(alpha) <= Delta^2.

    The left side is the squared norm of the difference between g / tau and its multiple of the
    look-back gradient. A constant `delta` bounds that error relative to the gradient, at the start
    of training as at its end. A budget is an absolute bound: strict while gradients are large, and
    no condition at all for gradients shorter than the budget. Choose a budget for the theorem's
    guarantee, or where the norm of gradients is known. Choose a constant where one threshold serves
    gradients of different norms, such as those of different layers.

    Parameters
    ----------
    budget
        Delta, in units of the gradient, at least 0. It holds for each tensor: the error of T
        tensors together is at most sqrt(T) times as large.
    local_steps
        tau, the number of local steps whose gradients are summed in g.

    Raises
    ------
    ValueError
        If a parameter is outside its range.

    Examples
    --------
    >>> NormBudget(0.1).limit(0.04), NormBudget(0.1).limit(0.0001)
    (0.25, 1.0)
    """

    budget: float
    local_steps: int = 1

    def __post_init__(self) -> None:
        check_number("budget", self.budget)
        if not 0 <= self.budget < math.inf:
            raise ValueError(f"budget must be at least 0 and finite, not {self.budget}")
        check_whole("local_steps", self.local_steps, least=1)

    def __repr__(self) -> str:
        """Return the shortest expression that builds this threshold."""
        steps = "" if self.local_steps == 1 else f", local_steps={self.local_steps!r}"
        return f"{type(self).__name__}({self.budget!r}{steps})"

    def limit(self, square_norm: float) -> float:
        """Return the threshold of sin^2(alpha) for a gradient with this |g|^2."""
        allowed = self.budget * self.local_steps
        if allowed >= math.sqrt(square_norm):
            return 1.0
        # The quotient is taken first, since squares of small budgets would underflow.
        return (allowed / math.sqrt(square_norm)) ** 2
