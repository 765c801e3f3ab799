"""Coding of floating-point values in a chosen precision.

A section of values contains neither the number of values nor their dtype or precision. It is, in
this order::

    size          present                  meaning
    2             if scaled                e, int16: the values are multiplied by 2**e at the end
    4 * B         precision int8 or less   float32 scale of each of the B = ceil(count / 256) blocks
    ceil(s * count / 8)  always            the values, s bits each, the first in the lowest bits
                                           (float32 32, float16 and bfloat16 16, int8 8, int4 4,
                                           int2 2, sign 1; float64 64)

The precision in use is the narrower of the requested one and the tensor's own dtype. A dtype that
is no wider than the requested precision is sent bit for bit. A section is *scaled* if the precision
in use has a smaller range than the dtype: `e` is chosen so that the largest magnitude is just below
the top of the range, so that nothing overflows and small gradients do not underflow.

In a block with scale c an integer q represents q * c, computed in float64 and then rounded to the
tensor's dtype:

- int8: q is two's complement, the largest magnitude of a block is 127;
- int4: q + 8 is sent, the largest magnitude of a block is 7;
- int2: one of 0 to 3 is sent, for q of -1.5, -0.5, 0.5 and 1.5. A sender takes for c the block's
  root mean square, at which normally distributed values lose 12 % of their energy (Max, "Quantizing
  for minimum distortion", IRE Transactions on Information Theory 6 (1960), table II), or 2/3 of the
  mean magnitude, at which the largest 1 in 64 of them lose 1.2 % instead of 18 %, whichever loses
  less;
- sign: 1 is sent for q = 1 and 0 for q = -1, and c is the block's mean magnitude (sparse ternary
  compression, arXiv 1903.02891).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lbgm_compress.wire.errors import PayloadError

__all__ = [
    "PRECISIONS",
    "as_bytes",
    "decode_rows",
    "decode_values",
    "encode_rows",
    "encode_values",
    "from_bytes",
    "precision_of",
    "values_size",
]


class Precision(NamedTuple):
    """The format of a value."""

    bits: int
    dtype: torch.dtype | None
    """The floating-point dtype; None for an integer with the scale of its block."""


PRECISIONS = {
    "float64": Precision(64, torch.float64),
    "float32": Precision(32, torch.float32),
    "float16": Precision(16, torch.float16),
    "bfloat16": Precision(16, torch.bfloat16),
    "int8": Precision(8, None),
    "int4": Precision(4, None),
    "int2": Precision(2, None),
    "sign": Precision(1, None),
}
BLOCK = 256
# Magnitudes of a scaled section lie below 2**TOP.
TOP = {torch.float32: 100, torch.bfloat16: 100, torch.float16: 15, None: 20}
LARGEST = {8: 127, 4: 7}
# A scale below this, times an integer, is within the range of float32.
LARGE = 1e36


def as_bytes(tensor: Tensor) -> Tensor:
    """Return the elements of a contiguous tensor as a flat uint8 tensor that shares its memory."""
    # An empty tensor may have strides that do not allow a view.
    flat = tensor.reshape(-1) if tensor.numel() else tensor.new_empty(0)
    return flat.view(torch.uint8)


def from_bytes(data: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the elements of `dtype` in flat uint8 `data`: a view where alignment allows it."""
    if data.data_ptr() % dtype.itemsize or data.storage_offset() % dtype.itemsize:
        data = data.clone()
    return data.view(dtype)


def precision_of(precision: str, dtype: torch.dtype) -> str:
    """Return the narrower of a precision and that of a tensor's dtype."""
    own = str(dtype).removeprefix("torch.")
    return own if PRECISIONS[own].bits <= PRECISIONS[precision].bits else precision


def _in_use(precision: str, dtype: torch.dtype) -> tuple[Precision, bool]:
    """Return the format of values, and whether an exponent is sent with them."""
    wire = PRECISIONS[precision]
    if wire.bits >= 8 * dtype.itemsize:
        return Precision(8 * dtype.itemsize, dtype), False
    if wire.dtype is None:
        return wire, dtype == torch.float64
    return wire, torch.finfo(wire.dtype).max < torch.finfo(dtype).max


def values_size(count: int, precision: str, dtype: torch.dtype) -> int:
    """Return the size in bytes of a section of `count` values of a tensor of `dtype`."""
    wire, scaled = _in_use(precision, dtype)
    scales = 4 * -(-count // BLOCK) if wire.dtype is None else 0
    return 2 * scaled + scales + -(-count * wire.bits // 8)


def encode_values(values: Tensor, precision: str) -> tuple[Tensor, Tensor]:
    """Return the section (uint8) of flat, finite `values`, and the values that it decodes to.

    Both are computed on the device of `values`, without synchronisation.
    """
    sections, decoded = encode_rows(values[None], precision)
    return sections[0], decoded[0]


def decode_values(section: Tensor, count: int, precision: str, dtype: torch.dtype) -> Tensor:
    """Return the `count` values of `dtype` in a section (flat uint8).

    Raises
    ------
    PayloadError
        If the section has another size, or a value that is not finite.
    """
    if section.numel() != values_size(count, precision, dtype):
        raise PayloadError(
            f"{section.numel()} bytes of values, "
            f"expected {values_size(count, precision, dtype)} for {count} values in {precision}"
        )
    return decode_rows(section[None], count, precision, dtype)[0]


def encode_rows(values: Tensor, precision: str) -> tuple[Tensor, Tensor]:
    """Return a section for each row of finite `values` (k x count), and the decoded values.

    The sections are k x size, uint8; the decoded values k x count.
    """
    dtype, (rows, count) = values.dtype, values.shape
    wire, scaled = _in_use(precision, dtype)
    if wire.dtype == dtype:
        sections = as_bytes(values.contiguous()).clone().view(rows, count * dtype.itemsize)
        return sections, from_bytes(sections.view(-1), dtype).view(rows, count)
    parts = []
    if scaled:
        top = values.abs().amax(1) if count else values.new_zeros(rows)
        exponent = torch.frexp(top.double()).exponent.to(torch.int64) - TOP[wire.dtype]
        exponent = exponent.clamp(-1000, 1020)
        values = values.double() * torch.exp2(-exponent.double())[:, None]
        parts.append(exponent.to(torch.int16).view(rows, 1).view(torch.uint8))
    if wire.dtype is None:
        scales, integers = _integers(values.float(), wire.bits)
        parts += [scales.view(torch.uint8), integers]
    else:
        parts.append(as_bytes(values.to(wire.dtype)).view(rows, count * wire.dtype.itemsize))
    sections = torch.cat(parts, 1)
    return sections, _decode(sections, count, wire, scaled, dtype)


def decode_rows(sections: Tensor, count: int, precision: str, dtype: torch.dtype) -> Tensor:
    """Return the values (k x count) of sections of the right size (k x size).

    Raises
    ------
    PayloadError
        If a value is not finite.
    """
    wire, scaled = _in_use(precision, dtype)
    values = _decode(sections, count, wire, scaled, dtype)
    if not bool(values.isfinite().all()):
        raise PayloadError("the payload holds a value that is not finite")
    return values


def _integers(values: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Return the scales (k x blocks) and the packed integers (k x bytes) of rows of float32."""
    rows, count = values.shape
    if count % BLOCK:
        values = torch.nn.functional.pad(values, (0, -count % BLOCK))
    table = values.reshape(rows, -(-count // BLOCK), BLOCK)
    if bits <= 2:
        # After division by the largest magnitude, squares neither overflow nor vanish.
        top = table.abs().amax(2, keepdim=True)
        unit = (table / top).nan_to_num_(0.0)
        lengths = torch.full((table.shape[1],), BLOCK, device=values.device)
        lengths[-1:] -= -count % BLOCK
        if bits == 2:
            scales = _scales_of_two_bits(unit, lengths) * top
            integers = (table / scales).nan_to_num_(0.0).floor_().clamp_(-2, 1).add_(2)
        else:
            scales = (unit.abs().sum(2) / lengths)[:, :, None] * top
            integers = (table >= 0).float()
    else:
        scales = table.abs().amax(2, keepdim=True) / LARGEST[bits]
        integers = (table / scales).nan_to_num_(0.0).round_()
        integers = integers.clamp_(-LARGEST[bits], LARGEST[bits])
    flat = integers.view(rows, -1)[:, :count]
    scales = scales.view(rows, -1)
    if bits == 8:
        return scales, flat.to(torch.int8).view(torch.uint8)
    numbers = (flat + 8 if bits == 4 else flat).to(torch.uint8)
    each = 8 // bits
    numbers = torch.nn.functional.pad(numbers, (0, -count % each)).view(rows, -1, each)
    packed = numbers[..., 0].clone()
    for i in range(1, each):
        packed |= numbers[..., i] << (bits * i)
    return scales, packed


def _scales_of_two_bits(table: Tensor, lengths: Tensor) -> Tensor:
    """Return the scales (k x blocks x 1) of blocks (k x blocks x 256) of which `lengths` are used.

    One of two, that which loses less: the root mean square for values around zero, and for values
    far from it, as the largest of many are, that which sends their mean magnitude as 1.5.
    """
    used = torch.arange(BLOCK, device=table.device) < lengths[:, None]
    around = (table.square().sum(2) / lengths).sqrt_()[:, :, None]
    far = (table.abs().sum(2) / lengths)[:, :, None] / 1.5

    def lost(scales: Tensor) -> Tensor:
        levels = (table / scales).nan_to_num_(0.0).floor_().clamp_(-2, 1).add_(0.5)
        return (table - levels * scales).square_().mul_(used).sum(2, keepdim=True)

    return torch.where(lost(far) < lost(around), far, around)


def _decode(
    sections: Tensor, count: int, wire: Precision, scaled: bool, dtype: torch.dtype
) -> Tensor:
    rows = len(sections)
    if wire.dtype == dtype:
        return from_bytes(sections.reshape(-1), dtype).view(rows, count)
    exponent = None
    if scaled:
        exponent = from_bytes(sections[:, :2].reshape(-1), torch.int16)[:, None].double()
    sections = sections[:, 2 * scaled :]
    if wire.dtype is None:
        blocks = -(-count // BLOCK)
        scales = from_bytes(sections[:, : 4 * blocks].reshape(-1), torch.float32).view(rows, blocks)
        integers = _unpacked(sections[:, 4 * blocks :], count, wire.bits)
        # The product of an integer and a scale is exact in float64, so float32 rounds it to the
        # same number unless it overflows. The check is cheaper than float64 on the CPU alone.
        exact = dtype == torch.float32 and not scaled and scales.device.type == "cpu"
        if exact and bool((scales.abs() < LARGE).all()):
            return _times(integers, scales)
        values = _times(integers.double(), scales.double())
    else:
        values = from_bytes(sections.reshape(-1), wire.dtype).view(rows, count)
    finite = values.isfinite()
    if exponent is not None:
        values = values.double() * torch.exp2(exponent)
    # Rounding up at the edge of a dtype's range must not turn a finite value into inf.
    if exponent is not None or dtype.itemsize < values.dtype.itemsize:
        limit = torch.finfo(dtype).max
        values = torch.where(finite, values.clamp(-limit, limit), values)
    return values.to(dtype)


def _times(integers: Tensor, scales: Tensor) -> Tensor:
    """Multiply rows of integers (k x count) by the scales of their blocks (k x blocks)."""
    rows, count = integers.shape
    if scales.shape[1] <= 1:
        return integers * scales if count else integers
    if count % BLOCK:
        integers = torch.nn.functional.pad(integers, (0, -count % BLOCK))
    table = integers.view(rows, scales.shape[1], BLOCK) * scales[:, :, None]
    return table.view(rows, scales.shape[1] * BLOCK)[:, :count]


def _unpacked(packed: Tensor, count: int, bits: int) -> Tensor:
    """Return the integers (k x count; float32) of packed bytes (k x bytes)."""
    if bits == 8:
        return packed.contiguous().view(torch.int8).float()
    table = TABLES[bits].to(packed.device)
    return table[packed.long()].view(len(packed), packed.shape[1] * 8 // bits)[:, :count]


def _table(bits: int, offset: float) -> Tensor:
    """Return the integers in each byte (256 x 8 / bits; float32)."""
    octets = torch.arange(256)[:, None]
    return (octets >> torch.arange(0, 8, bits) & ((1 << bits) - 1)).float() - offset


TABLES = {4: _table(4, 8), 2: _table(2, 1.5), 1: 2 * _table(1, 0.5)}
