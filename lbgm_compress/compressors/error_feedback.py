"""Error feedback: the error of one round is added to the gradient of the next."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lbgm_compress.compressor import Encoding, State, all_finite, raw, zero
from lbgm_compress.wire.message import Kind
from lbgm_compress.wrapper import Wrapper

__all__ = ["ErrorFeedback"]


@dataclass(frozen=True, repr=False)
class ErrorFeedback(Wrapper):
    """Adds the residual of the last round before it compresses (arXiv 1901.09847, algorithm 1).

    corrected = gradient + residual; residual = corrected - decoded. For a float16 or bfloat16
    gradient the residual is float32, so that small remainders are not rounded away. Payloads are
    those of `inner`, and so is the receiver's state.

    A zero gradient is sent as zero, and the residual stays: what a layer that is not in use has not
    sent yet waits until it is used again.

    Parameters
    ----------
    inner
        The compressor whose error is fed back.

    Raises
    ------
    ValueError
        If `inner` is not a compressor.

    Examples
    --------
    >>> import torch
    >>> from lbgm_compress import TopK
    >>> payload, decoded, state = ErrorFeedback(TopK(0.5)).compress(torch.tensor([3.0, 2.0]), {})
    >>> state["residual"]
    tensor([0., 2.])
    """

    @property
    def has_residual(self) -> bool:
        return True

    def rescale(self, state: State, factor: float) -> State:
        state = super().rescale(state, factor)
        if "residual" in state:
            state["residual"] = state["residual"] * factor
        return state

    def give_back(self, state: State, tensor: Tensor) -> State:
        residual = _wide(tensor).clone(memory_format=torch.contiguous_format)
        if "residual" in state:
            residual += state["residual"]
        return {"inner": {}, **state, "residual": residual}

    def encode_batch(self, grads: Sequence[Tensor], states: Sequence[State]) -> list[Encoding]:
        if grads and grads[0].device.type == "cpu":
            # There is nothing to synchronise. One at a time, a tensor is still in the cache when
            # its residual is taken.
            return [
                zero(self, grad, state)
                if _is_zero(grad) and not self.fixed_size
                else self._encode([grad], [state])[0]
                for grad, state in zip(grads, states, strict=True)
            ]
        encodings = self._encode(grads, states)
        if self.fixed_size or not grads:
            return encodings
        used = torch.stack([grad.any() for grad in grads]).tolist()
        return [
            encoding if nonzero else zero(self, grad, state)
            for grad, state, encoding, nonzero in zip(grads, states, encodings, used, strict=True)
        ]

    def _encode(self, grads: Sequence[Tensor], states: Sequence[State]) -> list[Encoding]:
        corrected = [
            grad + state["residual"] if "residual" in state else _wide(grad)
            for grad, state in zip(grads, states, strict=True)
        ]
        narrow = [c.to(grad.dtype) for c, grad in zip(corrected, grads, strict=True)]
        inner = self.inner.encode_batch(narrow, [self.inner_state(s) for s in states])
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


def _is_zero(tensor: Tensor) -> bool:
    """Return whether all elements of a tensor on the CPU are zero."""
    flat = tensor.reshape(-1)
    # Hardly ever are all of a few elements zero, and not the others.
    return not flat[:: max(flat.numel() // 16, 1)].any() and not flat.any()


def _wide(grad: Tensor) -> Tensor:
    return grad.float() if grad.dtype.itemsize < 4 else grad
