"""Several look-back directions in the place of one look-back gradient."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lbgm_compress.compressor import (
    Compressor,
    Encoding,
    OutOfSyncError,
    PayloadError,
    State,
    raw,
    square_sum,
)
from lbgm_compress.compressors.numerics import CHUNK, MARGIN, SQUARES
from lbgm_compress.compressors.svd import leading_triplets
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
Host = npt.NDArray[np.float64]

# Directions that only the sender knows, from which the next refresh starts.
SPARE = 2
# What directions in float32 miss of a matrix within their span, and more.
ROUNDING = 1e-12
# Directions whose Gram matrix has eigenvalues below this share of the largest are dependent.
DEPENDENT = 1e-5
# Nor are directions worth sending that hold less than this share of a matrix's energy.
NEGLIGIBLE = 1e-9


@dataclass(frozen=True, repr=False)
class LookBackSubspace(Compressor):
    """Sends what a matrix is on a few directions that both ends hold.

    What LBGM (arXiv 2202.00280) becomes when updates are noisy: each has little in common with the
    last one, but the rows of a layer's matrix keep falling into a subspace that moves slowly. With
    the gradient seen as a matrix M (m x n), and the r look-back directions, the columns of V
    (n x r):

    - C = M V (V^T V)^-1, the coefficients (m x r) of least squares; a receiver takes C V^T;
    - look-back phase error: sin^2 = 1 - |C V^T|^2 / |M|^2, what the span misses of |M|^2;
    - if it is at most `delta`, C alone is sent;
    - else the `refresh` directions that hold the least energy of M are replaced by the leading
      right singular directions of what the others miss of M, found by a power step that starts
      from the replaced directions and from two that the last refresh had to spare; they are sent
      with C.

    The first message carries the `rank` leading directions. Directions that M does not have are
    not sent, and added by a later refresh when they turn up. C is computed on the directions as
    the receiver decodes them.

    Use it inside `ErrorFeedback`, which brings back what is missed: alone it loses accuracy. With
    one row and rank 1 (``LookBackSubspace(1, delta, view="flat", values="float32")``) it decides
    and reconstructs as ``LBGM(delta=delta)`` does; with one row and rank > 1 it is LBGM with
    several look-back gradients.

    The body of a payload is, in this order: the number of directions that it brings (unsigned
    LEB128) and which ones they replace, ascending (each unsigned LEB128; r adds one), absent in a
    first message; those directions, each a section of n values; the coefficients of all directions,
    one direction after the other, a section of r x m values (`lbgm_compress.wire.values`). A
    payload that brings none is its kind and the coefficients; a zero gradient is its kind alone. A
    tensor that is no matrix, or too small for directions to save anything, is a section of values.

    Both ends keep the directions as they were sent; a sender keeps two more in the working
    precision, float32 (float64 for a float64 gradient).

    Parameters
    ----------
    rank
        Number of look-back directions r, at least 1.
    delta
        Threshold of the look-back phase error, 0 to 1: 1 never replaces a direction.
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
        Precision of directions, if it is to be another; None: that of `values`. Directions bear
        "int2" where a layer's inputs are not mostly zeros.

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
        for name in ("rank", "refresh"):
            number = getattr(self, name)
            if isinstance(number, bool) or not isinstance(number, int) or number < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, not {number!r}")
        if self.refresh > self.rank:
            raise ValueError(f"refresh must be at most rank ({self.rank}), not {self.refresh}")
        if isinstance(self.delta, bool) or not isinstance(self.delta, (int, float)):
            raise ValueError(f"delta must be a number, not {self.delta!r}")
        if not 0 <= self.delta <= 1:
            raise ValueError(f"delta must be from 0 to 1, not {self.delta}")
        if self.view not in ("matrix", "flat"):
            raise ValueError(f'view must be "matrix" or "flat", not {self.view!r}')
        for name in ("values", "directions"):
            precision = getattr(self, name)
            if precision not in PRECISIONS and (name, precision) != ("directions", None):
                known = ", ".join(PRECISIONS)
                raise ValueError(f"{name} must be one of {known}, not {precision!r}")

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

    def encode_batch(self, grads: Sequence[Tensor], states: Sequence[State]) -> list[Encoding]:
        squares = torch.stack([square_sum(grad) for grad in grads]).tolist() if grads else []
        results: dict[int, Encoding] = {}
        works: dict[int, _Work] = {}
        for i, (grad, state, square) in enumerate(zip(grads, states, squares, strict=True)):
            sides = self._sides(grad)
            scale = 1.0
            if not SQUARES[0] < square < SQUARES[1]:
                magnitude = float(grad.abs().max()) if grad.numel() else 0.0
                if not np.isfinite(magnitude):
                    results[i] = raw(self, grad, state)
                    continue
                if magnitude == 0:
                    results[i] = Encoding(bytes([ZERO]), None, _zero(grad), state, None)
                    continue
                scale = 2.0 ** float(np.clip(np.frexp(magnitude)[1] - 1, -1000, 1000))
            if sides is None:
                results[i] = self._values(grad, state)
                continue
            matrix = grad.reshape(sides).to(working_dtype(grad))
            if scale != 1.0:
                matrix = matrix / scale
                square = float(matrix.reshape(-1).double().square().sum())
            works[i] = self._work(grad, state, matrix, scale, square)
        held = [w for w in works.values() if len(w.basis)]
        # On the CPU there is nothing to synchronise, and a matrix is read again from the cache.
        on_cpu = all(w.matrix.device.type == "cpu" for w in held)
        for some in [[w] for w in held] if on_cpu else [held]:
            self._project(some)
            for w in some:
                self._decide(w)
            self._refresh([w for w in some if w.slots])
        for i, w in works.items():
            if not len(w.basis):
                self._start(w)
            results[i] = self._finished(w)
        return [results[i] for i in range(len(grads))]

    def _values(self, grad: Tensor, state: State) -> Encoding:
        section, values = encode_values(grad.reshape(-1), self.values)
        return Encoding(bytes([VALUES]), lambda: section, Dense(values.view(grad.shape)), state)

    def _work(
        self, grad: Tensor, state: State, matrix: Tensor, scale: float, square: float
    ) -> _Work:
        work = _Work(grad, state, matrix, scale, square, *self._precisions(grad))
        if "directions" in state:
            work.sections = state["directions"]
            work.basis = decode_rows(work.sections, matrix.shape[1], work.directions, matrix.dtype)
            work.ahead = state["ahead"]
        return work

    def _project(self, works: Sequence[_Work]) -> None:
        """Multiply the matrices by the directions, and bring the inner products to the host."""
        numbers = []
        for w in works:
            rows = torch.cat([w.basis, w.ahead])
            w.products = w.matrix @ rows.T
            numbers += [w.products.T @ w.products, rows @ rows.T]
        for w, (energy, gram) in zip(works, _pairs(_to_host(numbers)), strict=True):
            w.energy, w.gram = energy, gram

    def _decide(self, w: _Work) -> None:
        """Find the phase error, and which directions to replace if it is too large."""
        r = len(w.basis)
        energy, gram = w.energy[:r, :r], w.gram[:r, :r]
        w.inverse = _inverse(gram)
        w.phase_error = max(0.0, 1.0 - float((energy * w.inverse).sum()) / w.square)
        if abs(w.phase_error - self.delta) < MARGIN:
            w.phase_error = _precise_phase_error(w.matrix, w.basis)
        if w.phase_error > self.delta + ROUNDING:
            if r < self.rank:
                w.slots = list(range(r, min(self.rank, r + self.refresh)))
            else:
                coefficients = (w.inverse * (energy @ w.inverse).T).sum(1)
                held = coefficients * np.diag(gram)
                w.slots = sorted(np.argsort(held, kind="stable")[: self.refresh].tolist())

    def _refresh(self, works: Sequence[_Work]) -> None:
        """Replace directions by the leading ones of what the others miss."""
        grams = []
        for w in works:
            r = len(w.basis)
            kept = [i for i in range(r) if i not in w.slots]
            w.kept = _Span(w.basis[kept], w.products[:, kept], _inverse(w.gram[np.ix_(kept, kept)]))
            w.missed = w.square - float((w.energy[np.ix_(kept, kept)] * w.kept.inverse).sum())
            # A power step from the replaced and the spare directions, orthogonalised on the host.
            starts = [i for i in range(len(w.gram)) if i not in kept]
            combination = np.zeros((len(w.gram), len(starts)))
            combination[starts, range(len(starts))] = 1
            combination[kept] = -w.kept.inverse @ w.gram[np.ix_(kept, starts)]
            combination = combination @ _orthonormal(combination.T @ w.energy @ combination)
            w.right = w.step_back(w.products @ _on(combination, w.matrix))
            grams.append(w.right @ w.right.T)
        spectra = [_spectrum(gram) for gram in _to_host(grams)]
        for i, w in enumerate(works):
            # The leading direction holds the mean at least: less means that the starts were bad.
            if not len(spectra[i][0]) or spectra[i][0][0] < 0.5 * w.missed / min(w.matrix.shape):
                w.right = w.step_back(w.sketch(self.refresh + SPARE))
                spectra[i] = _spectrum(_to_host([w.right @ w.right.T])[0])
        changed = []
        for w, (values, vectors) in zip(works, spectra, strict=True):
            usable = int((values > NEGLIGIBLE * w.square).sum())
            w.slots = w.slots[:usable]
            found = _on((vectors / np.sqrt(values))[:, :usable].T, w.matrix) @ w.right
            if not usable:
                continue
            changed.append(w)
            new, w.ahead = found[: len(w.slots)], found[len(w.slots) :][:SPARE].clone()
            w.new_sections, new = encode_rows(new, w.directions)
            w.sections = _replaced(w.sections, w.slots, w.new_sections)
            w.products = _replaced(w.products.T[: len(w.basis)], w.slots, (w.matrix @ new.T).T).T
            w.basis = _replaced(w.basis, w.slots, new)
        grams = [w.basis @ w.basis.T for w in changed]
        for w, gram in zip(changed, _to_host(grams), strict=True):
            w.inverse = _inverse(gram)

    def _start(self, w: _Work) -> None:
        """Take the leading directions."""
        left, right = leading_triplets(w.matrix, self.rank + SPARE)
        norms = right.norm(dim=0)
        held = norms * left.norm(dim=0)
        usable = int((held.square() > NEGLIGIBLE * held.square().max()).sum())
        rows = (right[:, :usable] / norms[:usable]).T.contiguous()
        w.sections, w.basis = encode_rows(rows[: self.rank], w.directions)
        w.ahead = rows[self.rank :].clone()
        w.products = w.matrix @ w.basis.T
        w.inverse = _inverse(_to_host([w.basis @ w.basis.T])[0])
        w.first = True

    def _finished(self, w: _Work) -> Encoding:
        r = len(w.basis)
        coefficients = (w.products[:, :r] @ _on(w.inverse, w.matrix)).T * w.scale
        if w.scale != 1.0 and not bool(coefficients.isfinite().all()):
            return raw(self, w.grad, w.state)
        section, values = encode_values(coefficients.reshape(-1), w.values)
        decoded = _low_rank(values.view(r, -1), w.basis, w.grad)
        state = {"directions": w.sections, "ahead": w.ahead}
        if w.first:
            kind, front, new = FULL, varint(r), w.sections
        elif w.slots:
            kind, new = REFRESHED, w.new_sections
            front = varint(len(w.slots)) + b"".join(map(varint, w.slots))
        else:
            return Encoding(bytes([RECYCLED]), lambda: section, decoded, state, w.phase_error)

        def body() -> Tensor:
            start = torch.frombuffer(bytearray(front), dtype=torch.uint8).to(section.device)
            return torch.cat([start, new.reshape(-1), section])

        return Encoding(bytes([kind]), body, decoded, state, w.phase_error)

    # --- the receiver ----------------------------------------------------------------------------

    def decode(
        self, head: bytes, body: Tensor, state: State, like: Tensor
    ) -> tuple[Decoded, State]:
        kind = head[0]
        if kind == ZERO:
            return _zero(like), state
        sides = self._sides(like)
        if (kind == VALUES) != (sides is None):
            raise PayloadError(f"a payload of kind {kind} is not for shape {tuple(like.shape)}")
        if sides is None:
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
            held, basis = _replaced(held, slots, sections), _replaced(basis, slots, rows)
            state = {"directions": held}
        coefficients = decode_values(body, len(basis) * m, values, dtype)
        coefficients = coefficients.reshape(len(basis), m).clone()
        return _low_rank(coefficients, basis, like), state

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


@dataclass(eq=False)
class _Work:
    """A matrix that is being encoded."""

    grad: Tensor
    state: State
    matrix: Tensor
    """m x n."""
    scale: float
    """By what the gradient was divided."""
    square: float
    """|matrix|^2."""
    values: str
    """Precision of coefficients."""
    directions: str
    """Precision of directions."""
    sections: Tensor = field(default_factory=lambda: torch.empty(0))
    """The directions as they are sent, r x size."""
    basis: Tensor = field(default_factory=lambda: torch.empty(0))
    """The directions as receivers decode them, r x n."""
    ahead: Tensor = field(default_factory=lambda: torch.empty(0))
    """Directions to start from, which only the sender knows."""
    products: Tensor = field(default_factory=lambda: torch.empty(0))
    """matrix times directions, m x r, then times `ahead`."""
    energy: Host = field(default_factory=lambda: np.empty((0, 0)))
    """Inner products of the products' columns."""
    gram: Host = field(default_factory=lambda: np.empty((0, 0)))
    """Inner products of the directions and of `ahead`."""
    inverse: Host = field(default_factory=lambda: np.empty((0, 0)))
    """Pseudo-inverse of the directions' inner products."""
    phase_error: float | None = None
    slots: list[int] = field(default_factory=list)
    """Which directions are replaced."""
    new_sections: Tensor = field(default_factory=lambda: torch.empty(0))
    first: bool = False

    # While directions are replaced:
    kept: _Span = field(init=False)
    missed: float = 0.0
    """What those that are kept miss of `square`."""
    right: Tensor = field(default_factory=lambda: torch.empty(0))

    def step_back(self, left: Tensor) -> Tensor:
        """Return left^T (k x m) times the residual of the directions that are kept."""
        kept = self.kept
        inner = left.T @ kept.products @ _on(kept.inverse, left)
        return left.T @ self.matrix - inner @ kept.basis

    def sketch(self, count: int) -> Tensor:
        """Return an orthonormal basis (m x k) of that residual times random vectors."""
        kept, (m, n) = self.kept, self.matrix.shape
        generator = torch.Generator().manual_seed(0)
        random = torch.randn(min(count, m), n, generator=generator, dtype=self.matrix.dtype)
        random = random.to(self.matrix.device)
        left = self.matrix @ random.T
        left -= kept.products @ (_on(kept.inverse, left) @ (kept.basis @ random.T))
        basis: Tensor = torch.linalg.qr(left).Q
        return basis


class _Span(NamedTuple):
    """Directions that are kept (k x n), the matrix times them (m x k), and their inverse Gram."""

    basis: Tensor
    products: Tensor
    inverse: Host


def _low_rank(coefficients: Tensor, basis: Tensor, like: Tensor) -> Decoded:
    """Return what coefficients (r x m) on directions (r x n) stand for."""
    # A product may depend on the layout of its factors, which both ends must share.
    return LowRank(coefficients.contiguous().T, basis.contiguous().T, like)


def _zero(like: Tensor) -> Decoded:
    indices = torch.empty(0, dtype=torch.int64, device=like.device)
    return Sparse(indices, torch.empty(0, dtype=like.dtype, device=like.device), like.shape)


def _to_host(tensors: Sequence[Tensor]) -> list[Host]:
    """Copy small tensors to the host in one go."""
    if not tensors:
        return []
    flat = torch.cat([t.reshape(-1).double() for t in tensors]).cpu().numpy()
    sizes = np.cumsum([t.numel() for t in tensors])[:-1]
    return [part.reshape(t.shape) for part, t in zip(np.split(flat, sizes), tensors, strict=True)]


def _pairs(items: Sequence[Host]) -> Iterable[tuple[Host, Host]]:
    return zip(items[::2], items[1::2], strict=True)


def _on(matrix: Host, like: Tensor) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(matrix)).to(like.device, like.dtype)


def _inverse(gram: Host) -> Host:
    """Return the pseudo-inverse of a Gram matrix."""
    if not gram.size:
        return gram
    values, vectors = np.linalg.eigh(gram)
    keep = values > DEPENDENT * values[-1]
    inverse: Host = (vectors[:, keep] / values[keep]) @ vectors[:, keep].T
    return inverse


def _orthonormal(gram: Host) -> Host:
    """Return what makes vectors of this Gram matrix orthonormal, without dependent ones."""
    values, vectors = np.linalg.eigh(gram)
    keep = values > DEPENDENT * max(values[-1:], default=0.0)
    scaled: Host = vectors[:, keep] / np.sqrt(values[keep])
    return scaled


def _spectrum(gram: Host) -> tuple[Host, Host]:
    """Return the positive eigenvalues, largest first, and their eigenvectors."""
    if not gram.size:
        return np.empty(0), gram
    values, vectors = np.linalg.eigh(gram)
    positive = int((values > 0).sum())
    return values[::-1][:positive], vectors[:, ::-1][:, :positive]


def _replaced(old: Tensor, slots: Sequence[int], rows: Tensor) -> Tensor:
    """Return `old` with these rows at `slots`, which may lie just behind its end."""
    size = max(len(old), slots[-1] + 1)
    new = torch.empty((size, *old.shape[1:]), dtype=old.dtype, device=old.device)
    new[: len(old)] = old
    new[list(slots)] = rows
    return new


def _precise_phase_error(matrix: Tensor, basis: Tensor) -> float:
    precise = basis.double()
    inverse = _on(_inverse((precise @ precise.T).cpu().numpy()), precise)
    missed = total = 0.0
    step = max(1, CHUNK // matrix.shape[1])
    for start in range(0, len(matrix), step):
        part = matrix[start : start + step].double()
        coefficients = part @ precise.T @ inverse
        missed += float((part - coefficients @ precise).square().sum())
        total += float(part.square().sum())
    return missed / total
