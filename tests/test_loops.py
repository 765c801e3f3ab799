"""Training loops with DistributedDataParallel: nothing is lost, and nothing is doubled."""

from __future__ import annotations

import contextlib
import warnings

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from lbgm_compress import LBGM, LookBackSubspace
from lbgm_compress.adapters.ddp import compress
from tests.laws import assert_same_bits, saved_and_loaded
from tests.loops import COMPRESSORS, LOOPS, Given, Loop, check_loops
from tests.ranks import run_ranks

# Small, so that a step has several buckets.
BUCKETS = 0.0005


class DataParallel(Loop):
    def build(self):
        self.module = Given()
        self.model = DistributedDataParallel(
            self.module, bucket_cap_mb=BUCKETS, find_unused_parameters=self.unused
        )
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1.0)
        self.state = compress(self.model, self.compressor, **self.options)

    def accumulate(self, grads, last, scaler=None):
        with contextlib.nullcontext() if last else self.model.no_sync():
            self.loss(grads, scaler).backward()

    def step(self, scaler=None):
        self.optimizer.step() if scaler is None else scaler.step(self.optimizer)

    def share(self, value):
        values = [value]
        dist.broadcast_object_list(values)
        return values[0]


def all_loops(rank, compressor):
    def make(**options):
        return DataParallel(rank, compressor, **options)

    return {loop.__name__: loop(make) for loop in LOOPS}


@pytest.mark.timeout(180)
@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("compressor", COMPRESSORS, ids=repr)
def test_loop_loses_and_doubles_nothing(compressor, world):
    check_loops(run_ranks(all_loops, world, compressor, timeout=150), compressor)


# --- states that do not fit ----------------------------------------------------------------------


def resumed(rank, compressor, what):
    """Train, and go on in a new process in which some ranks load something else, or nothing."""
    loop = DataParallel(rank, compressor, unused=False)
    saved = []
    for step in range(8):
        if step in (2, 4):
            saved.append(saved_and_loaded(loop.state.state_dict()))
        grads = loop.gradients(step)
        loop.backward(grads)
        loop.apply(grads)
    last, own = saved_and_loaded(loop.state.state_dict()), loop.residuals()
    model = saved_and_loaded(loop.module.state_dict())
    everybody = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everybody, last)

    state = {
        "that of rank 0 on every rank": everybody[0],
        "one rank alone finds its own": last if rank == 1 else None,
        "one rank finds none": None if rank == 1 else last,
        "an older one on one rank": saved[0] if rank == 1 else last,
        "older ones of different steps": saved[rank % 2],
        "swapped": everybody[(rank + 1) % len(everybody)],
    }[what]
    loop.build()
    loop.module.load_state_dict(model)
    messages = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if state is not None:
            loop.state.load_state_dict(state)
        messages.append([str(w.message) for w in caught])
        before = loop.residuals()
        for step in range(8, 14):
            grads = loop.gradients(step)
            loop.backward(grads)
            loop.apply(grads)
        messages.append([str(w.message) for w in caught][len(messages[0]) :])
    applied, _, kept = loop.result()
    return applied, kept, before, loop.state.sender.seed, messages, own


STATES = [
    "that of rank 0 on every rank",
    "one rank alone finds its own",
    "one rank finds none",
    "an older one on one rank",
    "older ones of different steps",
    "swapped",
]


def all_states(rank, compressor):
    return {what: resumed(rank, compressor, what) for what in STATES}


@pytest.mark.timeout(180)
@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize(
    "compressor", [*COMPRESSORS, LBGM(delta=0.9), LookBackSubspace(2, 0.95)], ids=repr
)
def test_any_states_are_loaded_and_all_ranks_go_on_alike(compressor, world):
    results = run_ranks(all_states, world, compressor, timeout=150)
    for what in STATES:
        of_rank = [result[what] for result in results]
        for rank, (applied, _, before, seed, (at_load, later), last) in enumerate(of_rank):
            assert_same_bits(applied, of_rank[0][0], f"{what}: the replicas are equal")
            assert seed == rank
            foreign = what == "swapped" or (what == STATES[0] and rank != 0)
            assert len(at_load) == foreign, f"{what}: {at_load}"
            if foreign:
                assert "its residual and its seed are not taken" in at_load[0]
                assert before == {}
            elif what == STATES[0]:
                assert_same_bits(before, last)
            # One warning, on every rank, if something that is looked back at does not match.
            assert len(later) <= 1, f"{what}: {later}"
            if compressor.receiver_has_state and what in STATES[:3]:
                assert "do not hold the same look-back gradients" in later[0]
