"""Pictures: styles of methods, axes, and PNG files."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from lbgm_compress import LBGM, ErrorFeedback
from lbgm_compress._util.units import human_bytes
from lbgm_compress.algorithm import Algorithm
from lbgm_compress.compressor import Compressor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

__all__ = [
    "FAMILIES",
    "chart",
    "family_of",
    "line_styles",
    "png",
    "show_bytes",
    "show_percent",
    "subplots",
    "tidy",
]

# Colours and markers of points, by the first of these names that a method's expression contains.
FAMILIES = {
    "SharedSubspace": ("tab:pink", "p"),
    "SharedLBGM": ("tab:cyan", "<"),
    "LookBackSubspace": ("tab:red", "o"),
    "LBGM": ("tab:purple", "s"),
    "TopK": ("tab:blue", "^"),
    "Atomo": ("tab:green", "D"),
    "SignSGD": ("tab:orange", "v"),
    "TorchPowerSGD": ("tab:brown", "P"),
    "PowerSGD": ("tab:olive", "h"),
    "Identity": ("black", "*"),
    "other": ("tab:gray", "X"),
}


def line_styles(methods: Sequence[Algorithm]) -> list[dict[str, Any]]:
    """Return keyword arguments of ``Axes.plot`` for each method.

    Methods around the same compressor have one colour. Lines are broken where a receiver keeps
    state, as under LBGM, and solid elsewhere.
    """
    from matplotlib import colormaps

    palette = colormaps["tab10"].colors
    innermost: list[Algorithm] = []
    used: dict[tuple[Algorithm, bool], int] = {}
    styles = []
    for method in methods:
        inner = _innermost(method)
        if inner not in innermost:
            innermost.append(inner)
        broken = keeps_receiver_state(method)
        variant = used.get((inner, broken), 0)
        used[inner, broken] = variant + 1
        lines = ("--", ":", "-.", (0, (1, 3))) if broken else ("-", (0, (8, 2)), (0, (5, 5)))
        styles.append(
            {
                "color": palette[innermost.index(inner) % len(palette)],
                "linestyle": lines[variant % len(lines)],
                "linewidth": 1.8,
                "label": repr(method),
            }
        )
    return styles


def keeps_receiver_state(method: Algorithm) -> bool:
    """Return whether a receiver keeps state; contributions that add up have no receiver."""
    return isinstance(method, Compressor) and not method.adds_up and method.receiver_has_state


def _innermost(method: Algorithm) -> Algorithm:
    while isinstance(method, (LBGM, ErrorFeedback)):
        method = method.inner
    return method


def family_of(method: str) -> str:
    """Return the name in `FAMILIES` of a method's expression."""
    return next((name for name in FAMILIES if name in method), "other")


def subplots(rows: int, columns: int, size: tuple[float, float]) -> tuple[Figure, Any]:
    """Return a figure of `size` inches, and its axes as an array (rows, columns)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)


def chart(fill: Callable[[Axes], None], title: str, lines: int) -> bytes:
    """Return a PNG file of one pair of axes with a legend beside it.

    `fill` draws `lines` labelled lines on the axes and labels them.
    """
    figure, [[axes]] = subplots(1, 1, (10, 4.8 + 0.2 * max(0, lines - 12)))
    fill(axes)
    axes.set_title(textwrap.fill(title, 90), fontsize=10, loc="left")
    tidy(axes)
    figure.legend(loc="outside right upper", frameon=False, fontsize=8, handlelength=3)
    return png(figure)


def png(figure: Figure, dpi: int = 130) -> bytes:
    """Return a figure as a PNG file, and close it."""
    from matplotlib import pyplot

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    pyplot.close(figure)
    return buffer.getvalue()


def tidy(axes: Axes) -> None:
    """Draw a grid, and no lines at the top and at the right."""
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def show_percent(axis: Axis) -> None:
    """Label an axis of shares in percent."""
    from matplotlib.ticker import PercentFormatter

    axis.set_major_formatter(PercentFormatter(1))


def show_bytes(axis: Axis) -> None:
    """Label an axis of bytes in decimal units."""
    from matplotlib.ticker import FuncFormatter

    def label(number: float, _: object) -> str:
        value, unit = human_bytes(number).split()
        return f"{float(value):g} {unit}"

    axis.set_major_formatter(FuncFormatter(label))
