"""The optimizer for Horovod, in real jobs."""

from __future__ import annotations

import copy
import json
import sys
import threading
import warnings
from pathlib import Path

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from lbgm_compress import (
    LBGM,
    Atomo,
    ErrorFeedback,
    Identity,
    LookBackSubspace,
    SignSGD,
    TopK,
)
from lbgm_compress.adapters.horovod import DistributedOptimizer
from lbgm_compress.wire.values import as_bytes
from tests import soak
from tests.horovod_ranks import horovodrun, jobs_end, needs_horovod, run_horovod  # noqa: F401
from tests.laws import assert_same_bits, saved_and_loaded
from tests.ranks import Failed
from tests.training import Net, assert_replicas_agree, data, parameters
from tests.transport_laws import check_transport

ROOT = Path(__file__).parent.parent
SMALL_BUCKETS = 0.01  # in MB: the model below takes five
pytestmark = [
    pytest.mark.horovod,
    # One process of the tests has the jobs, and starts them once.
    pytest.mark.xdist_group("horovod"),
    pytest.mark.timeout(200),
    pytest.mark.usefixtures("jobs_end"),
    needs_horovod,
]


def build(dtype=torch.float32, skip=False):
    torch.manual_seed(0)
    return Net(skip).to(dtype)


def sgd(model, lr=0.05):
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)


def wrapped(model, compressor, optimizer=None, **options):
    options = {"bucket_cap_mb": SMALL_BUCKETS, **options}
    optimizer = optimizer or sgd(model)
    return DistributedOptimizer(optimizer, compressor, model.named_parameters(), **options)


def backward(model, rank, step):
    x, y = data(rank, step, next(model.parameters()).dtype)
    loss = nn.functional.cross_entropy(model(x).float(), y)
    loss.backward()
    return loss


def train(model, optimizer, rank, steps, start=0):
    for step in range(start, start + steps):
        optimizer.zero_grad()
        backward(model, rank, step)
        optimizer.step()


def against_horovods_own(rank, kind, dtype, skip):
    import horovod.torch as hvd

    results = []
    for compressed in (False, True):
        model = build(dtype, skip)
        optimizer = sgd(model) if kind == "SGD" else torch.optim.Adam(model.parameters(), lr=0.01)
        if compressed:
            optimizer = wrapped(model, Identity(), optimizer)
        else:
            optimizer = hvd.DistributedOptimizer(optimizer, model.named_parameters())
        train(model, optimizer, rank, 20)
        results.append(parameters(model))
    return (*results, optimizer.compression.stats()["ratio"], type(optimizer).__name__)


@pytest.mark.parametrize(("kind", "skip"), [("SGD", False), ("Adam", False), ("SGD", True)])
@pytest.mark.parametrize("world", [2, 3])
def test_without_compression_training_equals_horovods_own(world, kind, skip):
    results = run_horovod(against_horovods_own, world, kind, torch.float32, skip)
    assert_replicas_agree([ours for _, ours, _, _ in results])
    for theirs, ours, ratio, name in results:
        assert name == kind
        assert 1 < ratio < 1.05
        for parameter, expected in theirs.items():
            assert torch.allclose(ours[parameter], expected, rtol=1e-4, atol=1e-5)


def on_transport(rank, law):
    import horovod.torch as hvd

    from lbgm_compress.adapters.horovod import HorovodTransport

    return law(HorovodTransport(hvd, hvd.global_process_set))


@pytest.mark.parametrize("world", [2, 3])
def test_horovod_keeps_the_laws_of_transports(world):
    check_transport(lambda law: run_horovod(on_transport, world, law))


def half_precision(rank):
    model = build(torch.bfloat16)
    optimizer = wrapped(model, LBGM(), start_step=2)
    train(model, optimizer, rank, 6)
    return parameters(model)


def test_bfloat16_works_though_horovod_has_none():
    results = run_horovod(half_precision, 2)
    assert_replicas_agree(results)
    assert all(p.dtype == torch.bfloat16 for p in results[0].values())


def long_run(rank, compressors, cap, steps):
    results = []
    for compressor in compressors:
        model = build()
        optimizer = wrapped(model, compressor, sgd(model, lr=0.005), bucket_cap_mb=cap)
        for step in range(steps):
            # Ranks stay with a batch for a random time, each its own.
            draw = torch.Generator().manual_seed(step // 5 * 10 + rank)
            optimizer.zero_grad()
            backward(model, rank, int(torch.randint(40, (), generator=draw)))
            optimizer.step()
        saved = optimizer.compression.state_dict()
        sent = saved["sender"]["tensors"]
        dense = {n: as_bytes(entry["state"]["look_back"]) for n, entry in sent.items()}
        held = {
            other: {name: entry["id"] for name, entry in tensors.items()}
            for other, tensors in saved["receiver"]["senders"].items()
        }
        identifiers = {name: entry["id"] for name, entry in sent.items()}
        stats = optimizer.compression.stats()
        results.append((parameters(model), identifiers, held, stats["recycled_share"], len(dense)))
    return results


def check_long_run(world, steps):
    compressors = [LBGM(TopK(0.01)), LBGM(SignSGD()), LBGM(Atomo(rank=2))]
    # Horovod takes its time with three ranks on two cores.
    cap = 0.025 if world == 2 else 25
    results = run_horovod(long_run, world, compressors, cap, steps, timeout=280)
    for i, compressor in enumerate(compressors):
        assert_replicas_agree([result[i][0] for result in results])
        for rank, result in enumerate(results):
            _, _, held, recycled, count = result[i]
            assert count == 20
            assert 0.05 < recycled < 0.99, compressor
            assert sorted(held) == [other for other in range(world) if other != rank]
            for other, identifiers in held.items():
                assert identifiers == results[other][i][1]


@pytest.mark.parametrize(("world", "steps"), [(2, 40), (3, 25)])
def test_replicas_are_bit_identical_after_random_refreshes(world, steps):
    check_long_run(world, steps)


@pytest.mark.soak
@pytest.mark.timeout(300)
@pytest.mark.parametrize(("world", "steps"), [(2, 300), (3, 120)])
def test_replicas_are_bit_identical_after_hundreds_of_steps(world, steps):
    check_long_run(world, soak.length(steps, steps // 2))


def every_compressor(rank, compressors):
    results = []
    for compressor in compressors:
        model = build()
        optimizer = wrapped(model, compressor)
        train(model, optimizer, rank, 8)
        results.append((parameters(model), optimizer.compression.stats()["ratio"]))
    return results


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
    results = run_horovod(every_compressor, 3, compressors)
    for i, compressor in enumerate(compressors):
        assert_replicas_agree([result[i][0] for result in results])
        assert all(result[i][1] < 0.6 for result in results), compressor


def accumulate(rank):
    import horovod.torch as hvd

    results, error = [], ""
    for compressed in (False, True):
        model = build()
        optimizer = sgd(model)
        if compressed:
            optimizer = wrapped(model, Identity(), optimizer, backward_passes_per_step=3)
        else:
            optimizer = hvd.DistributedOptimizer(
                optimizer, model.named_parameters(), backward_passes_per_step=3
            )
        for step in range(5):
            optimizer.zero_grad()
            # Fewer passes than planned are as good as all.
            for number in range(2 if step == 3 else 3):
                backward(model, rank, 10 * step + number)
            optimizer.step()
        results.append(parameters(model))
    for number in range(3):
        backward(model, rank, number)
    try:
        backward(model, rank, 3)
    except AssertionError as raised:
        error = str(raised)
    return (*results, optimizer.compression.step, error)


def test_gradients_add_up_over_several_backward_passes():
    for theirs, ours, steps, error in run_horovod(accumulate, 2):
        assert steps == 5
        assert "more than backward_passes_per_step times" in error
        for name, expected in theirs.items():
            assert torch.allclose(ours[name], expected, rtol=1e-4, atol=1e-5)


def clip(rank):
    import horovod.torch as hvd

    results, caught = [], []
    for compressed in (False, True):
        model = build()
        optimizer = sgd(model)
        if compressed:
            optimizer = wrapped(model, Identity(), optimizer)
        else:
            optimizer = hvd.DistributedOptimizer(optimizer, model.named_parameters())
        for step in range(5):
            optimizer.zero_grad()
            backward(model, rank, step)
            optimizer.synchronize()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            with optimizer.skip_synchronize():
                optimizer.step()
        results.append(parameters(model))
    optimizer.zero_grad()
    backward(model, rank, 9)
    errors = []
    for wrong in (
        optimizer.zero_grad,
        lambda: optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]}),
    ):
        try:
            wrong()
        except (AssertionError, ValueError) as error:
            errors.append(str(error))
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        optimizer.synchronize()
        before = {name: p.grad.clone() for name, p in model.named_parameters()}
        optimizer.step()
        caught = [str(warning.message) for warning in warned]
    unchanged = all(torch.equal(before[name], p.grad) for name, p in model.named_parameters())
    return (*results, errors, caught, unchanged)


def test_gradients_can_be_clipped_between_synchronize_and_step():
    for theirs, ours, errors, caught, unchanged in run_horovod(clip, 2):
        for name, expected in theirs.items():
            assert torch.allclose(ours[name], expected, rtol=1e-4, atol=1e-5)
        assert "before optimizer.step()" in errors[0]
        assert "would not be averaged" in errors[1]
        assert len(caught) == 1
        assert "without optimizer.skip_synchronize()" in caught[0]
        assert unchanged


def closures(rank):
    model = build()
    optimizer = wrapped(
        model,
        LBGM(TopK(0.5)),
        torch.optim.LBFGS(model.parameters(), max_iter=4, line_search_fn="strong_wolfe"),
    )

    def closure():
        optimizer.zero_grad()
        return backward(model, rank, 0)

    losses = [float(optimizer.step(closure)) for _ in range(4)]
    try:
        with optimizer.skip_synchronize():
            optimizer.step(closure)
    except ValueError as error:
        return parameters(model), losses, str(error)


def test_closures_are_averaged_too_so_that_even_lbfgs_keeps_replicas_together():
    results = run_horovod(closures, 2)
    assert_replicas_agree([result[0] for result in results])
    assert results[0][1] == results[1][1]
    assert results[0][1][-1] < results[0][1][0]
    assert "skip_synchronize() would leave without an average" in results[0][2]


def broadcasts(rank):
    import horovod.torch as hvd

    torch.manual_seed(rank)
    model = Net()
    plain = torch.optim.SGD(model.parameters(), lr=0.1 * (rank + 1), momentum=0.9)
    if rank == 0:
        # As after a checkpoint that only the first rank has read.
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        plain.step()
        plain.zero_grad()
    scheduler = torch.optim.lr_scheduler.StepLR(plain, step_size=1, gamma=0.5)
    optimizer = wrapped(model, LBGM(), plain)
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)
    momenta = {
        name: optimizer.state[p]["momentum_buffer"].clone() for name, p in model.named_parameters()
    }
    rates = [optimizer.param_groups[0]["lr"]]
    sent = optimizer.compression.stats()["message_bytes"]
    train(model, optimizer, rank, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a scheduler that knows the other optimizer's step
        scheduler.step()
    rates.append(optimizer.param_groups[0]["lr"])
    return parameters(model), momenta, rates, sent


def test_broadcasts_of_horovod_work_and_schedulers_keep_their_hold():
    results = run_horovod(broadcasts, 3)
    assert_replicas_agree([result[0] for result in results])
    for _, momenta, rates, sent in results:
        assert all(bool((momentum == 1).all()) for momentum in momenta.values())
        assert rates[0] == pytest.approx(0.1)
        assert rates[1] == pytest.approx(rates[0] / 2)
        assert sent == 0


def some_ranks(rank):
    import horovod.torch as hvd

    pair = hvd.add_process_set([0, 2])
    model = build()
    optimizer = wrapped(model, LBGM(delta=0.5), process_set=pair)
    train(model, optimizer, rank, 6)
    return parameters(model), optimizer.compression.stats()["message_bytes"]


def test_process_set_averages_among_its_ranks_alone():
    results = run_horovod(some_ranks, 3, environment={"HOROVOD_DYNAMIC_PROCESS_SETS": "1"})
    assert_replicas_agree([results[0][0], results[2][0]])
    assert not torch.equal(results[0][0]["out.bias"], results[1][0]["out.bias"])
    assert results[1][1] == 0 < results[0][1]


def warm_up(rank):
    model = build()
    optimizer = wrapped(model, LBGM(delta=1.0), start_step=3, weight=1 + rank)
    plain, reference = build(), None
    messages = []
    for step in range(5):
        optimizer.zero_grad()
        backward(model, rank, 0)
        optimizer.synchronize()
        if step == 0:
            backward(plain, rank, 0)
            own = {name: p.grad for name, p in plain.named_parameters()}
            reference = own, {name: p.grad.clone() for name, p in model.named_parameters()}
        with optimizer.skip_synchronize():
            optimizer.step()
        messages.append(optimizer.compression.stats()["message_bytes"])
    return messages, parameters(model), reference


def test_warm_up_steps_are_plain_all_reduce_by_weight():
    results = run_horovod(warm_up, 2)
    assert_replicas_agree([result[1] for result in results])
    (first, averages), (second, _) = results[0][2], results[1][2]
    for name, average in averages.items():
        assert torch.allclose(average, (first[name] + 2 * second[name]) / 3, atol=1e-6)
    for messages, _, _ in results:
        assert messages[:3] == [0, 0, 0]
        assert messages[3] > 4 * 8000
        # 20 tensors of 5 bytes and a header for each bucket.
        assert messages[4] - messages[3] <= 20 * 5 + 10 * 16


def resume(rank):
    compressor = LBGM(ErrorFeedback(TopK(0.2)), delta=0.8)
    model = build()
    optimizer = wrapped(model, compressor)
    train(model, optimizer, rank, 10)
    saved = saved_and_loaded(
        copy.deepcopy(
            (model.state_dict(), optimizer.state_dict(), optimizer.compression.state_dict())
        )
    )
    train(model, optimizer, rank, 10, start=10)
    other = Net()
    again = wrapped(other, compressor)
    other.load_state_dict(saved[0])
    again.load_state_dict(saved[1])
    again.compression.load_state_dict(saved[2])
    train(other, again, rank, 10, start=10)
    # A state of another rank serves as well, without its look-back gradients.
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        again.compression.load_state_dict({**saved[2], "rank": 5})
    train(other, again, rank, 5)
    return parameters(model), parameters(other), [str(w.message) for w in caught]


def test_resuming_goes_on_bit_for_bit():
    results = run_horovod(resume, 2)
    assert_replicas_agree([result[1] for result in results])
    assert all("its residual and its seed are not taken" in result[2][0] for result in results)


def resume_exactly(rank):
    compressor = LBGM(TopK(0.2), delta=0.8)
    model = build()
    optimizer = wrapped(model, compressor)
    train(model, optimizer, rank, 10)
    states = model.state_dict(), optimizer.state_dict(), optimizer.compression.state_dict()
    saved = saved_and_loaded(copy.deepcopy(states))
    train(model, optimizer, rank, 10, start=10)
    other = Net()
    again = wrapped(other, compressor)
    for end, state in zip((other, again, again.compression), saved, strict=True):
        end.load_state_dict(state)
    train(other, again, rank, 10, start=10)
    return parameters(model), parameters(other), again.compression.step


def test_saved_state_goes_on_bit_for_bit():
    for uninterrupted, resumed, step in run_horovod(resume_exactly, 2):
        assert_same_bits(resumed, uninterrupted)
        assert step == 20


def wrap_again(rank):
    model = build()
    optimizer = wrapped(model, LBGM())
    train(model, optimizer, rank, 2)
    optimizer = wrapped(model, Identity())
    train(model, optimizer, rank, 3, start=2)
    return parameters(model), optimizer.compression.step


def test_optimizer_that_is_thrown_away_sends_no_more():
    results = run_horovod(wrap_again, 2)
    assert_replicas_agree([result[0] for result in results])
    assert [steps for _, steps in results] == [3, 3]


class Waits(torch.autograd.Function):
    """Passes a gradient on only when the first message is with Horovod."""

    sent: threading.Event

    @staticmethod
    def forward(context, x):
        return x.clone()

    @staticmethod
    def backward(context, gradient):
        assert Waits.sent.wait(30), "nothing was sent during the backward pass"
        return gradient


def overlap(rank, freeze):
    torch.manual_seed(0)
    first, last = nn.Linear(32, 32), nn.Linear(32, 4)
    model = nn.ModuleDict({"first": first, "last": last})
    # Weight and bias of the last layer are one bucket.
    optimizer = wrapped(model, Identity(), bucket_cap_mb=0.0006)
    last.bias.requires_grad_(not freeze)
    transport = optimizer.compression.transport
    threads, begin = set(), transport.begin_gather
    Waits.sent = threading.Event()

    def watched(*arguments):
        pending = begin(*arguments)
        threads.add(threading.get_ident())
        Waits.sent.set()
        return pending

    transport.begin_gather = watched
    x, y = data(rank, 0)
    nn.functional.cross_entropy(last(Waits.apply(first(x))), y).backward()
    optimizer.step()
    return len(threads), threading.get_ident() in threads


@pytest.mark.parametrize("freeze", [False, True])
def test_messages_leave_during_the_backward_pass_on_one_thread(freeze):
    assert run_horovod(overlap, 2, freeze) == [(1, False)] * 2


def resnet_shaped(rank):
    import horovod.torch as hvd

    from benchmarks.common.shapes import resnet50_shapes

    named = [(n, nn.Parameter(torch.zeros(shape))) for n, shape in resnet50_shapes().items()]
    optimizer = torch.optim.SGD([p for _, p in named], lr=0.1)
    optimizer = DistributedOptimizer(optimizer, LBGM(TopK(0.001)), named)
    calls, gather = [], hvd.allgather_async

    def counted(*arguments, **options):
        calls.append(options["name"])
        return gather(*arguments, **options)

    hvd.allgather_async = counted
    try:
        for _, p in named:
            p.grad = torch.full_like(p, 1.0 + rank)
        optimizer.step()
    finally:
        hvd.allgather_async = gather
    return len(named), len(calls)


def test_step_of_resnet_50_takes_a_few_collectives():
    for tensors, collectives in run_horovod(resnet_shaped, 2):
        assert tensors == 161
        assert collectives <= 6


class Broken(Identity):
    """Fails at the third gradient on rank 1."""

    def encode(self, grad, state):
        import horovod.torch as hvd

        if int(state.get("count", 0)) == 2 and hvd.rank() == 1:
            raise ArithmeticError("the third gradient cannot be encoded")
        return super().encode(grad, {"count": int(state.get("count", 0)) + 1})


def broken(rank):
    model = build()
    optimizer = wrapped(model, Broken(), bucket_cap_mb=25)
    train(model, optimizer, rank, 2)
    messages = []
    for _ in range(2):
        try:
            backward(model, rank, 2)
            optimizer.step()
        except Exception as error:
            messages.append(f"{type(error).__name__}: {error}")
    return messages


def test_error_while_encoding_reaches_the_caller_and_the_other_ranks():
    (first, later), (second, _) = run_horovod(broken, 2)
    assert second == "ArithmeticError: the third gradient cannot be encoded"
    assert first == "RuntimeError: rank 1 failed before it could send: see the error there"
    assert "load a checkpoint" in later


def different(rank, what):
    model = build()
    compressor = LBGM(delta=0.3 if what == "compressor" and rank == 1 else 0.2)
    caps = {"bucket_cap_mb": 1 + rank} if what == "bucket" else {}
    train(model, wrapped(model, compressor, **caps), rank, 1)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("compressor", "rank 0 has compressor LBGM() where rank 1 has compressor LBGM(delta=0.3)"),
        ("bucket", "rank 0 has bucket_cap_mb 1 where rank 1 has bucket_cap_mb 2"),
    ],
)
def test_different_arguments_are_told_at_the_first_step_on_every_rank(what, message):
    for failed in run_horovod(different, 2, what, failures=True):
        assert isinstance(failed, Failed)
        assert failed.kind == "ValueError"
        assert message in failed.message


def bad_arguments(rank):
    import horovod.torch as hvd

    model = nn.Linear(3, 2)
    plain, named = sgd(model), list(model.named_parameters())
    found = []
    for arguments, options in (
        ((plain, "LBGM", named), {}),
        ((model, LBGM(), named), {}),
        ((plain, LBGM(), named[:1]), {}),
        ((plain, LBGM(), [("w", p) for _, p in named]), {}),
        ((plain, LBGM(), model.parameters()), {}),
        ((plain, LBGM(), named), {"backward_passes_per_step": 0}),
        ((plain, LBGM(), named), {"start_step": -1}),
        ((plain, LBGM(), named), {"weight": 0}),
        ((plain, LBGM(), named), {"bucket_cap_mb": 0}),
        ((plain, LBGM(), named), {"process_set": hvd.ProcessSet([0])}),
        ((plain, LBGM(), named), {"process_set": [0]}),
        ((plain, LBGM(), named), {"loss_scale": "dynamic"}),
        ((hvd.DistributedOptimizer(plain, named), LBGM(), named), {}),
        ((DistributedOptimizer(plain, LBGM(), named), LBGM(), named), {}),
    ):
        try:
            DistributedOptimizer(*arguments, **options)
        except (TypeError, ValueError) as error:
            found.append(f"{type(error).__name__}: {error}")
    sparse = nn.Embedding(4, 2, sparse=True)
    optimizer = DistributedOptimizer(sgd(sparse), LBGM())
    try:
        sparse(torch.tensor([1])).sum().backward()
        optimizer.step()
    except TypeError as error:
        found.append(str(error))
    return found


def test_bad_arguments_are_refused_in_words():
    expected = [
        "TypeError: expected a compressor such as LBGM(TopK(0.01)), not str",
        "TypeError: optimizer must be",
        "ValueError: named_parameters was specified, but one or more model parameters were not",
        "ValueError: named_parameters has two parameters of the name 'w': give those of one model",
        "TypeError: named_parameters has tensors without names, as model.parameters() has",
        "ValueError: backward_passes_per_step must be > 0",
        "ValueError: start_step must be",
        "ValueError: weight must be above 0",
        "ValueError: bucket_cap_mb must be above 0",
        "ValueError: Horovod or the process set is not initialised",
        "TypeError: process_set must be a horovod.torch.ProcessSet, not [0]: write process_set=hvd",
        "TypeError: loss_scale must be a number or a callable, not 'dynamic'",
        "ValueError: the optimizer is distributed already",
        "ValueError: the optimizer is distributed already",
        "the gradient of 'noname.0.0' is sparse, and compression needs dense ones",
    ]
    [found] = run_horovod(bad_arguments, 1)
    assert len(found) == len(expected)
    for message, part in zip(found, expected, strict=True):
        assert part in message


def test_example_trains_under_horovodrun():
    script = str(ROOT / "examples" / "horovod_train.py")
    done = horovodrun(["-np", "2", "--gloo", sys.executable, script], timeout=150)
    assert done.returncode == 0, done.stdout
    last = done.stdout.splitlines()[-1]
    assert float(last.split("accuracy ")[1].split(" ")[0]) > 0.85
    assert float(last.split(" of the dense bytes")[0].split()[-1].rstrip("%")) < 50


def elastic_job(folder, event):
    """Run tests/elastic_job.py, and return the results of its workers and what it printed."""
    images, labels = load_digits(return_X_y=True)
    torch.save(
        (torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)), folder / "digits.pt"
    )
    script = folder / "discover.sh"
    second = (
        "echo 127.0.0.1:1" if event == "kill" else f"[ -e {folder}/joining ] && echo 127.0.0.1:1"
    )
    script.write_text(f"#!/bin/sh\necho localhost:2\n{second}\ntrue\n")
    script.chmod(0o755)
    start = "3" if event == "kill" else "2"
    command = ["-np", start, "--min-np", "2", "--max-np", "3", "--gloo", "--network-interfaces=lo"]
    command += ["--host-discovery-script", str(script), "--elastic-timeout", "60"]
    job = str(ROOT / "tests" / "elastic_job.py")
    # Seconds that Horovod waits for a worker that was killed, by default 30; and milliseconds
    # between two looks for work, by default 1, which keep two cores busy.
    environment = {"HOROVOD_GLOO_TIMEOUT_SECONDS": "10", "HOROVOD_CYCLE_TIME": "5"}
    command += [sys.executable, job, str(folder), "150", event]
    done = horovodrun(command, timeout=180, environment=environment)
    return [json.loads(file.read_text()) for file in folder.glob("worker-*")], done.stdout


def check_history(history, full):
    """Check that replicas agree after every step, and that workers recycle before and after.

    With `full`, the step after the change must be full: a newcomer holds nothing. Survivors that
    keep their ranks may go on recycling, and those with other ranks may not.
    """
    sizes = [entry["size"] for entry in history]
    assert all(entry["same"] for entry in history)
    changes = [i for i in range(1, len(sizes)) if sizes[i] != sizes[i - 1]]
    assert len(changes) == 1
    assert not full or history[changes[0]]["recycled"] == 0
    assert any(entry["recycled"] for entry in history[: changes[0]])
    assert any(entry["recycled"] for entry in history[changes[0] :])
    return sizes[0], sizes[-1]


def test_elastic_job_goes_on_when_one_of_three_workers_is_killed(tmp_path):
    workers, printed = elastic_job(tmp_path, "kill")
    assert len(workers) == 2, printed
    assert workers[0]["fingerprint"] == workers[1]["fingerprint"]
    for worker in workers:
        assert worker["accuracy"] > 0.85
        assert check_history(worker["history"], full=False) == (3, 2)
        assert worker["history"][-1]["step"] == 149
    assert "OutOfSyncError" not in printed


def test_elastic_job_takes_in_a_worker_that_joins(tmp_path):
    workers, printed = elastic_job(tmp_path, "join")
    assert len(workers) == 3, printed
    assert len({worker["fingerprint"] for worker in workers}) == 1
    newcomers = [worker for worker in workers if worker["history"][0]["step"] > 0]
    assert len(newcomers) == 1
    assert not newcomers[0]["history"][0]["warm"]
    for worker in workers:
        assert worker["accuracy"] > 0.85
        if worker not in newcomers:
            assert check_history(worker["history"], full=True) == (2, 3)
    assert "OutOfSyncError" not in printed
