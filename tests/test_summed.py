"""Contributions that add up over real processes, on gloo and on Horovod."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook as powersgd
from torch.nn.parallel import DistributedDataParallel

from lbgm_compress import ErrorFeedback, PowerSGD, SharedLBGM, SharedSubspace
from lbgm_compress.adapters.ddp import CompressionState, compress, compression_hook
from lbgm_compress.adapters.horovod import DistributedOptimizer
from lbgm_compress.collective import Averager, ProcessGroupTransport
from tests.horovod_ranks import jobs_end, needs_horovod, run_horovod  # noqa: F401
from tests.laws import assert_same_bits, saved_and_loaded
from tests.loops import check_loops
from tests.ranks import run_ranks
from tests.soak import length
from tests.test_loops import all_loops
from tests.training import Net, assert_replicas_agree, data, parameters

SMALL_BUCKETS = 0.004  # in MB: the model takes nine or more
ALGORITHMS = [
    ErrorFeedback(SharedSubspace(2, refresh_every=2)),
    ErrorFeedback(PowerSGD(2)),
    SharedLBGM(0.5),
    ErrorFeedback(SharedSubspace(2, refresh_every=2, values="int8")),
]
# In float64, in which engines differ by little.
EXACT = [
    ErrorFeedback(SharedSubspace(2, refresh_every=2, values="float32")),
    ErrorFeedback(PowerSGD(2, "float32")),
    SharedLBGM(0.5, "float32"),
]
# Ranks have gradients of very different sizes.
FACTORS = [1.0, 20.0, 1e-3]


def net(dtype=torch.float32):
    torch.manual_seed(0)
    return Net().to(dtype)


def with_hook(algorithm, by_hook, cap=SMALL_BUCKETS, dtype=torch.float32):
    """Return a model, its optimizer and what holds its state."""
    model = DistributedDataParallel(net(dtype), bucket_cap_mb=cap)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001, momentum=0.9)
    if not by_hook:
        return model, optimizer, compress(model, algorithm)
    state = CompressionState(algorithm, model.module.named_parameters())
    model.register_comm_hook(state, compression_hook)
    return model, optimizer, state


def with_horovod(algorithm, cap, dtype=torch.float32):
    model = net(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001, momentum=0.9)
    optimizer = DistributedOptimizer(
        optimizer, algorithm, model.named_parameters(), bucket_cap_mb=cap
    )
    return model, optimizer, optimizer.compression


def course(rank, model, optimizer, state, steps):
    """Train with all that may happen to ranks, and return the steps that were skipped."""
    skipped = []
    dtype = next(model.parameters()).dtype
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(steps):
            factor = FACTORS[rank % len(FACTORS)]
            if rank == 1 and step == steps // 4:
                factor = float("inf")
            if rank == 0 and step % 7 == 3:
                factor = 0.0
            if step == steps // 3:
                saved = saved_and_loaded(state.state_dict())
            if rank == 1 and step == steps // 2:
                # The other ranks learn of it in the next step.
                state.load_state_dict(saved)
            x, y = data(rank, step // 5 * 5, dtype)
            optimizer.zero_grad()
            (nn.functional.cross_entropy(model(x), y) * factor).backward()
            if hasattr(optimizer, "synchronize"):
                optimizer.synchronize()
            if not all(bool(p.grad.isfinite().all()) for p in model.parameters()):
                skipped.append(step)
                continue
            if hasattr(optimizer, "skip_synchronize"):
                with optimizer.skip_synchronize():
                    optimizer.step()
            else:
                optimizer.step()
    messages = [str(w.message) for w in caught if "do not hold the same" in str(w.message)]
    plain = getattr(model, "module", model)
    return parameters(plain), skipped, len(messages), state.stats()["ratio"]


def check_course(results, steps):
    """Check what `course` returned on all ranks."""
    assert_replicas_agree([result[0] for result in results])
    initial = parameters(net(next(iter(results[0][0].values())).dtype))
    for now, skipped, warned, ratio in results:
        assert skipped == [steps // 4]
        assert warned == 1
        assert ratio < 1.0
        for name, parameter in now.items():
            assert parameter.isfinite().all()
            assert not torch.equal(parameter, initial[name])


def on_gloo(rank, algorithms, steps, by_hook=(True, False, False, False), dtype=torch.float32):
    return [
        course(rank, *with_hook(algorithm, hook, dtype=dtype), steps)
        for algorithm, hook in zip(algorithms, by_hook, strict=True)
    ]


def check_gloo(world, steps):
    results = run_ranks(on_gloo, world, ALGORITHMS, steps, timeout=550)
    for i in range(len(ALGORITHMS)):
        check_course([result[i] for result in results], steps)


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("world", "steps"), [(2, 60), (3, 40), (8, 12)])
def test_replicas_are_bit_identical_with_many_buckets(world, steps):
    check_gloo(world, steps)


@pytest.mark.soak
@pytest.mark.timeout(600)
@pytest.mark.parametrize("world", [2, 3, 8])
def test_replicas_are_bit_identical_after_hundreds_of_steps(world):
    check_gloo(world, length(300, 60))


@pytest.mark.timeout(180)
@pytest.mark.parametrize("algorithm", EXACT[:2], ids=repr)
def test_loop_loses_and_doubles_nothing(algorithm):
    check_loops(run_ranks(all_loops, 2, algorithm, timeout=150), algorithm)


# --- PyTorch's own PowerSGD ----------------------------------------------------------------------


class SameStart(PowerSGD):
    """PowerSGD whose first Q is the same for all tensors of a width."""

    def initial_state(self, seed):
        return {"seed": 5}


def powersgd_hook_with_start(state, bucket):
    """Have the hook of PyTorch begin with the first Q of `SameStart`."""
    index = bucket.index()
    if state.iter == state.start_powerSGD_iter and index not in state.q_memory_dict:
        rights, size = {}, 0
        for grad in bucket.gradients():
            matrix = grad.view(len(grad), -1)
            n, m = matrix.shape
            rank = min(n, m, state.matrix_approximation_rank)
            if (n + m) * rank < n * m:
                numbers = torch.Generator().manual_seed(5)
                start = torch.randn(m, rank, generator=numbers, dtype=grad.dtype)
                # The hook takes tensors of one shape together.
                rights.setdefault(matrix.shape, []).append(start.view(-1))
                size += n * rank
        flat = torch.cat([right for of_shape in rights.values() for right in of_shape])
        state.q_memory_dict[index] = flat
        state.p_memory_dict[index] = torch.empty(size, dtype=flat.dtype)
    return powersgd.powerSGD_hook(state, bucket)


def both_powersgds(rank, power, steps):
    results = []
    for own in (True, False):
        # The hook of PyTorch hangs on gloo with two buckets.
        model = DistributedDataParallel(net(torch.float64), bucket_cap_mb=100)
        if own:
            state = compress(model, ErrorFeedback(SameStart(power, "float32")), start_step=2)
        else:
            theirs = powersgd.PowerSGDState(
                None,
                matrix_approximation_rank=power,
                start_powerSGD_iter=2,
                min_compression_rate=1,
            )
            model.register_comm_hook(theirs, powersgd_hook_with_start)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
        for step in range(steps):
            x, y = data(rank, step, torch.float64)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        results.append(parameters(model))
    return (*results, state.stats()["ratio"])


@pytest.mark.timeout(180)
@pytest.mark.parametrize(("world", "power"), [(2, 1), (3, 2)])
def test_powersgd_trains_as_with_the_hook_of_pytorch(world, power):
    results = run_ranks(both_powersgds, world, power, 100, timeout=160)
    assert_replicas_agree([ours for ours, _, _ in results])
    initial = parameters(net(torch.float64))
    for ours, theirs, ratio in results:
        assert ratio < 0.5
        for name, expected in theirs.items():
            way = (expected - initial[name.removeprefix("module.")]).norm()
            assert (ours[name] - expected).norm() < 1e-6 * way


# --- what the engines make of sums ---------------------------------------------------------------


def transport_of(engine):
    if engine == "gloo":
        return ProcessGroupTransport(dist.new_group(list(range(dist.get_world_size()))))
    import horovod.torch as hvd

    from lbgm_compress.adapters.horovod import HorovodTransport

    return HorovodTransport(hvd, hvd.global_process_set)


def unusual_tensors(rank, engine):
    """Average tensors of several dtypes, one of them without elements; then fail on one rank."""
    likes = {
        "w": torch.empty(30, 40),
        "half": torch.empty(20, 40, dtype=torch.bfloat16),
        "empty": torch.empty(0, 3, dtype=torch.float64),
    }
    found = []
    for algorithm in (ErrorFeedback(PowerSGD(2)), SharedSubspace(2, values="float32")):
        averager = Averager(algorithm, likes, transport_of(engine))
        for step in range(3):
            numbers = torch.Generator().manual_seed(10 * step + rank)
            grads = {
                name: torch.randn(like.shape, generator=numbers).to(like.dtype)
                for name, like in likes.items()
            }
            found.append(averager.average(grads))
    if rank == 1:
        grads["w"] = torch.zeros(7)
    try:
        averager.average(grads)
    except Exception as error:
        found.append(str(error))
    return found


def check_unusual_tensors(results):
    errors = [result.pop() for result in results]
    assert_same_bits(results, results[:1] * len(results))
    assert "the gradient 'w' has shape and dtype ((7,)" in errors.pop(1)
    assert errors == ["rank 1 failed before it could send: see the error there"] * len(errors)


def test_gloo_adds_up_tensors_of_all_kinds_and_tells_of_a_rank_that_fails():
    check_unusual_tensors(run_ranks(unusual_tensors, 3, "gloo"))


# --- Horovod -------------------------------------------------------------------------------------

horovod = [
    pytest.mark.horovod,
    # One process of the tests has the jobs, and starts them once.
    pytest.mark.xdist_group("horovod"),
    pytest.mark.timeout(600),
    pytest.mark.usefixtures("jobs_end"),
    needs_horovod,
]


def marked(function):
    for mark in horovod:
        function = mark(function)
    return function


def on_horovod(rank, algorithms, steps, cap):
    return [
        course(rank, *with_horovod(algorithm, cap, torch.float64), steps)
        for algorithm in algorithms
    ]


def check_horovod(world, steps, cap):
    results = run_horovod(on_horovod, world, EXACT, steps, cap, timeout=550)
    # With the same names, from which random starts are drawn.
    by_hook = [True] * len(EXACT)
    others = run_ranks(on_gloo, world, EXACT, steps, by_hook, torch.float64, timeout=550)
    for i in range(len(EXACT)):
        check_course([result[i] for result in results], steps)
        for name, expected in others[0][i][0].items():
            error = (results[0][i][0][name] - expected).norm() / expected.norm()
            assert error < 1e-6, f"{EXACT[i]!r}, {name}: {error}"


@marked
@pytest.mark.parametrize(("world", "steps", "cap"), [(2, 40, 0.02), (3, 24, 25)])
def test_replicas_of_horovod_are_bit_identical_and_equal_those_of_gloo(world, steps, cap):
    check_horovod(world, steps, cap)


@marked
@pytest.mark.soak
@pytest.mark.parametrize(("world", "cap"), [(2, 0.02), (3, 25)])
def test_replicas_of_horovod_are_bit_identical_after_hundreds_of_steps(world, cap):
    check_horovod(world, length(300, 60), cap)


@marked
def test_horovod_adds_up_tensors_of_all_kinds_and_tells_of_a_rank_that_fails():
    check_unusual_tensors(run_horovod(unusual_tensors, 3, "horovod"))
