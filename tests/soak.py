"""Lengths of the runs of tests marked ``soak``."""

from __future__ import annotations

import os

__all__ = ["length"]


def length(full: int, short: int) -> int:
    """Return `full`, or `short` if the environment has ``SOAK=short``, as in CI."""
    value = os.environ.get("SOAK", "full")
    if value not in ("full", "short"):
        raise ValueError(f"SOAK must be full or short, not {value!r}")
    return full if value == "full" else short
