"""The client: an ordinary app with one mod."""

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from flower_app.task import build_model, evaluate, load_partition, train
from lbgm_compress.adapters.flower import compression_mod

app = ClientApp(mods=[compression_mod])


def model_and_data(message: Message, context: Context):
    model = build_model(int(context.run_config["hidden"]))
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    return model, load_partition(
        int(context.node_config["partition-id"]),
        int(context.node_config["num-partitions"]),
        int(context.run_config["classes-per-client"]),
    )


@app.train()
def train_on_partition(message: Message, context: Context) -> Message:
    model, (images, labels) = model_and_data(message, context)
    steps, lr = int(context.run_config["local-steps"]), float(context.run_config["lr"])
    loss = train(model, images, labels, steps, lr)
    metrics = MetricRecord({"num-examples": len(labels), "train-loss": loss})
    content = RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics})
    return Message(content, reply_to=message)


@app.evaluate()
def evaluate_on_partition(message: Message, context: Context) -> Message:
    model, (images, labels) = model_and_data(message, context)
    loss, accuracy = evaluate(model, images, labels)
    metrics = {"num-examples": len(labels), "eval-loss": loss, "eval-accuracy": accuracy}
    return Message(RecordDict({"metrics": MetricRecord(metrics)}), reply_to=message)
