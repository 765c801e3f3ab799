"""The angle between a gradient and its look-back gradient."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lbgm_compress._util.batches import rows, stack
from lbgm_compress.compressors.numerics import CHUNK, magnitude
from lbgm_compress.decoded import Decoded, stacked

__all__ = ["Angle", "exact_angle", "products", "stacked_products"]


class Angle(NamedTuple):
    """The angle between a gradient g and its look-back gradient l."""

    square_norm: float
    """|g|^2; inf or nan only if g holds inf or nan."""
    phase_error: float | None
    """sin^2(alpha); None without a look-back gradient."""
    rho: float
    """<g, l> / |l|^2; nan for l = 0."""
    projection: float
    """|rho l|, which bounds every element of rho l."""


def products(
    gradients: Sequence[Decoded], look_backs: Sequence[Tensor | None]
) -> tuple[list[float], list[float]]:
    """Return <g, g> and <g, l> of each gradient, with one synchronisation; <g, g> without l."""
    taken: list[Tensor] = []
    for gradient, look_back in zip(gradients, look_backs, strict=True):
        taken += gradient.dots(look_back)
    if taken[0].is_cpu:
        numbers = [float(product) for product in taken]
    else:
        numbers = torch.stack([product.double() for product in taken]).tolist()
    return numbers[::2], numbers[1::2]


def stacked_products(
    gradients: Sequence[Decoded], look_backs: Sequence[Tensor | None]
) -> tuple[list[float], list[float]]:
    """Return what `products` returns, for small tensors of one shape.

    The products are taken in float64, which costs nothing here. So they do not depend on where the
    tensors are in memory, as those of `torch.dot` do.
    """
    together = stacked(gradients)
    others = [look_back for look_back in look_backs if look_back is not None]
    if len(others) < len(look_backs):
        pairs = zip(together.unbind(), look_backs, strict=True)
        others = [own if look_back is None else look_back for own, look_back in pairs]
    g, other = rows(together).double(), rows(stack(others)).double()
    return (g * g).sum(1).tolist(), (g * other).sum(1).tolist()


def exact_angle(grad: Tensor, look_back: Tensor | None) -> Angle:
    """Take the angle in float64, on magnitudes scaled to 1, without cancellation."""
    g_max = magnitude(grad)
    if not math.isfinite(g_max):
        return Angle(g_max, None, math.nan, math.nan)
    l_max = 0.0 if look_back is None else magnitude(look_back)
    if g_max == 0:
        return Angle(0.0, None if look_back is None else 0.0, 0.0, 0.0)
    gg = gl = ll = 0.0
    for g, lb in _chunks(grad, g_max, look_back, l_max):
        gg += float(torch.dot(g, g))
        gl += float(torch.dot(g, lb))
        ll += float(torch.dot(lb, lb))
    square_norm = min(gg * g_max * g_max, sys.float_info.max)
    if look_back is None:
        return Angle(square_norm, None, math.nan, math.nan)
    if l_max == 0:
        return Angle(square_norm, 1.0, math.nan, math.nan)
    missed = 0.0
    for g, lb in _chunks(grad, g_max, look_back, l_max):
        difference = g - gl / ll * lb
        missed += float(torch.dot(difference, difference))
    rho, projection = gl / ll * (g_max / l_max), abs(gl) / math.sqrt(ll) * g_max
    return Angle(square_norm, min(missed / gg, 1.0), rho, projection)


def _chunks(
    grad: Tensor, g_max: float, look_back: Tensor | None, l_max: float
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield pieces of both in float64, divided by their magnitude."""
    flat = grad.reshape(-1)
    other = flat if look_back is None else look_back.reshape(-1)
    for start in range(0, flat.numel(), CHUNK):
        part = slice(start, start + CHUNK)
        yield flat[part].double() / g_max, other[part].double() / (l_max or 1.0)
