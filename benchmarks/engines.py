"""The comparison through real engines, on this machine.

The workers' updates, their data and their order are those of `federated`. For DDP and Horovod there
is a process a worker, and each update is put into the engine as a gradient of its own, so that what
is compressed, moved and averaged passes through the engine's hooks as in any training. For Flower
there is its simulation; `flower_simulation` is the app.

``python engines.py ENGINE SOCKET TRAINING`` is a worker, started by torchrun or horovodrun, or the
whole simulation.
"""

from __future__ import annotations

import abc
import contextlib
import importlib.util
import os
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import IO, Any

import torch
from federated import Round, Training, Workers, evaluate, local_updates
from flower_processes import OFFLINE
from peers import PowerSGD
from torch import Tensor, nn

from lbgm_compress import Compressor
from lbgm_compress.collective.averager import Averager
from lbgm_compress.collective.transport import ProcessGroupTransport

__all__ = ["ENGINES", "EngineError", "check_engine", "running"]

SENT = Path("/sys/class/net/lo/statistics/tx_bytes")
KEY = b"lbgm_compress"
STARTS_WITHIN = 120  # seconds


# Bytes sent so far, and of the last round's tensors those recycled, and all.
Counts = Callable[[], tuple[int, int, int]]


class EngineError(RuntimeError):
    """The engine did not start, or a worker failed; what it printed is the message."""


class Engine(abc.ABC):
    """One worker's view of an engine."""

    rank: int
    size: int

    @classmethod
    @abc.abstractmethod
    def command(cls, workers: int) -> list[str]:
        """Return what starts so many workers; the workers' own command line follows."""

    @abc.abstractmethod
    def broadcast(self, value: Any) -> Any:
        """Return the first rank's value on every rank."""

    @abc.abstractmethod
    def total(self, numbers: Tensor) -> Tensor:
        """Add up numbers (int64) over all ranks."""

    @abc.abstractmethod
    def wrap(
        self, module: nn.Module, optimizer: torch.optim.Optimizer, compression: dict[str, Any]
    ) -> tuple[nn.Module, torch.optim.Optimizer, Counts]:
        """Return a module and an optimizer that average, and what counts their bytes."""


class Ddp(Engine):
    """DistributedDataParallel on gloo, with the communication hook."""

    @classmethod
    def command(cls, workers: int) -> list[str]:
        run = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        return [*run, f"--nproc-per-node={workers}"]

    def __init__(self) -> None:
        import torch.distributed as dist

        dist.init_process_group("gloo")
        self.dist = dist
        self.transport = ProcessGroupTransport(dist.new_group())
        self.rank, self.size = self.transport.rank, self.transport.size

    def broadcast(self, value: Any) -> Any:
        values = [value]
        self.dist.broadcast_object_list(values)
        return values[0]

    def total(self, numbers: Tensor) -> Tensor:
        # Not by a collective, as it is the last thing that ranks do: see `ProcessGroupTransport`.
        rows = self.transport.gather_equal(numbers.view(torch.uint8))
        return rows.view(torch.int64).sum(0)

    def wrap(
        self, module: nn.Module, optimizer: torch.optim.Optimizer, compression: dict[str, Any]
    ) -> tuple[nn.Module, torch.optim.Optimizer, Counts]:
        from torch.nn.parallel import DistributedDataParallel

        from lbgm_compress.adapters.ddp import CompressionState, compression_hook

        # One bucket, and so one message a round.
        wrapped = DistributedDataParallel(module, bucket_cap_mb=1 << 20)
        if isinstance(compression["compressor"], PowerSGD):
            return wrapped, optimizer, _power_sgd(wrapped, compression["compressor"])
        state = CompressionState(**compression)
        wrapped.register_comm_hook(state, compression_hook)
        return wrapped, optimizer, _counts_of(state)


class Horovod(Engine):
    """Horovod on gloo, with the distributed optimizer."""

    @classmethod
    def command(cls, workers: int) -> list[str]:
        launcher = str(Path(sys.executable).with_name("horovodrun"))
        options = ["-np", str(workers), "--gloo", "--network-interfaces", "lo"]
        return [launcher, *options, sys.executable]

    def __init__(self) -> None:
        import horovod.torch as hvd

        hvd.init()
        self.hvd = hvd
        self.rank, self.size = hvd.rank(), hvd.size()

    def broadcast(self, value: Any) -> Any:
        # Its default name is that of the type, which differs between ranks.
        return self.hvd.broadcast_object(value, root_rank=0, name="value")

    def total(self, numbers: Tensor) -> Tensor:
        return self.hvd.allreduce(numbers, op=self.hvd.Sum, name="total")

    def wrap(
        self, module: nn.Module, optimizer: torch.optim.Optimizer, compression: dict[str, Any]
    ) -> tuple[nn.Module, torch.optim.Optimizer, Counts]:
        from lbgm_compress.adapters.horovod import DistributedOptimizer

        distributed = DistributedOptimizer(optimizer, **compression, bucket_cap_mb=1 << 20)
        return module, distributed, _counts_of(distributed.compression)


def _counts_of(averager: Averager) -> Counts:
    def counts() -> tuple[int, int, int]:
        report = averager.sender.report().values()
        recycled = sum(tensor.recycled for tensor in report)
        return int(averager.stats()["message_bytes"]), recycled, len(report)

    return counts


def _power_sgd(module: nn.Module, method: PowerSGD) -> Counts:
    """Register torch's hook."""
    from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook

    state = powerSGD_hook.PowerSGDState(
        None,
        matrix_approximation_rank=method.rank,
        start_powerSGD_iter=method.DENSE_ROUNDS,
    )
    module.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
    size = sum(parameter.numel() for parameter in module.parameters())

    def counts() -> tuple[int, int, int]:
        dense = min(state.iter, method.DENSE_ROUNDS) * size
        return 4 * (dense + state.total_numel_after_compression), 0, 1

    return counts


# What starts so many workers; the workers' own command line follows.
ENGINES: dict[str, Callable[[int], list[str]]] = {
    "ddp": Ddp.command,
    "horovod": Horovod.command,
    "flower": lambda workers: [sys.executable],
}
RANKS: dict[str, type[Engine]] = {"ddp": Ddp, "horovod": Horovod}


def check_engine(name: str, participation: float, device: str) -> None:
    """Raise `ValueError` if an engine is not installed or cannot do what is asked for."""
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
    """An engine whose workers wait for a compressor."""

    def __init__(self, connection: Connection, log: IO[str]) -> None:
        self._connection, self._log = connection, log

    def run(self, compressor: Compressor | PowerSGD) -> Iterator[Round]:
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
def running(name: str, training: Training) -> Iterator[Running]:
    """Start an engine with a worker for each part of the data, and end it afterwards.

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
        command = [*ENGINES[name](workers), str(Path(__file__).resolve()), name]
        scripts = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
        threads = max(1, (os.cpu_count() or 1) // workers)
        variables = {
            **OFFLINE,
            "GLOO_SOCKET_IFNAME": "lo",
            "OMP_NUM_THREADS": str(threads),
            "PATH": scripts,
        }
        process = subprocess.Popen(
            [*command, str(folder / "socket"), str(folder / "training")],
            env={**os.environ, **variables},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        stack.callback(_end, process)
        connection = stack.enter_context(_accept(listener, process, log))
        yield Running(connection, log)


def _accept(listener: Listener, process: subprocess.Popen[bytes], log: IO[str]) -> Connection:
    """Wait for the first rank, as long as its engine lives."""
    server = listener._listener._socket  # type: ignore[attr-defined]
    server.settimeout(0.5)
    deadline = time.monotonic() + STARTS_WITHIN
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(TimeoutError):
            return listener.accept()
    raise EngineError(f"the engine did not start:\n{_end_of(log)}")


def _end(process: subprocess.Popen[bytes]) -> None:
    """Let the workers end, which they do when nobody is there any more."""
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


class Linear(nn.Module):
    """A loss whose gradient is a given update, exactly."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, update: dict[str, Tensor]) -> Tensor:
        return torch.stack(
            [(parameter * update[n]).sum() for n, parameter in self.model.named_parameters()]
        ).sum()


def _train(
    engine: Engine, training: Training, compressor: Compressor | PowerSGD
) -> Iterator[Round]:
    """Do what `federated.run` does, as one of its workers."""
    model = training.initial_model()
    workers = Workers(training)
    update = local_updates(model, training, workers)
    optimizer: torch.optim.Optimizer = torch.optim.SGD(
        model.parameters(), lr=training.lr, momentum=training.server_momentum
    )
    module, optimizer, counts = engine.wrap(
        Linear(model),
        optimizer,
        {
            "compressor": compressor,
            "named_parameters": model.named_parameters(),
            "weight": workers.sizes[engine.rank],
        },
    )
    test = training.dataset.test_images, training.dataset.test_labels
    accuracy = loss = 0.0
    for number in range(1, training.rounds + 1):
        start = time.perf_counter()
        weights = {name: p.detach() for name, p in model.named_parameters()}
        mine = {name: g[0] for name, g in update(weights, [engine.rank]).items()}
        # All have their update before the exchange is watched.
        engine.total(torch.zeros(1, dtype=torch.int64))
        before, sent = counts()[0], _sent()
        optimizer.zero_grad()
        module(mine).backward()
        optimizer.step()
        wire = None if sent is None else (_sent() or sent) - sent
        now, recycled, tensors = counts()
        uplink, recycled, tensors = engine.total(
            torch.tensor([now - before, recycled, tensors])
        ).tolist()
        if engine.rank == 0 and training.evaluated(number):
            weights = {name: p.detach() for name, p in model.named_parameters()}
            accuracy, loss = evaluate(model, weights, *test)
        seconds = time.perf_counter() - start
        yield Round(
            number,
            accuracy,
            loss,
            uplink,
            recycled / tensors,
            seconds,
            wire,
            training.evaluated(number),
        )


def _sent() -> int | None:
    """Return what the loopback has carried so far, in bytes, where the system counts it."""
    try:
        return int(SENT.read_text())
    except OSError:
        return None


def _work(name: str, socket: str, training_file: str) -> None:
    """Be a worker: train with one compressor after the other, until nobody asks."""
    training: Training = pickle.loads(Path(training_file).read_bytes())
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    engine = RANKS[name]()
    with contextlib.ExitStack() as stack:
        asks: Connection | None = None
        if engine.rank == 0:
            asks = stack.enter_context(Client(socket, authkey=KEY))
        while True:
            compressor = None
            if asks is not None:
                with contextlib.suppress(EOFError, OSError):
                    compressor = asks.recv()
            compressor = engine.broadcast(compressor)
            if compressor is None:
                return
            wanted = True
            for round_ in _train(engine, training, compressor):
                if asks is not None:
                    try:
                        asks.send(round_)
                    except OSError:
                        wanted = False
                if round_.number % 10 == 0 and not engine.broadcast(wanted):
                    return
            if asks is not None:
                with contextlib.suppress(OSError):
                    asks.send(None)


if __name__ == "__main__":
    if sys.argv[1] == "flower":
        from flower_simulation import simulate

        simulate(*sys.argv[2:], KEY)
    else:
        _work(*sys.argv[1:])
