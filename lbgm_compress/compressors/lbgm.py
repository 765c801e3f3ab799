"""The Look-Back Gradient Multiplier."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from lbgm_compress._util.batches import by_batch, copies, is_small
from lbgm_compress._util.checks import check_number
from lbgm_compress.compressor import (
    BODY_HEAD,
    Compressor,
    Encoding,
    OutOfSyncError,
    PayloadError,
    State,
    owned,
    raw,
    zero,
)
from lbgm_compress.compressors.angle import Angle, exact_angle, products, stacked_products
from lbgm_compress.compressors.identity import Identity
from lbgm_compress.compressors.norm_budget import NormBudget
from lbgm_compress.compressors.numerics import MARGIN, SQUARES, magnitude
from lbgm_compress.decoded import Decoded, Dense, Scaled, stacked
from lbgm_compress.wire.message import Kind
from lbgm_compress.wrapper import Wrapper

__all__ = ["LBGM", "Decision", "LookBack"]

RECYCLED = Kind.USES
RAW = int(Kind.RAW)
FULL = Kind.SETS | Kind.BODY
FLOAT32 = torch.finfo(torch.float32)
FULL_HEAD = struct.pack("<Bf", FULL, 1.0)


@dataclass(frozen=True, repr=False)
class LBGM(Wrapper):
    """Sends one number for a gradient that is nearly parallel to the last one sent in full.

    This is algorithm 1 of "Recycling Model Updates in Federated Learning: Are Gradient Subspaces
    Low-Rank?" (ICLR 2022, arXiv 2202.00280), for each tensor by itself. With the gradient g, as the
    inner compressor decodes it, and the look-back gradient l:

    - The look-back phase error is sin^2(alpha) = 1 - (<g, l> / (|g| |l|))^2.
    - If sin^2(alpha) <= delta, the look-back coefficient rho = <g, l> / |l|^2 is sent, and the
      receiver uses rho * l. The gradient is *recycled*.
    - Else g is sent in full, and l becomes g at both ends. So it is in the first round.

    A zero gradient is recycled with rho = 0, and never becomes l. A gradient is also sent in full
    if rho * l would leave the range of its dtype, or rho that of float32.

    The head of a payload is its kind and rho (float32). A recycled gradient has no body. For a full
    one rho is 1, and the body is the inner payload without its kind.

    A sender keeps one dense tensor for each gradient, and with ``compare="raw"`` also the inner
    payload. A receiver keeps the inner payload.

    Parameters
    ----------
    inner
        The compressor of gradients that are sent in full. Its receiver must not keep state, so
        another LBGM is refused.
    delta
        Threshold of the look-back phase error, 0 to 1; 0 recycles only exact multiples. Or a
        `NormBudget`, which bounds the error of recycling instead of the angle.
    compare
        The gradients whose angle is taken. "compressed", as in the paper: C(g) and l, both as the
        inner compressor C decodes them; `delta` then bounds the error of recycling C(g).
        "raw": g and the gradient r that was last sent in full as l = C(r); then
        rho = <g, r> / |r|^2. The error of C comes in addition. C need not run for a recycled
        gradient, which pays for a C that is slow (`Atomo`), that selects other entries of a
        gradient that has hardly turned (`TopK` of few entries), or that draws at random
        (``Atomo(unbiased=True)``).

    Raises
    ------
    ValueError
        If a parameter is outside its range, or the inner compressor cannot be wrapped.

    Examples
    --------
    >>> import torch
    >>> first, second = torch.tensor([1.0, 2.0]), torch.tensor([2.1, 4.0])
    >>> payload, decoded, state = LBGM(delta=0.1).compress(first, {})
    >>> payload, decoded, state = LBGM(delta=0.1).compress(second, state)
    >>> payload.numel(), decoded
    (5, tensor([2.0200, 4.0400]))
    """

    kinds: ClassVar[frozenset[int]] = frozenset({RECYCLED, FULL})

    inner: Compressor = Identity()  # noqa: RUF009  frozen, and so safe to share
    delta: float | NormBudget = 0.2
    compare: str = "compressed"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.inner.receiver_has_state:
            raise ValueError(
                f"LBGM cannot wrap {self.inner!r}, which looks back itself: a receiver keeps look-"
                "back gradients as inner payloads, and must decode them without any other state"
            )
        if not isinstance(self.delta, NormBudget):
            check_number("delta", self.delta, kind="a number or a NormBudget")
            if not 0 <= self.delta <= 1:
                raise ValueError(f"delta must be from 0 to 1, not {self.delta}")
        if self.compare not in ("compressed", "raw"):
            raise ValueError(f'compare must be "compressed" or "raw", not {self.compare!r}')
        if self.compare == "raw" and self.inner.has_residual:
            raise ValueError(
                f'compare="raw" over {self.inner!r}, whose payloads carry what earlier gradients '
                "lost: each recycled round would apply that again. Put ErrorFeedback outside: "
                'ErrorFeedback(LBGM(C, compare="raw"))'
            )

    @property
    def receiver_has_state(self) -> bool:
        return True

    @property
    def fixed_size(self) -> bool:
        return False

    def forget(self, state: State) -> State:
        return {"inner": self.inner_state(state), **_unit_of(state)}

    def rescale(self, state: State, factor: float) -> State:
        state = super().rescale(state, factor)
        if isinstance(self.delta, NormBudget):
            state["unit"] = state.get("unit", 1.0) * factor
        return state

    def own_state(self, state: State) -> State:
        return {name: value for name, value in state.items() if name != "look_back"}

    def sender_state(self, own: State, held: State, like: Tensor) -> State:
        if "look_back" not in held:
            return own
        if self.compare == "raw":
            return {**own, "look_back": held["look_back"]}
        return {**own, "look_back": owned(self._look_back(held, like), held["look_back"])}

    def head_size(self, like: Tensor) -> int:
        return 5

    # --- the sender ------------------------------------------------------------------------------

    def encode_together(self, grads: Sequence[Tensor], states: Sequence[State]) -> list[Encoding]:
        if self.compare == "raw":
            return self._encode_raw(grads, states)
        inner = self.inner.encode_batch(grads, [self.inner_state(state) for state in states])
        look_backs = [
            LookBack(state["look_back"], state["square_norm"]) if "look_back" in state else None
            for state in states
        ]
        units = [state.get("unit", 1.0) for state in states]
        gradients = [encoding.decoded for encoding in inner]
        decisions = self._decide(grads, gradients, look_backs, units)
        full = [
            i
            for i, (encoding, decision) in enumerate(zip(inner, decisions, strict=True))
            if not (decision.recycled or encoding.head[0] & RAW)
            and 0 < decision.square_norm < math.inf
        ]
        sent = iter(_owned(gradients, grads, full))
        results = []
        for grad, state, encoding, decision in zip(grads, states, inner, decisions, strict=True):
            if encoding.head[0] & RAW or not math.isfinite(decision.square_norm):
                results.append(raw(self, grad, state))
                continue
            if not decision.recycled and decision.square_norm == 0:
                results.append(zero(self, grad, {**state, "inner": encoding.state}))
                continue
            head, body = self.pack(decision, encoding, grad.device)
            if decision.recycled:
                decoded = Dense(state["look_back"]).scaled(decision.rho)
                new = {**state, "inner": encoding.state}
            else:
                decoded = encoding.decoded
                new = {
                    "look_back": next(sent),
                    "square_norm": decision.square_norm,
                    "inner": encoding.state,
                    **_unit_of(state),
                }
            results.append(Encoding(head, body, decoded, new, decision.phase_error))
        return results

    def _encode_raw(self, grads: Sequence[Tensor], states: Sequence[State]) -> list[Encoding]:
        """Decide first, and run the inner compressor only for gradients that are sent in full."""
        look_backs = [
            LookBack(state["reference"], state["square_norm"]) if "reference" in state else None
            for state in states
        ]
        units = [state.get("unit", 1.0) for state in states]
        decisions = self._decide(grads, [Dense(grad) for grad in grads], look_backs, units)
        results: dict[int, Encoding] = {}
        for i, (grad, state, decision) in enumerate(zip(grads, states, decisions, strict=True)):
            if not math.isfinite(decision.square_norm):
                results[i] = raw(self, grad, state)
            elif decision.recycled and _within_range(decision.rho, state["largest"], grad):
                decoded = self._look_back(state, grad).scaled(decision.rho)
                results[i] = Encoding(
                    _head(RECYCLED, decision.rho), None, decoded, state, decision.phase_error
                )
        rest = [i for i in range(len(grads)) if i not in results]
        inner = self.inner.encode_batch(
            [grads[i] for i in rest], [self.inner_state(states[i]) for i in rest]
        )
        for i, encoding in zip(rest, inner, strict=True):
            results[i] = self._full_raw(grads[i], states[i], encoding, decisions[i])
        return [results[i] for i in range(len(grads))]

    def _full_raw(
        self, grad: Tensor, state: State, inner: Encoding, decision: Decision
    ) -> Encoding:
        if inner.head[0] & RAW:
            return raw(self, grad, state)
        if decision.square_norm == 0:
            return zero(self, grad, state)
        payload = inner.payload(grad.device)[1:]
        state = {
            "look_back": payload,
            "largest": magnitude(inner.decoded.dense()),
            "reference": grad.clone(memory_format=torch.contiguous_format),
            "square_norm": decision.square_norm,
            "inner": inner.state,
            **_unit_of(state),
        }
        return Encoding(FULL_HEAD, lambda: payload, inner.decoded, state, decision.phase_error)

    def decide(
        self,
        gradients: Sequence[Decoded],
        look_backs: Sequence[LookBack | None],
        units: Sequence[float] | None = None,
    ) -> list[Decision]:
        """Decide for each gradient whether it is recycled, with one device synchronisation.

        Parameters
        ----------
        gradients
            The gradients g, as the inner compressor decodes them.
        look_backs
            The look-back gradient of each; None before the first full gradient.
        units
            The loss scale of each, in whose units a `NormBudget` is; 1 unless given.

        Returns
        -------
        list
            A `Decision` for each gradient.
        """
        likes = [
            gradient.dense() if look_back is None else look_back.gradient
            for gradient, look_back in zip(gradients, look_backs, strict=True)
        ]
        units = [1.0] * len(gradients) if units is None else units
        return by_batch(self._decide, likes, gradients, look_backs, units)

    def _decide(
        self,
        likes: Sequence[Tensor],
        gradients: Sequence[Decoded],
        look_backs: Sequence[LookBack | None],
        units: Sequence[float],
    ) -> list[Decision]:
        """Decide for one batch; `likes` have the shapes of the gradients."""
        take = stacked_products if is_small(likes[0]) else products
        squares, inner_products = take(gradients, [lb and lb.gradient for lb in look_backs])
        return list(map(self._decision, gradients, look_backs, squares, inner_products, units))

    def pack(
        self, decision: Decision, inner: Encoding, device: torch.device
    ) -> tuple[bytes, Callable[[], Tensor] | None]:
        """Return head and body of the payload for a decision.

        Parameters
        ----------
        decision
            The decision about a gradient.
        inner
            The inner compressor's encoding of that gradient.
        device
            The device of the payload.

        Returns
        -------
        head
            Kind and rho, 5 bytes.
        body
            None for a recycled gradient, else a function that returns the flat uint8 tensor.
        """
        if decision.recycled:
            return _head(RECYCLED, decision.rho), None
        if len(inner.head) == 1:
            return FULL_HEAD, inner.body
        return FULL_HEAD, lambda: inner.payload(device)[1:]

    def _decision(
        self, gradient: Decoded, look_back: LookBack | None, gg: float, gl: float, unit: float
    ) -> Decision:
        """Decide from <g, g> and <g, l>, which were taken in float32 at least."""
        ll = gg if look_back is None else look_back.square_norm
        angle = None
        if SQUARES[0] < gg < SQUARES[1] and SQUARES[0] < ll < SQUARES[1]:
            if look_back is None:
                return Decision(False, 1.0, None, gg)
            rho = gl / ll
            phase_error, limit = 1.0 - (gl / gg) * rho, self._limit(gg, unit)
            if phase_error > limit + MARGIN:
                return Decision(False, 1.0, phase_error, gg)
            if phase_error < limit - MARGIN:
                angle = Angle(gg, max(phase_error, 0.0), rho, abs(gl) / math.sqrt(ll))
        if angle is None:
            angle = exact_angle(gradient.dense(), None if look_back is None else look_back[0])
        if look_back is None or angle.phase_error is None:
            return Decision(False, 1.0, angle.phase_error, angle.square_norm)
        recycled = angle.phase_error <= self._limit(angle.square_norm, unit) and _usable(
            angle, look_back.gradient
        )
        rho = _rounded(angle.rho) if recycled else 1.0
        return Decision(recycled, rho, angle.phase_error, angle.square_norm)

    def _limit(self, square_norm: float, unit: float) -> float:
        """Return the largest phase error at which a gradient with this |g|^2 is recycled."""
        if isinstance(self.delta, NormBudget):
            return self.delta.limit(square_norm / unit / unit)
        return self.delta

    # --- the receiver ----------------------------------------------------------------------------

    def decode(
        self, head: bytes, body: Tensor, state: State, like: Tensor
    ) -> tuple[Decoded, State]:
        kind, rho = struct.unpack("<Bf", head)
        if kind == FULL:
            if rho != 1.0:
                raise PayloadError(f"the coefficient of a full tensor is {rho}, not 1")
            # The payload outlives the message that brought it.
            state = {"look_back": body.clone()}
            return self._look_back(state, like), state
        if not math.isfinite(rho):
            raise PayloadError(f"the look-back coefficient is {rho}")
        if "look_back" not in state:
            raise OutOfSyncError("the payload recycles a look-back gradient, and none is held")
        return self._look_back(state, like).scaled(rho), state

    def _look_back(self, state: State, like: Tensor) -> Decoded:
        """Decode the look-back gradient from the inner payload that `state` holds."""
        return self.inner.read(*self._split(state["look_back"], like), {}, like)[0]

    def _split(self, payload: Tensor, like: Tensor) -> tuple[bytes, Tensor]:
        """Return head and body of an inner payload that lacks its kind."""
        size = self.inner.head_size(like) - 1
        if payload.numel() < size:
            raise PayloadError(f"the inner payload has {payload.numel()} bytes, its head {size}")
        if not size:
            return BODY_HEAD, payload
        return BODY_HEAD + payload[:size].cpu().numpy().tobytes(), payload[size:]

    def read_small(
        self,
        heads: Sequence[bytes],
        bodies: Sequence[Tensor | None],
        states: Sequence[State],
        likes: Sequence[Tensor],
    ) -> list[tuple[Decoded, State]]:
        full = [
            i
            for i, (head, body) in enumerate(zip(heads, bodies, strict=True))
            if head == FULL_HEAD and body is not None
        ]
        sent = [body.clone() for i in full if (body := bodies[i]) is not None]
        payloads = dict(zip(full, sent, strict=True))
        factors: dict[int, float] = {}
        for i, (head, state) in enumerate(zip(heads, states, strict=True)):
            if head[0] == RECYCLED and "look_back" in state:
                [rho] = struct.unpack_from("<f", head, 1)
                if math.isfinite(rho):
                    factors[i], payloads[i] = rho, state["look_back"]
        parts = [self._split(payload, likes[0]) for payload in payloads.values()]
        look_backs = self.inner.read_batch(
            [head for head, _ in parts],
            [body for _, body in parts],
            [{}] * len(parts),
            [likes[i] for i in payloads],
        )
        found: dict[int, tuple[Decoded, State]] = {}
        for (i, payload), (look_back, _) in zip(payloads.items(), look_backs, strict=True):
            if i in factors:
                found[i] = Scaled(look_back, factors[i]), states[i]
            else:
                found[i] = look_back, {"look_back": payload}
        return [
            found.get(i) or self.read(heads[i], bodies[i], states[i], likes[i])
            for i in range(len(heads))
        ]


class LookBack(NamedTuple):
    """A look-back gradient."""

    gradient: Tensor
    """l, dense."""
    square_norm: float
    """|l|^2, as the `Decision` gave it by which l was sent in full."""


class Decision(NamedTuple):
    """The decision of LBGM about one gradient g."""

    recycled: bool
    """True if rho is sent alone, False if g is sent in full."""
    rho: float
    """The look-back coefficient, rounded to float32; 1 if g is sent in full."""
    phase_error: float | None
    """sin^2(alpha); None without a look-back gradient."""
    square_norm: float
    """|g|^2; inf or nan only if g holds inf or nan."""

    def holds_at(self, delta: float) -> bool:
        """Return whether another threshold is known to decide alike.

        The look-back gradient must be the same. False near the threshold, where the phase error
        would be computed more precisely.
        """
        if self.phase_error is None:
            return True
        if self.recycled:
            return self.phase_error < delta - MARGIN
        return self.phase_error > delta + MARGIN


def _usable(angle: Angle, look_back: Tensor) -> bool:
    """Return whether rho is in the range of float32, and rho * l in that of its dtype."""
    rho = angle.rho
    if rho != 0 and not FLOAT32.tiny <= abs(rho) <= FLOAT32.max:
        return False
    # The projection is a coarse bound in float16: beyond it the largest element decides.
    return _within_range(1.0, angle.projection, look_back) or _within_range(
        rho, magnitude(look_back), look_back
    )


def _within_range(rho: float, largest: float, like: Tensor) -> bool:
    """Return whether rho times an element of this magnitude stays within the range of the dtype."""
    return abs(rho) * largest * 1.001 <= torch.finfo(like.dtype).max


def _owned(
    gradients: Sequence[Decoded], grads: Sequence[Tensor], chosen: Sequence[int]
) -> Sequence[Tensor]:
    """Return the chosen gradients of a batch, dense and each in memory of its own."""
    if chosen and is_small(grads[0]):
        return copies(stacked([gradients[i] for i in chosen]))
    return [owned(gradients[i], grads[i]) for i in chosen]


def _unit_of(state: State) -> State:
    """Return the entry of a state that outlives a look-back gradient."""
    return {"unit": state["unit"]} if "unit" in state else {}


def _head(kind: int, rho: float) -> bytes:
    return struct.pack("<Bf", kind, rho)


def _rounded(rho: float) -> float:
    """Return rho as float32 holds it."""
    rounded: float = struct.unpack("<f", struct.pack("<f", rho))[0]
    return rounded
