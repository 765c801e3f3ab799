"""The tensors of ResNet-50: names and shapes, as in torchvision, without needing it."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["resnet50_shapes", "random_gradients"]


def resnet50_shapes() -> dict[str, tuple[int, ...]]:
    """Return the 161 parameters of ResNet-50 (He et al., arXiv 1512.03385, table 1) by name."""
    shapes: dict[str, tuple[int, ...]] = {}

    def convolution(name: str, out: int, into: int, kernel: int) -> None:
        shapes[f"{name}.weight"] = (out, into, kernel, kernel)

    def norm(name: str, channels: int) -> None:
        shapes[f"{name}.weight"] = (channels,)
        shapes[f"{name}.bias"] = (channels,)

    convolution("conv1", 64, 3, 7)
    norm("bn1", 64)
    into = 64
    for stage, (blocks, width) in enumerate(((3, 64), (4, 128), (6, 256), (3, 512)), start=1):
        for block in range(blocks):
            prefix = f"layer{stage}.{block}"
            sides = ((width, into, 1), (width, width, 3), (4 * width, width, 1))
            for i, (out, channels, kernel) in enumerate(sides, start=1):
                convolution(f"{prefix}.conv{i}", out, channels, kernel)
                norm(f"{prefix}.bn{i}", out)
            if block == 0:
                convolution(f"{prefix}.downsample.0", 4 * width, into, 1)
                norm(f"{prefix}.downsample.1", 4 * width)
            into = 4 * width
    shapes["fc.weight"], shapes["fc.bias"] = (1000, 2048), (1000,)
    return shapes


def random_gradients(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, Tensor]:
    """Return normally distributed float32 tensors of these shapes."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
