"""A message: the payloads of all tensors of one worker in one round.

A message is a head, whose size both ends know from the compressor and the list of tensors, and a
body, which may be empty. Version 1, byte by byte, with T tensors in the order of their sorted
names::

    offset  size  meaning
    0       1     version of the wire format: 1
    1       2     layout: the first two bytes of the BLAKE2b hash of the compressor's repr and of
                  name, shape and dtype of every tensor
    3       5     size of the body in bytes, unsigned
    8       8     look-back check: 0 if no tensor uses a look-back gradient, else the first eight
                  bytes of the BLAKE2b hash of T identifiers, eight bytes each: that of the
                  look-back gradient which the tensor uses, or 0
    16      ...   for each tensor the head of its payload

    the body, unless it is empty:
    0       8     identifier of the look-back gradients that this message sets, random and not 0;
                  absent if it sets none
    ...     ...   for each tensor whose payload has a body, its size: an unsigned LEB128 integer
    ...     ...   the bodies of the payloads

The payload of a tensor is a head, whose size its compressor knows, and a body. The first byte of
every head is a set of flags, its *kind*::

    1   BODY  a body follows
    2   RAW   the body is the tensor's elements as they are in memory, row by row, and the rest of
              the head is zeros; every compressor sends a gradient with inf or nan so
    4   USES  the receiver needs the look-back gradient that it holds for this tensor
    8   SETS  the receiver holds a new look-back gradient afterwards

Without any flag the tensor is zero, and the rest of the head is zeros.

A look-back gradient is identified by the random number of the message that set it. So two different
ones are never confused after a lost or repeated message, a restart, or a return to an older
checkpoint.
"""

from __future__ import annotations

import enum
import functools
import hashlib
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lbgm_compress.wire.bits import read_varints, varint
from lbgm_compress.wire.errors import PayloadError

__all__ = [
    "HEADER_SIZE",
    "VERSION",
    "Kind",
    "Message",
    "body_size",
    "layout_hash",
    "look_back_check",
    "recycles",
]

VERSION = 1
HEADER_SIZE = 16


class Kind(enum.IntFlag):
    """The first byte of a payload."""

    BODY = 1
    RAW = 2
    USES = 4
    SETS = 8


# Operations on members of an enumeration are slow.
BODY, USES, SETS = int(Kind.BODY), int(Kind.USES), int(Kind.SETS)


def recycles(kind: int) -> bool:
    """Return whether a payload of this kind uses a look-back gradient and sets no new one."""
    return kind & (USES | SETS) == USES


def layout_hash(compressor: str, tensors: Iterable[tuple[str, Sequence[int], torch.dtype]]) -> int:
    """Return the hash of the compressor and the tensors, which both ends must agree on."""
    lines = [compressor, *(f"{name} {tuple(shape)} {dtype}" for name, shape, dtype in tensors)]
    digest = hashlib.blake2b("\n".join(lines).encode(), digest_size=2).digest()
    return int.from_bytes(digest, "little")


def body_size(head: bytes) -> int:
    """Return the size of a message's body, from the first eight bytes of its head.

    Raises
    ------
    PayloadError
        If the message has another version.
    """
    if head[0] != VERSION:
        raise PayloadError(
            f"the message has wire version {head[0]}, this receiver reads version {VERSION}: "
            "use the same release of lbgm_compress at both ends"
        )
    return int.from_bytes(head[3:8], "little")


def look_back_check(identifiers: Sequence[int]) -> int:
    """Return the hash of the identifiers of the look-back gradients in use (0 for none)."""
    if not any(identifiers):
        return 0
    data = struct.pack(f"<{len(identifiers)}Q", *identifiers)
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


@dataclass(frozen=True)
class Message:
    """The parts of a message; heads on the host, bodies on the device (uint8)."""

    layout: int
    check: int
    identifier: int
    heads: Sequence[bytes]
    bodies: Sequence[Tensor | None]

    @functools.cached_property
    def _lengths(self) -> list[bytes]:
        """The size of each body, as it is sent; empty where there is none."""
        return [b"" if body is None else varint(body.numel()) for body in self.bodies]

    def sizes(self) -> list[int]:
        """Return the size in bytes of each tensor's part: head, size of the body, and body."""
        return [
            len(head) + len(length) + (0 if body is None else body.numel())
            for head, length, body in zip(self.heads, self._lengths, self.bodies, strict=True)
        ]

    def numel(self) -> int:
        """Return the size in bytes of the whole message."""
        identifier = 8 if any(head[0] & SETS for head in self.heads) else 0
        return HEADER_SIZE + identifier + sum(self.sizes())

    def pack(self, device: torch.device) -> Tensor:
        """Return the message as one flat uint8 tensor on `device`."""
        present = [body for body in self.bodies if body is not None]
        table = b"".join(self._lengths)
        if any(head[0] & SETS for head in self.heads):
            table = struct.pack("<Q", self.identifier) + table
        size = len(table) + sum(body.numel() for body in present)
        head = struct.pack("<BH", VERSION, self.layout) + size.to_bytes(5, "little")
        head += struct.pack("<Q", self.check) + b"".join(self.heads)
        front = torch.frombuffer(bytearray(head + table), dtype=torch.uint8)
        return torch.cat([front.to(device), *present])

    @staticmethod
    def unpack(message: Tensor, layout: int, head_sizes: Sequence[int]) -> Message:
        """Return the parts of a message; the bodies share its memory.

        Raises
        ------
        PayloadError
            If the bytes are not a message of this version for tensors of this layout.
        """
        front = HEADER_SIZE + sum(head_sizes)
        if message.numel() < 1:
            raise PayloadError("the message is empty")
        # The identifier and the sizes are at the start of the body: one copy includes them.
        host = message[: front + 8 + 9 * len(head_sizes)].cpu().numpy().tobytes()
        size = body_size(host)
        if message.numel() < front:
            raise PayloadError(f"the message has {message.numel()} bytes, its head alone {front}")
        found = int.from_bytes(host[1:3], "little")
        if found != layout:
            raise PayloadError(
                f"the message was made for other tensors or by another compressor (layout "
                f"{found:#06x}, expected {layout:#06x}): both ends need the same compressor and "
                "the same names, shapes and dtypes"
            )
        if message.numel() != front + size:
            raise PayloadError(
                f"the message has {message.numel()} bytes, its header says {front + size}"
            )
        check = int.from_bytes(host[8:16], "little")
        heads, position = [], HEADER_SIZE
        for head_size in head_sizes:
            heads.append(host[position : position + head_size])
            position += head_size

        identifier = 0
        if any(head[0] & SETS for head in heads):
            identifier = int.from_bytes(host[position : position + 8], "little")
            position += 8
            if identifier == 0 or position > message.numel():
                raise PayloadError("the message sets look-back gradients without an identifier")
        count = sum(head[0] & BODY for head in heads)
        sizes, used = read_varints(host[position:], count)
        position += used
        if position + sum(sizes) != message.numel():
            raise PayloadError(
                f"the bodies in the message take {sum(sizes)} bytes, "
                f"{message.numel() - position} are there"
            )
        remaining = iter(torch.split(message[position:], sizes))
        bodies = [next(remaining) if head[0] & BODY else None for head in heads]
        return Message(layout, check, identifier, heads, bodies)
