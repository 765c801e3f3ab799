"""A small model and its data, for tests of training in several processes."""

from __future__ import annotations

import torch
from torch import nn

from tests.laws import assert_same_bits

__all__ = ["Net", "assert_replicas_agree", "data", "parameters"]


class Net(nn.Module):
    """Ten layers, of which one is not always used."""

    def __init__(self, skip=False):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(9))
        self.out = nn.Linear(32, 4)
        self.skip = skip
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        for i, layer in enumerate(self.layers):
            if not (self.skip and i == 3 and self.calls % 3):
                x = torch.relu(layer(x))
        return self.out(x)


def data(rank, step, dtype=torch.float32, batch=16):
    generator = torch.Generator().manual_seed(1000 * step + rank)
    x = torch.randn(batch, 32, generator=generator)
    return x.to(dtype), (x[:, :4].argmax(1))


def parameters(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_replicas_agree(results):
    for other in results[1:]:
        assert_same_bits(other, results[0])
