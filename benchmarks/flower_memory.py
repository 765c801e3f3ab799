"""Measure the memory of a Flower server for its clients' look-back gradients.

Flower's simulation runs clients with synthetic updates. The state of `CompressedStrategy` is then
loaded by a new process, so that its resident memory is measured with all that Python adds. Both are
compared with one dense model a client.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__" and __spec__ is None:  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Context,
    Message,
    MetricRecord,
    RecordDict,
)
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from rich.table import Table

from benchmarks.common.command_line import (
    Parser,
    add_methods,
    check_folder,
    number_in,
    positive,
    read_methods,
    start,
)
from benchmarks.common.engines.flower_simulation import (
    Sampled,
    client_app,
    nodes_of,
    run_clients,
)
from benchmarks.common.processes import environment
from benchmarks.common.tables import console, make_table, write_csv
from lbgm_compress import Compressor
from lbgm_compress.adapters.flower import CompressedStrategy
from lbgm_compress.compressors.parse import import_known

METHODS = "LBGM(TopK(0.01))"
# Prints the resident memory, in bytes, that the state of one server takes.
LOADED = """
import sys
from flwr.serverapp.strategy import FedAvg
from lbgm_compress.adapters.flower import CompressedStrategy
from lbgm_compress.compressors.parse import import_known, parse_compressor

known = import_known(sys.argv[3:])

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096

def loaded(path):
    compressor = parse_compressor(sys.argv[1], known)
    strategy = CompressedStrategy(FedAvg(), compressor, keep_rounds=None, compressors=known)
    strategy.load(path)
    return strategy

one = loaded(sys.argv[2])  # imports, and objects that are made once
before = resident()
kept = [loaded(sys.argv[2]) for _ in range(3)]
print((resident() - before) // 3)
"""


def train(message: Message, context: Context) -> Message:
    """Reply with parameters that are closer to a random point of the client's own."""
    rng = np.random.default_rng(int(context.node_config["partition-id"]))
    arrays = {}
    for name, array in message.content["arrays"].items():
        weight = array.numpy()
        target = rng.normal(size=weight.shape).astype(weight.dtype)
        arrays[name] = Array(weight + np.float32(0.1) * (target - weight))
    content = {"arrays": ArrayRecord(arrays), "metrics": MetricRecord({"num-examples": 1})}
    return Message(RecordDict(content), reply_to=message)


def parameters(count: int) -> dict[str, torch.Tensor]:
    """Return two layers of zeros with `count` parameters in all."""
    side = math.isqrt(count * 9 // 10)
    shapes = {"first.weight": (side, side), "first.bias": (side,)}
    rest = count - side * side - side - 10
    shapes |= {"second.weight": (10, rest // 10), "second.bias": (10 + rest % 10,)}
    return {name: torch.zeros(shape) for name, shape in shapes.items()}


class Drawn(Sampled):
    """FedAvg of clients that are drawn in each round, reproducibly."""

    def __init__(self, nodes: dict[int, int], share: float, seed: int) -> None:
        super().__init__(nodes, momentum=0.0)
        self.count = max(1, round(share * len(nodes)))
        self.generator = random.Random(seed)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Return the messages to clients that are drawn."""
        self.sampled = sorted(self.generator.sample(sorted(self.nodes), self.count))
        return super().configure_train(server_round, arrays, config, grid)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Return no messages: there is no evaluation."""
        return []


def simulate(
    compressor: Compressor, known: Sequence[type], options: argparse.Namespace, path: str
) -> None:
    """Train, and write the state of the server to a file."""
    server_app = ServerApp()

    @server_app.main()
    def main(grid: Grid, context: Context) -> None:
        inner = Drawn(nodes_of(grid, options.clients), options.participation, options.seed)
        strategy = CompressedStrategy(inner, compressor, keep_rounds=None, compressors=known)
        arrays = ArrayRecord(parameters(options.parameters))
        strategy.start(grid, arrays, num_rounds=options.rounds)
        strategy.save(path)

    # Ray's processes import this program's modules.
    os.environ.update(environment())
    run_clients(server_app, client_app(train, known), options.clients)


def measure(compressor: Compressor, options: argparse.Namespace) -> dict[str, Any]:
    """Return a row of the CSV file."""
    known = import_known(options.known)
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/states.safetensors"
        simulate(compressor, known, options, path)
        strategy = CompressedStrategy(FedAvg(), compressor, keep_rounds=None, compressors=known)
        strategy.load(path)
        command = [sys.executable, "-c", LOADED, repr(compressor), path, *options.known]
        found = subprocess.run(
            command, check=True, capture_output=True, text=True, env=environment()
        )
        file_bytes = Path(path).stat().st_size
    model = sum(parameter.numel() for parameter in parameters(options.parameters).values())
    return {
        "compressor": repr(compressor),
        "clients": options.clients,
        "parameters": options.parameters,
        "rounds": options.rounds,
        "participation": options.participation,
        "clients_held": len(strategy.held_clients()),
        "payload_bytes": strategy.held_bytes(),
        "resident_bytes": int(found.stdout),
        "file_bytes": file_bytes,
        "dense_bytes": 4 * model * options.clients,
    }


def table_of(rows: Sequence[dict[str, Any]], clients: int) -> Table:
    """Return a table of the bytes, and of their shares of one dense model a client."""
    sizes = ("payload_bytes", "resident_bytes", "file_bytes", "dense_bytes")
    return make_table(
        f"Look-back gradients of {clients} clients, in bytes and as shares of dense models",
        ("method", "clients held", *(size.replace("_bytes", "") for size in sizes)),
        [
            (
                row["compressor"],
                str(row["clients_held"]),
                *(f"{row[size]:,} ({row[size] / row['dense_bytes']:.2%})" for size in sizes),
            )
            for row in rows
        ],
        whole="method",
    )


def build_parser() -> Parser:
    """Return the parser of the command line."""
    parser = Parser("flower_memory.py", __doc__)
    add = parser.add_argument
    add_methods(parser, METHODS)
    add("--clients", type=positive, default=1000, metavar="K", help="clients (default: 1000)")
    add(
        "--parameters",
        type=positive,
        default=100_000,
        metavar="N",
        help="parameters of the model, at least 1000 (default: 100000)",
    )
    add("--rounds", type=positive, default=20, metavar="N", help="rounds (default: 20)")
    add(
        "--participation",
        type=number_in(0, 1, open_low=True),
        default=0.05,
        metavar="SHARE",
        help="share of the clients in a round (default: 0.05)",
    )
    add("--seed", type=int, default=0, help="seed that clients are drawn by (default: 0)")
    add(
        "--bound",
        type=float,
        default=0.03,
        metavar="SHARE",
        help="the exit status is 1 if the resident memory is a larger share of dense models "
        "(default: 0.03)",
    )
    add(
        "--out",
        type=Path,
        default=Path("flower-memory-results"),
        metavar="DIR",
        help="folder of flower_memory.csv (default: flower-memory-results)",
    )
    return parser


def main(arguments: list[str]) -> int:
    """Run the command line and return the exit status."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    try:
        methods = read_methods(options.methods or METHODS, options.known, ranks=False)
        if options.parameters < 1000:
            raise ValueError(f"--parameters {options.parameters} is less than 1000")
        check_folder(options.out)
    except ValueError as error:
        parser.error(str(error))
    rows = []
    for method in methods:
        rows.append(measure(method, options))
        write_csv(options.out / "flower_memory.csv", list(rows[0]), [row.values() for row in rows])
    console().print(table_of(rows, options.clients))
    large = [r for r in rows if r["resident_bytes"] > options.bound * r["dense_bytes"]]
    for row in large:
        print(
            f"{row['compressor']}: more than {options.bound:.0%} of {options.clients} dense models",
            file=sys.stderr,
        )
    return 1 if large else 0


if __name__ == "__main__":
    start(main)
