"""DistributedDataParallel on gloo."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common.baselines import Counter, register
from benchmarks.common.engines.base import Engine
from lbgm_compress.collective.transport import ProcessGroupTransport

__all__ = ["Ddp"]


class Ddp(Engine):
    """DistributedDataParallel on gloo, with the communication hook."""

    @classmethod
    def command(cls, workers: int) -> list[str]:
        run = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        return [*run, f"--nproc-per-node={workers}"]

    def __init__(self) -> None:
        import torch.distributed as dist

        dist.init_process_group("gloo")
        self.dist = dist
        self.transport = ProcessGroupTransport(dist.new_group())
        self.rank, self.size = self.transport.rank, self.transport.size

    def broadcast(self, value: Any) -> Any:
        values = [value]
        self.dist.broadcast_object_list(values)
        return values[0]

    def total(self, numbers: Tensor) -> Tensor:
        # Not by a collective, as it is the last thing that ranks do: see `ProcessGroupTransport`.
        rows = self.transport.gather_equal(numbers.view(torch.uint8))
        return rows.view(torch.int64).sum(0)

    def wrap(
        self, module: nn.Module, optimizer: torch.optim.Optimizer, compression: dict[str, Any]
    ) -> tuple[nn.Module, torch.optim.Optimizer, Counter]:
        from torch.nn.parallel import DistributedDataParallel

        # One bucket, and so one message a round.
        wrapped = DistributedDataParallel(module, bucket_cap_mb=1 << 20)
        return wrapped, optimizer, register(wrapped, **compression)
