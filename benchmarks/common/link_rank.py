"""A rank of `benchmarks/link.py`: ``python -m benchmarks.common.link_rank TASK``, TASK in JSON."""

from __future__ import annotations

import itertools
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.common.baselines import Dense, NoExchange, register
from benchmarks.common.command_line import read_methods
from benchmarks.common.data import Dataset, load
from benchmarks.common.models import build
from lbgm_compress.algorithm import Algorithm
from lbgm_compress.collective.transport import ProcessGroupTransport

PROBE_BYTES = 4_000_000
# The target is the accuracy of dense training at its end, less this.
MARGIN = 0.005
# A method that does not reach the target goes on for so many times as many steps.
PATIENCE = 3


def sent_bytes() -> int:
    """Return the bytes that this rank's interface has sent."""
    return int(Path("/sys/class/net/eth0/statistics/tx_bytes").read_text())


def report(**values: Any) -> None:
    """Print values for the process that started the ranks."""
    if dist.get_rank() == 0:
        print(json.dumps(values), flush=True)


def mean_over_ranks(number: float) -> float:
    """Return the mean of a number over the ranks."""
    tensor = torch.tensor([number], dtype=torch.float64)
    dist.all_reduce(tensor)
    return tensor.item() / dist.get_world_size()


def train(dataset: Dataset, task: dict[str, Any], method: Algorithm, target: float | None) -> float:
    """Train with one method, and report after every ``task["report_every"]`` steps.

    Training ends after ``task["steps"]`` steps, or, if it is evaluated, when the accuracy has come
    to `target`, and after three times as many steps at the latest. Returns the last accuracy.
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()
    model = DistributedDataParallel(
        build("cnn", (1, 28, 28), dataset.classes, task["seed"]), bucket_cap_mb=1000
    )
    sent_after = register(model, method, model.named_parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=task["lr"], momentum=0.9)
    batches = batches_of(dataset, task)
    seconds, messages_before = 0.0, 0
    best = reached = math.nan
    last, most = 0, task["steps"] * (PATIENCE if target is not None else 1)
    while last < task["steps"] or (last < most and not best >= (target or 0.0)):
        first, last = last, min(last + task["report_every"], most)
        dist.barrier()
        start, interface = time.perf_counter(), sent_bytes()
        for batch in itertools.islice(batches, last - first):
            mine = batch[rank::ranks]
            optimizer.zero_grad()
            logits = model(dataset.train_images[mine])
            nn.functional.cross_entropy(logits, dataset.train_labels[mine]).backward()
            optimizer.step()
        dist.barrier()
        took = time.perf_counter() - start
        interface = sent_bytes() - interface
        seconds += took
        sent = sent_after(last)
        interface_mean = mean_over_ranks(interface / (last - first))
        message_mean = mean_over_ranks((sent.bytes - messages_before) / (last - first))
        messages_before = sent.bytes
        if task["evaluate"] and not isinstance(method, NoExchange):
            # Every rank evaluates a part of the test images, while the clock stands.
            reached = mean_over_ranks(accuracy(model.module, dataset, rank, ranks))
            best = reached if math.isnan(best) else max(best, reached)
        report(
            method=repr(method),
            steps=last,
            seconds=seconds,
            step_ms=1e3 * took / (last - first),
            interface_bytes=interface_mean,
            message_bytes=message_mean,
            recycled_share=mean_over_ranks(sent.recycled_share),
            accuracy=reached,
        )
    return reached


def batches_of(dataset: Dataset, task: dict[str, Any]) -> Iterator[Tensor]:
    """Yield the indices of the images of each step, of all ranks together."""
    generator = torch.Generator().manual_seed(task["seed"])
    count = min(task["images"], len(dataset.train_labels))
    while True:
        order = torch.randperm(count, generator=generator)
        yield from order[: count - count % task["batch"]].split(task["batch"])


@torch.no_grad()
def accuracy(model: nn.Module, dataset: Dataset, rank: int, ranks: int) -> float:
    """Return this rank's part of the test accuracy, times the number of ranks."""
    images, labels = dataset.test_images[rank::ranks], dataset.test_labels[rank::ranks]
    right = sum(
        int((model(part).argmax(1) == truth).sum())
        for part, truth in zip(images.split(1000), labels.split(1000), strict=True)
    )
    return right * ranks / len(dataset.test_labels)


def probe(mbit: float) -> None:
    """Report the times of the exchange alone: of 4 MB from one rank, and of heads from all."""
    ranks = dist.get_world_size()
    group = dist.new_group(list(range(ranks)))
    transport = ProcessGroupTransport(group)
    sizes = [PROBE_BYTES if other == 1 else 0 for other in range(ranks)]
    parts = [torch.zeros(size, dtype=torch.uint8) for size in sizes]
    eight, head = torch.zeros(8, dtype=torch.uint8), torch.zeros(16 + 8 * 5, dtype=torch.uint8)
    rows = [torch.empty_like(eight) for _ in range(ranks)]
    steps: dict[str, tuple[int, Callable[[], object]]] = {
        "body_ms": (5, lambda: transport.gather_unequal(parts)),
        "head_ms": (200, lambda: transport.gather_equal(head)),
        "eight_bytes_ms": (200, lambda: dist.all_gather(rows, eight, group=group)),
    }
    found = {}
    for name, (repeats, step) in steps.items():
        step()
        times = []
        for _ in range(repeats):
            dist.barrier()
            start = time.perf_counter()
            step()
            times.append(1e3 * (time.perf_counter() - start))
        # The exchange ends when the last rank has received everything.
        everyone: list[Any] = [None] * ranks
        dist.all_gather_object(everyone, times)
        found[name] = statistics.median(max(taken) for taken in zip(*everyone, strict=True))
    # The time of one hop at the rate of the link.
    found["link_ms"] = PROBE_BYTES * 8 / (mbit * 1e6) * 1e3
    report(probe=found)


def main(task: dict[str, Any]) -> None:
    """Do the task of one rank."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    if task["probe"]:
        probe(task["mbit"])
    if task["methods"]:
        dataset = load("fashion-mnist", task["data_dir"], task["seed"])
        target = None
        for method in read_methods(", ".join(task["methods"]), task["known"]):
            wanted = None if isinstance(method, NoExchange) else target
            reached = train(dataset, task, method, wanted if task["evaluate"] else None)
            if isinstance(method, Dense) and task["evaluate"]:
                target = reached - MARGIN
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
