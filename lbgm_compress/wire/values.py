"""Floating-point values in a chosen precision.

The number of values, their dtype and the precision are known from elsewhere. A section of values
is, in this order::

    size          present                  meaning
    2             if scaled                e, int16: the values are multiplied by 2**e at the end
    4 * B         precision int8           float32 scale of each of the B = ceil(count / 256) blocks
    count * s     always                   the values, s bytes each (float32 4, float16 and
                                           bfloat16 2, int8 1; float64 8)

The precision in use is the narrower of the asked one and the tensor's own dtype; a dtype that is
no wider than the asked precision is sent as it is, bit for bit. A section is *scaled* if the
precision in use has a smaller range than the dtype: then `e` brings the largest magnitude just
below the top of the range, so that nothing overflows and small gradients do not underflow. An
int8 value q of a block with scale c stands for q * c, computed in float64 and then rounded to the
tensor's dtype; the largest magnitude of a block is 127.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lbgm_compress.wire.errors import PayloadError

__all__ = ["PRECISIONS", "as_bytes", "decode_values", "encode_values", "from_bytes", "values_size"]

PRECISIONS = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int8": torch.int8,
}
BLOCK = 256
# Magnitudes of a scaled section lie below 2**TOP.
TOP = {torch.float32: 100, torch.bfloat16: 100, torch.float16: 15, torch.int8: 20}


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


def _in_use(precision: str, dtype: torch.dtype) -> tuple[torch.dtype, bool]:
    """Return the dtype on the wire and whether an exponent goes with it."""
    wire = PRECISIONS[precision]
    if wire.itemsize >= dtype.itemsize:
        return dtype, False
    if wire == torch.int8:
        return wire, dtype == torch.float64
    return wire, torch.finfo(wire).max < torch.finfo(dtype).max


def values_size(count: int, precision: str, dtype: torch.dtype) -> int:
    """Return the size in bytes of a section of `count` values of a tensor of `dtype`."""
    wire, scaled = _in_use(precision, dtype)
    scales = 4 * -(-count // BLOCK) if wire == torch.int8 else 0
    return 2 * scaled + scales + count * wire.itemsize


def encode_values(values: Tensor, precision: str) -> tuple[Tensor, Tensor]:
    """Code flat, finite `values` and return the section (uint8) and what it decodes to.

    Both are computed on the device of `values`, without synchronisation.
    """
    dtype = values.dtype
    wire, scaled = _in_use(precision, dtype)
    if wire == dtype:
        section = as_bytes(values).clone()
        return section, from_bytes(section, dtype)
    parts = []
    if scaled:
        largest = values.abs().max().double() if values.numel() else values.new_zeros(()).double()
        exponent = torch.frexp(largest).exponent.to(torch.int64) - TOP[wire]
        exponent = exponent.clamp(-1000, 1020)
        values = values.double() * torch.exp2(-exponent.double())
        parts.append(as_bytes(exponent.to(torch.int16)))
    if wire == torch.int8:
        table = torch.nn.functional.pad(values.float(), (0, -values.numel() % BLOCK))
        table = table.view(-1, BLOCK)
        scales = table.abs().amax(1, keepdim=True) / 127
        quotients = (table / scales).nan_to_num_(0.0).round_().clamp_(-127, 127)
        parts += [as_bytes(scales), as_bytes(quotients.to(torch.int8))[: values.numel()]]
    else:
        parts.append(as_bytes(values.to(wire)))
    section = torch.cat(parts)
    return section, _decode(section, values.numel(), wire, scaled, dtype)


def decode_values(section: Tensor, count: int, precision: str, dtype: torch.dtype) -> Tensor:
    """Return the `count` values of `dtype` that a section (flat uint8) holds.

    Raises
    ------
    PayloadError
        If the section has another size, or holds a value that is not finite.
    """
    if section.numel() != values_size(count, precision, dtype):
        raise PayloadError(
            f"{section.numel()} bytes of values, "
            f"expected {values_size(count, precision, dtype)} for {count} values in {precision}"
        )
    wire, scaled = _in_use(precision, dtype)
    values = _decode(section, count, wire, scaled, dtype)
    if not bool(values.isfinite().all()):
        raise PayloadError("the payload holds a value that is not finite")
    return values


def _decode(
    section: Tensor, count: int, wire: torch.dtype, scaled: bool, dtype: torch.dtype
) -> Tensor:
    if wire == dtype:
        return from_bytes(section, dtype)
    exponent = from_bytes(section[:2], torch.int16)[0] if scaled else None
    section = section[2 * scaled :]
    if wire == torch.int8:
        blocks = -(-count // BLOCK)
        scales = from_bytes(section[: 4 * blocks], torch.float32)
        values = from_bytes(section[4 * blocks :], torch.int8).double()
        values = values * scales.double().repeat_interleave(BLOCK)[:count]
    else:
        values = from_bytes(section, wire)
    finite = values.isfinite()
    if exponent is not None:
        values = values.double() * torch.exp2(exponent.double())
    # Rounding up at the edge of a dtype's range must not turn a finite value into inf.
    if exponent is not None or dtype.itemsize < values.dtype.itemsize:
        limit = torch.finfo(dtype).max
        values = torch.where(finite, values.clamp(-limit, limit), values)
    return values.to(dtype)
