"""Real Horovod jobs on the loopback: ``horovodrun`` starts this file on every rank."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.ranks import Failed

__all__ = ["JobFailed", "horovodrun", "needs_horovod", "run_horovod"]

ROOT = Path(__file__).parent.parent
needs_horovod = pytest.mark.skipif(
    importlib.util.find_spec("horovod") is None,
    reason="Horovod is not installed: make horovod",
)


class JobFailed(AssertionError):
    """A job ended with an error, or not at all."""


def horovodrun(
    arguments: Sequence[str], timeout: float, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run ``horovodrun *arguments``, and leave no process behind."""
    scripts = Path(sys.executable).parent
    variables = {
        **os.environ,
        "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        **(environment or {}),
    }
    with _reaped([str(scripts / "horovodrun"), *arguments], variables) as process:
        try:
            out, err = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                out, err = process.communicate(timeout=10)
                raise JobFailed(f"no end after {timeout} s\n{out[-3000:]}\n{err[-3000:]}") from None
            raise JobFailed(f"no end after {timeout} s") from None
    return subprocess.CompletedProcess(arguments, process.returncode, out, err)


@contextlib.contextmanager
def _reaped(command: list[str], variables: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    import psutil  # which Horovod needs, and so is there

    # Ranks are in sessions of their own: they are known by a variable that they inherit.
    mark = f"LBGM_TEST_JOB_{os.getpid()}_{os.urandom(8).hex()}"
    process = subprocess.Popen(
        command,
        env={**variables, mark: "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        for other in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if mark in other.environ():
                    other.kill()
        process.wait(timeout=30)


def run_horovod(
    function: Callable[..., Any],
    world: int,
    *arguments: Any,
    timeout: float = 100,
    failures: bool = False,
    environment: dict[str, str] | None = None,
) -> list[Any]:
    """Run ``function(rank, *arguments)`` on `world` ranks of a job, and return the results.

    With `failures`, what a rank raises comes back as `Failed`; else it fails the test.
    """
    with tempfile.TemporaryDirectory() as folder:
        task = Path(folder) / "task"
        task.write_bytes(pickle.dumps((function, arguments)))
        command = ["-np", str(world), "--gloo", "--network-interfaces", "lo"]
        command += [sys.executable, "-m", "tests.horovod_ranks", folder]
        done = horovodrun(command, timeout, environment)
        files = [Path(folder) / f"rank-{rank}" for rank in range(world)]
        if done.returncode or not all(file.exists() for file in files):
            raise JobFailed(f"exit status {done.returncode}\n{done.stdout}\n{done.stderr}")
        results = [pickle.loads(file.read_bytes()) for file in files]
    if not failures:
        for rank, result in enumerate(results):
            assert not isinstance(result, Failed), f"rank {rank}: {result!r}"
    return results


def _main(folder: Path) -> None:
    import horovod.torch as hvd
    import torch

    torch.set_num_threads(1)
    hvd.init()
    function, arguments = pickle.loads((folder / "task").read_bytes())
    try:
        result = function(hvd.rank(), *arguments)
    except Exception as error:
        result = Failed(type(error).__name__, str(error), traceback.format_exc())
    (folder / f"rank-{hvd.rank()}").write_bytes(pickle.dumps(result))


if __name__ == "__main__":
    # The results must be of the class that the tests know.
    from tests import horovod_ranks

    horovod_ranks._main(Path(sys.argv[1]))
