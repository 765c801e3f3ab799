"""Linear algebra of Gram matrices, which are small and live on the host in float64."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

__all__ = ["Host", "on_device", "orthonormalizer", "pseudo_inverse", "spectrum", "to_host"]

Host = npt.NDArray[np.float64]

# Vectors whose Gram matrix has eigenvalues below this share of the largest are dependent.
DEPENDENT = 1e-5


def to_host(tensors: Sequence[Tensor]) -> list[Host]:
    """Return small tensors on the host, with one device synchronisation."""
    if not tensors:
        return []
    flat = torch.cat([t.reshape(-1).double() for t in tensors]).cpu().numpy()
    sizes = np.cumsum([t.numel() for t in tensors])[:-1]
    return [part.reshape(t.shape) for part, t in zip(np.split(flat, sizes), tensors, strict=True)]


def on_device(matrix: Host, like: Tensor) -> Tensor:
    """Return a matrix with the device and dtype of `like`."""
    return torch.from_numpy(np.ascontiguousarray(matrix)).to(like.device, like.dtype)


def pseudo_inverse(gram: Host) -> Host:
    """Return the pseudo-inverse of a Gram matrix."""
    if not gram.size:
        return gram
    values, vectors = np.linalg.eigh(gram)
    keep = values > DEPENDENT * values[-1]
    inverse: Host = (vectors[:, keep] / values[keep]) @ vectors[:, keep].T
    return inverse


def orthonormalizer(gram: Host) -> Host:
    """Return the matrix A for which X A has orthonormal columns, where `gram` is X^T X.

    Dependent columns of X are left out.
    """
    values, vectors = np.linalg.eigh(gram)
    keep = values > DEPENDENT * max(values[-1:], default=0.0)
    scaled: Host = vectors[:, keep] / np.sqrt(values[keep])
    return scaled


def spectrum(gram: Host) -> tuple[Host, Host]:
    """Return the positive eigenvalues, largest first, and their eigenvectors (columns)."""
    if not gram.size:
        return np.empty(0), gram
    values, vectors = np.linalg.eigh(gram)
    positive = int((values > 0).sum())
    return values[::-1][:positive], vectors[:, ::-1][:, :positive]
