"""The results of a comparison: CSV and JSON files, pictures, and one page with all of them."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.common.plots import chart, line_styles, show_bytes, show_percent
from benchmarks.common.tables import write_csv
from benchmarks.common.training import Round
from lbgm_compress._util.files import atomic_write
from lbgm_compress._util.units import human_bytes
from lbgm_compress.algorithm import Algorithm

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "COLUMNS",
    "FILES",
    "MethodResult",
    "cells",
    "headings",
    "styles",
    "summarise",
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
    """The rounds that one method has finished."""

    compressor: Algorithm
    planned_rounds: int
    rounds: list[Round] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The expression that builds the compressor."""
        return repr(self.compressor)

    @property
    def finished(self) -> bool:
        """True if all rounds are finished."""
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
        """Return the bytes sent until this accuracy was first reached, or None if it was not."""
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
    """Return the cells of a row of `summarise`."""
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
    rows = [
        (
            *(result.name, round_.number, f"{round_.accuracy:.6f}", f"{round_.loss:.6f}"),
            *(round_.uplink_bytes, total),
            *(f"{round_.recycled_share:.6f}", f"{round_.seconds:.4f}"),
        )
        for result in results
        for round_, total in zip(result.rounds, result.uplink_totals(), strict=True)
    ]
    write_csv(folder / "rounds.csv", COLUMNS, rows)


def write_files(
    folder: Path,
    results: Sequence[MethodResult],
    rows: Sequence[dict[str, Any]],
    about: dict[str, Any],
) -> None:
    """Write all of `FILES`; `about` is the part of summary.json beside the methods."""
    write_rounds(folder, results)
    summary = json.dumps({**about, "methods": list(rows)}, indent=2) + "\n"
    atomic_write(folder / "summary.json", summary.encode())
    pictures = _draw([result for result in results if result.rounds], about["title"])
    for name, data in pictures.items():
        atomic_write(folder / name, data)
    atomic_write(folder / "report.html", _page(rows, about, pictures).encode())


def styles(results: Sequence[MethodResult]) -> list[dict[str, Any]]:
    """Return the line of each method; the label tells if it was interrupted."""
    looks = line_styles([result.compressor for result in results])
    for result, look in zip(results, looks, strict=True):
        look["label"] += "" if result.finished else " (interrupted)"
    return looks


def _draw(results: Sequence[MethodResult], title: str) -> dict[str, bytes]:
    """Return the pictures by file name."""
    looks = styles(results)

    def accuracy_vs_round(axes: Axes) -> None:
        for result, look in zip(results, looks, strict=True):
            numbers = range(1, len(result.rounds) + 1)
            axes.plot(numbers, [r.accuracy for r in result.rounds], **look)
        axes.set_xlabel("round")
        axes.set_ylabel("test accuracy")
        show_percent(axes.yaxis)

    def accuracy_vs_uplink(axes: Axes) -> None:
        for result, look in zip(results, looks, strict=True):
            axes.plot(result.uplink_totals(), [r.accuracy for r in result.rounds], **look)
        axes.set_xscale("log")
        show_bytes(axes.xaxis)
        axes.set_xlabel("uplink of all workers so far (log scale)")
        axes.set_ylabel("test accuracy")
        show_percent(axes.yaxis)

    def uplink_per_round(axes: Axes) -> None:
        for result, look in zip(results, looks, strict=True):
            sizes = [r.uplink_bytes for r in result.rounds]
            axes.plot(range(1, len(sizes) + 1), sizes, **look)
        axes.set_yscale("log")
        show_bytes(axes.yaxis)
        axes.set_xlabel("round")
        axes.set_ylabel("uplink of all workers in the round (log scale)")

    drawn = (accuracy_vs_round, accuracy_vs_uplink, uplink_per_round)
    return {f"{fill.__name__}.png": chart(fill, title, len(results)) for fill in drawn}


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
    stopped = '<p class="note">Interrupted: only finished rounds are shown.</p>'
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Uplink bytes against accuracy</title><style>{STYLE}</style>
<h1>Uplink bytes against accuracy</h1>
<p>{html.escape(about["title"])}</p>{stopped if about["interrupted"] else ""}
<table><tr>{"".join(f"<th>{html.escape(head)}</th>" for head in heads)}</tr>{"".join(body)}</table>
<p>Uplink is the size of the messages of all workers. Recycled is the share of tensors that were
sent as one look-back coefficient. Bytes on the wire, for engines that have one, are those of the
loopback interface: every message goes to every other worker, with headers and acknowledgements.</p>
{images}
<h2>Repeat it</h2><pre>{html.escape(about["command"])}</pre>
<h2>Arguments and versions</h2><table>{options}</table></html>
"""
