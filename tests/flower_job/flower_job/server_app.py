"""A server that writes its parameters and the clients of each round to files.

With a downlink, it also writes a hash of the model that clients must hold, for each kind of message
and round.
"""

import json
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from flower_job.grid import PromptGrid
from lbgm_compress import parse_compressor
from lbgm_compress.adapters.flower import CompressedStrategy
from tests.flower_loopback import arrays_of, digest_of

app = ServerApp()


class Noting(FedAvg):
    """FedAvg that records the partitions whose replies it averages, for each round."""

    def __init__(self, out, **options):
        super().__init__(**options)
        self.out, self.partitions = out, []

    def aggregate_train(self, server_round, replies):
        replies = list(replies)
        self.partitions.append(
            [int(m.content["metrics"]["partition"]) for m in replies if not m.has_error()]
        )
        (self.out / f"over-{server_round}").touch()
        return super().aggregate_train(server_round, replies)


class Telling(CompressedStrategy):
    """A strategy that writes down what clients must hold."""

    def configure_train(self, server_round, arrays, config, grid):
        messages = super().configure_train(server_round, arrays, config, grid)
        self.tell(f"train-{server_round}")
        return messages

    def configure_evaluate(self, server_round, arrays, config, grid):
        messages = super().configure_evaluate(server_round, arrays, config, grid)
        self.tell(f"evaluate-{server_round}")
        return messages

    def tell(self, name):
        if self._downlink is not None:
            model = self._downlink.publisher.model
            (self.log_file.parent / f"model-{name}").write_text(digest_of(model))


@app.main()
def main(grid: Grid, context: Context) -> None:
    config = context.run_config
    out = Path(str(config["out"]))
    late = str(config["late"]).split()

    def absent(server_round: int, node: int) -> bool:
        return f"{server_round}:{node}" in late or (out / f"gone-{node}").exists()

    if config["prompt"]:
        grid = PromptGrid(grid, absent)
    inner = Noting(
        out,
        fraction_train=float(config["fraction"]),
        fraction_evaluate=float(config["evaluate"]),
        min_available_nodes=int(config["clients"]),
    )
    downlink, personal = str(config["downlink"]), str(config["personal"]).split()
    strategy = Telling(
        inner,
        parse_compressor(str(config["compressor"])),
        downlink=parse_compressor(downlink) if downlink else None,
        personal=personal,
        log_file=out / "rounds.jsonl",
    )
    heads = {"head.weight": np.linspace(-1, 1, 20, dtype=np.float32)} if personal else {}
    arrays = arrays_of(counter=np.array(3), **heads)
    if config["resume"]:
        strategy.load(out / "held.safetensors")
        with np.load(out / "arrays.npz") as saved:
            arrays = ArrayRecord({name: Array(value) for name, value in saved.items()})
    for path in out.glob("over-*"):
        path.unlink()
    result = strategy.start(
        grid, arrays, num_rounds=int(config["rounds"]), timeout=float(config["timeout"])
    )
    strategy.save(out / "held.safetensors")
    np.savez(out / "arrays.npz", **{name: a.numpy() for name, a in result.arrays.items()})
    (out / "partitions.json").write_text(json.dumps(inner.partitions))
