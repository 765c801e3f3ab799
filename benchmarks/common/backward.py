"""Times of backward passes through `DistributedDataParallel` on two ranks of this machine."""

from __future__ import annotations

import datetime
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.common.baselines import Counter, register
from lbgm_compress.algorithm import Algorithm

__all__ = ["Backward", "Tensors", "backward_times"]

RANKS = 2
# So much noise lets LBGM() recycle about half of the tensors of four elements.
NOISE = 0.5
WARM_UP = 3


class Backward(NamedTuple):
    """What one method takes."""

    seconds: float
    """Of a backward pass, from its begin to the last averaged gradient (median)."""
    recycled_share: float
    """The share of tensors that were recycled."""


class Tensors(nn.Module):
    """`count` parameters of `size` elements, each used by itself; the input is their gradients."""

    def __init__(self, count: int, size: int) -> None:
        super().__init__()
        self.parts = nn.ParameterList(torch.zeros(size) for _ in range(count))

    def forward(self, gradients: Tensor) -> Tensor:
        parts = zip(self.parts, gradients, strict=True)
        return torch.stack([(part * gradient).sum() for part, gradient in parts]).sum()


def backward_times(
    methods: Sequence[Algorithm], count: int, size: int, repeats: int, seed: int
) -> list[Backward]:
    """Measure backward passes with each of `methods` in turns.

    Every rank is a process with one thread. The model has `count` parameters of `size` elements,
    whose gradients are a constant, the same on both ranks, and noise.
    """
    with tempfile.TemporaryDirectory() as folder:
        arguments = (folder, list(methods), count, size, repeats, seed)
        mp.start_processes(_rank, arguments, nprocs=RANKS, start_method="spawn")
        found: list[Backward] = torch.load(Path(folder) / "times.pt", weights_only=False)
    return found


def _rank(
    rank: int,
    folder: str,
    methods: Sequence[Algorithm],
    count: int,
    size: int,
    repeats: int,
    seed: int,
) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group(
        "gloo",
        init_method=(Path(folder) / "store").as_uri(),
        rank=rank,
        world_size=RANKS,
        timeout=datetime.timedelta(minutes=5),
    )
    models: list[tuple[DistributedDataParallel, Counter]] = []
    for method in methods:
        model = DistributedDataParallel(Tensors(count, size))
        models.append((model, register(model, method, model.named_parameters())))
    constant = torch.randn(count, size, generator=torch.Generator().manual_seed(seed))
    generator = torch.Generator().manual_seed(seed + 1 + rank)
    times: list[list[float]] = [[] for _ in methods]
    for step in range(WARM_UP + repeats):
        for (model, _), taken in zip(models, times, strict=True):
            noise = torch.randn(count, size, generator=generator)
            seconds = _time(model, constant + NOISE * noise)
            if step >= WARM_UP:
                taken.append(seconds)
    gathered: list[Any] = [None] * RANKS
    dist.all_gather_object(gathered, times)
    if rank == 0:
        found = []
        for taken, (_, sent_after) in zip(zip(*gathered, strict=True), models, strict=True):
            # A backward pass is over when it is over on all ranks.
            median = statistics.median(max(ranks) for ranks in zip(*taken, strict=True))
            found.append(Backward(median, sent_after(WARM_UP + repeats).recycled_share))
        torch.save(found, Path(folder) / "times.pt")
    dist.barrier()
    dist.destroy_process_group()


def _time(model: DistributedDataParallel, gradients: Tensor) -> float:
    model.zero_grad()
    loss: Tensor = model(gradients)
    dist.barrier()
    start: float = time.perf_counter()
    loss.backward()  # type: ignore[no-untyped-call]
    return time.perf_counter() - start
