"""A worker of `benchmarks/local_training.py`: a real process, which exchanges over gloo."""

from __future__ import annotations

import contextlib
import copy
import datetime
import math
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks.common.demo import DeMo
from benchmarks.common.language import Text, initial_model, loss_of, read_text
from benchmarks.common.local_methods import Method
from benchmarks.common.power_sgd import average_by_power_sgd
from lbgm_compress.adapters.diloco import DiLoCo

__all__ = ["Evaluation", "Setting", "perform"]

INNER_LR = 1.5e-3
MUON_LR = 0.01
DEMO_LR = 1e-3
BATCH = 8
# A server that has imported what workers need forks them.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["benchmarks.common.local_worker", "torch._dynamo"])
TIMEOUT = datetime.timedelta(minutes=10)


@dataclass(frozen=True)
class Setting:
    """What all methods of a comparison have in common."""

    text_dir: str
    workers: int
    partition: str
    """"iid" or "plays"."""
    rounds: int
    sync_every: int
    seed: int
    width: int = 128
    blocks: int = 3
    device: str = "cpu"
    seconds: float = math.inf
    """Training ends with the round that is under way after so long."""


class Evaluation(NamedTuple):
    """What was measured after a round, or at the end."""

    round: int
    loss: float
    """Test loss of the common model, in nats a character; at the end, of the final model."""
    mean_loss: float
    """That of the mean of the workers' own models."""
    message_bytes: int
    """What one worker has sent so far, the mean of all workers."""
    dense_bytes: int
    """What it would have sent in float32, an exchange a round."""


def perform(setting: Setting, method: Method) -> list[Evaluation]:
    """Train with one method in processes of this machine, and return the evaluations.

    Raises
    ------
    RuntimeError
        If a worker fails.
    """
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        reader, writer = CONTEXT.Pipe(duplex=False)
        processes = [
            CONTEXT.Process(target=_main, args=(rank, folder, setting, method, writer), daemon=True)
            for rank in range(setting.workers)
        ]
        for process in processes:
            process.start()
            stack.callback(process.join)
            stack.callback(process.kill)
        writer.close()
        try:
            found: list[Evaluation] = reader.recv()
        except EOFError:
            raise RuntimeError("a worker failed: see above") from None
        for process in processes:
            process.join()
        return found


def _main(rank: int, folder: str, setting: Setting, method: Method, results: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=(Path(folder) / "store").as_uri(),
        rank=rank,
        world_size=setting.workers,
        timeout=TIMEOUT,
    )
    if setting.device == "cuda":
        # All workers share one card, and exchange through the memory of the host.
        torch.cuda.set_device(0)
    text = read_text(setting.text_dir, setting.workers, setting.partition, setting.seed)
    found = list(Worker(rank, setting, method, text).train())
    if rank == 0:
        results.send(found)
    dist.barrier()
    dist.destroy_process_group()


class Worker:
    """One worker, and what it measures together with the others."""

    def __init__(self, rank: int, setting: Setting, method: Method, text: Text) -> None:
        self.rank, self.setting, self.method, self.text = rank, setting, method, text
        self.device = torch.device(setting.device)
        self.model = initial_model(text, setting.width, setting.blocks, setting.seed).to(
            self.device
        )
        self.size = sum(p.numel() for p in self.model.parameters())
        self.generator = torch.Generator().manual_seed(1_000_003 * setting.seed + rank)
        self.optimizers = self._optimizers()
        self.begin = time.monotonic()

    def _optimizers(self) -> list[torch.optim.Optimizer]:
        """Return the inner optimizers; the last is stepped last."""
        matrices = [
            p for name, p in self.model.named_parameters() if p.ndim == 2 and "blocks" in name
        ]
        fused = self.device.type in ("cpu", "cuda")
        if self.method.every_step == "demo":
            return [DeMo(self.model.parameters(), lr=DEMO_LR)]
        if self.method.inner == "adamw":
            return [torch.optim.AdamW(self.model.parameters(), lr=INNER_LR, fused=fused)]
        chosen = {id(p) for p in matrices}
        others = [p for p in self.model.parameters() if id(p) not in chosen]
        return [
            torch.optim.AdamW(others, lr=INNER_LR, fused=fused),
            torch.optim.Muon(matrices, lr=MUON_LR),
        ]

    def train(self) -> Iterator[Evaluation]:
        """Train, and yield the evaluations, which are the same on all ranks."""
        run = self._every_step if self.method.every_step else self._rounds
        if self.method.power_rank:
            run = self._power_sgd
        yield from run()

    def _step(self, between: Callable[[], None] = lambda: None) -> None:
        """Take an inner step; `between` is called when the gradients are there."""
        mine = self.text.parts[self.rank]
        rows = torch.randint(len(mine), (BATCH,), generator=self.generator)
        batch = mine[rows].to(self.device)
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        loss_of(self.model, batch).backward()  # type: ignore[no-untyped-call]
        between()
        for optimizer in self.optimizers:
            optimizer.step()

    def _rounds(self) -> Iterator[Evaluation]:
        """Train by the package's DiLoCo."""
        setting, method = self.setting, self.method
        outer = torch.optim.SGD(
            self.model.parameters(),
            lr=method.outer_lr,
            momentum=method.outer_momentum,
            nesterov=method.outer_momentum > 0,
        )
        steps = setting.rounds * setting.sync_every
        number = 0
        diloco = DiLoCo(
            self.model,
            self.optimizers[-1],
            method.compressor,  # type: ignore[arg-type]
            sync_every=steps + 1 if method.alone else setting.sync_every,
            outer_optimizer=outer,
            residual=method.residual,
            final=method.final,
        )
        for number in self._numbers():
            for _ in range(setting.sync_every):
                self._step()
            if self._evaluated(number):
                mean = self._mean_loss()
                with diloco.common_model():
                    common = self._loss(self.model)
                yield self._evaluation(number, common, mean, diloco.stats()["message_bytes"])
        diloco.finish()
        diloco.close()
        loss = self._loss(self.model)
        if method.residual == "memory":
            # The common model is the result: nothing is left to exchange.
            yield self._evaluation(number, loss, loss, self._sent_before)
        else:
            yield self._evaluation(number, loss, loss, diloco.stats()["message_bytes"])

    def _power_sgd(self) -> Iterator[Evaluation]:
        """Train by DiLoCo with PowerSGD and error feedback."""
        method, setting = self.method, self.setting
        parameters = list(self.model.parameters())
        common = [p.detach().clone() for p in parameters]
        outer = torch.optim.SGD(
            parameters, lr=method.outer_lr, momentum=method.outer_momentum, nesterov=True
        )
        state: dict[Any, Tensor] = {}
        sent = 0
        for number in self._numbers():
            for _ in range(setting.sync_every):
                self._step()
            with torch.no_grad():
                differences = [w - p for w, p in zip(common, parameters, strict=True)]
                averages, size = average_by_power_sgd(differences, method.power_rank, state)
                sent += size
                for p, w, average in zip(parameters, common, averages, strict=True):
                    p.copy_(w)
                    p.grad = average
                outer.step()
                common = [p.detach().clone() for p in parameters]
            if self._evaluated(number):
                loss = self._loss(self.model)
                yield self._evaluation(number, loss, loss, sent)
        yield self._evaluation(number, loss, loss, sent)

    def _every_step(self) -> Iterator[Evaluation]:
        """Train with gradients that are averaged in every step."""
        setting = self.setting
        demo = self.optimizers[0] if isinstance(self.optimizers[0], DeMo) else None

        def average() -> None:
            for p in self.model.parameters():
                dist.all_reduce(p.grad)
                assert p.grad is not None
                p.grad /= setting.workers

        for number in self._numbers():
            for _ in range(setting.sync_every):
                self._step() if demo else self._step(average)
            if self._evaluated(number):
                loss = self._loss(self.model)
                dense = 4 * self.size * number * setting.sync_every
                yield self._evaluation(number, loss, loss, demo.sent if demo else dense)
        yield self._evaluation(number, loss, loss, demo.sent if demo else dense)

    def _numbers(self) -> Iterator[int]:
        """Yield the numbers of rounds, until the time is over on one rank."""
        command = multiprocessing.parent_process()
        for number in range(1, self.setting.rounds + 1):
            yield number
            if command is not None and not command.is_alive():
                raise SystemExit("the command was ended")
            if math.isfinite(self.setting.seconds):
                over = torch.tensor([time.monotonic() - self.begin > self.setting.seconds])
                dist.all_reduce(over, op=dist.ReduceOp.MAX)
                if over:
                    return

    # --- measuring ----------------------------------------------------------------------------

    def _evaluated(self, number: int) -> bool:
        return number % max(1, self.setting.rounds // 10) == 0 or number == self.setting.rounds

    def _evaluation(self, number: int, loss: float, mean: float, sent: int) -> Evaluation:
        total = torch.tensor([sent])
        dist.all_reduce(total)
        self._sent_before = sent
        dense = 4 * self.size * number
        return Evaluation(
            number, round(loss, 5), round(mean, 5), int(total) // self.setting.workers, dense
        )

    def _mean_loss(self) -> float:
        """Return the loss of the mean of the workers' models, whose exchange is not counted."""
        model = copy.deepcopy(self.model)
        with torch.no_grad():
            for p in model.parameters():
                host = p.detach().cpu()
                dist.all_reduce(host)
                p.copy_(host / self.setting.workers)
        return self._loss(model)

    @torch.no_grad()
    def _loss(self, model: nn.Module) -> float:
        """Return the loss on the test sequences, of which each rank takes its share."""
        mine = self.text.test[self.rank :: self.setting.workers].to(self.device)
        sums = torch.zeros(2, dtype=torch.float64)
        for batch in mine.split(64):
            sums += torch.tensor([loss_of(model, batch).item() * len(batch), len(batch)])
        dist.all_reduce(sums)
        return float(sums[0] / sums[1])
