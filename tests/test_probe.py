"""The probe: its report against what senders send, and that it leaves the training alone."""

from __future__ import annotations

import csv
import gc
import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks import compare
from benchmarks.common.data import load
from benchmarks.common.partition import partition, subsets
from benchmarks.common.training import Training, Workers
from lbgm_compress import (
    LBGM,
    Atomo,
    ErrorFeedback,
    Identity,
    LookBackSubspace,
    NormBudget,
    Receiver,
    Sender,
    SignSGD,
    TopK,
)
from lbgm_compress.probe import DELTAS, LookBackProbe
from lbgm_compress.probe.__main__ import main
from tests.gradients import training_run
from tests.laws import assert_same_bits
from tests.ranks import run_ranks

ROOT = Path(__file__).parent.parent


def network(seed=0, dtype=torch.float32):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)).to(dtype)


def parameters_like(run):
    return [(name, torch.zeros_like(grad).requires_grad_()) for name, grad in run[0].items()]


def replayed(run, **arguments):
    probe = LookBackProbe(parameters_like(run), cost=None, **arguments)
    for grads in run:
        probe.observe(grads)
    return probe.report()


def sent(run, compressor):
    """Return bytes, and for each tensor shares and mean squared relative errors, of a sender."""
    sender, receiver = Sender(compressor), Receiver(compressor, run[0])
    total, recycled, errors = 0, dict.fromkeys(run[0], 0), dict.fromkeys([*run[0], None], 0.0)
    for grads in run:
        message = sender.compress(grads)
        decoded = receiver.decompress(0, message)
        total += message.numel()
        lost = norm = 0.0
        for name, grad in grads.items():
            recycled[name] += sender.report()[name].recycled
            missed = float((grad.double() - decoded[name].double()).square().sum())
            square = float(grad.double().square().sum())
            errors[name] += missed / square / len(run)
            lost, norm = lost + missed, norm + square
        errors[None] += lost / norm / len(run)
    shares = {name: count / len(run) for name, count in recycled.items()}
    return total, {**shares, None: sum(shares.values()) / len(shares)}, errors


def assert_rows_are_those_of_a_sender(rows, run, compressor):
    total, shares, errors = sent(run, compressor)
    assert {row.tensor for row in rows} == set(shares)
    for row in rows:
        assert row.method == repr(compressor)
        assert row.rounds == len(run)
        assert row.recycled_share == pytest.approx(shares[row.tensor], abs=1e-12)
        assert row.relative_error == pytest.approx(errors[row.tensor] ** 0.5, abs=2e-3)
        if row.tensor is None:
            assert row.bytes_per_step * row.steps * len(run) == pytest.approx(total, rel=1e-12)


@pytest.mark.parametrize("batch", [None, 32], ids=["full batch", "batches of 32"])
@pytest.mark.parametrize(
    "inner",
    [Identity(), TopK(0.1), SignSGD(scaled=True), Atomo(2), ErrorFeedback(TopK(0.05))],
    ids=repr,
)
def test_every_threshold_is_replayed_as_a_sender_would_send_it(inner, batch):
    run = training_run(60, batch)
    report = replayed(run, inner=inner)
    for delta in DELTAS:
        compressor = LBGM(inner, delta)
        rows = [r for r in report.rows if r.method == repr(compressor) and r.steps == 1]
        assert_rows_are_those_of_a_sender(rows, run, compressor)
    dense = Sender(Identity()).compress(run[0]).numel()
    assert report.dense_bytes == dense
    for row in report.all_tensors():
        assert row.of_dense == pytest.approx(row.bytes_per_step / dense)


def test_averages_are_replayed_as_a_sender_would_send_them():
    run = training_run(67, 32)
    report = replayed(run)
    for steps in (2, 4, 8, 16):
        rows = [row for row in report.rows if row.steps == steps]
        sums = [
            {n: sum(grads[n] for grads in run[start : start + steps]) for n in run[0]}
            for start in range(0, len(run) - steps + 1, steps)
        ]
        assert_rows_are_those_of_a_sender(rows, sums, LBGM())


def test_subspaces_are_replayed_as_a_sender_would_send_them():
    run = training_run(40, 32)
    report = replayed(run, ranks=(1, 4, 16))
    for rank in (1, 4, 16):
        compressor = LookBackSubspace(rank)
        rows = [row for row in report.rows if row.method == repr(compressor)]
        assert_rows_are_those_of_a_sender(rows, run, compressor)


def test_training_has_the_same_bits_with_and_without():
    weights = []
    for probed in (False, True):
        model = network()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        probe = LookBackProbe(model, cost=None) if probed else None
        generator = torch.Generator().manual_seed(1)
        for _ in range(20):
            optimizer.zero_grad()
            model(torch.randn(16, 64, generator=generator)).logsumexp(1).mean().backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.01)
            optimizer.step()
        weights.append(dict(model.named_parameters()))
    assert probe.report().rounds == 20
    assert_same_bits(*({n: p.detach() for n, p in w.items()} for w in weights))


def observed(monkeypatch, model, train, **arguments):
    """Return the gradients that a probe takes while `train` runs."""
    seen = []
    original = LookBackProbe._round

    def spy(self, grads):
        seen.append({name: grad.clone() for name, grad in grads.items()})
        original(self, grads)

    monkeypatch.setattr(LookBackProbe, "_round", spy)
    probe = LookBackProbe(model, **arguments)
    train()
    return probe, seen


def test_gradients_of_several_backward_passes_are_one_round(monkeypatch):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    expected = []

    def train():
        for _ in range(3):
            optimizer.zero_grad()
            for part in x.split(4):
                (model(part).square().mean() / 2).backward()
            expected.append({n: p.grad.clone() for n, p in model.named_parameters()})
            # A gradient is sent as backward made it, before clipping.
            nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
            optimizer.step()

    _, seen = observed(monkeypatch, model, train)
    for found, grads in zip(seen, expected, strict=True):
        assert_same_bits(dict(sorted(found.items())), dict(sorted(grads.items())))


def test_backward_passes_within_a_step_of_an_optimizer_are_of_its_round(monkeypatch):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    expected = []

    def backward(part):
        loss = model(part).square().mean() / 2
        loss.backward()
        return loss

    def train():
        for _ in range(3):
            optimizer.zero_grad()
            first, second = x.split(4)
            backward(first)
            # As Lightning does.
            optimizer.step(lambda part=second: backward(part))
            expected.append({n: p.grad.clone() for n, p in model.named_parameters()})

    _, seen = observed(monkeypatch, model, train)
    for found, grads in zip(seen, expected, strict=True):
        assert_same_bits(dict(sorted(found.items())), dict(sorted(grads.items())))


def test_parameters_without_a_gradient_and_other_optimizers_are_left_out(monkeypatch):
    model, other = network(), nn.Linear(3, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    others = torch.optim.SGD(other.parameters(), lr=0.1)

    def train():
        for step in range(4):
            optimizer.zero_grad()
            part = model if step % 2 else model[2]
            part(torch.ones(2, 64 if step % 2 else 32)).square().mean().backward()
            other(torch.ones(3)).sum().backward()
            others.step()
            optimizer.step()

    probe, seen = observed(monkeypatch, model, train)
    assert [len(grads) for grads in seen] == [2, 4, 2, 4]
    rows = {r.tensor: r for r in probe.report().rows if r.method == "LBGM()" and r.steps == 1}
    assert [rows[name].rounds for name in ("0.weight", "2.weight")] == [2, 4]


def test_gradients_with_inf_are_counted_and_left_out():
    run = [dict(grads) for grads in training_run(10)]
    run[4]["hidden.bias"] = torch.full((32,), float("nan"))
    run[7]["output.bias"] = torch.full((10,), float("inf"))
    report = replayed(run)
    assert (report.rounds, report.skipped) == (10, 2)
    finite = [grads for i, grads in enumerate(run) if i not in (4, 7)]
    rows = [row for row in report.rows if row.method == "LBGM()" and row.steps == 1]
    assert_rows_are_those_of_a_sender(rows, finite, LBGM())
    assert "2 with inf or nan left out" in str(report)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_other_precisions_are_replayed(dtype):
    run = [{n: g.to(dtype) for n, g in grads.items()} for grads in training_run(20)]
    report = replayed(run)
    row = next(row for row in report.all_tensors() if row.method == "LBGM()")
    assert row.bytes_per_step * 20 == pytest.approx(sent(run, LBGM())[0])


# --- against the comparison ---------------------------------------------------------------------


@pytest.mark.timeout(200)
@pytest.mark.parametrize("batch", [None, 16], ids=["full batch", "batches of 16"])
def test_prediction_is_what_the_comparison_measures_in_open_loop(batch, tmp_path):
    rounds, inners, deltas = 60, (Identity(), TopK(0.1)), (0.05, 0.2)
    methods = [LBGM(inner, delta) for inner in inners for delta in deltas]
    arguments = ["--open-loop", "--workers", "1", "--images", "300", "--rounds", str(rounds)]
    arguments += ["--lr", "0.05", "--evaluate-every", str(rounds), "--out", str(tmp_path)]
    arguments += ["--batch-size", str(batch or "full"), "--methods", ", ".join(map(repr, methods))]
    assert compare.main(arguments) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    measured = {row["method"]: row for row in summary["methods"]}

    dataset = load("digits", None, 0)
    parts = subsets(partition(dataset.train_labels, 1, "iid", 0), 300, 0)
    training = Training(
        *(dataset, parts, "fcn", rounds, 1, batch, 1.0, 0.05, 0.9, 0, torch.device("cpu"))
    )
    # A plain training loop, and a line for each probe.
    model, workers = training.initial_model(), Workers(training)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    probes = [LookBackProbe(model, deltas=deltas, inner=inner) for inner in inners]
    for _ in range(rounds):
        images, labels, _ = workers.next_batch([0])
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images[0]), labels[0]).backward()
        optimizer.step()

    rows = [row for p in probes for row in p.report().all_tensors() if row.steps == 1]
    for method in methods:
        row = next(row for row in rows if row.method == repr(method))
        found = measured[repr(method)]
        assert row.bytes_per_step * rounds == pytest.approx(found["uplink_bytes"], rel=0.05)
        assert row.recycled_share == pytest.approx(found["recycled_share"], rel=0.05, abs=0.01)
    if batch is None:
        assert measured["LBGM()"]["recycled_share"] > 0.3


# --- ranks, clients, files ----------------------------------------------------------------------


def observe_on_a_rank(rank):
    model = network()
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    probe = LookBackProbe(model, ranks=())
    run = []
    generator = torch.Generator().manual_seed(rank)
    for _ in range(15):
        x = torch.randn(8, 64, generator=generator)
        alone = network()
        alone.load_state_dict(model.state_dict())
        loss = alone(x).square().mean()
        grads = torch.autograd.grad(loss, list(alone.parameters()))
        run.append(dict(zip(dict(alone.named_parameters()), grads, strict=True)))
        optimizer.zero_grad()
        wrapped(x).square().mean().backward()
        optimizer.step()
    rows = [r for r in probe.report().all_tensors() if (r.method, r.steps) == ("LBGM()", 1)]
    return rows[0].bytes_per_step * 15, sent(run, LBGM())[0]


def test_rank_of_ddp_observes_its_own_gradients():
    totals = run_ranks(observe_on_a_rank, 2)
    for predicted, measured in totals:
        assert predicted == pytest.approx(measured, rel=0.01)


def test_client_that_is_created_anew_each_round_goes_on_from_its_file(tmp_path):
    run = training_run(20)
    weights = {name: torch.zeros_like(grad) for name, grad in run[0].items()}
    for grads in run:
        # As in a client of Flower: a new model, that of the server, in each round.
        model = [(name, w.clone().requires_grad_()) for name, w in weights.items()]
        with LookBackProbe(model, updates=True, file=tmp_path / "client.pt", cost=None) as probe:
            for name, parameter in model:
                parameter.data.sub_(grads[name])
    assert probe.report().rounds == 20
    rows = [r for r in probe.report().rows if (r.method, r.steps) == ("LBGM()", 1)]
    assert_rows_are_those_of_a_sender(rows, run, LBGM())
    assert os.listdir(tmp_path) == ["client.pt"]


def test_error_in_a_client_counts_nothing():
    model = network()
    probe = LookBackProbe(model, updates=True)

    def fail():
        with probe:
            model[0].weight.data.add_(1)
            raise RuntimeError("out of data")

    with pytest.raises(RuntimeError, match="out of data"):
        fail()
    assert probe.report().rounds == 0


def test_failure_of_the_probe_in_a_client_leaves_its_round_alone(monkeypatch):
    probe = LookBackProbe(network(), updates=True)
    monkeypatch.setattr(LookBackProbe, "_round", lambda *_: 1 / 0)
    with pytest.warns(UserWarning, match="stopped watching: ZeroDivisionError"), probe:
        pass
    assert probe.report().stopped.startswith("ZeroDivisionError")


def test_file_of_another_probe_is_refused(tmp_path):
    run = training_run(5)
    with LookBackProbe(parameters_like(run), updates=True, file=tmp_path / "a.pt"):
        pass
    with pytest.raises(ValueError, match="use the same arguments, or another file"):
        LookBackProbe(parameters_like(run), (0.3,), updates=True, file=tmp_path / "a.pt")
    probe = LookBackProbe(parameters_like(run))
    probe.observe(run[0])
    other = LookBackProbe(network())
    with pytest.raises(ValueError, match=r"another model: parameter .0\.weight. is None there"):
        other.load_state_dict(probe.state_dict())
    with pytest.raises(ValueError, match="not the state of a LookBackProbe"):
        other.load_state_dict({"format": 0})
    assert other.report().rounds == 0


def test_state_is_not_changed_by_later_rounds():
    run = training_run(40)
    probe = LookBackProbe(parameters_like(run), cost=None)
    for grads in run[:11]:
        probe.observe(grads)
    state = probe.state_dict()
    for grads in run[11:]:
        probe.observe(grads)
    again = LookBackProbe(parameters_like(run), cost=None)
    again.load_state_dict(state)
    assert again.report().rounds == 11
    for grads in run[11:]:
        again.observe(grads)
    assert again.report().rows == probe.report().rows


def test_model_of_other_shapes_is_refused():
    probe, other = LookBackProbe(nn.Linear(8, 8)), LookBackProbe(nn.Linear(4, 8))
    with pytest.raises(ValueError, match=r"'weight' is \(8, 8\) .* there and \(8, 4\) "):
        other.load_state_dict(probe.state_dict())


def test_cost_is_kept_to_from_one_client_round_to_the_next(tmp_path):
    model = network()
    for _ in range(12):
        with LookBackProbe(model, updates=True, file=tmp_path / "c.pt", cost=1e-9) as probe:
            for parameter in model.parameters():
                parameter.data.add_(torch.ones_like(parameter))
    rounds = {(row.method, row.steps): row.rounds for row in probe.report().all_tensors()}
    assert rounds["LBGM()", 1] == 12
    # The first of each is free.
    assert rounds["LookBackSubspace()", 1] == rounds["LBGM()", 2] == 1


def test_gradient_that_was_thrown_away_is_not_counted(monkeypatch):
    generator, critic = network(), network(1)
    first = torch.optim.SGD(generator.parameters(), lr=0.1)
    second = torch.optim.SGD(critic.parameters(), lr=0.1)
    both = nn.ModuleDict({"generator": generator, "critic": critic})

    def train():
        for _ in range(3):
            # The generator's loss leaves gradients in the critic, which are dropped.
            (generator(torch.ones(2, 64)).sum() + critic(torch.ones(2, 64)).sum()).backward()
            first.step()
            both.zero_grad()
            critic(torch.ones(2, 64)).sum().backward()
            second.step()
            both.zero_grad()

    _, seen = observed(monkeypatch, both, train)
    assert [sorted({name.split(".")[0] for name in grads}) for grads in seen] == [
        ["generator"],
        ["critic"],
    ] * 3


def test_bytes_are_compared_with_those_of_gradients_that_there_were():
    model = nn.ModuleDict({"used": nn.Linear(20, 20), "unused": nn.Linear(500, 500)})
    model["table"] = nn.Embedding(50, 20, sparse=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-9)
    probe = LookBackProbe(model, deltas=(0.0,), ranks=(), averaged=())
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        optimizer.zero_grad()
        rows = model["table"](torch.arange(3)) + torch.randn(3, 20, generator=generator)
        model["used"](rows).square().sum().backward()
        optimizer.step()
    report = probe.report()
    assert report.all_tensors()[0].of_dense == pytest.approx(1, abs=0.02)
    assert report.left_out == ["unused.weight", "unused.bias", "table.weight"]
    assert "Without a gradient that could be watched: unused.weight" in str(report)


def test_averages_of_half_precision_do_not_overflow():
    grad = {"weight": torch.full((50, 40), 1e4, dtype=torch.float16)}
    report = replayed([grad] * 64)
    for row in report.all_tensors():
        if row.method == "LBGM()" and row.steps > 1:
            assert row.recycled_share == pytest.approx(1 - row.steps / 64)


@pytest.mark.parametrize("scale", [1e-24, 1e20])
def test_errors_of_extreme_gradients_are_those_of_ordinary_ones(scale):
    ordinary = noisy(30, 0.6)
    extreme = [{n: g * scale for n, g in grads.items()} for grads in ordinary]
    pairs = zip(replayed(ordinary).rows, replayed(extreme).rows, strict=True)
    errors = [(a.relative_error, b.relative_error) for a, b in pairs if not a.subspace]
    assert max(errors)[0] > 0.3
    for a, b in errors:
        assert a == pytest.approx(b, abs=1e-3)


def test_failure_of_the_probe_detaches_it_and_the_training_goes_on(monkeypatch):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    probe = LookBackProbe(model)

    def fail(*_):
        raise MemoryError("no room")

    def step():
        optimizer.zero_grad()
        model(torch.ones(2, 64)).sum().backward()
        optimizer.step()

    step()
    monkeypatch.setattr(LookBackSubspace, "encode_batch", fail)
    monkeypatch.setattr(LookBackProbe, "_average", lambda *_: fail())
    before = model[0].weight.detach().clone()
    with pytest.warns(UserWarning, match="stopped watching: MemoryError: no room"):
        step()
    step()
    assert not torch.equal(before, model[0].weight)
    report = probe.report()
    assert report.stopped == "MemoryError: no room"
    assert "Watching stopped after 1 gradient: MemoryError: no room" in str(report)


def test_closed_or_forgotten_probe_observes_nothing_more():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step():
        optimizer.zero_grad()
        model(torch.ones(2, 64)).sum().backward()
        optimizer.step()

    probe = LookBackProbe(model)
    step()
    probe.close()
    step()
    assert probe.report().rounds == 1
    forgotten = LookBackProbe(model)
    step()
    del forgotten
    gc.collect()
    assert not model[0].weight._post_accumulate_grad_hooks
    step()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"deltas": ()}, "deltas is empty"),
        ({"deltas": (1.5,)}, "delta must be from 0 to 1, not 1.5"),
        ({"deltas": (NormBudget(0.1),)}, "a NormBudget is not replayed"),
        ({"inner": LBGM()}, "looks back itself"),
        ({"averaged": (2, 3)}, r"averaged must be 2, 4, 8 and so on, not \(2, 3\)"),
        ({"ranks": (0,)}, "rank must be a whole number of at least 1"),
        ({"cost": 0}, "cost must be above 0, or None, not 0"),
        ({"file": "no/where.pt"}, "file no/where.pt: there is no folder"),
        ({"deltas": 0.2}, "deltas must be a sequence such as"),
        ({"ranks": 4}, "ranks must be a sequence"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises((TypeError, ValueError), match=message):
        LookBackProbe(network(), **arguments)


def test_other_objects_than_models_are_refused_and_leave_no_hooks():
    model = network()
    for wrong in (model.parameters(), model.state_dict(), torch.optim.SGD(model.parameters()), 3):
        with pytest.raises(TypeError, match=r"named_parameters\(\)"):
            LookBackProbe(wrong)
    leaf = torch.zeros(3, requires_grad=True)
    with pytest.raises(ValueError, match="parameter 'b' is no leaf"):
        LookBackProbe([("a", leaf), ("b", leaf * 2)])
    assert not leaf._post_accumulate_grad_hooks


def test_wrong_gradients_are_refused_and_counted_nowhere():
    probe = LookBackProbe(network())
    with pytest.raises(ValueError, match="observes no parameter 'weight'"):
        probe.observe({"weight": torch.ones(3)})
    with pytest.raises(ValueError, match=r"'0.bias' has shape \(3,\), expected \(32,\)"):
        probe.observe({"0.bias": torch.ones(3)})
    with pytest.raises(TypeError, match=r"'0\.bias' must be one of"):
        probe.observe({"0.bias": torch.ones(32, dtype=torch.int64)})
    with pytest.raises(ValueError, match="there are no gradients"):
        probe.observe({})
    frozen = network().requires_grad_(False)
    with pytest.raises(ValueError, match="none requires a dense real gradient"):
        LookBackProbe(frozen)
    assert probe.report().rounds == 0


# --- advice, report -----------------------------------------------------------------------------


def noisy(rounds, noise, seed=0, shape=(64, 48)):
    """A gradient that keeps its direction, in noise of so many times its length."""
    generator = torch.Generator().manual_seed(seed)
    direction = torch.randn(shape, generator=generator)
    return [
        {"weight": direction + noise * torch.randn(shape, generator=generator)}
        for _ in range(rounds)
    ]


@pytest.mark.parametrize(
    ("noise", "expected"),
    [
        (0.2, r"LBGM\(\) would recycle 9\d% of the tensors and save 9\d% of the bytes"),
        (0.8, r"At this batch size 0% .* averaging gradients over 8 steps .* would make it"),
        (30.0, r"At this batch size 0% .* ErrorFeedback\(LookBackSubspace\(.*\)\) would send"),
    ],
)
def test_advice_fits_the_noise(noise, expected):
    report = replayed(noisy(128, noise))
    assert report.advice == str(report).splitlines()[-1]
    assert re.search(expected, report.advice), report.advice


def test_advice_where_nothing_helps_says_so():
    generator = torch.Generator().manual_seed(0)
    run = [{"bias": torch.randn(500, generator=generator).half()} for _ in range(40)]
    assert "looking back saves little here" in replayed(run).advice
    assert "it takes two to compare" in replayed(run[:1]).advice


@pytest.mark.parametrize("shape", [(500,), (4, 300), (300, 4), (3, 3)])
def test_report_gives_the_share_of_bytes_in_tensors_without_directions(shape):
    matrices = noisy(6, 0.5)
    others = noisy(6, 0.5, seed=1, shape=shape)
    run = [{**a, "other": b["weight"]} for a, b in zip(matrices, others, strict=True)]
    report = replayed(run, ranks=(4,))
    rows = {row.tensor: row for row in report.rows if row.subspace}
    assert (rows["weight"].never_held, rows["other"].never_held) == (0, 1)
    sizes = {name: rows[name].bytes_per_step for name in ("weight", "other")}
    share = sizes["other"] / sum(sizes.values())
    assert rows[None].never_held == pytest.approx(share)
    said = rf"LookBackSubspace\(\) finds no directions in .* take {share:.0%} of its bytes"
    assert bool(re.search(said, str(report))) == (share >= 0.2)
    assert "no directions" not in str(replayed(matrices))


def test_report_names_every_method_and_tensor_and_its_cost(tmp_path):
    report = replayed(training_run(20))
    text = str(report)
    for method in ("LBGM(delta=0.05)", "LBGM(), 8 steps averaged", "LookBackSubspace(rank=16)"):
        assert method in text
    for name in training_run(20)[0]:
        assert f"\n{name} " in text
    assert "watching took" in text
    assert 0 < report.share_of_time <= 1
    report.write_csv(tmp_path / "report.csv")
    with (tmp_path / "report.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(report.rows)
    assert float(rows[0]["bytes_per_step"]) == report.rows[0].bytes_per_step


# --- the command --------------------------------------------------------------------------------

TWO_OPTIMIZERS = """
import os
import pathlib

import torch

os.chdir(os.sep)
assert pathlib.Path(__file__).exists()
first, second = torch.nn.Linear(20, 8), torch.nn.Linear(8, 2)
adam = torch.optim.Adam(first.parameters(), lr=0.01)
sgd = torch.optim.SGD(second.parameters(), lr=0.01)
table = torch.zeros(3, dtype=torch.complex64, requires_grad=True)
other = torch.optim.SGD([table], lr=0.1)
for step in range(10):
    for optimizer in (adam, sgd, other):
        optimizer.zero_grad()
    (second(first(torch.ones(4, 20))).square().mean() + table.abs().sum()).backward()
    for optimizer in (adam, sgd, other):
        optimizer.step()
torch.optim.SGD(first.parameters(), lr=0.1).step()
raise SystemExit(3)
"""
SCRIPT = """
import sys

import torch

print("arguments", sys.argv[1:], __name__)
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(20, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
x = torch.randn(64, 20)
for step in range(int(sys.argv[1])):
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()
if "fail" in sys.argv:
    raise ValueError("lost")
"""


COMPRESSOR = """
import dataclasses

from lbgm_compress import TopK


@dataclasses.dataclass(frozen=True, repr=False)
class Mine(TopK):
    pass
"""


def command(*arguments, launcher=(), cwd=None):
    return subprocess.run(
        [sys.executable, *launcher, "-m", "lbgm_compress.probe", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
    )


@pytest.fixture
def main_here(tmp_path, monkeypatch):
    """Return the command as a function of this process, which has imported everything already."""
    monkeypatch.chdir(tmp_path)
    for name in ("argv", "path"):
        monkeypatch.setattr(sys, name, list(getattr(sys, name)))
    importlib.invalidate_caches()
    before = set(sys.modules)
    yield lambda *arguments: main([*map(str, arguments)])
    for name in set(sys.modules) - before:
        if (getattr(sys.modules[name], "__file__", None) or "").startswith(str(tmp_path)):
            del sys.modules[name]


def test_unmodified_script_is_observed_and_the_report_comes_at_its_end(tmp_path):
    (tmp_path / "train.py").write_text(SCRIPT)
    done = command(
        "--csv", "rows.csv", "--cost", "9", "train.py", "12", "--inner", "x", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("arguments ['12', '--inner', 'x'] __main__\n")
    # The optimizer is met at its first step.
    assert "LookBackProbe: 11 gradients" in done.stdout
    assert "\n0.weight " in done.stdout
    assert done.stderr == ""
    assert re.search(r"LookBackSubspace\(\) +11 ", done.stdout)
    assert (tmp_path / "rows.csv").read_text().startswith("method,delta,steps,tensor")


def test_script_with_several_optimizers_gets_a_report_for_each(tmp_path, main_here, capsys):
    (tmp_path / "train.py").write_text(TWO_OPTIMIZERS)
    with pytest.raises(SystemExit) as stopped:
        main_here("--csv", "rows.csv", "train.py")
    assert stopped.value.code == 3
    printed = capsys.readouterr().out
    assert printed.count("LookBackProbe: 9 gradients") == 2
    assert "none requires a dense real gradient" in printed
    assert (tmp_path / "rows.csv").exists()
    assert (tmp_path / "rows-2.csv").exists()


def test_module_is_run_as_by_python_itself(tmp_path, main_here, capsys):
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").write_text("")
    (tmp_path / "package" / "train.py").write_text("from . import __name__ as where\n" + SCRIPT)
    assert main_here("-m", "package.train", "6") == 0
    assert "LookBackProbe: 5 gradients" in capsys.readouterr().out


def test_script_that_fails_is_reported_and_fails_as_before(tmp_path, main_here, capsys):
    (tmp_path / "train.py").write_text(SCRIPT)
    with pytest.raises(ValueError, match="lost"):
        main_here("--inner", "TopK(0.1)", "train.py", "5", "fail")
    assert "LBGM(TopK(0.1), delta=0.05)" in capsys.readouterr().out


@pytest.mark.parametrize("folder", [".", "scripts"], ids=["here", "beside the script"])
def test_compressor_of_one_s_own_is_found(folder, tmp_path, main_here, capsys):
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "train.py").write_text(SCRIPT)
    (tmp_path / folder / "own_compressors.py").write_text(COMPRESSOR)
    path = list(sys.path)
    known = ("--known", "own_compressors:Mine")
    assert main_here("--inner", "Mine(0.1)", *known, "scripts/train.py", "6") == 0
    assert "LBGM(Mine(0.1), delta=0.05)" in capsys.readouterr().out
    # The script finds its modules as it does without the probe.
    assert sys.path == [str(tmp_path / "scripts"), *path[1:]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.py"], "there is no script missing.py"),
        (["--inner", "TopK(2)", "train.py"], "ratio must be above 0 and at most 1, not 2"),
        (["--inner", "Mine(0.1)", "train.py"], "unknown compressor 'Mine'"),
        (["--known", "nowhere:Mine", "train.py"], "cannot import 'nowhere:Mine'"),
        (["--deltas", "0.1,2", "train.py"], "delta must be from 0 to 1, not 2.0"),
        (["--deltas", "much", "train.py"], "'much' are not numbers: write them as 0.05,0.2"),
        (["--cost", "0", "train.py"], "--cost must be above 0, not 0.0"),
        (["--csv", "no/rows.csv", "train.py"], "--csv no/rows.csv: there is no folder"),
    ],
)
def test_wrong_command_is_refused_before_the_script_runs(
    arguments, message, tmp_path, capsys, main_here
):
    (tmp_path / "train.py").write_text("raise SystemExit('ran')")
    with pytest.raises(SystemExit) as stopped:
        main_here(*arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_script_without_an_optimizer_says_so(tmp_path, main_here, capsys):
    (tmp_path / "train.py").write_text("print('hello')")
    assert main_here("train.py") == 0
    assert capsys.readouterr().out.splitlines() == [
        "hello",
        "LookBackProbe: no optimizer of torch's has stepped in this process, and so nothing was "
        "seen.",
    ]


@pytest.mark.timeout(150)
def test_the_ddp_example_is_reported_on_its_first_rank():
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = command(ROOT / "examples" / "ddp_train.py", launcher=launcher)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("LookBackProbe: 199 gradients") == 1
    assert "accuracy" in done.stdout
    assert "LBGM() would recycle" in done.stdout
