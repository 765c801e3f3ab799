"""A threshold on what recycling loses, in the place of one on the angle."""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["NormBudget"]


@dataclass(frozen=True, repr=False)
class NormBudget:
    """Lets LBGM recycle while what it misses of a gradient is no longer than a budget.

    The condition of the convergence theorem of arXiv 2202.00280 (theorem 1), for each tensor: with
    the accumulated gradient g of tau local steps and the look-back phase error sin^2(alpha),
    recycle when

        |g / tau|^2 sin^2(alpha) <= Delta^2.

    The left side is the squared length of what rho * l misses of g / tau. A constant `delta` bounds
    it relative to the gradient, and so as strictly at the end of training as at its start; a budget
    is absolute: strict while gradients are large, and without any condition when they are shorter
    than `budget`. Take it for the theorem's guarantee, or where the length of gradients is known
    and training should be exact while it is fast; take a constant where one threshold serves
    gradients of many lengths, as those of different layers are.

    Parameters
    ----------
    budget
        Delta, in units of the gradient; at least 0. It holds for each tensor: T tensors together
        miss at most sqrt(T) times as much.
    local_steps
        tau, the number of local steps whose sum of gradients g is.

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
        if isinstance(self.budget, bool) or not isinstance(self.budget, (int, float)):
            raise ValueError(f"budget must be a number, not {self.budget!r}")
        if not 0 <= self.budget < math.inf:
            raise ValueError(f"budget must be at least 0 and finite, not {self.budget}")
        steps = self.local_steps
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise ValueError(f"local_steps must be a whole number of at least 1, not {steps!r}")

    def __repr__(self) -> str:
        """Return the shortest expression that builds this threshold."""
        steps = "" if self.local_steps == 1 else f", local_steps={self.local_steps!r}"
        return f"{type(self).__name__}({self.budget!r}{steps})"

    def limit(self, square_norm: float) -> float:
        """Return the largest sin^2(alpha) at which a gradient with this |g|^2 is recycled."""
        allowed = self.budget * self.local_steps
        if allowed >= math.sqrt(square_norm):
            return 1.0
        # The quotient first: squares of small budgets would underflow.
        return (allowed / math.sqrt(square_norm)) ** 2
