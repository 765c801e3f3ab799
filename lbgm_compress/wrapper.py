"""The base class of compressors around another compressor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from lbgm_compress.algorithm import Algorithm
from lbgm_compress.compressor import Compressor, Encoding, State
from lbgm_compress.decoded import Decoded

__all__ = ["Wrapper"]


@dataclass(frozen=True, repr=False)
class Wrapper(Compressor):
    """A compressor around `inner` that behaves as `inner` does.

    Subclasses override what they change. The sender's state of `inner` is the entry "inner" of the
    wrapper's, beside whatever a subclass keeps there; the receiver's state is that of `inner`.

    Parameters
    ----------
    inner
        The wrapped compressor.

    Raises
    ------
    ValueError
        If `inner` is not a compressor.
    """

    inner: Compressor

    def __post_init__(self) -> None:
        if isinstance(self.inner, type) and issubclass(self.inner, Algorithm):
            name = self.inner.__name__
            raise ValueError(
                f"{type(self).__name__} wraps a compressor, not the class {name}: write "
                f"{name}(...), with brackets"
            )
        if not isinstance(self.inner, Compressor):
            raise ValueError(f"{type(self).__name__} wraps a compressor, not {self.inner!r}")
        if self.inner.adds_up:
            raise ValueError(
                f"{type(self).__name__} cannot wrap {self.inner!r}, which averages over ranks by "
                "sums and makes no messages: only ErrorFeedback does, around a reducible itself"
            )

    @property
    def kinds(self) -> frozenset[int]:  # type: ignore[override]
        """The kinds of payload of the inner compressor."""
        return self.inner.kinds

    @property
    def receiver_has_state(self) -> bool:
        return self.inner.receiver_has_state

    @property
    def has_residual(self) -> bool:
        return self.inner.has_residual

    @property
    def fixed_size(self) -> bool:
        return self.inner.fixed_size

    @property
    def finishes_average(self) -> bool:
        return self.inner.finishes_average

    def finish(self, mean: Tensor) -> Tensor:
        return self.inner.finish(mean)

    def initial_state(self, seed: int) -> State:
        return {"inner": self.inner.initial_state(seed)}

    def forget(self, state: State) -> State:
        return {**state, "inner": self.inner.forget(self.inner_state(state))}

    def rescale(self, state: State, factor: float) -> State:
        return {**state, "inner": self.inner.rescale(self.inner_state(state), factor)}

    def give_back(self, state: State, tensor: Tensor) -> State:
        return {**state, "inner": self.inner.give_back(self.inner_state(state), tensor)}

    def own_state(self, state: State) -> State:
        return {**state, "inner": self.inner.own_state(self.inner_state(state))}

    def sender_state(self, own: State, held: State, like: Tensor) -> State:
        return {**own, "inner": self.inner.sender_state(self.inner_state(own), held, like)}

    def head_size(self, like: Tensor) -> int:
        return self.inner.head_size(like)

    def encode(self, grad: Tensor, state: State) -> Encoding:
        return self.encode_batch([grad], [state])[0]

    def encode_together(self, grads: Sequence[Tensor], states: Sequence[State]) -> list[Encoding]:
        encodings = self.inner.encode_batch(grads, [self.inner_state(state) for state in states])
        return [
            Encoding(head, body, decoded, {**state, "inner": inner_state}, phase_error)
            for (head, body, decoded, inner_state, phase_error), state in zip(
                encodings, states, strict=True
            )
        ]

    def decode(
        self, head: bytes, body: Tensor, state: State, like: Tensor
    ) -> tuple[Decoded, State]:
        return self.inner.decode(head, body, state, like)

    def read_small(
        self,
        heads: Sequence[bytes],
        bodies: Sequence[Tensor | None],
        states: Sequence[State],
        likes: Sequence[Tensor],
    ) -> list[tuple[Decoded, State]]:
        return self.inner.read_batch(heads, bodies, states, likes)

    @staticmethod
    def inner_state(state: State) -> State:
        """Return the inner compressor's part of a sender's state."""
        inner: State = state.get("inner", {})
        return inner
