"""Start a real engine on this machine, and train with it.

DDP and Horovod have a process for each worker, `benchmarks.common.engines.worker`. Flower has its
simulation, `benchmarks.common.engines.flower_simulation`. Data, batches and updates of the workers
are those of `benchmarks.common.training`.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, Listener
from pathlib import Path
from typing import IO

from benchmarks.common.baselines import Baseline
from benchmarks.common.engines.base import Engine
from benchmarks.common.engines.ddp import Ddp
from benchmarks.common.engines.horovod import Horovod
from benchmarks.common.processes import environment
from benchmarks.common.training import Round, Training
from lbgm_compress.algorithm import Algorithm

__all__ = ["ENGINES", "KEY", "RANKS", "EngineError", "check_engine", "running"]

KEY = b"lbgm_compress"
STARTS_WITHIN = 120  # seconds


class EngineError(RuntimeError):
    """Raised if an engine does not start or a worker fails; the message is what it printed."""


# By name, the command that starts a number of workers; their arguments are appended to it.
ENGINES: dict[str, Callable[[int], list[str]]] = {
    "ddp": Ddp.command,
    "horovod": Horovod.command,
    "flower": lambda workers: [sys.executable],
}
RANKS: dict[str, type[Engine]] = {"ddp": Ddp, "horovod": Horovod}


def check_engine(
    name: str, methods: Sequence[Algorithm], participation: float, device: str
) -> None:
    """Check that an engine is installed and can do what is asked for.

    Raises
    ------
    ValueError
        If it is not, or cannot.
    """
    for method in methods:
        if isinstance(method, Baseline) and name != "ddp":
            raise ValueError(
                f"{method!r} is part of DistributedDataParallel: use --engine ddp, not {name}"
            )
        if method.adds_up and name == "flower":
            raise ValueError(
                f"{method!r} averages by sums over all workers, which Flower has not: use --engine "
                "process, ddp or horovod"
            )
    if name == "process":
        return
    if name == "horovod" and importlib.util.find_spec("horovod") is None:
        raise ValueError("--engine horovod: Horovod is not installed, run `make horovod` first")
    if name == "flower" and importlib.util.find_spec("flwr") is None:
        raise ValueError(
            "--engine flower: Flower is not installed: pip install 'lbgm_compress[flower]', with "
            "Python 3.11 or newer"
        )
    if participation != 1 and name != "flower":
        raise ValueError(
            f"--engine {name}: all ranks take part in every round, and --participation is "
            f"{participation:g}"
        )
    if device != "cpu":
        raise ValueError(f"--engine {name} runs on the CPU, and --device is {device}")


class Running:
    """A started engine, whose workers wait for a compressor."""

    def __init__(self, connection: Connection, log: IO[str]) -> None:
        self._connection, self._log = connection, log

    def run(self, compressor: Algorithm) -> Iterator[Round]:
        """Train with one compressor, and yield every round as it ends.

        Raises
        ------
        EngineError
            If a worker fails.
        """
        self._connection.send(compressor)
        try:
            while (round_ := self._connection.recv()) is not None:
                yield round_
        except (EOFError, OSError):
            raise EngineError(f"a worker failed:\n{_end_of(self._log)}") from None


@contextlib.contextmanager
def running(name: str, training: Training, known: Sequence[str] = ()) -> Iterator[Running]:
    """Start an engine with a worker for each part of the data, and end it afterwards.

    `known` are the values of ``--known``.

    Raises
    ------
    EngineError
        If it does not start.
    """
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        (folder / "training").write_bytes(pickle.dumps(training))
        listener = stack.enter_context(Listener(str(folder / "socket"), authkey=KEY))
        log = stack.enter_context((folder / "log").open("w+"))
        workers = len(training.parts)
        threads = max(1, (os.cpu_count() or 1) // workers)
        command = [*ENGINES[name](workers), "-m", "benchmarks.common.engines.worker", name]
        process = subprocess.Popen(
            [*command, str(folder / "socket"), str(folder / "training"), *known],
            env=environment(GLOO_SOCKET_IFNAME="lo", OMP_NUM_THREADS=str(threads)),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        stack.callback(_end, process)
        connection = stack.enter_context(_accept(listener, process, log))
        yield Running(connection, log)


def _accept(listener: Listener, process: subprocess.Popen[bytes], log: IO[str]) -> Connection:
    """Return the connection to the first rank, once it is there."""
    server = listener._listener._socket  # type: ignore[attr-defined]
    server.settimeout(0.5)
    deadline = time.monotonic() + STARTS_WITHIN
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(TimeoutError):
            return listener.accept()
    raise EngineError(f"the engine did not start:\n{_end_of(log)}")


def _end(process: subprocess.Popen[bytes]) -> None:
    """Wait for the workers, which end when the connection is closed, or end them."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=10)
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=10)
    if process.poll() is None:
        process.kill()
        process.wait()


def _end_of(log: IO[str]) -> str:
    log.seek(0)
    return log.read()[-3000:]
