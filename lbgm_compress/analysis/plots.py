"""The results of a `GradientSpace` as three figures; needs matplotlib."""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from lbgm_compress.analysis.gram import Matrix
from lbgm_compress.analysis.results import Results

__all__ = ["draw"]

# Panels of a figure at most, the whole gradient's among them.
PANELS = 12
INTEGER_TICKS: dict[str, Any] = {"integer": True, "min_n_ticks": 1, "steps": [1, 2, 5, 10]}


def draw(results: Results, accuracy: Sequence[float] | None, title: str | None) -> dict[str, bytes]:
    """Return the figures of `GradientSpace.plot` as PNG files by name."""
    shown = _shown(results)
    if len(shown) <= len(results.layers):
        left_out = f"the {len(shown) - 1} largest of {len(results.layers)} layers"
        title = left_out if title is None else f"{title}; {left_out}"
    principal = {layer: results.principal_cosines(0.99, layer=layer) for layer in shown}
    cosines = {layer: results.cosines(layer) for layer in shown}
    labels = ("principal component", "cosine of gradient and component")
    return {
        "components.png": _components(results, shown, accuracy, title),
        "principal.png": _heat_maps(results, principal, *labels, title),
        "cosines.png": _heat_maps(results, cosines, "epoch", "cosine of gradients", title),
    }


def _shown(results: Results) -> list[str | None]:
    """Return the whole gradient and the largest layers, in the model's order."""
    sizes = {name: math.prod(shape) for name, shape in results.shapes.items()}
    largest = sorted(results.layers, key=lambda name: -sizes[name])[: PANELS - 1]
    return [None, *(name for name in results.layers if name in largest)]


def _name(results: Results, layer: str | None) -> str:
    if layer is None:
        return "whole gradient" if results.per_layer else ""
    return f"{layer} ({'x'.join(map(str, results.shapes[layer])) or '1'})"


def _components(
    results: Results,
    shown: Sequence[str | None],
    accuracy: Sequence[float] | None,
    title: str | None,
) -> bytes:
    """Draw the numbers of principal components, and the accuracy if there is one."""
    panels = 1 + results.per_layer + (accuracy is not None)
    epochs = range(1, len(results) + 1)
    marker = {"marker": "o", "markersize": 3} if len(results) <= 30 else {}
    figure = Figure(figsize=(0.6 + 4.4 * panels, 3.8), layout="constrained")
    first, *others = figure.subplots(1, panels, squeeze=False)[0]
    for name, share in (("N95-PCA", 0.95), ("N99-PCA", 0.99)):
        first.plot(epochs, results.history(share), label=name, **marker)
    first.set_ylabel("principal components")
    first.set_title("whole gradient" if results.per_layer else "", fontsize=10)
    first.legend(frameon=False)
    counted = [first]
    if results.per_layer:
        axes = others.pop(0)
        colours = colormaps["viridis"](np.linspace(0, 0.95, max(2, len(shown) - 1)))
        for layer, colour in zip(shown[1:], colours, strict=False):
            axes.plot(epochs, results.history(0.99, layer), label=layer, color=colour, **marker)
        axes.set_ylabel("principal components")
        axes.set_title("N99-PCA of layers", fontsize=10)
        axes.legend(frameon=False, fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
        counted.append(axes)
    for axes in counted:
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_locator(MaxNLocator("auto", **INTEGER_TICKS))
    if accuracy is not None:
        others[0].plot(epochs, list(accuracy), color="C2", **marker)
        others[0].set_ylabel("test accuracy")
        decimals = 0 if max(accuracy) - min(accuracy) > 0.1 else None
        others[0].yaxis.set_major_formatter(PercentFormatter(1, decimals))
    for axes in (*counted, *others):
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator("auto", **INTEGER_TICKS))
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    return _png(figure, title)


def _heat_maps(
    results: Results,
    maps: Mapping[str | None, Matrix],
    x_label: str,
    colour_label: str,
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
        axes.set_title(_name(results, layer), fontsize=8)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(6, **INTEGER_TICKS))
    for axes in panels[:, 0]:
        axes.set_ylabel("epoch")
    for i in range(columns):
        panels[(len(maps) - 1 - i) // columns, i].set_xlabel(x_label)
    figure.colorbar(image, ax=panels, label=colour_label, shrink=0.8)
    return _png(figure, title)


def _png(figure: Any, title: str | None) -> bytes:
    if title is not None:
        width = int(figure.get_figwidth() * 12)
        figure.suptitle(textwrap.fill(title, width), fontsize=10, x=0.01, ha="left")
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=130)
    return data.getvalue()
