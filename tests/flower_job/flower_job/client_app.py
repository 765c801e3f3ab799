"""A client that is late or hangs in the rounds that the run's configuration names.

It writes a hash of each model that it is given, and personal arrays themselves.
"""

import os
import time
from pathlib import Path

import numpy as np
from flwr.app import Context, Message

from lbgm_compress.adapters.flower import CompressionMod
from tests.flower_loopback import digest_of, make_app


def misbehave(message: Message, context: Context) -> None:
    number = message.content["config"]["server-round"]
    key = f"{number}:{context.node_id}"
    out = Path(str(context.run_config["out"]))
    if key in str(context.run_config["late"]).split():
        wait_for(out / f"over-{number}")
    if key in str(context.run_config["hang"]).split():
        (out / "hanging").touch()
        wait_for(out / "never")


def tell(message: Message, context: Context, call_next):
    """Write a hash of the model that the app is about to see, and its personal arrays."""
    arrays = {name: array.numpy() for name, array in message.content["arrays"].items()}
    number = message.content["config"]["server-round"]
    kind = message.metadata.message_type
    partition = context.node_config["partition-id"]
    out = Path(str(context.run_config["out"]))
    (out / f"seen-{kind}-{number}-{partition}").write_text(digest_of(arrays))
    if context.run_config["personal"]:
        np.save(out / f"head-{kind}-{number}-{partition}.npy", arrays["head.weight"])
    return call_next(message, context)


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 100
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.05)


mod = CompressionMod(state_dir=os.environ.get("FLOWER_JOB_STATE"))
app = make_app([mod, tell], before=misbehave, noise=0.0, rate=0.3)
