"""Local training: DiLoCo on real ranks of gloo, and long runs of ranks in threads."""

from __future__ import annotations

import copy
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lbgm_compress import LBGM, ErrorFeedback, Identity, LookBackSubspace, SignSGD, TopK
from lbgm_compress.adapters.diloco import DiLoCo
from lbgm_compress.collective import ProcessGroupTransport
from lbgm_compress.collective.local import LocalTraining
from lbgm_compress.collective.local.options import divided
from tests.compressors import COMPRESSORS
from tests.invariant import check_invariant, keeps_invariant, residuals
from tests.laws import assert_same_bits, saved_and_loaded
from tests.loops import SHAPES, Given
from tests.rank_threads import Ranks
from tests.ranks import Failed, run_ranks
from tests.training import Net, assert_replicas_agree, data, parameters

ROOT = Path(__file__).parent.parent
EVERY = 6
RESIDUALS = ["model", "memory"]


def loss_of(model, rank, step):
    x, y = data(rank, step)
    return nn.functional.cross_entropy(model(x), y)


def inner_step(model, optimizer, rank, step):
    optimizer.zero_grad()
    loss_of(model, rank, step).backward()
    optimizer.step()


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-3)


def nesterov(model):
    return torch.optim.SGD(model.parameters(), lr=0.7, momentum=0.9, nesterov=True)


# --- against DiLoCo in plain torch ----------------------------------------------------------------


def transcription(workers, steps, fragments=1, delay=0, batches=1):
    """DiLoCo (arXiv 2311.08105, algorithm 1), with the schedule of Streaming DiLoCo (2501.18512).

    All workers are in this process. The average of a fragment is applied `delay` steps after it was
    taken, and a worker keeps the steps that it has made since. With `batches`, a worker takes the
    batches of as many ranks in each step.
    """
    torch.manual_seed(0)
    common = Net()
    models = [copy.deepcopy(common) for _ in range(workers)]
    inner = [adamw(model) for model in models]
    outer = nesterov(common)
    parts = divided(dict(common.named_parameters()), fragments)
    under_way = None

    def apply(averages, then):
        outer.zero_grad()
        for name, mean in averages.items():
            common.get_parameter(name).grad = mean
        outer.step()
        for model, of in zip(models, then, strict=True):
            for name, before in of.items():
                p = model.get_parameter(name).data
                p.copy_(common.get_parameter(name).data + (p - before))

    for step in range(1, steps + 1):
        for worker, (model, optimizer) in enumerate(zip(models, inner, strict=True)):
            optimizer.zero_grad()
            for batch in range(batches):
                (loss_of(model, worker * batches + batch, step) / batches).backward()
            optimizer.step()
        for part, names in enumerate(parts):
            if step % EVERY == (part + 1) * EVERY // fragments % EVERY:
                then = [{name: parameters(model)[name] for name in names} for model in models]
                old = parameters(common)
                means = {n: sum(old[n] - of[n] for of in then) / workers for n in names}
                under_way = (step + delay, means, then)
        if under_way is not None and under_way[0] == step:
            apply(*under_way[1:])
            under_way = None
    last = parameters(common)
    if under_way is not None:
        apply(*under_way[1:])
    return last, {n: sum(parameters(m)[n] for m in models) / workers for n in last}


CASES = [
    {"residual": "model"},
    {"residual": "memory"},
    {"fragments": 3},
    {"delay": 2},
    {"fragments": 3, "delay": 1, "residual": "memory"},
]


def train_cases(rank, cases):
    results = []
    for options in cases:
        torch.manual_seed(rank)
        if rank == 0:
            torch.manual_seed(0)
        model = Net()
        optimizer = adamw(model)
        with DiLoCo(model, optimizer, Identity(), EVERY, **options) as diloco:
            for step in range(1, 10 * EVERY + 1):
                inner_step(model, optimizer, rank, step)
            with diloco.common_model() as same:
                assert same is model
                common = parameters(model)
        results.append((common, parameters(model)))
    return results


@pytest.mark.timeout(120)
@pytest.mark.parametrize("world", [2, 3])
def test_without_loss_it_is_diloco(world):
    results = run_ranks(train_cases, world, CASES, timeout=100)
    assert_replicas_agree(results)
    for options, (common, final) in zip(CASES, results[0], strict=True):
        schedule = {key: value for key, value in options.items() if key != "residual"}
        expected, mean = transcription(world, 10 * EVERY, **schedule)
        for name in expected:
            for found, right in ((common, expected), (final, mean)):
                close = torch.allclose(found[name], right[name], rtol=1e-4, atol=1e-6)
                assert close, (options, name, (found[name] - right[name]).abs().max())
