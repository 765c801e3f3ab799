"""Principal components and cosines, from a Gram matrix or its eigenvalues."""

from __future__ import annotations

import numpy as np

from lbgm_compress.analysis.gram import Matrix

__all__ = ["check_share", "cosines", "explained", "principal_cosines", "smallest_count"]

# Shares closer than this are equal, so that exact ones, such as 19 of 20, survive rounding.
SLACK = 1e-9


def check_share(share: float) -> None:
    """Raise `ValueError` unless the share is above 0 and at most 1."""
    if not 0 < share <= 1:
        raise ValueError(f"share must be above 0 and at most 1, not {share}")


def smallest_count(spectrum: Matrix, share: float) -> int:
    """Return the number of leading variances that sum up to a share of all; 0 if all are 0."""
    sums = np.cumsum(spectrum)
    if not len(sums) or sums[-1] <= 0:
        return 0
    return int(np.searchsorted(sums, (share - SLACK) * sums[-1])) + 1


def explained(spectrum: Matrix) -> Matrix:
    """Return the variances as shares of their sum; all 0 if that is 0."""
    total = spectrum.sum()
    return spectrum / total if total > 0 else np.zeros_like(spectrum)


def cosines(gram: Matrix) -> Matrix:
    """Return the cosines of the gradients with each other (T, T); 0 for a zero gradient."""
    norms = np.sqrt(np.diag(gram))
    return _quotient(gram, np.outer(norms, norms)).clip(-1, 1)


def principal_cosines(gram: Matrix, count: int) -> Matrix:
    """Return the cosines of the gradients with the `count` leading components (T, count).

    `GradientSpace.principal_cosines` has the definition.
    """
    if count == 0:
        return np.zeros((len(gram), 0))
    values, vectors = np.linalg.eigh(gram)
    values, vectors = values[::-1][:count].clip(0), vectors[:, ::-1][:, :count]
    sizes = np.abs(vectors)
    # The first of the entries that are as large as any, so that rounding does not decide the sign.
    largest = (sizes >= (1 - 1e-6) * sizes.max(0)).argmax(0)
    signs = np.where(vectors[largest, np.arange(count)] < 0, -1.0, 1.0)
    parts = vectors * signs * np.sqrt(values)
    return _quotient(parts, np.sqrt(np.diag(gram))[:, None]).clip(-1, 1)


def _quotient(dividend: Matrix, divisor: Matrix) -> Matrix:
    """Return the quotient, 0 where the divisor is 0."""
    quotient: Matrix = np.divide(dividend, divisor, out=np.zeros_like(dividend), where=divisor > 0)
    return quotient
