"""Draw accuracy against uplink bytes for every method, over settings from full to small batches.

A run is one setting, model, method and seed. Every finished run is kept in frontier.csv, and is
not done again: a run of this program that was stopped goes on where it was.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import csv
import dataclasses
import functools
import multiprocessing
import os
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

if not __package__:  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from benchmarks.common.baselines import PowerSGD
from benchmarks.common.command_line import INTERRUPTED, Parser, check_folder, listed
from benchmarks.common.data import Dataset, DatasetMissing, load, load_plays
from benchmarks.common.engines.running import running
from benchmarks.common.models import parameters
from benchmarks.common.partition import partition, subsets
from benchmarks.common.training import Round, Training, run
from lbgm_compress import (
    LBGM,
    Atomo,
    Compressor,
    ErrorFeedback,
    Identity,
    LookBackSubspace,
    SignSGD,
    TopK,
)
from lbgm_compress.compressors.parse import parse_compressor

TEST_IMAGES = 4000
EVALUATIONS = 20
# A run's accuracy is the mean of this many evaluations, the last ones.
AVERAGED = 4
MARGIN = 0.005


def written(*compressors: Compressor) -> tuple[str, ...]:
    """Return the expressions that build compressors."""
    return tuple(map(repr, compressors))


def subspace(rank: int, delta: float) -> Compressor:
    """Return a look-back subspace with error feedback, in few bits."""
    inner = LookBackSubspace(rank, delta, values="int4", directions="int2")
    return ErrorFeedback(inner)


SIGN = ErrorFeedback(SignSGD(scaled=True))
DENSE = repr(Identity())
TOPK = written(*(ErrorFeedback(TopK(ratio, "int8")) for ratio in (0.003, 0.01, 0.03, 0.1)))
COARSE_TOPK = written(*(ErrorFeedback(TopK(ratio, "int2")) for ratio in (0.01, 0.03, 0.1)))
ATOMO = written(*(ErrorFeedback(Atomo(rank)) for rank in (1, 2, 4, 8)))
LOOK_BACK = written(
    LBGM(delta=0.5),
    LBGM(ErrorFeedback(TopK(0.01, "int8")), delta=0.5),
    LBGM(SIGN, delta=0.5),
    LBGM(ErrorFeedback(Atomo(2)), delta=0.5),
)
SUBSPACES = written(
    *(subspace(rank, 0.9) for rank in (1, 2, 4, 8)),
    *(subspace(rank, 0.8) for rank in (4, 8)),
    *(ErrorFeedback(LookBackSubspace(rank, 0.9, values="int4")) for rank in (4, 8)),
    ErrorFeedback(LookBackSubspace(8, 0.7, refresh=2, values="int4")),
    ErrorFeedback(LookBackSubspace(12, 0.7, refresh=2, values="int4")),
    ErrorFeedback(LookBackSubspace(16, 0.5, refresh=4, values="int4")),
    ErrorFeedback(LookBackSubspace(8, 0.5, refresh=8, values="int4")),
    ErrorFeedback(LookBackSubspace(4, 0.9, values="int8")),
    ErrorFeedback(LookBackSubspace(4, 0.9, values="int2")),
    ErrorFeedback(LookBackSubspace(8, 0.1, view="flat", values="int8")),
)
POWER_SGD = ("PowerSGD(rank=1)", "PowerSGD(rank=2)", "PowerSGD(rank=4)")
ALL = (DENSE, *TOPK, *COARSE_TOPK, repr(SIGN), *ATOMO, *LOOK_BACK, *SUBSPACES)
# For the models that take long.
FEW = (DENSE, *TOPK[1:], *COARSE_TOPK, *SUBSPACES[2:4], *SUBSPACES[7:12])
# Families in the pictures, the first that a method's text contains.
FAMILIES = {
    "LookBackSubspace": ("tab:red", "o"),
    "LBGM": ("tab:purple", "s"),
    "TopK": ("tab:blue", "^"),
    "Atomo": ("tab:green", "D"),
    "SignSGD": ("tab:orange", "v"),
    "PowerSGD": ("tab:brown", "P"),
    "Identity": ("black", "*"),
}


@dataclass(frozen=True)
class Setting:
    """How workers train, all methods alike."""

    title: str
    rounds: dict[str, int]
    """By model."""
    workers: int = 10
    images: dict[str, int] = field(default_factory=lambda: {"fcn": 600, "small-cnn": 400})
    """Training images of a worker, by model."""
    partition: str = "iid"
    local_steps: int = 1
    batch_size: int | None = None
    lr: float = 0.05
    server_momentum: float = 0.0
    data_parallel: bool = False


LOCAL = {"local_steps": 10, "batch_size": 20}
PARALLEL = {
    "workers": 4,
    "images": {"fcn": 15_000, "small-cnn": 15_000},
    "lr": 0.02,
    "server_momentum": 0.9,
    "data_parallel": True,
}
SETTINGS = {
    "full-batch": Setting(
        "one full-batch step a round, 3 classes a worker, 10 workers, server momentum 0.9",
        {"fcn": 150, "small-cnn": 100},
        partition="classes:3",
        lr=0.02,
        server_momentum=0.9,
    ),
    "local-iid": Setting(
        "10 local steps of 20 images, iid, 10 workers", {"fcn": 100, "small-cnn": 100}, **LOCAL
    ),
    "local-3-classes": Setting(
        "10 local steps of 20 images, 3 classes a worker, 10 workers",
        {"fcn": 100, "small-cnn": 100},
        partition="classes:3",
        **LOCAL,
    ),
    "large-batch": Setting(
        "data-parallel, 4 workers with batches of 256, momentum 0.9",
        {"fcn": 300, "small-cnn": 100},
        batch_size=256,
        **PARALLEL,
    ),
    "small-batch": Setting(
        "data-parallel, 4 workers with batches of 32, momentum 0.9",
        {"fcn": 600, "small-cnn": 300},
        batch_size=32,
        **PARALLEL,
    ),
    "text": Setting(
        "a transformer on Shakespeare's plays, one a worker, 10 local steps of 10 x 32 characters, "
        "server momentum 0.9",
        {"transformer": 40},
        local_steps=10,
        batch_size=10,
        lr=0.5,
        server_momentum=0.9,
    ),
}


class Run(NamedTuple):
    """What is run by itself, and resumed by."""

    setting: str
    model: str
    method: str
    seed: int


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
        """What it belongs to."""
        return Run(self.setting, self.model, self.method, self.seed)


Runs = dict[Run, list[Evaluation]]


def methods_of(setting: str, model: str) -> tuple[str, ...]:
    """Return the methods that run by default."""
    methods = ALL if model == "fcn" else FEW
    return (*methods, *POWER_SGD) if SETTINGS[setting].data_parallel else methods


@functools.lru_cache(maxsize=2)
def images(data_dir: str | None, seed: int) -> Dataset:
    """Load Fashion-MNIST with fewer test images."""
    dataset = load("fashion-mnist", data_dir, seed)
    return dataclasses.replace(
        dataset,
        test_images=dataset.test_images[:TEST_IMAGES],
        test_labels=dataset.test_labels[:TEST_IMAGES],
    )


def training_of(what: Run, data_dir: str | None, text_dir: str | None, short: bool) -> Training:
    """Prepare everything but the method.

    Raises
    ------
    DatasetMissing
        If the data are not there.
    """
    setting = SETTINGS[what.setting]
    if what.model == "transformer":
        dataset, parts = load_plays(text_dir or "", setting.workers)
        step = len(dataset.test_labels) // 400
        dataset = dataclasses.replace(
            dataset,
            test_images=dataset.test_images[::step],
            test_labels=dataset.test_labels[::step],
        )
    else:
        dataset = images(data_dir, what.seed)
        parts = partition(dataset.train_labels, setting.workers, setting.partition, what.seed)
        parts = subsets(parts, setting.images[what.model], what.seed)
    rounds = 4 if short else setting.rounds[what.model]
    return Training(
        dataset=dataset,
        parts=parts,
        model=what.model,
        rounds=rounds,
        local_steps=setting.local_steps,
        batch_size=setting.batch_size,
        participation=1.0,
        lr=setting.lr,
        server_momentum=setting.server_momentum,
        seed=what.seed,
        device=torch.device("cpu"),
        evaluate_every=max(1, rounds // EVALUATIONS),
    )


@contextlib.contextmanager
def rounds_of(training: Training, method: str) -> Iterator[Iterator[Round]]:
    """Train in this process, or with torch's own hook in a process for each worker."""
    if method in POWER_SGD:
        rank = int(method.removeprefix("PowerSGD(rank=").removesuffix(")"))
        with running("ddp", training) as engine:
            yield engine.run(PowerSGD(rank))
    else:
        yield run(training, parse_compressor(method))


def perform(what: Run, data_dir: str | None, text_dir: str | None, short: bool) -> list[Evaluation]:
    """Do one run."""
    torch.set_num_threads(1)
    training = training_of(what, data_dir, text_dir, short)
    size = sum(weight.numel() for weight in parameters(training.initial_model()).values())
    evaluations = []
    uplink, recycled = 0, 0.0
    with rounds_of(training, what.method) as rounds:
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


def read_csv(file: Path) -> Runs:
    """Return what was finished before.

    Raises
    ------
    ValueError
        If the file is something else.
    """
    runs: Runs = {}
    kinds = get_type_hints(Evaluation)
    if not file.exists():
        return runs
    with file.open(newline="") as opened:
        reader = csv.DictReader(opened)
        if tuple(reader.fieldnames or ()) != Evaluation._fields:
            raise ValueError(f"{file} was not written by this program: name another folder (--out)")
        for row in reader:
            evaluation = Evaluation(**{name: kinds[name](row[name]) for name in row})
            runs.setdefault(evaluation.run, []).append(evaluation)
    return runs


def write_csv(file: Path, runs: Runs) -> None:
    """Write all evaluations, in one order whatever was finished first."""
    temporary = file.with_suffix(".tmp")
    with temporary.open("w", newline="") as opened:
        writer = csv.writer(opened, lineterminator="\n")
        writer.writerow(Evaluation._fields)
        for what in sorted(runs, key=_order):
            writer.writerows(runs[what])
    temporary.replace(file)


def _order(what: Run) -> tuple[int, str, int, str, int]:
    known = methods_of(what.setting, what.model)
    position = known.index(what.method) if what.method in known else len(known)
    return list(SETTINGS).index(what.setting), what.model, position, what.method, what.seed


def accuracy(evaluations: Sequence[Evaluation]) -> float:
    """Return a run's accuracy."""
    return statistics.fmean(e.accuracy for e in evaluations[-AVERAGED:])


def saving(evaluations: Sequence[Evaluation]) -> float:
    """Return how many times fewer bytes than dense a run took."""
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
    """Percentage points above dense training with the same seeds, if each seed has such a run."""
    saving: float
    recycled: float
    kilobytes: float | None
    """Of one worker until dense accuracy minus half a point; None if a seed misses it."""
    kilobytes_power: float | None
    """The same for the best accuracy of PowerSGD minus half a point."""


def rows_of(runs: Runs, setting: str, model: str) -> list[Row]:
    """Summarise a setting's runs, a method a row."""
    some = {what: e for what, e in runs.items() if (what.setting, what.model) == (setting, model)}
    by_method: dict[str, dict[int, list[Evaluation]]] = {}
    for what in sorted(some, key=_order):
        by_method.setdefault(what.method, {})[what.seed] = some[what]
    dense = {seed: accuracy(e) for seed, e in by_method.get(DENSE, {}).items()}
    power: dict[int, float] = {}
    for method in POWER_SGD:
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
        )
        for method, of_seed in by_method.items()
    ]


def table_of(rows: Sequence[Row], setting: str, model: str) -> Table:
    """Lay out a setting's rows."""
    title = f"{setting}, {model}: {SETTINGS[setting].title}"
    table = Table(title=title)
    table.add_column("method", no_wrap=True)
    power = any(row.kilobytes_power is not None for row in rows)
    heads = ["seeds", "accuracy", "points", "of dense", "recycled", "kB to dense - 0.5"]
    heads += ["kB to best PowerSGD - 0.5"] if power else []
    for head in heads:
        table.add_column(head, justify="right")
    for row in rows:
        counts = [row.kilobytes] + ([row.kilobytes_power] if power else [])
        table.add_row(
            row.method,
            str(row.seeds),
            f"{row.accuracy:.2%}",
            "-" if row.points is None else f"{row.points:+.2f}",
            f"1/{row.saving:.4g}",
            f"{row.recycled:.0%}",
            *("-" if count is None else f"{count:.4g}" for count in counts),
        )
    return table


def front(rows: Sequence[Row]) -> list[Row]:
    """Return the rows than which no other has both fewer bytes and more points.

    Points, because a method that ran with fewer seeds is only to be held against dense training
    with those.
    """
    best: list[Row] = []
    for row in sorted(rows, key=lambda row: (-row.saving, -(row.points or 0.0))):
        if row.points is not None and (not best or row.points > (best[-1].points or 0.0)):
            best.append(row)
    return best


def draw(folder: Path, runs: Runs) -> list[Path]:
    """Draw a picture for each setting, with a panel for each model."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.lines import Line2D
    from matplotlib.ticker import FuncFormatter

    files = []
    for setting in SETTINGS:
        # Without dense training there is nothing to hold the others against.
        models = sorted(
            {w.model for w in runs if w.setting == setting and w.method == DENSE},
        )
        if not models:
            continue
        figure, panels = pyplot.subplots(
            1,
            len(models),
            figsize=(1.5 + 5 * len(models), 4.8),
            layout="constrained",
            squeeze=False,
        )
        families = set()
        for axes, model in zip(panels[0], models, strict=True):
            rows = [row for row in rows_of(runs, setting, model) if row.points is not None]
            for row in rows:
                family = next(name for name in FAMILIES if name in row.method)
                families.add(family)
                colour, marker = FAMILIES[family]
                axes.plot(1 / row.saving, row.points, marker, color=colour, markersize=6)
            best = front(rows)
            shares = [1 / row.saving for row in best]
            heights = [row.points for row in best]
            axes.step(shares, heights, where="post", color="0.5", linewidth=1, zorder=0)
            axes.axhline(-100 * MARGIN, color="0.7", linestyle=":", linewidth=1, zorder=0)
            heights = [row.points or 0.0 for row in rows]
            # What fails altogether must not squeeze the rest together.
            low = max(min(heights), -5.0)
            axes.set_ylim(low - 0.2, max(heights) + 0.2)
            axes.set_xscale("log")
            exact = next(row.accuracy for row in rows if row.method == DENSE)
            below = sum(height < low for height in heights)
            title = f"{model}, dense {exact:.1%}" + (f" ({below} below)" if below else "")
            axes.set_title(title, fontsize=9)
            axes.set_xlabel("uplink bytes, share of dense (log scale)")
            axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"1/{1 / x:g}"))
            axes.grid(alpha=0.3)
            axes.spines[["top", "right"]].set_visible(False)
        panels[0][0].set_ylabel("test accuracy, points above dense")
        handles: list[Any] = [
            Line2D([], [], linestyle="", marker=marker, color=colour, label=family)
            for family, (colour, marker) in FAMILIES.items()
            if family in families
        ]
        handles.append(Line2D([], [], color="0.5", label="Pareto front"))
        handles.append(Line2D([], [], color="0.7", linestyle=":", label="dense - 0.5 points"))
        figure.legend(handles=handles, loc="outside right upper", frameon=False, fontsize=8)
        figure.suptitle(SETTINGS[setting].title, fontsize=10, x=0.01, ha="left")
        files.append(folder / f"frontier-{setting}.png")
        figure.savefig(files[-1], dpi=130)
        pyplot.close(figure)
    return files


# --- the command line ----------------------------------------------------------------------------


def build_parser() -> Parser:
    """Build the command line."""
    parser = Parser("frontier.py", __doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--settings", type=listed(str), default=list(SETTINGS), metavar="LIST",
        help=f"{', '.join(SETTINGS)} (default: all)")  # fmt: skip
    add("--models", type=listed(str), metavar="LIST",
        help="fcn, small-cnn, transformer (default: all)")  # fmt: skip
    add("--methods", metavar="LIST", help="methods, separated by semicolons: compressors, and "
        "PowerSGD(rank=R) where training is data-parallel (default: all for the fcn, fewer for the "
        "other models)")  # fmt: skip
    add("--seeds", type=listed(int), default=[0, 1, 2], metavar="LIST",
        help="seeds of data, model and order (default: 0,1,2)")  # fmt: skip
    add("--jobs", type=int, default=os.cpu_count() or 1, metavar="N",
        help="runs side by side, a thread each (default: the number of processors)")  # fmt: skip
    add("--short", action="store_true", help="four rounds each, to see that everything runs")
    add("--data-dir", metavar="DIR", help="folder of Fashion-MNIST's IDX files (default: where "
        "Debian's package dataset-fashion-mnist puts them)")  # fmt: skip
    add("--text-dir", metavar="DIR", help="folder of the plays' texts, shksprdata/texts of the "
        "source distribution shakespeare 0.6 (default: leave out the setting `text`)")  # fmt: skip
    add("--out", type=Path, default=Path("frontier-results"), metavar="DIR",
        help="folder for the results (default: frontier-results)")  # fmt: skip
    return parser


def wanted(options: Any) -> list[Run]:
    """Return the runs that the options ask for, those of the first seed first.

    Raises
    ------
    ValueError
        Whose message is one line.
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
    chosen = [m.strip() for m in options.methods.split(";")] if options.methods else None
    if chosen is not None:
        chosen = [m if m in POWER_SGD else repr(parse_compressor(m)) for m in chosen]
    runs = []
    for seed in options.seeds:
        for name in options.settings:
            setting = SETTINGS[name]
            for model in setting.rounds:
                if options.models is not None and model not in options.models:
                    continue
                if model == "transformer" and options.text_dir is None:
                    continue
                for method in chosen or methods_of(name, model):
                    if method in POWER_SGD and not setting.data_parallel:
                        continue
                    runs.append(Run(name, model, method, seed))
    if not runs:
        raise ValueError("nothing to run (the setting `text` needs --text-dir)")
    return runs


def main(arguments: list[str]) -> int:
    """Run the command line and return the exit status."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    file = options.out / "frontier.csv"
    try:
        asked = wanted(options)
        check_folder(options.out)
        runs = read_csv(file)
        data = options.data_dir, options.text_dir, options.short
        for first in {what.model == "transformer": what for what in asked}.values():
            training_of(first, *data)
    except (ValueError, DatasetMissing) as error:
        parser.error(str(error))
    console = Console(width=None if sys.stdout.isatty() else 180)
    missing = [what for what in asked if what not in runs]
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
        console=console,
        disable=not console.is_terminal,
    )
    spawn = multiprocessing.get_context("spawn")
    interrupted = False
    with concurrent.futures.ProcessPoolExecutor(options.jobs, mp_context=spawn) as pool, progress:
        bar = progress.add_task("runs", total=len(asked), completed=len(asked) - len(missing))
        futures = {pool.submit(perform, what, *data): what for what in missing}
        try:
            for future in concurrent.futures.as_completed(futures):
                what = futures[future]
                runs[what] = future.result()
                write_csv(file, runs)
                progress.update(bar, advance=1)
                if not console.is_terminal:
                    last = runs[what]
                    console.print(
                        f"{what.setting}, {what.model}, seed {what.seed}: {what.method}: "
                        f"{accuracy(last):.2%} at 1/{saving(last):.4g}",
                        soft_wrap=True,
                    )
        except KeyboardInterrupt:
            interrupted = True
            pool.shutdown(wait=False, cancel_futures=True)
    for setting, model in dict.fromkeys((w.setting, w.model) for w in sorted(runs, key=_order)):
        console.print(table_of(rows_of(runs, setting, model), setting, model))
    draw(options.out, runs)
    console.print(f"Results are in {options.out}.", soft_wrap=True)
    return INTERRUPTED if interrupted else 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
