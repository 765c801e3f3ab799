"""What travels between the filters: requests of the server, and updates of clients.

An update is one array of bytes, under the name `KEY` in the data of the DXO::

    size   meaning
    1      version: 1
    1      1 if the layout follows, 0 if its hash does
    8      the ticket of the task that it answers, little-endian
    4      length of the layout    |  only with a layout
    ...    the layout, JSON        |
    16     hash of the layout, which the server holds already; only without one
    ...    a message of `lbgm_compress.Sender`

The layout is the compressor's expression, and name, library, dtype and shape of each array. Arrays
that are not in it are in the data of the DXO as they were.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from nvflare.apis.shareable import ReservedHeaderKey, Shareable
from torch import Tensor

from lbgm_compress.adapters.nvflare.layout import Layout
from lbgm_compress.wire.errors import PayloadError

__all__ = ["KEY", "Request", "Update"]

KEY = "lbgm_compress"
VERSION = 1
HASH = 16


class Request(NamedTuple):
    """What the server tells a client with a task, in a header of the Shareable."""

    training: int
    """A random number of this server, which is another one after a restart."""
    ticket: int
    """A random number of this task and client."""
    applied: int
    """The ticket of the client's last update that went into the model; 0 for none."""
    layout: bytes
    """The hash of the layout that the server knows of the client; empty for none."""
    digest: bytes
    """The digest of what the server holds of the client; empty without a layout."""

    def add_to(self, task: Shareable) -> None:
        """Put the request into the headers of a task."""
        task.set_header(KEY, {"version": VERSION, **self._asdict()})

    @staticmethod
    def take_from(task: Any) -> Request | None:
        """Take the request out of the headers of a task; return None if there is none.

        Raises
        ------
        ValueError
            If it is not a request of this release.
        """
        headers = task.get(ReservedHeaderKey.HEADERS) if isinstance(task, Shareable) else None
        values = headers.pop(KEY, None) if isinstance(headers, dict) else None
        if values is None:
            return None
        if not isinstance(values, Mapping) or values.get("version") != VERSION:
            raise ValueError(
                "the server's request cannot be read: use the same release of lbgm_compress at "
                "both ends"
            )
        return Request(*(values[name] for name in Request._fields))


class Update(NamedTuple):
    """The array of a client, taken apart."""

    ticket: int
    layout: Layout | bytes
    """The layout, or the hash of the one that the server knows."""
    message: Tensor
    """Flat uint8."""

    def pack(self) -> npt.NDArray[np.uint8]:
        """Return the array that travels."""
        head = struct.pack("<BBQ", VERSION, isinstance(self.layout, Layout), self.ticket)
        if isinstance(self.layout, Layout):
            table = self.layout.pack()
            head += struct.pack("<I", len(table)) + table
        else:
            head += self.layout
        return np.concatenate([np.frombuffer(head, dtype=np.uint8), self.message.numpy()])

    @staticmethod
    def unpack(array: Any) -> Update:
        """Return the update that `pack` made an array of; the array may be anything.

        Raises
        ------
        PayloadError
            If it is no such array.
        """
        if not isinstance(array, np.ndarray) or array.dtype != np.uint8 or array.ndim != 1:
            raise PayloadError("the update is not a flat array of uint8")
        data = array.tobytes()
        if len(data) < 10 or data[0] != VERSION or data[1] > 1:
            raise PayloadError(
                f"the update starts with {data[:2]!r}, expected version {VERSION}: use the same "
                "release of lbgm_compress at both ends"
            )
        start, end = 10, 10 + HASH
        if data[1]:
            start = 14
            end = start + int.from_bytes(data[10:14], "little")
        if len(data) < end:
            raise PayloadError("the update ends within its layout")
        layout = Layout.unpack(data[start:end]) if data[1] else data[start:end]
        message = torch.from_numpy(np.array(array[end:]))
        return Update(int.from_bytes(data[2:10], "little"), layout, message)
