"""A client: a few steps of SGD on its own images, and an evaluation on the same images."""

from pathlib import Path

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from safetensors.torch import load_file
from torch import Tensor, nn

from benchmarks.common.models import build
from lbgm_compress.adapters.flower import compression_mod

app = ClientApp(mods=[compression_mod])


def model_and_data(message: Message, context: Context) -> tuple[nn.Module, Tensor, Tensor]:
    """Return the model that was received, and the client's images and labels."""
    torch.set_num_threads(1)
    number = context.node_config["partition-id"]
    data = load_file(Path(str(context.run_config["data"])) / f"{number}.safetensors")
    images, labels = data["images"], data["labels"]
    model = build("fcn", tuple(images.shape[1:]), 10, 0)
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    return model, images, labels


@app.train()
def train(message: Message, context: Context) -> Message:
    """Take the local steps, and reply with the new parameters."""
    model, images, labels = model_and_data(message, context)
    config = context.run_config
    # Images are drawn anew in each round.
    order = torch.Generator().manual_seed(
        1_000_003 * int(message.content["config"]["server-round"])
        + int(context.node_config["partition-id"])
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=float(config["lr"]))
    for _ in range(int(config["local-steps"])):
        rows = torch.randperm(len(labels), generator=order)[: int(config["batch-size"])]
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images[rows]), labels[rows]).backward()
        optimizer.step()
    content = {
        "arrays": ArrayRecord(model.state_dict()),
        "metrics": MetricRecord({"num-examples": len(labels)}),
    }
    return Message(RecordDict(content), reply_to=message)


@app.evaluate()
@torch.no_grad()
def evaluate(message: Message, context: Context) -> Message:
    """Reply with the accuracy on the client's images."""
    model, images, labels = model_and_data(message, context)
    accuracy = (model(images).argmax(1) == labels).float().mean().item()
    metrics = MetricRecord({"num-examples": len(labels), "accuracy": accuracy})
    return Message(RecordDict({"metrics": metrics}), reply_to=message)
