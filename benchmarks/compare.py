"""Measure uplink bytes and accuracy of gradient compressors in training.

Every method trains the same model from the same initial parameters, with the same workers, order of
data and sampling of workers. The uplink of a round is the size of its messages in bytes.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import math
import platform
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__" and __spec__ is None:  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

import lbgm_compress
from benchmarks.common.command_line import (
    INTERRUPTED,
    Parser,
    add_data_and_model,
    add_methods,
    check_common,
    check_folder,
    number_in,
    positive,
    read_methods,
    start,
)
from benchmarks.common.data import DatasetMissing, load
from benchmarks.common.engines.running import ENGINES, EngineError, check_engine, running
from benchmarks.common.models import parameters
from benchmarks.common.partition import check_scheme, partition, subsets
from benchmarks.common.report import (
    MethodResult,
    cells,
    headings,
    summarise,
    write_files,
    write_rounds,
)
from benchmarks.common.tables import console, make_table
from benchmarks.common.training import Round, Training, check_sums, run
from lbgm_compress import (
    LBGM,
    Atomo,
    ErrorFeedback,
    Identity,
    LookBackSubspace,
    Sender,
    SignSGD,
    TopK,
)
from lbgm_compress._util.units import human_bytes
from lbgm_compress.algorithm import Algorithm

# Options of the default methods, and their defaults.
METHOD_OPTIONS = {"delta": 0.2, "ratio": 0.1, "rank": 2, "values": "float32"}


def batch_size(text: str) -> int | None:
    """Read ``full`` (None) or a whole number of at least 1."""
    return None if text == "full" else positive(text)


def build_parser() -> Parser:
    """Build the command line."""
    parser = Parser("compare.py", __doc__)
    add = parser.add_argument
    add_data_and_model(parser)
    add(
        "--engine",
        choices=("process", *ENGINES),
        default="process",
        help="engine that moves the messages: process (this process alone), ddp "
        "(DistributedDataParallel) or horovod, both on gloo with a process for each worker, or "
        "flower (Flower's simulation) (default: process)",
    )
    add("--workers", type=positive, default=20, metavar="K", help="number of workers (default: 20)")
    add("--rounds", type=positive, default=200, metavar="N", help="rounds (default: 200)")
    add(
        "--partition",
        default="iid",
        metavar="SCHEME",
        help="iid, classes:N (N classes a worker) or dirichlet:ALPHA (default: iid)",
    )
    add(
        "--images",
        type=positive,
        metavar="N",
        help="training images of a worker, at most (default: all of its part)",
    )
    add(
        "--local-steps",
        type=positive,
        default=1,
        metavar="TAU",
        help="steps of SGD a worker takes in a round (default: 1)",
    )
    add(
        "--batch-size",
        type=batch_size,
        default="full",
        metavar="B",
        help="images in a step, or full for all of a worker's (default: full)",
    )
    add(
        "--participation",
        type=number_in(0, 1, open_low=True),
        default=1.0,
        metavar="SHARE",
        help="share of the workers sampled in a round, above 0 to 1 (default: 1)",
    )
    add(
        "--lr",
        type=number_in(0, math.inf, open_low=True),
        default=0.02,
        help="learning rate of workers and server (default: 0.02)",
    )
    add(
        "--server-momentum",
        type=number_in(0, 1),
        default=0.9,
        metavar="MU",
        help="momentum of the server's average, 0 to 1 (default: 0.9)",
    )
    shaping = parser.add_argument_group("the default methods")
    shaping.add_argument(
        "--delta",
        type=float,
        help="threshold of LBGM's look-back phase error sin^2, 0 to 1 "
        f"(default: {METHOD_OPTIONS['delta']})",
    )
    shaping.add_argument(
        "--ratio",
        type=float,
        help=f"share of the entries that TopK keeps (default: {METHOD_OPTIONS['ratio']})",
    )
    shaping.add_argument(
        "--rank",
        type=int,
        help=f"singular triplets that Atomo keeps (default: {METHOD_OPTIONS['rank']})",
    )
    shaping.add_argument(
        "--values",
        help="precision of TopK's values: float32, float16, bfloat16, int8, int4 or int2 "
        f"(default: {METHOD_OPTIONS['values']})",
    )
    shaping.add_argument(
        "--error-feedback",
        action="store_true",
        help="add what compression lost to the next gradient: ErrorFeedback(C) in place of TopK, "
        "Atomo and SignSGD, LBGM(ErrorFeedback(C)) in place of LBGM(C) (default: off)",
    )
    add_methods(
        parser,
        "Identity, TopK, Atomo and SignSGD(scaled=True), alone and under LBGM, and "
        "ErrorFeedback(LookBackSubspace()); signs are scaled because plain ones would need a "
        "learning rate of their own",
        "; with --engine ddp also its own Dense(), Float16() and TorchPowerSGD(RANK)",
    )
    add(
        "--target-accuracy",
        type=number_in(0, 1),
        metavar="SHARE",
        help="test accuracy, 0 to 1, up to which bytes are counted (default: the final accuracy of "
        "Identity(), minus 0.005)",
    )
    add(
        "--test-images",
        type=positive,
        metavar="N",
        help="test images, at most (default: all)",
    )
    add(
        "--evaluate-every",
        type=positive,
        default=1,
        metavar="N",
        help="rounds from one evaluation to the next; rounds between repeat its accuracy "
        "(default: 1)",
    )
    add(
        "--average",
        type=positive,
        default=1,
        metavar="N",
        help="the final accuracy is the mean of the last N evaluations (default: 1)",
    )
    add(
        "--open-loop",
        action="store_true",
        help="train without compression, and measure only the messages that each method would "
        "send (default: off)",
    )
    add("--seed", type=int, default=0, help="seed of everything random (default: 0)")
    add("--device", default="cpu", help="cpu or cuda, where training runs (default: cpu)")
    add(
        "--out",
        default="compare-results",
        metavar="DIR",
        help="folder for the results (default: compare-results)",
    )
    return parser


def default_methods(options: argparse.Namespace) -> list[Algorithm]:
    """Return {Identity, TopK, Atomo, SignSGD} x {alone, under LBGM}, and LookBackSubspace.

    Raises
    ------
    ValueError
        If an option is outside its compressor's range.
    """
    given = {name: getattr(options, name) for name in METHOD_OPTIONS}
    chosen = {name: METHOD_OPTIONS[name] if v is None else v for name, v in given.items()}
    sparsifiers: list[Algorithm] = [
        Identity(),
        TopK(chosen["ratio"], chosen["values"]),
        Atomo(chosen["rank"]),
        SignSGD(scaled=True),
    ]
    methods: list[Algorithm] = []
    for sparsifier in sparsifiers:
        if options.error_feedback and sparsifier != Identity():
            # The other way round, ErrorFeedback(LBGM(C)), recycled less at the same accuracy.
            sparsifier = ErrorFeedback(sparsifier)
        methods += [sparsifier, LBGM(sparsifier, chosen["delta"])]
    # A subspace needs what it misses to come back.
    return [*methods, ErrorFeedback(LookBackSubspace())]


def methods_of(options: argparse.Namespace) -> list[Algorithm]:
    """Return the compressors to compare.

    Raises
    ------
    ValueError
        If the options do not describe compressors, or contradict each other.
    """
    if options.methods is None:
        return default_methods(options)
    shaping = [name for name in METHOD_OPTIONS if getattr(options, name) is not None]
    shaping += ["error-feedback"] if options.error_feedback else []
    if shaping:
        raise ValueError(
            f"--{shaping[0]} shapes the default methods: with --methods, write it into the list"
        )
    return read_methods(options.methods, options.known)


def prepare(options: argparse.Namespace) -> tuple[list[Algorithm], Training, Path]:
    """Check all options, and return the methods, the training and the folder.

    Raises
    ------
    ValueError
        If something is wrong; the message is one line.
    """
    methods = methods_of(options)
    check_common(options)
    check_engine(options.engine, methods, options.participation, options.device)
    if options.open_loop and options.engine != "process":
        raise ValueError(f"--open-loop is for --engine process, and --engine is {options.engine}")
    for method in methods:
        check_sums(method, options.participation, options.open_loop)
    # All data sets have ten classes: a wrong scheme is found before they are loaded.
    check_scheme(options.partition, classes=10)
    folder = Path(options.out)
    check_folder(folder)
    try:
        dataset = load(options.dataset, options.data_dir, options.seed)
    except DatasetMissing as error:
        raise ValueError(str(error)) from None
    parts = partition(dataset.train_labels, options.workers, options.partition, options.seed)
    if options.images is not None:
        parts = subsets(parts, options.images, options.seed)
    if options.test_images is not None:
        dataset = dataclasses.replace(
            dataset,
            test_images=dataset.test_images[: options.test_images],
            test_labels=dataset.test_labels[: options.test_images],
        )
    training = Training(
        dataset=dataset,
        parts=parts,
        model=options.model,
        rounds=options.rounds,
        local_steps=options.local_steps,
        batch_size=options.batch_size,
        participation=options.participation,
        lr=options.lr,
        server_momentum=options.server_momentum,
        seed=options.seed,
        device=torch.device(options.device),
        evaluate_every=options.evaluate_every,
        open_loop=options.open_loop,
    )
    return methods, training, folder


def dense_bytes_a_round(training: Training) -> int:
    """Return the size of all sampled workers' messages without compression."""
    weights = parameters(training.initial_model())
    return Sender(Identity()).compress(weights).numel() * training.sampled()


@contextlib.contextmanager
def runner(
    engine: str, training: Training, known: Sequence[str]
) -> Iterator[Callable[[Algorithm], Iterator[Round]]]:
    """Yield a function that trains with a compressor and yields the rounds."""
    if engine == "process":
        yield lambda compressor: run(training, compressor)
        return
    with running(engine, training, known) as started:
        yield started.run


def train(
    methods: Iterable[Algorithm],
    training: Training,
    folder: Path,
    console: Console,
    engine: str,
    known: Sequence[str] = (),
) -> tuple[list[MethodResult], bool]:
    """Run all methods; return their rounds, and True if a keyboard interrupt ended them."""
    results = [MethodResult(method, training.rounds) for method in methods]
    progress = Progress(
        TextColumn("{task.fields[which]}"),
        BarColumn(bar_width=24),
        TextColumn("round {task.fields[round]}/{task.fields[rounds]}"),
        TextColumn("accuracy {task.fields[accuracy]}"),
        TextColumn("uplink {task.fields[uplink]}"),
        TimeRemainingColumn(elapsed_when_finished=True),
        TextColumn("left"),
        console=console,
        disable=not console.is_terminal,
    )
    fields = {"which": "", "round": 0, "rounds": training.rounds, "accuracy": "-", "uplink": "-"}
    try:
        with runner(engine, training, known) as rounds_of, progress:
            task = progress.add_task("", total=len(results) * training.rounds, **fields)
            for number, result in enumerate(results, start=1):
                which = f"{number}/{len(results)} {result.name}"
                uplink = 0
                for round_ in rounds_of(result.compressor):
                    result.rounds.append(round_)
                    uplink += round_.uplink_bytes
                    progress.update(
                        task,
                        advance=1,
                        which=which,
                        round=round_.number,
                        accuracy=f"{round_.accuracy:.2%}",
                        uplink=human_bytes(uplink),
                    )
                write_rounds(folder, results)
                if not console.is_terminal:
                    last = result.rounds[-1]
                    console.print(f"{which}: accuracy {last.accuracy:.2%}, {human_bytes(uplink)}")
    except KeyboardInterrupt:
        return results, True
    return results, False


def target_of(options: argparse.Namespace, results: list[MethodResult]) -> float | None:
    """Return the accuracy up to which bytes are counted, if there is one."""
    if options.target_accuracy is not None:
        return float(options.target_accuracy)
    for result in results:
        if result.compressor == Identity() and result.finished:
            return result.final_accuracy(options.average) - 0.005
    return None


def arguments_of(options: argparse.Namespace) -> dict[str, Any]:
    """Return every option by name, with the value that took effect."""
    values = dict(vars(options))
    if options.batch_size is None:
        values["batch_size"] = "full"
    if options.methods is None:
        for name, default in METHOD_OPTIONS.items():
            values[name] = default if values[name] is None else values[name]
    values["methods"] = ", ".join(map(repr, methods_of(options)))
    if not options.known:
        del values["known"]
    return {name.replace("_", "-"): value for name, value in values.items() if value is not None}


def about(
    options: argparse.Namespace, target: float | None, interrupted: bool, arguments: list[str]
) -> dict[str, Any]:
    """Return the part of summary.json beside the methods: title, options and versions."""
    batch = "all" if options.batch_size is None else options.batch_size
    steps = f"{options.local_steps} local step" + ("s" if options.local_steps > 1 else "")
    sampled = "" if options.participation == 1 else f", {options.participation:.0%} a round"
    return {
        "title": f"{options.dataset}, {options.model}, {options.workers} workers{sampled}, "
        f"{options.partition}, {steps} of {batch} images, learning rate {options.lr:g}, "
        f"server momentum {options.server_momentum:g}, seed {options.seed}"
        + ("" if options.images is None else f", {options.images} images a worker")
        + ("" if options.engine == "process" else f", through {options.engine}")
        + (", open loop: the accuracy is that of training without compression" * options.open_loop),
        "command": shlex.join(["python", "benchmarks/compare.py", *arguments]),
        "arguments": arguments_of(options),
        "seed": options.seed,
        "interrupted": interrupted,
        "target_accuracy": target,
        "versions": {
            "lbgm_compress": lbgm_compress.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
            "platform": platform.platform(),
            "threads": torch.get_num_threads(),
        },
    }


def main(arguments: list[str]) -> int:
    """Run the command line and return the exit status."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    try:
        methods, training, folder = prepare(options)
    except ValueError as error:
        parser.error(str(error))
    printer = console()
    try:
        results, interrupted = train(
            methods, training, folder, printer, options.engine, options.known
        )
    except EngineError as error:
        print(f"{parser.prog}: error: --engine {options.engine}: {error}", file=sys.stderr)
        return 1
    target = target_of(options, results)
    rows = summarise(results, dense_bytes_a_round(training), target, options.average)
    write_files(folder, results, rows, about(options, target, interrupted, arguments))
    table = make_table(
        "Uplink bytes against accuracy",
        headings(rows, target),
        [cells(row) for row in rows],
        whole="method",
    )
    printer.print(table)
    printer.print(f"Results are in {folder}: open {folder / 'report.html'}", soft_wrap=True)
    if interrupted:
        printer.print("Interrupted: the files hold the finished rounds.")
        return INTERRUPTED
    return 0


if __name__ == "__main__":
    start(main)
