"""The model, the data, and the training."""

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

TEST_IMAGES = 360
CLASSES = 10


def build_model(hidden: int, seed: int = 0) -> nn.Module:
    """Return a network with one hidden layer."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, hidden), nn.ReLU(), nn.Linear(hidden, CLASSES))


def load_images(train: bool) -> tuple[Tensor, Tensor]:
    """Return the images (N, 64) and labels (N) to train or to test with."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    chosen = order[TEST_IMAGES:] if train else order[:TEST_IMAGES]
    return torch.tensor(images[chosen] / 16, dtype=torch.float32), torch.tensor(labels[chosen])


def load_partition(number: int, clients: int, classes: int) -> tuple[Tensor, Tensor]:
    """Return the images (N, 64) and labels (N) of a client, which has some of the classes."""
    images, labels = load_images(train=True)
    chosen = []
    for digit in range(CLASSES):
        owners = [k for k in range(clients) if (digit - k) % CLASSES < classes] or [digit % clients]
        if number in owners:
            of_digit = (labels == digit).nonzero().flatten()
            chosen.append(of_digit[owners.index(number) :: len(owners)])
    rows = torch.cat(chosen) if chosen else torch.arange(number % 10, len(labels), 10)
    return images[rows], labels[rows]


def train(model: nn.Module, images: Tensor, labels: Tensor, steps: int, lr: float) -> float:
    """Take a few full-batch steps, and return the last loss."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
    return loss.item()


@torch.no_grad()
def evaluate(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[float, float]:
    """Return the loss and the accuracy."""
    logits = model(images)
    loss = nn.functional.cross_entropy(logits, labels).item()
    return loss, (logits.argmax(1) == labels).float().mean().item()
