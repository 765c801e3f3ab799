"""How many directions the gradients of a training span, and how they lie to each other.

The analysis of arXiv 2202.00280, section 2: N95-PCA and N99-PCA are the numbers of principal
components that explain 95 % and 99 % of the variance of the gradients of epochs 1 to T, and heat
maps show the cosines between gradients and principal components, and of gradients with each other.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lbgm_compress._util.files import atomic_write
from lbgm_compress.compressor import all_finite, check_gradient

__all__ = ["GradientSpace"]

Matrix = npt.NDArray[np.float64]

FORMAT = 1
STATE = {
    "format",
    "per_layer",
    "projection",
    "seed",
    "in_file",
    "shapes",
    "count",
    "gram",
    "rows",
}
# Bytes in float64 of the columns of all gradients that are multiplied at a time.
PIECE = 48 * 2**20
# Entries that are converted or projected at a time: their random numbers stay in a cache.
CHUNK = 2**16
# Kept gradients, and those in a file on any machine.
ROW = np.dtype("<f4")
# Shares closer than this are equal: known ones, as 19 of 20, survive rounding.
SLACK = 1e-9
WHOLE = "whole"


class _Slot(NamedTuple):
    """What is kept of a tensor's gradient."""

    start: int
    stop: int
    projected: bool


class GradientSpace:
    """The space that the gradients of a training span, one gradient an epoch.

    With the gradients g_1, ..., g_T as rows of a matrix, principal components are its right
    singular vectors and variances the squares of its singular values: no mean over epochs is
    subtracted. (The published code of the paper subtracts from each gradient the mean of its own
    entries, which is next to nothing.) All of it follows from the inner products of the gradients,
    the Gram matrix, which is brought up to date when something is asked: one pass over all
    gradients, which computes the rows of those that are new.

    The gradients are kept in float32 in memory; or in `file`; or not at all, with `projection`.

    Parameters
    ----------
    per_layer
        Whether to look at each named tensor, called a layer here, as well as at the whole gradient.
    projection
        Keep of each gradient (of each layer's, with `per_layer`) this many numbers, d, in the place
        of all its entries. One with at most d entries is kept as it is.
    file
        Where to keep the gradients, 4 bytes an entry, one after the other, tensors in the order of
        the first gradient. Resident memory then grows by at most 4 n + 64 MiB + 24 T² (L + 4)
        bytes, for n entries and L layers (1 without `per_layer`). With `projection` it does by as
        much and 8 d T L, and without either by as much and 4 n T.
    seed
        Of the projection.

    Raises
    ------
    ValueError
        If `projection` is not positive, or there is a `file`, too.

    Notes
    -----
    The projection S is a count sketch (Charikar, Chen and Farach-Colton 2002; feature hashing,
    arXiv 0902.2206): every entry is added, with a random sign, to one of d random bins. An inner
    product of projected gradients is right in the mean, with variance
    (|x|²|y|² + <x, y>² - 2 Σ x_i² y_i²) / d, so that its standard deviation is at most
    sqrt(2 / d) |x| |y|; that of a cosine c is, to first order, at most (1 - c²) / sqrt(d).

    If the gradients span r dimensions with orthonormal basis U, let eps be the spectral norm of
    UᵀSᵀSU - I. It has mean square at most r (r + 1) / d, and is near 2 sqrt(r / d) where energies
    are spread over many more entries than d. Every variance is then off by a factor between
    1 - eps and 1 + eps, and so, for every k, is the share m that the k leading components miss by
    one between (1 - eps) / (1 + eps) and (1 + eps) / (1 - eps). The number of components found for
    a missed share m therefore lies between the exact ones for m (1 + eps) / (1 - eps) and
    m (1 - eps) / (1 + eps).

    Examples
    --------
    >>> import torch
    >>> space = GradientSpace()
    >>> for epoch in range(4):
    ...     space.add({"weight": torch.tensor([[1.0, epoch]]), "bias": torch.tensor([2.0])})
    >>> space.rank(), space.components(0.95), space.history(0.95)
    (2, 2, [1, 1, 2, 2])
    >>> space.cosines()[0].round(2).tolist()
    [1.0, 0.91, 0.75, 0.6]
    """

    def __init__(
        self,
        *,
        per_layer: bool = False,
        projection: int | None = None,
        file: str | os.PathLike[str] | None = None,
        seed: int = 0,
    ) -> None:
        if projection is not None and projection < 1:
            raise ValueError(f"projection must be at least 1, not {projection}")
        if projection is not None and file is not None:
            raise ValueError(
                "projected gradients are small and stay in memory: give projection or file"
            )
        self.per_layer = per_layer
        self.projection = projection
        self.file = None if file is None else Path(file)
        self.seed = seed
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._rows: list[npt.NDArray[Any]] = []
        self._count = 0
        self._began = False
        self._gram: Matrix = np.zeros((0, 0, 0))
        self._spectra: dict[tuple[str | None, int], Matrix] = {}

    def __len__(self) -> int:
        return self._count

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the tensors by name, as in the first gradient."""
        return dict(self._shapes)

    @property
    def layers(self) -> tuple[str, ...]:
        """The names of the tensors, as in the first gradient; none without `per_layer`."""
        return tuple(self._shapes) if self.per_layer else ()

    def add(self, grads: Mapping[str, Tensor]) -> None:
        """Take the gradient of another epoch.

        Parameters
        ----------
        grads
            Dense tensors by name (float32, float16, bfloat16 or float64, on any device), with the
            names and shapes of the first gradient, in any order. They are rounded to float32,
            unless they are projected. All may be zero: such a gradient has cosine 0 with
            everything.

        Raises
        ------
        TypeError
            If something is no dense floating-point tensor.
        ValueError
            If names or shapes differ from the first gradient's, or an entry is inf, nan or beyond
            float32. As with every error, nothing has changed.
        FileExistsError
            If this is the first gradient and there is something in `file`.
        OSError
            If it cannot be written to `file`.
        """
        shapes = self._check(grads)
        if self.file is not None:
            self._write_row(self.file, grads, shapes)
        else:
            # Over what an interruption may have left.
            self._rows[self._count :] = [self._row(grads, shapes)]
        self._shapes = shapes
        self._count += 1

    def components(self, share: float = 0.95, layer: str | None = None) -> int:
        """Return how many principal components explain a share of the variance.

        Parameters
        ----------
        share
            Above 0, at most 1; rounding is allowed for, one part in 10⁹.
        layer
            One of `layers`, or None for the whole gradient.

        Returns
        -------
        int
            The smallest number; 0 if all gradients are zero, or there is none.
        """
        _check_share(share)
        return _smallest(self._spectrum(layer, self._matrix(layer), self._count), share)

    def history(self, share: float = 0.95, layer: str | None = None) -> list[int]:
        """Return `components` as it was after each epoch, of the gradients until then."""
        _check_share(share)
        gram = self._matrix(layer)
        prefixes = range(1, self._count + 1)
        return [_smallest(self._spectrum(layer, gram, t), share) for t in prefixes]

    def explained(self, layer: str | None = None) -> Matrix:
        """Return the shares of variance that the principal components explain (T, descending)."""
        spectrum = self._spectrum(layer, self._matrix(layer), self._count)
        total = spectrum.sum()
        return spectrum / total if total > 0 else np.zeros_like(spectrum)

    def rank(self, tolerance: float = 1e-12, layer: str | None = None) -> int:
        """Return how many principal components explain more than a share of `tolerance` each.

        Rounding to float32 alone makes components of about 1e-15, rounding to float16 of about
        1e-8 and to bfloat16 of about 1e-6.
        """
        return int((self.explained(layer) > tolerance).sum())

    def cosines(self, layer: str | None = None) -> Matrix:
        """Return the cosines of the gradients with each other (T, T)."""
        gram = self._matrix(layer)
        norms = np.sqrt(np.diag(gram))
        return _divided(gram, np.outer(norms, norms)).clip(-1, 1)

    def principal_cosines(
        self, share: float = 0.99, *, count: int | None = None, layer: str | None = None
    ) -> Matrix:
        """Return the cosines between gradients and leading principal components.

        With u_k the k-th eigenvector of the Gram matrix and s_k² its eigenvalue, the k-th principal
        component is Σ_t u_tk g_t / s_k, and its cosine with g_t is s_k u_tk / |g_t|. Its sign is
        such that the gradient with the largest part along it has a positive cosine. Components of
        equal variance are arbitrary directions of the space that they span.

        Parameters
        ----------
        share
            Take the components that explain this share of the variance.
        count
            Take this many, in the place of `share`.
        layer
            One of `layers`, or None for the whole gradient.

        Returns
        -------
        ndarray
            float64 (T, N), gradients by components.
        """
        if count is None:
            count = self.components(share, layer)
        elif not 0 <= count <= self._count:
            raise ValueError(f"count must be from 0 to {self._count}, not {count}")
        gram = self._matrix(layer)
        if count == 0:
            return np.zeros((self._count, 0))
        values, vectors = np.linalg.eigh(gram)
        values, vectors = values[::-1][:count].clip(0), vectors[:, ::-1][:, :count]
        sizes = np.abs(vectors)
        # The first of those that are as large as any, so that rounding does not decide.
        largest = (sizes >= (1 - 1e-6) * sizes.max(0)).argmax(0)
        signs = np.where(vectors[largest, np.arange(count)] < 0, -1.0, 1.0)
        parts = vectors * signs * np.sqrt(values)
        return _divided(parts, np.sqrt(np.diag(gram))[:, None]).clip(-1, 1)

    def write_csv(
        self,
        folder: str | os.PathLike[str],
        metrics: Mapping[str, Sequence[float]] | None = None,
    ) -> None:
        """Write components.csv, cosines.csv and principal_cosines.csv.

        The first has a row for each layer and epoch, with N95 and N99 of the gradients until then
        and the metrics; the others are matrices, with a row for each layer and epoch and a column
        for each epoch, or for each component until 99 % of the variance. ``whole`` is the whole
        gradient.

        Parameters
        ----------
        folder
            Where; it must exist.
        metrics
            Further columns of components.csv, for example accuracy: a number for each epoch.

        Raises
        ------
        ValueError
            If a metric has not as many numbers as there are epochs, or a column's name.
        """
        fixed = ("epoch", "layer", "n95", "n99")
        metrics = {} if metrics is None else metrics
        for name, numbers in metrics.items():
            self._check_numbers(name, numbers)
            if name in fixed:
                raise ValueError(f"components.csv has a column {name!r} already: rename the metric")
        components: list[Sequence[Any]] = [(*fixed, *metrics)]
        epochs = range(1, self._count + 1)
        cosines: list[Sequence[Any]] = [("epoch", "layer", *epochs)]
        principal: list[Sequence[Any]] = []
        for layer in (None, *self.layers):
            label = WHOLE if layer is None else layer
            counts = zip(self.history(0.95, layer), self.history(0.99, layer), strict=True)
            for i, pair in enumerate(counts):
                row = [_number(numbers[i]) for numbers in metrics.values()]
                components.append((i + 1, label, *pair, *row))
            for i, line in enumerate(self.cosines(layer)):
                cosines.append((i + 1, label, *map(_number, line)))
            for i, line in enumerate(self.principal_cosines(0.99, layer=layer)):
                principal.append((i + 1, label, *map(_number, line)))
        widest = max(map(len, principal), default=2) - 2
        head = ("epoch", "layer", *(f"pc{k}" for k in range(1, widest + 1)))
        tables = {
            "components": components,
            "cosines": cosines,
            "principal_cosines": [head, *principal],
        }
        for name, rows in tables.items():
            text = io.StringIO()
            csv.writer(text, lineterminator="\n").writerows(rows)
            atomic_write(Path(folder) / f"{name}.csv", text.getvalue().encode())

    def plot(
        self,
        folder: str | os.PathLike[str],
        accuracy: Sequence[float] | None = None,
        title: str | None = None,
    ) -> None:
        """Draw components.png, principal.png and cosines.png, the pictures of the paper.

        The first has N95-PCA and N99-PCA against epochs, beside accuracy; the second a heat map of
        cosines between gradients and the principal components that explain 99 % of the variance;
        the third one of cosines between gradients. With `per_layer` there is a panel for each
        layer, of at most the eleven largest, beside the whole gradient's.

        Parameters
        ----------
        folder
            Where; it must exist.
        accuracy
            A number from 0 to 1 for each epoch.
        title
            What was trained.

        Raises
        ------
        ImportError
            If matplotlib is not installed.
        ValueError
            If there is no gradient, or not an accuracy for each.
        """
        try:
            from lbgm_compress.analysis import plots
        except ImportError as error:
            raise ImportError("plot needs matplotlib: pip install matplotlib") from error
        if not self._count:
            raise ValueError("no gradient was added: there is nothing to draw")
        if accuracy is not None:
            self._check_numbers("accuracy", accuracy)
        for name, data in plots.draw(self, accuracy, title).items():
            atomic_write(Path(folder) / name, data)

    def state_dict(self) -> dict[str, Any]:
        """Return the state as a nested dict of tensors and numbers, which shares their memory.

        It survives `torch.save` and ``torch.load(weights_only=True)``. With `file` it holds the
        Gram matrix, which is brought up to date, and not the gradients.
        """
        self._update()
        return {
            "format": FORMAT,
            "per_layer": self.per_layer,
            "projection": self.projection,
            "seed": self.seed,
            "in_file": self.file is not None,
            "shapes": {name: list(shape) for name, shape in self._shapes.items()},
            "count": self._count,
            "gram": torch.from_numpy(self._gram),
            "rows": [torch.from_numpy(row) for row in self._rows],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace the state by one that `state_dict` returned.

        Gradients that `file` holds beyond those of the state are overwritten by the next ones.

        Raises
        ------
        ValueError
            If it is the state of other arguments, or no such state, or `file` does not hold its
            gradients. The state is as it was.
        """
        known = isinstance(state, Mapping) and set(state) == STATE
        if not known or state["format"] != FORMAT:
            raise ValueError(f"this is no state of a GradientSpace of format {FORMAT}")
        mine = {"per_layer": self.per_layer, "projection": self.projection}
        mine["in_file"] = self.file is not None
        if self.projection is not None:
            mine["seed"] = self.seed
        for name, expected in mine.items():
            if state[name] != expected:
                raise ValueError(
                    f"the state has {name}={state[name]}, expected {expected}: build the "
                    "GradientSpace with the arguments of the one that was saved"
                )
        shapes = {name: tuple(shape) for name, shape in state["shapes"].items()}
        count = state["count"]
        length = _length(self._slots(shapes))
        rows = [row.numpy() for row in state["rows"]]
        gram = state["gram"].numpy()
        layers = (len(shapes) if self.per_layer else 1) if count else 0
        if gram.shape != (layers, count, count) or any(row.shape != (length,) for row in rows):
            raise ValueError("the state's tensors do not have the shapes that it names")
        if len(rows) != (0 if self.file is not None else count):
            raise ValueError(f"the state holds {len(rows)} gradients, expected {count}")
        if self.file is not None and count:
            size = self.file.stat().st_size if self.file.exists() else 0
            if size < count * length * ROW.itemsize:
                raise ValueError(
                    f"{self.file} has {size} bytes, expected at least "
                    f"{count * length * ROW.itemsize} for the {count} gradients of the state"
                )
        self._shapes, self._rows, self._count, self._gram = shapes, rows, count, gram
        self._began = count > 0
        self._spectra = {}

    # --- gradients ---------------------------------------------------------------------------

    def _check(self, grads: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
        """Return the shapes of all gradients, if this one is as the first."""
        for name, grad in grads.items():
            check_gradient(grad, name)
        shapes = self._shapes or {name: tuple(grad.shape) for name, grad in grads.items()}
        if not shapes:
            raise ValueError("the gradient has no tensors, expected at least one")
        for name in grads:
            if name not in shapes:
                raise ValueError(
                    f"the gradient has a tensor {name!r}, which the first one had not: use a new "
                    "GradientSpace for another model"
                )
        for name, shape in shapes.items():
            if name not in grads:
                raise ValueError(f"the gradient has no tensor {name!r}, which the first one had")
            if tuple(grads[name].shape) != shape:
                raise ValueError(
                    f"the gradient {name!r} has shape {tuple(grads[name].shape)}, expected "
                    f"{shape} as in the first one"
                )
        for name, finite in zip(grads, all_finite(list(grads.values())), strict=True):
            if not finite:
                raise ValueError(
                    f"the gradient {name!r} has inf or nan among its entries, expected finite "
                    "numbers: did the training diverge?"
                )
            if grads[name].dtype == torch.float64 and grads[name].numel():
                largest = max(abs(float(bound)) for bound in torch.aminmax(grads[name].detach()))
                if largest > torch.finfo(torch.float32).max:
                    raise ValueError(
                        f"the gradient {name!r} has an entry of size {largest:.3g}, expected "
                        "numbers within float32"
                    )
        return shapes

    def _slots(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, _Slot]:
        """Return what is kept of each tensor, and where in a kept gradient."""
        sizes = {name: math.prod(shape) for name, shape in shapes.items()}
        limit = self.projection or math.inf
        if self.projection and not self.per_layer and sum(sizes.values()) > limit:
            return dict.fromkeys(sizes, _Slot(0, self.projection, projected=True))
        slots, start = {}, 0
        for name, size in sizes.items():
            stop = start + int(min(size, limit))
            slots[name] = _Slot(start, stop, projected=size > limit)
            start = stop
        return slots

    def _row(
        self, grads: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]
    ) -> npt.NDArray[Any]:
        """Return what is kept of a gradient in memory."""
        slots = self._slots(shapes)
        row = np.zeros(_length(slots), ROW if self.projection is None else np.float64)
        for name, slot in slots.items():
            part = row[slot.start : slot.stop]
            if slot.projected:
                part += _sketch(grads[name], len(part), self._seed_of(name))
                continue
            first = 0
            for chunk in _chunks(grads[name], row.dtype):
                part[first : first + len(chunk)] = chunk
                first += len(chunk)
        return row

    def _write_row(
        self, path: Path, grads: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]
    ) -> None:
        """Write a gradient behind those in the file, and over what an error left there."""
        if not self._began and path.exists() and path.stat().st_size:
            raise FileExistsError(
                f"{path} is there already: remove it, or go on with load_state_dict"
            )
        size = sum(math.prod(shape) for shape in shapes.values())
        with path.open("r+b" if self._began else "wb") as file:
            self._began = True
            file.seek(self._count * size * ROW.itemsize)
            for name in shapes:
                for chunk in _chunks(grads[name], ROW):
                    chunk.tofile(file)

    def _seed_of(self, name: str) -> int:
        # Tensors must not share their randomness.
        text = f"{self.seed} {name}".encode()
        return int.from_bytes(hashlib.blake2b(text, digest_size=16).digest(), "little")

    # --- inner products ----------------------------------------------------------------------

    def _update(self) -> None:
        """Bring the Gram matrices up to date, in one pass over all gradients."""
        done, total = self._gram.shape[1], self._count
        if done == total:
            return
        slots = self._slots(self._shapes)
        length = _length(slots)
        whole = _Slot(0, length, projected=False)
        parts = list(slots.values()) if self.per_layer else [whole]
        gram = np.zeros((len(parts), total, total))
        if done:
            gram[:, :done, :done] = self._gram
        width = min(max(1, PIECE // (8 * total)), length)
        buffer = np.empty((total, width))
        with contextlib.ExitStack() as stack:
            file = None if self.file is None else stack.enter_context(self.file.open("rb"))
            for first in range(0, length, max(1, width)):
                piece = buffer[:, : min(width, length - first)]
                self._read(file, first, length, piece)
                for products, slot in zip(gram, parts, strict=True):
                    part = piece[:, max(0, slot.start - first) : max(0, slot.stop - first)]
                    if part.shape[1]:
                        products[done:, :done] += part[done:] @ part[:done].T
                        products[done:, done:] += part[done:] @ part[done:].T
        gram[:, :done, done:] = gram[:, done:, :done].transpose(0, 2, 1)
        self._gram = gram

    def _read(self, file: BinaryIO | None, first: int, length: int, piece: Matrix) -> None:
        """Fill a piece (T, width) with entries of all gradients, from `first` on."""
        for t in range(self._count):
            if file is None:
                piece[t] = self._rows[t][first : first + piece.shape[1]]
            else:
                # A mapping for each, which goes at once: pages of a larger one would stay.
                offset = ROW.itemsize * (t * length + first)
                piece[t] = np.memmap(file, ROW, "r", offset, (piece.shape[1],))

    def _matrix(self, layer: str | None) -> Matrix:
        """Return a Gram matrix (T, T)."""
        self._check_layer(layer)
        self._update()
        gram: Matrix = (
            self._gram.sum(0) if layer is None else self._gram[list(self._shapes).index(layer)]
        )
        return gram

    def _spectrum(self, layer: str | None, gram: Matrix, count: int) -> Matrix:
        """Return the variances, descending, of the first `count` gradients."""
        if (layer, count) not in self._spectra:
            known = np.linalg.eigvalsh(gram[:count, :count])[::-1].clip(0)
            self._spectra[layer, count] = known
        return self._spectra[layer, count]

    def _check_layer(self, layer: str | None) -> None:
        if layer is None or layer in self.layers:
            return
        if not self.per_layer:
            raise ValueError(f"layer={layer!r} needs a GradientSpace with per_layer=True")
        names = ", ".join(self.layers[:5]) + (", ..." if len(self.layers) > 5 else "")
        raise ValueError(f"there is no layer {layer!r}, the layers are {names}")

    def _check_numbers(self, name: str, numbers: Sequence[float]) -> None:
        if len(numbers) != self._count:
            raise ValueError(
                f"{name} has {len(numbers)} numbers, expected {self._count}, one for each epoch"
            )


def _check_share(share: float) -> None:
    if not 0 < share <= 1:
        raise ValueError(f"share must be above 0 and at most 1, not {share}")


def _smallest(spectrum: Matrix, share: float) -> int:
    """Return how many of the descending variances sum up to a share of all."""
    sums = np.cumsum(spectrum)
    if not len(sums) or sums[-1] <= 0:
        return 0
    return int(np.searchsorted(sums, (share - SLACK) * sums[-1])) + 1


def _divided(over: Matrix, under: Matrix) -> Matrix:
    """Return a quotient that is 0 where the divisor is."""
    quotient: Matrix = np.divide(over, under, out=np.zeros_like(over), where=under > 0)
    return quotient


def _length(slots: Mapping[str, _Slot]) -> int:
    return max((slot.stop for slot in slots.values()), default=0)


def _chunks(grad: Tensor, dtype: npt.DTypeLike) -> Iterator[npt.NDArray[Any]]:
    """Give the entries of a tensor in order, a few at a time."""
    for part in torch.split(grad.detach().reshape(-1), CHUNK):
        yield part.cpu().double().numpy().astype(dtype, copy=False)


def _sketch(grad: Tensor, size: int, seed: int) -> Matrix:
    """Add every entry, with a random sign, to one of `size` random bins."""
    # Raw bits are the same in all versions of numpy.
    generator = np.random.PCG64(seed)
    sums = np.zeros(2 * size)
    for chunk in _chunks(grad, np.float64):
        raw = generator.random_raw((len(chunk) + 1) // 2).astype("<u8", copy=False)
        bits = raw.view("<u4")[: len(chunk)]
        bins = (bits >> 1).astype(np.int64) * size >> 31
        # Negative ones into bins of their own, which are subtracted at the end.
        bins += (bits & 1).astype(np.int64) * size
        sums += np.bincount(bins, weights=chunk, minlength=2 * size)
    return sums[:size] - sums[size:]


def _number(value: float) -> str:
    """Write a number with six decimals, and none as -0."""
    return f"{round(float(value), 6) + 0.0:.6f}"
