"""A checksum of a model that tolerates rounding: sums of its elements with random signs.

The difference of two models' sums has, over the draw of the signs, the squared distance of the
models as its mean square. The signs are the product of one for each block of 4,096 elements and one
for each place in a block, both from SHAKE128.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

__all__ = ["CHECKSUM_SIZE", "Checksum"]

BLOCK = 4096
# The number of blocks that are taken at one time, which bounds the memory.
BLOCKS = 256
SUMS = struct.Struct("<2d")
CHECKSUM_SIZE = SUMS.size
# The largest distance of two models that count as equal, as a share of the norm. Another processor
# rounds float32 otherwise by 1e-7 a message. Where w is rounded to float16, an element in some
# thousands is then rounded the other way, by 5e-4.
TOLERANCE = {"float32": 1e-4, "float16": 1e-3, "int8": 1e-3}


class Checksum(NamedTuple):
    """The sums of a model, and its norm."""

    sums: bytes
    """Two float64 numbers, the lowest byte first."""
    norm: float
    """The square root of the sum of all squares."""

    @staticmethod
    def of(model: Mapping[str, Tensor]) -> Checksum:
        """Return the checksum of tensors by name; elements that are inf or nan count as 0."""
        counts = [math.ceil(tensor.numel() / BLOCK) for tensor in model.values()]
        of_blocks, of_places = _signs("blocks", sum(counts)), _signs("places", BLOCK)
        sums, squares, position = torch.zeros(2, dtype=torch.float64), 0.0, 0
        for name in sorted(model):
            for part in torch.split(model[name].reshape(-1), BLOCK * BLOCKS):
                values = part.double().nan_to_num(0.0, 0.0, 0.0)
                squares += float(values.square().sum())
                values = torch.nn.functional.pad(values, (0, -len(values) % BLOCK)).view(-1, BLOCK)
                signs = of_blocks[:, position : position + len(values)]
                sums += (signs * (of_places @ values.T)).sum(1)
                position += len(values)
        return Checksum(SUMS.pack(*sums.tolist()), math.sqrt(squares))

    def agrees(self, sums: bytes, first: str) -> bool:
        """Return whether the sums of another model are those of this one, within rounding."""
        limit = TOLERANCE[first] * self.norm
        pairs = zip(SUMS.unpack(self.sums), SUMS.unpack(sums), strict=True)
        return all(abs(mine - other) <= limit for mine, other in pairs)


def _signs(what: str, count: int) -> Tensor:
    """Return two rows of random signs, the same everywhere."""
    rows = []
    for seed in (1, 2):
        data = hashlib.shake_128(f"{what} {seed}".encode()).digest(math.ceil(count / 8))
        bits = np.unpackbits(np.frombuffer(data, dtype=np.uint8), count=count)
        rows.append(torch.from_numpy(bits).double() * 2 - 1)
    return torch.stack(rows)
