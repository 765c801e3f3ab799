"""Training loops with Horovod: nothing is lost, and nothing is doubled."""

from __future__ import annotations

import pytest
import torch

from lbgm_compress.adapters.horovod import DistributedOptimizer
from tests.horovod_ranks import jobs_end, needs_horovod, run_horovod  # noqa: F401
from tests.loops import COMPRESSORS, LOOPS, Given, Loop, check_loops

pytestmark = [
    pytest.mark.horovod,
    pytest.mark.xdist_group("horovod"),
    pytest.mark.timeout(200),
    pytest.mark.usefixtures("jobs_end"),
    needs_horovod,
]
# Small, so that a step has several buckets.
BUCKETS = 0.0005


class Horovod(Loop):
    def build(self):
        self.module = self.model = Given()
        self.optimizer = DistributedOptimizer(
            torch.optim.SGD(self.module.parameters(), lr=1.0),
            self.compressor,
            self.module.named_parameters(),
            backward_passes_per_step=self.passes,
            bucket_cap_mb=BUCKETS,
            **self.options,
        )
        self.state = self.optimizer.compression

    def accumulate(self, grads, last, scaler=None):
        self.loss(grads, scaler).backward()
        if last:
            self.optimizer.synchronize()

    def step(self, scaler=None):
        with self.optimizer.skip_synchronize():
            self.optimizer.step() if scaler is None else scaler.step(self.optimizer)

    def share(self, value):
        import horovod.torch as hvd

        return hvd.broadcast_object(value, root_rank=0, name="shared")


def all_loops(rank, compressor):
    def make(**options):
        return Horovod(rank, compressor, **options)

    return {loop.__name__: loop(make) for loop in LOOPS}


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("compressor", COMPRESSORS, ids=repr)
def test_loop_loses_and_doubles_nothing(compressor, world):
    check_loops(run_horovod(all_loops, world, compressor), compressor)
