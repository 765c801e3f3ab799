"""Coding of the positions of a sparse tensor's entries, among n elements.

Positions ascend. They are coded as gaps, d[0] = position[0] and
d[i] = position[i] - position[i - 1] - 1. Their number is not part of a section of indices, which
is::

    offset  size  meaning
    0       1     method: 0 Golomb-Rice, 1 fixed width, 2 enumeration
    1       ...   the indices in that method

If there are no positions, or as many as elements, the section is empty.

Method 0, Golomb-Rice (Rice, 1979), whose parameter b adapts to each block of 128 gaps (the last
block may be shorter). A gap d is its low b bits (remainder) and d >> b (quotient)::

    1       B     the parameter b of each of the B = ceil(count / 128) blocks, 0 to 62
    1 + B   ...   remainders: for each b that occurs, ascending, those of all blocks with that b,
                  b bits each, lowest bit first, the last byte padded with zeros
    ...     ...   quotients in unary: q zeros and a one for each gap, lowest bit first, the last
                  byte padded with zeros

For many random positions this is 1 to 2 % above log2 C(n, count) bits. Positions that cluster, as
those of real gradients do, take fewer bits.

Method 1, fixed width, for a device, where bit-serial coding is slow::

    1       ...   each position in (n - 1).bit_length() bits, lowest bit first, the last byte
                  padded with zeros

Method 2, enumeration, for at most 16 positions, and for at most 256 positions of which Golomb-Rice
takes more than 5 % above log2 C(n, count) bits. It is the number of the positions in the
combinatorial number system (Cover, 1973): the sum over i from 1 to count of C(position[i - 1], i).
It takes ceil(log2 C(n, count)) bits, whatever the positions::

    1       ...   the number, in as many bytes as C(n, count) - 1 needs, lowest byte first
"""

from __future__ import annotations

import functools
import math

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lbgm_compress.wire.bits import (
    Bytes,
    pack_fixed,
    pack_fixed_on_device,
    unpack_fixed,
    unpack_fixed_on_device,
)
from lbgm_compress.wire.errors import PayloadError

__all__ = ["decode_index_rows", "decode_indices", "encode_index_rows", "encode_indices"]

RICE, FIXED, ENUMERATED = 0, 1, 2
BLOCK = 128
# Enumeration is the fastest method up to some hundred bits, and takes milliseconds from a few
# thousand bits on.
MOST_ENUMERATED = 256
FEW = 16
TOLERATED = 1.05
Numbers = npt.NDArray[np.int64]


def encode_indices(indices: Tensor, n: int) -> Tensor:
    """Return the section (uint8) of `indices` (int64, ascending, distinct, below `n`).

    On the CPU the method is Golomb-Rice or enumeration; on another device it is fixed width,
    without synchronisation.
    """
    count = indices.numel()
    if count in (0, n):
        return indices.new_empty(0, dtype=torch.uint8)
    if indices.device.type != "cpu":
        method = torch.full((1,), FIXED, dtype=torch.uint8, device=indices.device)
        return torch.cat([method, pack_fixed_on_device(indices, (n - 1).bit_length())])
    if count <= FEW:
        return torch.from_numpy(_encode_enumerated(indices.tolist(), n))
    section = _encode_rice(indices.numpy())
    if count <= MOST_ENUMERATED and section.size > TOLERATED * _information(n, count):
        section = min(section, _encode_enumerated(indices.tolist(), n), key=len)
    return torch.from_numpy(section)


def decode_indices(section: Tensor, count: int, n: int) -> Tensor:
    """Return the `count` positions (int64, ascending, distinct, below `n`) of `section` (uint8).

    Raises
    ------
    PayloadError
        If the bytes are not such a section.
    """
    if count in (0, n):
        if section.numel():
            raise PayloadError(f"{section.numel()} bytes of indices where none are expected")
        return torch.arange(count, device=section.device)
    if not section.numel():
        raise PayloadError(f"the payload has no indices for its {count} values")
    method = int(section[0])
    if method == RICE:
        positions = _decode_rice(section[1:].cpu().numpy(), count, n)
        return torch.from_numpy(positions).to(section.device)
    if method == FIXED:
        return _decode_fixed(section[1:], count, n)
    if method == ENUMERATED and count <= MOST_ENUMERATED:
        numbers = _decode_enumerated(section[1:].cpu().numpy().tobytes(), count, n)
        return torch.tensor(numbers, device=section.device)
    raise PayloadError(f"unknown coding {method} of {count} indices")


def encode_index_rows(indices: Numbers, n: int) -> Bytes | None:
    """Return the sections (k x size) of the rows of `indices` (k x count) at once.

    None if they may have different sizes, or are too large to be computed together. Each section is
    that of `encode_indices` on the CPU.
    """
    rows, count = indices.shape
    if count in (0, n):
        return np.empty((rows, 0), np.uint8)
    binomials = _binomials(n, count)
    if binomials is None:
        return None
    numbers = binomials[indices, np.arange(count)].sum(1)
    sections = np.empty((rows, 1 + _size_enumerated(n, count)), np.uint8)
    sections[:, 0] = ENUMERATED
    sections[:, 1:] = numbers.astype("<i8")[:, None].view(np.uint8)[:, : sections.shape[1] - 1]
    return sections


def decode_index_rows(sections: Bytes, count: int, n: int) -> Numbers | None:
    """Return the positions (k x count) of sections (k x size) at once.

    None if they are not those of `encode_index_rows`: `decode_indices` reads them one by one, or
    raises an error.
    """
    rows, size = sections.shape
    if count in (0, n):
        return np.tile(np.arange(count), (rows, 1)) if size == 0 else None
    binomials = _binomials(n, count)
    if binomials is None or size != 1 + _size_enumerated(n, count):
        return None
    octets = np.zeros((rows, 8), np.uint8)
    octets[:, : size - 1] = sections[:, 1:]
    numbers = octets.view("<i8")[:, 0].astype(np.int64)
    if (sections[:, 0] != ENUMERATED).any() or (numbers >= math.comb(n, count)).any():
        return None
    positions = np.empty((rows, count), np.int64)
    for i in reversed(range(count)):
        positions[:, i] = np.searchsorted(binomials[:, i], numbers, "right") - 1
        numbers -= binomials[positions[:, i], i]
    return positions


@functools.lru_cache(64)
def _binomials(n: int, count: int) -> Numbers | None:
    """Return C(position, i) for each position below n (rows) and each i from 1 to `count`.

    None if the positions are not enumerated, or in more than 63 bits.
    """
    if count > FEW or math.comb(n, count) >= 1 << 63:
        return None
    table = [[math.comb(position, i) for i in range(1, count + 1)] for position in range(n)]
    return np.array(table, np.int64)


def _information(n: int, count: int) -> float:
    """Return log2 C(n, count) / 8."""
    nats = math.lgamma(n + 1) - math.lgamma(count + 1) - math.lgamma(n - count + 1)
    return nats / math.log(2) / 8


def _blocks(count: int) -> int:
    return -(-count // BLOCK)


def _encode_rice(positions: Numbers) -> Bytes:
    gaps = np.diff(positions, prepend=-1) - 1
    count = gaps.size
    blocks = _blocks(count)
    table = np.zeros((blocks, BLOCK), np.int64)
    table.reshape(-1)[:count] = gaps
    lengths = np.full(blocks, BLOCK)
    lengths[-1] = count - BLOCK * (blocks - 1)

    # The best b of a geometric distribution is near log2(ln 2 * mean). Both neighbours are tried.
    mean = table.sum(1) / lengths
    guess = np.log2(np.maximum(mean * np.log(2), 1)).astype(np.int64)
    candidates = np.maximum(guess[:, None] + np.arange(-1, 2), 0)
    costs = np.stack(
        [lengths * b + (table >> b[:, None]).sum(1) for b in candidates.T],
        axis=1,
    )
    parameters = np.take_along_axis(candidates, costs.argmin(1)[:, None], 1)[:, 0]

    quotients = (table >> parameters[:, None]).reshape(-1)[:count]
    ends = np.cumsum(quotients + 1) - 1
    unary = np.zeros(int(ends[-1]) + 1, np.uint8)
    unary[ends] = 1
    parts = [np.zeros(1, np.uint8), parameters.astype(np.uint8)]
    by_gap = np.repeat(parameters, lengths) if blocks > 1 else None
    for b in np.flatnonzero(np.bincount(parameters)):
        chosen = gaps if by_gap is None else gaps[by_gap == b]
        parts.append(pack_fixed(chosen & ((1 << int(b)) - 1), int(b)))
    parts.append(np.packbits(unary, bitorder="little"))
    return np.concatenate(parts)


def _decode_rice(data: Bytes, count: int, n: int) -> Numbers:
    blocks = _blocks(count)
    parameters = data[:blocks]
    if parameters.size < blocks or parameters.max() > 62:
        raise PayloadError("the Rice parameters of the indices are cut off or above 62")
    lengths = np.full(blocks, BLOCK)
    lengths[-1] = count - BLOCK * (blocks - 1)
    position = blocks
    gaps = np.empty(count, np.int64)
    by_gap = np.repeat(parameters, lengths)
    for b in map(int, np.flatnonzero(np.bincount(parameters))):
        numbers = int(lengths[parameters == b].sum())
        size = -(-numbers * b // 8)
        if position + size > data.size:
            raise PayloadError("the remainders of the indices are cut off")
        gaps[by_gap == b] = unpack_fixed(data[position : position + size], b, numbers)
        position += size
    unary = data[position:]
    # The sum of the quotients is less than n, so a longer section cannot be valid.
    if unary.size > (count + n + 7) // 8:
        raise PayloadError(f"{unary.size} bytes of unary quotients are too many for {n} elements")
    ends = np.flatnonzero(np.unpackbits(unary, bitorder="little"))
    if ends.size != count or (int(ends[-1]) + 8) // 8 != unary.size:
        raise PayloadError(f"the indices hold {ends.size} quotients, expected {count}")
    quotients = np.diff(ends, prepend=-1) - 1
    # Python's integers bound the largest gap before a shift could overflow 64 bits.
    if (int(quotients.max()) << int(parameters.max())) >= 1 << 62:
        raise PayloadError(f"the indices point past the tensor's {n} elements")
    gaps += quotients << by_gap
    if int(gaps.max()) >= n:
        raise PayloadError(f"the indices point past the tensor's {n} elements")
    positions = np.cumsum(gaps + 1) - 1
    if int(positions[-1]) >= n:
        raise PayloadError(f"the indices point past the tensor's {n} elements")
    return positions


def _decode_fixed(data: Tensor, count: int, n: int) -> Tensor:
    width = (n - 1).bit_length()
    if data.numel() != -(-count * width // 8):
        raise PayloadError(
            f"{data.numel()} bytes of fixed-width indices, expected {-(-count * width // 8)}"
        )
    if data.device.type == "cpu":
        positions = torch.from_numpy(unpack_fixed(data.numpy(), width, count))
    else:
        positions = unpack_fixed_on_device(data, width, count)
    if not bool(((positions[1:] > positions[:-1]).all() & (positions[-1] < n)).item()):
        raise PayloadError(f"the indices do not ascend below the tensor's {n} elements")
    return positions


def _size_enumerated(n: int, count: int) -> int:
    return ((math.comb(n, count) - 1).bit_length() + 7) // 8


def _encode_enumerated(positions: list[int], n: int) -> Bytes:
    number = sum(math.comb(position, i) for i, position in enumerate(positions, start=1))
    data = bytes([ENUMERATED]) + number.to_bytes(_size_enumerated(n, len(positions)), "little")
    return np.frombuffer(bytearray(data), np.uint8)


def _decode_enumerated(data: bytes, count: int, n: int) -> list[int]:
    if len(data) != _size_enumerated(n, count):
        raise PayloadError(
            f"{len(data)} bytes of enumerated indices, expected {_size_enumerated(n, count)}"
        )
    number = int.from_bytes(data, "little")
    if number >= math.comb(n, count):
        raise PayloadError(f"the indices point past the tensor's {n} elements")
    positions = []
    for i in range(count, 0, -1):
        position, below = _largest_below(number, i)
        positions.append(position)
        number -= below
    return positions[::-1]


def _largest_below(number: int, i: int) -> tuple[int, int]:
    """Return the largest p with C(p, i) <= `number`, and C(p, i)."""
    if number == 0:
        return i - 1, 0
    # C(p, i) is about m^i / i! for m in the middle of the i factors; the last term corrects for
    # their spread. At most a few exact steps remain.
    middle = math.exp((math.log(number) + math.lgamma(i + 1)) / i)
    position = max(i, int(middle + (i - 1) / 2 + (i * i - 1) / (24 * middle)))
    value = math.comb(position, i)
    while value > number:
        value = value * (position - i) // position
        position -= 1
    while (following := value * (position + 1) // (position + 1 - i)) <= number:
        value = following
        position += 1
    return position, value
