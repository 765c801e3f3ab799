"""Measure what the figures of the LBGM paper (arXiv 2202.00280) show.

Every figure is made of runs of compare.py. A picture has a column for every setting and, as in the
paper, three rows: accuracy by round, uplink by round, accuracy by uplink. Runs are kept by setting
and method, so that figures share them, and an interrupted figure can be continued.
"""

from __future__ import annotations

import sys
import tempfile
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __name__ == "__main__" and __spec__ is None:  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from rich.table import Table

from benchmarks import compare
from benchmarks.common.command_line import INTERRUPTED, Parser, check_folder, start
from benchmarks.common.kept_runs import keep, results_of, summary_of
from benchmarks.common.paper_figures import FIGURES, Column, Setting
from benchmarks.common.plots import png, show_bytes, subplots, tidy
from benchmarks.common.report import MethodResult, styles
from benchmarks.common.tables import console, make_table, write_csv
from lbgm_compress import LBGM, NormBudget
from lbgm_compress._util.files import atomic_write
from lbgm_compress._util.units import human_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Rounds whose mean is drawn in the row of uplink.
SMOOTHED = 4


# --- where the runs of a setting are kept --------------------------------------------------------


def place(folder: Path, setting: Setting, device: str) -> Path:
    """Return the folder of a setting's runs; runs of the full size have their own."""
    return folder / f"{setting.name}{_suffix(device)}"


def _suffix(device: str) -> str:
    return "" if device == "cpu" else "-full"


def heading(folder: Path, setting: Setting, device: str) -> str:
    """Return the heading of a setting's column."""
    images = summary_of(place(folder, setting, device)).get("arguments", {}).get("images")
    return f"{setting.title}\n{images} images each" if images else setting.title


# --- pictures and tables ------------------------------------------------------------------------


def _looks(results: Sequence[MethodResult]) -> dict[str, dict[str, Any]]:
    """Return the line of each method, by name.

    LBGM with three thresholds or more around one compressor has the shades of a colour scale.
    """
    from matplotlib import colormaps

    looks = dict(zip((r.name for r in results), styles(results), strict=True))
    scales: dict[tuple[str, bool], list[str]] = {}
    for result in results:
        method = result.compressor
        if isinstance(method, LBGM):
            kind = repr(method.inner), isinstance(method.delta, NormBudget)
            scales.setdefault(kind, []).append(result.name)
    if max(map(len, scales.values()), default=0) < 3:
        return looks
    for (_, budget), names in scales.items():
        # Neither too dark nor too bright, and no colour is in both scales.
        shades, first, span = (
            (colormaps["autumn"], 0.0, 0.6) if budget else (colormaps["viridis"], 0.2, 0.7)
        )
        for i, name in enumerate(names):
            colour = shades(first + span * i / max(1, len(names) - 1))
            looks[name].update(color=colour, linestyle=":" if budget else "--")
    for result in results:
        if not result.compressor.receiver_has_state:
            # Broad and behind the others, so that lines on top of it can be seen.
            looks[result.name].update(color="0.75", linewidth=4, zorder=1)
    return looks


def draw(file: Path, columns: Sequence[tuple[str, list[MethodResult]]], title: str) -> None:
    """Draw a page with a column for each heading and its results."""
    every = {result.name: result for _, results in columns for result in results}
    looks = _looks(list(every.values()))
    across = 2 if len(columns) < 3 else 3
    lines = -(-len(every) // across)
    size = max(7.5, 3.6 * len(columns)), 8.2 + 0.22 * lines
    figure, grid = subplots(3, len(columns), size)
    for column, (heading, results) in zip(grid.T, columns, strict=True):
        column[0].set_title(heading + ("" if results else "\n(not run)"), fontsize=9)
        _draw_column(column, results, looks)
    labels = ("test accuracy", f"uplink a round, mean of {SMOOTHED}", "test accuracy")
    for axes, label in zip(grid[:, 0], labels, strict=True):
        axes.set_ylabel(label)
    figure.suptitle(textwrap.fill(title, 30 * len(columns) + 30), fontsize=10, x=0.01, ha="left")
    handles: dict[str, Any] = {}
    for axes in grid[0]:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.legend(
        handles.values(),
        handles,
        loc="outside lower left",
        ncols=across,
        frameon=False,
        fontsize=8,
        handlelength=3,
    )
    atomic_write(file, png(figure, dpi=110))


def _draw_column(
    column: Sequence[Axes], results: Sequence[MethodResult], looks: dict[str, dict[str, Any]]
) -> None:
    """Draw accuracy by round, uplink by round, and accuracy by uplink."""
    from matplotlib.ticker import LogLocator, NullFormatter, PercentFormatter

    by_round, uplink, by_uplink = column
    for result in results:
        look = looks[result.name]
        evaluated = [r for r in result.rounds if r.evaluated]
        totals = result.uplink_totals()
        accuracy = [r.accuracy for r in evaluated]
        by_round.plot([r.number for r in evaluated], accuracy, **look)
        by_uplink.plot([totals[r.number - 1] for r in evaluated], accuracy, **look)
        # LBGM sends in bursts: without smoothing, many methods would hide each other.
        numbers = range(SMOOTHED, len(totals) + 1)
        before = [0, *totals]
        means = [(before[n] - before[n - SMOOTHED]) / SMOOTHED for n in numbers]
        uplink.plot(numbers, means, **look)
    by_round.set_xlabel("round")
    uplink.set_xlabel("round")
    uplink.set_yscale("log")
    uplink.yaxis.set_major_locator(LogLocator(subs=(1, 3), numticks=12))
    by_uplink.set_xscale("log")
    by_uplink.xaxis.set_major_locator(LogLocator(numticks=6))
    by_uplink.set_xlabel("uplink of all workers so far")
    for axis in (uplink.yaxis, by_uplink.xaxis):
        show_bytes(axis)
        axis.set_minor_formatter(NullFormatter())
    for axes in (by_round, by_uplink):
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    for axes in column:
        tidy(axes)
        axes.tick_params(labelsize=8)


HEADINGS = ("setting", "method", "final accuracy", "best", "uplink", "of dense", "recycled")


def rows_of(folder: Path, columns: Sequence[Column], device: str) -> list[dict[str, str]]:
    """Return the results of each method in each setting, by heading."""
    rows = []
    for setting, methods in columns:
        kept = {row["method"]: row for row in summary_of(place(folder, setting, device))["methods"]}
        for method in map(repr, methods):
            if method in kept:
                row = kept[method]
                values = (
                    setting.name,
                    method,
                    f"{row['final_accuracy']:.4f}",
                    f"{row['best_accuracy']:.4f}",
                    str(row["uplink_bytes"]),
                    f"{row['ratio_to_dense']:.6f}",
                    f"{row['recycled_share']:.4f}",
                )
                rows.append(dict(zip(HEADINGS, values, strict=True)))
    return rows


def table_of(rows: Sequence[dict[str, str]], title: str) -> Table:
    """Return `rows_of` as a table."""
    cells = [
        (
            row["setting"],
            row["method"],
            f"{float(row['final accuracy']):.2%}",
            f"{float(row['best']):.2%}",
            human_bytes(int(row["uplink"])),
            f"{float(row['of dense']):.2%}",
            f"{float(row['recycled']):.0%}",
        )
        for row in rows
    ]
    return make_table(title, HEADINGS, cells, left=("method",), whole="method")


# --- the command --------------------------------------------------------------------------------


def build_parser() -> Parser:
    """Return the parser of the command line."""
    parser = Parser("paper.py", __doc__)
    add = parser.add_argument
    add("figure", choices=FIGURES, metavar="FIGURE", help=f"one of {', '.join(FIGURES)}")
    add(
        "--quick",
        action="store_true",
        help="a smoke test: digits, few workers, four rounds (default: off)",
    )
    add("--data-dir", metavar="DIR", help="folder of Fashion-MNIST's IDX files, as for compare.py")
    add(
        "--device",
        default="cpu",
        help="cpu, or cuda for all images and five times the rounds of the cnn (default: cpu)",
    )
    add("--seed", type=int, default=0, help="seed of everything random (default: 0)")
    add(
        "--only",
        metavar="TEXT",
        default="",
        help="train only in settings whose name contains this (default: all)",
    )
    add(
        "--out",
        default="paper-results",
        metavar="DIR",
        help="folder for the results; runs that it holds are not done again "
        "(default: paper-results)",
    )
    return parser


def check_kept(options: Any, columns: Sequence[Column], folder: Path) -> None:
    """Raise `ValueError` if kept runs had other arguments."""
    parser = compare.build_parser()
    for setting, methods in columns:
        where = place(folder, setting, options.device)
        kept = summary_of(where).get("arguments")
        if kept is None:
            continue
        asked = parser.parse_args(
            [
                *setting.arguments(options.device, options.quick),
                *("--seed", str(options.seed), "--methods", repr(methods[0])),
            ]
        )
        for name, value in compare.arguments_of(asked).items():
            if name not in ("methods", "out", "data-dir") and kept.get(name) != value:
                raise ValueError(
                    f"--out {folder}: {where.name} was run with --{name} {kept.get(name)}, and not "
                    f"with {value}: take another folder"
                )


def run(options: Any, columns: Sequence[Column], folder: Path) -> int:
    """Do the missing runs, and return the exit status of compare.py."""
    for setting, methods in columns:
        if options.only not in setting.name:
            continue
        where = place(folder, setting, options.device)
        kept = {row["method"] for row in summary_of(where)["methods"]}
        missing = [method for method in methods if repr(method) not in kept]
        if not missing:
            continue
        with tempfile.TemporaryDirectory() as found:
            arguments = setting.arguments(options.device, options.quick)
            arguments += ["--seed", str(options.seed), "--methods", ", ".join(map(repr, missing))]
            asked = options.data_dir is not None and not options.quick
            if asked and setting.dataset == "fashion-mnist":
                arguments += ["--data-dir", options.data_dir]
            status = compare.main([*arguments, "--out", found])
            if status in (0, INTERRUPTED):
                keep(Path(found), where)
            if status:
                return status
    return 0


def main(arguments: list[str]) -> int:
    """Run the command line and return the exit status."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    folder = Path(options.out)
    try:
        check_folder(folder)
    except ValueError as error:
        parser.error(str(error))
    pages = FIGURES[options.figure]
    columns = [column for page in pages.values() for column in page]
    if not any(options.only in setting.name for setting, _ in columns):
        names = ", ".join(dict.fromkeys(setting.name for setting, _ in columns))
        parser.error(f"--only {options.only}: no setting has such a name; there are {names}")
    try:
        check_kept(options, columns, folder)
    except ValueError as error:
        parser.error(str(error))
    status = run(options, columns, folder)
    printer = console()
    for page, drawn in pages.items():
        results = [
            (
                heading(folder, setting, options.device),
                results_of(place(folder, setting, options.device), methods),
            )
            for setting, methods in drawn
        ]
        if any(found for _, found in results):
            picture = folder / f"{options.figure}-{page}{_suffix(options.device)}.png"
            title = f"{options.figure}, {page}: server momentum 0.9, seed {options.seed}"
            draw(picture, results, title)
            printer.print(f"Drawn: {picture}", soft_wrap=True)
    rows = rows_of(folder, columns, options.device)
    file = folder / f"{options.figure}{_suffix(options.device)}.csv"
    write_csv(file, HEADINGS, [row.values() for row in rows])
    printer.print(table_of(rows, options.figure))
    return status


if __name__ == "__main__":
    start(main)
