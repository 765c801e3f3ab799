"""Real processes that talk to each other over the loopback."""

from __future__ import annotations

import datetime
import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

__all__ = ["CONTEXT", "Failed", "as_torchrun", "run_ranks"]

# A server that has imported what ranks need forks them: they start in milliseconds, and inherit
# neither the tests' threads nor their open files.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "lbgm_compress.adapters.ddp",
        "pytest",
        "tests.laws",
        "tests.training",
        # DistributedDataParallel imports it, which takes more than a second.
        "torch._dynamo",
        # If it is not there, the server goes on without it.
        "horovod.torch",
    ]
)


class Failed:
    """An exception that a rank raised."""

    def __init__(self, kind: str, message: str, trace: str) -> None:
        self.kind, self.message, self.trace = kind, message, trace

    def __repr__(self) -> str:
        return f"{self.kind}: {self.message}\n{self.trace}"


def run_ranks(
    function: Callable[..., Any],
    world: int,
    *arguments: Any,
    timeout: float = 60,
    group_timeout: float = 60,
    failures: bool = False,
    backend: str = "gloo",
) -> list[Any]:
    """Run ``function(rank, *arguments)`` on `world` ranks of a group, and return the results.

    With `failures`, what a rank raises comes back as `Failed`, and None where a rank died; else the
    first one fails the test. No process is left behind.
    """
    with tempfile.TemporaryDirectory() as folder:
        pipes = [CONTEXT.Pipe(duplex=False) for _ in range(world)]
        processes = [
            CONTEXT.Process(
                target=_main,
                args=(
                    *(rank, world, backend, folder, group_timeout, pipes[rank][1]),
                    *(function, arguments),
                ),
                daemon=True,
            )
            for rank in range(world)
        ]
        deadline = time.monotonic() + timeout
        try:
            for process in processes:
                process.start()
            for _, writer in pipes:
                writer.close()
            results = []
            for rank, (reader, _) in enumerate(pipes):
                if not reader.poll(max(0.0, deadline - time.monotonic())):
                    raise AssertionError(f"rank {rank} of {world} took more than {timeout} s")
                try:
                    results.append(pickle.loads(reader.recv_bytes()))
                except (EOFError, ConnectionResetError):
                    results.append(None if failures else Failed("died", "", ""))
        finally:
            for process in processes:
                if process.pid is not None:
                    process.kill()
                    process.join()
    if not failures:
        for rank, result in enumerate(results):
            assert not isinstance(result, Failed), f"rank {rank}: {result!r}"
    return results


def as_torchrun(rank: int, world: int) -> None:
    """Set the variables by which frameworks see that this process is a rank."""
    for name, value in (
        *(("RANK", rank), ("LOCAL_RANK", rank), ("WORLD_SIZE", world)),
        *(("LOCAL_WORLD_SIZE", world), ("OMP_NUM_THREADS", 1)),
    ):
        os.environ[name] = str(value)


def _main(
    rank: int,
    world: int,
    backend: str,
    folder: str,
    group_timeout: float,
    pipe: Any,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    import torch

    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group(
        backend,
        init_method=(Path(folder) / "store").as_uri(),
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=group_timeout),
    )
    try:
        result = function(rank, *arguments)
        dist.barrier()
    except Exception as error:
        result = Failed(type(error).__name__, str(error), traceback.format_exc())
    # As plain bytes: tensors in shared memory would go with this process.
    pipe.send_bytes(pickle.dumps(result))
    pipe.close()
