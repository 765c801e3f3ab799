"""Measure DDP training over links of known rate.

Every rank is a process in a network namespace of its own, whose one interface sends and receives at
the given rate (token buckets; no added latency). This needs root, `ip` and `tc`. The namespaces are
removed at the end. Times are those of the training loop, without evaluation. A method named after
Dense() that has not come within half a point of it after --steps goes on for up to three times as
many.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if __name__ == "__main__" and __spec__ is None:  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from rich.progress import Progress
from rich.table import Table

from benchmarks.common import network
from benchmarks.common.baselines import Dense, Float16, NoExchange, TorchPowerSGD
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
from benchmarks.common.link_rank import MARGIN
from benchmarks.common.plots import chart, line_styles, show_percent
from benchmarks.common.tables import console, make_table, read_rows, write_csv
from lbgm_compress import (
    LBGM,
    Atomo,
    ErrorFeedback,
    LookBackSubspace,
    PowerSGD,
    SharedLBGM,
    SharedSubspace,
    TopK,
)
from lbgm_compress._util.files import atomic_write
from lbgm_compress.algorithm import Algorithm

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

METHODS: tuple[Algorithm, ...] = (
    NoExchange(),
    Dense(),
    Float16(),
    *(TorchPowerSGD(rank) for rank in (1, 2, 4)),
    *(ErrorFeedback(PowerSGD(rank)) for rank in (1, 2, 4)),
    ErrorFeedback(SharedSubspace(8)),
    SharedLBGM(),
    ErrorFeedback(LookBackSubspace(8, 0.5, refresh=8, values="int4")),
    ErrorFeedback(TopK(0.01)),
    ErrorFeedback(Atomo(4)),
    LBGM(),
    LBGM(ErrorFeedback(Atomo(4))),
)
# Images in a step of all ranks together.
CASES = {"large": 1024, "small": 64}


class Report(NamedTuple):
    """Some steps of one run. Bytes are means over them and over ranks, as sent by one rank."""

    case: str
    ranks: int
    mbit: float
    method: str
    steps: int
    """Steps so far."""
    seconds: float
    """Training time so far."""
    step_ms: float
    """Mean time of a step since the last report."""
    interface_bytes: float
    message_bytes: float
    recycled_share: float
    accuracy: float
    """Accuracy after these steps; nan if it was not measured."""


Runs = dict[float, dict[str, list[Report]]]
"""The reports of one case and number of ranks, by rate and then by method."""


# --- the results ---------------------------------------------------------------------------------


def write_reports(file: Path, reports: Sequence[Report]) -> None:
    """Write a row for each report."""
    rows = []
    for report in reports:
        row = report._asdict()
        for name in ("seconds", "step_ms", "interface_bytes", "message_bytes"):
            row[name] = f"{row[name]:.3f}"
        for name in ("recycled_share", "accuracy"):
            row[name] = f"{row[name]:.6f}"
        rows.append(row.values())
    write_csv(file, Report._fields, rows)


def read_reports(file: Path) -> list[Report]:
    """Return the reports of a file that `write_reports` wrote.

    Raises
    ------
    ValueError
        If this program did not write the file.
    """
    return read_rows(file, Report)


def groups(reports: Sequence[Report]) -> dict[tuple[str, int], Runs]:
    """Return the reports by case and ranks, and then by rate and method."""
    found: dict[tuple[str, int], Runs] = {}
    for report in reports:
        by_rate = found.setdefault((report.case, report.ranks), {})
        by_rate.setdefault(report.mbit, {}).setdefault(report.method, []).append(report)
    return found


def seconds_at(run: Sequence[Report], steps: int) -> float:
    """Return the training time until a step, from the reports before and after it.

    After the last report, steps take as long as those between the last two reports.
    """
    times, counts = [0.0, *(r.seconds for r in run)], [0, *(r.steps for r in run)]
    after = next((i for i, count in enumerate(counts) if count >= steps), len(counts) - 1)
    slope = (times[after] - times[after - 1]) / (counts[after] - counts[after - 1])
    return times[after] + slope * (steps - counts[after])


def trained(runs: Runs, method: str) -> list[Report]:
    """Return the longest run of a method, whose accuracies are those at every rate."""
    found = [by_method[method] for by_method in runs.values() if method in by_method]
    return max(found, key=lambda run: run[-1].steps)


def steps_to(run: Sequence[Report], target: float) -> int | None:
    """Return the number of steps after which the accuracy was first measured to be that high."""
    return next((report.steps for report in run if report.accuracy >= target), None)


def target_of(runs: Runs) -> float | None:
    """Return the accuracy of dense training at its end minus half a point, None without it."""
    dense = repr(Dense())
    if not any(dense in by_method for by_method in runs.values()):
        return None
    return trained(runs, dense)[-1].accuracy - MARGIN


def tables(reports: Sequence[Report]) -> Iterator[Table]:
    """Yield a table for each case and number of ranks."""
    for (case, ranks), runs in groups(reports).items():
        target = target_of(runs)
        headings = ["method", "kB on the wire", "accuracy", "steps"]
        for mbit in runs:
            headings += [f"ms at {mbit:g} Mbit/s", "s"]
        rows = []
        for method in dict.fromkeys(method for of in runs.values() for method in of):
            run = trained(runs, method)
            # Some methods went on until the target.
            total = trained(runs, repr(Dense()))[-1].steps if target else run[-1].steps
            steps = None if target is None else steps_to(run, target)
            wire = [sum(r.interface_bytes for r in run) / len(run) / 1e3]
            accuracy = next(r.accuracy for r in run if r.steps >= total or r is run[-1])
            cells = [method, *(f"{kilobytes:.1f}" for kilobytes in wire)]
            cells += ["-" if math.isnan(accuracy) else f"{accuracy:.2%}"]
            cells += ["-" if steps is None else str(steps)]
            for by_method in runs.values():
                of = by_method.get(method)
                cells += ["-" if of is None else f"{1e3 * seconds_at(of, total) / total:.0f}"]
                cells += ["-" if of is None or steps is None else f"{seconds_at(of, steps):.1f}"]
            rows.append(cells)
        until = "" if target is None else f"; steps and seconds until {target:.1%}"
        title = f"{case} batches ({CASES[case]} images a step), {ranks} ranks{until}"
        yield make_table(title, headings, rows, whole="method")


def draw(folder: Path, reports: Sequence[Report], known: Sequence[str] = ()) -> None:
    """Draw accuracy by time for each setting and rate, and the time to the target by rate.

    `known` are the values of ``--known``.
    """
    names = list(dict.fromkeys(report.method for report in reports))
    styles = line_styles(read_methods(", ".join(names), known))
    # Colours repeat after ten methods.
    look = {
        name: {**style, "marker": "osD"[i // 10 % 3]}
        for i, (name, style) in enumerate(zip(names, styles, strict=True))
    }
    for (case, ranks), runs in groups(reports).items():
        shown = {
            method: run
            for method in dict.fromkeys(method for of in runs.values() for method in of)
            if not math.isnan((run := trained(runs, method))[-1].accuracy)
        }
        for mbit, by_method in runs.items():

            def accuracy(
                axes: Axes,
                by_method: dict[str, list[Report]] = by_method,
                shown: dict[str, list[Report]] = shown,
            ) -> None:
                for method, run in shown.items():
                    if method in by_method:
                        times = [seconds_at(by_method[method], r.steps) for r in run]
                        axes.plot(times, [r.accuracy for r in run], markersize=3, **look[method])
                axes.set_xscale("log")
                axes.set_xlabel("training time in s (log scale)")
                _show_numbers(axes.xaxis)
                axes.set_ylabel("test accuracy")
                show_percent(axes.yaxis)

            title = f"{case} batches, {ranks} ranks, {mbit:g} Mbit/s"
            picture = chart(accuracy, title, len(shown))
            atomic_write(folder / f"accuracy-{case}-{ranks}-{mbit:g}.png", picture)
        target = target_of(runs)
        if target is None:
            continue

        def until(
            axes: Axes,
            runs: Runs = runs,
            shown: dict[str, list[Report]] = shown,
            target: float = target,
        ) -> None:
            for method, run in shown.items():
                steps = steps_to(run, target)
                if steps is not None:
                    rates = sorted(rate for rate in runs if method in runs[rate])
                    times = [seconds_at(runs[rate][method], steps) for rate in rates]
                    axes.plot(rates, times, **look[method])
            axes.set_xscale("log")
            axes.set_yscale("log")
            axes.set_xlabel("rate of a link in Mbit/s (log scale)")
            axes.set_ylabel(f"s to {target:.1%} (log scale)")
            _show_numbers(axes.xaxis)
            _show_numbers(axes.yaxis, minor=True)

        picture = chart(until, f"{case} batches, {ranks} ranks", len(shown))
        atomic_write(folder / f"time-{case}-{ranks}.png", picture)


def _show_numbers(axis: Axis, minor: bool = False) -> None:
    from matplotlib.ticker import LogFormatter, ScalarFormatter

    axis.set_major_formatter(ScalarFormatter())
    if minor:
        axis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 1)))


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
    add("--rates", type=listed(float), default=[1000.0, 100.0, 10.0], metavar="LIST",
        help="rates of the links in Mbit/s (default: 1000,100,10)")  # fmt: skip
    add("--ranks", type=listed(int), default=[4, 8], metavar="LIST",
        help="numbers of ranks (default: 4,8)")  # fmt: skip
    add("--cases", type=listed(str), default=list(CASES), metavar="LIST",
        help=f"batches: {', '.join(f'{c} ({n} images a step)' for c, n in CASES.items())} "
        "(default: all)")  # fmt: skip
    add_methods(parser, f"{len(METHODS)} of all kinds",
        "; and DDP's own Dense(), Float16(), TorchPowerSGD(RANK) and NoExchange()")  # fmt: skip
    add("--steps", type=int, default=320, help="steps of each run (default: 320)")
    add("--report-every", type=int, default=20, metavar="N",
        help="measure accuracy after every N steps (default: 20)")  # fmt: skip
    add("--timed-steps", type=int, metavar="N",
        help="at all rates but the first of --rates take N steps alone, whose time is measured: a "
        "rate changes no accuracy (default: all steps)")  # fmt: skip
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
    if not 1 <= options.report_every <= options.steps:
        raise ValueError("--report-every: from 1 to --steps")
    if options.timed_steps is not None and options.timed_steps < 2 * options.report_every:
        # The first steps of a run are not as the others.
        raise ValueError("--timed-steps: at least twice --report-every")
    if options.images < max(CASES.values()):
        raise ValueError(f"--images starts at {max(CASES.values())}")
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
        reports = read_reports(file)
        if not reports:
            raise ValueError(f"--out {options.out}: there are no reports in link.csv")
        draw(options.out, reports, options.known)
    except ValueError as error:
        parser.error(str(error))
    for table in tables(reports):
        console().print(table)
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
    reports: list[Report] = []
    probes: list[dict[str, Any]] = []
    interrupted = False
    trained = [] if options.probe_only else methods
    cases = options.cases[:1] if options.probe_only else options.cases
    timed = options.timed_steps or options.steps
    counts = {rate: timed if i else options.steps for i, rate in enumerate(options.rates)}
    total = len(cases) * len(options.ranks) * len(trained) * sum(counts.values())
    progress = Progress(console=printer, disable=not printer.is_terminal, transient=True)
    try:
        with progress:
            bar = progress.add_task("training", total=max(total, 1))
            for case, ranks, mbit in itertools.product(cases, options.ranks, options.rates):
                steps = min(options.steps, counts[mbit])
                task = {
                    "methods": trained,
                    "known": options.known,
                    "probe": case == cases[0],
                    "mbit": mbit,
                    "batch": CASES[case],
                    "steps": steps,
                    "report_every": options.report_every,
                    "evaluate": steps == options.steps,
                    "images": options.images,
                    "lr": options.lr,
                    "seed": options.seed,
                    "data_dir": options.data_dir,
                }
                with network.network(ranks, mbit) as names:
                    before = 0
                    for told in network.launch("benchmarks.common.link_rank", names, task):
                        if "probe" in told:
                            probes.append({"ranks": ranks, "mbit": mbit, **told["probe"]})
                            continue
                        report = Report(case=case, ranks=ranks, mbit=mbit, **told)
                        reports.append(report)
                        write_reports(options.out / "link.csv", reports)
                        what = f"{case}, {ranks} ranks, {mbit:g} Mbit/s: {report.method}"
                        # Steps beyond those asked for do not count.
                        counted = min(report.steps, steps)
                        progress.update(bar, advance=max(0, counted - before), description=what)
                        before = counted if report.steps < steps else 0
                        if not printer.is_terminal and report.steps == steps:
                            ms = 1e3 * report.seconds / report.steps
                            printer.print(f"{what}: {ms:.0f} ms a step, {report.accuracy:.2%}")
    except KeyboardInterrupt:
        interrupted = True
    except RuntimeError as error:
        printer.print(f"link.py: error: {error}", style="red", soft_wrap=True)
        return 1
    for table in tables(reports):
        printer.print(table)
    if probes:
        printer.print(probe_table(probes))
        printer.print(limit_of_the_link(probes), soft_wrap=True)
        text = json.dumps(probes, indent=1) + "\n"
        atomic_write(options.out / "exchange.json", text.encode())
    if reports:
        draw(options.out, reports, options.known)
    printer.print(f"Results are in {options.out}.", soft_wrap=True)
    return INTERRUPTED if interrupted else 0


if __name__ == "__main__":
    start(main)
