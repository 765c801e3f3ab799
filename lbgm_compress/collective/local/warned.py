"""Warnings that point at the line of the caller's own program."""

from __future__ import annotations

import sys
import warnings

__all__ = ["warn"]

PACKAGES = frozenset({"lbgm_compress", "torch", "contextlib"})


def warn(message: str) -> None:
    """Issue a warning at the innermost line outside of this package and torch.

    On a thread of this package it is the thread's outermost line.
    """
    frame, level = sys._getframe(1), 2
    while frame.f_globals.get("__name__", "").split(".")[0] in PACKAGES and frame.f_back:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)
