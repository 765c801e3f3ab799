"""What the scripts' command lines share: errors in one line, before anything is done."""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch

from benchmarks.common.data import IMAGES
from benchmarks.common.models import IMAGE_MODELS

__all__ = [
    "INTERRUPTED",
    "Parser",
    "add_data_and_model",
    "check_common",
    "check_file",
    "check_folder",
    "listed",
    "number_in",
    "positive",
]

# The exit status of what a keyboard interrupt ended.
INTERRUPTED = 130


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, and which takes no abbreviations."""

    def __init__(self, prog: str, description: str) -> None:
        super().__init__(prog=prog, description=description, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


def check_folder(folder: Path) -> None:
    """Make the folder of ``--out``, if there is none.

    Raises
    ------
    ValueError
        If nothing can be written there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"--out {folder}: cannot write there: {error.strerror}") from None


def check_file(file: Path) -> None:
    """Make the file of ``--out``, if there is none.

    Raises
    ------
    ValueError
        If it cannot be written.
    """
    try:
        file.touch()
    except OSError as error:
        raise ValueError(f"--out {file}: cannot write there: {error.strerror}") from None


def listed(convert: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """Return a reader of comma-separated values."""

    def read(text: str) -> list[Any]:
        return [convert(part) for part in text.split(",")]

    return read


def positive(text: str) -> int:
    """Read a whole number of at least 1."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return number


def number_in(low: float, high: float, *, open_low: bool = False) -> Any:
    """Return a reader of numbers from `low` (or above it) to `high`."""

    def read(text: str) -> float:
        try:
            number = float(text)
        except ValueError:
            number = math.nan
        if not low <= number <= high or (open_low and number == low) or math.isinf(number):
            bounds = f"above {low:g}" if open_low else f"from {low:g}"
            bounds += f" to {high:g}" if math.isfinite(high) else " and finite"
            raise argparse.ArgumentTypeError(f"{text!r} is not a number {bounds}")
        return number

    return read


def add_data_and_model(parser: Parser) -> None:
    """Add the options that say what learns from what."""
    add = parser.add_argument
    add("--dataset", choices=IMAGES, default="digits", help="images (default: digits)")
    add(
        "--data-dir",
        metavar="DIR",
        help="folder of Fashion-MNIST's IDX files, plain or .gz (default: where Debian's package "
        "dataset-fashion-mnist puts them)",
    )
    add(
        "--model",
        choices=IMAGE_MODELS,
        default="fcn",
        help="network (default: fcn, 128 hidden units)",
    )


def check_common(options: argparse.Namespace) -> None:
    """Check ``--device``, ``--seed`` and ``--data-dir``.

    Raises
    ------
    ValueError
        If one cannot be.
    """
    try:
        device = torch.device(options.device).type
    except RuntimeError:
        device = ""
    if device not in ("cpu", "cuda"):
        raise ValueError(f"--device {options.device!r} is neither cpu nor cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {options.device}: there is no CUDA device, use --device cpu")
    if not 0 <= options.seed < 2**31:
        raise ValueError(f"--seed {options.seed} is not from 0 to 2147483647")
    if options.data_dir is not None and options.dataset != "fashion-mnist":
        raise ValueError(f"--data-dir is for fashion-mnist, and --dataset is {options.dataset}")
    if options.data_dir is not None and not Path(options.data_dir).is_dir():
        raise ValueError(f"--data-dir {options.data_dir}: there is no such folder")
