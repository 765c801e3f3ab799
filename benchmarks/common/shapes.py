"""Names and shapes of the parameters of known models."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["gpt2_shapes", "random_gradients", "resnet50_shapes", "transformer_shapes"]


def resnet50_shapes() -> dict[str, tuple[int, ...]]:
    """Return the 161 shapes of ResNet-50 (He et al., arXiv 1512.03385, table 1) by name."""
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


def transformer_shapes(
    layers: int = 24, width: int = 2048, vocabulary: int = 50257, length: int = 2048
) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a decoder by name, by default of one with 1.3 billion parameters.

    The default sizes are those of GPT-3 XL (arXiv 2005.14165, table 2.1). The embedding is shared
    with the output layer.
    """
    shapes: dict[str, tuple[int, ...]] = {
        "embedding": (vocabulary, width),
        "positions": (length, width),
    }
    sides = {"attend": (3, 1), "project": (1, 1), "hidden": (4, 1), "out": (1, 4)}
    for layer in range(layers):
        for name, (out, into) in sides.items():
            shapes[f"{layer}.{name}.weight"] = (out * width, into * width)
            shapes[f"{layer}.{name}.bias"] = (out * width,)
        for norm in ("before", "between"):
            shapes[f"{layer}.{norm}.weight"] = (width,)
            shapes[f"{layer}.{norm}.bias"] = (width,)
    shapes["norm.weight"], shapes["norm.bias"] = (width,), (width,)
    return shapes


def gpt2_shapes() -> dict[str, tuple[int, ...]]:
    """Return the 148 shapes of GPT-2 small (Radford et al., 2019, table 2) by name."""
    return transformer_shapes(layers=12, width=768, vocabulary=50257, length=1024)


def random_gradients(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, Tensor]:
    """Return normally distributed float32 tensors of these shapes."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
