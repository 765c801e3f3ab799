"""The hook for DistributedDataParallel, in real processes on gloo."""

from __future__ import annotations

import copy
import os
import re
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lbgm_compress import (
    LBGM,
    Atomo,
    ErrorFeedback,
    Identity,
    LookBackSubspace,
    SignSGD,
    TopK,
)
from lbgm_compress.adapters.ddp import CompressionState, compress, compression_hook
from lbgm_compress.wire.values import as_bytes
from tests import soak
from tests.laws import assert_same_bits, saved_and_loaded
from tests.ranks import Failed, run_ranks
from tests.training import Net, assert_replicas_agree, data, parameters

ROOT = Path(__file__).parent.parent
SMALL_BUCKETS = 0.004  # in MB: the model below takes nine or more


def build(dtype=torch.float32, skip=False, **options):
    torch.manual_seed(0)
    model = Net(skip).to(dtype)
    return DistributedDataParallel(model, bucket_cap_mb=SMALL_BUCKETS, **options)


def hooked(model, compressor, **options):
    state = CompressionState(compressor, model.named_parameters(), **options)
    model.register_comm_hook(state, compression_hook)
    return state


def train(model, rank, steps, optimizer=None, start=0, same_batch=False, dtype=torch.float32):
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for step in range(start, start + steps):
        x, y = data(rank, 0 if same_batch else step, dtype)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x).float(), y).backward()
        optimizer.step()
    return optimizer


def against_plain_ddp(rank, compressor, dtype, options):
    plain = build(dtype, **options)
    train(plain, rank, 20, dtype=dtype)
    model = build(dtype, **options)
    state = hooked(model, compressor)
    train(model, rank, 20, dtype=dtype)
    return parameters(plain), parameters(model), state.stats()


@pytest.mark.timeout(120)
@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("compressor", [Identity(), LBGM(delta=0)], ids=repr)
def test_without_loss_training_equals_plain_ddp(world, compressor):
    results = run_ranks(against_plain_ddp, world, compressor, torch.float32, {})
    assert_replicas_agree([compressed for _, compressed, _ in results])
    for plain, compressed, stats in results:
        for name, expected in plain.items():
            assert torch.allclose(compressed[name], expected, rtol=1e-4, atol=1e-6)
        assert 1 < stats["ratio"] < 1.05


@pytest.mark.timeout(120)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_models_train_as_with_plain_ddp(dtype):
    results = run_ranks(against_plain_ddp, 2, Identity(), dtype, {})
    assert_replicas_agree([compressed for _, compressed, _ in results])
    for plain, compressed, _ in results:
        for name, expected in plain.items():
            assert compressed[name].dtype == dtype
            assert torch.allclose(compressed[name].float(), expected.float(), rtol=0.05, atol=0.02)


OPTIONS = {
    "bucket views": {"gradient_as_bucket_view": True},
    "unused parameters": {"find_unused_parameters": True, "skip": True},
    "static graph": {"static_graph": True},
    "static graph and bucket views": {"static_graph": True, "gradient_as_bucket_view": True},
}


@pytest.mark.timeout(120)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options_of_ddp_make_no_difference(options):
    results = run_ranks(against_plain_ddp, 2, Identity(), torch.float32, options)
    assert_replicas_agree([compressed for _, compressed, _ in results])
    for plain, compressed, _ in results:
        for name, expected in plain.items():
            assert torch.allclose(compressed[name], expected, rtol=1e-4, atol=1e-6)


def every_compressor(rank, compressors):
    results = []
    for compressor in compressors:
        model = build()
        state = hooked(model, compressor)
        train(model, rank, 8)
        results.append((parameters(model), state.stats()["ratio"]))
    return results


@pytest.mark.timeout(120)
def test_every_compressor_works_and_replicas_agree():
    compressors = [
        TopK(0.05),
        SignSGD(scaled=True),
        SignSGD(vote=True),
        Atomo(2),
        Atomo(2, unbiased=True),
        LBGM(TopK(0.1), delta=0.5),
        LBGM(ErrorFeedback(SignSGD(scaled=True))),
        ErrorFeedback(LBGM(Atomo(2))),
        ErrorFeedback(LookBackSubspace(2, 0.5, values="int2")),
        LookBackSubspace(2, 0.3, view="flat"),
    ]
    results = run_ranks(every_compressor, 3, compressors, timeout=100)
    for i, compressor in enumerate(compressors):
        assert_replicas_agree([result[i][0] for result in results])
        assert all(result[i][1] < 0.6 for result in results), compressor


def long_run(rank, options, steps):
    model = build(**options)
    compressor = LBGM(delta=0.5)
    state = hooked(model, compressor)
    buckets, hook = set(), state._hook

    def watched(bucket):
        buckets.add(bucket.index())
        return hook(bucket)

    state._hook = watched
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    for step in range(steps):
        # Ranks stay with a batch for a random time, each its own.
        draw = torch.Generator().manual_seed(step // 5 * 10 + rank)
        x, y = data(rank, int(torch.randint(40, (), generator=draw)))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    saved = state.state_dict()
    sent = {
        name: as_bytes(entry["state"]["look_back"])
        for name, entry in saved["sender"]["tensors"].items()
    }
    held = {
        other: {name: entry["state"]["look_back"] for name, entry in tensors.items()}
        for other, tensors in saved["receiver"]["senders"].items()
    }
    return parameters(model), sent, held, state.stats(), len(buckets)


def check_long_run(options, steps):
    results = run_ranks(long_run, 4, options, steps, timeout=200)
    assert_replicas_agree([result[0] for result in results])
    for rank, (_, _, held, stats, buckets) in enumerate(results):
        assert buckets >= 9
        assert 0.05 < stats["recycled_share"] < 0.95
        assert sorted(held) == [other for other in range(4) if other != rank]
        for other, look_back in held.items():
            assert_same_bits(look_back, results[other][1])


@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", ["all used", "unused parameters"])
def test_random_refreshes_leave_all_ranks_bit_equal(name):
    check_long_run(OPTIONS.get(name, {}), 30)


@pytest.mark.soak
@pytest.mark.timeout(240)
@pytest.mark.parametrize(("name", "steps"), [("all used", 500), ("unused parameters", 150)])
def test_hundreds_of_steps_with_random_refreshes_leave_all_ranks_bit_equal(name, steps):
    check_long_run(OPTIONS.get(name, {}), soak.length(steps, steps // 3))


def accumulate_steps(rank):
    results = []
    for compressor in (None, Identity()):
        model = build()
        state = hooked(model, compressor) if compressor else None
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        for step in range(6):
            optimizer.zero_grad()
            with model.no_sync():
                x, y = data(rank, 2 * step)
                nn.functional.cross_entropy(model(x), y).backward()
            x, y = data(rank, 2 * step + 1)
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        results.append((parameters(model), state.step if state else 6))
    return results


@pytest.mark.timeout(120)
def test_accumulated_gradients_are_averaged_once():
    for (plain, _), (compressed, steps) in run_ranks(accumulate_steps, 2):
        assert steps == 6
        for name, expected in plain.items():
            assert torch.allclose(compressed[name], expected, rtol=1e-4, atol=1e-6)


def scaled_with_inf(rank):
    model = build()
    state = hooked(model, LBGM(TopK(0.2)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=1000)
    history = []
    for step in range(5):
        before = parameters(model)
        x, y = data(rank, step)
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = nn.functional.cross_entropy(model(x).float(), y)
        if step == 2 and rank == 1:
            loss = loss * float("inf")
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        same = all(torch.equal(before[name], p) for name, p in parameters(model).items())
        history.append((same, scaler.get_scale()))
    return history, parameters(model), state.stats()["ratio"]


@pytest.mark.timeout(120)
def test_inf_on_one_rank_makes_every_rank_skip():
    results = run_ranks(scaled_with_inf, 2)
    for history, _, _ in results:
        assert [same for same, _ in history] == [False, False, True, False, False]
        assert [scale for _, scale in history] == [64, 64, 32, 32, 32]
    assert_replicas_agree([result[1] for result in results])


def two_models_in_subgroups(rank):
    mine = [0, 1] if rank < 2 else [2, 3]
    group = dist.new_group(mine, use_local_synchronization=True)
    torch.manual_seed(0)
    shared = DistributedDataParallel(Net(), bucket_cap_mb=SMALL_BUCKETS)
    own = DistributedDataParallel(Net(), process_group=group, bucket_cap_mb=SMALL_BUCKETS)
    hooked(shared, LBGM(delta=0.5))
    hooked(own, LBGM(TopK(0.3)), process_group=group)
    for step in range(10):
        x, y = data(rank, step)
        loss = nn.functional.cross_entropy(own(x) + shared(x), y)
        loss.backward()
        for model in (shared, own):
            with torch.no_grad():
                for p in model.parameters():
                    p -= 0.05 * p.grad
                    p.grad = None
    return parameters(shared), parameters(own)


@pytest.mark.timeout(120)
def test_several_models_and_groups_of_some_ranks():
    results = run_ranks(two_models_in_subgroups, 4)
    assert_replicas_agree([shared for shared, _ in results])
    assert_replicas_agree([own for _, own in results[:2]])
    assert_replicas_agree([own for _, own in results[2:]])
    assert not torch.equal(results[0][1]["module.out.bias"], results[2][1]["module.out.bias"])


def warm_up(rank):
    model = build()
    state = hooked(model, LBGM(delta=1.0), start_step=3)
    optimizer = None
    messages = []
    for step in range(5):
        optimizer = train(model, rank, 1, optimizer, start=step, same_batch=True)
        messages.append(state.stats()["message_bytes"])
    return messages, parameters(model)


@pytest.mark.timeout(120)
def test_warm_up_steps_are_plain_all_reduce():
    results = run_ranks(warm_up, 2)
    assert_replicas_agree([p for _, p in results])
    for messages, _ in results:
        assert messages[:3] == [0, 0, 0]
        assert messages[3] > 4 * 8000
        # 20 tensors of 5 bytes and a header for each bucket.
        assert messages[4] - messages[3] <= 20 * 5 + 10 * 16


def resume(rank, world_changes):
    compressor = LBGM(ErrorFeedback(TopK(0.2)), delta=0.8)
    model = build()
    state = hooked(model, compressor)
    optimizer = train(model, rank, 10)
    saved = saved_and_loaded(
        {
            "model": model.module.state_dict(),
            "optimizer": optimizer.state_dict(),
            "compression": copy.deepcopy(state.state_dict()),
        }
    )
    train(model, rank, 10, optimizer, start=10)

    torch.manual_seed(99)
    other = DistributedDataParallel(Net(), bucket_cap_mb=SMALL_BUCKETS)
    other_state = hooked(other, compressor)
    other.module.load_state_dict(saved["model"])
    again = torch.optim.SGD(other.parameters(), lr=0.05, momentum=0.9)
    again.load_state_dict(saved["optimizer"])
    if world_changes:
        saved["compression"]["world_size"] = 7
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        other_state.load_state_dict(saved["compression"])
    messages = [str(warning.message) for warning in caught]
    train(other, rank, 1, again, start=10)
    recycled = other_state.stats()["recycled_share"]
    train(other, rank, 9, again, start=11)
    return parameters(model), parameters(other), messages, recycled, other_state.step


@pytest.mark.timeout(120)
@pytest.mark.parametrize("world_changes", [False, True])
def test_resuming_goes_on_bit_for_bit(world_changes):
    """In a world of another size, too, where these ranks hold the same of each other."""
    for uninterrupted, resumed, messages, _, step in run_ranks(resume, 2, world_changes):
        assert_same_bits(resumed, uninterrupted)
        assert messages == []
        assert step == 20


def different(rank, what):
    compressor = LBGM(delta=0.3 if what == "compressor" and rank == 1 else 0.2)
    model = build()
    names = list(model.named_parameters())
    if what == "names" and rank == 2:
        names = [(name.replace("out", "head"), p) for name, p in names]
    model.register_comm_hook(CompressionState(compressor, names), compression_hook)
    train(model, rank, 1)


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("compressor", r"rank 0 has compressor LBGM() where rank 1 has compressor LBGM(delta=0.3)"),
        ("names", "'module.out.weight' of shape (4, 32) and torch.float32 where rank 2 has"),
    ],
)
def test_different_compressors_or_models_are_told_at_the_first_step_on_every_rank(what, message):
    for failed in run_ranks(different, 3, what, failures=True):
        assert isinstance(failed, Failed)
        assert failed.kind == "ValueError"
        assert message in failed.message


def die(rank):
    model = build()
    hooked(model, LBGM())
    optimizer = train(model, rank, 3)
    if rank == 1:
        os._exit(1)
    train(model, rank, 1, optimizer, start=3)


@pytest.mark.timeout(120)
def test_when_a_rank_dies_the_others_fail_within_the_time_out():
    first, second, third = run_ranks(die, 3, failures=True, timeout=40, group_timeout=10)
    assert second is None
    for failed in (first, third):
        assert isinstance(failed, Failed)
        assert failed.kind == "RuntimeError"
        assert re.search("closed by peer|reset by peer|[Tt]imed out", failed.message)


class Broken(Identity):
    """Fails at the third gradient that holds more than a few elements."""

    def encode(self, grad, state):
        if int(state.get("count", 0)) == 2 and dist.get_rank() == 1:
            raise ArithmeticError("the third gradient cannot be encoded")
        return super().encode(grad, {"count": int(state.get("count", 0)) + 1})


def broken(rank):
    model = build()
    state = hooked(model, Broken())
    optimizer = train(model, rank, 2)
    try:
        train(model, rank, 1, optimizer, start=2)
    except Exception as error:
        first = f"{type(error).__name__}: {error}"
    try:
        state._hook(None)
    except RuntimeError as error:
        return first, str(error)


@pytest.mark.timeout(120)
def test_error_while_encoding_reaches_the_caller_with_its_own_message():
    (first, later), (second, _) = run_ranks(broken, 2)
    assert second == "ArithmeticError: the third gradient cannot be encoded"
    assert first == "RuntimeError: rank 1 failed before it could send: see the error there"
    assert "load a checkpoint" in later


class Undecodable(Identity):
    """Cannot be read on rank 0."""

    def decode(self, head, body, state, like):
        if dist.get_rank() == 0:
            raise ArithmeticError("this gradient cannot be decoded")
        return super().decode(head, body, state, like)


def undecodable(rank):
    model = build()
    hooked(model, Undecodable())
    train(model, rank, 1)


@pytest.mark.timeout(120)
def test_error_while_decoding_reaches_the_caller_and_the_others_do_not_hang():
    first, second = run_ranks(undecodable, 2, failures=True, timeout=50, group_timeout=20)
    assert (first.kind, first.message) == ("ArithmeticError", "this gradient cannot be decoded")
    assert second.kind == "RuntimeError"


def memory(rank, compressor):
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Linear(1000, 250))
    state = hooked(model, compressor)
    model(torch.randn(8, 1000)).square().sum().backward()
    saved = state.state_dict()
    held = [saved["sender"]["tensors"], saved["receiver"]["senders"]]
    return [sum_of_tensors(item) for item in held], state.stats()["message_bytes"]


def sum_of_tensors(item):
    if isinstance(item, torch.Tensor):
        return item.untyped_storage().nbytes()
    return sum(map(sum_of_tensors, item.values())) if isinstance(item, dict) else 0


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("compressor", "dense"),
    [(LBGM(), 1), (LBGM(TopK(0.01)), 1), (LBGM(ErrorFeedback(TopK(0.01))), 2), (TopK(0.01), 0)],
    ids=lambda value: repr(value),
)
def test_memory_of_a_rank_is_that_of_the_formula(compressor, dense):
    model = 4 * (1000 * 250 + 250)
    for (sender, receiver), message in run_ranks(memory, 4, compressor):
        assert sender == dense * model
        others = 3 * message if compressor.receiver_has_state else 0
        assert 0.97 * others <= receiver <= others


def runs_beside_the_backward_pass(rank):
    model = build()
    state = hooked(model, Identity())
    threads = set()
    begin = state.begin

    def watched(grads):
        threads.add(threading.get_ident())
        return begin(grads)

    state.begin = watched
    train(model, rank, 2)
    return len(threads), threading.get_ident() in threads


@pytest.mark.timeout(120)
def test_work_is_done_on_one_thread_of_its_own():
    assert run_ranks(runs_beside_the_backward_pass, 2) == [(1, False)] * 2


def bad_arguments(rank):
    model = Net()
    found = []
    for arguments, options in (
        (("LBGM", model.named_parameters()), {}),
        ((LBGM(), model.named_parameters()), {"start_step": -1}),
        ((LBGM(), []), {}),
    ):
        try:
            CompressionState(*arguments, **options)
        except (TypeError, ValueError) as error:
            found.append(str(error))
    other = DistributedDataParallel(model)
    other.register_comm_hook(CompressionState(LBGM(), Net().named_parameters()), compression_hook)
    try:
        train(other, rank, 1)
    except ValueError as error:
        found.append(str(error))
    state = CompressionState(LBGM(), other.named_parameters())
    good = copy.deepcopy(state.state_dict())
    for wrong in ({}, {**good, "format": 3}, {**good, "receiver": {}}):
        try:
            state.load_state_dict(wrong)
        except ValueError as error:
            found.append(str(error))
    assert_same_bits(state.state_dict(), good)
    return found


@pytest.mark.timeout(120)
def test_bad_arguments_are_refused_in_words():
    for found in run_ranks(bad_arguments, 2):
        expected = ["LBGM(TopK(0.01)), not str", "start_step must be", "no parameter that requires"]
        expected += ["every model needs a state of its own"]
        expected += ["not a state", "format 3", "not a state"]
        assert len(found) == len(expected)
        for message, part in zip(found, expected, strict=True):
            assert part in message


def test_without_a_process_group_the_error_says_what_to_call():
    with pytest.raises(RuntimeError, match="init_process_group"):
        CompressionState(LBGM(), Net().named_parameters())


def on_a_gpu(rank, compressor):
    torch.cuda.set_device(0)
    results = []
    for hook in (False, True):
        torch.manual_seed(0)
        model = DistributedDataParallel(Net().cuda(), bucket_cap_mb=SMALL_BUCKETS)
        state = hooked(model, compressor) if hook else None
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        for step in range(20):
            x, y = data(rank, step)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x.cuda()), y.cuda()).backward()
            optimizer.step()
        results.append({name: p.cpu() for name, p in parameters(model).items()})
    return (*results, state.stats()["ratio"])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.timeout(200)
@pytest.mark.parametrize("compressor", [Identity(), LBGM(delta=0), LBGM(TopK(0.1))], ids=repr)
def test_hook_works_on_nccl(compressor):
    [(plain, compressed, ratio)] = run_ranks(on_a_gpu, 1, compressor, timeout=150, backend="nccl")
    assert ratio < 1.05
    if compressor != LBGM(TopK(0.1)):
        for name, expected in plain.items():
            assert torch.allclose(compressed[name], expected, rtol=1e-3, atol=1e-5)


@pytest.mark.timeout(200)
def test_example_trains_under_torchrun(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    found = subprocess.run(
        [*command, str(ROOT / "examples" / "ddp_train.py")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=180,
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
    )
    assert found.returncode == 0, found.stderr
    last = found.stdout.splitlines()[-1]
    assert float(last.split("accuracy ")[1].split(" ")[0]) > 0.85
    assert float(last.split(" of the dense bytes")[0].split()[-1].rstrip("%")) < 50


def average_in_subgroups(rank):
    groups = [dist.new_group([0, 1]), dist.new_group([2])]
    model = DistributedDataParallel(
        nn.Linear(1, 1, bias=False), process_group=groups[0] if rank < 2 else groups[1]
    )
    state = compress(model, Identity())
    model(torch.tensor([[rank + 1.0]])).sum().backward()
    return model.module.weight.grad.item(), state.transport.size


def test_one_line_compresses_a_model_in_its_own_process_group():
    assert run_ranks(average_in_subgroups, 3) == [(1.5, 2), (1.5, 2), (3.0, 1)]


def train_by_one_line(rank):
    model = build()
    state = compress(model, LBGM(TopK(0.1)), start_step=1)
    train(model, rank, 4)
    by_hand = build()
    hooked(by_hand, LBGM(TopK(0.1)), start_step=1)
    train(by_hand, rank, 4)
    for one, other in zip(model.parameters(), by_hand.parameters(), strict=True):
        assert_same_bits(one, other)
    return state.stats()["message_bytes"] > 0


def test_one_line_does_what_the_state_and_the_hook_do():
    assert run_ranks(train_by_one_line, 2) == [True, True]
