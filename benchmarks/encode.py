"""Measure how long compressors take for the gradients of ResNet-50, GPT-2 and many small tensors.

Times are medians in ms on the CPU, and ratios to peers that are measured in the same run and in
turns, so that a busy machine slows both. The peers are one read of the gradients and the look-back
gradients, which is the least that an angle can cost; `torch.topk` on every tensor with int64
indices, as GRACE selects; torch's PowerSGD hook; and a backward pass without compression.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__" and __spec__ is None:  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
import torch.distributed as dist
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from benchmarks.common.backward import backward_times
from benchmarks.common.baselines import Dense as Plain
from benchmarks.common.baselines import TorchPowerSGD
from benchmarks.common.command_line import Parser, check_file, listed, positive, start
from benchmarks.common.shapes import gpt2_shapes, random_gradients, resnet50_shapes
from benchmarks.common.tables import console, make_table, write_csv
from lbgm_compress import (
    LBGM,
    Atomo,
    Compressor,
    ErrorFeedback,
    LookBackSubspace,
    PowerSGD,
    Receiver,
    Sender,
    SharedLBGM,
    SharedSubspace,
    SignSGD,
    TopK,
)
from lbgm_compress.algorithm import Algorithm
from lbgm_compress.collective import Averager, Transport
from lbgm_compress.collective.transport import Pending, done
from lbgm_compress.compressors.lbgm import LookBack
from lbgm_compress.decoded import Dense

RATIO = 0.01
RANKS = (1, 2, 4)
READ = "one read of both buffers"
PEER = f"torch.topk on every tensor, {RATIO:.0%}, int64 indices"
# A model of many parameters of few elements.
COUNT, SIZE = 3000, 4
SMALL = f"{COUNT:,} x {SIZE}"
BACKWARD = f"backward pass of {SMALL} on two ranks"
# Compressors for it, and how many times a backward pass without compression they may take.
BOUNDS: dict[Compressor, float] = {
    LBGM(): 3.0,
    LBGM(TopK(0.1)): 4.0,
    ErrorFeedback(LookBackSubspace(4, values="int4")): 5.0,
}
# Contributions that add up, and the rank of the hook that they are compared with.
SUMS_RANK = 4
SUMS: dict[str, Algorithm] = {
    "ErrorFeedback(SharedSubspace(8)), nothing replaced": ErrorFeedback(
        SharedSubspace(8, refresh_every=10**9)
    ),
    "ErrorFeedback(SharedSubspace(8)), a direction replaced": ErrorFeedback(
        SharedSubspace(8, refresh_every=1)
    ),
    "ErrorFeedback(PowerSGD(2))": ErrorFeedback(PowerSGD(2)),
    "ErrorFeedback(PowerSGD(4))": ErrorFeedback(PowerSGD(4)),
    "SharedLBGM(), all recycled": SharedLBGM(1.0),
    "SharedLBGM(), all in full": SharedLBGM(0.0),
}
Step = Callable[[], object]


class Row(NamedTuple):
    """The times of one method, in ms (medians)."""

    what: str
    encode: float
    decode: float | None
    """None if encoding and decoding are one call."""
    peer: str
    ratio: float | None
    """Encoding and decoding together, divided by the peer's."""
    bound: float | None
    """The largest ratio that is good enough."""


def flat_gradients(seed: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Return one normally distributed float32 buffer, and the gradients that are views of it."""
    shapes = resnet50_shapes()
    sizes = [torch.Size(shape).numel() for shape in shapes.values()]
    generator = torch.Generator().manual_seed(seed)
    flat = torch.randn(sum(sizes), generator=generator)
    parts = flat.split(sizes)
    return flat, {
        name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)
    }


def topk_encode(gradients: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Return values and indices of the largest entries, selected as GRACE does."""
    selected = []
    for gradient in gradients:
        flat = gradient.reshape(-1)
        k = max(1, round(RATIO * flat.numel()))
        indices = torch.topk(flat.abs(), k, sorted=False).indices
        selected.append((flat[indices], indices))
    return selected


def topk_decode(selected: Sequence[tuple[Tensor, Tensor]], like: Sequence[Tensor]) -> list[Tensor]:
    """Return the selections as dense tensors."""
    dense = []
    for (values, indices), gradient in zip(selected, like, strict=True):
        flat = torch.zeros(gradient.numel())
        flat[indices] = values
        dense.append(flat.view(gradient.shape))
    return dense


def measure(
    steps: dict[str, Step],
    repeats: int,
    advance: Callable[[], None],
    prepare: Callable[[int], object] = lambda turn: None,
) -> dict[str, float]:
    """Run all steps in turns, and return the median time of each in ms.

    `prepare` is called before each step with the number of the turn, and its time is not counted.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        prepare(0)
        step()
    gc.collect()
    gc.disable()
    try:
        for turn in range(1, repeats + 1):
            for name, step in steps.items():
                prepare(turn)
                start = time.perf_counter()
                step()
                times[name].append((time.perf_counter() - start) * 1e3)
            advance()
    finally:
        gc.enable()
    return {name: statistics.median(taken) for name, taken in times.items()}


def angles(seed: int, repeats: int, advance: Callable[[], None]) -> list[Row]:
    """Measure LBGM's decision, alone and within a round that recycles every tensor."""
    flat, gradients = flat_gradients(seed)
    noise, _ = flat_gradients(seed + 1)
    sender, receiver = Sender(LBGM()), Receiver(LBGM(), like=gradients)
    receiver.decompress("worker", sender.compress(gradients))
    # Near enough to the sent gradients to be recycled, and in other memory.
    noise.mul_(0.1).add_(flat)
    near = {
        name: part.view_as(gradient)
        for (name, gradient), part in zip(
            gradients.items(), noise.split([g.numel() for g in gradients.values()]), strict=True
        )
    }
    held = sender.state_dict()["tensors"]
    states = [held[name]["state"] for name in gradients]
    look_backs = [LookBack(state["look_back"], state["square_norm"]) for state in states]
    decoded = [Dense(near[name]) for name in gradients]
    message = sender.compress(near)
    steps: dict[str, Step] = {
        READ: lambda: (noise.sum(), [look_back.gradient.sum() for look_back in look_backs]),
        "angle": lambda: LBGM(delta=0.2).decide(decoded, look_backs),
        "encode": lambda: sender.compress(near),
        "decode": lambda: receiver.decompress("worker", message),
    }
    took = measure(steps, repeats, advance)
    read = took[READ]
    return [
        Row(READ, read, None, "", None, None),
        Row("LBGM(): angle test", took["angle"], None, READ, took["angle"] / read, 1.6),
        Row(
            "LBGM(): recycled round",
            took["encode"],
            took["decode"],
            READ,
            (took["encode"] + took["decode"]) / read,
            None,
        ),
    ]


def selections(seed: int, repeats: int, advance: Callable[[], None]) -> list[Row]:
    """Measure compressors that send every tensor in full, beside `torch.topk`."""
    _, gradients = flat_gradients(seed)
    _, others = flat_gradients(seed + 1)
    tensors = list(gradients.values())
    selected = topk_encode(tensors)
    steps: dict[str, Step] = {
        "peer encode": lambda: topk_encode(tensors),
        "peer decode": lambda: topk_decode(selected, tensors),
    }
    compressors: list[Compressor] = [TopK(RATIO), LBGM(TopK(RATIO)), SignSGD(), LBGM(SignSGD())]
    for compressor in compressors:
        add_steps(steps, compressor, gradients, others)
    took = measure(steps, repeats, advance)
    peer = took["peer encode"] + took["peer decode"]
    rows = [Row(PEER, took["peer encode"], took["peer decode"], "", None, None)]
    for compressor in compressors:
        name = repr(compressor)
        encode, decode = took[f"{name} encode"], took[f"{name} decode"]
        bound = 1.0 if compressor == LBGM(TopK(RATIO)) else None
        rows.append(Row(name, encode, decode, PEER, (encode + decode) / peer, bound))
    return rows


def add_steps(
    steps: dict[str, Step],
    compressor: Compressor,
    gradients: dict[str, Tensor],
    others: dict[str, Tensor],
) -> None:
    """Add encoding and decoding of a full round, with alternating gradients: none is recycled."""
    sender, receiver = Sender(compressor), Receiver(compressor, like=gradients)
    latest = {"message": sender.compress(others)}
    turn = [gradients, others]

    def encode() -> None:
        latest["message"] = sender.compress(turn[0])
        turn.reverse()
        if any(report.recycled for report in sender.report().values()):
            raise RuntimeError(f"{compressor!r} recycled gradients that have nothing in common")

    steps[f"{compressor!r} encode"] = encode
    steps[f"{compressor!r} decode"] = lambda: receiver.decompress("worker", latest["message"])


def add_rounds(
    steps: dict[str, Step],
    compressor: Compressor,
    gradients: dict[str, Tensor],
    others: dict[str, Tensor],
) -> None:
    """Add encoding and decoding in consecutive rounds, with alternating gradients."""
    sender, receiver = Sender(compressor), Receiver(compressor, like=gradients)
    receiver.decompress("worker", sender.compress(gradients))
    latest: dict[str, Tensor] = {}
    turn = [others, gradients]
    into = {name: torch.zeros_like(gradient) for name, gradient in gradients.items()}

    def encode() -> None:
        latest["message"] = sender.compress(turn[0])
        turn.reverse()

    steps[f"{compressor!r} encode"] = encode
    steps[f"{compressor!r} decode"] = lambda: receiver.accumulate(
        "worker", latest["message"], into, 0.25
    )


def factors(seed: int, repeats: int, advance: Callable[[], None]) -> list[Row]:
    """Measure two singular triplets of every tensor."""
    _, gradients = flat_gradients(seed)
    sender, receiver = Sender(Atomo(2)), Receiver(Atomo(2), like=gradients)
    message = sender.compress(gradients)
    took = measure(
        {
            "encode": lambda: sender.compress(gradients),
            "decode": lambda: receiver.decompress("worker", message),
        },
        repeats,
        advance,
    )
    return [Row("Atomo(2)", took["encode"], took["decode"], "", None, None)]


def power_name(rank: int) -> str:
    """Return the name of the peer of look-back subspaces."""
    return f"torch's PowerSGD hook, rank {rank}"


class Bucket:
    """A bucket of gradients, with the methods that a communication hook calls."""

    def __init__(self, gradients: Sequence[Tensor]) -> None:
        self.flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        self.shapes = [gradient.shape for gradient in gradients]

    def index(self) -> int:
        return 0

    def is_last(self) -> bool:
        return True

    def buffer(self) -> Tensor:
        return self.flat

    def gradients(self) -> list[Tensor]:
        parts = self.flat.split([shape.numel() for shape in self.shapes])
        return [part.view(shape) for part, shape in zip(parts, self.shapes, strict=True)]


def power_step(rank: int, bucket: Bucket) -> Step:
    """Return a call of torch's PowerSGD hook, after its dense steps."""
    hook = TorchPowerSGD(rank).hook()
    assert hook is not None
    state, function = hook

    def step() -> None:
        function(state, bucket).wait()

    for _ in range(TorchPowerSGD.DENSE_STEPS):
        step()
    return step


def subspaces(seed: int, repeats: int, advance: Callable[[], None]) -> list[Row]:
    """Measure look-back subspaces beside torch's PowerSGD of the same rank.

    Both have error feedback, and both encode and decode. PowerSGD's hook runs in a process group of
    one, in which nothing has to be exchanged.
    """
    _, gradients = flat_gradients(seed)
    _, others = flat_gradients(seed + 1)
    steps: dict[str, Step] = {}
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    for rank in RANKS:
        steps[power_name(rank)] = power_step(rank, Bucket(list(gradients.values())))
        # A direction is replaced in every round, or in none.
        for delta in (0.0, 1.0):
            compressor = ErrorFeedback(LookBackSubspace(rank, delta))
            add_rounds(steps, compressor, gradients, others)
    took = measure(steps, repeats, advance)
    dist.destroy_process_group()
    rows = []
    for rank in RANKS:
        peer = took[power_name(rank)]
        rows.append(Row(power_name(rank), peer, None, "", None, None))
        for delta in (0.0, 1.0):
            name = repr(ErrorFeedback(LookBackSubspace(rank, delta)))
            encode, decode = took[f"{name} encode"], took[f"{name} decode"]
            rows.append(Row(name, encode, decode, power_name(rank), (encode + decode) / peer, 1.5))
    return rows


class Alone(Transport):
    """The transport of one rank of several, whose all-reduce takes no time."""

    rank, size = 0, 1

    def gather_equal(self, data: Tensor) -> Tensor:
        return data.view(1, -1).clone()

    def begin_all_reduce(self, data: Tensor, key: str) -> Pending[Tensor]:
        return done(data)


def sum_step(method: Algorithm, names: Iterable[str], bucket: Bucket) -> Step:
    """Return a step that averages a bucket in place, as the communication hook does."""
    gradients = dict(zip(names, bucket.gradients(), strict=True))
    averager = Averager(method, gradients, Alone())

    def step() -> None:
        averager.begin(gradients).finish(gradients)
        averager.end_step()

    return step


def sums(seed: int, repeats: int, advance: Callable[[], None]) -> list[Row]:
    """Measure what a rank computes where contributions add up, beside torch's PowerSGD hook.

    Both average a bucket in place, and feed errors back where the name says so. Before each step
    the bucket is filled with new gradients, which is not counted. Nothing is exchanged, so that a
    ring's sums and the time on a link are left out.
    """
    rows = []
    before = torch.get_num_threads()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    models = {"ResNet-50": resnet50_shapes(), "GPT-2 small": gpt2_shapes()}
    for model, shapes in models.items():
        flat = torch.cat([g.reshape(-1) for g in random_gradients(shapes, seed).values()])
        for threads in (1, 2):
            torch.set_num_threads(threads)
            rows += _sums_of(
                f"{model}, {threads} thread{'s' * (threads > 1)}", shapes, flat, repeats
            )
    torch.set_num_threads(before)
    dist.destroy_process_group()
    for _ in range(repeats):
        advance()
    return rows


def _sums_of(
    where: str, shapes: dict[str, tuple[int, ...]], flat: Tensor, repeats: int
) -> list[Row]:
    bucket = Bucket([torch.zeros(shape) for shape in shapes.values()])

    def fill(turn: int) -> None:
        # Gradients of consecutive turns have nothing in common.
        start = turn % 2 * (flat.numel() // 3)
        torch.cat([flat[start:], flat[:start]], out=bucket.flat)

    fill(0)
    peer = power_name(SUMS_RANK)
    steps = {peer: power_step(SUMS_RANK, bucket)}
    for name, method in SUMS.items():
        steps[name] = sum_step(method, shapes, bucket)
        # The first round is another than the later ones.
        fill(0)
        steps[name]()
    took = measure(steps, repeats, lambda: None, fill)
    rows = [Row(f"{peer}, {where}", took[peer], None, "", None, None)]
    for name in SUMS:
        ratio = took[name] / took[peer]
        rows.append(Row(f"{name}, {where}", took[name], None, f"{peer}, {where}", ratio, None))
    return rows


def many_tensors(seed: int, repeats: int, advance: Callable[[], None]) -> list[Row]:
    """Measure models of many tensors, of few elements each or of very different sizes."""
    rows = []
    models = {SMALL: {str(i): (SIZE,) for i in range(COUNT)}, "GPT-2 small": gpt2_shapes()}
    for model, shapes in models.items():
        gradients, others = random_gradients(shapes, seed), random_gradients(shapes, seed + 1)
        for compressor in BOUNDS:
            steps: dict[str, Step] = {}
            add_rounds(steps, compressor, gradients, others)
            took = measure(steps, max(1, repeats // 3), lambda: None)
            encode, decode = took[f"{compressor!r} encode"], took[f"{compressor!r} decode"]
            rows.append(Row(f"{compressor!r}, {model}", encode, decode, "", None, None))
    for _ in range(repeats):
        advance()
    return rows


def backward_passes(seed: int, repeats: int, advance: Callable[[], None]) -> list[Row]:
    """Measure backward passes of a model of many small tensors through DDP on two ranks."""
    plain, *found = backward_times([Plain(), *BOUNDS], COUNT, SIZE, repeats, seed)
    for _ in range(repeats):
        advance()
    rows = [Row(BACKWARD, plain.seconds * 1e3, None, "", None, None)]
    for (compressor, bound), backward in zip(BOUNDS.items(), found, strict=True):
        milliseconds, ratio = backward.seconds * 1e3, backward.seconds / plain.seconds
        rows.append(Row(f"{compressor!r}, {BACKWARD}", milliseconds, None, BACKWARD, ratio, bound))
    return rows


PARTS = {
    "angles": angles,
    "selections": selections,
    "factors": factors,
    "subspaces": subspaces,
    "sums": sums,
    "many-tensors": many_tensors,
    "backward-passes": backward_passes,
}


def csv_rows(rows: Sequence[Row]) -> list[tuple[object, ...]]:
    """Return the rows of the CSV file."""
    return [
        (
            row.what,
            f"{row.encode:.3f}",
            "" if row.decode is None else f"{row.decode:.3f}",
            row.peer,
            "" if row.ratio is None else f"{row.ratio:.3f}",
            "" if row.bound is None else row.bound,
        )
        for row in rows
    ]


def table_of(rows: Sequence[Row]) -> Table:
    """Return the rows as a table; a broken bound is red."""
    cells = [
        (
            row.what,
            f"{row.encode:.1f}",
            "" if row.decode is None else f"{row.decode:.1f}",
            "" if row.ratio is None else f"{row.ratio:.2f}",
            "" if row.bound is None else f"{row.bound:.1f}",
            row.peer,
        )
        for row in rows
    ]
    broken = [
        position
        for position, row in enumerate(rows)
        if row.ratio is not None and row.bound is not None and row.ratio > row.bound
    ]
    return make_table(
        f"ResNet-50, 161 tensors, and others; float32, {torch.get_num_threads()} threads",
        ("what", "encode ms", "decode ms", "ratio", "bound", "ratio to"),
        cells,
        left=("ratio to",),
        red=broken,
    )


def part(text: str) -> str:
    """Return the name of a part."""
    if text not in PARTS:
        raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(PARTS)}")
    return text


def build_parser() -> Parser:
    """Return the parser of the command line."""
    parser = Parser("encode.py", __doc__)
    add = parser.add_argument
    add(
        "--repeats",
        type=positive,
        default=15,
        metavar="N",
        help="measurements of each (default: 15)",
    )
    add("--seed", type=int, default=0, help="seed of the gradients (default: 0)")
    add(
        "--parts",
        type=listed(part),
        default=list(PARTS),
        metavar="LIST",
        help=f"what to measure, comma-separated: {', '.join(PARTS)} (default: all)",
    )
    add(
        "--out",
        type=Path,
        default=Path("encode.csv"),
        metavar="FILE",
        help="CSV to write (default: encode.csv)",
    )
    return parser


def main(arguments: list[str]) -> int:
    """Run the command line and return the exit status."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    try:
        check_file(options.out)
    except ValueError as error:
        parser.error(str(error))
    printer = console()
    rows: list[Row] = []
    with Progress(console=printer, disable=not printer.is_terminal, transient=True) as progress:
        task = progress.add_task("measuring times", total=len(options.parts) * options.repeats)
        for name in options.parts:
            rows += PARTS[name](options.seed, options.repeats, lambda: progress.advance(task))
    columns = ("what", "encode_ms", "decode_ms", "peer", "ratio_to_peer", "bound")
    write_csv(options.out, columns, csv_rows(rows))
    printer.print(table_of(rows))
    printer.print(f"Written to {options.out}.", soft_wrap=True)
    return 0


if __name__ == "__main__":
    start(main)
