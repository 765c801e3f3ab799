"""The update: the array of bytes that travels in the place of the model's arrays to a client.

An update is one array of bytes in an ArrayRecord of its own, with the stype `STYPE`::

    size   meaning
    1      version: 1
    1      0: the whole model; 1: a chain of messages
    ...    the number of arrays that are sent exactly, and for each its dtype (one byte, an index
           into `reply.DTYPES`), its number of dimensions, their sizes, and its elements as they are
           in memory, row by row
    ...    the whole model: a state of `archive.pack_state`; with ``first="int8"`` the messages that
           follow are in it
    ...    or a chain: the version before the first message (16 bytes), the number of messages, the
           size of each, and the messages

Numbers without a size are base 128, the lowest seven bits first, with 128 added to all bytes but
the last. Names travel with a whole model alone.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from flwr.app import Array
from torch import Tensor

from lbgm_compress.adapters.flower.archive import pack_state, unpack_state
from lbgm_compress.adapters.flower.reply import DTYPES, NDArray, native
from lbgm_compress.endpoints.downlink import (
    VERSION_SIZE,
    Chain,
    Update,
    Whole,
    decoded,
    travels_in_half,
)

__all__ = ["PackedUpdate"]

# Flower names it in the error that it raises where an app without the mod reads the array.
STYPE = "lbgm_compress.compression_mod"
FORMAT = 1
WHOLE, CHAIN = 0, 1
LARGEST_NDIM = 64


class PackedUpdate(NamedTuple):
    """What a client is sent in the place of the model's arrays."""

    update: Update
    exact: Sequence[NDArray]
    """The arrays that are sent exactly, in the order of their names in `names`."""
    names: tuple[str, ...] | None = None
    """Names of all arrays of the record, in its order. A chain has none."""

    def pack(self, first: str) -> Array:
        """Return the array that travels.

        Parameters
        ----------
        first
            The precision in which a whole model travels, as `Publisher` has it.
        """
        update, parts = self.update, [_number(len(self.exact))]
        for array in self.exact:
            head = [DTYPES.index(array.dtype.name), array.ndim]
            parts += [bytes(head), *map(_number, array.shape), native(array).tobytes()]
        if isinstance(update, Whole):
            parts.append(pack_state(self._whole(update, first)))
        else:
            sizes = [message.numel() for message in update.messages]
            parts += [update.base, _number(len(sizes)), *map(_number, sizes)]
            parts += [message.numpy().tobytes() for message in update.messages]
        kind = WHOLE if isinstance(update, Whole) else CHAIN
        data = b"".join([bytes([FORMAT, kind]), *parts])
        return Array(dtype="uint8", shape=(len(data),), stype=STYPE, data=data)

    def _whole(self, whole: Whole, first: str) -> dict[str, Any]:
        halved = {
            name: _dtype(tensor)
            for name, tensor in whole.model.items()
            if name not in whole.coded and travels_in_half(tensor, first)
        }
        model = {n: t.half() if n in halved else t for n, t in whole.model.items()}
        state: dict[str, Any] = {
            "names": self.names,
            "version": whole.version.hex(),
            "halved": halved,
            "model": {**model, **whole.coded},
            "state": whole.state,
        }
        if whole.coded:
            likes = {name: whole.model[name] for name in whole.coded}
            state["coded"] = {n: (_dtype(t), tuple(t.shape)) for n, t in likes.items()}
            state["sizes"] = [message.numel() for message in whole.messages]
            state["messages"] = torch.cat([torch.empty(0, dtype=torch.uint8), *whole.messages])
        return state

    @staticmethod
    def unpack(array: Array) -> PackedUpdate:
        """Return the update that `pack` made an array of.

        Raises
        ------
        ValueError
            If it is not one.
        """
        if array.stype != STYPE:
            raise ValueError("the server's arrays are not a compressed model")
        data = _Reader(memoryview(array.data))
        version, kind = data.take(2)
        if version != FORMAT or kind not in (WHOLE, CHAIN):
            raise ValueError(
                f"the server's model starts with {bytes([version, kind])!r}, expected version "
                f"{FORMAT}: use the same release of lbgm_compress at both ends"
            )
        exact = [data.array() for _ in range(data.number())]
        if kind == WHOLE:
            return _read_whole(exact, unpack_state(bytes(data.take(data.left))))
        base = bytes(data.take(VERSION_SIZE))
        sizes = [data.number() for _ in range(data.number())]
        messages = tuple(_flat(data.take(size)) for size in sizes)
        if data.left:
            raise ValueError(f"{data.left} bytes follow the end of the server's model")
        return PackedUpdate(Chain(base, messages), exact)


def _read_whole(exact: Sequence[NDArray], state: Mapping[str, Any]) -> PackedUpdate:
    try:
        model = {
            name: tensor.to(getattr(torch, state["halved"].get(name, ""), tensor.dtype))
            for name, tensor in state["model"].items()
        }
        coded = {}
        for name, (dtype, shape) in state.get("coded", {}).items():
            coded[name] = model[name]
            like = torch.empty((), dtype=getattr(torch, dtype)).expand(shape)
            model[name] = decoded(coded[name], like)
        messages = state["messages"].split(list(state["sizes"])) if coded else ()
        version = bytes.fromhex(state["version"])
        whole = Whole(version, model, dict(state["state"]), coded, messages)
        return PackedUpdate(whole, exact, tuple(state["names"]))
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f"the server's model cannot be read: {error!r}") from None


class _Reader:
    """Reads bytes from the front to the end."""

    def __init__(self, data: memoryview) -> None:
        self.data, self.position = data, 0

    @property
    def left(self) -> int:
        return len(self.data) - self.position

    def take(self, size: int) -> memoryview:
        if size > self.left:
            raise ValueError("the server's model ends too early")
        self.position += size
        return self.data[self.position - size : self.position]

    def number(self) -> int:
        found = 0
        for shift in itertools.count(0, 7):
            [byte] = self.take(1)
            found |= (byte & 127) << shift
            if byte < 128:
                return found
        raise AssertionError

    def array(self) -> NDArray:
        code, ndim = self.take(2)
        if code >= len(DTYPES) or ndim > LARGEST_NDIM:
            raise ValueError(f"the server's model has an array of dtype {code}, {ndim} dimensions")
        dtype = np.dtype(DTYPES[code])
        shape = [self.number() for _ in range(ndim)]
        elements = bytearray(self.take(math.prod(shape) * dtype.itemsize))
        return np.frombuffer(elements, dtype=dtype).reshape(shape)


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _number(value: int) -> bytes:
    found = bytearray()
    while value > 127:
        found.append(value & 127 | 128)
        value >>= 7
    return bytes([*found, value])


def _flat(data: memoryview) -> Tensor:
    if not len(data):
        return torch.empty(0, dtype=torch.uint8)
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)
