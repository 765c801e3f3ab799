"""Limits of floating-point arithmetic that several compressors observe."""

from __future__ import annotations

from torch import Tensor

__all__ = ["CHUNK", "MARGIN", "SQUARES", "magnitude"]

# Inner products in float32 are accurate to about 1e-5. A phase error this close to the threshold is
# computed again in float64, so that decisions are those of exact arithmetic.
MARGIN = 1e-4
# Squares outside this range may have lost bits to underflow, or overflowed.
SQUARES = (1e-30, 1e36)
# Number of elements that are converted to float64 at a time.
CHUNK = 1 << 20


def magnitude(tensor: Tensor) -> float:
    """Return the largest magnitude of an element, 0 for an empty tensor."""
    return float(tensor.abs().max()) if tensor.numel() else 0.0
