"""Real Horovod jobs on the loopback: ``horovodrun`` starts this file on every rank."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import pickle
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import IO, Any

import pytest

from tests.ranks import Failed

__all__ = ["JobFailed", "horovodrun", "jobs_end", "needs_horovod", "run_horovod"]

ROOT = Path(__file__).parent.parent
KEY = b"lbgm_compress"
needs_horovod = pytest.mark.skipif(
    importlib.util.find_spec("horovod") is None,
    reason="Horovod is not installed: make horovod",
)


class JobFailed(AssertionError):
    """A job ended with an error, or not at all."""


def horovodrun(
    arguments: Sequence[str], timeout: float, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run ``horovodrun *arguments``, and leave no process behind; stdout holds stderr too."""
    with tempfile.TemporaryFile("w+") as log:
        with _reaped(["horovodrun", *arguments], _variables(environment), log) as process:
            try:
                code: int | None = process.wait(timeout)
            except subprocess.TimeoutExpired:
                code = None
        log.seek(0)
        printed = log.read()
    if code is None:
        raise JobFailed(f"no end after {timeout} s\n{printed[-5000:]}")
    return subprocess.CompletedProcess(arguments, code, printed)


def _variables(more: dict[str, str] | None) -> dict[str, str]:
    scripts = Path(sys.executable).parent
    return {
        **os.environ,
        "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        **(more or {}),
    }


@contextlib.contextmanager
def _reaped(
    command: list[str], variables: dict[str, str], log: IO[str]
) -> Iterator[subprocess.Popen[bytes]]:
    import psutil  # which Horovod needs, and so is there

    # Ranks are in sessions of their own: they are known by a variable that they inherit.
    mark = f"LBGM_TEST_JOB_{os.getpid()}_{os.urandom(8).hex()}"
    process = subprocess.Popen(
        command,
        env={**variables, mark: "1"},
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
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


class Job:
    """A job whose ranks do one task after the other, since to start one takes seconds."""

    def __init__(self, world: int, environment: dict[str, str]) -> None:
        self._stack = contextlib.ExitStack()
        folder = self._stack.enter_context(tempfile.TemporaryDirectory())
        listener = self._stack.enter_context(Listener(f"{folder}/socket", authkey=KEY))
        listener._listener._socket.settimeout(60)
        self._log = self._stack.enter_context((Path(folder) / "log").open("w+"))
        command = ["horovodrun", "-np", str(world), "--gloo", "--network-interfaces", "lo"]
        command += [sys.executable, "-m", "tests.horovod_ranks", f"{folder}/socket"]
        self._stack.enter_context(_reaped(command, environment, self._log))
        self._ranks: dict[int, Connection] = {}
        try:
            for _ in range(world):
                connection = self._stack.enter_context(listener.accept())
                self._ranks[connection.recv()] = connection
        except BaseException:
            self.close()
            raise

    def run(self, task: bytes, timeout: float) -> list[Any]:
        """Return what the ranks made of a task."""
        deadline = time.monotonic() + timeout
        results = []
        try:
            for connection in self._ranks.values():
                connection.send_bytes(task)
            for rank, connection in sorted(self._ranks.items()):
                if not connection.poll(max(0.0, deadline - time.monotonic())):
                    raise JobFailed(f"rank {rank} took more than {timeout} s\n{self.log()}")
                results.append(pickle.loads(connection.recv_bytes()))
        except (EOFError, OSError) as error:
            raise JobFailed(f"a rank died: {error!r}\n{self.log()}") from None
        return results

    def log(self) -> str:
        """Return the end of what the job has printed."""
        self._log.seek(0)
        return self._log.read()[-5000:]

    def close(self) -> None:
        """End all of it."""
        self._stack.close()


_jobs: dict[int, Job] = {}


@pytest.fixture(scope="module")
def jobs_end() -> Iterator[None]:
    """End the jobs that the tests of a module have left running."""
    yield
    while _jobs:
        _jobs.popitem()[1].close()


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
    job = None if environment else _jobs.pop(world, None)
    job = job or Job(world, _variables(environment))
    keep = False
    try:
        results = job.run(pickle.dumps((function, arguments)), timeout)
        # Ranks that did not end together may be out of step.
        keep = not environment and not any(isinstance(result, Failed) for result in results)
    finally:
        if keep:
            _jobs[world] = job
        else:
            job.close()
    if not failures:
        for rank, result in enumerate(results):
            assert not isinstance(result, Failed), f"rank {rank}: {result!r}"
    return results


def _main(address: str) -> None:
    import horovod.torch as hvd
    import torch

    torch.set_num_threads(1)
    hvd.init()
    with Client(address, authkey=KEY) as connection:
        connection.send(hvd.rank())
        while True:
            try:
                function, arguments = pickle.loads(connection.recv_bytes())
            except EOFError:
                return
            try:
                result = function(hvd.rank(), *arguments)
            except Exception as error:
                result = Failed(type(error).__name__, str(error), traceback.format_exc())
            # As plain bytes: tensors in shared memory would go with this process.
            connection.send_bytes(pickle.dumps(result))


if __name__ == "__main__":
    # The results must be of the classes that the tests know.
    from tests import horovod_ranks

    horovod_ranks._main(sys.argv[1])
