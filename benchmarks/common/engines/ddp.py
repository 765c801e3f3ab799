"""DistributedDataParallel on gloo."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common.baselines import PowerSGD
from benchmarks.common.engines.base import Counts, Engine, counts_of
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
    ) -> tuple[nn.Module, torch.optim.Optimizer, Counts]:
        from torch.nn.parallel import DistributedDataParallel

        from lbgm_compress.adapters.ddp import CompressionState, compression_hook

        # One bucket, and so one message a round.
        wrapped = DistributedDataParallel(module, bucket_cap_mb=1 << 20)
        if isinstance(compression["compressor"], PowerSGD):
            return wrapped, optimizer, _power_sgd(wrapped, compression["compressor"])
        state = CompressionState(**compression)
        wrapped.register_comm_hook(state, compression_hook)
        return wrapped, optimizer, counts_of(state)


def _power_sgd(module: nn.Module, method: PowerSGD) -> Counts:
    """Register torch's hook."""
    from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook

    state = powerSGD_hook.PowerSGDState(
        None,
        matrix_approximation_rank=method.rank,
        start_powerSGD_iter=method.DENSE_ROUNDS,
    )
    module.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
    size = sum(parameter.numel() for parameter in module.parameters())

    def counts() -> tuple[int, int, int]:
        dense = min(state.iter, method.DENSE_ROUNDS) * size
        return 4 * (dense + state.total_numel_after_compression), 0, 1

    return counts
