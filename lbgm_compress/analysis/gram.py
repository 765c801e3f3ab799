"""Inner products of the kept gradients, and the variances that follow from them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from lbgm_compress.analysis.storage import Rows, Slot

__all__ = ["GramMatrices", "Matrix"]

Matrix = npt.NDArray[np.float64]

# Bytes in float64 of the columns of all gradients that are multiplied at a time.
PIECE = 48 * 2**20


class GramMatrices:
    """The Gram matrices of the parts of the gradients, brought up to date in one pass.

    Parameters
    ----------
    matrices
        The matrices to begin with (parts, T, T).
    """

    def __init__(self, matrices: Matrix | None = None) -> None:
        self.matrices: Matrix = np.zeros((0, 0, 0)) if matrices is None else matrices
        self._spectra: dict[tuple[int | None, int], Matrix] = {}

    def update(self, rows: Rows, parts: Sequence[Slot]) -> None:
        """Compute the inner products of the rows that are new, with all rows.

        `parts` are the same in every call, and there are none of them only if there is no row.
        """
        done, total = self.matrices.shape[1], rows.count
        if done == total:
            return
        length = rows.layout.length
        gram = np.zeros((len(parts), total, total))
        if done:
            gram[:, :done, :done] = self.matrices
        width = min(max(1, PIECE // (8 * total)), length)
        buffer = np.empty((total, width))
        with rows.reader() as read:
            for first in range(0, length, max(1, width)):
                piece = buffer[:, : min(width, length - first)]
                read(first, piece)
                for products, slot in zip(gram, parts, strict=True):
                    part = piece[:, max(0, slot.start - first) : max(0, slot.stop - first)]
                    if part.shape[1]:
                        products[done:, :done] += part[done:] @ part[:done].T
                        products[done:, done:] += part[done:] @ part[done:].T
        gram[:, :done, done:] = gram[:, done:, :done].transpose(0, 2, 1)
        self.matrices = gram

    def matrix(self, part: int | None) -> Matrix:
        """Return the Gram matrix (T, T) of one part, or of the whole gradients for None."""
        gram: Matrix = self.matrices.sum(0) if part is None else self.matrices[part]
        return gram

    def spectra(self, part: int | None, counts: Iterable[int]) -> list[Matrix]:
        """Return, for each count, the variances (descending) of that many first gradients."""
        counts = list(counts)
        missing = [count for count in counts if (part, count) not in self._spectra]
        if missing:
            gram = self.matrix(part)
        for count in missing:
            variances = np.linalg.eigvalsh(gram[:count, :count])[::-1].clip(0)
            self._spectra[part, count] = variances
        return [self._spectra[part, count] for count in counts]
