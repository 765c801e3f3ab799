"""Flower within one process: a grid that hands messages to a ClientApp, and apps for it."""

from __future__ import annotations

import copy
import hashlib
import itertools
import zlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from flwr.app import (
    Array,
    ArrayRecord,
    Context,
    Error,
    Message,
    MetricRecord,
    RecordDict,
)
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg, Result, Strategy
from flwr.supercore.task_identity import TaskIdentity

from lbgm_compress.adapters.flower import compression_mod

__all__ = [
    "Kept",
    "LoopbackGrid",
    "Receding",
    "arrays_of",
    "context",
    "digest_of",
    "make_app",
    "one_round",
    "start",
]


def context(node: int, partition: int = 0, run: int = 1) -> Context:
    """Return the context of a client at its start."""
    return Context(run, node, {"partition-id": partition, "num-partitions": 10}, RecordDict(), {})


class LoopbackGrid:
    """A grid that carries messages to clients and back, one after the other.

    `losses` returns for a round and a node whether the reply is dropped, as after a time-out.
    """

    def __init__(
        self,
        app: ClientApp,
        nodes: int,
        losses: Callable[[int, int], bool] = lambda number, node: False,
        first_id: int = 100,
    ) -> None:
        # Flower sets these in the process of a ServerApp.
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
        self.app = app
        self.contexts = {first_id + k: context(first_id + k, k) for k in range(nodes)}
        self.losses = losses
        self.rounds = 0
        self.tamper: Callable[[list[Message]], list[Message]] = lambda replies: replies
        self._ids = itertools.count(1)

    def get_node_ids(self) -> Iterable[int]:
        return list(self.contexts)

    def restart(self, node: int, new_id: int | None = None) -> None:
        """Replace a client by a new one with an empty context."""
        partition = self.contexts.pop(node).node_config["partition-id"]
        new_id = node if new_id is None else new_id
        self.contexts[new_id] = context(new_id, partition)
        self.contexts = dict(sorted(self.contexts.items()))

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        replies = []
        messages = list(messages)
        train = any(m.metadata.message_type == "train" for m in messages)
        self.rounds += train
        for message in messages:
            message.metadata.__dict__["_message_id"] = f"message-{next(self._ids)}"
            node = message.metadata.dst_node_id
            arrived = copy.deepcopy(message)
            try:
                reply = self.app(arrived, self.contexts[node])
            except Exception as error:
                reply = Message(Error(2, repr(error)), reply_to=arrived)
            if not (train and self.losses(self.rounds, node)):
                replies.append(copy.deepcopy(reply))
        return self.tamper(replies) if train else replies


class Receding:
    """A made-up training: parameters move towards a target that is the client's own."""

    def __init__(self, noise: float = 0.05, rate: float = 0.1) -> None:
        self.noise, self.rate = noise, rate

    def __call__(self, arrays: dict[str, np.ndarray], partition: int) -> dict[str, np.ndarray]:
        new = {}
        for number, (name, array) in enumerate(arrays.items()):
            if name == "counter":
                # An integer at the client, as BatchNorm's, whatever dtype the server sends.
                new[name] = np.asarray(array.astype(np.int64) + 1)
                continue
            if array.dtype.kind != "f":
                new[name] = array + np.ones_like(array)
                continue
            rng = np.random.default_rng((partition, number))
            target = rng.normal(size=array.shape)
            # The noise depends on the parameters alone, so that no state is needed.
            seed = zlib.crc32(array.tobytes())
            noise = np.random.default_rng((partition, number, seed)).normal(size=array.shape)
            step = self.rate * (target - array.astype(float) + self.noise * noise)
            with np.errstate(invalid="ignore"):  # A mask holds inf.
                new[name] = (array.astype(float) + step).astype(array.dtype)
        return new


class Kept(FedAvg):
    """FedAvg that keeps the replies of the last round."""

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        self.replies = list(replies)
        return super().aggregate_train(server_round, self.replies)

    def received(self) -> dict[int, dict[str, np.ndarray]]:
        """Return the arrays of each client whose reply was no error."""
        return {
            m.metadata.src_node_id: {
                name: array.numpy()
                for record in m.content.array_records.values()
                for name, array in record.items()
            }
            for m in self.replies
            if not m.has_error()
        }


def make_app(
    mods: list[Any],
    train: Any = None,
    before: Callable[[Message, Context], None] = lambda message, ctxt: None,
    **options: Any,
) -> ClientApp:
    """Return a ClientApp that calls `before` and then `train`, by default a `Receding`."""
    train = train or Receding(**options)
    app = ClientApp(mods=mods)

    @app.train()
    def on_train(message: Message, ctxt: Context) -> Message:
        before(message, ctxt)
        record = message.content["arrays"]
        new = train(
            {name: array.numpy() for name, array in record.items()},
            int(ctxt.node_config["partition-id"]),
        )
        arrays = ArrayRecord({name: Array(np.asarray(value)) for name, value in new.items()})
        partition = int(ctxt.node_config["partition-id"])
        count = 10 + partition
        metrics = MetricRecord(
            {"num-examples": count, "loss": float(count), "partition": partition}
        )
        return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)

    @app.evaluate()
    def on_evaluate(message: Message, ctxt: Context) -> Message:
        metrics = MetricRecord({"num-examples": 10, "accuracy": 0.25})
        return Message(RecordDict({"metrics": metrics}), reply_to=message)

    return app


def arrays_of(seed: int = 0, **others: np.ndarray) -> ArrayRecord:
    """Return initial parameters: two of float32, and `others`."""
    generator = torch.Generator().manual_seed(seed)
    parameters = {
        "layer.weight": torch.randn(40, 30, generator=generator).numpy(),
        "layer.bias": torch.randn(30, generator=generator).numpy(),
        **others,
    }
    return ArrayRecord({name: Array(np.asarray(value)) for name, value in parameters.items()})


def digest_of(arrays: Mapping[str, Any]) -> str:
    """Return a hash of the elements of float32 arrays or tensors, by name."""
    found = {name: np.asarray(array) for name, array in arrays.items()}
    parts = (found[n].tobytes() for n in sorted(found) if found[n].dtype == np.float32)
    return hashlib.sha256(b"".join(parts)).hexdigest()


def start(
    strategy: Any, grid: LoopbackGrid, arrays: ArrayRecord, rounds: int = 5
) -> dict[str, np.ndarray]:
    """Run a training, and return the parameters at its end."""
    result = strategy.start(grid, arrays, num_rounds=rounds)
    return {name: array.numpy() for name, array in result.arrays.items()}


def one_round(
    strategy: Strategy,
    app: ClientApp | None = None,
    tamper: Callable[[list[Message]], list[Message]] | None = None,
) -> Result:
    """Run a round with three clients, whose replies go through `tamper`."""
    grid = LoopbackGrid(app or make_app([compression_mod]), 3)
    if tamper:
        grid.tamper = tamper
    return strategy.start(grid, arrays_of(), num_rounds=1)
