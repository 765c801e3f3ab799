"""Several look-back directions for each layer instead of one look-back gradient."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from lbgm_compress._util.batches import is_small, rows, stack
from lbgm_compress._util.checks import check_choice, check_number, check_whole
from lbgm_compress.compressor import (
    BODY_HEAD,
    Compressor,
    Encoding,
    OutOfSyncError,
    PayloadError,
    State,
    raw,
    returning,
    square_sum,
)
from lbgm_compress.compressors.numerics import MARGIN, SQUARES, magnitude
from lbgm_compress.compressors.projection import (
    SPARE,
    Projection,
    invert,
    missed_directions,
    project,
    replaced,
)
from lbgm_compress.compressors.topk import TopK
from lbgm_compress.decoded import Decoded, Dense, LowRank, Sparse, working_dtype
from lbgm_compress.wire.bits import read_varints, varint
from lbgm_compress.wire.message import Kind
from lbgm_compress.wire.values import (
    PRECISIONS,
    decode_rows,
    decode_values,
    encode_rows,
    encode_values,
    precision_of,
    values_size,
)

__all__ = ["LookBackSubspace"]

ZERO = 0
VALUES = int(Kind.BODY)
RECYCLED = Kind.USES | Kind.BODY
REFRESHED = Kind.USES | Kind.SETS | Kind.BODY
FULL = Kind.SETS | Kind.BODY

# A matrix with so many times more rows than columns is thin with up to four times as many columns.
TALL = 8
# Directions in float32 miss no more than this of a matrix within their span.
ROUNDING = 1e-12


@dataclass(frozen=True, repr=False)
class LookBackSubspace(Compressor):
    """Sends the coefficients of a matrix on a few directions that both ends hold.

    It extends LBGM (arXiv 2202.00280) to noisy updates. Each has little in common with the last
    one, but the rows of a layer's matrix stay in a subspace that moves slowly. The gradient is seen
    as a matrix M (m x n); the r look-back directions are the columns of V (n x r).

    - C = M V (V^T V)^-1 are the coefficients of least squares (m x r). A receiver decodes C V^T.
    - The look-back phase error is sin^2 = 1 - |C V^T|^2 / |M|^2, the share of |M|^2 that is missed.
    - If it is at most `delta`, C alone is sent.
    - Else the `refresh` directions that hold the least energy of M are replaced by the leading
      right singular directions of what the others miss of M, and the new ones are sent with C. They
      are found by one power step, which starts from the replaced directions and from two more that
      the last refresh found.

    The first message carries the `rank` leading directions, or fewer if M has a lower rank; a later
    refresh adds others when they appear. C is computed on the directions as the receiver decodes
    them.

    Use it inside `ErrorFeedback`, which sends later what is missed: alone it loses accuracy. With
    one row and rank 1 (``LookBackSubspace(1, delta, view="flat", values="float32")``) it decides
    and reconstructs as ``LBGM(delta=delta)`` does; with one row and rank > 1 it is LBGM with
    several look-back gradients.

    The body of a payload consists of the following, in this order (sections of values are described
    in `lbgm_compress.wire.values`, integers are unsigned LEB128):

    - the number of new directions;
    - the positions that they take, ascending, where position r appends one; absent in a first
      message;
    - the new directions, each a section of n values;
    - the coefficients of all directions, one direction after the other, a section of r x m values.

    A payload without new directions is its kind and the coefficients; a zero gradient is its kind
    alone. A tensor that is no matrix, or too small for directions to save anything, is a section of
    values.

    A thin matrix, such as a factor of LoRA, has too few rows for directions: its shorter side is
    at most `rank`, or at most 4 `rank` if it has 8 times more rows than columns. The fewest entries
    that leave a phase error of at most `delta` are sent, in the payload of `TopK`. If a section of
    all values is no longer, it is sent instead; a receiver tells the two by their size.

    Both ends keep the directions as they were sent. A sender keeps two more in the working
    precision, float32 (float64 for a float64 gradient).

    Parameters
    ----------
    rank
        Number of look-back directions r, at least 1.
    delta
        Threshold of the look-back phase error, 0 to 1: 1 never replaces a direction, and sends one
        entry of a thin matrix.
    view
        How a tensor is seen as a matrix: "matrix", its first dimension by the rest, or "flat", one
        row, in which a direction is a whole gradient.
    refresh
        Number of directions that are replaced at once, at most `rank`.
    values
        Precision of coefficients and directions: "float32", "float16", "bfloat16", or "int8",
        "int4" and "int2" in blocks of 256 with a scale each. Inside `ErrorFeedback`, "int4" costs
        next to no accuracy, and "int2", which has no zero, much.
    directions
        Precision of directions; None: that of `values`. "int2" suffices for a layer whose inputs
        are not mostly zeros.

    Raises
    ------
    ValueError
        If a parameter is outside its range.

    Examples
    --------
    >>> import torch
    >>> first = torch.outer(torch.arange(1.0, 33.0), torch.ones(100))
    >>> compressor = LookBackSubspace(rank=1, delta=0.1)
    >>> payload, decoded, state = compressor.compress(first, {})
    >>> payload.numel()
    142
    >>> payload, decoded, state = compressor.compress(first.flip(0), state)
    >>> payload.numel(), torch.allclose(decoded, first.flip(0), atol=0.2)
    (37, True)
    """

    kinds: ClassVar[frozenset[int]] = frozenset({ZERO, VALUES, RECYCLED, REFRESHED, FULL})

    rank: int = 4
    delta: float = 0.9
    view: str = "matrix"
    refresh: int = 1
    values: str = "int8"
    directions: str | None = None

    def __post_init__(self) -> None:
        check_whole("rank", self.rank, least=1)
        check_whole("refresh", self.refresh, least=1)
        if self.refresh > self.rank:
            raise ValueError(f"refresh must be at most rank ({self.rank}), not {self.refresh}")
        check_number("delta", self.delta)
        if not 0 <= self.delta <= 1:
            raise ValueError(f"delta must be from 0 to 1, not {self.delta}")
        if self.view not in ("matrix", "flat"):
            raise ValueError(f'view must be "matrix" or "flat", not {self.view!r}')
        check_choice("values", self.values, PRECISIONS)
        if self.directions is not None:
            check_choice("directions", self.directions, PRECISIONS)

    @property
    def receiver_has_state(self) -> bool:
        return True

    def forget(self, state: State) -> State:
        return {}

    def own_state(self, state: State) -> State:
        return {name: value for name, value in state.items() if name != "directions"}

    def sender_state(self, own: State, held: State, like: Tensor) -> State:
        return {**own, **held}

    # --- the sender ------------------------------------------------------------------------------

    def encode(self, grad: Tensor, state: State) -> Encoding:
        return self.encode_batch([grad], [state])[0]

    def encode_together(self, grads: Sequence[Tensor], states: Sequence[State]) -> list[Encoding]:
        if is_small(grads[0]) and not self._thin(grads[0]) and self._sides(grads[0]) is None:
            return super().encode_together(grads, states)
        if is_small(grads[0]):
            # Products depend on alignment, which is the same for every new tensor.
            grads = [grad.clone() for grad in grads]
        squares = torch.stack([square_sum(grad) for grad in grads]).tolist()
        begun = [self._begin(*of) for of in zip(grads, states, squares, strict=True)]
        works = [work for work in begun if isinstance(work, _Work)]
        later = [work for work in works if not work.first]
        # On the CPU there is nothing to synchronise, and a matrix is read again from the cache.
        on_cpu = all(work.projection.matrix.device.type == "cpu" for work in later)
        for some in [[work] for work in later] if on_cpu else [later]:
            project([work.projection for work in some])
            for work in some:
                self._decide(work)
            self._refresh([work for work in some if work.slots])
        for work in works:
            if work.first:
                self._start(work)
        return [self._finish(work) if isinstance(work, _Work) else work for work in begun]

    def encode_small(self, grads: Sequence[Tensor], states: Sequence[State]) -> list[Encoding]:
        # Tensors for which directions save nothing.
        matrix = rows(stack(grads))
        sections, values = encode_rows(matrix, self.values)
        tensors = values.view(len(grads), *grads[0].shape).unbind()
        return [
            Encoding(BODY_HEAD, returning(section), Dense(tensor), state)
            for section, tensor, state in zip(sections.unbind(), tensors, states, strict=True)
        ]

    def _begin(self, grad: Tensor, state: State, square: float) -> _Work | Encoding:
        """Return the matrix to encode, or the encoding of a tensor that needs no directions."""
        scale = 1.0
        if not SQUARES[0] < square < SQUARES[1]:
            largest = magnitude(grad)
            if not np.isfinite(largest):
                return raw(self, grad, state)
            if largest == 0:
                return Encoding(bytes([ZERO]), None, _zero(grad), state, None)
            scale = 2.0 ** float(np.clip(np.frexp(largest)[1] - 1, -1000, 1000))
        if self._thin(grad):
            return self._entries(grad, state)
        sides = self._sides(grad)
        if sides is None:
            return self._dense(grad, state)
        matrix = grad.reshape(sides).to(working_dtype(grad))
        if scale != 1.0:
            matrix = matrix / scale
            square = float(matrix.reshape(-1).double().square().sum())
        precisions = self._precisions(grad)
        sections = basis = spare = torch.empty(0)
        first = "directions" not in state
        if not first:
            sections, spare = state["directions"], state["ahead"]
            basis = decode_rows(sections, sides[1], precisions[1], matrix.dtype)
        projection = Projection(matrix, square, basis, spare)
        return _Work(grad, state, scale, *precisions, projection, sections, first)

    def _entries(self, grad: Tensor, state: State) -> Encoding:
        """Return the encoding of a thin matrix: its largest entries, or all if those are longer."""
        magnitudes = grad.detach().reshape(-1).abs().to(working_dtype(grad))
        if magnitudes.is_cpu:
            # torch takes some thirty times as long.
            magnitudes = torch.from_numpy(np.sort(magnitudes.numpy()))
        else:
            magnitudes = magnitudes.sort().values
        n = magnitudes.numel()
        sums = (magnitudes.double() / magnitudes[-1]).square().flip(0).cumsum(0)
        count = 1 + int((sums < (1 - self.delta) * sums[-1]).sum())
        if count < n:
            encoding = TopK(count / n, self.values).encode(grad, state)
            body = encoding.payload(grad.device)[len(encoding.head) :]
            if body.numel() < values_size(n, self.values, grad.dtype):
                missed = max(0.0, 1.0 - float(sums[count - 1] / sums[-1]))
                return encoding._replace(body=returning(body), phase_error=missed)
        return self._dense(grad, state)

    def _dense(self, grad: Tensor, state: State) -> Encoding:
        section, values = encode_values(grad.reshape(-1), self.values)
        decoded = Dense(values.view(grad.shape))
        return Encoding(BODY_HEAD, returning(section), decoded, state)

    def _decide(self, work: _Work) -> None:
        """Compute the phase error, and choose the directions to replace if it is too large."""
        projection, r = work.projection, len(work.projection.basis)
        work.phase_error = projection.missed()
        if abs(work.phase_error - self.delta) < MARGIN:
            work.phase_error = projection.precisely_missed()
        if work.phase_error <= self.delta + ROUNDING:
            return
        if r < self.rank:
            work.slots = list(range(r, min(self.rank, r + self.refresh)))
        else:
            work.slots = projection.weakest(self.refresh)

    def _refresh(self, works: Sequence[_Work]) -> None:
        """Replace directions by the leading ones of what the others miss."""
        projections = [work.projection for work in works]
        found = missed_directions(projections, [work.slots for work in works], self.refresh)
        changed = []
        for work, leading in zip(works, found, strict=True):
            work.slots = work.slots[: len(leading)]
            if not work.slots:
                continue
            count, projection = len(work.slots), work.projection
            projection.spare = leading[count:][:SPARE].clone()
            work.new_sections, new = encode_rows(leading[:count], work.directions)
            work.sections = replaced(work.sections, work.slots, work.new_sections)
            projection.replace(work.slots, new)
            changed.append(projection)
        invert(changed)

    def _start(self, work: _Work) -> None:
        """Take the leading directions."""
        projection = work.projection
        leading = projection.leading(self.rank + SPARE)
        work.sections, projection.basis = encode_rows(leading[: self.rank], work.directions)
        projection.spare = leading[self.rank :].clone()
        projection.products = projection.matrix @ projection.basis.T
        invert([projection])

    def _finish(self, work: _Work) -> Encoding:
        """Return the payload: the coefficients, and the directions that are new."""
        projection, grad = work.projection, work.grad
        coefficients = projection.coefficients() * work.scale
        if work.scale != 1.0 and not bool(coefficients.isfinite().all()):
            return raw(self, grad, work.state)
        section, values = encode_values(coefficients.reshape(-1), work.values)
        r = len(projection.basis)
        decoded = _low_rank(values.view(r, -1), projection.basis, grad)
        state = {"directions": work.sections, "ahead": projection.spare}
        if work.first:
            kind, front, new = FULL, varint(r), work.sections
        elif work.slots:
            kind, new = REFRESHED, work.new_sections
            front = varint(len(work.slots)) + b"".join(map(varint, work.slots))
        else:
            return Encoding(bytes([RECYCLED]), lambda: section, decoded, state, work.phase_error)

        def body() -> Tensor:
            start = torch.frombuffer(bytearray(front), dtype=torch.uint8).to(section.device)
            return torch.cat([start, new.reshape(-1), section])

        return Encoding(bytes([kind]), body, decoded, state, work.phase_error)

    # --- the receiver ----------------------------------------------------------------------------

    def decode(
        self, head: bytes, body: Tensor, state: State, like: Tensor
    ) -> tuple[Decoded, State]:
        kind = head[0]
        if kind == ZERO:
            return _zero(like), state
        sides, thin = self._sides(like), self._thin(like)
        if kind == VALUES and thin:
            if body.numel() < values_size(like.numel(), self.values, like.dtype):
                return TopK(1.0, self.values).decode(head, body, state, like)
        elif (kind == VALUES) != (sides is None):
            raise PayloadError(f"a payload of kind {kind} is not for shape {tuple(like.shape)}")
        if kind == VALUES or sides is None:
            section = decode_values(body, like.numel(), self.values, like.dtype)
            return Dense(section.reshape(like.shape).clone()), state
        m, n = sides
        dtype = working_dtype(like)
        values, directions = self._precisions(like)
        size = values_size(n, directions, dtype)
        if kind & Kind.USES and "directions" not in state:
            raise OutOfSyncError("the payload needs look-back directions, and none are held")
        held = torch.empty((0, size), dtype=torch.uint8, device=like.device)
        if kind & Kind.USES:
            held = state["directions"]
        basis = decode_rows(held, n, directions, dtype)
        if kind & Kind.SETS:
            front = body[: 9 * (self.rank + 1)].tolist()
            [count], start = read_varints(front, 1)
            most = self.refresh if kind & Kind.USES else self.rank
            if not 1 <= count <= most:
                raise PayloadError(f"{count} directions in the payload, 1 to {most} expected")
            slots = list(range(count))
            if kind & Kind.USES:
                slots, used = read_varints(front[start:], count)
                start += used
                self._check_slots(slots, len(held))
            end = start + count * size
            if body.numel() < end:
                raise PayloadError(f"{body.numel()} bytes, {end} expected before coefficients")
            sections = body[start:end].clone().view(count, size)
            rows = decode_rows(sections, n, directions, dtype)
            body = body[end:]
            held, basis = replaced(held, slots, sections), replaced(basis, slots, rows)
            state = {"directions": held}
        coefficients = decode_values(body, len(basis) * m, values, dtype)
        coefficients = coefficients.reshape(len(basis), m).clone()
        return _low_rank(coefficients, basis, like), state

    def decode_small(self, bodies: Tensor, like: Tensor) -> Sequence[Decoded] | None:
        n = like.numel()
        size = values_size(n, self.values, like.dtype)
        if self._sides(like) is not None or bodies.shape[1] != size:
            return None
        values = decode_rows(bodies, n, self.values, like.dtype)
        return [Dense(tensor) for tensor in values.view(len(bodies), *like.shape).unbind()]

    def _check_slots(self, slots: Sequence[int], held: int) -> None:
        total = held
        for before, slot in zip([-1, *slots], slots, strict=False):
            if not before < slot < self.rank or slot > total:
                raise PayloadError(f"the payload replaces direction {slot} of {held}")
            total += slot == total

    def _precisions(self, like: Tensor) -> tuple[str, str]:
        """Return the precisions of coefficients and directions."""
        directions = self.values if self.directions is None else self.directions
        return precision_of(self.values, like.dtype), precision_of(directions, like.dtype)

    def _sides(self, like: Tensor) -> tuple[int, int] | None:
        """Return the sides of the matrix, or None for a tensor sent in `values` precision."""
        if self.view == "flat":
            return (1, like.numel()) if like.numel() > self.rank else None
        if like.dim() < 2 or like.numel() == 0:
            return None
        m, n = like.shape[0], like.numel() // like.shape[0]
        return (m, n) if self.rank * m + self.refresh * n < m * n else None

    def _thin(self, like: Tensor) -> bool:
        """Return whether a tensor is a matrix of which entries are sent, and not coefficients."""
        if self.view == "flat" or like.dim() < 2 or like.numel() == 0:
            return False
        m, n = like.shape[0], like.numel() // like.shape[0]
        short, long = min(m, n), max(m, n)
        # Each direction of a matrix has m coefficients, which are many if it is tall.
        most = 4 * self.rank if m >= TALL * n else self.rank
        return short <= most and self.rank * short + long < short * long


@dataclass(eq=False)
class _Work:
    """A matrix that is being encoded."""

    grad: Tensor
    state: State
    scale: float
    """The gradient is `scale` times the matrix of the projection."""
    values: str
    """Precision of coefficients."""
    directions: str
    """Precision of directions."""
    projection: Projection
    sections: Tensor
    """The directions as they are sent (r x size, uint8)."""
    first: bool
    """True if the receiver holds no directions."""
    phase_error: float | None = None
    slots: list[int] = field(default_factory=list)
    """The directions that are replaced."""
    new_sections: Tensor = field(default_factory=lambda: torch.empty(0))
    """The directions that replace them, as they are sent."""


def _low_rank(coefficients: Tensor, basis: Tensor, like: Tensor) -> Decoded:
    """Return the tensor with these coefficients (r x m) on these directions (r x n)."""
    # A product may depend on the layout of its factors, which both ends must share.
    return LowRank(coefficients.contiguous().T, basis.contiguous().T, like)


def _zero(like: Tensor) -> Decoded:
    indices = torch.empty(0, dtype=torch.int64, device=like.device)
    return Sparse(indices, torch.empty(0, dtype=like.dtype, device=like.device), like.shape)
