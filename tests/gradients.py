"""Gradients for tests: those of a training run, and tensors of unusual shapes and values."""

from __future__ import annotations

import functools

import torch
from sklearn.datasets import load_digits
from torch import Tensor

Gradients = dict[str, Tensor]


@functools.cache
def training_run(rounds: int = 100, batch: int | None = None) -> list[Gradients]:
    """Return the gradients of a network (64-32-10) that is trained on scikit-learn's digits.

    A round is one step on all images, or on `batch` of them, with momentum 0.9.
    """
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)
    generator = torch.Generator().manual_seed(0)
    weights = {
        "hidden.weight": torch.randn(32, 64, generator=generator) / 8,
        "hidden.bias": torch.zeros(32),
        "output.weight": torch.randn(10, 32, generator=generator) / 6,
        "output.bias": torch.zeros(10),
    }
    momentum = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for weight in weights.values():
        weight.requires_grad_()
    history = []
    for _ in range(rounds):
        if batch is None:
            chosen = torch.arange(len(x))
        else:
            chosen = torch.randint(len(x), (batch,), generator=generator)
        hidden = torch.relu(x[chosen] @ weights["hidden.weight"].T + weights["hidden.bias"])
        logits = hidden @ weights["output.weight"].T + weights["output.bias"]
        loss = torch.nn.functional.cross_entropy(logits, y[chosen])
        grads = torch.autograd.grad(loss, list(weights.values()))
        history.append(dict(zip(weights, grads, strict=True)))
        with torch.no_grad():
            for (name, weight), grad in zip(weights.items(), grads, strict=True):
                momentum[name].mul_(0.9).add_(grad)
                weight -= 0.1 * momentum[name]
    return history


def awkward_shapes(dtype: torch.dtype, seed: int) -> Gradients:
    """Return tensors of every shape in the contract."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    return {
        "scalar": normal(),
        "empty": normal(0),
        "empty matrix": normal(3, 0),
        "one": normal(1),
        "vector": normal(300),
        "matrix": normal(40, 30),
        "transposed": normal(30, 40).T,
        "strided": normal(60, 8)[::3, ::2],
        "channels last": normal(4, 6, 5, 5).to(memory_format=torch.channels_last),
        "tall": normal(500, 3),
        "zeros": torch.zeros(20, 10, dtype=dtype),
        "signed zeros": torch.zeros(9, dtype=dtype) * -1,
        "wide range": normal(700) * torch.logspace(-4, 3, 700).to(dtype),
    }
