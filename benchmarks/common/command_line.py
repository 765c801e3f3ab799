"""Command lines: options that commands share, and errors of one line before anything is done."""

from __future__ import annotations

import argparse
import math
import shutil
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NoReturn

import torch

from benchmarks.common.baselines import BASELINES, Baseline
from benchmarks.common.data import IMAGES
from benchmarks.common.models import IMAGE_MODELS
from lbgm_compress.algorithm import Algorithm
from lbgm_compress.compressors.parse import import_known, parse_compressors

__all__ = [
    "INTERRUPTED",
    "Parser",
    "add_data_and_model",
    "add_known",
    "add_methods",
    "check_common",
    "check_file",
    "check_folder",
    "listed",
    "number_in",
    "positive",
    "read_methods",
    "start",
]

# The exit status after a keyboard interrupt.
INTERRUPTED = 130


class Parser(argparse.ArgumentParser):
    """A parser of the command line of one command.

    An error is one line, options cannot be abbreviated, and the help begins with the description.

    Parameters
    ----------
    prog
        The name of the command.
    text
        The command's docstring; the first paragraph is the description.
    """

    def __init__(self, prog: str, text: str | None) -> None:
        super().__init__(prog=prog, allow_abbrev=False)
        self.summary = (text or "").split("\n\n")[0]

    def format_help(self) -> str:
        width = shutil.get_terminal_size().columns - 2
        return f"{textwrap.fill(self.summary, width)}\n\n{super().format_help()}"

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


def start(main: Callable[[list[str]], int]) -> NoReturn:
    """Run a command with the arguments of this process, and exit with its status."""
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


def check_folder(folder: Path) -> None:
    """Make the folder of ``--out`` if it does not exist.

    Raises
    ------
    ValueError
        If it cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"--out {folder}: cannot write there: {error.strerror}") from None


def check_file(file: Path) -> None:
    """Make the file of ``--out`` if it does not exist.

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
    """Return a function that reads comma-separated values."""

    def read(text: str) -> list[Any]:
        return [convert(part) for part in text.split(",")]

    return read


def positive(text: str) -> int:
    """Return `text` as a whole number of at least 1."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return number


def number_in(low: float, high: float, *, open_low: bool = False) -> Any:
    """Return a function that reads a number from `low` (or above `low`) to `high`."""

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


def add_methods(parser: Parser, default: str, baselines: str = "") -> None:
    """Add ``--methods`` and ``--known``.

    `default` and `baselines` say in the help which methods are the default ones and when baselines
    can be named.
    """
    parser.add_argument(
        "--methods",
        metavar="LIST",
        help="methods to compare, comma-separated, as in Python, for example 'TopK(0.01), "
        f"LBGM(ErrorFeedback(TopK(0.01)), delta=0.1)'{baselines} (default: {default})",
    )
    add_known(parser)


def add_known(parser: Parser) -> None:
    """Add ``--known``."""
    parser.add_argument(
        "--known",
        metavar="MODULE:CLASS",
        action="append",
        default=[],
        help="a class of your own that methods may name, importable from the working directory; "
        "repeat it for further classes",
    )


def read_methods(text: str, known: Iterable[str] = (), *, ranks: bool = True) -> list[Algorithm]:
    """Return the methods of a comma-separated list of expressions.

    Parameters
    ----------
    text
        The list.
    known
        The values of ``--known``.
    ranks
        If the list may name methods of ranks beside compressors: baselines, and those whose
        contributions add up.

    Raises
    ------
    ValueError
        If one cannot be read, is named twice, wraps a baseline, or needs ranks.
    """
    classes = [*(BASELINES if ranks else ()), *import_known(known)]
    methods = parse_compressors(text, classes)
    for position, method in enumerate(methods):
        if method in methods[:position]:
            raise ValueError(f"--methods names {method!r} twice")
        if method.adds_up and not ranks:
            raise ValueError(f"{method!r} averages by sums over all workers, which Flower has not")
        inner = getattr(method, "inner", None)
        while inner is not None:
            if isinstance(inner, Baseline):
                raise ValueError(f"{method!r}: {inner!r} makes no messages, and cannot be wrapped")
            inner = getattr(inner, "inner", None)
    return methods


def add_data_and_model(parser: Parser) -> None:
    """Add the options of the data set and of the model."""
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
        If one of them has a wrong value.
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
