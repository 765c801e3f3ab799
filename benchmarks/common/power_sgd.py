"""PowerSGD over `torch.distributed`, for averages that are not those of DDP's gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["average_by_power_sgd"]


def average_by_power_sgd(
    tensors: Sequence[Tensor], rank: int, state: dict[Any, Tensor]
) -> tuple[list[Tensor], int]:
    """Average tensors over all ranks with error feedback (arXiv 1905.13727, algorithms 1 and 2).

    Tensors with fewer than two dimensions, or for which factors are not smaller, go in full.

    Parameters
    ----------
    tensors
        The same shapes on all ranks, float32.
    rank
        Rank of the factors.
    state
        Empty at first, and kept by the caller: residuals and the last right factors.

    Returns
    -------
    averages
        The averages, in the shapes of the tensors.
    size
        Bytes that this rank contributed.
    """
    ranks = dist.get_world_size()
    averages: list[Tensor] = []
    size = 0

    def mean(tensor: Tensor) -> Tensor:
        nonlocal size
        size += tensor.numel() * tensor.element_size()
        dist.all_reduce(tensor)
        return tensor.div_(ranks)

    for position, tensor in enumerate(tensors):
        matrix = tensor.reshape(len(tensor), -1) if tensor.ndim > 1 else tensor.reshape(1, -1)
        rows, columns = matrix.shape
        if (rows + columns) * rank >= matrix.numel():
            averages.append(mean(tensor.clone()))
            continue
        residual = state.get(("residual", position))
        matrix = matrix if residual is None else matrix + residual
        right = state.get(("right", position))
        if right is None:
            generator = torch.Generator().manual_seed(position)
            right = torch.randn(columns, rank, generator=generator).to(matrix.device)
        left = torch.linalg.qr(mean(matrix @ right)).Q
        right = mean(matrix.T @ left)
        found = left @ right.T
        state["residual", position] = matrix - found
        state["right", position] = right
        averages.append(found.view(tensor.shape))
    return averages, size
