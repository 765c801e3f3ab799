"""Measure what server and client keep in memory, and the size of messages.

Tensors of one shape are measured once, with random gradients, and counted as often as a model has
them, so that the model need not fit into memory.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__" and __spec__ is None:  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from benchmarks.common.command_line import Parser, check_file, start
from benchmarks.common.shapes import resnet50_shapes, transformer_shapes
from benchmarks.common.tables import console, make_table, write_csv
from lbgm_compress import Receiver, Sender, parse_compressor
from lbgm_compress._util.units import human_bytes

MODELS: dict[str, Callable[[], dict[str, tuple[int, ...]]]] = {
    "ResNet-50": resnet50_shapes,
    "transformer, 1.3 billion": transformer_shapes,
}
COMPRESSORS = (
    "LBGM()",
    "LBGM(TopK(0.01))",
    "LookBackSubspace(4)",
    "LookBackSubspace(4, values='int4')",
    "LookBackSubspace(8, values='int4')",
)
CLIENTS = 1_000_000


class Row(NamedTuple):
    """Bytes for one model and compressor."""

    model: str
    compressor: str
    dense: int
    """The gradient in float32."""
    server: int
    """Kept by a `Receiver` for one client."""
    client: int
    """Kept by a `Sender`, without a residual."""
    first: int
    """The first message."""
    later: int
    """A later message, of other random gradients."""


def kept(state: Any) -> int:
    """Return the bytes of all tensors in a nested dict."""
    if isinstance(state, Tensor):
        return state.untyped_storage().nbytes()
    if isinstance(state, dict):
        return sum(kept(value) for value in state.values())
    return 0


def measure(shape: tuple[int, ...], compressor: str) -> tuple[int, int, int, int]:
    """Return server, client, first and later bytes for one tensor."""
    like = {"tensor": torch.empty(1).expand(shape)}
    sender = Sender(parse_compressor(compressor))
    receiver = Receiver(sender.compressor, like)
    sizes = []
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        message = sender.compress({"tensor": torch.randn(shape, generator=generator)})
        receiver.decompress("client", message)
        sizes.append(sum(report.bytes for report in sender.report().values()))
    return kept(receiver.state_dict()), kept(sender.state_dict()), sizes[0], sizes[1]


def rows(advance: Callable[[], None]) -> Iterator[Row]:
    """Measure every model and compressor."""
    for model, shapes in MODELS.items():
        counts = Counter(shapes().values())
        dense = 4 * sum(torch.Size(shape).numel() * n for shape, n in counts.items())
        for compressor in COMPRESSORS:
            totals = [0, 0, 0, 0]
            for shape, count in counts.items():
                for i, number in enumerate(measure(shape, compressor)):
                    totals[i] += count * number
            advance()
            yield Row(model, compressor, dense, *totals)


def table_of(model: str, found: list[Row]) -> Table:
    """Return a model's rows as a table."""
    headings = ("compressor", "first message", "a later one, full or refreshed")
    kept = ("kept by the client", "kept by the server", f"of {CLIENTS:,} clients")
    cells = [
        (
            row.compressor,
            *map(human_bytes, (row.first, row.later, row.client)),
            *map(human_bytes, (row.server, CLIENTS * row.server)),
        )
        for row in found
    ]
    title = f"{model}: {human_bytes(found[0].dense)} dense (float32)"
    return make_table(title, (*headings, *kept), cells, whole="compressor")


def main(arguments: list[str]) -> int:
    """Run the command line and return the exit status."""
    parser = Parser("memory.py", __doc__)
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("memory.csv"),
        metavar="FILE",
        help="CSV to write (default: memory.csv)",
    )
    options = parser.parse_args(arguments)
    try:
        check_file(options.out)
    except ValueError as error:
        parser.error(str(error))
    printer = console()
    with Progress(console=printer, disable=not printer.is_terminal, transient=True) as progress:
        bar = progress.add_task("measuring", total=len(MODELS) * len(COMPRESSORS))
        found = list(rows(lambda: progress.advance(bar)))
    write_csv(options.out, Row._fields, found)
    for model in MODELS:
        printer.print(table_of(model, [row for row in found if row.model == model]))
    printer.print(f"Written to {options.out}.", soft_wrap=True)
    return 0


if __name__ == "__main__":
    start(main)
