"""A worker of an engine with ranks, or the whole simulation of Flower.

``python -m benchmarks.common.engines.worker ENGINE SOCKET TRAINING [MODULE:CLASS ...]`` is started
by torchrun, horovodrun or `benchmarks.common.engines.running`. Each update of a worker is given to
the engine as a gradient, so that messages pass through the engine's hooks as in any training.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import sys
import time
from collections.abc import Iterator
from multiprocessing.connection import Client, Connection
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.common.baselines import Baseline
from benchmarks.common.engines.base import Engine
from benchmarks.common.engines.running import KEY, RANKS
from benchmarks.common.training import Round, Training, Workers, evaluate, local_updates
from lbgm_compress.algorithm import Algorithm

CROSSED = Path("/sys/class/net/lo/statistics/tx_bytes")


class Linear(nn.Module):
    """A loss whose gradient is exactly a given update."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, update: dict[str, Tensor]) -> Tensor:
        return torch.stack(
            [(parameter * update[n]).sum() for n, parameter in self.model.named_parameters()]
        ).sum()


def train(engine: Engine, training: Training, compressor: Algorithm) -> Iterator[Round]:
    """Train as `benchmarks.common.training.run` does, as one of its workers."""
    model = training.initial_model()
    workers = Workers(training)
    update = local_updates(model, training, workers)
    optimizer: torch.optim.Optimizer = torch.optim.SGD(
        model.parameters(), lr=training.lr, momentum=training.server_momentum
    )
    module, optimizer, sent_after = engine.wrap(
        Linear(model),
        optimizer,
        {
            "compressor": compressor,
            "named_parameters": model.named_parameters(),
            "weight": workers.sizes[engine.rank],
        },
    )
    # The average of a baseline has equal weights: each worker's update carries its own.
    size = workers.sizes[engine.rank] * len(workers.sizes) / sum(workers.sizes)
    scale = size if isinstance(compressor, Baseline) else 1.0
    test = training.dataset.test_images, training.dataset.test_labels
    accuracy = loss = 0.0
    for number in range(1, training.rounds + 1):
        start = time.perf_counter()
        weights = {name: p.detach() for name, p in model.named_parameters()}
        mine = {name: scale * g[0] for name, g in update(weights, [engine.rank]).items()}
        before, nothing = sent_after(number - 1).bytes, torch.zeros(1, dtype=torch.int64)
        # The bytes of the exchange are counted from when all ranks have their updates until all
        # have their averages, with two small sums in between, so that no rank's bytes are missed.
        engine.total(nothing)
        crossed = crossed_bytes()
        engine.total(nothing)
        optimizer.zero_grad()
        module(mine).backward()
        optimizer.step()
        sent = sent_after(number)
        uplink, recycled, tensors = engine.total(
            torch.tensor([sent.bytes - before, sent.recycled, sent.tensors])
        ).tolist()
        wire = None if crossed is None else (crossed_bytes() or crossed) - crossed
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


def crossed_bytes() -> int | None:
    """Return the bytes that the loopback interface has carried, or None if none are counted."""
    try:
        return int(CROSSED.read_text())
    except OSError:
        return None


def work(name: str, socket: str, training_file: str) -> None:
    """Train with one compressor after the other, until the command asks for no more."""
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
            for round_ in train(engine, training, compressor):
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
        from benchmarks.common.engines.flower_simulation import simulate

        simulate(*sys.argv[2:4], KEY, sys.argv[4:])
    else:
        work(*sys.argv[1:4])
