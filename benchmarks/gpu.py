"""Run what needs a GPU, in under eight minutes: the GPU tests, and times of steps by method.

A step is a backward pass whose gradients are given, so that compression and exchange are all that
is timed. It runs on NCCL with one rank, and on gloo with two ranks on one card. Every result is
kept in gpu.csv as soon as it is there. With --device cpu it tries itself out on gloo.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

if __name__ == "__main__" and __spec__ is None:  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
import torch.multiprocessing as mp
from rich.table import Table

from benchmarks.common.command_line import (
    Parser,
    add_methods,
    check_folder,
    listed,
    number_in,
    positive,
    read_methods,
    start,
)
from benchmarks.common.gpu_rank import Measured, Shapes, rank_main
from benchmarks.common.processes import ROOT, environment
from benchmarks.common.shapes import gpt2_shapes, resnet50_shapes
from benchmarks.common.tables import console, make_table, read_csv, write_csv
from lbgm_compress._util.units import human_bytes

MODELS: dict[str, Callable[[], Shapes]] = {
    "ResNet-50": resnet50_shapes,
    "GPT-2 small": gpt2_shapes,
}
METHODS = (
    "Dense(), BFloat16(), TorchPowerSGD(4), ErrorFeedback(PowerSGD(4)), "
    "ErrorFeedback(SharedSubspace(8)), SharedLBGM(), LBGM(TopK(0.01)), "
    'ErrorFeedback(LookBackSubspace(8, values="int8"))'
)
# Share of the time that the tests may take.
TESTS = 0.4


def run_tests(seconds: float) -> str:
    """Run the tests that need a GPU, and return pytest's closing line."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=seconds
        )
    except subprocess.TimeoutExpired:
        return f"the tests took more than {seconds:.0f} s and were ended"
    lines = (done.stdout + done.stderr).strip().splitlines()
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    return "\n".join([*failed, lines[-1] if lines else f"exit status {done.returncode}"])


def measure(
    options: argparse.Namespace, backend: str, ranks: int, model: str, seconds: float
) -> list[Measured]:
    """Return the results of one backend and model, as many as there is time for."""
    device = options.device
    with tempfile.TemporaryDirectory() as folder:
        work = MODELS[model](), options.methods or METHODS, options.steps
        arguments = (ranks, backend, device, model, *work, seconds, folder)
        context = mp.start_processes(
            rank_main, arguments, nprocs=ranks, join=False, start_method="spawn"
        )
        assert context is not None
        end = time.monotonic() + seconds + 30
        problem = ""
        try:
            while not context.join(timeout=1):
                if time.monotonic() > end:
                    problem = "not finished in time"
                    break
        except Exception as error:
            problem = str(error).strip().splitlines()[-1]
        finally:
            for process in context.processes:
                if process.is_alive():
                    process.kill()
                process.join()
        rows = [
            Measured(**torch.load(file, weights_only=True))
            for file in sorted(Path(folder).glob("*.pt"))
        ]
    if problem:
        rows.append(Measured(device, backend, ranks, model, "", 0.0, 0.0, 0.0, 0, problem))
    return rows


def table_of(rows: Sequence[Measured]) -> Table:
    """Return a table of the results, with times as ratios to torch's PowerSGD, too."""
    peers = {
        row[:4]: row.step_ms for row in rows if row.method.startswith("TorchPowerSGD(") and row[5]
    }
    headings = ["backend", "ranks", "model", "method", "ms a step", "of TorchPowerSGD"]
    headings += ["longest", "peak memory", "bytes a step"]
    cells = []
    for row in rows:
        peer = peers.get(row[:4])
        cells.append(
            (
                row.backend,
                str(row.ranks),
                row.model,
                row.method or "-",
                row.error or f"{row.step_ms:.2f}",
                f"{row.step_ms / peer:.2f}" if peer and not row.error else "-",
                f"{row.slowest_ms:.2f}",
                f"{row.peak_mb:.0f} MB",
                human_bytes(row.message_bytes),
            )
        )
    return make_table(rows[0].device if rows else "no results", headings, cells, whole="method")


def build_parser() -> Parser:
    """Return the parser of the command line."""
    parser = Parser("gpu.py", __doc__)
    add = parser.add_argument
    add("--device", choices=("cuda", "cpu"), default="cuda",
        help="where to compute; cpu is for trying the command out (default: cuda)")  # fmt: skip
    add("--models", type=listed(str), default=list(MODELS), metavar="LIST",
        help=f"{', '.join(MODELS)} (default: all)")  # fmt: skip
    add_methods(parser, "dense, 16 bits, PowerSGD and ours", ", Dense(), Float16(), BFloat16() and "
        "TorchPowerSGD(RANK)")  # fmt: skip
    add("--steps", type=positive, default=20, metavar="N", help="timed steps (default: 20)")
    add("--minutes", type=number_in(0, 60, open_low=True), default=7.0, metavar="N",
        help="time for all of it (default: 7)")  # fmt: skip
    add("--no-tests", action="store_true", help="leave out the tests (default: off)")
    add("--out", type=Path, default=Path("gpu-results"), metavar="DIR",
        help="folder for the results (default: gpu-results)")  # fmt: skip
    return parser


def main(arguments: list[str]) -> int:
    """Run the command line and return the exit status."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    file = options.out / "gpu.csv"
    printer = console(180)
    try:
        check_folder(options.out)
        if options.methods:
            read_methods(options.methods, options.known)
        for model in options.models:
            if model not in MODELS:
                raise ValueError(f"--models: {model!r} is none of {', '.join(MODELS)}")
        read_csv(file, Measured._fields)
    except ValueError as error:
        parser.error(str(error))
    cuda = options.device == "cuda"
    if cuda and not torch.cuda.is_available():
        printer.print(
            f"There is no CUDA device. On one, this runs `pytest -m gpu`, and then times "
            f"{options.methods or METHODS} on NCCL with one rank and on gloo with two ranks, for "
            f"{', '.join(options.models)}; --device cpu tries that out.",
            soft_wrap=True,
        )
        return 1
    end = time.monotonic() + 60 * options.minutes
    closing = ""
    if cuda and not options.no_tests:
        closing = run_tests(60 * options.minutes * TESTS)
        printer.print(closing, soft_wrap=True)
    rows: list[Measured] = []
    parts = [("nccl" if cuda else "gloo", 1), ("gloo", 2)]
    jobs = [(*part, model) for part in parts for model in options.models]
    for number, (backend, ranks, model) in enumerate(jobs):
        left = (end - time.monotonic()) / (len(jobs) - number)
        rows += measure(options, backend, ranks, model, left)
        write_csv(file, Measured._fields, rows)
    printer.print(table_of(rows))
    printer.print(f"Results are in {options.out}.", soft_wrap=True)
    return 0 if rows and not any(row.error for row in rows) and " failed" not in closing else 1


if __name__ == "__main__":
    start(main)
