"""Measure accuracy against the bytes of a federation in both directions.

A run is one partition, participation, number of local steps, method and seed. Every finished run is
kept in federated.csv and is not done again, so that an interrupted command can be continued.
"""

from __future__ import annotations

import concurrent.futures
import os
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__" and __spec__ is None:  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from rich.table import Table

from benchmarks.common.command_line import INTERRUPTED, Parser, check_folder, listed, start
from benchmarks.common.data import DatasetMissing, load
from benchmarks.common.federation import Method, federate
from benchmarks.common.partition import partition
from benchmarks.common.plots import png, subplots, tidy
from benchmarks.common.processes import make_pool
from benchmarks.common.tables import console, make_table, read_rows, write_csv
from benchmarks.common.training import Training
from lbgm_compress import ErrorFeedback, Identity, LookBackSubspace, TopK
from lbgm_compress._util.files import atomic_write

WORKERS = 50
TEST_IMAGES = 10_000
EVALUATE_EVERY = 10
# The accuracy of a run is the mean of this many evaluations, the last ones.
AVERAGED = 4
MARGIN = 0.005
PARTITIONS = "iid", "classes:3"

SUBSPACE = LookBackSubspace(4, values="int4")
WIDE = LookBackSubspace(8, values="int4")
COARSE = LookBackSubspace(2, values="int4", directions="int2")
TOP = TopK(0.01, "int2")
# The compressors of the uplink, inside error feedback, and of the downlink.
PAIRS = {
    "subspace": (SUBSPACE, SUBSPACE),
    "coarse-subspace": (COARSE, SUBSPACE),
    "wide-subspace": (WIDE, WIDE),
    "top": (TOP, TOP),
}
METHODS = {"dense": Method(Identity(), None, "float32", "memory")} | {
    f"{name}-{residual}": Method(ErrorFeedback(up), down, "float16", residual)
    for name, (up, down) in PAIRS.items()
    for residual in ("memory", "model")
}
METHODS |= {
    f"{name}-int8": METHODS[name]._replace(first="int8")
    for name in ("coarse-subspace-model", "wide-subspace-model")
}


class Evaluation(NamedTuple):
    """A row of federated.csv; bytes are those of all clients so far."""

    partition: str
    participation: float
    local_steps: int
    method: str
    seed: int
    round: int
    accuracy: float
    held_accuracy: float
    uplink_bytes: int
    downlink_bytes: int
    dense_bytes: int

    @property
    def run(self) -> tuple[str, float, int, str, int]:
        """Partition, participation, local steps, method and seed."""
        return self[:5]


Setting = tuple[str, float, int]
Run = tuple[str, float, int, str, int]
Runs = dict[Run, list[Evaluation]]


def training_of(what: Run, rounds: int, data_dir: str | None) -> Training:
    """Return the training of a run.

    Raises
    ------
    DatasetMissing
        If the data set is not found.
    """
    kind, participation, local_steps, _, seed = what
    dataset = load("fashion-mnist", data_dir, seed)
    return Training(
        dataset=dataset,
        parts=partition(dataset.train_labels, WORKERS, kind, seed),
        model="fcn",
        rounds=rounds,
        local_steps=local_steps,
        batch_size=20,
        participation=participation,
        lr=0.05,
        server_momentum=0.0,
        seed=seed,
        device=torch.device("cpu"),
        evaluate_every=EVALUATE_EVERY,
    )


def perform(what: Run, rounds: int, data_dir: str | None) -> list[Evaluation]:
    """Do one run, and return its evaluations."""
    torch.set_num_threads(1)
    up = down = dense = 0
    found = []
    for one in federate(training_of(what, rounds, data_dir), METHODS[what[3]]):
        up += one.uplink_bytes
        down += one.downlink_bytes
        dense += one.dense_bytes
        if one.accuracy is not None and one.held_accuracy is not None:
            accuracies = round(one.accuracy, 6), round(one.held_accuracy, 6)
            found.append(Evaluation(*what, one.number, *accuracies, up, down, dense))
    return found


# --- the results ---------------------------------------------------------------------------------


def read_runs(file: Path) -> Runs:
    """Return the runs that were finished before.

    Raises
    ------
    ValueError
        If this program did not write the file.
    """
    runs: Runs = {}
    for evaluation in read_rows(file, Evaluation):
        runs.setdefault(evaluation.run, []).append(evaluation)
    return runs


def write_runs(file: Path, runs: Runs) -> None:
    """Write the evaluations of all runs, in an order that does not depend on when they ended."""
    order = list(METHODS)
    chosen = sorted(runs, key=lambda run: (run[0], -run[1], run[2], order.index(run[3]), run[4]))
    write_csv(file, Evaluation._fields, [row for what in chosen for row in runs[what]])


def accuracy(evaluations: Sequence[Evaluation]) -> float:
    """Return the accuracy of the server's model, the mean of the last evaluations."""
    return statistics.fmean(e.accuracy for e in evaluations[-AVERAGED:])


def held_accuracy(evaluations: Sequence[Evaluation]) -> float:
    """Return the same of the model that clients hold."""
    return statistics.fmean(e.held_accuracy for e in evaluations[-AVERAGED:])


class Row(NamedTuple):
    """One method, over all seeds, after a number of rounds."""

    method: str
    seeds: int
    accuracy: float
    points: float
    """Percentage points above dense training with the same seeds."""
    held_points: float
    """The same for the model that clients hold."""
    up: float
    """Dense uplink bytes divided by uplink bytes; likewise below."""
    down: float
    total: float
    to_dense: float | None
    """The same for the bytes until dense accuracy minus half a point, over the dense bytes of all
    rounds; None if a seed misses it."""


def rows_of(runs: Runs, setting: Setting, rounds: int) -> list[Row]:
    """Summarise the runs of a setting after a number of rounds, a method a row."""
    by_method: dict[str, dict[int, list[Evaluation]]] = {}
    for what, evaluations in runs.items():
        if what[:3] == setting and evaluations[-1].round >= rounds:
            kept = [e for e in evaluations if e.round <= rounds]
            by_method.setdefault(what[3], {})[what[4]] = kept
    dense = {seed: accuracy(e) for seed, e in by_method.get("dense", {}).items()}
    rows = []
    for method in METHODS:
        found = {seed: e for seed, e in by_method.get(method, {}).items() if seed in dense}
        if not found:
            continue
        last = [e[-1] for e in found.values()]
        both = [e.uplink_bytes + e.downlink_bytes for e in last]
        reached = [_bytes_to(e, dense[seed] - MARGIN) for seed, e in found.items()]
        known = [count for count in reached if count is not None]
        mean = statistics.fmean
        rows.append(
            Row(
                method,
                len(found),
                mean(accuracy(e) for e in found.values()),
                100 * mean(accuracy(e) - dense[seed] for seed, e in found.items()),
                100 * mean(held_accuracy(e) - dense[seed] for seed, e in found.items()),
                # A third of the dense bytes are those of the uplink.
                mean(e.dense_bytes / 3 / e.uplink_bytes for e in last),
                mean(e.dense_bytes * 2 / 3 / e.downlink_bytes for e in last),
                mean(e.dense_bytes / size for e, size in zip(last, both, strict=True)),
                mean(e.dense_bytes / size for e, size in zip(last, known, strict=True))
                if len(known) == len(reached)
                else None,
            )
        )
    return rows


def _bytes_to(evaluations: Sequence[Evaluation], target: float) -> int | None:
    """Return the bytes of both directions after which an accuracy was first reached."""
    for i in range(AVERAGED, len(evaluations) + 1):
        if accuracy(evaluations[:i]) >= target:
            return evaluations[i - 1].uplink_bytes + evaluations[i - 1].downlink_bytes
    return None


def table_of(rows: Sequence[Row], setting: Setting, rounds: int) -> Table:
    """Return a table of a setting's rows."""
    headings = ("method", "seeds", "accuracy", "points", "points of w", "up", "down", "total")
    cells = [
        (
            row.method,
            str(row.seeds),
            f"{row.accuracy:.2%}",
            f"{row.points:+.2f}",
            f"{row.held_points:+.2f}",
            *(f"1/{saving:.4g}" for saving in (row.up, row.down, row.total)),
            "-" if row.to_dense is None else f"1/{row.to_dense:.4g}",
        )
        for row in rows
    ]
    kind, participation, steps = setting
    clients = f"{participation:.0%} of {WORKERS} clients a round"
    title = f"{kind}, {clients}, {rounds} rounds of {steps} steps"
    return make_table(title, (*headings, "total to dense - 0.5"), cells, whole="method")


def draw(folder: Path, runs: Runs, settings: Sequence[Setting]) -> None:
    """Draw accuracy against the bytes of both directions, a panel for each setting."""
    methods = [m for m in METHODS if any(what[:3] in settings and what[3] == m for what in runs)]
    columns = min(2, len(settings))
    rows = -(-len(settings) // columns)
    figure, panels = subplots(rows, columns, (1.5 + 4.2 * columns, 1 + 3.6 * rows))
    for axes, setting in zip(panels.flat, settings, strict=False):
        for method in methods:
            found = [e for what, e in runs.items() if what[:4] == (*setting, method)]
            if not found:
                continue
            length = min(map(len, found))
            megabytes, heights = [], []
            for position in range(AVERAGED - 1, length):
                at = [e[position] for e in found]
                size = statistics.fmean(e.uplink_bytes + e.downlink_bytes for e in at)
                megabytes.append(size / 1e6)
                heights.append(statistics.fmean(accuracy(e[: position + 1]) for e in found))
            name, dashed, _ = method.partition("-int8")
            color = "black" if method == "dense" else f"C{list(METHODS).index(name)}"
            style = "--" if dashed else "-"
            axes.plot(megabytes, heights, style, color=color, linewidth=1.2, label=method)
        axes.set_xscale("log")
        kind, participation, _ = setting
        axes.set_title(f"{kind}, {participation:.0%} of the clients", fontsize=9)
        axes.set_xlabel("MB in both directions, all clients (log scale)")
        tidy(axes)
        axes.set_ylabel("accuracy of the server's model")
    for axes in panels.flat[len(settings) :]:
        axes.set_axis_off()
    lines = {
        t: h for axes in panels.flat for h, t in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    lines = {method: lines[method] for method in methods}
    figure.legend(
        lines.values(), lines, loc="outside lower center", ncols=3, frameon=False, fontsize=8
    )
    atomic_write(folder / "federated.png", png(figure))


# --- the command line ----------------------------------------------------------------------------


def build_parser() -> Parser:
    """Return the parser of the command line."""
    parser = Parser("federated.py", __doc__)
    add = parser.add_argument
    add("--partitions", type=listed(str), default=list(PARTITIONS), metavar="LIST",
        help=f"{', '.join(PARTITIONS)} (default: all)")  # fmt: skip
    add("--participations", type=listed(float), default=[0.2, 0.05], metavar="LIST",
        help="shares of the clients in a round (default: 0.2,0.05)")  # fmt: skip
    add("--local-steps", type=int, default=10, metavar="N",
        help="steps of a client in a round (default: 10)")  # fmt: skip
    add("--rounds", type=int, default=1000, help="rounds of each run (default: 1000)")
    add("--tables", type=listed(int), default=[200, 1000], metavar="LIST",
        help="numbers of rounds of the tables (default: 200,1000)")  # fmt: skip
    add("--methods", type=listed(str), default=list(METHODS), metavar="LIST",
        help=f"{', '.join(METHODS)} (default: all)")  # fmt: skip
    add("--seeds", type=listed(int), default=[0, 1, 2], metavar="LIST",
        help="seeds of data, model and order (default: 0,1,2)")  # fmt: skip
    add("--jobs", type=int, default=os.cpu_count() or 1, metavar="N",
        help="runs at a time, with a thread each (default: the number of processors)")  # fmt: skip
    add("--data-dir", metavar="DIR", help="folder of Fashion-MNIST's IDX files (default: where "
        "Debian's package dataset-fashion-mnist puts them)")  # fmt: skip
    add("--out", type=Path, default=Path("federated-results"), metavar="DIR",
        help="folder for the results (default: federated-results)")  # fmt: skip
    return parser


def wanted(options: Any) -> list[Run]:
    """Return the runs that the options ask for, the first seed first.

    Raises
    ------
    ValueError
        If something is wrong; the message is one line.
    """
    for name in options.methods:
        if name not in METHODS:
            raise ValueError(f"--methods: {name!r} is none of {', '.join(METHODS)}")
    for kind in options.partitions:
        if kind not in PARTITIONS:
            raise ValueError(f"--partitions: {kind!r} is none of {', '.join(PARTITIONS)}")
    if not all(0 < share <= 1 for share in options.participations):
        raise ValueError("--participations: from above 0 to 1")
    if options.rounds < AVERAGED * EVALUATE_EVERY or options.jobs < 1:
        raise ValueError(f"--rounds starts at {AVERAGED * EVALUATE_EVERY}, and --jobs at 1")
    if options.local_steps < 1:
        raise ValueError("--local-steps starts at 1")
    if not all(0 <= seed < 2**31 for seed in options.seeds):
        raise ValueError("--seeds: from 0 to 2147483647")
    return [
        (kind, share, options.local_steps, method, seed)
        for seed in options.seeds
        for kind in options.partitions
        for share in options.participations
        for method in options.methods
    ]


def main(arguments: list[str]) -> int:
    """Run the command line and return the exit status."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    file = options.out / "federated.csv"
    try:
        asked = wanted(options)
        check_folder(options.out)
        runs = read_runs(file)
        missing = [w for w in asked if w not in runs or runs[w][-1].round < options.rounds]
        if missing:
            training_of(missing[0], options.rounds, options.data_dir)
    except (ValueError, DatasetMissing) as error:
        parser.error(str(error))
    printer = console(180)
    interrupted = False
    with make_pool(options.jobs) as pool:
        futures = {
            pool.submit(perform, what, options.rounds, options.data_dir): what for what in missing
        }
        try:
            for future in concurrent.futures.as_completed(futures):
                what = futures[future]
                runs[what] = future.result()
                write_runs(file, runs)
                printer.print(f"{', '.join(map(str, what))}: {accuracy(runs[what]):.2%}")
        except KeyboardInterrupt:
            interrupted = True
            pool.shutdown(cancel_futures=True)
    settings = list(dict.fromkeys(what[:3] for what in asked))
    for setting in settings:
        for rounds in options.tables:
            rows = rows_of(runs, setting, rounds)
            if rows:
                printer.print(table_of(rows, setting, rounds))
    if runs:
        draw(options.out, runs, [s for s in settings if any(what[:3] == s for what in runs)])
    printer.print(f"Results are in {options.out}.", soft_wrap=True)
    return INTERRUPTED if interrupted else 0


if __name__ == "__main__":
    start(main)
