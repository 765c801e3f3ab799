"""Error feedback: the error of one round is added to the gradient of the next."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from lbgm_compress._util.batches import is_small, stack
from lbgm_compress._util.checks import check_number
from lbgm_compress._util.contents import all_finite, nonzero
from lbgm_compress.algorithm import Algorithm
from lbgm_compress.compressor import Compressor, Encoding, State, raw, zero
from lbgm_compress.decoded import missing_from_all
from lbgm_compress.reducible import Reducible, Sums
from lbgm_compress.wire.message import Kind
from lbgm_compress.wrapper import Wrapper

__all__ = ["ErrorFeedback"]

RAW = int(Kind.RAW)


@dataclass(frozen=True, repr=False)
class ErrorFeedback(Wrapper):
    """Adds the residual of the last round before it compresses (arXiv 1901.09847, algorithm 1).

    corrected = gradient + decay * residual; residual = corrected - decoded. For a float16 or
    bfloat16 gradient the residual is float32, so that small remainders are not rounded away.
    Payloads are those of `inner`, and so is the receiver's state. Around a `Reducible`, whose
    contributions are summed over ranks, decoded is what this rank contributed to the average.

    A zero gradient is sent as zero, and the residual stays as it is, without decay: what a layer
    that is not in use has not sent yet waits until it is used again.

    Parameters
    ----------
    inner
        The compressor or reducible whose error is fed back.
    decay
        Factor of the residual in each round, above 0 and at most 1. With 1, the decoded tensors and
        the residual add up to the sum of the gradients. With less, a part of what waits is lost in
        each round; SparseLoCo takes 0.95 (arXiv 2508.15706, algorithm 1).

    Raises
    ------
    ValueError
        If `inner` is neither, or `decay` is outside its range.

    Examples
    --------
    >>> import torch
    >>> from lbgm_compress import TopK
    >>> payload, decoded, state = ErrorFeedback(TopK(0.5)).compress(torch.tensor([3.0, 2.0]), {})
    >>> state["residual"]
    tensor([0., 2.])
    """

    inner: Algorithm  # type: ignore[assignment]
    decay: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.inner, Reducible):
            super().__post_init__()
        check_number("decay", self.decay)
        if not 0 < self.decay <= 1:
            raise ValueError(f"decay must be above 0 and at most 1, not {self.decay}")

    @property
    def adds_up(self) -> bool:
        return self.inner.adds_up

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

    def shared_state(self, state: State) -> State:
        """Return the part of a state that all ranks share: see `Reducible.shared_state`."""
        return {"inner": cast(Reducible, self.inner).shared_state(self.inner_state(state))}

    def average(self, grad: Tensor, state: State) -> Sums:
        """Average one gradient over all ranks: see `Reducible.average`."""
        inner, residual = cast(Reducible, self.inner), state.get("residual")
        if not nonzero([grad])[0]:
            found = yield from inner.average(grad, self.inner_state(state))
            kept = {} if residual is None else {"residual": residual}
            return found._replace(state={**kept, "inner": found.state})
        [corrected] = _corrected([grad], [residual], self.decay)
        # In memory of its own, in which the next residual is made.
        own = corrected.clone() if corrected is grad else corrected
        own = own.contiguous()
        found = yield from inner.average(own, self.inner_state(state))
        found.own.subtract_from(own)
        return found._replace(state={"residual": own, "inner": found.state})

    def encode_together(self, grads: Sequence[Tensor], states: Sequence[State]) -> list[Encoding]:
        used = [True] * len(grads) if self.fixed_size else nonzero(grads)
        chosen = [i for i, is_used in enumerate(used) if is_used]
        encodings = iter(self._encode([grads[i] for i in chosen], [states[i] for i in chosen]))
        return [
            next(encodings) if is_used else zero(self, grad, state)
            for grad, state, is_used in zip(grads, states, used, strict=True)
        ]

    def _encode(self, grads: Sequence[Tensor], states: Sequence[State]) -> list[Encoding]:
        if not grads:
            return []
        corrected = _corrected(grads, [state.get("residual") for state in states], self.decay)
        narrow = [c.to(grad.dtype) for c, grad in zip(corrected, grads, strict=True)]
        inner = cast(Compressor, self.inner).encode_batch(
            narrow, [self.inner_state(s) for s in states]
        )
        missing = missing_from_all([encoding.decoded for encoding in inner], corrected)
        results = []
        for grad, state, encoding, rest, finite in zip(
            grads, states, inner, missing, all_finite(narrow), strict=True
        ):
            if not finite:
                results.append(raw(self, grad, state))
                continue
            if encoding.head[0] & RAW:
                rest = torch.zeros_like(rest)
            head, body, decoded, inner_state, phase_error = encoding
            state = {"residual": rest, "inner": inner_state}
            results.append(Encoding(head, body, decoded, state, phase_error))
        return results


def _corrected(
    grads: Sequence[Tensor], residuals: Sequence[Tensor | None], decay: float
) -> list[Tensor]:
    """Return gradient + decay * residual for each of a batch, in float32 at least."""
    if not is_small(grads[0]):
        return [
            _wide(grad) if residual is None else grad + _decayed(residual, decay)
            for grad, residual in zip(grads, residuals, strict=True)
        ]
    first = _wide(grads[0])
    # Adding -0.0 changes nothing, also not another -0.0.
    nothing = torch.full_like(first, -0.0)
    added = [nothing if residual is None else residual for residual in residuals]
    return list((stack(grads) + _decayed(stack(added), decay)).unbind())


def _decayed(residual: Tensor, decay: float) -> Tensor:
    return residual if decay == 1 else residual * decay


def _wide(grad: Tensor) -> Tensor:
    return grad.float() if grad.dtype.itemsize < 4 else grad
