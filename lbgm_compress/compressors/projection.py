"""Projections of matrices onto a few directions, and the directions that they miss most."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from lbgm_compress.compressors.gram import (
    Host,
    on_device,
    orthonormalizer,
    pseudo_inverse,
    spectrum,
    to_host,
)
from lbgm_compress.compressors.numerics import CHUNK
from lbgm_compress.compressors.svd import leading_triplets

__all__ = ["SPARE", "Projection", "invert", "missed_directions", "project", "replaced"]

# Number of directions that only the sender knows, from which the next search starts.
SPARE = 2
# Directions that hold less than this share of a matrix's energy are not worth sending.
NEGLIGIBLE = 1e-9


@dataclass(eq=False)
class Projection:
    """A matrix M (m x n) and directions in the space of its rows.

    With r directions as the rows of B (r x n), the coefficients of least squares are
    C = M B^T (B B^T)^-1 (m x r), and C B is the projection of M.
    """

    matrix: Tensor
    """M, float32 or float64."""
    square: float
    """|M|^2."""
    basis: Tensor
    """B, the directions that the receiver holds, as it decodes them (r x n)."""
    spare: Tensor
    """Further directions (at most SPARE x n), which only the sender knows."""
    products: Tensor = field(default_factory=lambda: torch.empty(0))
    """M times the transposed directions, those of `basis` and then the spare ones (m x (r + s))."""
    energy: Host = field(default_factory=lambda: np.empty((0, 0)))
    """Inner products of the columns of `products`."""
    gram: Host = field(default_factory=lambda: np.empty((0, 0)))
    """Inner products of the directions."""
    inverse: Host = field(default_factory=lambda: np.empty((0, 0)))
    """(B B^T)^-1, or the pseudo-inverse if directions are dependent."""

    def missed(self) -> float:
        """Return the share of |M|^2 that the projection misses; `project` comes first."""
        r = len(self.basis)
        energy = self.energy[:r, :r]
        self.inverse = pseudo_inverse(self.gram[:r, :r])
        return max(0.0, 1.0 - float((energy * self.inverse).sum()) / self.square)

    def precisely_missed(self) -> float:
        """Return what `missed` returns, computed in float64 and without cancellation."""
        precise = self.basis.double()
        inverse = on_device(pseudo_inverse((precise @ precise.T).cpu().numpy()), precise)
        missed = total = 0.0
        step = max(1, CHUNK // self.matrix.shape[1])
        for start in range(0, len(self.matrix), step):
            part = self.matrix[start : start + step].double()
            coefficients = part @ precise.T @ inverse
            missed += float((part - coefficients @ precise).square().sum())
            total += float(part.square().sum())
        return missed / total

    def weakest(self, count: int) -> list[int]:
        """Return the `count` directions that hold the least energy of M, ascending."""
        r = len(self.basis)
        coefficients = (self.inverse * (self.energy[:r, :r] @ self.inverse).T).sum(1)
        held = coefficients * np.diag(self.gram[:r, :r])
        return sorted(np.argsort(held, kind="stable")[:count].tolist())

    def replace(self, slots: Sequence[int], rows: Tensor) -> None:
        """Put other directions at `slots`; `invert` must follow."""
        old = self.products.T[: len(self.basis)]
        self.products = replaced(old, slots, (self.matrix @ rows.T).T).T
        self.basis = replaced(self.basis, slots, rows)

    def coefficients(self) -> Tensor:
        """Return the transposed coefficients (r x m)."""
        return (self.products[:, : len(self.basis)] @ on_device(self.inverse, self.matrix)).T

    def leading(self, count: int) -> Tensor:
        """Return the leading right singular vectors of M as rows, at most `count`."""
        left, right = leading_triplets(self.matrix, count)
        norms = right.norm(dim=0)
        held = norms * left.norm(dim=0)
        usable = int((held.square() > NEGLIGIBLE * held.square().max()).sum())
        rows: Tensor = (right[:, :usable] / norms[:usable]).T.contiguous()
        return rows


def project(projections: Sequence[Projection]) -> None:
    """Multiply matrices by their directions, with one device synchronisation."""
    numbers = []
    for p in projections:
        rows = torch.cat([p.basis, p.spare])
        p.products = p.matrix @ rows.T
        numbers += [p.products.T @ p.products, rows @ rows.T]
    host = to_host(numbers)
    for p, energy, gram in zip(projections, host[::2], host[1::2], strict=True):
        p.energy, p.gram = energy, gram


def invert(projections: Sequence[Projection]) -> None:
    """Compute the inverse Gram matrices of directions, with one device synchronisation."""
    grams = to_host([p.basis @ p.basis.T for p in projections])
    for p, gram in zip(projections, grams, strict=True):
        p.inverse = pseudo_inverse(gram)


def missed_directions(
    projections: Sequence[Projection], slots: Sequence[Sequence[int]], count: int
) -> list[Tensor]:
    """Return the leading right singular directions of what the other directions miss.

    Parameters
    ----------
    projections
        Matrices and directions; `project` comes first.
    slots
        The directions of each that are to be replaced.
    count
        Number of directions that are wanted.

    Returns
    -------
    list
        For each matrix unit vectors as rows, largest energy first. There may be fewer than `count`
        where M has no more, and more than `count`.
    """
    residuals = [Residual(p, chosen) for p, chosen in zip(projections, slots, strict=True)]
    rights = [residual.power_step() for residual in residuals]
    spectra = [spectrum(gram) for gram in to_host([right @ right.T for right in rights])]
    found = []
    for p, residual, right, (values, vectors) in zip(
        projections, residuals, rights, spectra, strict=True
    ):
        # The leading direction holds the mean at least: less means that the starts were bad.
        if not len(values) or values[0] < 0.5 * residual.square / min(p.matrix.shape):
            right = residual.from_left(residual.sketch(count + SPARE))
            values, vectors = spectrum(to_host([right @ right.T])[0])
        usable = int((values > NEGLIGIBLE * p.square).sum())
        found.append(on_device((vectors / np.sqrt(values))[:, :usable].T, p.matrix) @ right)
    return found


class Residual:
    """The part R of a matrix that its directions miss without those at `slots`; never built."""

    def __init__(self, projection: Projection, slots: Sequence[int]) -> None:
        p = projection
        kept = [i for i in range(len(p.basis)) if i not in slots]
        self.projection, self.kept = projection, kept
        self.matrix, self.basis, self.products = p.matrix, p.basis[kept], p.products[:, kept]
        self.inverse = pseudo_inverse(p.gram[np.ix_(kept, kept)])
        self.square = p.square - float((p.energy[np.ix_(kept, kept)] * self.inverse).sum())
        """|R|^2."""

    def power_step(self) -> Tensor:
        """Return L^T R, where L is an orthonormal basis of R times the directions not kept."""
        p, kept = self.projection, self.kept
        starts = [i for i in range(len(p.gram)) if i not in kept]
        combination = np.zeros((len(p.gram), len(starts)))
        combination[starts, range(len(starts))] = 1
        combination[kept] = -self.inverse @ p.gram[np.ix_(kept, starts)]
        combination = combination @ orthonormalizer(combination.T @ p.energy @ combination)
        return self.from_left(p.products @ on_device(combination, p.matrix))

    def from_left(self, left: Tensor) -> Tensor:
        """Return left^T R (k x n), for `left` of m x k."""
        inner = left.T @ self.products @ on_device(self.inverse, left)
        return left.T @ self.matrix - inner @ self.basis

    def sketch(self, count: int) -> Tensor:
        """Return an orthonormal basis (m x k) of R times `count` random vectors."""
        m, n = self.matrix.shape
        generator = torch.Generator().manual_seed(0)
        random = torch.randn(min(count, m), n, generator=generator, dtype=self.matrix.dtype)
        random = random.to(self.matrix.device)
        left = self.matrix @ random.T
        left -= self.products @ (on_device(self.inverse, left) @ (self.basis @ random.T))
        basis: Tensor = torch.linalg.qr(left).Q
        return basis


def replaced(old: Tensor, slots: Sequence[int], rows: Tensor) -> Tensor:
    """Return `old` with these rows at `slots`, which may follow its last row."""
    size = max(len(old), slots[-1] + 1)
    new = torch.empty((size, *old.shape[1:]), dtype=old.dtype, device=old.device)
    new[: len(old)] = old
    new[list(slots)] = rows
    return new
