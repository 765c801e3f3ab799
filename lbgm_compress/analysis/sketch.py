"""The count sketch: a random projection that adds every entry to one of a few bins.

Charikar, Chen and Farach-Colton, "Finding Frequent Items in Data Streams" (2002); as feature
hashing, arXiv 0902.2206.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

__all__ = ["count_sketch", "seed_of"]


def seed_of(seed: int, name: str) -> int:
    """Return the seed of one tensor: tensors must not share their random numbers."""
    text = f"{seed} {name}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=16).digest(), "little")


def count_sketch(
    pieces: Iterable[npt.NDArray[np.float64]], size: int, seed: int
) -> npt.NDArray[np.float64]:
    """Add every entry of a vector, with a random sign, to one of `size` random bins.

    Parameters
    ----------
    pieces
        The vector, in consecutive pieces. Every piece but the last has an even number of entries.
    size
        Number of bins.
    seed
        Seed of the signs and the bins; the same seed gives the same linear map.
    """
    # Raw bits are the same in all versions of numpy.
    generator = np.random.PCG64(seed)
    sums = np.zeros(2 * size)
    for piece in pieces:
        raw = generator.random_raw((len(piece) + 1) // 2).astype("<u8", copy=False)
        bits = raw.view("<u4")[: len(piece)]
        bins = (bits >> 1).astype(np.int64) * size >> 31
        # Entries with a negative sign have bins of their own, which are subtracted at the end.
        bins += (bits & 1).astype(np.int64) * size
        sums += np.bincount(bins, weights=piece, minlength=2 * size)
    return sums[:size] - sums[size:]
