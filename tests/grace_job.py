"""A job of Horovod with a checkout of GRACE: ``python grace_job.py RESULT``.

It trains on handwritten digits with each of GRACE's compressors as one of this package, alone and
under LBGM, and with compressors of this package through GRACE's own communicators and memories.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from pathlib import Path

import horovod.torch as hvd
import torch
from grace_dl.torch.communicator.allgather import Allgather
from grace_dl.torch.communicator.allreduce import Allreduce
from grace_dl.torch.communicator.broadcast import Broadcast
from grace_dl.torch.memory.dgc import DgcMemory
from grace_dl.torch.memory.none import NoneMemory
from grace_dl.torch.memory.residual import ResidualMemory
from sklearn.datasets import load_digits
from torch import nn

from lbgm_compress import LBGM, Atomo, ErrorFeedback, Identity, LookBackSubspace, SignSGD, TopK
from lbgm_compress.adapters.grace import FromGrace, GraceCompressor
from lbgm_compress.adapters.horovod import DistributedOptimizer

STEPS = 80
# GRACE's communicators wait for every tensor several times.
STEPS_IN_GRACE = 40
# For each module: the class, its arguments, and a learning rate for the gradients that it decodes.
COMPRESSORS = {
    "none": ("NoneCompressor", (), 0.1),
    "fp16": ("FP16Compressor", (), 0.1),
    "topk": ("TopKCompressor", (0.1,), 0.1),
    "randomk": ("RandomKCompressor", (0.1,), 0.3),
    "threshold": ("ThresholdCompressor", (0.005,), 0.1),
    "dgc": ("DgcCompressor", (0.1,), 0.1),
    "qsgd": ("QSGDCompressor", (127,), 0.1),
    "terngrad": ("TernGradCompressor", (), 0.05),
    "signsgd": ("SignSGDCompressor", (), 0.001),
    "signum": ("SignumCompressor", (0.9,), 0.003),
    "efsignsgd": ("EFSignSGDCompressor", (0.1,), 0.1),
    "onebit": ("OneBitCompressor", (), 0.1),
    "natural": ("NaturalCompressor", (), 0.1),
    "powersgd": ("PowerSGDCompressor", (), 0.1),
}

hvd.init()
torch.set_num_threads(1)
rank, world = hvd.rank(), hvd.size()
images, labels = load_digits(return_X_y=True)
x, y = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)
mine = slice(rank, -360, world)


def build() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))


def result(model: nn.Module, seconds_a_step: float) -> dict[str, object]:
    flat = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    rows = hvd.allgather(flat[None])
    accuracy = (model(x[-360:]).argmax(1) == y[-360:]).float().mean().item()
    return {
        "same": bool((rows == rows[0]).all()),
        "accuracy": accuracy,
        "seconds a step": seconds_a_step,
    }


def train(compressor, lr):
    """Train with the optimizer for Horovod."""
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    optimizer = DistributedOptimizer(optimizer, compressor, model.named_parameters())
    start = time.perf_counter()
    for _ in range(STEPS):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[mine]), y[mine]).backward()
        optimizer.step()
    stats = optimizer.compression.stats()
    return {
        **result(model, (time.perf_counter() - start) / STEPS),
        "bytes": stats["message_bytes"],
        "ratio": stats["ratio"],
        "recycled": stats["recycled_share"],
    }


def train_in_grace(communicator, lr):
    """Train with a communicator of GRACE's in the order of its patched Horovod.

    All gradients are sent, and then all are received.
    """
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    start = time.perf_counter()
    for _ in range(STEPS_IN_GRACE):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[mine]), y[mine]).backward()
        sent = [
            (p, *communicator.send_step(p.grad.detach(), name))
            for name, p in model.named_parameters()
        ]
        for p, handles, ctx in sent:
            p.grad = communicator.receive_step(handles, ctx)
        optimizer.step()
    return result(model, (time.perf_counter() - start) / STEPS_IN_GRACE)


def from_grace():
    found = {}
    for name, (kind, arguments, lr) in COMPRESSORS.items():
        try:
            module = importlib.import_module(f"grace_dl.torch.compressor.{name}")
            compressor = FromGrace(getattr(module, kind)(*arguments))
        except (ImportError, TypeError) as error:
            found[name] = {"refused": str(error)}
            continue
        found[name] = {"expression": repr(compressor), **train(compressor, lr)}
        under = train(LBGM(compressor, delta=0.5), lr)
        for key in ("bytes", "ratio", "recycled", "accuracy", "same"):
            found[name][f"{key} under LBGM"] = under[key]
        found[name]["same"] = found[name]["same"] and under["same"]
    return found


def grace_compressor():
    found = {}
    for memory in (NoneMemory, ResidualMemory):
        for compressor, lr in (
            (Identity(), 0.1),
            (LBGM(), 0.1),
            (LBGM(TopK(0.1)), 0.1),
            (LBGM(Atomo(rank=2)), 0.1),
            (LBGM(SignSGD(scaled=True)), 0.05),
            (LookBackSubspace(8, values="int8"), 0.1),
        ):
            communicator = Allgather(GraceCompressor(compressor), memory(), world)
            name = f"Allgather({compressor!r}, {memory.__name__})"
            found[name] = train_in_grace(communicator, lr)
    # ResidualMemory would add the lost part a second time.
    communicator = Allgather(GraceCompressor(ErrorFeedback(TopK(0.1))), NoneMemory(), world)
    found["Allgather(ErrorFeedback(TopK(0.1)), NoneMemory)"] = train_in_grace(communicator, 0.1)
    communicator = Broadcast(GraceCompressor(Identity()), NoneMemory(), world)
    found["Broadcast(Identity())"] = train_in_grace(communicator, 0.1)
    return found


def refusals():
    found = {}
    for communicator in (
        Allreduce(GraceCompressor(LBGM()), NoneMemory()),
        Broadcast(GraceCompressor(LBGM()), NoneMemory(), world),
    ):
        try:
            communicator.send_step(torch.ones(10), "w")
        except TypeError as error:
            found[type(communicator).__name__] = str(error)
    try:
        FromGrace(DgcMemory(0.9, True))
    except TypeError as error:
        found["DgcMemory"] = str(error)
    return found


everything = {
    "from grace": from_grace(),
    "grace compressor": grace_compressor(),
    "refusals": refusals(),
}
if rank == 0:
    Path(sys.argv[1]).write_text(json.dumps(everything, indent=1))
