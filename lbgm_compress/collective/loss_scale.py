"""The loss scale of a training: a number, or a callable that returns it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from lbgm_compress._util.checks import check_number

__all__ = ["check_loss_scale", "current_scale"]


def check_loss_scale(loss_scale: Any) -> None:
    """Raise an error unless it is a number or a function without arguments."""
    if callable(getattr(loss_scale, "get_scale", None)):
        raise TypeError("loss_scale is a gradient scaler: give its method, scaler.get_scale")
    if not callable(loss_scale):
        check_number("loss_scale", loss_scale, kind="a number or a callable", error=TypeError)
        current_scale(loss_scale)


def current_scale(loss_scale: float | Callable[[], float]) -> float:
    """Return the loss scale now.

    Raises
    ------
    ValueError
        If it is not a finite number above 0.
    """
    scale = float(loss_scale() if callable(loss_scale) else loss_scale)
    if not 0 < scale < math.inf:
        raise ValueError(f"loss_scale must be above 0 and finite, not {scale}")
    return scale
