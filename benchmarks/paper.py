"""The experiments of the paper (arXiv 2202.00280), each one figure made of runs of compare.py.

A figure has a column for every setting and, as in the paper, three rows: accuracy by round, uplink
by round, accuracy by uplink. Runs are kept by setting and method, so that figures share them and a
figure that was stopped goes on where it was.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import shlex
import sys
import tempfile
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if not __package__:  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from rich.console import Console
from rich.table import Table

from benchmarks import compare
from benchmarks.common.command_line import INTERRUPTED, Parser, check_folder
from benchmarks.common.report import COLUMNS, MethodResult, styles, tick
from benchmarks.common.training import Round
from lbgm_compress import (
    LBGM,
    Atomo,
    Compressor,
    ErrorFeedback,
    Identity,
    LookBackSubspace,
    NormBudget,
    SignSGD,
    TopK,
)
from lbgm_compress._util.files import atomic_write
from lbgm_compress._util.units import human_bytes

DENSE, LOOK_BACK = Identity(), LBGM()
TOP, ATOMO, SIGNS = TopK(0.1), Atomo(2), SignSGD(scaled=True)
SUBSPACE = ErrorFeedback(LookBackSubspace(values="int4"))
# Rounds whose mean is drawn in the row of uplink.
SMOOTHED = 4
DELTAS = (0.01, 0.05, 0.1, 0.2, 0.5, 0.9)


@dataclass(frozen=True)
class Setting:
    """What all methods of a column have in common: arguments of compare.py."""

    dataset: str
    model: str
    partition: str = "iid"
    lr: float = 0.01
    rounds: int = 200
    workers: int = 100
    participation: float = 1.0
    engine: str = "process"
    images: int | None = None
    """Of each worker; None for all, or what the CPU has time for."""

    @property
    def name(self) -> str:
        """The name of its folder."""
        parts = [self.dataset, self.model, self.partition.replace(":", "-"), f"lr-{self.lr:g}"]
        if self.participation < 1:
            parts.append(f"sampled-{self.participation:g}")
        if self.engine != "process":
            parts.append(f"{self.engine}-{self.workers}")
        if self.images:
            parts.append(f"images-{self.images}")
        return "-".join(parts)

    @property
    def title(self) -> str:
        """The heading of its column, but for what a device leaves out."""
        split = {"iid": "iid", "classes:3": "3 classes a worker"}[self.partition]
        sampled = f", {self.participation:.0%} a round" if self.participation < 1 else ""
        rate = "" if self.model == "linear" and self.engine == "process" else f", lr {self.lr:g}"
        return f"{self.dataset}, {self.model}{rate}\n{self.workers} workers, {split}{sampled}"

    def arguments(self, device: str, quick: bool) -> list[str]:
        """Return the command line of compare.py, without methods and folder.

        On the CPU the cnn has fewer images: a full round of it takes ten seconds on two cores.
        """
        if self.engine != "process":
            device = "cpu"
        values: dict[str, Any] = {
            "dataset": self.dataset,
            "model": self.model,
            "partition": self.partition,
            "workers": self.workers,
            "rounds": self.rounds,
            "lr": self.lr,
        }
        if self.participation < 1:
            values["participation"] = self.participation
        if self.engine != "process":
            values["engine"] = self.engine
        if device != "cpu":
            values["device"] = device
        if self.images:
            values["images"] = self.images
            values["evaluate-every"] = 10
        elif self.model != "linear" and device == "cpu":
            values["images"] = 2000 // self.workers
            values["test-images"] = 2000
            values["evaluate-every"] = 4
        elif self.model != "linear":
            values["rounds"] = 5 * self.rounds
            values["evaluate-every"] = 4
        if quick:
            values.update({"dataset": "digits", "rounds": 4, "images": 30, "test-images": 100})
            values["workers"] = 2 if self.engine != "process" else 6
            values["model"] = "linear" if self.model == "linear" else "small-cnn"
        return [part for name, value in values.items() for part in (f"--{name}", str(value))]


Column = tuple[Setting, Sequence[Compressor]]


def _settings(dataset: str, model: str, **changes: Any) -> tuple[Setting, Setting]:
    """Return the setting with iid workers, and that with three classes a worker."""
    if model == "cnn":
        changes = {"lr": 0.03, "rounds": 60, **changes}
    iid = Setting(dataset, model, **changes)
    return iid, dataclasses.replace(iid, partition="classes:3")


FASHION, FASHION_CNN = _settings("fashion-mnist", "linear"), _settings("fashion-mnist", "cnn")
MNIST, MNIST_CNN = _settings("mnist", "linear"), _settings("mnist", "cnn")


def _columns(settings: Iterable[Setting], methods: Iterable[Compressor]) -> list[Column]:
    return [(setting, tuple(methods)) for setting in settings]


# The pages of each figure.
FIGURES: dict[str, dict[str, list[Column]]] = {
    "standalone": {
        "linear": _columns((*MNIST, *FASHION), (DENSE, LOOK_BACK)),
        "cnn": _columns((*MNIST_CNN, *FASHION_CNN), (DENSE, LOOK_BACK)),
        "cnn-slow": _columns(
            _settings("fashion-mnist", "cnn", lr=0.01, rounds=100), (DENSE, LOOK_BACK)
        ),
        "cnn-long": _columns(
            _settings("fashion-mnist", "cnn", images=100, rounds=200)[:1],
            (DENSE, LOOK_BACK),
        ),
    },
    "threshold": {
        "linear": _columns(FASHION, (DENSE, *(LBGM(delta=delta) for delta in DELTAS))),
        "cnn": _columns(FASHION_CNN[:1], (DENSE, *(LBGM(delta=delta) for delta in DELTAS))),
    },
    "stacked": {
        "mnist": _columns(MNIST, (DENSE, TOP, LBGM(TOP), ATOMO, LBGM(ATOMO))),
        "fashion-mnist": _columns(
            (*FASHION, *FASHION_CNN), (DENSE, TOP, LBGM(TOP), ATOMO, LBGM(ATOMO))
        ),
    },
    "sampled": {
        model: _columns(
            [
                dataclasses.replace(setting, participation=share)
                for setting in settings
                for share in (0.5, 0.1)
            ],
            (DENSE, LOOK_BACK, LBGM(TOP)),
        )
        for model, settings in (("linear", FASHION), ("cnn", FASHION_CNN))
    },
    "distributed": {
        "ddp": [
            (dataclasses.replace(setting, workers=8, engine="ddp"), (DENSE, SIGNS, LBGM(SIGNS)))
            for setting in (*FASHION, *FASHION_CNN[:1])
        ]
    },
    "options": {
        "compare": [
            *_columns(
                FASHION[:1],
                (
                    *(TOP, LBGM(TOP), LBGM(TOP, compare="raw")),
                    *(TopK(0.01), LBGM(TopK(0.01)), LBGM(TopK(0.01), compare="raw")),
                    *(ATOMO, LBGM(ATOMO), LBGM(ATOMO, compare="raw")),
                    *(SIGNS, LBGM(SIGNS), LBGM(SIGNS, compare="raw")),
                ),
            ),
            *_columns(
                FASHION_CNN[:1],
                (
                    *(TOP, LBGM(TOP), LBGM(TOP, compare="raw")),
                    *(ATOMO, LBGM(ATOMO), LBGM(ATOMO, compare="raw")),
                ),
            ),
        ],
        "budget": [
            *_columns(
                FASHION[:1],
                (
                    DENSE,
                    *(LBGM(delta=delta) for delta in (0.05, 0.2, 0.5)),
                    *(LBGM(delta=NormBudget(budget)) for budget in (0.1, 0.3, 1.0)),
                ),
            ),
            *_columns(
                FASHION_CNN[:1],
                (
                    DENSE,
                    *(LBGM(delta=delta) for delta in (0.05, 0.2, 0.5)),
                    *(LBGM(delta=NormBudget(budget)) for budget in (0.1, 0.3, 1.0)),
                ),
            ),
        ],
    },
    "rivals": {
        "all": _columns(
            (*FASHION, *FASHION_CNN),
            (
                *(DENSE, LOOK_BACK, LBGM(TOP), LBGM(ATOMO), LBGM(SIGNS)),
                *(ErrorFeedback(TopK(0.01)), ErrorFeedback(ATOMO), SUBSPACE),
            ),
        )
    },
}


# --- what is kept of a setting ------------------------------------------------------------------


def _rows(folder: Path) -> list[dict[str, str]]:
    file = folder / "rounds.csv"
    if not file.exists():
        return []
    with file.open(newline="") as lines:
        return list(csv.DictReader(lines))


def _summary(folder: Path) -> dict[str, Any]:
    file = folder / "summary.json"
    kept: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {"methods": []}
    return kept


def write_csv(file: Path, columns: Sequence[str], rows: Iterable[dict[str, str]]) -> None:
    """Write rows whole or not at all."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    atomic_write(file, text.getvalue().encode())


def keep(found: Path, folder: Path) -> None:
    """Add the finished methods of a run of compare.py to what is kept of the setting."""
    summary = _summary(found)
    finished = [row for row in summary["methods"] if row["finished"]]
    if not finished:
        return
    folder.mkdir(parents=True, exist_ok=True)
    names = {row["method"] for row in finished}
    rows = [row for row in _rows(folder) if row["method"] not in names]
    rows += [row for row in _rows(found) if row["method"] in names]
    methods = [row for row in _summary(folder)["methods"] if row["method"] not in names] + finished
    for row in methods:
        # They depend on which methods ran beside it.
        row.pop("bytes_to_target", None)
    # What depends on one run alone would say little about all of them.
    arguments = {k: v for k, v in summary["arguments"].items() if k not in ("out", "methods")}
    versions = {name: of for name, of in summary["versions"].items() if name != "platform"}
    kept = {"title": summary["title"], "arguments": arguments, "versions": versions}
    given = " ".join(f"--{name} {value}" for name, value in arguments.items() if value is not False)
    listed = ", ".join(row["method"] for row in methods)
    kept["command"] = f"python benchmarks/compare.py {given} --methods {shlex.quote(listed)}"
    write_csv(folder / "rounds.csv", COLUMNS, rows)
    atomic_write(
        folder / "summary.json",
        (json.dumps({**kept, "methods": methods}, indent=1) + "\n").encode(),
    )


def place(folder: Path, setting: Setting, device: str) -> Path:
    """Return where a setting's runs are kept; those of the full size are others."""
    return folder / f"{setting.name}{_suffix(device)}"


def _suffix(device: str) -> str:
    return "" if device == "cpu" else "-full"


def heading(folder: Path, setting: Setting, device: str) -> str:
    """Return the heading of its column."""
    images = _summary(place(folder, setting, device)).get("arguments", {}).get("images")
    return f"{setting.title}\n{images} images each" if images else setting.title


def results_of(folder: Path, methods: Iterable[Compressor]) -> list[MethodResult]:
    """Read the rounds of these methods, as far as they are kept."""
    rows: dict[str, list[Round]] = {}
    arguments = _summary(folder).get("arguments", {})
    every, last = int(arguments.get("evaluate-every", 1)), int(arguments.get("rounds", 0))
    for row in _rows(folder):
        number = int(row["round"])
        rows.setdefault(row["method"], []).append(
            Round(
                number,
                float(row["accuracy"]),
                float(row["loss"]),
                int(row["uplink_bytes"]),
                float(row["recycled_share"]),
                float(row["seconds"]),
                evaluated=number in (1, last) or number % every == 0,
            )
        )
    return [
        MethodResult(method, len(rows[repr(method)]), rows[repr(method)])
        for method in methods
        if repr(method) in rows
    ]


# --- pictures and tables ------------------------------------------------------------------------


def _looks(results: Sequence[MethodResult]) -> dict[str, dict[str, Any]]:
    """Give each method a line; thresholds of one LBGM, which are many, the shades of a scale."""
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
        # Neither as dark as black nor as bright as paper, and no colour in both.
        shades, first, span = (
            (colormaps["autumn"], 0.0, 0.6) if budget else (colormaps["viridis"], 0.2, 0.7)
        )
        for i, name in enumerate(names):
            colour = shades(first + span * i / max(1, len(names) - 1))
            looks[name].update(color=colour, linestyle=":" if budget else "--")
    for result in results:
        if not result.compressor.receiver_has_state:
            # Broad and behind the others, so that those that lie on it are seen.
            looks[result.name].update(color="0.75", linewidth=4, zorder=1)
    return looks


def draw(file: Path, columns: Sequence[tuple[str, list[MethodResult]]], title: str) -> None:
    """Draw one page: a column a setting; accuracy by round, uplink by round, accuracy by uplink."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, PercentFormatter

    every = {result.name: result for _, results in columns for result in results}
    style_of = _looks(list(every.values()))
    across = 2 if len(columns) < 3 else 3
    lines = -(-len(every) // across)
    figure, grid = pyplot.subplots(
        3,
        len(columns),
        figsize=(max(7.5, 3.6 * len(columns)), 8.2 + 0.22 * lines),
        layout="constrained",
        squeeze=False,
    )
    for column, (heading, results) in zip(grid.T, columns, strict=True):
        by_round, uplink, by_uplink = column
        by_round.set_title(heading + ("" if results else "\n(not run)"), fontsize=9)
        for result in results:
            style = style_of[result.name]
            told = [r for r in result.rounds if r.evaluated]
            totals = result.uplink_totals()
            accuracy = [r.accuracy for r in told]
            by_round.plot([r.number for r in told], accuracy, **style)
            by_uplink.plot([totals[r.number - 1] for r in told], accuracy, **style)
            # LBGM pays in bursts: round by round, many methods would hide each other.
            numbers = range(SMOOTHED, len(totals) + 1)
            before = [0, *totals]
            means = [(before[n] - before[n - SMOOTHED]) / SMOOTHED for n in numbers]
            uplink.plot(numbers, means, **style)
        by_round.set_xlabel("round")
        uplink.set_xlabel("round")
        uplink.set_yscale("log")
        uplink.yaxis.set_major_locator(LogLocator(subs=(1, 3), numticks=12))
        uplink.yaxis.set_major_formatter(FuncFormatter(tick))
        uplink.yaxis.set_minor_formatter(NullFormatter())
        by_uplink.set_xscale("log")
        by_uplink.xaxis.set_major_locator(LogLocator(numticks=6))
        by_uplink.xaxis.set_major_formatter(FuncFormatter(tick))
        by_uplink.xaxis.set_minor_formatter(NullFormatter())
        by_uplink.set_xlabel("uplink of all workers so far")
        for axes in (by_round, by_uplink):
            axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        for axes in column:
            axes.grid(alpha=0.3)
            axes.spines[["top", "right"]].set_visible(False)
            axes.tick_params(labelsize=8)
    for axes, label in zip(
        grid[:, 0],
        ("test accuracy", f"uplink a round, mean of {SMOOTHED}", "test accuracy"),
        strict=True,
    ):
        axes.set_ylabel(label)
    figure.suptitle(textwrap.fill(title, 30 * len(columns) + 30), fontsize=10, x=0.01, ha="left")
    handles, labels = [], []
    for axes in grid[0]:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            if label not in labels:
                handles.append(handle)
                labels.append(label)
    figure.legend(
        handles,
        labels,
        loc="outside lower left",
        ncols=across,
        frameon=False,
        fontsize=8,
        handlelength=3,
    )
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    pyplot.close(figure)
    atomic_write(file, buffer.getvalue())


HEADINGS = ("setting", "method", "final accuracy", "best", "uplink", "of dense", "recycled")


def rows_of(folder: Path, columns: Sequence[Column], device: str) -> list[dict[str, str]]:
    """Return what each method of each setting came to."""
    rows = []
    for setting, methods in columns:
        kept = {row["method"]: row for row in _summary(place(folder, setting, device))["methods"]}
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
    """Lay out `rows_of` for a reader."""
    table = Table(title=title)
    for heading in HEADINGS:
        left = heading in ("setting", "method")
        table.add_column(heading, justify="left" if left else "right", no_wrap=heading == "method")
    for row in rows:
        table.add_row(
            row["setting"],
            row["method"],
            f"{float(row['final accuracy']):.2%}",
            f"{float(row['best']):.2%}",
            human_bytes(int(row["uplink"])),
            f"{float(row['of dense']):.2%}",
            f"{float(row['recycled']):.0%}",
        )
    return table


# --- the command --------------------------------------------------------------------------------


def build_parser() -> Parser:
    """Build the command line."""
    parser = Parser("paper.py", __doc__.split("\n\n")[0])
    add = parser.add_argument
    add("figure", choices=FIGURES, metavar="FIGURE", help=f"one of {', '.join(FIGURES)}")
    add(
        "--quick",
        action="store_true",
        help="a smoke run: digits, few workers, four rounds (default: off)",
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
        help="folder for the results; what is there is not run again (default: paper-results)",
    )
    return parser


def check_kept(options: Any, columns: Sequence[Column], folder: Path) -> None:
    """Raise `ValueError` if what is kept was run with other arguments."""
    parser = compare.build_parser()
    for setting, methods in columns:
        where = place(folder, setting, options.device)
        kept = _summary(where).get("arguments")
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
    """Run what is missing, and return compare.py's exit status."""
    for setting, methods in columns:
        if options.only not in setting.name:
            continue
        where = place(folder, setting, options.device)
        kept = {row["method"] for row in _summary(where)["methods"]}
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
        parser.error(f"--only {options.only}: no setting is called so, there are {names}")
    try:
        check_kept(options, columns, folder)
    except ValueError as error:
        parser.error(str(error))
    status = run(options, columns, folder)
    console = Console(width=None if sys.stdout.isatty() else 140)
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
            console.print(f"Drawn: {picture}", soft_wrap=True)
    rows = rows_of(folder, columns, options.device)
    write_csv(folder / f"{options.figure}{_suffix(options.device)}.csv", HEADINGS, rows)
    console.print(table_of(rows, options.figure))
    return status


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
