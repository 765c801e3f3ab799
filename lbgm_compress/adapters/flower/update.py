"""What travels between `CompressedStrategy` and `compression_mod`, byte by byte.

A *request* is one value, bytes, in the ConfigRecord of a train message: a JSON object, a zero byte
and the digest of what the server holds of the client (`lbgm_compress.Receiver.digest`; empty if it
holds nothing). The object has the keys ``version`` (1), ``compressor`` (its repr), ``exclude`` (a
list of patterns), ``training`` (an identifier of the training, which a restored server keeps) and
``layout`` (a hash, in hexadecimal digits, of the names, shapes and dtypes that the digest is for).

A *reply* is one array of bytes in the place of the client's ArrayRecord (stype `STYPE`, so that
nobody takes it for parameters). T arrays, in the order of their sorted names::

    size   meaning
    1      version: 1
    1      1 if a table follows, else 0
    T      the table, if there is one: for each array its dtype, an index into `DTYPES`, plus 128
           if it is sent exactly
    ...    the arrays that are sent exactly: elements as they are in memory, row by row
    ...    the rest, empty if nothing is left: a `lbgm_compress` message with the updates of all
           other arrays

Without a table, dtypes are those of the arrays that the client received, and exactly those arrays
are sent exactly that are not float16, float32 or float64, or whose name matches `exclude`.

An update is an array's new value minus the received one, after casting the latter to the dtype of
the former. An array whose update is not finite, as that of a mask of -inf, is sent exactly.
"""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from flwr.app import Array
from torch import Tensor

from lbgm_compress.compressor import Compressor
from lbgm_compress.compressors.parse import parse_compressor
from lbgm_compress.wire.errors import PayloadError

__all__ = [
    "ADDED",
    "DTYPES",
    "KEY",
    "STYPE",
    "Part",
    "Reply",
    "Request",
    "compressible",
    "default_parts",
    "excluded",
    "tensor_of",
    "updates",
]

KEY = "lbgm_compress"
# The key of a request in a ConfigRecord that was added for it alone.
ADDED = "lbgm_compress.added"
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
class Request:
    """What the server tells a client."""

    compressor: Compressor
    exclude: tuple[str, ...]
    training: str
    layout: bytes
    digest: bytes

    def pack(self) -> bytes:
        """Return the bytes that travel."""
        head = {
            "version": VERSION,
            "compressor": repr(self.compressor),
            "exclude": self.exclude,
            "training": self.training,
            "layout": self.layout.hex(),
        }
        return json.dumps(head).encode() + b"\0" + self.digest

    @staticmethod
    def unpack(data: Any) -> Request:
        """Read what `pack` returned.

        Raises
        ------
        ValueError
            If it is no request, or one of another version; the message says which.
        """
        if not isinstance(data, bytes):
            raise ValueError(f"a request is bytes, not {type(data).__name__}")
        text, _, digest = data.partition(b"\0")
        try:
            head = json.loads(text)
            version, training = head["version"], str(head["training"])
            layout = bytes.fromhex(head["layout"])
            expression, exclude = str(head["compressor"]), tuple(map(str, head["exclude"]))
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"the request cannot be read: {error!r}") from None
        if version != VERSION:
            raise ValueError(
                f"the server's request has version {version}, this client reads version {VERSION}: "
                "use the same release of lbgm_compress at both ends"
            )
        return Request(parse_compressor(expression), exclude, training, layout, digest)


@dataclass(frozen=True)
class Part:
    """How one array travels."""

    shape: tuple[int, ...]
    dtype: str
    exact: bool

    @property
    def nbytes(self) -> int:
        """Bytes of its elements."""
        return int(np.prod(self.shape, dtype=object)) * np.dtype(self.dtype).itemsize


def excluded(names: Iterable[str], patterns: Sequence[str]) -> frozenset[str]:
    """Return the names that match a pattern, as `fnmatch.fnmatchcase` does."""
    return frozenset(
        name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
    )


def compressible(parts: Mapping[str, Part], outside: frozenset[str]) -> dict[str, Tensor]:
    """Return stand-ins, which take no memory, for the arrays that updates may be sent of.

    They are what a digest and a `lbgm_compress.Receiver` are for, whether or not some are sent
    exactly in this round.
    """
    return {
        name: torch.empty((), dtype=COMPRESSED[part.dtype]).expand(part.shape)
        for name, part in parts.items()
        if part.dtype in COMPRESSED and name not in outside
    }


def default_parts(sent: Mapping[str, NDArray], outside: frozenset[str]) -> dict[str, Part]:
    """Return how arrays travel whose dtype stays, by sorted name.

    Raises
    ------
    ValueError
        If a dtype is not one of `DTYPES`.
    """
    return {name: _part(name, sent[name], outside) for name in sorted(sent)}


def updates(
    sent: Mapping[str, NDArray], new: Mapping[str, NDArray], outside: frozenset[str]
) -> tuple[dict[str, Part], dict[str, Tensor]]:
    """Return how arrays travel, and the updates of those that are compressed, by sorted name.

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
        part = _part(name, new[name], outside)
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
    """What a client tells the server."""

    parts: Mapping[str, Part]
    exact: Mapping[str, NDArray]
    message: Tensor | None
    """Flat uint8, None if every array is sent exactly."""

    def pack(self, defaults: Mapping[str, Part]) -> Array:
        """Return the array that travels; `defaults` are the parts that need no table."""
        table = b""
        if self.parts != defaults:
            table = bytes(
                DTYPES.index(part.dtype) | (EXACT if part.exact else 0)
                for part in self.parts.values()
            )
        exact = [_native(self.exact[name]).tobytes() for name in self.parts if name in self.exact]
        message = b"" if self.message is None else self.message.numpy().tobytes()
        data = b"".join([bytes([VERSION, bool(table)]), table, *exact, message])
        return Array(dtype="uint8", shape=(len(data),), stype=STYPE, data=data)

    @staticmethod
    def unpack(array: Array, defaults: Mapping[str, Part], outside: frozenset[str]) -> Reply:
        """Take the bytes apart, of which none is believed.

        Raises
        ------
        PayloadError
            If they are no reply for the arrays that were sent.
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
            parts = _read_table(table, defaults, outside)
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
    """Return an array as a tensor of a floating-point dtype: the same bits at both ends."""
    with np.errstate(over="ignore", invalid="ignore"):
        return torch.from_numpy(np.array(array, dtype=dtype))


def _part(name: str, array: NDArray, outside: frozenset[str]) -> Part:
    dtype = array.dtype.name
    if dtype not in DTYPES:
        raise ValueError(f"the array {name!r} is {dtype}, and only {', '.join(DTYPES)} can be sent")
    return Part(tuple(array.shape), dtype, dtype not in COMPRESSED or name in outside)


def _native(array: NDArray) -> NDArray:
    return np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))


def _read_table(
    table: bytes, defaults: Mapping[str, Part], outside: frozenset[str]
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
        if not exact and (dtype not in COMPRESSED or name in outside):
            raise PayloadError(f"the array {name!r} must be sent exactly")
        parts[name] = Part(default.shape, dtype, exact)
    return parts
