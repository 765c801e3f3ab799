"""Real Horovod jobs on the loopback."""

from __future__ import annotations

import contextlib
import importlib.util
import multiprocessing.process
import os
import pickle
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO, Any

import pytest

from tests.ranks import CONTEXT, Failed

__all__ = ["JobFailed", "horovodrun", "jobs_end", "needs_horovod", "run_horovod"]

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
    """Run ``horovodrun *arguments``, and leave no process behind; stdout holds stderr too."""
    _end_waiting()
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
    """A job whose ranks run one task after the other.

    They are forked with Horovod imported, where horovodrun would start each as a new program.
    """

    def __init__(self, world: int, environment: dict[str, str]) -> None:
        from horovod.runner.common.util.hosts import get_host_assignments, parse_hosts
        from horovod.runner.gloo_run import create_run_env_vars, create_slot_env_vars
        from horovod.runner.http.http_server import RendezvousServer

        self._stack = contextlib.ExitStack()
        folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory()))
        self._log = folder / "log"
        server = RendezvousServer()
        port = server.start()
        self._stack.callback(server.stop)
        slots = get_host_assignments(parse_hosts(f"localhost:{world}"), world)
        server.init(slots)
        self._pipes: list[Connection] = []
        for slot in slots:
            variables = {
                **create_run_env_vars("127.0.0.1", ["lo"], port),
                **create_slot_env_vars(slot),
                **environment,
            }
            mine, theirs = CONTEXT.Pipe()
            self._pipes.append(self._stack.enter_context(mine))
            texts = {name: str(value) for name, value in variables.items()}
            process = CONTEXT.Process(target=_main, args=(texts, self._log, theirs), daemon=True)
            process.start()
            theirs.close()
            self._stack.callback(_end, process)

    def run(self, task: bytes, timeout: float) -> list[Any]:
        """Return the results of a task in rank order."""
        deadline = time.monotonic() + timeout
        results = []
        try:
            for pipe in self._pipes:
                pipe.send_bytes(task)
            for rank, pipe in enumerate(self._pipes):
                if not pipe.poll(max(0.0, deadline - time.monotonic())):
                    raise JobFailed(f"rank {rank} took more than {timeout} s\n{self.log()}")
                results.append(pickle.loads(pipe.recv_bytes()))
        except (EOFError, OSError) as error:
            raise JobFailed(f"a rank died: {error!r}\n{self.log()}") from None
        return results

    def log(self) -> str:
        """Return the end of what the ranks have printed."""
        return self._log.read_text()[-5000:] if self._log.exists() else ""

    def close(self) -> None:
        """End the ranks."""
        self._stack.close()


def _end(process: multiprocessing.process.BaseProcess) -> None:
    process.kill()
    process.join()


# The job that waits for a task, by world and environment. At most one: ranks that wait keep a core
# busy with asking each other for work.
_waiting: dict[tuple[int, str], Job] = {}


def _end_waiting() -> None:
    while _waiting:
        _waiting.popitem()[1].close()


@pytest.fixture(scope="module")
def jobs_end() -> Iterator[None]:
    """End the job that the tests of a module have left waiting."""
    yield
    _end_waiting()


def run_horovod(
    function: Callable[..., Any],
    world: int,
    *arguments: Any,
    timeout: float = 100,
    failures: bool = False,
    environment: dict[str, str] | None = None,
) -> list[Any]:
    """Run ``function(rank, *arguments)`` on `world` ranks of a job, and return the results.

    With `failures`, what a rank raises comes back as `Failed`; else it fails the test. The ranks
    run the next function, too, if none of them failed.
    """
    key = world, repr(environment)
    job = _waiting.pop(key, None)
    if job is None:
        _end_waiting()
        job = Job(world, environment or {})
    keep = False
    try:
        results = job.run(pickle.dumps((function, arguments)), timeout)
        # Ranks that did not end together may be out of step.
        keep = not any(isinstance(result, Failed) for result in results)
    finally:
        if keep:
            _waiting[key] = job
        else:
            job.close()
    if not failures:
        for rank, result in enumerate(results):
            assert not isinstance(result, Failed), f"rank {rank}: {result!r}"
    return results


def _main(variables: dict[str, str], log: Path, pipe: Connection) -> None:
    """Be a rank: run tasks until nobody sends any."""
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(variables)
    import horovod.torch as hvd
    import torch

    torch.set_num_threads(1)
    hvd.init()
    while True:
        try:
            function, arguments = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        try:
            result = function(hvd.rank(), *arguments)
        except Exception as error:
            result = Failed(type(error).__name__, str(error), traceback.format_exc())
        # As plain bytes: tensors in shared memory would go with this process.
        pipe.send_bytes(pickle.dumps(result))
