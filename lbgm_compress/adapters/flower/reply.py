"""The reply: the array of bytes that `compression_mod` sends in the place of a client's arrays.

A reply is one array of bytes in an ArrayRecord of its own, with the stype `STYPE`, which marks it
as something else than parameters. For T arrays, in the order of their sorted names::

    size   meaning
    1      version: 1
    1      1 if a table follows, else 0
    T      the table, if there is one: for each array its dtype, an index into `DTYPES`, plus 128
           if the array is sent exactly
    ...    the arrays that are sent exactly: their elements as they are in memory, row by row
    ...    a `lbgm_compress` message with the updates of all other arrays; empty if there are none

Without a table, every dtype is that of the received array, and an array is sent exactly if it is
not float16, float32 or float64, or if its name matches `exclude`.

An update is the new value of an array minus the received one, which is cast to the new dtype first.
An array whose update has inf or nan, such as a mask of -inf, is sent exactly.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from flwr.app import Array
from torch import Tensor

from lbgm_compress.wire.errors import PayloadError

__all__ = [
    "DTYPES",
    "STYPE",
    "NDArray",
    "Part",
    "Reply",
    "compressible",
    "default_parts",
    "matching",
    "native",
    "tensor_of",
    "updates",
]

STYPE = "lbgm_compress"
VERSION = 1
EXACT = 128
DTYPES = (
    *("float16", "float32", "float64"),
    *("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "bool"),
    *("complex64", "complex128"),
)
COMPRESSED = {"float16": torch.float16, "float32": torch.float32, "float64": torch.float64}

NDArray = npt.NDArray[Any]


@dataclass(frozen=True)
class Part:
    """The form in which one array travels."""

    shape: tuple[int, ...]
    dtype: str
    exact: bool
    """True if the elements are sent as they are, and not as a compressed update."""

    @property
    def nbytes(self) -> int:
        """Size of the elements in bytes."""
        return int(np.prod(self.shape, dtype=object)) * np.dtype(self.dtype).itemsize


def matching(names: Iterable[str], patterns: Sequence[str]) -> frozenset[str]:
    """Return the names that match a pattern, as `fnmatch.fnmatchcase` does."""
    return frozenset(
        name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
    )


def compressible(parts: Mapping[str, Part], excluded: frozenset[str]) -> dict[str, Tensor]:
    """Return placeholders, which take no memory, for the arrays that may be sent as updates.

    They are the tensors of the client's `lbgm_compress.Receiver` and of its digest. An array that
    is sent exactly in this round alone is among them.
    """
    return {
        name: torch.empty((), dtype=COMPRESSED[part.dtype]).expand(part.shape)
        for name, part in parts.items()
        if part.dtype in COMPRESSED and name not in excluded
    }


def default_parts(sent: Mapping[str, NDArray], excluded: frozenset[str]) -> dict[str, Part]:
    """Return the form of each array, by sorted name, for arrays that keep their dtype.

    Raises
    ------
    ValueError
        If a dtype is not one of `DTYPES`.
    """
    return {name: _part(name, sent[name], excluded) for name in sorted(sent)}


def updates(
    sent: Mapping[str, NDArray], new: Mapping[str, NDArray], excluded: frozenset[str]
) -> tuple[dict[str, Part], dict[str, Tensor]]:
    """Return the form of each array, and the updates of those to be compressed, by sorted name.

    Raises
    ------
    ValueError
        If names or shapes differ, or a dtype is not one of `DTYPES`.
    """
    if missing := sorted(sent.keys() - new.keys()):
        raise ValueError(f"the app did not return the array {missing[0]!r} that it received")
    if added := sorted(new.keys() - sent.keys()):
        raise ValueError(f"the app returned an array {added[0]!r} that it did not receive")
    parts: dict[str, Part] = {}
    changes: dict[str, Tensor] = {}
    for name in sorted(sent):
        if new[name].shape != sent[name].shape:
            raise ValueError(
                f"the app returned the array {name!r} with shape {new[name].shape}, it received "
                f"{sent[name].shape}"
            )
        part = _part(name, new[name], excluded)
        if not part.exact:
            change = tensor_of(new[name], part.dtype) - tensor_of(sent[name], part.dtype)
            if change.isfinite().all():
                changes[name] = change
            else:
                part = Part(part.shape, part.dtype, exact=True)
        parts[name] = part
    return parts, changes


@dataclass(frozen=True)
class Reply:
    """The new arrays of a client, as they travel."""

    parts: Mapping[str, Part]
    exact: Mapping[str, NDArray]
    message: Tensor | None
    """The updates of all other arrays: flat uint8, None if every array is sent exactly."""

    def pack(self, defaults: Mapping[str, Part]) -> Array:
        """Return the array that travels.

        The table is left out if the parts equal `defaults`, which the server knows.
        """
        table = b""
        if self.parts != defaults:
            table = bytes(
                DTYPES.index(part.dtype) | (EXACT if part.exact else 0)
                for part in self.parts.values()
            )
        exact = [native(self.exact[name]).tobytes() for name in self.parts if name in self.exact]
        message = b"" if self.message is None else self.message.numpy().tobytes()
        data = b"".join([bytes([VERSION, bool(table)]), table, *exact, message])
        return Array(dtype="uint8", shape=(len(data),), stype=STYPE, data=data)

    @staticmethod
    def unpack(array: Array, defaults: Mapping[str, Part], excluded: frozenset[str]) -> Reply:
        """Return the reply that `pack` made an array of; the array may hold anything.

        Parameters
        ----------
        array
            The array that a client sent.
        defaults
            The form of each array that the client received.
        excluded
            Names of the arrays that must be sent exactly.

        Raises
        ------
        PayloadError
            If it is not a reply for these arrays.
        """
        if array.stype != STYPE:
            raise PayloadError(
                "the reply is not compressed: put compression_mod first into ClientApp(mods=[...])"
            )
        data = memoryview(array.data)
        if len(data) < 2 or data[0] != VERSION or data[1] > 1:
            raise PayloadError(
                f"the reply starts with {bytes(data[:2])!r}, expected version {VERSION}: use the "
                "same release of lbgm_compress at both ends"
            )
        position = 2
        parts = defaults
        if data[1]:
            table = bytes(data[position : position + len(defaults)])
            position += len(defaults)
            parts = _read_table(table, defaults, excluded)
        exact: dict[str, NDArray] = {}
        for name, part in parts.items():
            if not part.exact:
                continue
            if len(data) - position < part.nbytes:
                raise PayloadError(f"the reply ends within the array {name!r}")
            elements = np.frombuffer(data[position : position + part.nbytes], dtype=part.dtype)
            if part.dtype == "bool" and (elements.view(np.uint8) > 1).any():
                raise PayloadError(f"the array {name!r} has an element that is neither 0 nor 1")
            exact[name] = elements.reshape(part.shape)
            position += part.nbytes
        if all(part.exact for part in parts.values()):
            if position != len(data):
                raise PayloadError(f"{len(data) - position} bytes follow the end of the reply")
            return Reply(parts, exact, None)
        if position == len(data):
            raise PayloadError("the reply has no message")
        message = torch.frombuffer(bytearray(data[position:]), dtype=torch.uint8)
        return Reply(parts, exact, message)


def tensor_of(array: NDArray, dtype: str) -> Tensor:
    """Return an array as a tensor of a floating-point dtype, with the same bits at both ends."""
    with np.errstate(over="ignore", invalid="ignore"):
        return torch.from_numpy(np.array(array, dtype=dtype))


def native(array: NDArray) -> NDArray:
    """Return an array in the order of elements and bytes in which it travels."""
    return np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))


def _part(name: str, array: NDArray, excluded: frozenset[str]) -> Part:
    dtype = array.dtype.name
    if dtype not in DTYPES:
        raise ValueError(f"the array {name!r} is {dtype}, and only {', '.join(DTYPES)} can be sent")
    return Part(tuple(array.shape), dtype, dtype not in COMPRESSED or name in excluded)


def _read_table(
    table: bytes, defaults: Mapping[str, Part], excluded: frozenset[str]
) -> dict[str, Part]:
    if len(table) < len(defaults):
        raise PayloadError("the reply ends within its table")
    parts = {}
    for code, (name, default) in zip(table, defaults.items(), strict=True):
        index, exact = code & ~EXACT, bool(code & EXACT)
        if index >= len(DTYPES):
            raise PayloadError(f"the array {name!r} has an unknown dtype {index}")
        dtype = DTYPES[index]
        if dtype.startswith("complex") and not default.dtype.startswith("complex"):
            raise PayloadError(f"the array {name!r} is {dtype}, and {default.dtype} was sent")
        if not exact and (dtype not in COMPRESSED or name in excluded):
            raise PayloadError(f"the array {name!r} must be sent exactly")
        parts[name] = Part(default.shape, dtype, exact)
    return parts
