"""Leading singular triplets of a matrix."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["decomposition", "leading_triplets"]

# Up to this size of the smaller side, all singular values are computed from the Gram matrix. Above
# it, the leading ones are computed by subspace iteration, which is then faster.
GRAM_LIMIT = 256


def decomposition(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return the factors (m x d, n x d) of all d = min(m, n) singular triplets, largest first.

    The factors of the shorter side are orthonormal, the others multiplied by the singular values.
    """
    m, n = matrix.shape
    if m > n:
        right, left = decomposition(matrix.T)
        return left, right
    precise = matrix.double()
    left = torch.linalg.eigh(precise @ precise.T).eigenvectors.flip(1)
    return left.to(matrix.dtype), (precise.T @ left).to(matrix.dtype)


def leading_triplets(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the factors (m x rank, n x rank) of the leading triplets.

    The factors of the shorter side are orthonormal, the others multiplied by the singular values.
    """
    m, n = matrix.shape
    if min(m, n) <= GRAM_LIMIT:
        left, right = decomposition(matrix)
        return left[:, :rank].contiguous(), right[:, :rank].contiguous()
    if m > n:
        right, left = leading_triplets(matrix.T, rank)
        return left, right
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(m, min(m, rank + 8), generator=generator, dtype=matrix.dtype)
    basis = torch.linalg.qr(start.to(matrix.device)).Q
    for _ in range(4):
        basis = torch.linalg.qr(matrix @ (matrix.T @ basis)).Q
    # Within the subspace the triplets are exact.
    left, right = decomposition(basis.T @ matrix)
    return basis @ left[:, :rank], right[:, :rank].contiguous()
