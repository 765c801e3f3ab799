"""Images to learn from where Fashion-MNIST is not: made up, in its files' format."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np

__all__ = ["write_idx"]


def write_idx(folder: Path, train: int, test: int) -> None:
    """Write a folder of IDX files: noise, with a bright square whose place is the class."""
    rng = np.random.default_rng(0)
    for part, count in (("train", train), ("t10k", test)):
        labels = rng.integers(0, 10, count, dtype=np.uint8)
        pixels = rng.integers(0, 60, (count, 28, 28), dtype=np.uint8)
        for image, label in zip(pixels, labels, strict=True):
            row, column = divmod(int(label), 4)
            image[8 * row : 8 * row + 6, 7 * column : 7 * column + 6] = 250
        header = struct.pack(">iiii", 2051, count, 28, 28)
        (folder / f"{part}-images-idx3-ubyte").write_bytes(header + pixels.tobytes())
        header = struct.pack(">ii", 2049, count)
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(header + labels.tobytes())
