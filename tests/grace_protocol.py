"""Small compressors, memories and a communicator that keep to GRACE's protocol.

They take the place of a checkout of GRACE where there is none. Every property of GRACE's own that
the adapter deals with is in one of them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Base:
    def __init__(self, average: bool = True, tensors_size_are_same: bool = True) -> None:
        self.average = average
        self.tensors_size_are_same = tensors_size_are_same

    def aggregate(self, tensors: Any) -> Tensor:
        return sum(tensors)


class LargestK(Base):
    """A compressor that sends values and int64 indices."""

    def __init__(self, ratio):
        super().__init__()
        self.ratio = ratio

    def compress(self, tensor, name):
        flat = tensor.reshape(-1)
        chosen = flat.abs().topk(max(1, int(self.ratio * flat.numel()))).indices
        return (flat[chosen], chosen), (flat.numel(), tensor.shape)

    def decompress(self, tensors, ctx):
        values, indices = tensors
        return torch.zeros(ctx[0], dtype=values.dtype).scatter_(0, indices, values).view(ctx[1])


class Above(Base):
    """A compressor that sends all values above a bound, so that sizes differ."""

    def __init__(self, bound=0.5):
        super().__init__(tensors_size_are_same=False)
        self.bound = bound

    def compress(self, tensor, name):
        flat = tensor.reshape(-1)
        mask = flat.abs() > self.bound
        # Unused by decompress, and different for each tensor, as DGC's.
        return [flat[mask], torch.where(mask)[0]], (tensor.shape, mask)

    def decompress(self, tensors, ctx):
        values, indices = tensors
        flat = torch.zeros(ctx[0].numel(), dtype=values.dtype)
        return flat.scatter_(0, indices, values).view(ctx[0])


class Counted(Base):
    """A compressor that draws indices from a count of its calls, and does not send them."""

    def __init__(self, ratio):
        super().__init__()
        self.ratio = ratio
        self.calls = 0

    def compress(self, tensor, name):
        torch.manual_seed(self.calls)
        self.calls += 1
        flat = tensor.reshape(-1)
        chosen = torch.randperm(flat.numel())[: max(1, int(self.ratio * flat.numel()))]
        return [flat[chosen]], (chosen, tensor.shape)

    def decompress(self, tensors, ctx):
        [values] = tensors
        return (
            torch.zeros(ctx[1].numel(), dtype=values.dtype).scatter_(0, ctx[0], values).view(ctx[1])
        )


class MomentumSigns(Base):
    """A compressor with a momentum for each name and a vote, which sends signs and a 0-d scale."""

    def __init__(self, momentum=0.9):
        super().__init__(average=False)
        self.momentum = momentum
        self.momentums = {}

    def compress(self, tensor, name):
        flat = tensor.reshape(-1)
        if name in self.momentums:
            flat = (1 - self.momentum) * flat + self.momentum * self.momentums[name]
        self.momentums[name] = flat
        return [(flat >= 0).to(torch.uint8), flat.abs().mean()], tensor.shape

    def decompress(self, tensors, ctx):
        signs, scale = tensors
        return ((signs.float() * 2 - 1) * scale).view(ctx)

    def aggregate(self, tensors):
        return (sum(tensors) >= 0) * 2.0 - 1.0


class Rounded(Base):
    """A compressor that rounds at random, with torch's global generator."""

    def compress(self, tensor, name):
        noise = torch.empty_like(tensor).uniform_()
        return [(tensor * 8 + noise).floor().clamp(-127, 127).to(torch.int8)], None

    def decompress(self, tensors, ctx):
        return tensors[0].float() / 8


class NoMemory:
    def compensate(self, tensor, name):
        return tensor

    def update(self, tensor, name, compressor, compressed, ctx):
        pass


class Residual(NoMemory):
    """A memory that decompresses its own payload, as GRACE's memories do."""

    def __init__(self):
        self.residuals = {}

    def compensate(self, tensor, name):
        return tensor + self.residuals[name] if name in self.residuals else tensor

    def update(self, tensor, name, compressor, compressed, ctx):
        self.residuals[name] = tensor - compressor.decompress(compressed, ctx)


class Communicator:
    """A communicator that calls its compressor as GRACE's do, and moves nothing."""

    def __init__(self, compressor):
        self.compressor = compressor
        self.memory = NoMemory()

    def step(self, tensor, name):
        tensor = self.memory.compensate(tensor, name)
        tensors, ctx = self.compressor.compress(tensor, name)
        self.memory.update(tensor, name, self.compressor, tensors, ctx)
        return tensors, ctx


def gather_round(ranks, grads, name):
    """Return each rank's average: all compress, and decode all payloads with their own context."""
    sent = []
    for (compressor, memory), grad in zip(ranks, grads, strict=True):
        tensor = memory.compensate(grad, name)
        tensors, ctx = compressor.compress(tensor, name)
        memory.update(tensor, name, compressor, tensors, ctx)
        sent.append((tensors, ctx))
    averages = []
    for (compressor, _), (_, ctx) in zip(ranks, sent, strict=True):
        decoded = [compressor.decompress(tensors, ctx) for tensors, _ in sent]
        mean = compressor.aggregate(decoded)
        averages.append(mean / len(ranks) if compressor.average else mean)
    return averages
