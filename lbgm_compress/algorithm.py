"""What compressors and reducibles have in common: how they are written, and a state."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor

__all__ = ["Algorithm", "State", "check_algorithm"]

State = dict[str, Any]


@dataclasses.dataclass(frozen=True, repr=False)
class Algorithm:
    """Hyper-parameters of an algorithm that makes gradients smaller, and its methods for states.

    A state is a nested dict of tensors and numbers that is passed in and returned. A state and the
    tensors in it are never modified in place.
    """

    @property
    def adds_up(self) -> bool:
        """True for a `Reducible`, or a compressor around one: an all-reduce averages it."""
        return False

    @property
    def has_residual(self) -> bool:
        """True if a round may carry what earlier gradients lost."""
        return False

    @property
    def finishes_average(self) -> bool:
        """True if `Compressor.finish` changes the average, as a majority vote does."""
        return False

    def __repr__(self) -> str:
        """Return the shortest expression that builds this object."""
        arguments = []
        for position, field in enumerate(dataclasses.fields(self)):
            value = getattr(self, field.name)
            if value == field.default:
                continue
            plain = field.default is dataclasses.MISSING or isinstance(value, Algorithm)
            bare = position == 0 and plain
            arguments.append(repr(value) if bare else f"{field.name}={value!r}")
        return f"{type(self).__name__}({', '.join(arguments)})"

    def initial_state(self, seed: int) -> State:
        """Return a state before the first round, with the seed of its randomness."""
        return {}

    def forget(self, state: State) -> State:
        """Return a state without what others hold, too: the next round has everything in full.

        The part that only this worker knows, such as a residual, stays.
        """
        return state

    def rescale(self, state: State, factor: float) -> State:
        """Return a state for gradients that are `factor` times as large from now on.

        That is so when a loss scale changes. An algorithm overrides this if its state is in units
        of the gradient, such as a residual, or if it compares gradients with a fixed number.
        """
        return state

    def give_back(self, state: State, tensor: Tensor) -> State:
        """Return a state with `tensor` added to the residual.

        `tensor` is what a round carried that was not applied. Without a residual it is lost, as it
        would be without compression.
        """
        return state


def check_algorithm(algorithm: Any) -> None:
    """Raise `TypeError` unless `algorithm` is a compressor or a reducible."""
    if isinstance(algorithm, type) and issubclass(algorithm, Algorithm):
        name = algorithm.__name__
        raise TypeError(
            f"expected a compressor such as LBGM(TopK(0.01)), not the class {name}: write "
            f"{name}(...), with brackets"
        )
    if not isinstance(algorithm, Algorithm):
        hint = ": parse_compressor reads text" if isinstance(algorithm, str) else ""
        raise TypeError(
            f"expected a compressor such as LBGM(TopK(0.01)), not {type(algorithm).__name__}{hint}"
        )
