"""An elastic job on handwritten digits, in which a worker dies or joins.

``python elastic_job.py FOLDER LAST_STEP EVENT``: FOLDER has images and labels in ``digits.pt``, and
takes the results. At step 60, with EVENT ``kill``, the worker on the second host kills itself in
the middle of a step; with EVENT ``join``, that host becomes available, and the others repeat the
step until its worker has come.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
from pathlib import Path

import horovod.torch as hvd
import torch
from torch import nn

from lbgm_compress import LBGM, TopK
from lbgm_compress.adapters.horovod import DistributedOptimizer

EVENT_STEP = 60
folder, last_step, event = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
second_host = os.environ["HOROVOD_HOSTNAME"] == "127.0.0.1"
torch.set_num_threads(1)
hvd.init()

x, y = torch.load(folder / "digits.pt")
torch.manual_seed(hvd.rank())
model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
compressor = LBGM(TopK(0.3), delta=0.5)
optimizer = DistributedOptimizer(optimizer, compressor, model.named_parameters(), start_step=3)
history: list[dict[str, object]] = []


def fingerprint() -> torch.Tensor:
    data = b"".join(p.detach().numpy().tobytes() for p in model.parameters())
    digest = hashlib.blake2b(data, digest_size=7).digest()
    return torch.tensor([int.from_bytes(digest, "little")])


@hvd.elastic.run
def train(state: hvd.elastic.TorchState) -> None:
    while state.step < last_step:
        rank, size = hvd.rank(), hvd.size()
        mine = slice(rank, -360, size)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[mine]), y[mine]).backward()
        if event == "kill" and second_host and state.step == EVENT_STEP:
            os.kill(os.getpid(), signal.SIGKILL)
        optimizer.step()
        report = optimizer.compression.sender.report().values()
        history.append(
            {
                "step": state.step,
                "size": size,
                "recycled": sum(tensor.recycled for tensor in report),
                "warm": optimizer.compression.warming_up,
                "same": len(set(hvd.allgather(fingerprint(), name="same").tolist())) == 1,
            }
        )
        state.step += 1
        if event == "join" and state.step >= EVENT_STEP and size == 2:
            (folder / "joining").touch()
            # Else all steps might be over before the other has started.
            state.step = EVENT_STEP
        state.commit()


state = hvd.elastic.TorchState(model=model, optimizer=optimizer, step=0)
train(state)
accuracy = (model(x[-360:]).argmax(1) == y[-360:]).float().mean().item()
result = {"accuracy": accuracy, "fingerprint": fingerprint().item(), "history": history}
(folder / f"worker-{os.getpid()}").write_text(json.dumps(result))
