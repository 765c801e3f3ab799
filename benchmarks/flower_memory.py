"""What a Flower server keeps of its clients' look-back gradients, beside so many dense models.

Flower's simulation runs clients that train something made up; `CompressedStrategy` holds what they
look back at. Its state is then loaded by a new process, whose memory tells what Python adds.
"""

from __future__ import annotations

import argparse
import csv
import math
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

if not __package__:  # run as a script
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
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from rich.console import Console
from rich.table import Table

from benchmarks.common.command_line import Parser, check_folder, number_in, positive
from benchmarks.common.engines.flower_simulation import Sampled, nodes_of, tell_partition
from benchmarks.common.processes import environment
from lbgm_compress import Compressor
from lbgm_compress.adapters.flower import CompressedStrategy, compression_mod
from lbgm_compress.compressors.parse import parse_compressor

client_app = ClientApp(mods=[compression_mod])
client_app.query()(tell_partition)
LOADED = """
import sys
from flwr.serverapp.strategy import FedAvg
from lbgm_compress.adapters.flower import CompressedStrategy
from lbgm_compress.compressors.parse import parse_compressor

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096

def loaded(path):
    strategy = CompressedStrategy(FedAvg(), parse_compressor(sys.argv[1]), keep_rounds=None)
    strategy.load(path)
    return strategy

one = loaded(sys.argv[2])  # what is imported and made once
before = resident()
kept = [loaded(sys.argv[2]) for _ in range(3)]
print((resident() - before) // 3)
"""


@client_app.train()
def train(message: Message, context: Context) -> Message:
    """Move towards a point that is the client's own."""
    rng = np.random.default_rng(int(context.node_config["partition-id"]))
    arrays = {}
    for name, array in message.content["arrays"].items():
        weight = array.numpy()
        target = rng.normal(size=weight.shape).astype(weight.dtype)
        arrays[name] = Array(weight + np.float32(0.1) * (target - weight))
    content = {"arrays": ArrayRecord(arrays), "metrics": MetricRecord({"num-examples": 1})}
    return Message(RecordDict(content), reply_to=message)


def parameters(count: int) -> dict[str, torch.Tensor]:
    """Return zeros: two layers with so many parameters in all."""
    side = math.isqrt(count * 9 // 10)
    shapes = {"first.weight": (side, side), "first.bias": (side,)}
    rest = count - side * side - side - 10
    shapes |= {"second.weight": (10, rest // 10), "second.bias": (10 + rest % 10,)}
    return {name: torch.zeros(shape) for name, shape in shapes.items()}


class Drawn(Sampled):
    """FedAvg of clients that are drawn anew in each round, by a seed."""

    def __init__(self, nodes: dict[int, int], share: float, seed: int) -> None:
        super().__init__(nodes, momentum=0.0)
        self.count = max(1, round(share * len(nodes)))
        self.generator = random.Random(seed)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Draw clients, and ask them."""
        self.sampled = sorted(self.generator.sample(sorted(self.nodes), self.count))
        return super().configure_train(server_round, arrays, config, grid)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask nobody."""
        return []


def simulate(compressor: Compressor, options: argparse.Namespace, path: str) -> None:
    """Train, and write what the server holds to a file."""
    from flwr.simulation import run_simulation

    server_app = ServerApp()

    @server_app.main()
    def main(grid: Grid, context: Context) -> None:
        inner = Drawn(nodes_of(grid, options.clients), options.participation, options.seed)
        strategy = CompressedStrategy(inner, compressor, keep_rounds=None)
        arrays = ArrayRecord(parameters(options.parameters))
        strategy.start(grid, arrays, num_rounds=options.rounds)
        strategy.save(path)

    # Ray's processes import this program's modules.
    os.environ.update(environment())
    resources = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}}
    run_simulation(server_app, client_app, options.clients, backend_config=resources)


def main(arguments: list[str]) -> int:
    """Run the command line and return the exit status."""
    parser = Parser("flower_memory.py", (__doc__ or "").split("\n\n")[0])
    add = parser.add_argument
    add("--compressor", default="LBGM(TopK(0.01))", help="(default: LBGM(TopK(0.01)))")
    add("--clients", type=positive, default=1000, metavar="K", help="(default: 1000)")
    add("--parameters", type=positive, default=100_000, metavar="N", help="(default: 100000)")
    add("--rounds", type=positive, default=20, metavar="N", help="(default: 20)")
    add(
        "--participation",
        type=number_in(0, 1, open_low=True),
        default=0.05,
        metavar="SHARE",
        help="share of the clients in a round (default: 0.05)",
    )
    add("--seed", type=int, default=0, help="(default: 0)")
    add("--bound", type=float, default=0.03, help="share of dense models, at most (default: 0.03)")
    add("--out", default="flower-memory-results", metavar="DIR", help="folder for the CSV")
    options = parser.parse_args(arguments)
    folder = Path(options.out)
    try:
        compressor = parse_compressor(options.compressor)
        check_folder(folder)
    except ValueError as error:
        parser.error(str(error))
    if options.parameters < 1000:
        parser.error(f"--parameters {options.parameters} is less than 1000")
    with tempfile.TemporaryDirectory() as held:
        path = f"{held}/held.safetensors"
        simulate(compressor, options, path)
        strategy = CompressedStrategy(FedAvg(), compressor, keep_rounds=None)
        strategy.load(path)
        command = [sys.executable, "-c", LOADED, repr(compressor), path]
        resident = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        file = Path(path).stat().st_size
    dense = 4 * sum(p.numel() for p in parameters(options.parameters).values()) * options.clients
    row = {
        "compressor": repr(compressor),
        "clients": options.clients,
        "parameters": options.parameters,
        "rounds": options.rounds,
        "participation": options.participation,
        "clients_held": len(strategy.held_clients()),
        "payload_bytes": strategy.held_bytes(),
        "resident_bytes": resident,
        "file_bytes": file,
        "dense_bytes": dense,
    }
    with (folder / "flower_memory.csv").open("w", newline="") as output:
        writer = csv.DictWriter(output, row)
        writer.writeheader()
        writer.writerow(row)
    table = Table(title=f"held of {row['clients_held']} of {options.clients} clients")
    for heading in ("what", "bytes", f"of {options.clients} dense models"):
        table.add_column(heading, justify="left" if heading == "what" else "right")
    for what in ("payload_bytes", "resident_bytes", "file_bytes", "dense_bytes"):
        table.add_row(what.replace("_", " "), f"{row[what]:,}", f"{int(row[what]) / dense:.2%}")
    Console(width=None if sys.stdout.isatty() else 100).print(table)
    if resident > options.bound * dense:
        print(f"more than {options.bound:.0%} of {options.clients} dense models", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
