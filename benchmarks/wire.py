"""Measure what messages weigh and compare it with what they may weigh.

Every size is that of a message or a section of bytes that was really made. The bound of the indices
of k of n entries is 1.05 log2 C(n, k) / 8 bytes; where that is below 40 bytes, log2 C(n, k) / 8 and
two bytes.
"""

from __future__ import annotations

import csv
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

if not __package__:  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.common.command_line import Parser, check_file
from benchmarks.common.data import load
from benchmarks.common.models import build
from benchmarks.common.shapes import random_gradients, resnet50_shapes
from lbgm_compress import LBGM, Compressor, ErrorFeedback, Sender, SignSGD, TopK
from lbgm_compress.wire.indices import encode_indices

HEADER = 16
RECYCLED = 6
OVERHEAD = 1.05
SHARES = (0.001, 0.01, 0.1)
STEPS = 60
# A section takes whole bytes and one for its method: 5 % of less than this would not hold them.
FRAMING = 2
SMALL = 40


class Row(NamedTuple):
    """A size and its bound, in bytes."""

    what: str
    measured: int
    bound: float

    @property
    def ratio(self) -> float:
        """The size as a share of its bound."""
        return self.measured / self.bound

    @property
    def ok(self) -> bool:
        """Whether the size keeps within its bound."""
        return self.measured <= self.bound


def recycled(gradients: dict[str, Tensor]) -> Iterator[Row]:
    """Weigh messages in which every tensor is recycled, and what one more tensor adds to them."""
    names = sorted(gradients)
    for compressor in (LBGM(), LBGM(TopK(0.01)), LBGM(SignSGD()), ErrorFeedback(LBGM(TopK(0.01)))):
        # Gradients that their compressor does not change are parallel to themselves in round two.
        whole, less = (
            recycled_message(compressor, {name: gradients[name] for name in chosen})
            for chosen in (names, names[1:])
        )
        yield Row(f"{compressor!r}: one recycled tensor", whole - less, RECYCLED)
        bound = RECYCLED * len(names) + HEADER
        yield Row(f"{compressor!r}: message of {len(names)} recycled tensors", whole, bound)


def recycled_message(compressor: Compressor, gradients: dict[str, Tensor]) -> int:
    """Return the size of a second message, which repeats the first one's gradients.

    Raises
    ------
    RuntimeError
        If the compressor did not recycle all of them, so that this would be another figure.
    """
    sender = Sender(compressor)
    sender.compress(gradients)
    if isinstance(compressor, ErrorFeedback):
        # What is left over from the first round would turn the second one's gradients.
        gradients = {name: torch.zeros_like(tensor) for name, tensor in gradients.items()}
        sender = Sender(compressor)
        sender.compress(gradients)
    message = sender.compress(gradients)
    if not all(report.recycled for report in sender.report().values()):
        raise RuntimeError(f"{compressor!r} did not recycle gradients that it had just sent")
    return message.numel()


def signs(gradients: dict[str, Tensor]) -> Iterator[Row]:
    """Weigh signs, tensor by tensor and together."""
    for compressor in (SignSGD(), SignSGD(scaled=True)):
        for n in (1, 1000, 1_000_000):
            message = Sender(compressor).compress({"tensor": torch.ones(n)})
            # A message of one tensor is that tensor's share and the header.
            yield Row(f"{compressor!r}: tensor of {n:,}", message.numel() - HEADER, n / 8 + 16)
        message = Sender(compressor).compress(gradients)
        bound = sum(tensor.numel() / 8 + 16 for tensor in gradients.values()) + HEADER
        yield Row(f"{compressor!r}: message of {len(gradients)} tensors", message.numel(), bound)


def information(n: int, k: int) -> float:
    """Return log2 C(n, k) / 8: the bytes that any k of n positions need on average at least."""
    nats = math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
    return nats / math.log(2) / 8


def random_positions(seed: int) -> Iterator[Row]:
    """Weigh positions that are as likely as any others."""
    generator = torch.Generator().manual_seed(seed)
    n = 1_000_000
    for share in SHARES:
        k = round(share * n)
        indices = torch.randperm(n, generator=generator)[:k].sort().values
        size = encode_indices(indices, n).numel()
        bound = OVERHEAD * information(n, k)
        yield Row(f"indices, random, {share:.1%} of {n:,}", size, bound)


def gradients_of_training(seed: int) -> Iterator[tuple[str, Tensor]]:
    """Train on handwritten digits, and yield every step's gradient of every tensor."""
    dataset = load("digits", None, seed)
    images, labels = dataset.train_images, dataset.train_labels
    for name in ("fcn", "cnn"):
        for batch in (len(labels), 32):
            generator = torch.Generator().manual_seed(seed)
            model = build(name, tuple(images.shape[1:]), dataset.classes, seed)
            for step in range(1, STEPS + 1):
                chosen = torch.randperm(len(labels), generator=generator)[:batch]
                model.zero_grad()
                loss = torch.nn.functional.cross_entropy(model(images[chosen]), labels[chosen])
                loss.backward()
                for tensor, parameter in model.named_parameters():
                    yield f"{name}, batch {batch}, step {step}, {tensor}", parameter.grad.detach()
                with torch.no_grad():
                    for parameter in model.parameters():
                        parameter -= 0.05 * parameter.grad


def real_positions(seed: int) -> Iterator[Row]:
    """Weigh the positions that TopK selects from gradients of training."""
    found: dict[tuple[float, bool], list[Row]] = {}
    for where, gradient in gradients_of_training(seed):
        n = gradient.numel()
        for share in SHARES:
            indices = TopK(share).encode(gradient, {}).decoded.indices
            k = indices.numel()
            if k in (0, n):
                # Nothing is to be said, and nothing is sent.
                continue
            size = encode_indices(indices, n).numel()
            least = information(n, k)
            bound = least + FRAMING if least < SMALL else OVERHEAD * least
            row = Row(f"{where}, {k:,} of {n:,}", size, bound)
            found.setdefault((share, least < SMALL), []).append(row)
    for (share, small), rows in sorted(found.items(), key=lambda item: (item[0][1], item[0][0])):
        kind = f"indices, gradients, {share:.1%}"
        kind += f", below {SMALL} bytes" if small else ""
        worst = max(rows, key=lambda row: row.ratio)
        yield Row(f"{kind}: worst ({worst.what})", worst.measured, worst.bound)
        total = sum(row.measured for row in rows)
        bound = sum(row.bound for row in rows)
        yield Row(f"{kind}: all {len(rows):,} together", total, bound)


def build_parser() -> Parser:
    """Build the command line."""
    parser = Parser(
        "wire.py",
        "Measure what messages weigh, in bytes, and compare it with what they may "
        "weigh. The exit status is 1 if a bound is broken.",
    )
    add = parser.add_argument
    out = Path("wire.csv")
    add("--out", type=Path, default=out, metavar="FILE", help=f"CSV to write (default: {out})")
    add("--seed", type=int, default=0, help="seed of everything random (default: 0)")
    return parser


def rows(seed: int) -> Iterator[Row]:
    """Measure everything."""
    gradients = random_gradients(resnet50_shapes(), seed)
    yield from recycled(gradients)
    yield from signs(gradients)
    yield from random_positions(seed)
    yield from real_positions(seed)


def write_csv(file: Path, measured: list[Row]) -> None:
    """Write a row for each size."""
    with file.open("w", newline="") as out:
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(("what", "measured_bytes", "bound_bytes", "ratio", "within"))
        for row in measured:
            bound, ratio = f"{row.bound:.1f}", f"{row.ratio:.4f}"
            writer.writerow((row.what, row.measured, bound, ratio, row.ok))


def main(arguments: list[str]) -> int:
    """Run the command line and return the exit status."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    try:
        check_file(options.out)
    except ValueError as error:
        parser.error(str(error))
    console = Console(width=None if sys.stdout.isatty() else 120)
    with console.status("measuring sizes"):
        measured = list(rows(options.seed))
    write_csv(options.out, measured)
    table = Table(title="Sizes in bytes")
    table.add_column("what")
    for head in ("measured", "bound", "ratio"):
        table.add_column(head, justify="right")
    for row in measured:
        style = None if row.ok else "red"
        sizes = f"{row.measured:,}", f"{row.bound:,.1f}", f"{row.ratio:.3f}"
        table.add_row(row.what, *sizes, style=style)
    console.print(table)
    broken = sum(not row.ok for row in measured)
    console.print(f"{broken or 'No'} bound{'s' * (broken != 1)} broken. Written to {options.out}.")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
