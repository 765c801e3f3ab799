"""The models: a linear layer, a hidden layer, two convolutional networks and a transformer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["IMAGE_MODELS", "build", "parameters"]

IMAGE_MODELS = ("linear", "fcn", "small-cnn", "cnn")


class Block(nn.Module):
    """Causal self-attention and a hidden layer, each behind a layer norm (arXiv 2002.04745)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attend = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        self.hidden = nn.Linear(width, 4 * width)
        self.out = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        count, length, width = x.shape
        parts = self.attend(self.before(x)).view(count, length, 3, self.heads, -1)
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        scores = query @ key.transpose(-1, -2) / (width / self.heads) ** 0.5
        future = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
        weights = scores.masked_fill(future, float("-inf")).softmax(-1)
        x = x + self.project((weights @ value).transpose(1, 2).reshape(x.shape))
        return x + self.out(nn.functional.gelu(self.hidden(self.between(x))))


class Transformer(nn.Module):
    """Says of each character of a sequence (B, T; int64) what follows: logits (B, T, classes)."""

    def __init__(self, length: int, classes: int, width: int = 64, heads: int = 4) -> None:
        super().__init__()
        self.characters = nn.Embedding(classes, width)
        self.positions = nn.Parameter(0.02 * torch.randn(length, width))
        self.blocks = nn.Sequential(Block(width, heads), Block(width, heads))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, sequences: Tensor) -> Tensor:
        logits: Tensor = self.head(
            self.norm(self.blocks(self.characters(sequences) + self.positions))
        )
        return logits


def build(name: str, image: tuple[int, ...], classes: int, seed: int) -> nn.Module:
    """Build a model for images of shape (1, H, W), initialised by torch's defaults from `seed`.

    For the transformer, `image` is the length of a sequence, (T,). The global random state is as it
    was afterwards.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if name == "transformer":
            return Transformer(*image, classes)
        channels, height, width = image
        inputs = channels * height * width
        if name == "linear":
            return nn.Sequential(nn.Flatten(), nn.Linear(inputs, classes))
        if name == "fcn":
            return nn.Sequential(
                nn.Flatten(), nn.Linear(inputs, 128), nn.ReLU(), nn.Linear(128, classes)
            )
        # Two 5x5 convolutions, each with a maximum over 2x2, and a hidden layer. Images that are
        # too small for two unpadded ones (8x8) are padded, so that the size halves twice.
        first, second, hidden = {"cnn": (20, 50, 500), "small-cnn": (10, 20, 64)}[name]
        padding = 0 if min(height, width) >= 16 else 2
        sides = [((side - 4 + 2 * padding) // 2 - 4 + 2 * padding) // 2 for side in (height, width)]
        return nn.Sequential(
            nn.Conv2d(channels, first, 5, padding=padding),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(first, second, 5, padding=padding),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(second * sides[0] * sides[1], hidden),
            nn.ReLU(),
            nn.Linear(hidden, classes),
        )


def parameters(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of a model's parameters by name."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
