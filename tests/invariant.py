"""The invariant of a training with compressed gradients and error feedback.

The sum of the averages that were applied, and the residuals, is the sum of the true averages: the
averages that training without compression would have applied in the same loop. A step that is not
applied counts on neither side.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lbgm_compress import LBGM, Compressor, ErrorFeedback

__all__ = ["check_invariant", "keeps_invariant", "residuals"]


def keeps_invariant(compressor: Compressor) -> bool:
    """Return whether a compressor loses nothing: the invariant holds, and not bit-equality alone.

    LBGM around ErrorFeedback loses its own error unless it recycles exact multiples alone, and a
    decay below 1 loses a part of the residual.
    """
    if isinstance(compressor, LBGM):
        return compressor.delta == 0 and keeps_invariant(compressor.inner)
    return isinstance(compressor, ErrorFeedback) and compressor.decay == 1


def residuals(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the residuals of a rank by name, in units of the gradient without a loss scale.

    `state` is the state dict of a `Sender`, or of an averager, which holds one.
    """
    tensors = state.get("sender", state)["tensors"]
    return {
        name: _residual(entry["state"]) / entry["scale"]
        for name, entry in tensors.items()
        if _residual(entry["state"]) is not None
    }


def _residual(state: Mapping[str, Any]) -> Any:
    if "residual" in state:
        return state["residual"].double()
    return _residual(state["inner"]) if "inner" in state else None


def check_invariant(
    applied: Mapping[str, Tensor],
    true: Sequence[Mapping[str, Tensor]],
    kept: Sequence[Mapping[str, Tensor]],
    shares: Sequence[float] | None = None,
    tolerance: float = 1e-5,
) -> None:
    """Check that nothing is lost and nothing doubled.

    Parameters
    ----------
    applied
        The sum of the averages that were applied, by name: the same on all ranks.
    true
        For each rank, the sum of its gradients in the steps that were applied.
    kept
        For each rank, its `residuals`.
    shares
        Each rank's share of the average; equal ones unless given.
    tolerance
        The largest difference, as a share of the largest sum of magnitudes.
    """
    shares = [1 / len(true)] * len(true) if shares is None else shares
    for name in applied:
        expected = sum(share * of[name].double() for share, of in zip(shares, true, strict=True))
        found = applied[name].double()
        size = float(found.abs().max()) + 1.0
        for share, of in zip(shares, kept, strict=True):
            if name in of:
                found = found + share * of[name]
                size = max(size, share * float(of[name].abs().max()))
        missed = float((found - expected).abs().max())
        assert missed <= tolerance * size, (
            f"{name}: applied + residual differs from the true sum by {missed}, of {size}: "
            f"{torch.stack([found.flatten(), torch.as_tensor(expected).flatten()])[:, :6]}"
        )
