"""Batches: tensors that are handled together.

A call of torch takes about a microsecond whatever the size of its tensors. For a model of thousands
of tensors of few elements, stacking those of one shape leaves a few calls for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

__all__ = ["batches", "by_batch", "copies", "is_small", "rows", "stack"]

Result = TypeVar("Result")

# Tensors of at most so many elements are stacked.
SMALL = 1024
# A stack has about so many elements at most, and stays in the processor's cache.
STACK = 1 << 16


def is_small(tensor: Tensor) -> bool:
    """Return whether a tensor is stacked with others: on the CPU, and of few elements."""
    return tensor.numel() <= SMALL and tensor.is_cpu


def batches(tensors: Sequence[Tensor]) -> list[list[int]]:
    """Return the positions of tensors that are best handled together, all of one device.

    On the CPU these are small tensors of one shape and dtype. A large tensor is by itself, as it is
    then still in the cache from one call to the next. On another device there is one batch, for one
    synchronisation.
    """
    if tensors and not tensors[0].is_cpu:
        return [list(range(len(tensors)))]
    together: dict[Any, list[int]] = {}
    alone = []
    for position, tensor in enumerate(tensors):
        if tensor.numel() <= SMALL:
            together.setdefault((tensor.shape, tensor.dtype), []).append(position)
        else:
            alone.append([position])
    found = []
    for (shape, _), positions in together.items():
        count = max(1, STACK // max(1, shape.numel()))
        found += [positions[i : i + count] for i in range(0, len(positions), count)]
    return found + alone


def by_batch(
    function: Callable[..., Sequence[Result]], tensors: Sequence[Tensor], *others: Sequence[Any]
) -> list[Result]:
    """Call a function for each batch of tensors, and return the results in the tensors' order.

    Parameters
    ----------
    function
        Called with the tensors of a batch, and with what `others` hold for them; returns a result
        for each.
    tensors
        The tensors, of any shapes.
    others
        Sequences with an item for each tensor.
    """
    found: list[Any] = [None] * len(tensors)
    for positions in batches(tensors):
        if len(positions) == len(tensors):
            return list(function(tensors, *others))
        batch = [[items[i] for i in positions] for items in (tensors, *others)]
        for position, result in zip(positions, function(*batch), strict=True):
            found[position] = result
    return found


def stack(tensors: Sequence[Tensor]) -> Tensor:
    """Return tensors of one shape and dtype stacked, contiguous and in new memory."""
    # A stack of channels-last tensors would be in an order of that kind.
    return torch.stack(list(tensors)).contiguous()


def rows(stacked: Tensor) -> Tensor:
    """Return a stack of tensors as a matrix with a row for each."""
    return stacked.view(len(stacked), stacked[0].numel())


def copies(stacked: Tensor) -> list[Tensor]:
    """Return the tensors of a stack, each in memory of its own.

    What is kept of a stack would keep all of it.
    """
    # torch declares that it returns nothing.
    unbind_copy: Any = torch.unbind_copy
    return list(unbind_copy(stacked))
