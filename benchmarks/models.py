"""The models: one linear layer, one hidden layer, and the LBGM paper's convolutional network."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["MODELS", "build", "parameters"]

MODELS = ("linear", "fcn", "cnn")


def build(name: str, image: tuple[int, ...], classes: int, seed: int) -> nn.Module:
    """Build a model for images of shape (1, H, W), initialised by torch's defaults from `seed`.

    The global random state is as it was afterwards.
    """
    channels, height, width = image
    inputs = channels * height * width
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if name == "linear":
            return nn.Sequential(nn.Flatten(), nn.Linear(inputs, classes))
        if name == "fcn":
            return nn.Sequential(
                nn.Flatten(), nn.Linear(inputs, 128), nn.ReLU(), nn.Linear(128, classes)
            )
        # Two 5x5 convolutions of 20 and 50 channels and 500 hidden units. Images that are too
        # small for two unpadded ones (8x8) are padded, so that the size halves twice.
        padding = 0 if min(height, width) >= 16 else 2
        sides = [((side - 4 + 2 * padding) // 2 - 4 + 2 * padding) // 2 for side in (height, width)]
        return nn.Sequential(
            nn.Conv2d(channels, 20, 5, padding=padding),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(20, 50, 5, padding=padding),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(50 * sides[0] * sides[1], 500),
            nn.ReLU(),
            nn.Linear(500, classes),
        )


def parameters(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of a model's parameters by name."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
