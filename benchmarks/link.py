"""Measure DDP training over links of known rate.

Every rank is a process in a network namespace of its own, whose one interface sends and receives at
the given rate (token buckets; no added latency). This needs root, `ip` and `tc`. The namespaces are
removed at the end. Times are those of the training loop, without evaluation.
"""

from __future__ import annotations

import argparse
import itertools
import json
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, get_type_hints

if __name__ == "__main__" and __spec__ is None:  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from rich.progress import Progress
from rich.table import Table

from benchmarks.common import network
from benchmarks.common.baselines import Dense, Float16, TorchPowerSGD, current_name
from benchmarks.common.command_line import (
    INTERRUPTED,
    Parser,
    add_methods,
    check_folder,
    listed,
    read_methods,
    start,
)
from benchmarks.common.data import DatasetMissing, load
from benchmarks.common.plots import chart, line_styles, show_percent
from benchmarks.common.tables import console, make_table, read_csv, write_csv
from lbgm_compress import (
    LBGM,
    Atomo,
    ErrorFeedback,
    LookBackSubspace,
    SignSGD,
    TopK,
)
from lbgm_compress._util.files import atomic_write
from lbgm_compress.algorithm import Algorithm

if TYPE_CHECKING:
    from matplotlib.axes import Axes

METHODS: tuple[Algorithm, ...] = (
    Dense(),
    Float16(),
    TorchPowerSGD(1),
    TorchPowerSGD(2),
    TorchPowerSGD(4),
    ErrorFeedback(TopK(0.01)),
    ErrorFeedback(SignSGD(scaled=True)),
    ErrorFeedback(Atomo(4)),
    LBGM(delta=0.2),
    LBGM(delta=0.5),
    LBGM(TopK(0.01), delta=0.2),
    LBGM(TopK(0.01), delta=0.5),
    LBGM(ErrorFeedback(TopK(0.01)), delta=0.2),
    LBGM(ErrorFeedback(TopK(0.01)), delta=0.5),
    LBGM(Atomo(4), delta=0.2),
    LBGM(ErrorFeedback(Atomo(4)), delta=0.2),
    LBGM(ErrorFeedback(Atomo(4)), delta=0.5),
    ErrorFeedback(LookBackSubspace(4, 0.5, refresh=4, values="int4")),
    ErrorFeedback(LookBackSubspace(8, 0.5, refresh=8, values="int4")),
)
# Images in a step of all ranks together.
CASES = {"large": 1024, "small": 64}


class Epoch(NamedTuple):
    """One epoch of one run. Bytes are means over its steps and ranks, as sent by one rank."""

    case: str
    ranks: int
    mbit: float
    method: str
    epoch: int
    steps: int
    """Steps so far."""
    seconds: float
    """Training time so far."""
    step_ms: float
    """Mean time of a step in this epoch."""
    interface_bytes: float
    message_bytes: float
    recycled_share: float
    accuracy: float


# --- the results ---------------------------------------------------------------------------------


def write_epochs(file: Path, epochs: Sequence[Epoch]) -> None:
    """Write a row for each epoch."""
    rows = []
    for epoch in epochs:
        row = epoch._asdict()
        for name in ("seconds", "step_ms", "interface_bytes", "message_bytes"):
            row[name] = f"{row[name]:.3f}"
        for name in ("recycled_share", "accuracy"):
            row[name] = f"{row[name]:.6f}"
        rows.append(row.values())
    write_csv(file, Epoch._fields, rows)


def read_epochs(file: Path) -> list[Epoch]:
    """Return the epochs of a file that `write_epochs` wrote.

    Raises
    ------
    ValueError
        If this program did not write the file.
    """
    kinds = get_type_hints(Epoch)
    return [
        Epoch(**{name: kinds[name](value) for name, value in row.items()})
        for row in (
            {**row, "method": current_name(row["method"])} for row in read_csv(file, Epoch._fields)
        )
    ]


def groups(epochs: Sequence[Epoch]) -> dict[tuple[str, int, float], dict[str, list[Epoch]]]:
    """Return the epochs by case, ranks and rate, and then by method."""
    found: dict[tuple[str, int, float], dict[str, list[Epoch]]] = {}
    for epoch in epochs:
        by_method = found.setdefault((epoch.case, epoch.ranks, epoch.mbit), {})
        by_method.setdefault(epoch.method, []).append(epoch)
    return found


def seconds_to(epochs: Sequence[Epoch], target: float) -> float | None:
    """Return the training time until the end of the first epoch with this accuracy, or None."""
    return next((epoch.seconds for epoch in epochs if epoch.accuracy >= target), None)


def tables(epochs: Sequence[Epoch]) -> Iterator[Table]:
    """Yield a table for each case, number of ranks and rate."""
    dense = repr(Dense())
    for (case, ranks, mbit), by_method in groups(epochs).items():
        target = by_method[dense][-1].accuracy - 0.005 if dense in by_method else None
        until = "s to target" if target is None else f"s to {target:.1%}"
        rows = []
        for method, run in by_method.items():
            reached = None if target is None else seconds_to(run, target)
            last, count = run[-1], len(run)
            rows.append(
                (
                    method,
                    f"{1e3 * last.seconds / last.steps:.0f}",
                    f"{sum(e.interface_bytes for e in run) / count / 1e3:.1f}",
                    f"{sum(e.message_bytes for e in run) / count / 1e3:.1f}",
                    f"{last.recycled_share:.0%}",
                    f"{last.accuracy:.2%}",
                    "-" if reached is None else f"{reached:.0f}",
                )
            )
        title = f"{case} batches ({CASES[case]} images a step), {ranks} ranks, {mbit:g} Mbit/s"
        headings = ("method", "ms a step", "kB on the wire", "kB message", "recycled", "accuracy")
        yield make_table(title, (*headings, until), rows, whole="method")


def draw(folder: Path, epochs: Sequence[Epoch], known: Sequence[str] = ()) -> None:
    """Draw accuracy by time for each setting, and the time of a step by rate.

    `known` are the values of ``--known``.
    """
    names = list(dict.fromkeys(epoch.method for epoch in epochs))
    styles = line_styles(read_methods(", ".join(names), known))
    look = {name: {**style, "marker": "o"} for name, style in zip(names, styles, strict=True)}
    for (case, ranks, mbit), by_method in groups(epochs).items():

        def accuracy(axes: Axes, by_method: dict[str, list[Epoch]] = by_method) -> None:
            for method, run in by_method.items():
                times, accuracies = [e.seconds for e in run], [e.accuracy for e in run]
                axes.plot(times, accuracies, markersize=3, **look[method])
            axes.set_xscale("log")
            axes.set_xlabel("training time in s (log scale)")
            _show_numbers(axes)
            axes.set_ylabel("test accuracy")
            show_percent(axes.yaxis)

        title = f"{case} batches, {ranks} ranks, {mbit:g} Mbit/s"
        picture = chart(accuracy, title, len(by_method))
        atomic_write(folder / f"accuracy-{case}-{ranks}-{mbit:g}.png", picture)
    for case, ranks in sorted({(epoch.case, epoch.ranks) for epoch in epochs}):
        steps: dict[str, dict[float, float]] = {}
        for e in epochs:
            if (e.case, e.ranks) == (case, ranks):
                steps.setdefault(e.method, {})[e.mbit] = e.seconds / e.steps

        def step_times(axes: Axes, steps: dict[str, dict[float, float]] = steps) -> None:
            for method, times in steps.items():
                rates = sorted(times)
                axes.plot(rates, [times[rate] for rate in rates], **look[method])
            axes.set_xscale("log")
            axes.set_yscale("log")
            axes.set_xlabel("rate of a link in Mbit/s (log scale)")
            axes.set_ylabel("seconds a step (log scale)")

        picture = chart(step_times, f"{case} batches, {ranks} ranks", len(steps))
        atomic_write(folder / f"step-{case}-{ranks}.png", picture)


def _show_numbers(axes: Axes) -> None:
    from matplotlib.ticker import ScalarFormatter

    axes.xaxis.set_major_formatter(ScalarFormatter())


def probe_table(probes: Sequence[dict[str, Any]]) -> Table:
    """Return a table of the times of the exchange."""
    headings = ("ranks", "Mbit/s", "one rank sends 4 MB", "its time on one link", "ratio")
    rows = [
        (
            str(p["ranks"]),
            f"{p['mbit']:g}",
            f"{p['body_ms']:.0f}",
            f"{p['link_ms']:.0f}",
            f"{p['body_ms'] / p['link_ms']:.2f}",
            f"{p['head_ms']:.2f}",
            f"{p['eight_bytes_ms']:.2f}",
            f"{p['head_ms'] / p['eight_bytes_ms']:.2f}",
        )
        for p in probes
    ]
    headings = (*headings, "heads alone", "8-byte all-gather", "ratio")
    return make_table("The exchange alone, ms", headings, rows)


def limit_of_the_link(probes: Sequence[dict[str, Any]]) -> str:
    """Return a sentence about the highest rate at which the link limits a transfer."""
    bound = [p["mbit"] for p in probes if p["body_ms"] <= 1.25 * p["link_ms"]]
    free = [p for p in probes if p["body_ms"] > 1.25 * p["link_ms"]]
    text = (
        f"The link limits a transfer up to {max(bound):g} Mbit/s"
        if bound
        else "No link of this run limits a transfer"
    )
    if free:
        slowest = min(free, key=lambda p: p["mbit"])
        reached = slowest["mbit"] * slowest["link_ms"] / slowest["body_ms"]
        text += f"; at {slowest['mbit']:g} Mbit/s this machine reaches {reached:.0f} Mbit/s"
    return text + "."


# --- the command line ----------------------------------------------------------------------------


def build_parser() -> Parser:
    """Return the parser of the command line."""
    parser = Parser("link.py", __doc__)
    add = parser.add_argument
    add("--rates", type=listed(float), default=[10.0, 100.0, 1000.0], metavar="LIST",
        help="rates of the links in Mbit/s (default: 10,100,1000)")  # fmt: skip
    add("--ranks", type=listed(int), default=[2, 4], metavar="LIST",
        help="numbers of ranks (default: 2,4)")  # fmt: skip
    add("--cases", type=listed(str), default=list(CASES), metavar="LIST",
        help=f"batches: {', '.join(f'{c} ({n} images a step)' for c, n in CASES.items())} "
        "(default: all)")  # fmt: skip
    add_methods(parser, f"{len(METHODS)} of all kinds",
        "; and DDP's own Dense(), Float16() and TorchPowerSGD(RANK)")  # fmt: skip
    add("--epochs", type=int, default=3, help="epochs of each run (default: 3)")
    add("--images", type=int, default=60_000, help="training images to use (default: 60000)")
    add("--lr", type=float, default=0.02, help="learning rate, momentum is 0.9 (default: 0.02)")
    add("--seed", type=int, default=0, help="seed of model and data order (default: 0)")
    add("--data-dir", metavar="DIR", help="folder of Fashion-MNIST's IDX files "
        "(default: where Debian's package dataset-fashion-mnist puts them)")  # fmt: skip
    add("--probe-only", action="store_true", help="measure the exchange alone, and train nothing")
    add("--draw-only", action="store_true", help="run nothing, and draw the pictures of the "
        "link.csv in the folder of --out again")  # fmt: skip
    add("--out", type=Path, default=Path("link-results"), metavar="DIR",
        help="folder for the results (default: link-results)")  # fmt: skip
    return parser


def check(options: argparse.Namespace) -> list[str]:
    """Check all options before anything is made, and return the methods.

    Raises
    ------
    ValueError
        If something is wrong; the message is one line.
    """
    methods = read_methods(options.methods, options.known) if options.methods else METHODS
    for case in options.cases:
        if case not in CASES:
            raise ValueError(f"--cases: {case!r} is none of {', '.join(CASES)}")
    if not all(2 <= ranks <= 16 for ranks in options.ranks):
        raise ValueError("--ranks: from 2 to 16 can be connected")
    if not all(0.1 <= rate <= 10_000 for rate in options.rates):
        raise ValueError("--rates: from 0.1 to 10000 Mbit/s can be made")
    if options.epochs < 1 or options.images < max(CASES.values()):
        raise ValueError(f"--epochs starts at 1, --images at {max(CASES.values())}")
    if not options.probe_only:
        try:
            load("fashion-mnist", options.data_dir, options.seed)
        except DatasetMissing as error:
            raise ValueError(str(error)) from None
    reason = network.missing()
    if reason is not None:
        raise ValueError(reason)
    check_folder(options.out)
    return list(map(repr, methods))


def draw_again(parser: Parser, options: argparse.Namespace) -> int:
    """Draw the pictures of kept results, and return the exit status."""
    file = options.out / "link.csv"
    try:
        epochs = read_epochs(file)
        if not epochs:
            raise ValueError(f"--out {options.out}: there are no epochs in link.csv")
        draw(options.out, epochs, options.known)
    except ValueError as error:
        parser.error(str(error))
    return 0


def main(arguments: list[str]) -> int:
    """Run the command line and return the exit status."""
    # The default action would leave the namespaces.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    parser = build_parser()
    options = parser.parse_args(arguments)
    if options.draw_only:
        return draw_again(parser, options)
    try:
        methods = check(options)
    except ValueError as error:
        parser.error(str(error))
    printer = console()
    epochs: list[Epoch] = []
    probes: list[dict[str, Any]] = []
    interrupted = False
    trained = [] if options.probe_only else methods
    cases = options.cases[:1] if options.probe_only else options.cases
    total = len(cases) * len(options.ranks) * len(options.rates) * len(trained) * options.epochs
    progress = Progress(console=printer, disable=not printer.is_terminal, transient=True)
    try:
        with progress:
            bar = progress.add_task("training", total=max(total, 1))
            for case, ranks, mbit in itertools.product(cases, options.ranks, options.rates):
                task = {
                    "methods": trained,
                    "known": options.known,
                    "probe": case == cases[0],
                    "mbit": mbit,
                    "batch": CASES[case],
                    "epochs": options.epochs,
                    "images": options.images,
                    "lr": options.lr,
                    "seed": options.seed,
                    "data_dir": options.data_dir,
                }
                with network.network(ranks, mbit) as names:
                    for told in network.launch("benchmarks.common.link_rank", names, task):
                        if "probe" in told:
                            probes.append({"ranks": ranks, "mbit": mbit, **told["probe"]})
                            continue
                        epoch = Epoch(case=case, ranks=ranks, mbit=mbit, **told)
                        epochs.append(epoch)
                        write_epochs(options.out / "link.csv", epochs)
                        what = f"{case}, {ranks} ranks, {mbit:g} Mbit/s: {epoch.method}"
                        progress.update(bar, advance=1, description=what)
                        if not printer.is_terminal and epoch.epoch == options.epochs:
                            printer.print(f"{what}: {epoch.accuracy:.2%} in {epoch.seconds:.0f} s")
    except KeyboardInterrupt:
        interrupted = True
    except RuntimeError as error:
        printer.print(f"link.py: error: {error}", style="red", soft_wrap=True)
        return 1
    for table in tables(epochs):
        printer.print(table)
    if probes:
        printer.print(probe_table(probes))
        printer.print(limit_of_the_link(probes), soft_wrap=True)
        text = json.dumps(probes, indent=1) + "\n"
        atomic_write(options.out / "exchange.json", text.encode())
    if epochs:
        draw(options.out, epochs, options.known)
    printer.print(f"Results are in {options.out}.", soft_wrap=True)
    return INTERRUPTED if interrupted else 0


if __name__ == "__main__":
    start(main)
