"""Numbers of a fixed width in bits, and variable-length integers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lbgm_compress.wire.errors import PayloadError

__all__ = [
    "pack_fixed",
    "pack_fixed_on_device",
    "read_varints",
    "unpack_fixed",
    "unpack_fixed_on_device",
    "varint",
]

Bytes = npt.NDArray[np.uint8]


def varint(value: int) -> bytes:
    """Return `value` >= 0 as LEB128: seven bits a byte, lowest first; the high bit continues."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def read_varints(data: Sequence[int], count: int) -> tuple[list[int], int]:
    """Return the first `count` integers of `data` and the number of bytes that they take.

    Raises
    ------
    PayloadError
        If the data end first, or a number takes more than nine bytes (63 bits).
    """
    values: list[int] = []
    position = 0
    for _ in range(count):
        value = shift = 0
        while True:
            if position >= len(data):
                raise PayloadError("the payload ends inside a variable-length integer")
            if shift > 56:
                raise PayloadError("a variable-length integer takes more than 63 bits")
            byte = data[position]
            position += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                break
        values.append(value)
    return values, position


def pack_fixed(numbers: npt.NDArray[np.int64], width: int) -> Bytes:
    """Pack numbers of `width` bits, lowest bit first, into ceil(count * width / 8) bytes."""
    if width == 0 or numbers.size == 0:
        return np.empty(0, np.uint8)
    size = next(s for s in (1, 2, 4, 8) if 8 * s >= width)
    octets = numbers.astype(f"<u{size}").view(np.uint8).reshape(-1, size)
    bits = np.unpackbits(octets, axis=1, count=width, bitorder="little")
    return np.packbits(bits.reshape(-1), bitorder="little")


def unpack_fixed(data: Bytes, width: int, count: int) -> npt.NDArray[np.int64]:
    """Return `count` numbers of `width` bits; `data` holds exactly the bytes that they take."""
    if width == 0 or count == 0:
        return np.zeros(count, np.int64)
    size = next(s for s in (1, 2, 4, 8) if 8 * s >= width)
    bits = np.unpackbits(data, count=count * width, bitorder="little").reshape(count, width)
    octets = np.zeros((count, size), np.uint8)
    octets[:, : (width + 7) // 8] = np.packbits(bits, axis=1, bitorder="little")
    return octets.view(f"<u{size}").reshape(-1).astype(np.int64)


def pack_fixed_on_device(numbers: Tensor, width: int) -> Tensor:
    """Return what `pack_fixed` returns, computed on the device of `numbers` (int64)."""
    shifts = torch.arange(width, device=numbers.device)
    bits = (numbers[:, None] >> shifts & 1).to(torch.uint8).reshape(-1)
    bits = torch.nn.functional.pad(bits, (0, -bits.numel() % 8)).view(-1, 8)
    weights = 2 ** torch.arange(8, device=numbers.device, dtype=torch.uint8)
    return (bits * weights).sum(1, dtype=torch.uint8)


def unpack_fixed_on_device(data: Tensor, width: int, count: int) -> Tensor:
    """Return what `unpack_fixed` returns, computed on the device of `data`."""
    shifts = torch.arange(8, device=data.device, dtype=torch.uint8)
    bits = (data[:, None] >> shifts & 1).reshape(-1)[: count * width].view(count, width)
    weights = 2 ** torch.arange(width, device=data.device)
    return (bits * weights).sum(1)
