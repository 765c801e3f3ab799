"""Measure what a step costs one of K ranks: messages that are gathered beside sums.

The gradients are those of ResNet-50, random ones. With messages a rank encodes its own and decodes
those of K - 1 others; with sums it makes its contribution and writes the average. Nothing is
exchanged: bytes are counted, and of a sum they are those of a ring. What is measured is the rank's
processor time, with one thread, up to 16 ranks; beyond, it is computed from that of one decoding.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__" and __spec__ is None:  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from rich.table import Table
from torch import Tensor

from benchmarks.common.command_line import Parser, check_folder, positive, start
from benchmarks.common.plots import FAMILIES, family_of, png, show_bytes, subplots, tidy
from benchmarks.common.shapes import random_gradients, resnet50_shapes
from benchmarks.common.tables import console, make_table, write_csv
from lbgm_compress import (
    LBGM,
    ErrorFeedback,
    LookBackSubspace,
    PowerSGD,
    Receiver,
    Sender,
    SharedSubspace,
    TopK,
)
from lbgm_compress._util.files import atomic_write
from lbgm_compress._util.units import human_bytes
from lbgm_compress.algorithm import Algorithm
from lbgm_compress.collective.lockstep import Lockstep
from lbgm_compress.compressor import Compressor

MEASURED = (2, 4, 8, 16)
COMPUTED = (32, 64, 128, 256, 512, 1024)
GATHERED: dict[str, Compressor] = {
    "LookBackSubspace(8), no direction replaced": ErrorFeedback(LookBackSubspace(8, 1.0)),
    "LBGM(TopK(0.01)), nothing recycled": LBGM(TopK(0.01), delta=0.0),
}
SUMMED: dict[str, Algorithm] = {
    "SharedSubspace(8), no direction replaced": ErrorFeedback(
        SharedSubspace(8, refresh_every=10**9)
    ),
    "SharedSubspace(8), a direction replaced": ErrorFeedback(SharedSubspace(8, refresh_every=1)),
    "PowerSGD(4)": ErrorFeedback(PowerSGD(4)),
}
DENSE = "float32, all-reduced"


class Row(NamedTuple):
    """The cost of a step for one rank."""

    method: str
    ranks: int
    measured: bool
    """Whether the time was measured, or computed from the time of one decoding."""
    encode_ms: float
    """Of a sum all of its arithmetic."""
    decode_ms: float
    received_bytes: int
    """What the rank receives in a step."""


def timed(work: Any, repeats: int) -> float:
    """Return the median processor time of calls in ms, after one that is not counted."""
    work()
    times = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        times.append(1e3 * (time.process_time() - start))
    return statistics.median(times)


def gathered(
    name: str, compressor: Compressor, rounds: Sequence[dict[str, Tensor]], repeats: int
) -> list[Row]:
    """Return the cost where messages are gathered."""
    sender, receiver = Sender(compressor), Receiver(compressor, like=rounds[0])
    first = sender.compress(rounds[0])
    for other in range(max(MEASURED) - 1):
        receiver.decompress(other, first)
    turn = list(rounds[1:])

    def encode() -> Tensor:
        turn.reverse()
        return sender.compress(turn[0])

    # A receiver that has missed a message refuses the next, if it looks back at it.
    state = sender.state_dict()
    encode_ms = timed(encode, repeats)
    sender.load_state_dict(state)
    message = encode()
    into = {name: torch.zeros_like(g) for name, g in rounds[0].items()}
    rows = []
    for ranks in MEASURED:

        def decode(ranks: int = ranks) -> None:
            for other in range(ranks - 1):
                receiver.accumulate(other, message, into, 1 / ranks)

        decode_ms = timed(decode, repeats)
        size = (ranks - 1) * message.numel()
        rows.append(Row(name, ranks, True, encode_ms, decode_ms, size))
    each = rows[-1].decode_ms / (max(MEASURED) - 1)
    rows += [
        Row(name, k, False, encode_ms, (k - 1) * each, (k - 1) * message.numel()) for k in COMPUTED
    ]
    return rows


def ring(size: int, ranks: int) -> int:
    """Return the bytes that a rank receives where `size` bytes are summed round a ring."""
    return round(2 * (ranks - 1) / ranks * size)


def summed(
    name: str, algorithm: Algorithm, rounds: Sequence[dict[str, Tensor]], repeats: int
) -> list[Row]:
    """Return the cost where contributions are summed, whose arithmetic is that of one rank."""
    alone = Lockstep(algorithm, 1)
    alone.average([rounds[0]])
    turn = list(rounds[1:])

    def step() -> None:
        turn.reverse()
        alone.average([turn[0]])

    took = timed(step, repeats)
    return [
        Row(name, ranks, ranks in MEASURED, took, 0.0, ring(alone.bytes, ranks))
        for ranks in (*MEASURED, *COMPUTED)
    ]


def table_of(rows: Sequence[Row]) -> Table:
    """Return a table of the rows for a few numbers of ranks."""
    cells = [
        (
            row.method,
            str(row.ranks),
            f"{row.encode_ms:.0f}" if row.encode_ms else "-",
            f"{row.decode_ms:.0f}" if row.decode_ms else "-",
            human_bytes(row.received_bytes),
            "-" if row.method == DENSE else "measured" if row.measured else "computed",
        )
        for row in rows
        if row.ranks in (2, 8, 16, 64, 1024)
    ]
    headings = ("method", "ranks", "ms", "ms to decode", "received", "times")
    title = "one step of one rank, gradients of ResNet-50"
    return make_table(title, headings, cells, whole="method")


def draw(rows: Sequence[Row]) -> bytes:
    """Return a picture of bytes and times against the number of ranks."""
    figure, [panels] = subplots(1, 2, (11, 4.6))
    methods = list(dict.fromkeys(row.method for row in rows))
    for method in methods:
        own = [row for row in rows if row.method == method]
        colour, marker = FAMILIES[family_of(method)] if method != DENSE else ("black", "*")
        ranks = [row.ranks for row in own]
        line = "--" if "a direction replaced" in method else "-"
        style = {"color": colour, "linewidth": 1.3, "linestyle": line}
        panels[0].plot(ranks, [row.received_bytes for row in own], **style, label=method)
        if method != DENSE:
            panels[1].plot(ranks, [row.encode_ms + row.decode_ms for row in own], **style)
            for axes, of in (
                (panels[0], lambda row: row.received_bytes),
                (panels[1], lambda row: row.encode_ms + row.decode_ms),
            ):
                for row in own:
                    face = colour if row.measured else "white"
                    axes.plot(row.ranks, of(row), marker, color=colour, markerfacecolor=face)
    panels[0].set_ylabel("bytes that a rank receives in a step")
    panels[1].set_ylabel("processor time of a rank in a step, ms")
    for axes in panels:
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel("ranks")
        axes.xaxis.set_major_formatter(lambda x, _: f"{x:.0f}")
        tidy(axes)
    show_bytes(panels[0].yaxis)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    figure.suptitle(
        "One step of one rank, gradients of ResNet-50; hollow: computed", fontsize=10, x=0.01,
        ha="left",
    )  # fmt: skip
    return png(figure)


def build_parser() -> Parser:
    """Return the parser of the command line."""
    parser = Parser("ranks.py", __doc__)
    add = parser.add_argument
    add("--repeats", type=positive, default=5, metavar="N",
        help="measurements of each (default: 5)")  # fmt: skip
    add("--seed", type=int, default=0, help="seed of the gradients (default: 0)")
    add("--out", type=Path, default=Path("ranks-results"), metavar="DIR",
        help="folder for the results (default: ranks-results)")  # fmt: skip
    return parser


def main(arguments: list[str]) -> int:
    """Run the command line and return the exit status."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    try:
        check_folder(options.out)
    except ValueError as error:
        parser.error(str(error))
    torch.set_num_threads(1)
    shapes = resnet50_shapes()
    rounds = [random_gradients(shapes, options.seed + turn) for turn in range(3)]
    size = 4 * sum(g.numel() for g in rounds[0].values())
    ranks = (*MEASURED, *COMPUTED)
    rows = [Row(DENSE, count, False, 0.0, 0.0, ring(size, count)) for count in ranks]
    for name, compressor in GATHERED.items():
        rows += gathered(name, compressor, rounds, options.repeats)
    for name, algorithm in SUMMED.items():
        rows += summed(name, algorithm, rounds, options.repeats)
    write_csv(options.out / "ranks.csv", Row._fields, rows)
    atomic_write(options.out / "ranks.png", draw(rows))
    printer = console(150)
    printer.print(table_of(rows))
    printer.print(f"Results are in {options.out}.", soft_wrap=True)
    return 0


if __name__ == "__main__":
    start(main)
