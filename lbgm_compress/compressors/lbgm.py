"""The Look-Back Gradient Multiplier."""

from __future__ import annotations

import functools
import math
import struct
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from lbgm_compress.compressor import (
    Compressor,
    Encoding,
    OutOfSyncError,
    PayloadError,
    State,
    owned,
    raw,
)
from lbgm_compress.compressors.identity import Identity
from lbgm_compress.compressors.norm_budget import NormBudget
from lbgm_compress.decoded import Decoded, Dense
from lbgm_compress.wire.message import Kind

__all__ = ["LBGM"]

RECYCLED = Kind.USES
RAW = int(Kind.RAW)
FULL = Kind.SETS | Kind.BODY
# Inner products in float32 are good to about 1e-5. A phase error this close to the threshold is
# computed again in float64, so that decisions are those of exact arithmetic.
MARGIN = 1e-4
# Squares outside this range may have lost bits to underflow, or overflowed.
SQUARES = (1e-30, 1e36)
CHUNK = 1 << 20


@dataclass(frozen=True, repr=False)
class LBGM(Compressor):
    """Sends one number where the gradient is nearly parallel to the last one sent in full.

    Algorithm 1 of "Recycling Model Updates in Federated Learning: Are Gradient Subspaces
    Low-Rank?" (ICLR 2022, arXiv 2202.00280), for each tensor by itself. With the gradient g (as the
    inner compressor decodes it) and the look-back gradient l:

    - look-back phase error: sin^2(alpha) = 1 - (<g, l> / (|g| |l|))^2;
    - if sin^2(alpha) <= delta, send the look-back coefficient rho = <g, l> / |l|^2, and the
      receiver takes rho * l;
    - else send g, and l becomes g at both ends. The first round always does.

    A zero gradient is recycled with rho = 0. A tensor is also sent in full where rho * l would
    leave the range of its dtype, or rho that of float32.

    The head of a payload is its kind and rho (float32); it has no body if the tensor is recycled.
    Otherwise rho is 1 and the body is the inner payload without its kind.

    A sender keeps one dense tensor per gradient, and with ``compare="raw"`` the inner payload, too;
    a receiver keeps the inner payload.

    Parameters
    ----------
    inner
        What compresses a tensor that is sent in full. Its receiver must not keep state itself, so
        that another LBGM is refused.
    delta
        Threshold of the look-back phase error, 0 to 1: 0 recycles only exact multiples. Or a
        `NormBudget`, which bounds what recycling loses instead of the angle.
    compare
        Whose angle is taken. "compressed", as in the paper: that between C(g) and l, both as the
        inner compressor C decodes them, so that `delta` bounds what recycling loses of C(g).
        "raw": that between g and the gradient r whose C(r) is l, with rho = <g, r> / |r|^2. The
        inner compressor then need not run for a tensor that is recycled: for one that is slow
        (`Atomo`), that chooses anew what to keep of a gradient that has hardly turned (`TopK` of
        few entries), or that draws (``Atomo(unbiased=True)``). What recycling loses beyond the
        angle is what C loses.

    Raises
    ------
    ValueError
        If a parameter is outside its range.

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
        if not isinstance(self.inner, Compressor):
            raise ValueError(f"LBGM wraps a compressor, not {self.inner!r}")
        if self.inner.receiver_has_state:
            raise ValueError(
                f"LBGM cannot wrap {self.inner!r}, which looks back itself: a receiver keeps look-"
                "back gradients as inner payloads, and must decode them without any other state"
            )
        if not isinstance(self.delta, NormBudget):
            if isinstance(self.delta, bool) or not isinstance(self.delta, (int, float)):
                raise ValueError(f"delta must be a number or a NormBudget, not {self.delta!r}")
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
    def has_residual(self) -> bool:
        return self.inner.has_residual

    @property
    def finishes_average(self) -> bool:
        return self.inner.finishes_average

    def initial_state(self, seed: int) -> State:
        return {"inner": self.inner.initial_state(seed)}

    def forget(self, state: State) -> State:
        return {"inner": state.get("inner", {})}

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

    def finish(self, mean: Tensor) -> Tensor:
        return self.inner.finish(mean)

    def encode(self, grad: Tensor, state: State) -> Encoding:
        return self.encode_batch([grad], [state])[0]

    def encode_batch(self, grads: Sequence[Tensor], states: Sequence[State]) -> list[Encoding]:
        if self.compare == "raw":
            return self._encode_raw(grads, states)
        inner = self.inner.encode_batch(grads, [state.get("inner", {}) for state in states])
        return self.encode_over(inner, grads, states)

    def encode_over(
        self, inner: Sequence[Encoding], grads: Sequence[Tensor], states: Sequence[State]
    ) -> list[Encoding]:
        """Do `encode_batch` of ``compare="compressed"``, from what the inner compressor made."""
        angles = look_back([e.decoded for e in inner], states, self.delta)
        results = []
        for grad, state, encoding, angle in zip(grads, states, inner, angles, strict=True):
            if encoding.head[0] & RAW or not math.isfinite(angle.square_norm):
                results.append(raw(self, grad, state))
            elif angle.recycled(self.delta):
                decoded = Dense(state["look_back"]).scaled(angle.rho)
                state = {**state, "inner": encoding.state}
                results.append(_recycled(angle, decoded, state))
            else:
                state = {
                    "look_back": owned(encoding.decoded, grad),
                    "square_norm": angle.square_norm,
                    "inner": encoding.state,
                }
                body = _without_kind(encoding, grad.device)
                results.append(_full(angle, encoding.decoded, body, state))
        return results

    def _encode_raw(self, grads: Sequence[Tensor], states: Sequence[State]) -> list[Encoding]:
        """Take the angles first, and run the inner compressor only where they are too large."""
        references = [
            {"look_back": state["reference"], "square_norm": state["square_norm"]}
            if "look_back" in state
            else {}
            for state in states
        ]
        angles = look_back([Dense(grad) for grad in grads], references, self.delta)
        results: dict[int, Encoding] = {}
        for i, (grad, state, angle) in enumerate(zip(grads, states, angles, strict=True)):
            if not math.isfinite(angle.square_norm):
                results[i] = raw(self, grad, state)
            elif angle.recycled(self.delta) and _within_range(angle.rho, state["largest"], grad):
                decoded = self._look_back(state, grad).scaled(angle.rho)
                results[i] = _recycled(angle, decoded, state)
        rest = [i for i in range(len(grads)) if i not in results]
        inner = self.inner.encode_batch(
            [grads[i] for i in rest], [states[i].get("inner", {}) for i in rest]
        )
        for i, encoding in zip(rest, inner, strict=True):
            grad, angle = grads[i], angles[i]
            if encoding.head[0] & RAW:
                results[i] = raw(self, grad, states[i])
                continue
            payload = encoding.payload(grad.device)[1:]
            state = {
                "look_back": payload,
                "largest": _magnitude(encoding.decoded.dense()),
                "reference": grad.clone(memory_format=torch.contiguous_format),
                "square_norm": angle.square_norm,
                "inner": encoding.state,
            }
            body = functools.partial(_same, payload)
            results[i] = _full(angle, encoding.decoded, body, state)
        return [results[i] for i in range(len(grads))]

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
        payload = state["look_back"]
        size = self.inner.head_size(like) - 1
        if payload.numel() < size:
            raise PayloadError(f"the inner payload has {payload.numel()} bytes, its head {size}")
        head = bytes([Kind.BODY]) + payload[:size].cpu().numpy().tobytes()
        return self.inner.read(head, payload[size:], {}, like)[0]


def _recycled(angle: Angle, decoded: Decoded, state: State) -> Encoding:
    head = struct.pack("<Bf", RECYCLED, angle.rho)
    return Encoding(head, None, decoded, state, angle.phase_error)


def _full(
    angle: Angle, decoded: Decoded, body: Callable[[], Tensor] | None, state: State
) -> Encoding:
    return Encoding(struct.pack("<Bf", FULL, 1.0), body, decoded, state, angle.phase_error)


def _same(payload: Tensor) -> Tensor:
    return payload


def _without_kind(encoding: Encoding, device: torch.device) -> Callable[[], Tensor] | None:
    if len(encoding.head) == 1:
        return encoding.body
    return lambda: encoding.payload(device)[1:]


def _limit(delta: float | NormBudget, square_norm: float) -> float:
    """Return the largest phase error at which a gradient with this |g|^2 is recycled."""
    return delta.limit(square_norm) if isinstance(delta, NormBudget) else delta


class Angle(NamedTuple):
    """How a gradient stands to its look-back gradient."""

    square_norm: float
    """|g|^2; inf or nan only if g holds inf or nan."""
    phase_error: float | None
    """sin^2(alpha), or None without a look-back gradient."""
    rho: float
    """<g, l> / |l|^2, rounded to float32; nan if it may not be used."""

    def recycled(self, delta: float | NormBudget) -> bool:
        """Whether to send rho alone."""
        if self.phase_error is None or math.isnan(self.rho):
            return False
        return self.phase_error <= _limit(delta, self.square_norm)


def look_back(
    grads: Sequence[Decoded], states: Sequence[State], delta: float | NormBudget
) -> list[Angle]:
    """Take the angles between gradients and look-back gradients, with one synchronisation.

    `states` are LBGM's; where one has no look-back gradient, only the norm is taken.
    """
    if not grads:
        return []
    products: list[Tensor] = []
    for grad, state in zip(grads, states, strict=True):
        products += grad.dots(state.get("look_back"))
    if len({product.dtype for product in products}) > 1:
        products = [product.double() for product in products]
    numbers = torch.stack(products).tolist()
    return [
        _angle(grad, state, delta, gg, gl)
        for grad, state, gg, gl in zip(grads, states, numbers[::2], numbers[1::2], strict=True)
    ]


def _angle(grad: Decoded, state: State, delta: float | NormBudget, gg: float, gl: float) -> Angle:
    look_back = state.get("look_back")
    ll = state.get("square_norm", gg)
    if all(SQUARES[0] < square < SQUARES[1] for square in (gg, ll)):
        if look_back is None:
            return Angle(gg, None, math.nan)
        rho = gl / ll
        phase_error = 1.0 - (gl / gg) * rho
        if abs(phase_error - _limit(delta, gg)) > MARGIN:
            rho = _usable(rho, abs(gl) / math.sqrt(ll), look_back)
            return Angle(gg, max(phase_error, 0.0), rho)
    return _precise_angle(grad.dense(), look_back)


def _precise_angle(grad: Tensor, look_back: Tensor | None) -> Angle:
    """Take the angle in float64, on magnitudes scaled to 1, without cancellation."""
    g_max = _magnitude(grad)
    if not math.isfinite(g_max):
        return Angle(g_max, None, math.nan)
    l_max = 0.0 if look_back is None else _magnitude(look_back)
    if g_max == 0:
        return Angle(0.0, None if look_back is None else 0.0, 0.0)
    gg = gl = ll = 0.0
    for g, lb in _chunks(grad, g_max, look_back, l_max):
        gg += float(torch.dot(g, g))
        gl += float(torch.dot(g, lb))
        ll += float(torch.dot(lb, lb))
    square_norm = min(gg * g_max * g_max, sys.float_info.max)
    if look_back is None:
        return Angle(square_norm, None, math.nan)
    if l_max == 0:
        return Angle(square_norm, 1.0, math.nan)
    missed = 0.0
    for g, lb in _chunks(grad, g_max, look_back, l_max):
        difference = g - gl / ll * lb
        missed += float(torch.dot(difference, difference))
    rho = _usable(gl / ll * (g_max / l_max), abs(gl) / math.sqrt(ll) * g_max, look_back)
    return Angle(square_norm, min(missed / gg, 1.0), rho)


def _magnitude(tensor: Tensor) -> float:
    return float(tensor.abs().max()) if tensor.numel() else 0.0


def _chunks(
    grad: Tensor, g_max: float, look_back: Tensor | None, l_max: float
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield pieces of both in float64, divided by their magnitude."""
    flat = grad.reshape(-1)
    other = flat if look_back is None else look_back.reshape(-1)
    for start in range(0, flat.numel(), CHUNK):
        part = slice(start, start + CHUNK)
        yield flat[part].double() / g_max, other[part].double() / (l_max or 1.0)


def _usable(rho: float, projection: float, look_back: Tensor) -> float:
    """Return rho rounded to float32, or nan if it or rho * l would leave its range.

    `projection` is |rho| |l|, which bounds every element of rho * l.
    """
    limits = torch.finfo(torch.float32)
    if rho != 0 and not limits.tiny <= abs(rho) <= limits.max:
        return math.nan
    rounded: float = struct.unpack("<f", struct.pack("<f", rho))[0]
    # The bound is coarse in float16: only beyond it the largest element decides.
    if not _within_range(1.0, projection, look_back) and not _within_range(
        rho, _magnitude(look_back), look_back
    ):
        return math.nan
    return rounded


def _within_range(rho: float, largest: float, like: Tensor) -> bool:
    """Whether rho times an element of this magnitude stays within the range of the dtype."""
    return abs(rho) * largest * 1.001 <= torch.finfo(like.dtype).max
