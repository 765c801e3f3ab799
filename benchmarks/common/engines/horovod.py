"""Horovod on gloo."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common.baselines import Counter, counter_of
from benchmarks.common.engines.base import Engine

__all__ = ["Horovod"]


class Horovod(Engine):
    """Horovod on gloo, with the distributed optimizer."""

    @classmethod
    def command(cls, workers: int) -> list[str]:
        launcher = str(Path(sys.executable).with_name("horovodrun"))
        options = ["-np", str(workers), "--gloo", "--network-interfaces", "lo"]
        return [launcher, *options, sys.executable]

    def __init__(self) -> None:
        import horovod.torch as hvd

        hvd.init()
        self.hvd = hvd
        self.rank, self.size = hvd.rank(), hvd.size()

    def broadcast(self, value: Any) -> Any:
        # The default name is that of the value's type, which differs between ranks.
        return self.hvd.broadcast_object(value, root_rank=0, name="value")

    def total(self, numbers: Tensor) -> Tensor:
        return self.hvd.allreduce(numbers, op=self.hvd.Sum, name="total")

    def wrap(
        self, module: nn.Module, optimizer: torch.optim.Optimizer, compression: dict[str, Any]
    ) -> tuple[nn.Module, torch.optim.Optimizer, Counter]:
        from lbgm_compress.adapters.horovod import DistributedOptimizer

        distributed = DistributedOptimizer(optimizer, **compression, bucket_cap_mb=1 << 20)
        return module, distributed, counter_of(distributed.compression)
