"""Models: linear, fully connected, convolutional and residual ones, and a transformer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["IMAGE_MODELS", "Linear16", "Transformer", "build", "parameters"]

IMAGE_MODELS = ("linear", "fcn", "small-cnn", "cnn", "resnet18")


class Linear16(nn.Linear):
    """A linear layer that multiplies in bfloat16, as language models are trained."""

    def forward(self, x: Tensor) -> Tensor:
        product = nn.functional.linear(x.bfloat16(), self.weight.bfloat16())
        return product.float() + self.bias


class Block(nn.Module):
    """Causal self-attention and a hidden layer, each after a layer norm (arXiv 2002.04745)."""

    def __init__(self, width: int, heads: int, linear: type[nn.Linear] = nn.Linear) -> None:
        super().__init__()
        self.heads = heads
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attend = linear(width, 3 * width)
        self.project = linear(width, width)
        self.hidden = linear(width, 4 * width)
        self.out = linear(4 * width, width)

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
    """Predicts the next character of sequences (B, T; int64): logits (B, T, classes)."""

    def __init__(
        self,
        length: int,
        classes: int,
        width: int = 64,
        heads: int = 4,
        blocks: int = 2,
        linear: type[nn.Linear] = nn.Linear,
    ) -> None:
        super().__init__()
        self.characters = nn.Embedding(classes, width)
        self.positions = nn.Parameter(0.02 * torch.randn(length, width))
        self.blocks = nn.Sequential(*(Block(width, heads, linear) for _ in range(blocks)))
        self.norm = nn.LayerNorm(width)
        self.head = linear(width, classes)

    def forward(self, sequences: Tensor) -> Tensor:
        logits: Tensor = self.head(
            self.norm(self.blocks(self.characters(sequences) + self.positions))
        )
        return logits


def norm(width: int) -> nn.GroupNorm:
    """Return a normalisation with the statistics of one image.

    The statistics of a batch, as in ResNet, do not average over workers (arXiv 1910.00189).
    """
    return nn.GroupNorm(32, width)


class Residual(nn.Module):
    """Two 3x3 convolutions with a shortcut around them (arXiv 1512.03385, figure 2)."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, padding=1, bias=False)
        self.norm1 = norm(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = norm(width)
        self.shortcut = nn.Sequential()
        if stride > 1 or inputs != width:
            carried = nn.Conv2d(inputs, width, 1, stride, bias=False)
            self.shortcut = nn.Sequential(carried, norm(width))

    def forward(self, x: Tensor) -> Tensor:
        hidden = nn.functional.relu(self.norm1(self.conv1(x)))
        return nn.functional.relu(self.norm2(self.conv2(hidden)) + self.shortcut(x))


class ResNet18(nn.Module):
    """ResNet-18 (arXiv 1512.03385) for small images: a 3x3 convolution and no pooling first."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 64, 3, padding=1, bias=False)
        self.norm1 = norm(64)
        self.layer1 = nn.Sequential(Residual(64, 64, 1), Residual(64, 64, 1))
        self.layer2 = nn.Sequential(Residual(64, 128, 2), Residual(128, 128, 1))
        self.layer3 = nn.Sequential(Residual(128, 256, 2), Residual(256, 256, 1))
        self.layer4 = nn.Sequential(Residual(256, 512, 2), Residual(512, 512, 1))
        self.fc = nn.Linear(512, classes)

    def forward(self, images: Tensor) -> Tensor:
        hidden = nn.functional.relu(self.norm1(self.conv1(images)))
        hidden = self.layer4(self.layer3(self.layer2(self.layer1(hidden))))
        logits: Tensor = self.fc(hidden.mean((2, 3)))
        return logits


def build(name: str, image: tuple[int, ...], classes: int, seed: int) -> nn.Module:
    """Return a model for images of shape (1, H, W), initialised by torch's defaults from `seed`.

    For the transformer, `image` is the length of a sequence, (T,). The global random state does not
    change.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if name == "transformer":
            return Transformer(*image, classes)
        channels, height, width = image
        inputs = channels * height * width
        if name == "resnet18":
            return ResNet18(channels, classes)
        if name == "linear":
            return nn.Sequential(nn.Flatten(), nn.Linear(inputs, classes))
        if name == "fcn":
            return nn.Sequential(
                nn.Flatten(), nn.Linear(inputs, 128), nn.ReLU(), nn.Linear(128, classes)
            )
        # Two 5x5 convolutions, each with a maximum over 2x2, and a hidden layer. Small images (8x8)
        # are padded, so that the size halves twice.
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
    """Return copies of a model's parameters that are trained, by name."""
    return {
        name: parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
