"""A rank of `benchmarks/gpu.py`: times of steps whose gradients are given, by method."""

from __future__ import annotations

import contextlib
import gc
import os
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.common.baselines import register
from benchmarks.common.command_line import read_methods

__all__ = ["Measured", "Shapes", "rank_main"]

Shapes = dict[str, tuple[int, ...]]
WARM_UP = 4


class Measured(NamedTuple):
    """What one method takes."""

    device: str
    backend: str
    ranks: int
    model: str
    method: str
    step_ms: float
    """Median time of a backward pass whose gradients are given: compression and exchange."""
    slowest_ms: float
    """The longest step after the first ones, such as one that replaces directions."""
    peak_mb: float
    """Memory of the device beyond parameters and gradients, at its peak (10^6 bytes)."""
    message_bytes: int
    """What a rank sent in one step."""
    error: str
    """The error of a method that failed, or nothing."""


class Give(torch.autograd.Function):
    """A loss of 0 whose gradients are given."""

    @staticmethod
    def forward(ctx: Any, gradients: Sequence[Tensor], *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        return parameters[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, *unused: Tensor) -> Any:
        return None, *(gradient.clone() for gradient in ctx.gradients)


class Given(nn.Module):
    """Parameters of given shapes; the input is their gradients."""

    def __init__(self, shapes: Shapes, device: torch.device) -> None:
        super().__init__()
        self.parts = nn.ParameterList(torch.zeros(s, device=device) for s in shapes.values())

    def forward(self, gradients: Sequence[Tensor]) -> Tensor:
        loss: Tensor = Give.apply(gradients, *self.parts)
        return loss


def rank_main(
    rank: int, ranks: int, backend: str, device: str, model: str, shapes: Shapes, methods: str,
    steps: int, seconds: float, folder: str,
) -> None:  # fmt: skip
    """Measure methods one after the other, and keep each result of rank 0 in a file at once.

    `model` is the name of what has `shapes`. No method begins after `seconds`.
    """
    end = time.monotonic() + seconds
    where = torch.device(device)
    if where.type == "cuda":
        torch.cuda.set_device(0)
    else:
        torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group(
        backend, init_method=(Path(folder) / "store").as_uri(), rank=rank, world_size=ranks
    )
    generator = torch.Generator(where).manual_seed(rank)
    gradients = [torch.randn(s, generator=generator, device=where) for s in shapes.values()]
    for number, method in enumerate(read_methods(methods, ())):
        # All ranks come to the same conclusion.
        late = torch.tensor([float(time.monotonic() > end)], device=where)
        dist.all_reduce(late)
        if late.item():
            break
        found = (0.0, 0.0, 0.0, 0)
        error = ""
        try:
            found = _measure(shapes, gradients, method, steps, backend, where)
        except Exception as failure:
            error = f"{type(failure).__name__}: {failure}".splitlines()[0]
        name = torch.cuda.get_device_name(0) if where.type == "cuda" else "CPU"
        if rank == 0:
            row = Measured(name, backend, ranks, model, repr(method), *found, error)
            torch.save(row._asdict(), Path(folder) / f"{number:03}.pt")
    with contextlib.suppress(Exception):
        dist.destroy_process_group()


def _measure(
    shapes: Shapes,
    gradients: Sequence[Tensor],
    method: Any,
    steps: int,
    backend: str,
    device: torch.device,
) -> tuple[float, float, float, int]:
    """Return the median and longest time of a step, the peak memory, and the bytes of a step."""
    cuda = device.type == "cuda"
    gc.collect()
    # torch's PowerSGD hook hangs on gloo with more than one bucket.
    cap = {} if backend == "nccl" else {"bucket_cap_mb": 10_000}
    model = DistributedDataParallel(Given(shapes, device), **cap)
    sent_after = register(model, method, model.named_parameters())
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if cuda else 0
    times = []
    for _ in range(WARM_UP + steps):
        model.zero_grad(set_to_none=False)
        loss = model(gradients)
        if cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        loss.backward()
        if cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
        for parameter in model.parameters():
            # A change in place tells compression that the step was applied.
            parameter.data.add_(0.0)
    peak = (torch.cuda.max_memory_allocated() - before) / 1e6 if cuda else 0.0
    sent = sent_after(WARM_UP + steps).bytes // (WARM_UP + steps)
    taken = times[WARM_UP:]
    return 1e3 * statistics.median(taken), 1e3 * max(taken), peak, sent
