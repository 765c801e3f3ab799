"""Measure the time that a LookBackProbe adds to a step of training on the CPU.

Steps with and without a probe take turns, so that a busy machine slows both.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__" and __spec__ is None:  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from rich.console import Console
from rich.progress import track
from torch import nn

from benchmarks.common.command_line import Parser, check_file, listed, start
from benchmarks.common.models import build
from benchmarks.common.tables import console, make_table, write_csv
from lbgm_compress import TopK
from lbgm_compress.probe import LookBackProbe

# Arguments of the probe.
CASES: dict[str, dict[str, Any]] = {
    "thresholds": {"ranks": (), "averaged": ()},
    "thresholds and averages": {"ranks": ()},
    "all": {},
    "all, over TopK(0.1)": {"inner": TopK(0.1)},
}
# The probe's clock also runs in the steps without it, so that its limit is half of the usual one.
COST = 0.05


class Row(NamedTuple):
    """The times of one case."""

    model: str
    batch: int
    case: str
    step_ms: float
    """The time of a step without a probe."""
    probed_ms: float
    """The time of a step with it."""
    overhead: float
    """The time that the probe adds, as a share."""
    own_overhead: float
    """The same by the probe's own clock, which has less noise."""


def training(model: str, batch: int) -> tuple[nn.Module, Callable[[], float]]:
    """Return a model, and a function that trains it for a step and returns the time in s."""
    network = build(model, (1, 28, 28), 10, 0)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(1024, 1, 28, 28, generator=generator)
    labels = torch.randint(10, (1024,), generator=generator)

    def step() -> float:
        chosen = torch.randint(1024, (batch,), generator=generator)
        start = time.perf_counter()
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(images[chosen]), labels[chosen]).backward()
        optimizer.step()
        return time.perf_counter() - start

    return network, step


def measure(models: list[str], batches: list[int], steps: int, console: Console) -> Iterator[Row]:
    """Yield the times of every case."""
    for model in models:
        for batch in batches:
            for case, given in CASES.items():
                _, bare = training(model, batch)
                network, watched = training(model, batch)
                probe = LookBackProbe(network, cost=COST, **given)
                bare()
                pairs = [
                    (bare(), watched())
                    for _ in track(
                        range(steps),
                        f"{model}, batches of {batch}, {case}",
                        console=console,
                        disable=not console.is_terminal,
                    )
                ]
                probe.close()
                plain, probed = (statistics.mean(times) for times in zip(*pairs, strict=True))
                own = probe.report().seconds / steps
                shares = probed / plain - 1, own / (probed - own)
                yield Row(model, batch, case, 1e3 * plain, 1e3 * probed, *shares)


def main(arguments: list[str]) -> int:
    """Run the command line and return the exit status."""
    parser = Parser("probe_cost.py", __doc__)
    add = parser.add_argument
    add(
        "--models",
        type=listed(str),
        default=["cnn"],
        metavar="LIST",
        help="models of compare.py (default: cnn)",
    )
    add(
        "--batches",
        type=listed(int),
        default=[128],
        metavar="LIST",
        help="images in a step (default: 128)",
    )
    add("--steps", type=int, default=400, help="steps for each case (default: 400)")
    add("--threads", type=int, default=torch.get_num_threads(), help="threads (default: torch's)")
    add(
        "--out",
        type=Path,
        default=Path("probe-cost.csv"),
        metavar="FILE",
        help="CSV to write (default: probe-cost.csv)",
    )
    options = parser.parse_args(arguments)
    try:
        if options.steps < 1 or options.threads < 1 or min(options.batches) < 1:
            raise ValueError("--steps, --threads and --batches are at least 1")
        for model in options.models:
            build(model, (1, 28, 28), 10, 0)
        check_file(options.out)
    except (KeyError, ValueError) as error:
        unknown = f"--models: there is no model {error}" if isinstance(error, KeyError) else error
        parser.error(str(unknown))
    torch.set_num_threads(options.threads)
    printer = console()
    rows = list(measure(options.models, options.batches, options.steps, printer))
    write_csv(options.out, Row._fields, rows)
    headings = ("model", "batch", "watched", "a step, ms", "with the probe", "adds")
    cells = [
        (
            *(row.model, str(row.batch), row.case),
            *(f"{row.step_ms:.1f}", f"{row.probed_ms:.1f}"),
            *(f"{row.overhead:.1%}", f"{row.own_overhead:.1%}"),
        )
        for row in rows
    ]
    title = f"A LookBackProbe beside training, {options.threads} threads"
    printer.print(make_table(title, (*headings, "by its own clock"), cells, left=("watched",)))
    return 0


if __name__ == "__main__":
    start(main)
