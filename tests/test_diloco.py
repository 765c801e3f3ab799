"""Local training: DiLoCo on real ranks of gloo, and long runs of ranks in threads."""

from __future__ import annotations

import copy
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lbgm_compress import LBGM, ErrorFeedback, Identity, LookBackSubspace, SignSGD, TopK
from lbgm_compress.adapters.diloco import DiLoCo
from lbgm_compress.collective import ProcessGroupTransport
from lbgm_compress.collective.local import LocalTraining
from lbgm_compress.collective.local.options import divided
from tests.compressors import COMPRESSORS, REDUCIBLES
from tests.invariant import check_invariant, keeps_invariant, residuals
from tests.laws import assert_same_bits, saved_and_loaded
from tests.loops import SHAPES, Given
from tests.rank_threads import Ranks
from tests.ranks import Failed, run_ranks
from tests.training import Net, assert_replicas_agree, data, parameters

ROOT = Path(__file__).parent.parent
EVERY = 6
RESIDUALS = ["model", "memory"]


def loss_of(model, rank, step):
    x, y = data(rank, step)
    return nn.functional.cross_entropy(model(x), y)


def inner_step(model, optimizer, rank, step):
    optimizer.zero_grad()
    loss_of(model, rank, step).backward()
    optimizer.step()


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-3)


def nesterov(model):
    return torch.optim.SGD(model.parameters(), lr=0.7, momentum=0.9, nesterov=True)


# --- against DiLoCo in plain torch ----------------------------------------------------------------


def transcription(workers, steps, fragments=1, delay=0, batches=1):
    """DiLoCo (arXiv 2311.08105, algorithm 1), with the schedule of Streaming DiLoCo (2501.18512).

    All workers are in this process. The average of a fragment is applied `delay` steps after it was
    taken, and a worker keeps the steps that it has made since. With `batches`, a worker takes the
    batches of as many ranks in each step.
    """
    torch.manual_seed(0)
    common = Net()
    models = [copy.deepcopy(common) for _ in range(workers)]
    inner = [adamw(model) for model in models]
    outer = nesterov(common)
    parts = divided(dict(common.named_parameters()), fragments)
    under_way = None

    def apply(averages, then):
        outer.zero_grad()
        for name, mean in averages.items():
            common.get_parameter(name).grad = mean
        outer.step()
        for model, of in zip(models, then, strict=True):
            for name, before in of.items():
                p = model.get_parameter(name).data
                p.copy_(common.get_parameter(name).data + (p - before))

    for step in range(1, steps + 1):
        for worker, (model, optimizer) in enumerate(zip(models, inner, strict=True)):
            optimizer.zero_grad()
            for batch in range(batches):
                (loss_of(model, worker * batches + batch, step) / batches).backward()
            optimizer.step()
        for part, names in enumerate(parts):
            if step % EVERY == (part + 1) * EVERY // fragments % EVERY:
                then = [{name: parameters(model)[name] for name in names} for model in models]
                old = parameters(common)
                means = {n: sum(old[n] - of[n] for of in then) / workers for n in names}
                under_way = (step + delay, means, then)
        if under_way is not None and under_way[0] == step:
            apply(*under_way[1:])
            under_way = None
    last = parameters(common)
    if under_way is not None:
        apply(*under_way[1:])
    return last, {n: sum(parameters(m)[n] for m in models) / workers for n in last}


CASES = [
    {"residual": "model"},
    {"residual": "memory"},
    {"fragments": 3},
    {"delay": 2},
    {"fragments": 3, "delay": 1, "residual": "memory"},
]


def train_cases(rank, cases):
    results = []
    for options in cases:
        torch.manual_seed(rank)
        if rank == 0:
            torch.manual_seed(0)
        model = Net()
        optimizer = adamw(model)
        with DiLoCo(model, optimizer, Identity(), EVERY, **options) as diloco:
            for step in range(1, 10 * EVERY + 1):
                inner_step(model, optimizer, rank, step)
            with diloco.common_model() as same:
                assert same is model
                common = parameters(model)
        results.append((common, parameters(model)))
    return results


@pytest.mark.timeout(120)
@pytest.mark.parametrize("world", [2, 3])
def test_without_loss_it_is_diloco(world):
    results = run_ranks(train_cases, world, CASES, timeout=100)
    assert_replicas_agree(results)
    for options, (common, final) in zip(CASES, results[0], strict=True):
        schedule = {key: value for key, value in options.items() if key != "residual"}
        expected, mean = transcription(world, 10 * EVERY, **schedule)
        for name in expected:
            for found, right in ((common, expected), (final, mean)):
                close = torch.allclose(found[name], right[name], rtol=1e-4, atol=1e-6)
                assert close, (options, name, (found[name] - right[name]).abs().max())


# --- all ranks have one common model --------------------------------------------------------------


def accepted(compressors):
    """Return pairs of a compressor and a place for its residual."""
    return [(c, r) for c in compressors for r in RESIDUALS if r == "memory" or not c.has_residual]


def given(rank, step, size=1.0):
    """Return gradients that do not depend on the parameters."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return {n: size * torch.randn(shape, generator=generator) for n, shape in SHAPES.items()}


class Run:
    """Local training of one rank by SGD on gradients that are given."""

    def __init__(self, transport, compressor, lr=0.1, outer_lr=1.0, **options):
        self.rank = transport.rank
        self.model = Given()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=lr)
        outer = torch.optim.SGD(self.model.parameters(), lr=outer_lr)
        self.training = LocalTraining(
            self.model, self.optimizer, compressor, transport, outer_optimizer=outer, **options
        )
        self.true = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
        self.lr = lr

    def step(self, grads):
        self.optimizer.zero_grad()
        self.model(grads).backward()
        self.optimizer.step()
        for name, grad in grads.items():
            self.true[name] += self.lr * grad
        self.training.step()

    def common(self):
        with self.training.common_model():
            return parameters(self.model)


def every_compressor(rank, cases):
    transport = ProcessGroupTransport(dist.group.WORLD)
    results = []
    for compressor, residual in cases:
        run = Run(transport, compressor, sync_every=2, residual=residual)
        commons = []
        for step in range(5):
            run.step(given(rank, step))
            commons.append(run.common())
        run.training.finish()
        results.append((commons, parameters(run.model)))
    return results


@pytest.mark.timeout(120)
@pytest.mark.parametrize("world", [2, 3])
def test_common_models_are_bit_equal_for_every_compressor(world):
    cases = accepted([*COMPRESSORS, *REDUCIBLES])
    results = run_ranks(every_compressor, world, cases, timeout=100)
    for i, case in enumerate(cases):
        for other in results[1:]:
            assert_same_bits(other[i], results[0][i], repr(case))


# --- nothing is lost ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def three():
    ranks = Ranks(3)
    yield ranks
    ranks.close()


def linear(rank, transport, compressor, refused=False, inf_at=None, **options):
    """Train on given gradients.

    Return what `check_invariant` needs, the model at the end, and its largest entry before it.
    """
    calls = []

    def accept(averages):
        calls.append(averages)
        return len(calls) % 3 != 2

    run = Run(transport, compressor, sync_every=4, accept=accept if refused else None, **options)
    start = parameters(run.model)
    for step in range(22 + rank):
        grads = given(rank, step)
        if step == inf_at and rank == 1:
            # What this worker has of this parameter beyond the common model is lost.
            lost = run.common()["matrix"] - parameters(run.model)["matrix"]
            left = run.true["matrix"] - lost
            grads["matrix"][2, 3] = float("inf")
            run.step(grads)
            assert torch.equal(run.common()["matrix"], parameters(run.model)["matrix"])
            run.true["matrix"] = left
        else:
            run.step(grads)
    largest = max(float(p.abs().max()) for p in parameters(run.model).values() if p.numel())
    run.training.finish()
    kept = residuals(run.training._averager.state_dict())
    final = parameters(run.model)
    # In units of the learning rate the mean of the models goes down by true - residual.
    applied = {name: start[name] - p for name, p in final.items()}
    return applied, run.true, kept, final, largest


# A majority vote is not the mean of what was sent.
# Sums in float16 are rounded after each addition, which no residual holds.
EXACT = [r for r in REDUCIBLES if getattr(r, "inner", r).values == "float32"]
LOSSLESS = [
    (compressor, residual)
    for compressor, residual in accepted([*COMPRESSORS, *EXACT])
    if not compressor.finishes_average
    and (
        residual == "model"
        or keeps_invariant(compressor if compressor.has_residual else ErrorFeedback(compressor))
    )
]
SCHEDULES = {
    "plain": {},
    "fragments": {"fragments": 3},
    "delay": {"delay": 3},
    "both": {"fragments": 2, "delay": 1},
    "weights": {"weights": [1.0, 2.0, 5.0]},
    "refused rounds": {"refused": True},
    "refused rounds, fragments and delay": {"refused": True, "fragments": 2, "delay": 1},
    "inf": {"inf_at": 11},
}


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.filterwarnings("ignore:1 of this worker's parameters have inf or nan")
def test_nothing_is_lost(three, schedule):
    """The mean of all models goes the way that all gradients together say, whatever is sent."""
    options = dict(schedule)
    weights = options.pop("weights", [1.0] * 3)
    for compressor, residual in LOSSLESS if not schedule else LOSSLESS[::5]:

        def train(rank, weight, compressor=compressor, residual=residual):
            transport = three.transports[rank]
            return linear(rank, transport, compressor, residual=residual, weight=weight, **options)

        results = three.run(train, weights)
        assert_replicas_agree([final for _, _, _, final, _ in results])
        applied, true, kept = results[0][0], [r[1] for r in results], [r[2] for r in results]
        shares = [weight / sum(weights) for weight in weights]
        # Signs without a magnitude diverge, and then the models themselves are rounded.
        tolerance = max(1e-5, 3e-7 * max(r[4] for r in results))
        try:
            check_invariant(applied, true, kept, shares, tolerance)
        except AssertionError as error:
            raise AssertionError(f"{compressor!r}, {residual}: {error}") from None


def test_without_a_process_group_the_error_says_what_to_call():
    model = Small()
    with pytest.raises(RuntimeError, match="init_process_group"):
        DiLoCo(model, adamw(model), TopK(0.1))


# --- saved states ---------------------------------------------------------------------------------


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(32, 16), nn.Tanh(), nn.Linear(16, 4))

    def forward(self, x):
        return self.layers(x)


class Trained:
    """A small model that a rank trains by AdamW."""

    def __init__(self, transport, compressor, **options):
        self.rank = transport.rank
        self.model = Small()
        # Threads share the global generator.
        generator = torch.Generator().manual_seed(transport.rank)
        for p in self.model.parameters():
            nn.init.normal_(p, std=0.2, generator=generator)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        self.training = LocalTraining(
            self.model, self.optimizer, compressor, transport, sync_every=EVERY, **options
        )

    def go(self, start, end, skipped=()):
        for step in range(start, end):
            self.optimizer.zero_grad()
            loss_of(self.model, self.rank, step).backward()
            if step not in skipped:
                self.optimizer.step()
                self.training.step()

    def state(self):
        parts = (self.model, self.optimizer, self.training)
        return saved_and_loaded([part.state_dict() for part in parts])

    def load(self, states):
        for part, state in zip((self.model, self.optimizer, self.training), states, strict=True):
            part.load_state_dict(state)

    def common(self):
        with self.training.common_model():
            return parameters(self.model)

    def finished(self):
        self.training.finish()
        return parameters(self.model)


RESUMED = [
    (TopK(0.1, "int2"), {}),
    (TopK(0.1), {"delay": 2, "residual": "memory"}),
    (LBGM(TopK(0.2), delta=0.6), {"fragments": 2, "delay": 2}),
    (ErrorFeedback(LookBackSubspace(2, 0.5, values="int4")), {"residual": "memory"}),
    (LookBackSubspace(2), {"fragments": 3, "delay": 1}),
    (SignSGD(scaled=True), {"delay": 5}),
]


@pytest.mark.parametrize(("compressor", "options"), RESUMED, ids=repr)
def test_resuming_goes_on_bit_for_bit(three, compressor, options):
    """In the middle of a round, at an exchange, and while one is under way."""
    saved_at = [3, 6, 7, 13, 17, 18, 20]

    def train(rank):
        run, states = Trained(three.transports[rank], compressor, **options), []
        for start, end in zip([0, *saved_at], [*saved_at, 27], strict=True):
            run.go(start, end)
            states.append(run.state())
        return states[:-1], run.finished()

    def resume(rank, state, start):
        run = Trained(three.transports[rank], compressor, **options)
        run.load(state)
        run.go(start, 27)
        return run.finished()

    uninterrupted = three.run(train)
    for number, start in enumerate(saved_at):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            states = [states[number] for states, _ in uninterrupted]
            resumed = three.run(resume, states, [start] * 3)
        assert_same_bits(resumed, [final for _, final in uninterrupted])


@pytest.mark.parametrize(("compressor", "options"), RESUMED, ids=repr)
def test_ranks_may_take_different_numbers_of_steps(three, compressor, options):
    """As where a GradScaler skips steps; `finish` does not wait for further exchanges."""

    def train(rank):
        run = Trained(three.transports[rank], compressor, **options)
        commons = {}
        for step in range(40):
            # Rank 1 skips steps, and rank 2 is further.
            run.go(step, step + 1, skipped=range(3, 40, 4) if rank == 1 else ())
            if rank == 2 and step > 30:
                run.go(100 + step, 101 + step)
            if run.training._due is None:
                commons[run.training.exchanges] = run.common()
        first = run.finished()
        run.go(40, 40 + 5 * rank)
        again = run.finished()
        assert_same_bits(run.common(), again)
        run.go(60, 80)
        return commons, first, again, run.finished()

    results = three.run(train)
    assert_replicas_agree([finals for _, *finals in results])
    commons = [of for of, *_ in results]
    both = set.intersection(*map(set, commons))
    assert len(both) > 2
    for number in both:
        assert_replicas_agree([of[number] for of in commons])


@pytest.mark.parametrize("which", [(0, 1, 2), (1,), (0, 2)], ids=repr)
def test_going_back_while_an_exchange_is_under_way(three, which):
    def train(rank):
        run = Trained(three.transports[rank], LBGM(TopK(0.2)), delay=3)
        run.go(0, 9)
        saved = run.state()
        run.go(9, 19)
        assert run.training._pending is not None
        if rank in which:
            run.load(saved)
            run.go(9, 19)
        run.go(19, 40)
        return run.finished()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        results = three.run(train)
    assert_replicas_agree(results)
    if len(which) == 3:
        resumed = three.run(lambda rank: resumed_alone(three, rank))
        assert_same_bits(results, resumed)


def resumed_alone(three, rank):
    run = Trained(three.transports[rank], LBGM(TopK(0.2)), delay=3)
    run.go(0, 40)
    return run.finished()


@pytest.mark.parametrize(("compressor", "options"), RESUMED, ids=repr)
@pytest.mark.parametrize("which", ["other steps", "one rank", "rank 0's", "a rank less"])
def test_states_that_do_not_fit_leave_one_common_model(three, compressor, options, which):
    saved_at = [8, 14, 20]

    def train(rank):
        run, states = Trained(three.transports[rank], compressor, **options), []
        for start, end in zip([0, *saved_at], [*saved_at, 22], strict=True):
            run.go(start, end)
            states.append(run.state())
        return states

    states = three.run(train)

    def resume(rank):
        run = Trained(three.transports[rank], compressor, **options)
        state = {
            "other steps": states[rank][rank],
            "one rank": states[1][1] if rank == 1 else None,
            "rank 0's": states[0][2],
            "a rank less": states[rank][2] if rank < 2 else None,
        }[which]
        if state is not None:
            run.load(state)
        run.go(22, 23)
        if which == "rank 0's" and rank > 0:
            # It has taken neither the model nor the residual of rank 0.
            assert_same_bits(parameters(run.model), run.common())
            assert residuals(run.training._averager.state_dict()) == {}
        run.go(23, 50)
        return run.finished()

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        results = three.run(resume)
    messages = {re.sub(r"^the ranks do not hold.*", "", str(w.message)) for w in caught} - {""}
    if which == "rank 0's":
        assert len(messages) == 2
        assert all("is that of rank 0 of 3, and this is rank" in message for message in messages)
    else:
        [message] = messages
        assert "have other common models than rank" in message
        assert len([w for w in caught if str(w.message) == message]) == 3
    assert_replicas_agree(results)


def test_finish_right_after_rank_0_s_state_counts_its_steps_once(three):
    def train(rank):
        run = Trained(three.transports[rank], TopK(0.2))
        run.go(0, 9)
        return run.state(), run.common()

    (state, common), *_ = three.run(train)

    def resume(rank):
        run = Trained(three.transports[rank], TopK(0.2))
        run.load(copy.deepcopy(state))
        return run.finished()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        results = three.run(resume)
    assert_replicas_agree(results)
    for name, p in results[0].items():
        expected = common[name] + (state[0][name] - common[name]) / 3
        assert torch.allclose(p, expected, rtol=1e-5, atol=1e-7)


# --- failures -------------------------------------------------------------------------------------


def die(rank, delay):
    model = Small()
    optimizer = adamw(model)
    with DiLoCo(model, optimizer, TopK(0.1), EVERY, delay=delay):
        for step in range(20):
            inner_step(model, optimizer, rank, step)
            if rank == 1 and step == 9:
                os._exit(1)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("delay", [0, 3])
def test_when_a_rank_dies_the_others_fail_within_the_time_out(delay):
    first, second, third = run_ranks(die, 3, delay, failures=True, timeout=40, group_timeout=10)
    assert second is None
    for failed in (first, third):
        assert isinstance(failed, Failed)
        assert failed.kind == "RuntimeError"
        # With a delay the steps go on until the exchange is to be applied.
        assert re.fullmatch(
            "exchange 2, step 1[2-5]: another rank is gone or did not answer in time: load a "
            "checkpoint to go on",
            failed.message,
        )


def leave(rank):
    model = Small()
    optimizer = adamw(model)
    with DiLoCo(model, optimizer, TopK(0.1), EVERY):
        for step in range(20):
            inner_step(model, optimizer, rank, step)
            if rank == 1 and step == 9:
                raise ArithmeticError("the loss is too large")


@pytest.mark.timeout(120)
def test_an_error_within_the_block_is_not_held_up_by_the_other_ranks():
    first, second = run_ranks(leave, 2, failures=True, timeout=40, group_timeout=10)
    assert (second.kind, second.message) == ("ArithmeticError", "the loss is too large")
    assert first.kind == "RuntimeError"
    assert first.message.startswith("exchange 2, step 12: another rank is gone or did not answer")


@pytest.mark.parametrize("delay", [0, 2])
def test_error_of_one_rank_reaches_it_and_the_others(three, delay):
    errors = [None] * 3

    def encode(*arguments, **options):
        raise ArithmeticError("this cannot be encoded")

    def train(rank):
        run = Trained(three.transports[rank], TopK(0.2), delay=delay)
        run.go(0, 10)
        saved = run.state()
        sender = run.training._averager.sender
        if rank == 1:
            sender.encode = encode
        for _ in range(2):
            try:
                run.go(10, 20)
            except Exception as error:
                errors[rank] = [*(errors[rank] or []), f"{type(error).__name__}: {error}"]
        if rank == 1:
            del sender.encode
        # As the error says.
        run.load(saved)
        run.go(10, 30)
        return run.finished()

    assert_replicas_agree(three.run(train))
    assert [found[0] for found in errors] == [
        "RuntimeError: rank 1 failed before it could send: see the error there",
        "ArithmeticError: this cannot be encoded",
        "RuntimeError: rank 1 failed before it could send: see the error there",
    ]
    assert all("load a checkpoint" in found[1] for found in errors)


@pytest.mark.parametrize("delay", [0, 2])
@pytest.mark.parametrize("residual", RESIDUALS)
def test_ranks_that_disagree_about_an_exchange_end_with_one_common_model(three, delay, residual):
    """`accept` raises an error on rank 0, which goes on, or says another thing than elsewhere."""

    def train(rank):
        calls = []

        def accept(averages):
            calls.append(averages)
            if rank == 0 and len(calls) == 2:
                raise ArithmeticError("not to be judged")
            return rank != 2 or len(calls) != 4

        run = Trained(
            three.transports[rank], TopK(0.2), delay=delay, residual=residual, accept=accept
        )
        errors = 0
        for step in range(45):
            try:
                run.go(step, step + 1)
            except ArithmeticError:
                errors += 1
        return run.finished(), errors

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        results = three.run(train)
    assert [errors for _, errors in results] == [1, 0, 0]
    assert_replicas_agree([final for final, _ in results])
    messages = {str(warning.message)[:60] for warning in caught}
    assert messages == {
        "ranks [0] have other common models than rank 1, as after loa",
        "ranks [2] have other common models than rank 0, as after loa",
    }


# --- models and loops as people write them --------------------------------------------------------


class Odd(nn.Module):
    """Tied weights, BatchNorm, a scalar, an empty parameter, integers and a causal mask."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(32, 8)
        self.norm = nn.BatchNorm1d(8)
        self.second = nn.Linear(8, 32, bias=False)
        self.second.weight = nn.Parameter(self.first.weight.detach().t().clone())
        self.third = nn.Linear(8, 32, bias=False)
        self.third.weight = self.second.weight
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.nothing = nn.Parameter(torch.zeros(3, 0))
        self.table = nn.Parameter(torch.arange(4), requires_grad=False)
        self.register_buffer("mask", torch.full((3,), float("-inf")))
        self.register_buffer("constant", torch.tensor([0.1, 1 / 3, 1e-30]))
        self.register_buffer("empty", torch.zeros(0))

    def forward(self, x):
        hidden = self.norm(self.first(x)).relu()
        return (self.second(hidden) + self.third(hidden)) * self.scale


def odd_models(rank):
    results = []
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        for compressor, options in [(TopK(0.3), {}), (LBGM(), {"fragments": 3, "delay": 1})]:
            torch.manual_seed(10 + rank)
            model = Odd().to(dtype)
            with torch.no_grad():
                model.table += rank
            optimizer = adamw(model)
            with DiLoCo(model, optimizer, compressor, EVERY, **options) as diloco:
                begun = copy.deepcopy(model.state_dict())
                for step in range(14):
                    x, y = data(rank, step, dtype)
                    model.first.weight.requires_grad_(not 4 <= step < 9)
                    optimizer.zero_grad()
                    nn.functional.cross_entropy(model(x).float(), y).backward()
                    grads = {
                        n: None if p.grad is None else p.grad.clone()
                        for n, p in model.named_parameters()
                    }
                    optimizer.step()
                    after = {n: p.grad for n, p in model.named_parameters()}
                    assert_same_bits(after, grads, "an exchange leaves gradients alone")
                own = model.norm.running_mean.clone()
                with diloco.common_model():
                    common = parameters(model)
            results.append((begun, common, copy.deepcopy(model.state_dict()), own))
    return results


@pytest.mark.timeout(120)
def test_odd_models_begin_and_end_alike():
    results = run_ranks(odd_models, 2)
    for (begun, common, final, own), (begun2, common2, final2, own2) in zip(*results, strict=True):
        assert_same_bits([begun2, common2, final2], [begun, common, final])
        assert begun["table"].tolist() == final["table"].tolist() == [0, 1, 2, 3]
        assert_same_bits(final["mask"], begun["mask"])
        assert_same_bits(final["constant"], begun["constant"])
        assert not torch.equal(own, own2)
        mean = (own.double() + own2.double()) / 2
        assert_same_bits(final["norm.running_mean"], mean.to(own.dtype))
        assert final["norm.num_batches_tracked"] == 14


def frozen_layer(rank, transport):
    """Train a layer, freeze it, and unfreeze it; return it before and after it was frozen."""
    model = Small()
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        nn.init.normal_(p, std=0.2, generator=generator)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    training = LocalTraining(model, optimizer, Identity(), transport, sync_every=3)
    layer, found = model.layers[0], []
    for start, frozen in ((0, False), (6, True), (12, False), (18, None)):
        found.append(layer.weight.detach().clone())
        if frozen is None:
            break
        layer.requires_grad_(not frozen)
        for step in range(start, start + 6):
            optimizer.zero_grad(set_to_none=True)
            loss_of(model, rank, step).backward()
            optimizer.step()
            training.step()
    return found


def test_nothing_is_written_to_a_frozen_layer(three):
    """The momentum of the outer optimizer does not go on in it."""
    results = three.run(lambda rank: frozen_layer(rank, three.transports[rank]))
    assert_replicas_agree(results)
    start, trained, frozen, unfrozen = results[0]
    assert_same_bits(trained, frozen)
    assert not torch.equal(start, trained)
    assert not torch.equal(frozen, unfrozen)


def loop_with_everything(rank):
    """An outer optimizer that was used before, schedulers, accumulation, a skipping scaler."""
    torch.manual_seed(0)
    model = Small()
    outer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for step in range(3 * rank):
        inner_step(model, outer, rank, step)
    outer_schedule = torch.optim.lr_scheduler.StepLR(outer, 2, 0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 40)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    commons = {}
    with DiLoCo(model, optimizer, TopK(0.3), 5, outer) as diloco:
        for step in range(40):
            optimizer.zero_grad()
            for part in range(2):
                loss = loss_of(model, rank, 2 * step + part)
                if rank == 1 and step % 9 == 7:
                    loss = loss * float("inf")
                scaler.scale(loss / 2).backward()
            before = diloco.exchanges
            scaler.step(optimizer)
            scaler.update()
            schedule.step()
            if diloco.exchanges > before:
                outer_schedule.step()
                with diloco.common_model():
                    commons[diloco.exchanges] = parameters(model)
    return commons, parameters(model), diloco.local_step, diloco.exchanges


@pytest.mark.timeout(120)
def test_schedulers_accumulation_and_skipped_steps():
    (commons, final, steps, exchanges), (commons2, final2, steps2, exchanges2) = run_ranks(
        loop_with_everything, 2
    )
    assert_same_bits(final2, final)
    for number in commons.keys() & commons2.keys():
        assert_same_bits(commons[number], commons2[number])
    assert len(commons.keys() & commons2.keys()) >= 6
    assert steps == 40
    assert exchanges == exchanges2 == 8
    assert steps2 == 36


DIFFERENT = {
    "sync_every": (
        {"sync_every": 4},
        {"sync_every": 5},
        "sync_every 4 where rank 1 has sync_every 5",
    ),
    "compressor": (
        {"compressor": TopK(0.1)},
        {"compressor": TopK(0.2)},
        "compressor TopK(0.1) where rank 1 has compressor TopK(0.2)",
    ),
    "residual": (
        {"residual": "model"},
        {"residual": "memory"},
        "residual model where rank 1 has residual memory",
    ),
    "final": ({"final": TopK(0.5)}, {}, "final TopK(0.5) where rank 1 has final Identity()"),
    "delay": ({"delay": 1}, {}, "delay 1 where rank 1 has delay 0"),
    "fragments": ({"fragments": 2}, {}, "fragments 2 where rank 1 has fragments 1"),
    "outer optimizer": (
        {"lr": 0.7},
        {"lr": 0.5},
        "rank 0 has outer_optimizer lr 0.7 where rank 1 has outer_optimizer lr 0.5",
    ),
    "model": ({"model": Small}, {"model": Net}, "where rank 1 has parameter 'layers.0.weight' of"),
    "buffers": ({"model": Odd}, {"model": lambda: other_buffer()}, "buffer 'mask' of shape (3,)"),
}


def other_buffer():
    model = Odd()
    model.mask = torch.zeros(7)
    return model


def different(rank):
    found = {}
    for name, (first, second, _) in DIFFERENT.items():
        options = dict((first, second)[rank])
        model = options.pop("model", Small)()
        outer = torch.optim.SGD(model.parameters(), lr=options.pop("lr", 0.7))
        compressor = options.pop("compressor", Identity())
        try:
            DiLoCo(model, adamw(model), compressor, outer_optimizer=outer, **options)
        except ValueError as error:
            found[name] = str(error)
    return found


@pytest.mark.timeout(120)
def test_different_options_are_told_on_every_rank():
    for found in run_ranks(different, 2):
        for name, (_, _, message) in DIFFERENT.items():
            assert message in found.get(name, "no error"), name


def counted(rank):
    model = Small()
    optimizer = adamw(model)
    size = sum(p.numel() for p in model.parameters())
    with DiLoCo(model, optimizer, TopK(0.1), EVERY, final=TopK(1.0, "int4")) as diloco:
        for step in range(3 * EVERY):
            inner_step(model, optimizer, rank, step)
        before = diloco.stats()
    stats = diloco.stats()
    # A closed one counts no more steps.
    inner_step(model, optimizer, rank, 0)
    assert diloco.stats() == stats
    return size, before, stats


def test_all_exchanges_are_counted_the_last_one_too():
    for size, before, stats in run_ranks(counted, 2):
        assert before["exchanges"] == stats["exchanges"] == 3
        assert before["local_steps"] == stats["local_steps"] == 3 * EVERY
        assert before["dense_bytes"] == 3 * 4 * size
        assert stats["dense_bytes"] == 4 * 4 * size
        # Four bits a parameter, and scales.
        assert size / 2 < stats["message_bytes"] - before["message_bytes"] < size
        assert before["final_bytes"] == 0
        assert stats["final_bytes"] == stats["message_bytes"] - before["message_bytes"]
        assert stats["ratio"] == stats["message_bytes"] / stats["dense_bytes"]
        assert stats["bits_per_step"] == 8 * stats["message_bytes"] / size / (3 * EVERY)


# --- nodes of several ranks -----------------------------------------------------------------------


def in_nodes(rank, model=None):
    """Return a model in DistributedDataParallel on this rank's node, of two ranks."""
    node, _ = dist.new_subgroups(group_size=2)
    torch.manual_seed(0 if model is None else rank // 2)
    # A parameter without elements is not used.
    options = {"find_unused_parameters": model is not None}
    return DistributedDataParallel(model or Net(), process_group=node, **options)


def train_nodes(rank, cases):
    results = []
    for compressor, options in cases:
        model = in_nodes(rank)
        optimizer = adamw(model)
        history = []
        with DiLoCo(model, optimizer, compressor, EVERY, **options) as diloco:
            for step in range(1, 5 * EVERY + 1):
                inner_step(model, optimizer, rank, step)
                history.append(parameters(diloco.model))
            common = None
            if rank % 2 == 0:
                with diloco.common_model():
                    common = parameters(diloco.model)
            else:
                with pytest.raises(RuntimeError, match="first rank of each node holds the common"):
                    diloco.common_model().__enter__()
        results.append((history, common, parameters(diloco.model), diloco.stats()))
    return results


NODE_CASES = [
    (Identity(), {}),
    (Identity(), {"fragments": 3, "delay": 1, "residual": "memory"}),
    (TopK(0.1, "int2"), {}),
    (LBGM(TopK(0.2)), {"fragments": 2, "delay": 2}),
]


@pytest.mark.timeout(120)
def test_ranks_of_a_node_are_one_worker():
    results = run_ranks(train_nodes, 4, NODE_CASES, timeout=100)
    for i, (compressor, options) in enumerate(NODE_CASES):
        (history, common, final, stats), second, third, fourth = (of[i] for of in results)
        assert_same_bits(second[0], history)
        assert_same_bits(fourth[0], third[0])
        assert_same_bits(third[1], common)
        assert_replicas_agree([of[i][2] for of in results])
        assert stats["message_bytes"] > second[3]["message_bytes"] == 0
        assert {of[i][3]["exchanges"] for of in results} == {stats["exchanges"]}
        if compressor == Identity():
            schedule = {key: of for key, of in options.items() if key != "residual"}
            expected, mean = transcription(2, 5 * EVERY, **schedule, batches=2)
            for name in expected:
                assert torch.allclose(common[name], expected[name], rtol=1e-4, atol=1e-6)
                assert torch.allclose(final[name], mean[name], rtol=1e-4, atol=1e-6)


def node_run(rank, compressor, options, load=None):
    """Train in nodes, and return the states at some steps, the common model and the last model."""
    model = in_nodes(rank, model=Odd())
    optimizer = adamw(model)
    diloco = DiLoCo(model, optimizer, compressor, EVERY, **options)
    parts = (model.module, optimizer, diloco)
    states = {}
    start = 0
    if load is not None:
        start, state = load
        # A copy, since optimizers go on in the tensors that they load.
        for part, of in zip(parts, copy.deepcopy(state), strict=True):
            part.load_state_dict(of)
    for step in range(start, 26):
        if step in (9, 13, 20):
            states[step] = saved_and_loaded([part.state_dict() for part in parts])
        inner_step(model, optimizer, rank, step)
    diloco.finish()
    diloco.close()
    return states, copy.deepcopy(model.module.state_dict())


def resume_nodes(rank):
    warnings.simplefilter("ignore")
    found = {}
    for compressor, options in NODE_CASES[2:]:
        states, final = node_run(rank, compressor, options)
        for step, state in states.items():
            _, again = node_run(rank, compressor, options, (step, state))
            assert_same_bits(again, final, f"{compressor!r}, from step {step}")
        # Rank 0 saves for its node, or for all; a node goes back further.
        for name, others, step in (("node", [0, 0, 2, 2], 13), ("all", [0] * 4, 20)):
            gathered = [None] * 4
            dist.all_gather_object(gathered, states[step])
            load = (step, gathered[others[rank]])
            _, again = node_run(rank, compressor, options, load)
            if name == "node":
                assert_same_bits(again, final)
            found[f"{compressor!r} {name}"] = again
        back = 9 if rank < 2 else 20
        found[f"{compressor!r} back"] = node_run(rank, compressor, options, (back, states[back]))[1]
    return found


@pytest.mark.timeout(120)
def test_nodes_resume_bit_for_bit():
    assert_replicas_agree(run_ranks(resume_nodes, 4, timeout=100))


def nodes_with_trouble(rank):
    warnings.simplefilter("ignore")
    found = []
    for delay in (0, 2):
        model = in_nodes(rank)
        optimizer = adamw(model)
        with DiLoCo(model, optimizer, TopK(0.3), EVERY, delay=delay) as diloco:
            for step in range(5 * EVERY):
                optimizer.zero_grad()
                loss = loss_of(model, rank, step)
                # All layers of node 1 have nan for some steps; node 0 skips some.
                (loss * float("nan") if rank == 3 and step == 8 else loss).backward()
                if rank > 1 or step % 7 != 3:
                    optimizer.step()
            assert all(bool(p.isfinite().all()) for p in model.parameters())
        # The inner optimizers of a node are in one state.
        own = parameters(model.module), optimizer.state_dict()["state"]
        every = [None] * 4
        dist.all_gather_object(every, own)
        assert_same_bits(own, every[rank // 2 * 2])
        found.append((own[0], diloco.exchanges))
    return found


@pytest.mark.timeout(120)
def test_nodes_with_nan_and_skipped_steps_end_alike():
    assert_replicas_agree(run_ranks(nodes_with_trouble, 4))


def node_that_fails(rank):
    errors = []
    for delay in (0, 2):
        model = in_nodes(rank)
        optimizer = adamw(model)
        diloco = DiLoCo(model, optimizer, Identity(), EVERY, delay=delay)
        if rank == 2:
            sender = diloco._training._averager.sender
            sender.encode = lambda *_, **__: (_ for _ in ()).throw(ArithmeticError("broken"))
        try:
            for step in range(9):
                inner_step(model, optimizer, rank, step)
        except Exception as error:
            errors.append(f"{type(error).__name__}: {error}")
        diloco.close()
    return errors


def test_an_error_of_the_first_rank_of_a_node_is_raised_on_the_node():
    told = "RuntimeError: the first rank of this node, which exchanges for all of them, failed: see"
    results = run_ranks(node_that_fails, 4, group_timeout=20)
    for found, expected in zip(
        results,
        ["RuntimeError: rank 1 failed before", told, "ArithmeticError: broken", told],
        strict=True,
    ):
        assert len(found) == 2
        assert all(error.startswith(expected) for error in found)


def wrong_nodes(rank):
    errors = []

    def attempt(model, **options):
        try:
            DiLoCo(model, adamw(model), Identity(), **options)
        except (TypeError, ValueError) as error:
            errors.append(str(error))

    attempt(DistributedDataParallel(Small()))
    pairs = [dist.new_group([0, 1]), dist.new_group([2])]
    some = [dist.new_group([0, 2]), dist.new_group([1])]
    model = DistributedDataParallel(Small(), process_group=pairs[rank // 2])
    attempt(model, process_group=some[rank % 2])
    attempt(model, sync_every=5 if rank == 1 else 6)
    attempt(model, final=TopK(0.5) if rank == 2 else None)
    optimizer = adamw(model)
    with DiLoCo(model if rank < 2 else model.module, optimizer, TopK(0.3), EVERY) as diloco:
        for step in range(9):
            inner_step(model, optimizer, rank, step)
        state = diloco.state_dict()
        try:
            if rank == 2:
                diloco.load_state_dict({"format": 1, "local_step": 3, "exchanges": 0})
        except ValueError as error:
            errors.append(str(error))
        try:
            if rank < 2:
                diloco.load_state_dict(state if rank == 0 else {})
        except ValueError as error:
            errors.append(str(error))
    return errors, parameters(model)


def test_nodes_need_not_be_of_one_size_and_wrong_ones_are_refused():
    results = run_ranks(wrong_nodes, 3, group_timeout=20)
    assert_replicas_agree([final for _, final in results])
    errors = [found for found, _ in results]
    for found in errors:
        assert "DistributedDataParallel has all ranks, so that there is no other" in found[0]
        assert "process_group has 1 of the 2 ranks of DistributedDataParallel's" in found[1]
        assert "rank 0 has sync_every 6 where rank 1 has sync_every 5" in found[2]
        assert "rank 0 has final Identity() where rank 2 has final TopK" in found[3]
    assert [len(found) for found in errors] == [4, 5, 5]
    assert "this is not a state" in errors[1][4]
    assert "the state of a rank that does not exchange: load the one that" in errors[2][4]


# --- examples -------------------------------------------------------------------------------------


def run_example(folder, name, *arguments):
    """Run an example on two ranks, and return its last line."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    found = subprocess.run(
        [*command, str(ROOT / "examples" / name), *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=180,
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
    )
    assert found.returncode == 0, found.stderr
    return found.stdout.splitlines()[-1]


@pytest.mark.timeout(200)
def test_example_trains_under_torchrun(tmp_path):
    last = run_example(tmp_path, "diloco_train.py")
    assert float(last.split("accuracy ")[1].split(" ")[0]) > 0.85
    assert float(last.split(" of the bytes")[0].split()[-1].rstrip("%")) < 1


def test_three_lines_switch_it_on():
    lines = (ROOT / "examples" / "diloco_train.py").read_text().splitlines()
    ddp = (ROOT / "examples" / "ddp_train.py").read_text().splitlines()
    named = [line for line in lines if re.search("DiLoCo|TopK", line) and '"""' not in line]
    assert len(named) == 3
    # What is before the model is as in the other example.
    assert (
        lines[lines.index("rank, world = dist.get_rank(), dist.get_world_size()") :][:7]
        == (ddp[ddp.index("rank, world = dist.get_rank(), dist.get_world_size()") :][:7])
    )


@pytest.mark.timeout(200)
def test_example_of_a_gpt_trains_under_torchrun(tmp_path):
    last = run_example(tmp_path, "gpt_diloco.py", "90")
    # Uniform bytes have 5.5.
    assert float(last.split("loss ")[1].split(" ")[0]) < 3.6
    assert float(last.split(" bits a parameter")[0].split()[-1]) < 0.5


# --- uses that would lose something ---------------------------------------------------------------


def test_nothing_trains_or_is_saved_within_common_model(three):
    def use(rank):
        run = Trained(three.transports[rank], TopK(0.1))
        run.go(0, 2)
        training = run.training
        with training.common_model():
            for call in (
                training.step,
                training.finish,
                training.state_dict,
                lambda: training.load_state_dict({}),
                training.common_model().__enter__,
            ):
                with pytest.raises(
                    RuntimeError, match="within common_model\\(\\): leave the block"
                ):
                    call()
        run.go(2, 8)
        return run.finished()

    assert_replicas_agree(three.run(use))


def test_a_model_that_is_loaded_before_diloco_is_built_is_noticed(three):
    """Building it gives all ranks the parameters of rank 0."""

    def save(rank):
        run = Trained(three.transports[rank], TopK(0.1))
        run.go(0, 8)
        return copy.deepcopy(run.state())

    saved = three.run(save)

    def load(rank):
        run = Trained(three.transports[rank], TopK(0.1))
        before = run.training.stats()
        run.training.load_state_dict(saved[rank][2])
        # What was sent before the state was saved is not counted here.
        assert run.training.stats() == before
        assert run.training.local_step == 8

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        three.run(load)
    expected = "build DiLoCo first, then load the model"
    assert sum(expected in str(warning.message) for warning in told) == 3


def finish_without_a_step(rank):
    model = Small()
    other = adamw(model)
    diloco = DiLoCo(model, adamw(model), TopK(0.1), EVERY)
    for step in range(EVERY + 2):
        inner_step(model, other, rank, step)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        diloco.finish()
    return [(str(of.message), of.filename) for of in told]


def test_finish_tells_of_an_optimizer_that_took_no_step():
    for [(message, file)] in run_ranks(finish_without_a_step, 2):
        assert message.startswith("the optimizer given to DiLoCo took no step: is it the one that")
        # The warning points at the line that calls `finish`.
        assert Path(file).name == "test_diloco.py"


def finish_too_late(rank):
    model = Small()
    optimizer = adamw(model)
    with DiLoCo(model, optimizer, TopK(0.1), EVERY):
        inner_step(model, optimizer, rank, 0)
        dist.destroy_process_group()


def test_finish_after_the_group_is_destroyed_is_told():
    for failed in run_ranks(finish_too_late, 2, failures=True):
        assert (failed.kind, failed.message) == (
            "RuntimeError",
            "the process group is destroyed: call finish() before destroy_process_group()",
        )


# --- on a GPU -------------------------------------------------------------------------------------


def train_on_a_gpu(rank, delay):
    torch.cuda.set_device(0)
    torch.manual_seed(0)
    model = Net().cuda()
    optimizer = adamw(model)
    common = []
    options = {"sync_every": EVERY, "fragments": 2, "delay": delay}
    with DiLoCo(model, optimizer, TopK(0.1, "int2"), **options) as diloco:
        for step in range(4 * EVERY):
            x, y = data(rank, step)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x.cuda()), y.cuda()).backward()
            optimizer.step()
            with diloco.common_model():
                common.append({name: p.cpu() for name, p in parameters(model).items()})
    return common, {name: p.cpu() for name, p in parameters(model).items()}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.timeout(200)
@pytest.mark.parametrize("delay", [0, 2])
def test_two_workers_on_one_gpu_exchange_over_gloo(delay):
    found = run_ranks(train_on_a_gpu, 2, delay, timeout=150)
    for first, second in zip(found[0][0], found[1][0], strict=True):
        assert_same_bits(first, second)
    assert_replicas_agree([of[1] for of in found])
