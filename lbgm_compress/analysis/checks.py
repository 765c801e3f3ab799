"""The check of a gradient before it is kept."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lbgm_compress.compressor import all_finite, check_gradient

__all__ = ["check_gradients"]


def check_gradients(grads: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise unless these are finite gradients of the tensors in the first gradient.

    Parameters
    ----------
    grads
        The tensors of a gradient by name.
    shapes
        The shapes of the tensors in the first gradient by name; empty if this is the first.

    Raises
    ------
    TypeError
        If something is not a dense floating-point tensor.
    ValueError
        If there is no tensor, names or shapes differ, or an entry is inf, nan or beyond float32.
    """
    for name, grad in grads.items():
        check_gradient(grad, name)
    if not grads and not shapes:
        raise ValueError("the gradient has no tensors, expected at least one")
    if shapes:
        _check_shapes(grads, shapes)
    for name, finite in zip(grads, all_finite(list(grads.values())), strict=True):
        if not finite:
            raise ValueError(
                f"the gradient {name!r} has inf or nan among its entries, expected finite "
                "numbers: did the training diverge?"
            )
        if grads[name].dtype == torch.float64 and grads[name].numel():
            largest = max(abs(float(bound)) for bound in torch.aminmax(grads[name].detach()))
            if largest > torch.finfo(torch.float32).max:
                raise ValueError(
                    f"the gradient {name!r} has an entry of size {largest:.3g}, expected "
                    "numbers within float32"
                )


def _check_shapes(grads: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    for name in grads:
        if name not in shapes:
            raise ValueError(
                f"the gradient has a tensor {name!r}, which the first one had not: use a new "
                "GradientSpace for another model"
            )
    for name, shape in shapes.items():
        if name not in grads:
            raise ValueError(f"the gradient has no tensor {name!r}, which the first one had")
        if tuple(grads[name].shape) != shape:
            raise ValueError(
                f"the gradient {name!r} has shape {tuple(grads[name].shape)}, expected "
                f"{shape} as in the first one"
            )
