"""The three pictures of a `GradientSpace`; needs matplotlib."""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

if TYPE_CHECKING:
    from lbgm_compress.analysis import GradientSpace

__all__ = ["draw"]

Matrix = npt.NDArray[np.float64]
PANELS = 12
WHOLE_TICKS: dict[str, Any] = {"integer": True, "min_n_ticks": 1, "steps": [1, 2, 5, 10]}


def draw(
    space: GradientSpace, accuracy: Sequence[float] | None, title: str | None
) -> dict[str, bytes]:
    """Return PNG files by name; see `GradientSpace.plot`."""
    shown = _shown(space)
    if len(shown) <= len(space.layers):
        left_out = f"the {len(shown) - 1} largest of {len(space.layers)} layers"
        title = left_out if title is None else f"{title}; {left_out}"
    principal = {layer: space.principal_cosines(0.99, layer=layer) for layer in shown}
    cosines = {layer: space.cosines(layer) for layer in shown}
    of_component = ("principal component", "cosine of gradient and component")
    return {
        "components.png": _components(space, shown, accuracy, title),
        "principal.png": _maps(space, principal, *of_component, title),
        "cosines.png": _maps(space, cosines, "epoch", "cosine of gradients", title),
    }


def _shown(space: GradientSpace) -> list[str | None]:
    """Return the whole gradient and the largest layers, in the model's order."""
    sizes = {name: math.prod(shape) for name, shape in space.shapes.items()}
    largest = sorted(space.layers, key=lambda name: -sizes[name])[: PANELS - 1]
    return [None, *(name for name in space.layers if name in largest)]


def _name(space: GradientSpace, layer: str | None) -> str:
    if layer is None:
        return "whole gradient" if space.per_layer else ""
    return f"{layer} ({'x'.join(map(str, space.shapes[layer])) or '1'})"


def _components(
    space: GradientSpace,
    shown: Sequence[str | None],
    accuracy: Sequence[float] | None,
    title: str | None,
) -> bytes:

    panels = 1 + space.per_layer + (accuracy is not None)
    epochs = range(1, len(space) + 1)
    marker = {"marker": "o", "markersize": 3} if len(space) <= 30 else {}
    figure = Figure(figsize=(0.6 + 4.4 * panels, 3.8), layout="constrained")
    first, *others = figure.subplots(1, panels, squeeze=False)[0]
    for name, share in (("N95-PCA", 0.95), ("N99-PCA", 0.99)):
        first.plot(epochs, space.history(share), label=name, **marker)
    first.set_ylabel("principal components")
    first.set_title("whole gradient" if space.per_layer else "", fontsize=10)
    first.legend(frameon=False)
    counted = [first]
    if space.per_layer:
        axes = others.pop(0)
        colours = colormaps["viridis"](np.linspace(0, 0.95, max(2, len(shown) - 1)))
        for layer, colour in zip(shown[1:], colours, strict=False):
            axes.plot(epochs, space.history(0.99, layer), label=layer, color=colour, **marker)
        axes.set_ylabel("principal components")
        axes.set_title("N99-PCA of layers", fontsize=10)
        axes.legend(frameon=False, fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
        counted.append(axes)
    for axes in counted:
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_locator(MaxNLocator("auto", **WHOLE_TICKS))
    if accuracy is not None:
        others[0].plot(epochs, list(accuracy), color="C2", **marker)
        others[0].set_ylabel("test accuracy")
        decimals = 0 if max(accuracy) - min(accuracy) > 0.1 else None
        others[0].yaxis.set_major_formatter(PercentFormatter(1, decimals))
    for axes in (*counted, *others):
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator("auto", **WHOLE_TICKS))
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    return _png(figure, title)


def _maps(
    space: GradientSpace,
    maps: Mapping[str | None, Matrix],
    across: str,
    colour: str,
    title: str | None,
) -> bytes:
    """Draw matrices of cosines, a panel each, on one scale of colours."""

    lines = math.ceil(len(maps) / 4)
    columns = math.ceil(len(maps) / lines)
    side = 4.2 if len(maps) == 1 else 2.6
    figure = Figure(figsize=(1.4 + side * columns, 0.5 + side * lines), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False)
    for axes in panels.flat[len(maps) :]:
        axes.set_visible(False)
    for axes, (layer, matrix) in zip(panels.flat, maps.items(), strict=False):
        height, width = matrix.shape
        if not width:
            axes.text(0.5, 0.5, "all zero", ha="center", transform=axes.transAxes)
        image = axes.imshow(
            matrix if width else np.zeros((height, 1)),
            cmap="RdBu_r",
            vmin=-1,
            vmax=1,
            aspect="auto",
            interpolation="nearest",
            extent=(0.5, max(1, width) + 0.5, height + 0.5, 0.5),
        )
        axes.set_box_aspect(1)
        axes.set_title(_name(space, layer), fontsize=8)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(6, **WHOLE_TICKS))
    for axes in panels[:, 0]:
        axes.set_ylabel("epoch")
    for i in range(columns):
        panels[(len(maps) - 1 - i) // columns, i].set_xlabel(across)
    figure.colorbar(image, ax=panels, label=colour, shrink=0.8)
    return _png(figure, title)


def _png(figure: Any, title: str | None) -> bytes:
    if title is not None:
        width = int(figure.get_figwidth() * 12)
        figure.suptitle(textwrap.fill(title, width), fontsize=10, x=0.01, ha="left")
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=130)
    return data.getvalue()
