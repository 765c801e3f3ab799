"""The server: FedAvg, alone or inside a CompressedStrategy."""

import json
import random
from pathlib import Path

from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from safetensors.torch import load_file

from benchmarks.common.models import build, parameters
from benchmarks.common.training import evaluate
from lbgm_compress import parse_compressor
from lbgm_compress.adapters.flower import CompressedStrategy

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Train, and append a line of JSON after each round, with the strategy's own counts so far."""
    config = context.run_config
    random.seed(int(config["seed"]))  # FedAvg draws the clients of a round from it
    share, clients = float(config["participation"]), int(config["clients"])
    strategy = FedAvg(
        fraction_train=share,
        fraction_evaluate=share,
        min_train_nodes=1,
        min_evaluate_nodes=1,
        min_available_nodes=clients,
    )
    if config["uplink"]:
        downlink = config["downlink"]
        strategy = CompressedStrategy(
            strategy,
            parse_compressor(str(config["uplink"])),
            downlink=parse_compressor(str(downlink)) if downlink else None,
            first="float16" if downlink else "float32",
        )
    test = load_file(Path(str(config["data"])) / "test.safetensors")
    model = build("fcn", tuple(test["images"].shape[1:]), 10, int(config["seed"]))

    def write_line(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        weights = arrays.to_torch_state_dict()
        accuracy, _ = evaluate(model, weights, test["images"], test["labels"])
        line = {"round": server_round, "accuracy": accuracy}
        if isinstance(strategy, CompressedStrategy):
            totals = strategy.totals
            line |= {"replies": totals.replies, "failed": totals.failed + totals.rejected}
            line |= {"up": totals.uplink, "down": totals.downlink}
        else:
            # Every reply to a train message, and every message, has all arrays.
            size = sum(len(array.data) for array in arrays.values())
            replies = server_round * int(clients * share)
            line |= {"replies": replies, "failed": 0, "up": replies * size}
            line |= {"down": 2 * replies * size}
        with (Path(str(config["out"])) / "rounds.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        return MetricRecord({"accuracy": accuracy})

    strategy.start(
        grid,
        ArrayRecord(dict(parameters(model))),
        num_rounds=int(config["num-server-rounds"]),
        evaluate_fn=write_line,
    )
