"""Measure the size of messages, and compare it with bounds.

Every size is that of a message or of a section of bytes that was really made. The bound of the
indices of k of n entries is 1.05 log2 C(n, k) / 8 bytes; where that is below 40 bytes, the bound is
log2 C(n, k) / 8 and two bytes. The exit status is 1 if a bound is broken.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__" and __spec__ is None:  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import Tensor

from benchmarks.common.command_line import Parser, check_file, start
from benchmarks.common.data import load
from benchmarks.common.models import build
from benchmarks.common.shapes import random_gradients, resnet50_shapes
from benchmarks.common.tables import console, make_table, write_csv
from lbgm_compress import LBGM, Compressor, ErrorFeedback, Sender, SignSGD, TopK
from lbgm_compress.wire.indices import encode_indices

HEADER = 16
RECYCLED = 6
OVERHEAD = 1.05
SHARES = (0.001, 0.01, 0.1)
STEPS = 60
# A section has whole bytes, and one for its method: 5 % of a smaller section are less.
FRAMING = 2
SMALL = 40


class Row(NamedTuple):
    """A size and its bound, in bytes."""

    what: str
    measured: int
    bound: float

    @property
    def ratio(self) -> float:
        """The size divided by its bound."""
        return self.measured / self.bound

    @property
    def ok(self) -> bool:
        """True if the size is within its bound."""
        return self.measured <= self.bound


def recycled(gradients: dict[str, Tensor]) -> Iterator[Row]:
    """Measure messages of recycled tensors only, and the bytes that one more tensor adds."""
    names = sorted(gradients)
    for compressor in (LBGM(), LBGM(TopK(0.01)), LBGM(SignSGD()), ErrorFeedback(LBGM(TopK(0.01)))):
        # The second message repeats the gradients of the first, which are parallel to themselves.
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
        If the compressor did not recycle all of them.
    """
    if compressor.has_residual:
        # Of these nothing is lost. A residual would turn the gradients of the second message.
        sent = Sender(compressor).encode(gradients)[1]
        gradients = {name: decoded.dense() for name, decoded in sent.items()}
    sender = Sender(compressor)
    sender.compress(gradients)
    message = sender.compress(gradients)
    if not all(report.recycled for report in sender.report().values()):
        raise RuntimeError(f"{compressor!r} did not recycle gradients that it had just sent")
    return message.numel()


def signs(gradients: dict[str, Tensor]) -> Iterator[Row]:
    """Measure messages of signs, with one tensor and with many."""
    for compressor in (SignSGD(), SignSGD(scaled=True)):
        for n in (1, 1000, 1_000_000):
            message = Sender(compressor).compress({"tensor": torch.ones(n)})
            # A message of one tensor is a header and the tensor's part.
            yield Row(f"{compressor!r}: tensor of {n:,}", message.numel() - HEADER, n / 8 + 16)
        message = Sender(compressor).compress(gradients)
        bound = sum(tensor.numel() / 8 + 16 for tensor in gradients.values()) + HEADER
        yield Row(f"{compressor!r}: message of {len(gradients)} tensors", message.numel(), bound)


def information(n: int, k: int) -> float:
    """Return log2 C(n, k) / 8, the mean number of bytes that k of n positions need at least."""
    nats = math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
    return nats / math.log(2) / 8


def random_positions(seed: int) -> Iterator[Row]:
    """Measure uniformly random positions."""
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
    """Measure the positions that TopK selects from gradients of training."""
    found: dict[tuple[float, bool], list[Row]] = {}
    for where, gradient in gradients_of_training(seed):
        n = gradient.numel()
        for share in SHARES:
            indices = TopK(share).encode(gradient, {}).decoded.indices
            k = indices.numel()
            if k in (0, n):
                # There is one possible selection, and nothing is sent.
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
    """Return the parser of the command line."""
    parser = Parser("wire.py", __doc__)
    add = parser.add_argument
    out = Path("wire.csv")
    add("--out", type=Path, default=out, metavar="FILE", help=f"CSV to write (default: {out})")
    add("--seed", type=int, default=0, help="seed of everything random (default: 0)")
    return parser


def rows(seed: int) -> Iterator[Row]:
    """Yield all sizes."""
    gradients = random_gradients(resnet50_shapes(), seed)
    yield from recycled(gradients)
    yield from signs(gradients)
    yield from random_positions(seed)
    yield from real_positions(seed)


def main(arguments: list[str]) -> int:
    """Run the command line and return the exit status."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    try:
        check_file(options.out)
    except ValueError as error:
        parser.error(str(error))
    printer = console()
    with printer.status("measuring sizes"):
        measured = list(rows(options.seed))
    columns = ("what", "measured_bytes", "bound_bytes", "ratio", "within")
    numbers = [(r.what, r.measured, f"{r.bound:.1f}", f"{r.ratio:.4f}", r.ok) for r in measured]
    write_csv(options.out, columns, numbers)
    cells = [(r.what, f"{r.measured:,}", f"{r.bound:,.1f}", f"{r.ratio:.3f}") for r in measured]
    broken = [position for position, row in enumerate(measured) if not row.ok]
    headings = ("what", "measured", "bound", "ratio")
    printer.print(make_table("Sizes in bytes", headings, cells, red=broken))
    count = len(broken)
    printer.print(f"{count or 'No'} bound{'s' * (count != 1)} broken. Written to {options.out}.")
    return 1 if broken else 0


if __name__ == "__main__":
    start(main)
