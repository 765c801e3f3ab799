"""The kept gradients of a `GradientSpace`: one row each, in memory or in a file."""

from __future__ import annotations

import abc
import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lbgm_compress.analysis.sketch import count_sketch, seed_of

__all__ = ["FileRows", "Layout", "MemoryRows", "Rows", "Slot"]

# Gradients that are not projected, in memory and in a file, on any machine.
FLOAT32 = np.dtype("<f4")
# Entries that are converted or projected at a time, so that their random numbers stay in a cache.
CHUNK = 2**16
# Fills an array (rows, width) with the entries of all rows from a column on.
Read = Callable[[int, npt.NDArray[np.float64]], None]


class Slot(NamedTuple):
    """The part of a row that belongs to one tensor."""

    start: int
    stop: int
    projected: bool


@dataclass(frozen=True)
class Layout:
    """The parts of a row, from the shapes of the tensors in the first gradient."""

    shapes: Mapping[str, tuple[int, ...]]
    slots: Mapping[str, Slot]

    @classmethod
    def of(
        cls, shapes: Mapping[str, tuple[int, ...]], projection: int | None, per_layer: bool
    ) -> Layout:
        """Return the layout of rows with at most `projection` numbers, for each layer or in all."""
        sizes = {name: math.prod(shape) for name, shape in shapes.items()}
        if projection is not None and not per_layer and sum(sizes.values()) > projection:
            return cls(shapes, dict.fromkeys(sizes, Slot(0, projection, projected=True)))
        limit = math.inf if projection is None else projection
        slots, start = {}, 0
        for name, size in sizes.items():
            stop = start + int(min(size, limit))
            slots[name] = Slot(start, stop, projected=size > limit)
            start = stop
        return cls(shapes, slots)

    @property
    def length(self) -> int:
        """The number of entries of a row."""
        return max((slot.stop for slot in self.slots.values()), default=0)


class Rows(abc.ABC):
    """Gradients, a row each, and the layout that all rows have."""

    def __init__(self) -> None:
        self.layout = Layout({}, {})
        self.count = 0

    def append(self, grads: Mapping[str, Tensor], layout: Layout) -> None:
        """Keep another gradient; after an error the rows are as they were."""
        self._write(grads, layout)
        self.layout = layout
        self.count += 1

    @abc.abstractmethod
    def _write(self, grads: Mapping[str, Tensor], layout: Layout) -> None:
        """Write row number `count`, over anything that an interrupted call left there."""

    @abc.abstractmethod
    def reader(self) -> contextlib.AbstractContextManager[Read]:
        """Return a context manager that gives a function to read the rows."""

    @abc.abstractmethod
    def in_memory(self) -> list[Tensor]:
        """Return the rows that a saved state has to hold, sharing their memory."""

    @abc.abstractmethod
    def check(self, rows: Sequence[Tensor], count: int, layout: Layout) -> None:
        """Raise `ValueError` unless `rows`, with the file, are `count` rows of this layout."""

    def replace(self, rows: Sequence[Tensor], count: int, layout: Layout) -> None:
        """Replace all rows by those of a saved state, which `check` has passed."""
        self.layout, self.count = layout, count


class MemoryRows(Rows):
    """Rows in memory: float32 as the gradients are, or float64 if they are projected.

    Parameters
    ----------
    dtype
        Of the rows.
    seed
        Of the projection of tensors whose slot is projected.
    """

    def __init__(self, dtype: npt.DTypeLike = FLOAT32, seed: int = 0) -> None:
        super().__init__()
        self._dtype = np.dtype(dtype)
        self._seed = seed
        self._rows: list[npt.NDArray[Any]] = []

    def _write(self, grads: Mapping[str, Tensor], layout: Layout) -> None:
        row = np.zeros(layout.length, self._dtype)
        for name, slot in layout.slots.items():
            part = row[slot.start : slot.stop]
            if slot.projected:
                pieces = _pieces(grads[name], np.dtype(np.float64))
                part += count_sketch(pieces, len(part), seed_of(self._seed, name))
                continue
            first = 0
            for piece in _pieces(grads[name], self._dtype):
                part[first : first + len(piece)] = piece
                first += len(piece)
        self._rows[self.count :] = [row]

    def reader(self) -> contextlib.AbstractContextManager[Read]:
        return contextlib.nullcontext(self._read)

    def _read(self, first: int, piece: npt.NDArray[np.float64]) -> None:
        for row, part in zip(self._rows[: self.count], piece, strict=True):
            part[:] = row[first : first + len(part)]

    def in_memory(self) -> list[Tensor]:
        return [torch.from_numpy(row) for row in self._rows[: self.count]]

    def check(self, rows: Sequence[Tensor], count: int, layout: Layout) -> None:
        if any(tuple(row.shape) != (layout.length,) for row in rows):
            raise ValueError("the state's tensors do not have the shapes that it names")
        if len(rows) != count:
            raise ValueError(f"the state holds {len(rows)} gradients, expected {count}")

    def replace(self, rows: Sequence[Tensor], count: int, layout: Layout) -> None:
        self._rows = [row.numpy() for row in rows]
        super().replace(rows, count, layout)


class FileRows(Rows):
    """Rows of float32 in a file, one after the other."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path
        # Whether the file is this object's own, so that it may be overwritten.
        self._began = False

    def _write(self, grads: Mapping[str, Tensor], layout: Layout) -> None:
        if not self._began and self._path.exists() and self._path.stat().st_size:
            raise FileExistsError(
                f"{self._path} is there already: remove it, or go on with load_state_dict"
            )
        with self._path.open("r+b" if self._began else "wb") as file:
            self._began = True
            file.seek(self.count * layout.length * FLOAT32.itemsize)
            for name in layout.slots:
                for piece in _pieces(grads[name], FLOAT32):
                    piece.tofile(file)

    @contextlib.contextmanager
    def reader(self) -> Iterator[Read]:
        with self._path.open("rb") as file:
            yield functools.partial(self._read, file)

    def _read(self, file: BinaryIO, first: int, piece: npt.NDArray[np.float64]) -> None:
        for number, part in enumerate(piece):
            offset = FLOAT32.itemsize * (number * self.layout.length + first)
            # One short-lived mapping a row: pages of a larger one would stay in memory.
            part[:] = np.memmap(file, FLOAT32, "r", offset, (len(part),))

    def in_memory(self) -> list[Tensor]:
        return []

    def check(self, rows: Sequence[Tensor], count: int, layout: Layout) -> None:
        if rows:
            raise ValueError(f"the state holds {len(rows)} gradients, expected 0")
        expected = count * layout.length * FLOAT32.itemsize
        size = self._path.stat().st_size if self._path.exists() else 0
        if size < expected:
            raise ValueError(
                f"{self._path} has {size} bytes, expected at least {expected} for the {count} "
                "gradients of the state"
            )

    def replace(self, rows: Sequence[Tensor], count: int, layout: Layout) -> None:
        super().replace(rows, count, layout)
        self._began = count > 0


def _pieces(grad: Tensor, dtype: np.dtype[Any]) -> Iterator[npt.NDArray[Any]]:
    """Yield the entries of a tensor in order, at most `CHUNK` at a time."""
    for part in torch.split(grad.detach().reshape(-1), CHUNK):
        yield part.cpu().double().numpy().astype(dtype, copy=False)
