"""What compressors are compared with, and torch provides."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["PowerSGD"]


@dataclass(frozen=True)
class PowerSGD:
    """torch's PowerSGD hook (arXiv 1905.13727), with error feedback; two dense rounds come first.

    Not a compressor: its ranks average factors before each has the other.
    """

    rank: int
    DENSE_ROUNDS = 2
