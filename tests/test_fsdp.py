"""Compression between the replicas of sharded models, on two replicas of two shards each."""

from __future__ import annotations

import copy
import gc
import subprocess
import sys
import weakref

import pytest
import torch
import torch.distributed as dist
import torch.distributed.fsdp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

if not hasattr(torch.distributed.fsdp, "fully_shard"):
    pytest.skip("torch has fully_shard from 2.6 on", allow_module_level=True)

from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

from lbgm_compress import (
    LBGM,
    ErrorFeedback,
    Identity,
    LookBackSubspace,
    SharedLBGM,
    SharedSubspace,
    TopK,
)
from lbgm_compress.adapters.fsdp import compress
from tests.invariant import check_invariant, residuals
from tests.laws import assert_same_bits, saved_and_loaded
from tests.ranks import run_ranks

WORLD = 4
FEEDBACK = [ErrorFeedback(SharedSubspace(4)), ErrorFeedback(LookBackSubspace(4))]
LOSSY = [*FEEDBACK, LBGM(TopK(0.1)), SharedLBGM()]


class Net(nn.Module):
    """Three layers, the last with one output: the second shard of its parameters is empty."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(12, 16)
        self.branch = nn.Linear(16, 16)
        self.out = nn.Linear(16, 1)

    def forward(self, x, branch=True):
        x = torch.relu(self.first(x))
        return self.out(self.branch(x) if branch else x)


def mesh_of_ranks():
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))


def sharded(mesh, seed=0, **options):
    torch.manual_seed(seed)
    model = Net()
    for layer in (model.first, model.branch, model):
        fully_shard(layer, mesh=mesh, **options)
    return model


def prepared(compressor, seed=0, **options):
    """Return a sharded model, its state and an optimizer."""
    mesh = mesh_of_ranks()
    model = sharded(mesh["shard"], seed)
    state = compress(model, compressor, mesh["replicate"], **options)
    return model, state, torch.optim.AdamW(model.parameters(), lr=0.01)


def local(tensor):
    with torch.no_grad():
        return tensor.to_local()


def shards(model):
    return {name: local(p).detach().clone() for name, p in model.named_parameters()}


def gradients(model):
    return {name: local(p.grad).clone() for name, p in model.named_parameters()}


def whole(model):
    return {name: p.detach().full_tensor().clone() for name, p in model.named_parameters()}


def loss_of(model, rank, step, **options):
    generator = torch.Generator().manual_seed(100 * step + rank)
    x = torch.randn(8, 12, generator=generator)
    return (model(x, **options) - x[:, :1].sin()).square().mean()


def train_step(model, state, optimizer, rank, step, **options):
    optimizer.zero_grad()
    loss_of(model, rank, step, **options).backward()
    state.average_gradients()
    optimizer.step()


def assert_replicas_agree(results):
    """Check that ranks with the same shard, 0 and 2 as well as 1 and 3, have the same bits."""
    for shard in (0, 1):
        assert_same_bits(results[shard + 2], results[shard])


def assert_nothing_is_lost(applied, true, kept):
    """Check the invariant of one shard, of the parameters of which it has a part."""
    filled = {name: tensor for name, tensor in applied.items() if tensor.numel()}
    assert set(applied) - set(filled) <= {"out.weight", "out.bias"}
    # Sums in float16 are rounded once more where they are added up.
    check_invariant(filled, true, kept, tolerance=2e-4)


# --- against native HSDP --------------------------------------------------------------------------


def train_beside_native(rank, reduce_once):
    mesh = mesh_of_ranks()
    native = sharded(mesh)
    model = sharded(mesh["shard"])
    state = compress(model, Identity(), mesh["replicate"])
    found = []
    for one in (native, model):
        optimizer = torch.optim.AdamW(one.parameters(), lr=0.01)
        norms = []
        for step in range(8):
            optimizer.zero_grad()
            for batch in range(3):
                one.set_requires_gradient_sync(batch == 2 or not reduce_once)
                loss_of(one, rank, 3 * step + batch).backward()
            if one is model:
                state.average_gradients()
            norm = nn.utils.clip_grad_norm_(one.parameters(), 0.5)
            norms.append(norm.full_tensor())
            optimizer.step()
        found.append((norms, whole(one)))
    return found


@pytest.mark.parametrize("reduce_once", [False, True], ids=["reduced each time", "reduced once"])
def test_without_loss_it_is_native_hsdp(reduce_once):
    for (norms, expected), (found_norms, found) in run_ranks(train_beside_native, 4, reduce_once):
        assert sum(norm > 0.5 for norm in norms) > 2, "clipping was not in use"
        torch.testing.assert_close(found_norms, norms, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


# --- all replicas have the same model -------------------------------------------------------------


def begin(rank):
    mesh = mesh_of_ranks()
    torch.manual_seed(rank)
    # The first layer's parameters are not sharded, and the second one's are in bfloat16.
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 3, dtype=torch.bfloat16), nn.Linear(3, 3))
    nn.init.normal_(model[0].weight).requires_grad_(False)
    model[0].bias.requires_grad_(False)
    model[0](torch.randn(4, 3))
    fully_shard(model[1], mesh=mesh["shard"])
    fully_shard(model[2], mesh=mesh["shard"])
    before = model[0].weight.clone()
    compress(model, LBGM(), mesh["replicate"])
    whole_ones = {**dict(model.named_buffers()), "weight": model[0].weight}
    return before, {name: local(p).detach() for name, p in model[1:].named_parameters()}, whole_ones


def test_replicas_begin_with_the_parameters_and_buffers_of_the_first():
    before, parameters, whole_ones = zip(*run_ranks(begin, WORLD), strict=True)
    assert not torch.equal(before[2], before[0])
    assert_replicas_agree(parameters)
    assert_replicas_agree(whole_ones)
    assert_same_bits(whole_ones[0]["weight"], before[0])


def train_30_steps(rank):
    results = []
    for compressor in LOSSY:
        # Replicas begin with other parameters, until they are compressed.
        model, state, optimizer = prepared(compressor, seed=rank)
        begin, norms = shards(model), []
        applied = {name: torch.zeros_like(p) for name, p in begin.items()}
        true = copy.deepcopy(applied)
        for step in range(30):
            optimizer.zero_grad()
            loss_of(model, rank, step).backward()
            for name, grad in gradients(model).items():
                true[name] += grad
            state.average_gradients()
            for name, grad in gradients(model).items():
                applied[name] += grad
            norms.append(nn.utils.clip_grad_norm_(model.parameters(), 1.0).full_tensor())
            optimizer.step()
        common = (begin, shards(model), norms, applied)
        results.append((common, true, residuals(state.state_dict()), state.stats()))
    return results


def test_replicas_stay_bit_equal_and_lose_nothing():
    results = run_ranks(train_30_steps, WORLD)
    for at, compressor in enumerate(LOSSY):
        common, true, kept, stats = zip(*(result[at] for result in results), strict=True)
        assert_replicas_agree(common)
        assert all(0 < one["message_bytes"] < one["dense_bytes"] for one in stats)
        assert common[1][1]["out.bias"].numel() == 0
        # The norm is that of all shards.
        assert_same_bits(common[1][2], common[0][2])
        if compressor in FEEDBACK:
            for shard in (0, 1):
                assert_nothing_is_lost(common[shard][3], true[shard::2], kept[shard::2])


# --- checkpoints ----------------------------------------------------------------------------------


def load(model, optimizer, parameters, moments):
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.to_local().copy_(parameters[name])
    optimizer.load_state_dict(moments)


def resume(rank, gathered):
    results = []
    for compressor in LOSSY:
        run = prepared(compressor)
        for step in range(8):
            if step == 4:
                state = run[1].gather_state_dict() if gathered else run[1].state_dict()
                kept = saved_and_loaded(state), shards(run[0]), copy.deepcopy(run[2].state_dict())
            train_step(*run, rank, step)
        state, *rest = kept
        if gathered:
            # As if the ranks of a shard read one file.
            states = [None] * WORLD
            dist.all_gather_object(states, state)
            assert [bool(of) for of in states] == [True, True, False, False]
            state = states[rank % 2]
        again = prepared(compressor, seed=1)
        load(again[0], again[2], *rest)
        again[1].load_state_dict(state)
        for step in range(4, 8):
            train_step(*again, rank, step)
        assert_same_bits(shards(again[0]), shards(run[0]))
        found, expected = again[1].state_dict(), run[1].state_dict()
        assert_same_bits(residuals(found), residuals(expected))
        assert found["shard"] == [rank % 2, 2]
        assert found["step"] == expected["step"] == 8
        results.append(shards(again[0]))
        with pytest.raises(ValueError, match=r"the state is that of shard . of 2, and this rank"):
            again[1].load_state_dict({**expected, "shard": [1 - rank % 2, 2]})
        with pytest.raises(ValueError, match=r"not a state that CompressionState.state_dict"):
            again[1].load_state_dict({})
    return results


@pytest.mark.parametrize("gathered", [False, True], ids=["a file a rank", "a file a shard"])
def test_resumed_training_is_that_which_did_not_stop(gathered):
    assert_replicas_agree(run_ranks(resume, WORLD, gathered))


# --- steps that are not applied -------------------------------------------------------------------


def skip_steps(rank):
    for compressor in LOSSY:
        run = model, state, optimizer = prepared(compressor)
        for step in range(3):
            train_step(*run, rank, step)
        before = copy.deepcopy(state.state_dict())

        # A step that the loop skips.
        loss_of(model, rank, 3).backward()
        state.average_gradients()
        state.undo()
        assert_same_bits(state.state_dict(), {**before, "step": 4})

        # Inf in one shard of one replica: the other shard's averages are finite.
        optimizer.zero_grad()
        loss_of(model, rank, 4).backward()
        if rank == 3:
            local(model.first.weight.grad)[0, 0] = torch.inf
        state.average_gradients()
        finite = all(bool(grad.isfinite().all()) for grad in gradients(model).values())
        assert finite == (rank % 2 == 0)
        assert_same_bits(state.state_dict(), {**before, "step": 5})

        # An applied step is not taken back.
        train_step(*run, rank, 5)
        after = copy.deepcopy(state.state_dict())
        state.undo()
        assert_same_bits(state.state_dict(), after)
        train_step(*run, rank, 6)
    return shards(model)


def test_steps_that_are_not_applied_leave_the_state_as_it_was():
    assert_replicas_agree(run_ranks(skip_steps, WORLD))


def scale_loss(rank):
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
    model, state, optimizer = prepared(FEEDBACK[0], loss_scale=scaler.get_scale)
    applied = {name: torch.zeros_like(p) for name, p in shards(model).items()}
    true = copy.deepcopy(applied)
    scales = [scaler.get_scale()]
    for step in range(12):
        optimizer.zero_grad()
        # In one step, the gradients of one replica have inf.
        loss = loss_of(model, rank, step) * (1e38 if (step, rank) == (5, 3) else 1)
        scaler.scale(loss).backward()
        mine = gradients(model)
        state.average_gradients()
        scaler.unscale_(optimizer)
        averages = gradients(model)
        scaler.step(optimizer)
        scaler.update()
        if step != 5:
            for name in applied:
                true[name] += mine[name] / scales[-1]
                applied[name] += averages[name]
        scales.append(scaler.get_scale())
    return (shards(model), scales, applied), true, residuals(state.state_dict())


def test_loss_scaling_skips_the_same_steps_on_all_ranks():
    results = run_ranks(scale_loss, WORLD)
    common, true, kept = zip(*results, strict=True)
    assert_replicas_agree(common)
    assert all(of[1] == common[0][1] for of in common)
    assert common[0][1][6] < common[0][1][5], "the step with inf was not skipped"
    for shard in (0, 1):
        assert_nothing_is_lost(common[shard][2], true[shard::2], kept[shard::2])


# --- parameters without a gradient ----------------------------------------------------------------


def leave_out(rank, start_step):
    model, state, optimizer = prepared(FEEDBACK[0], start_step=start_step)
    model.first.bias.requires_grad_(False)
    replica = rank // 2
    found = []
    # The branch is used by nobody, by one replica, by the other, by both, and by nobody.
    for step, users in enumerate([(), (0,), (1,), (0, 1), ()]):
        before = shards(model)
        train_step(model, state, optimizer, rank, step, branch=replica in users)
        assert model.first.bias.grad is None
        assert_same_bits(shards(model)["first.bias"], before["first.bias"])
        for p in model.branch.parameters():
            assert (p.grad is not None) == bool(users)
            assert users == () or p.grad.placements == p.placements
            assert users == () or p.grad.shape == p.shape
        changed = bool((shards(model)["branch.weight"] != before["branch.weight"]).any())
        assert changed == bool(users)
        found.append(shards(model))
    # It is thawed, and a gradient that it had when it was frozen is not sent.
    model.first.bias.requires_grad_(True)
    train_step(model, state, optimizer, rank, 5)
    model.first.bias.requires_grad_(False)
    stale = local(model.first.bias.grad).clone()
    loss_of(model, rank, 6).backward()
    state.average_gradients()
    assert_same_bits(local(model.first.bias.grad), stale)
    optimizer.zero_grad()
    found.append(shards(model))
    return found


@pytest.mark.parametrize("start_step", [0, 3])
def test_nothing_is_written_to_parameters_that_are_frozen_or_that_no_replica_used(start_step):
    assert_replicas_agree(run_ranks(leave_out, WORLD, start_step))


def use_by_one_replica(rank):
    model, state, _ = prepared(Identity())
    branch = rank < 2
    loss_of(model, rank, 0, branch=branch).backward()
    mine = {n: local(p.grad).clone() for n, p in model.named_parameters() if p.grad is not None}
    state.average_gradients()
    return mine, gradients(model)


def test_gradient_of_one_replica_counts_half():
    results = run_ranks(use_by_one_replica, WORLD)
    for rank in (0, 1):
        (mine, averages), (others, other_averages) = results[rank], results[rank + 2]
        assert "branch.weight" in mine
        assert "branch.weight" not in others
        for name in averages:
            expected = (mine[name] + others.get(name, 0)) / 2
            torch.testing.assert_close(averages[name], expected)
        assert_same_bits(other_averages, averages)


# --- mixed precision, weights ---------------------------------------------------------------------


def train_in_bfloat16(rank):
    mesh = mesh_of_ranks()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16)
    model = sharded(mesh["shard"], rank, mp_policy=policy)
    state = compress(model, FEEDBACK[0], mesh["replicate"].get_group(), weight=1.0 + rank // 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    losses = []
    for step in range(30):
        train_step(model, state, optimizer, rank, step)
        with torch.no_grad():
            losses.append(float(sum(loss_of(model, one, 1000) for one in range(4))))
    # After a forward pass alone the outermost parameters are whole.
    model.reshard()
    assert {p.grad.dtype for p in model.parameters()} == {torch.float32}
    return shards(model), losses[0], losses[-1]


def test_mixed_precision_of_bfloat16_trains():
    results = run_ranks(train_in_bfloat16, WORLD)
    assert_replicas_agree(results)
    assert all(last < 0.8 * first for _, first, last in results)


def average_weighted(rank):
    mesh = mesh_of_ranks()
    model = sharded(mesh["shard"])
    state = compress(model, Identity(), mesh["replicate"], weight=1.0 if rank < 2 else 3.0)
    loss_of(model, rank, 0).backward()
    mine = gradients(model)
    state.average_gradients()
    return mine, gradients(model)


def test_replica_of_three_times_the_weight_has_three_quarters_of_the_average():
    results = run_ranks(average_weighted, WORLD)
    for rank in (0, 1):
        for name, average in results[rank][1].items():
            expected = results[rank][0][name] / 4 + results[rank + 2][0][name] * 3 / 4
            torch.testing.assert_close(average, expected)


# --- wrong uses -----------------------------------------------------------------------------------


def forget(rank):
    mesh = mesh_of_ranks()
    model = sharded(mesh["shard"])
    # The program does not keep the state.
    compress(model, LBGM(), mesh["replicate"])
    other = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    others_optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    loss_of(model, rank, 0).backward()
    other(torch.ones(2)).sum().backward()
    others_optimizer.step()
    with pytest.raises(RuntimeError, match=r"call state.average_gradients\(\) between loss.backw"):
        optimizer.step()


def forget_later(rank):
    model, state, optimizer = prepared(LBGM())
    train_step(model, state, optimizer, rank, 0)
    # Gradients that are thrown away need not be averaged.
    loss_of(model, rank, 1).backward()
    optimizer.zero_grad()
    optimizer.step()
    # Two steps with one average.
    train_step(model, state, optimizer, rank, 2)
    optimizer.step()
    loss_of(model, rank, 3).backward()
    with pytest.raises(RuntimeError, match="gradients that were not averaged over the replicas"):
        optimizer.step()


def replace_parameters(rank):
    model, state, _ = prepared(LBGM())
    model.load_state_dict(model.state_dict(), assign=True)
    loss_of(model, rank, 0).backward()
    with pytest.raises(RuntimeError, match="was replaced after the model was compressed"):
        state.average_gradients()


def test_replaced_parameters_are_an_error():
    run_ranks(replace_parameters, WORLD)


def forget_model(rank):
    model, state, optimizer = prepared(FEEDBACK[0])
    train_step(model, state, optimizer, rank, 0)
    alive = weakref.ref(state), weakref.ref(model)
    del model, state, optimizer
    gc.collect()
    return [ref() is not None for ref in alive]


def test_state_goes_with_its_model():
    assert run_ranks(forget_model, WORLD) == [[False, False]] * WORLD


@pytest.mark.parametrize("function", [forget, forget_later])
def test_step_with_gradients_that_were_not_averaged_is_an_error(function):
    run_ranks(function, WORLD)


def fail_to_encode(*_, **__):
    raise MemoryError("none left")


def fail_in_one_shard(rank):
    model, state, optimizer = prepared(ErrorFeedback(TopK(0.1)))
    train_step(model, state, optimizer, rank, 0)
    if rank == 3:
        state.sender.encode = fail_to_encode
    loss_of(model, rank, 1).backward()
    messages = []
    for _ in range(2):
        try:
            state.average_gradients()
        except (RuntimeError, MemoryError) as error:
            messages.append(str(error))
    return messages


def test_failure_of_one_rank_is_an_error_on_all():
    first, again = zip(*run_ranks(fail_in_one_shard, WORLD), strict=True)
    for rank, message in enumerate(
        [
            "a rank with another shard of the model failed: see the error there",
            "rank 1 failed before it could send",
            "a rank with another shard of the model failed: see the error there",
            "none left",
        ]
    ):
        assert message in first[rank]
        assert "an earlier step failed" in again[rank]


def plain():
    return Net()


def sharded_twice(mesh):
    model = sharded(mesh["shard"])
    compress(model, LBGM(), mesh["replicate"])
    return lambda: compress(model, LBGM(), mesh["replicate"])


class OnCPU(torch.distributed.fsdp.FullyShardedDataParallel):
    """FSDP1 cannot be built without an accelerator."""

    def __init__(self, module):
        nn.Module.__init__(self)
        self.module = module


def partly_sharded(mesh):
    model = Net()
    fully_shard(model.first, mesh=mesh["shard"])
    return model


def frozen(mesh):
    model = sharded(mesh["shard"])
    return model.requires_grad_(False)


def of_two_meshes(mesh):
    model = Net()
    fully_shard(model.first, mesh=mesh["shard"])
    fully_shard(model, mesh=init_device_mesh("cpu", (4,)))
    return model


def with_tensor_parallelism(mesh):
    model = nn.Linear(8, 8)
    model.weight = nn.Parameter(distribute_tensor(model.weight.detach(), mesh["shard"], [Shard(0)]))
    model.bias = None
    fully_shard(model, mesh=mesh["replicate"])
    return model


def on_meta_device(mesh):
    with torch.device("meta"):
        return sharded(mesh["shard"])


def crossed(rank):
    """Return groups of ranks with different shards of the two replicas."""
    groups = [dist.new_group(ranks) for ranks in ([0, 3], [1, 2])]
    return groups[rank in (1, 2)]


def use_wrongly(rank):
    mesh = mesh_of_ranks()
    replicas = mesh["replicate"]
    good = sharded(mesh["shard"])
    uses = [
        (lambda: compress(LBGM(), good, replicas), "the arguments are swapped: write compress(mod"),
        (lambda: compress(good, replicas, LBGM()), "the arguments are swapped: write compress(mod"),
        (
            lambda: compress("net", LBGM(), replicas),
            "model must be a torch.nn.Module, not str: wri",
        ),
        (lambda: compress(good, TopK, replicas), "compressor"),
        (lambda: compress(good, LBGM(), replicas, weight=0), "weight must be above 0 and finite"),
        (lambda: compress(good, LBGM(), replicas, start_step=-1), "start_step must be a whole num"),
        (lambda: compress(good, LBGM(), None), "replicas must be a DeviceMesh of one dimension or"),
        (
            lambda: compress(good, LBGM(), mesh),
            "replicas is a mesh of 2 dimensions ('replicate', '",
        ),
        (
            lambda: compress(good, LBGM(), mesh["shard"]),
            "are given as replicas, and the model is sharded over ranks",
        ),
        (
            lambda: compress(good, LBGM(), dist.group.WORLD),
            "ranks [0, 1, 2, 3] are given as replicas, and the model is sharded over ranks",
        ),
        (
            lambda: compress(good, LBGM(), dist.GroupMember.NON_GROUP_MEMBER),
            "this rank is not in the process group of the replicas",
        ),
        (
            lambda: compress(plain(), LBGM(), replicas),
            'the model is not sharded: call fully_shard(model, mesh=mesh["shard"]), over the dim',
        ),
        (
            lambda: compress(DistributedDataParallel(plain()), LBGM(), replicas),
            "for a model in DistributedDataParallel take lbgm_compress.adapters.ddp",
        ),
        (
            lambda: compress(sharded(mesh), LBGM(), replicas),
            "so that its gradient is averaged over the replicas already: call fully_shard(model",
        ),
        (
            lambda: compress(with_tensor_parallelism(mesh), LBGM(), replicas),
            "such as those of tensor parallelism, which is not supported",
        ),
        (
            lambda: compress(OnCPU(Net()), LBGM(), replicas),
            "FullyShardedDataParallel, which is FSDP1",
        ),
        (
            lambda: compress(partly_sharded(mesh), LBGM(), replicas),
            "parameter 'branch.weight' is not sharded, so that its gradient is not averaged within",
        ),
        (
            lambda: compress(frozen(mesh), LBGM(), replicas),
            "the model has no parameter that requires a gradient",
        ),
        (
            lambda: compress(of_two_meshes(mesh), LBGM(), replicas),
            "the parameters are sharded over 2 meshes",
        ),
        (
            lambda: compress(on_meta_device(mesh), LBGM(), replicas),
            "is on the meta device: call model.to_empty() and initialise it before compress",
        ),
        (sharded_twice(mesh), "the model is compressed already, by another CompressionState"),
        # All ranks of a shard learn of these.
        (
            lambda: compress(good, LBGM(delta=0.1 * (1 + rank // 2)), replicas),
            "the ranks were given different compressors or models: rank 0 has compressor",
        ),
        (
            lambda: compress(good, LBGM(), crossed(rank)),
            "rank 0 has shard {} of 2 where rank 1 has shard {} of 2".format(
                *([0, 1] if rank in (0, 3) else [1, 0])
            ),
        ),
    ]
    found = []
    for use, message in uses:
        try:
            use()
            found.append((message, "no error"))
        except (TypeError, ValueError, RuntimeError) as error:
            found.append((message, str(error)))
    return found


def test_wrong_uses_are_named():
    for found in run_ranks(use_wrongly, WORLD):
        for expected, message in found:
            assert expected in message


def test_torch_without_fully_shard_is_named():
    program = """
import sys, types, torch.distributed
import lbgm_compress, lbgm_compress.collective
assert not [name for name in sys.modules if name.startswith("torch.distributed.fsdp.")]
sys.modules["torch.distributed.fsdp"] = types.ModuleType("torch.distributed.fsdp")
import lbgm_compress.adapters.fsdp
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "pip install 'torch>=2.6'" in done.stderr.splitlines()[-1]
    assert done.stderr.splitlines()[-1].startswith("ImportError: lbgm_compress.adapters.fsdp needs")
