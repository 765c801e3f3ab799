"""The server: FedAvg inside a CompressedStrategy."""

import random
from pathlib import Path

from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from safetensors.torch import load_file, save_file

from flower_app.task import build_model, evaluate, load_images
from lbgm_compress import parse_compressor
from lbgm_compress.adapters.flower import CompressedStrategy, plot

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    config = context.run_config
    hidden = int(config["hidden"])
    random.seed(int(config["seed"]))  # FedAvg draws the clients of a round from it
    out = Path(str(config["out"])) if config["out"] else None
    strategy = CompressedStrategy(
        FedAvg(fraction_train=float(config["fraction-train"]), fraction_evaluate=0.0),
        parse_compressor(str(config["compressor"])),
        log_file=out and out / "rounds.jsonl",
    )
    model = build_model(hidden, int(config["seed"]))
    if out and (out / "model.safetensors").exists():
        # A server that was stopped continues from its last round.
        model.load_state_dict(load_file(out / "model.safetensors"))
        strategy.load(out / "held.safetensors")

    test = load_images(train=False)

    def evaluate_and_save(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        model.load_state_dict(arrays.to_torch_state_dict())
        if out:
            save_file(model.state_dict(), out / "model.safetensors")
            strategy.save(out / "held.safetensors")
        loss, accuracy = evaluate(model, *test)
        return MetricRecord({"loss": loss, "accuracy": accuracy})

    strategy.start(
        grid,
        ArrayRecord(model.state_dict()),
        num_rounds=int(config["num-server-rounds"]),
        evaluate_fn=evaluate_and_save,
    )
    if out:
        plot(out / "rounds.jsonl", out / "flower.png")
