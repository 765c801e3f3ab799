"""What one round loses, the next one adds back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lbgm_compress.compressor import Compressor, Encoding, State, all_finite, raw
from lbgm_compress.decoded import Decoded
from lbgm_compress.wire.message import Kind

__all__ = ["ErrorFeedback"]


@dataclass(frozen=True, repr=False)
class ErrorFeedback(Compressor):
    """Adds the residual of the last round before it compresses (arXiv 1901.09847, algorithm 1).

    corrected = gradient + residual; residual = corrected - decoded. The residual is kept in
    float32 for a float16 or bfloat16 gradient, so that small remainders are not rounded away. A
    payload is that of `inner`; a receiver needs nothing more.

    Parameters
    ----------
    inner
        The compressor that loses something.

    Examples
    --------
    >>> import torch
    >>> from lbgm_compress import TopK
    >>> payload, decoded, state = ErrorFeedback(TopK(0.5)).compress(torch.tensor([3.0, 2.0]), {})
    >>> state["residual"]
    tensor([0., 2.])
    """

    inner: Compressor

    def __post_init__(self) -> None:
        if not isinstance(self.inner, Compressor):
            raise ValueError(f"ErrorFeedback wraps a compressor, not {self.inner!r}")

    @property
    def kinds(self) -> frozenset[int]:  # type: ignore[override]
        """Those of the inner compressor."""
        return self.inner.kinds

    @property
    def receiver_has_state(self) -> bool:
        return self.inner.receiver_has_state

    @property
    def has_residual(self) -> bool:
        return True

    @property
    def finishes_average(self) -> bool:
        return self.inner.finishes_average

    def initial_state(self, seed: int) -> State:
        return {"inner": self.inner.initial_state(seed)}

    def forget(self, state: State) -> State:
        return {**state, "inner": self.inner.forget(state.get("inner", {}))}

    def own_state(self, state: State) -> State:
        return {**state, "inner": self.inner.own_state(state.get("inner", {}))}

    def sender_state(self, own: State, held: State, like: Tensor) -> State:
        return {**own, "inner": self.inner.sender_state(own.get("inner", {}), held, like)}

    def head_size(self, like: Tensor) -> int:
        return self.inner.head_size(like)

    def finish(self, mean: Tensor) -> Tensor:
        return self.inner.finish(mean)

    def encode(self, grad: Tensor, state: State) -> Encoding:
        return self.encode_batch([grad], [state])[0]

    def encode_batch(self, grads: Sequence[Tensor], states: Sequence[State]) -> list[Encoding]:
        if grads and grads[0].device.type == "cpu":
            # There is nothing to synchronise, and a tensor is still in the cache when its residual
            # is taken.
            return [
                self._encode([grad], [state])[0] for grad, state in zip(grads, states, strict=True)
            ]
        return self._encode(grads, states)

    def _encode(self, grads: Sequence[Tensor], states: Sequence[State]) -> list[Encoding]:
        corrected = [
            grad + state["residual"] if "residual" in state else _wide(grad)
            for grad, state in zip(grads, states, strict=True)
        ]
        narrow = [c.to(grad.dtype) for c, grad in zip(corrected, grads, strict=True)]
        inner = self.inner.encode_batch(narrow, [state.get("inner", {}) for state in states])
        results = []
        for i, finite in enumerate(all_finite(narrow)):
            grad, state, encoding = grads[i], states[i], inner[i]
            if not finite:
                results.append(raw(self, grad, state))
                continue
            if encoding.head[0] & Kind.RAW:
                residual = torch.zeros_like(corrected[i], memory_format=torch.contiguous_format)
            else:
                residual = encoding.decoded.missing_from(corrected[i])
            state = {"residual": residual, "inner": encoding.state}
            results.append(encoding._replace(state=state))
        return results

    def decode(
        self, head: bytes, body: Tensor, state: State, like: Tensor
    ) -> tuple[Decoded, State]:
        return self.inner.decode(head, body, state, like)


def _wide(grad: Tensor) -> Tensor:
    return grad.float() if grad.dtype.itemsize < 4 else grad
