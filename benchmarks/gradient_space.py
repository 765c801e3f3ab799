"""Measure how many directions the gradients of training span.

One model is trained on all images by mini-batch SGD with momentum. The gradient of an epoch is the
sum of the gradients of its steps, as in arXiv 2202.00280, section 2.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import platform
import shlex
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__" and __spec__ is None:  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor, nn

import lbgm_compress
from benchmarks.common.command_line import (
    INTERRUPTED,
    Parser,
    add_data_and_model,
    check_common,
    check_folder,
    number_in,
    positive,
    start,
)
from benchmarks.common.data import Dataset, DatasetMissing, load
from benchmarks.common.models import build
from benchmarks.common.tables import console, make_table
from benchmarks.common.training import evaluate
from lbgm_compress._util.files import atomic_write
from lbgm_compress.analysis import GradientSpace


class Epoch(NamedTuple):
    """The test accuracy and loss after an epoch."""

    accuracy: float
    loss: float
    """Mean cross-entropy."""


class Diverged(Exception):
    """Raised if a gradient has inf or nan; the message names the epoch."""


def limited(dataset: Dataset, images: int | None, test_images: int | None, seed: int) -> Dataset:
    """Return a data set with at most so many images, drawn by `seed`; all of them for None."""
    generator = torch.Generator().manual_seed(seed)
    train = torch.randperm(len(dataset.train_labels), generator=generator)[:images]
    test = torch.randperm(len(dataset.test_labels), generator=generator)[:test_images]
    return Dataset(
        dataset.name,
        dataset.train_images[train],
        dataset.train_labels[train],
        dataset.test_images[test],
        dataset.test_labels[test],
    )


def train(
    options: argparse.Namespace, dataset: Dataset
) -> Iterator[tuple[dict[str, Tensor], Epoch]]:
    """Train, and yield every epoch as it ends, with the sum of its steps' gradients.

    Raises
    ------
    Diverged
        If that sum is not finite.
    """
    device = torch.device(options.device)
    image = tuple(dataset.train_images.shape[1:])
    model = build(options.model, image, dataset.classes, options.seed).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=options.lr, momentum=options.momentum)
    images, labels = dataset.train_images.to(device), dataset.train_labels.to(device)
    test = dataset.test_images.to(device), dataset.test_labels.to(device)
    generator = torch.Generator().manual_seed(options.seed)
    for number in range(1, options.epochs + 1):
        total = {name: torch.zeros_like(weight) for name, weight in model.named_parameters()}
        order = torch.randperm(len(labels), generator=generator).to(device)
        for batch in order.split(options.batch_size):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
            for name, weight in model.named_parameters():
                total[name] += weight.grad
            optimizer.step()
        if not all(gradient.isfinite().all() for gradient in total.values()):
            raise Diverged(f"the gradient of epoch {number} is not finite: take a smaller --lr")
        yield total, Epoch(*evaluate(model, dict(model.named_parameters()), *test))


# --- the results ---------------------------------------------------------------------------------


def rows_of(space: GradientSpace) -> list[dict[str, Any]]:
    """Return the numbers of directions of the whole gradient and of each layer."""
    return [
        {
            "layer": "whole" if layer is None else layer,
            "n95": space.components(0.95, layer),
            "n99": space.components(0.99, layer),
            "rank": space.rank(layer=layer),
        }
        for layer in (None, *space.layers)
    ]


def history_table(space: GradientSpace, epochs: list[Epoch]) -> Table:
    """Return a table of ten epochs, or of all if there are fewer."""
    histories = space.history(0.95), space.history(0.99)
    count = len(space)
    shown = sorted({math.ceil(count * i / 10) for i in range(1, 11)})
    cells = [
        (str(t), f"{epochs[t - 1].accuracy:.2%}", *(str(history[t - 1]) for history in histories))
        for t in shown
    ]
    return make_table(None, ("epochs", "accuracy", "N95", "N99"), cells)


def sizes_of(options: argparse.Namespace, dataset: Dataset) -> dict[str, int]:
    """Return the number of entries of each tensor of the model."""
    image = tuple(dataset.train_images.shape[1:])
    model = build(options.model, image, dataset.classes, options.seed)
    return {name: weight.numel() for name, weight in model.named_parameters()}


def layers_table(rows: list[dict[str, Any]], sizes: dict[str, int], epochs: int) -> Table:
    """Return a table of the whole gradient and the layers."""
    cells = []
    for row in rows:
        entries = sizes.get(row["layer"], sum(sizes.values()))
        counts = [str(row[name]) for name in ("n95", "n99", "rank")]
        cells.append((row["layer"], f"{entries:,}", *counts))
    headings = ("layer", "entries", "N95", "N99", "rank")
    return make_table(f"Of {epochs} gradients", headings, cells, whole="layer")


def title_of(options: argparse.Namespace, dataset: Dataset) -> str:
    """Return a description of the training."""
    projected = "" if options.projection is None else f", projected on {options.projection}"
    return (
        f"{options.dataset}, {options.model}, {len(dataset.train_labels):,} images, batches of "
        f"{options.batch_size}, learning rate {options.lr:g}, momentum {options.momentum:g}, "
        f"seed {options.seed}{projected}"
    )


def summary(
    options: argparse.Namespace, arguments: list[str], space: GradientSpace, epochs: list[Epoch]
) -> dict[str, Any]:
    """Return the contents of summary.json: options, versions and results."""
    return {
        "command": shlex.join(["python", "benchmarks/gradient_space.py", *arguments]),
        "arguments": {
            name.replace("_", "-"): str(value) if isinstance(value, Path) else value
            for name, value in vars(options).items()
            if value is not None
        },
        "interrupted": len(epochs) < options.epochs,
        "versions": {
            "lbgm_compress": lbgm_compress.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
            "threads": torch.get_num_threads(),
        },
        "epochs": len(epochs),
        "accuracy": epochs[-1].accuracy,
        "loss": epochs[-1].loss,
        "layers": rows_of(space),
    }


def write(
    folder: Path,
    options: argparse.Namespace,
    arguments: list[str],
    space: GradientSpace,
    epochs: list[Epoch],
    title: str,
) -> None:
    """Write all files."""
    accuracies = [epoch.accuracy for epoch in epochs]
    space.write_csv(folder, {"accuracy": accuracies, "loss": [epoch.loss for epoch in epochs]})
    space.plot(folder, accuracies, title)
    text = json.dumps(summary(options, arguments, space, epochs), indent=2) + "\n"
    atomic_write(folder / "summary.json", text.encode())


# --- the command line ----------------------------------------------------------------------------


def build_parser() -> Parser:
    """Return the parser of the command line."""
    parser = Parser("gradient_space.py", __doc__)
    add = parser.add_argument
    add_data_and_model(parser)
    add("--epochs", type=positive, default=50, metavar="T", help="epochs (default: 50)")
    add(
        "--batch-size",
        type=positive,
        default=128,
        metavar="B",
        help="images in a step (default: 128)",
    )
    add(
        "--lr",
        type=number_in(0, math.inf, open_low=True),
        default=0.01,
        help="learning rate (default: 0.01)",
    )
    add(
        "--momentum",
        type=number_in(0, 1),
        default=0.9,
        metavar="MU",
        help="momentum, 0 to 1 (default: 0.9)",
    )
    add("--images", type=positive, metavar="N", help="training images, at most (default: all)")
    add("--test-images", type=positive, metavar="N", help="test images, at most (default: all)")
    add(
        "--per-layer",
        action="store_true",
        help="measure each tensor of the model, too (default: the whole gradient only)",
    )
    add(
        "--projection",
        type=positive,
        metavar="D",
        help="keep D numbers of each gradient (with --per-layer: of each layer of it) in memory "
        "(default: keep all numbers, in a file in the folder of --out until the end)",
    )
    add("--seed", type=int, default=0, help="seed of everything random (default: 0)")
    add("--device", default="cpu", help="cpu or cuda, where training runs (default: cpu)")
    add(
        "--out",
        type=Path,
        default=Path("gradient-space-results"),
        metavar="DIR",
        help="folder for the results (default: gradient-space-results)",
    )
    return parser


def prepare(options: argparse.Namespace) -> Dataset:
    """Check all options, and return the images to train with.

    Raises
    ------
    ValueError
        If something is wrong; the message is one line.
    """
    check_common(options)
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ValueError("the pictures need matplotlib: pip install matplotlib") from None
    check_folder(options.out)
    try:
        dataset = load(options.dataset, options.data_dir, options.seed)
    except DatasetMissing as error:
        raise ValueError(str(error)) from None
    return limited(dataset, options.images, options.test_images, options.seed)


@contextlib.contextmanager
def space_of(options: argparse.Namespace) -> Iterator[GradientSpace]:
    """Yield an empty space for the gradients; its file, if it has one, is removed at the end."""
    if options.projection is not None:
        yield GradientSpace(
            per_layer=options.per_layer, projection=options.projection, seed=options.seed
        )
        return
    with tempfile.TemporaryDirectory(dir=options.out, prefix=".gradients.") as folder:
        yield GradientSpace(per_layer=options.per_layer, file=Path(folder) / "gradients.f32")


def collect(
    options: argparse.Namespace, dataset: Dataset, space: GradientSpace, printer: Console
) -> tuple[list[Epoch], BaseException | None]:
    """Train and fill the space; return the epochs, and the exception that ended them, if any."""
    epochs: list[Epoch] = []
    progress = Progress(
        TextColumn("epoch {task.completed}/{task.total}"),
        BarColumn(bar_width=24),
        TextColumn("accuracy {task.fields[accuracy]}"),
        TimeRemainingColumn(elapsed_when_finished=True),
        TextColumn("left"),
        console=printer,
        disable=not printer.is_terminal,
    )
    try:
        with progress:
            task = progress.add_task("", total=options.epochs, accuracy="-")
            for gradient, epoch in train(options, dataset):
                epochs.append(epoch)
                space.add(gradient)
                progress.update(task, advance=1, accuracy=f"{epoch.accuracy:.2%}")
                if not printer.is_terminal:
                    printer.print(f"epoch {len(epochs)}/{options.epochs}: {epoch.accuracy:.2%}")
    except (KeyboardInterrupt, Diverged, OSError) as error:
        return epochs[: len(space)], error
    return epochs, None


def main(arguments: list[str]) -> int:
    """Run the command line and return the exit status."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    try:
        dataset = prepare(options)
    except ValueError as error:
        parser.error(str(error))
    printer = console()
    with space_of(options) as space:
        epochs, stopped = collect(options, dataset, space, printer)
        if epochs:
            title = title_of(options, dataset)
            write(options.out, options, arguments, space, epochs, title)
            printer.print(title, history_table(space, epochs), sep="\n")
            printer.print(layers_table(rows_of(space), sizes_of(options, dataset), len(epochs)))
            printer.print(f"Results are in {options.out}.", soft_wrap=True)
    if stopped is None:
        return 0
    kept = f"the files hold {len(epochs)} epochs" if epochs else "no epoch was finished"
    if isinstance(stopped, KeyboardInterrupt):
        printer.print(f"Interrupted: {kept}.")
        return INTERRUPTED
    print(f"{parser.prog}: error: {stopped}; {kept}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    start(main)
