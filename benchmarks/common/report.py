"""What a comparison leaves behind: tables of numbers, pictures, and one page with all of it."""

from __future__ import annotations

import base64
import csv
import html
import io
import json
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.common.training import Round
from lbgm_compress import LBGM, Compressor, ErrorFeedback
from lbgm_compress._util.files import atomic_write
from lbgm_compress._util.units import human_bytes

__all__ = [
    "COLUMNS",
    "FILES",
    "MethodResult",
    "cells",
    "headings",
    "styles",
    "summarise",
    "tick",
    "write_files",
    "write_rounds",
]

FILES = (
    "rounds.csv",
    "summary.json",
    "accuracy_vs_round.png",
    "accuracy_vs_uplink.png",
    "uplink_per_round.png",
    "report.html",
)
COLUMNS = (
    "method",
    "round",
    "accuracy",
    "loss",
    "uplink_bytes",
    "uplink_bytes_total",
    "recycled_share",
    "seconds",
)


@dataclass
class MethodResult:
    """The rounds of one method so far."""

    compressor: Compressor
    planned_rounds: int
    rounds: list[Round] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The expression that builds the compressor."""
        return repr(self.compressor)

    @property
    def finished(self) -> bool:
        """Whether all rounds are there."""
        return len(self.rounds) == self.planned_rounds

    def final_accuracy(self, average: int = 1) -> float:
        """Return the mean accuracy of the last evaluations."""
        evaluated = [round_.accuracy for round_ in self.rounds if round_.evaluated][-average:]
        return sum(evaluated) / len(evaluated)

    def uplink_totals(self) -> list[int]:
        """Return the bytes sent up to and including each round."""
        totals, total = [], 0
        for round_ in self.rounds:
            total += round_.uplink_bytes
            totals.append(total)
        return totals

    def bytes_to(self, accuracy: float) -> int | None:
        """Return the bytes sent until this accuracy was first reached, or None."""
        for round_, total in zip(self.rounds, self.uplink_totals(), strict=True):
            if round_.accuracy >= accuracy:
                return total
        return None


def summarise(
    results: Sequence[MethodResult],
    dense_bytes_a_round: int,
    target: float | None,
    average: int = 1,
) -> list[dict[str, Any]]:
    """Return a row for each method with at least one round, as summary.json keeps it.

    The final accuracy is the mean of the last `average` evaluations.
    """
    rows = []
    for result in results:
        if not result.rounds:
            continue
        total = result.uplink_totals()[-1]
        rows.append(
            {
                "method": result.name,
                "finished": result.finished,
                "rounds": len(result.rounds),
                "final_accuracy": result.final_accuracy(average),
                "best_accuracy": max(r.accuracy for r in result.rounds),
                "uplink_bytes": total,
                "ratio_to_dense": total / (dense_bytes_a_round * len(result.rounds)),
                "recycled_share": sum(r.recycled_share for r in result.rounds) / len(result.rounds),
                "bytes_to_target": None if target is None else result.bytes_to(target),
                "seconds": sum(r.seconds for r in result.rounds),
            }
        )
        wire = [r.wire_bytes for r in result.rounds if r.wire_bytes is not None]
        if wire:
            rows[-1]["wire_bytes"] = sum(wire)
    return rows


def headings(rows: Sequence[dict[str, Any]], target: float | None) -> list[str]:
    """Return the headings of a table of `cells`."""
    until = "bytes to target" if target is None else f"bytes to {target:.1%}"
    wire = ["on the wire"] if any("wire_bytes" in row for row in rows) else []
    return ["method", "final accuracy", "best", "uplink", "of dense", "recycled", until, *wire]


def cells(row: dict[str, Any]) -> list[str]:
    """Write a row of `summarise` for a reader."""
    reached = row["bytes_to_target"]
    return [
        row["method"] + ("" if row["finished"] else f" (stopped at round {row['rounds']})"),
        f"{row['final_accuracy']:.2%}",
        f"{row['best_accuracy']:.2%}",
        human_bytes(row["uplink_bytes"]),
        f"{row['ratio_to_dense']:.2%}",
        f"{row['recycled_share']:.0%}",
        "not reached" if reached is None else human_bytes(reached),
        *([human_bytes(row["wire_bytes"])] if "wire_bytes" in row else []),
    ]


def write_rounds(folder: Path, results: Sequence[MethodResult]) -> None:
    """Write rounds.csv."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for result in results:
        for round_, total in zip(result.rounds, result.uplink_totals(), strict=True):
            accuracy, loss = f"{round_.accuracy:.6f}", f"{round_.loss:.6f}"
            recycled, seconds = f"{round_.recycled_share:.6f}", f"{round_.seconds:.4f}"
            sizes = (round_.uplink_bytes, total)
            writer.writerow((result.name, round_.number, accuracy, loss, *sizes, recycled, seconds))
    atomic_write(folder / "rounds.csv", text.getvalue().encode())


def write_files(
    folder: Path,
    results: Sequence[MethodResult],
    rows: Sequence[dict[str, Any]],
    about: dict[str, Any],
) -> None:
    """Write all of `FILES`; `about` is what summary.json says beside the methods."""
    write_rounds(folder, results)
    summary = json.dumps({**about, "methods": list(rows)}, indent=2) + "\n"
    atomic_write(folder / "summary.json", summary.encode())
    pictures = _draw([result for result in results if result.rounds], about)
    for name, data in pictures.items():
        atomic_write(folder / name, data)
    atomic_write(folder / "report.html", _page(rows, about, pictures).encode())


def _without_lbgm(compressor: Compressor) -> str:
    """Name the sparsifier below, so that it has one colour with and without LBGM."""
    while isinstance(compressor, (LBGM, ErrorFeedback)):
        compressor = compressor.inner
    return repr(compressor)


def styles(results: Sequence[MethodResult]) -> list[dict[str, Any]]:
    """Give each sparsifier a colour; solid is without LBGM, broken lines are with it."""
    from matplotlib import colormaps

    palette = colormaps["tab10"].colors
    families: list[str] = []
    used: dict[tuple[str, bool], int] = {}
    styles = []
    for result in results:
        family = _without_lbgm(result.compressor)
        if family not in families:
            families.append(family)
        under_lbgm = result.compressor.receiver_has_state
        variant = used.get((family, under_lbgm), 0)
        used[family, under_lbgm] = variant + 1
        lines = ("--", ":", "-.", (0, (1, 3))) if under_lbgm else ("-", (0, (8, 2)), (0, (5, 5)))
        styles.append(
            {
                "color": palette[families.index(family) % len(palette)],
                "linestyle": lines[variant % len(lines)],
                "linewidth": 1.8,
                "label": result.name + ("" if result.finished else " (interrupted)"),
            }
        )
    return styles


def tick(number: float, _: object) -> str:
    """Write a number of bytes at an axis."""
    value, unit = human_bytes(number).split()
    return f"{float(value):g} {unit}"


def _draw(results: Sequence[MethodResult], about: dict[str, Any]) -> dict[str, bytes]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.axes import Axes
    from matplotlib.ticker import FuncFormatter, PercentFormatter

    looks = styles(results)
    size = FuncFormatter(tick)

    def accuracy_vs_round(axes: Axes) -> None:
        for result, style in zip(results, looks, strict=True):
            axes.plot(
                range(1, len(result.rounds) + 1), [r.accuracy for r in result.rounds], **style
            )
        axes.set_xlabel("round")
        axes.set_ylabel("test accuracy")
        axes.yaxis.set_major_formatter(PercentFormatter(1))

    def accuracy_vs_uplink(axes: Axes) -> None:
        for result, style in zip(results, looks, strict=True):
            axes.plot(result.uplink_totals(), [r.accuracy for r in result.rounds], **style)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(size)
        axes.set_xlabel("uplink of all workers so far (log scale)")
        axes.set_ylabel("test accuracy")
        axes.yaxis.set_major_formatter(PercentFormatter(1))

    def uplink_per_round(axes: Axes) -> None:
        for result, style in zip(results, looks, strict=True):
            bytes_ = [r.uplink_bytes for r in result.rounds]
            axes.plot(range(1, len(bytes_) + 1), bytes_, **style)
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(size)
        axes.set_xlabel("round")
        axes.set_ylabel("uplink of all workers in the round (log scale)")

    drawers: list[Callable[[Axes], None]] = [
        accuracy_vs_round,
        accuracy_vs_uplink,
        uplink_per_round,
    ]
    pictures = {}
    for drawer in drawers:
        height = 4.8 + 0.2 * max(0, len(results) - 12)
        figure, axes = pyplot.subplots(figsize=(10, height), layout="constrained")
        drawer(axes)
        axes.set_title(textwrap.fill(about["title"], 90), fontsize=10, loc="left")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        figure.legend(loc="outside right upper", frameon=False, fontsize=8, handlelength=3)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=130)
        pyplot.close(figure)
        pictures[f"{drawer.__name__}.png"] = buffer.getvalue()
    return pictures


STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem;
       color: #222; background: #fff }
h1 { font-size: 1.6rem } h2 { font-size: 1.2rem; margin-top: 2rem }
table { border-collapse: collapse; width: 100%; font-size: .9rem }
th, td { padding: .35rem .6rem; border-bottom: 1px solid #ddd; text-align: right }
th:first-child, td:first-child { text-align: left; font-family: ui-monospace, monospace }
pre { background: #f5f5f5; padding: .8rem; overflow-x: auto; white-space: pre-wrap }
img { width: 100%; height: auto } .note { color: #a40 }
"""


def _page(rows: Sequence[dict[str, Any]], about: dict[str, Any], pictures: dict[str, bytes]) -> str:
    heads = headings(rows, about["target_accuracy"])
    body = [
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells(row)) + "</tr>"
        for row in rows
    ]
    options = "".join(
        f"<tr><td>{html.escape(name)}</td><td>{html.escape(str(value))}</td></tr>"
        for name, value in {**about["arguments"], **about["versions"]}.items()
    )
    images = "".join(
        f"<h2>{html.escape(name.removesuffix('.png').replace('_', ' ').capitalize())}</h2>"
        f'<img alt="{html.escape(name)}" '
        f'src="data:image/png;base64,{base64.b64encode(data).decode()}">'
        for name, data in pictures.items()
    )
    stopped = '<p class="note">Interrupted: what had finished by then.</p>'
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Uplink bytes against accuracy</title><style>{STYLE}</style>
<h1>Uplink bytes against accuracy</h1>
<p>{html.escape(about["title"])}</p>{stopped if about["interrupted"] else ""}
<table><tr>{"".join(f"<th>{html.escape(head)}</th>" for head in heads)}</tr>{"".join(body)}</table>
<p>Uplink is what the messages of all workers weigh; recycled is the share of tensors that were
sent as one look-back coefficient. Bytes on the wire, where an engine has one, are those of the
loopback interface: every message goes to every other worker, with headers and acknowledgements.</p>
{images}
<h2>Repeat it</h2><pre>{html.escape(about["command"])}</pre>
<h2>Arguments and versions</h2><table>{options}</table></html>
"""
