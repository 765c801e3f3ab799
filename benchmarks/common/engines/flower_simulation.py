"""Training in Flower's simulation, with a ClientApp for each worker in Ray's actors.

A client sends new parameters, w - lr * g. `CompressionMod` compresses their difference to the
received ones, -lr * g. The server is Flower's FedAvgM inside `CompressedStrategy`. Up to float
rounding the result is that of `benchmarks.common.training.run`.
"""

from __future__ import annotations

import contextlib
import functools
import pickle
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing.connection import Client
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Context,
    Message,
    MessageType,
    MetricRecord,
    RecordDict,
)
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvgM
from torch import Tensor

from benchmarks.common.models import parameters
from benchmarks.common.training import Round, Training, Workers, evaluate, local_updates
from lbgm_compress import Compressor
from lbgm_compress.adapters.flower import CompressedStrategy, CompressionMod
from lbgm_compress.compressors.parse import import_known

__all__ = ["Sampled", "client_app", "nodes_of", "run_clients", "simulate"]

ORDER = "order"
REPLIES_WITHIN = 300.0  # seconds


# --- a worker ------------------------------------------------------------------------------------


def client_app(
    train: Callable[[Message, Context], Message], known: Sequence[type] = ()
) -> ClientApp:
    """Return an app that trains with `train`, sends compressed updates, and tells its partition.

    `known` are the classes of ``--known``.
    """
    app = ClientApp(mods=[CompressionMod(compressors=known)])
    app.train()(train)
    app.query()(tell_partition)
    return app


@functools.lru_cache(maxsize=1)
def _loaded(path: str) -> tuple[Training, Workers, Callable[..., dict[str, Tensor]]]:
    """Return a training, its workers and their updates, read once in each of Ray's processes."""
    training: Training = pickle.loads(Path(path).read_bytes())
    workers = Workers(training)
    return training, workers, local_updates(training.initial_model(), training, workers)


def tell_partition(message: Message, context: Context) -> Message:
    """Reply with the number of this worker, since node ids are random."""
    record = MetricRecord({"partition": int(context.node_config["partition-id"])})
    return Message(RecordDict({"metrics": record}), reply_to=message)


def train(message: Message, context: Context) -> Message:
    """Take the worker's local steps, and reply with the new parameters."""
    config = message.content["config"]
    training, workers, update = _loaded(str(config["training"]))
    worker = int(context.node_config["partition-id"])
    _restore_order(context, str(config["method"]), workers, worker, training.seed)
    weights = {k: v.clone() for k, v in message.content["arrays"].to_torch_state_dict().items()}
    gradient = update(weights, [worker])
    new = {name: weight - training.lr * gradient[name][0] for name, weight in weights.items()}
    _keep_order(context, str(config["method"]), workers, worker)
    content = {
        "arrays": ArrayRecord(new),
        "metrics": MetricRecord({"num-examples": workers.sizes[worker]}),
    }
    return Message(RecordDict(content), reply_to=message)


def _restore_order(context: Context, method: str, workers: Workers, worker: int, seed: int) -> None:
    """Restore the order of the worker's images as its last round, in any process, has left it."""
    record = context.state.get(ORDER)
    if isinstance(record, ArrayRecord) and method in record:
        workers.orders[worker] = torch.from_numpy(record[method].numpy())
        workers.generators[worker].set_state(torch.from_numpy(record["generator"].numpy()))
    else:
        workers.orders[worker] = torch.empty(0, dtype=torch.int64)
        workers.generators[worker].manual_seed(1_000_003 * seed + worker)


def _keep_order(context: Context, method: str, workers: Workers, worker: int) -> None:
    context.state[ORDER] = ArrayRecord(
        {
            method: Array(workers.orders[worker].numpy()),
            "generator": Array(workers.generators[worker].get_state().numpy()),
        }
    )


# --- the server ----------------------------------------------------------------------------------


class Sampled(FedAvgM):
    """FedAvgM with given clients in each round, whose updates are added in their order."""

    def __init__(self, nodes: dict[int, int], momentum: float) -> None:
        super().__init__(server_momentum=momentum, fraction_evaluate=1.0)
        self.nodes = nodes
        self.partitions = {node: partition for partition, node in nodes.items()}
        self.sampled: list[int] = []

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Return the messages to the sampled clients."""
        self.current_arrays = arrays
        content = RecordDict({self.arrayrecord_key: arrays, self.configrecord_key: config})
        return [Message(content, self.nodes[k], MessageType.TRAIN) for k in self.sampled]

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Average replies in the order of the clients, so that rounding is reproducible."""
        replies = list(replies)
        for reply in replies:
            if reply.has_error():
                raise RuntimeError(f"a client failed: {reply.error.reason}")
        replies.sort(key=lambda reply: self.partitions[reply.metadata.src_node_id])
        return super().aggregate_train(server_round, replies)


def nodes_of(grid: Grid, workers: int) -> dict[int, int]:
    """Return the node id of each worker, once all are connected."""
    while len(ids := list(grid.get_node_ids())) < workers:
        time.sleep(0.1)
    questions = [Message(RecordDict(), node, MessageType.QUERY) for node in ids]
    replies = grid.send_and_receive(questions, timeout=REPLIES_WITHIN)
    return {int(m.content["metrics"]["partition"]): m.metadata.src_node_id for m in replies}


def _rounds(
    grid: Grid, path: str, nodes: dict[int, int], compressor: Compressor, known: Sequence[type]
) -> Iterator[Round]:
    """Train with one compressor, and yield every round as it ends."""
    training: Training = pickle.loads(Path(path).read_bytes())
    model = training.initial_model()
    sampler = torch.Generator().manual_seed(training.seed)
    inner = Sampled(nodes, training.server_momentum)
    strategy = CompressedStrategy(inner, compressor, compressors=known)
    arrays = ArrayRecord(dict(parameters(model)))
    test = training.dataset.test_images, training.dataset.test_labels
    config = ConfigRecord({"training": path, "method": strategy.training})
    accuracy = loss = 0.0
    for number in range(1, training.rounds + 1):
        start = time.perf_counter()
        order = torch.randperm(len(nodes), generator=sampler)
        inner.sampled = sorted(order[: training.sampled()].tolist())
        messages = strategy.configure_train(number, arrays, config, grid)
        replies = list(grid.send_and_receive(messages, timeout=REPLIES_WITHIN))
        if len(replies) < len(inner.sampled):
            raise RuntimeError(
                f"{len(replies)} of {len(inner.sampled)} clients replied within "
                f"{REPLIES_WITHIN:g} s"
            )
        averaged, metrics = strategy.aggregate_train(number, replies)
        assert averaged is not None
        assert metrics is not None
        arrays = averaged
        if training.evaluated(number):
            weights = {n: torch.from_numpy(np.array(a.numpy())) for n, a in arrays.items()}
            accuracy, loss = evaluate(model, weights, *test)
        yield Round(
            number,
            accuracy,
            loss,
            int(metrics["uplink-bytes"]),
            float(metrics["recycled-share"]),
            time.perf_counter() - start,
            evaluated=training.evaluated(number),
        )


def run_clients(server_app: ServerApp, app: ClientApp, clients: int) -> None:
    """Run Flower's simulation with a core for each client that trains."""
    from flwr.simulation import run_simulation

    resources = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}}
    run_simulation(server_app, app, clients, backend_config=resources)


def simulate(socket: str, training_file: str, key: bytes, specs: Sequence[str] = ()) -> None:
    """Train with one compressor after the other, until the command asks for no more.

    `specs` are the values of ``--known``.
    """
    training: Training = pickle.loads(Path(training_file).read_bytes())
    workers = len(training.parts)
    known = import_known(specs)
    server_app = ServerApp()

    @server_app.main()
    def main(grid: Grid, context: Context) -> None:
        with Client(socket, authkey=key) as asks:
            nodes = nodes_of(grid, workers)
            while True:
                compressor: Any = None
                with contextlib.suppress(EOFError, OSError):
                    compressor = asks.recv()
                if compressor is None:
                    return
                for round_ in _rounds(grid, training_file, nodes, compressor, known):
                    asks.send(round_)
                asks.send(None)

    # The command has ended if nothing reads the results.
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        run_clients(server_app, client_app(train, known), workers)
