"""The setting `lora` of the frontier: adapters of a small GPT-2, trained in a few steps."""

from __future__ import annotations

import pytest
import torch

from benchmarks import frontier
from benchmarks.common import lora
from benchmarks.common.command_line import read_methods
from benchmarks.common.frontier_settings import Run, training_of
from benchmarks.common.models import parameters
from benchmarks.common.training import evaluate, run

SUBSPACE = "ErrorFeedback(LookBackSubspace(8, values='int4'))"
ENTRIES = "LBGM(TopK(0.01))"

needs_peft = pytest.mark.skipif(not lora.is_available(), reason="needs peft and transformers")


@pytest.fixture(autouse=True)
def brief(monkeypatch):
    monkeypatch.setattr(lora, "PRETRAINING_STEPS", 5)
    lora._pretrained.cache_clear()
    yield
    lora._pretrained.cache_clear()


def perform(method, model="lora-4", seed=0):
    [algorithm] = read_methods(method)
    what = Run("lora", model, repr(algorithm), seed)
    return frontier.perform(what, algorithm, None, None, short=True)


@needs_peft
@pytest.mark.parametrize(("model", "rank"), lora.MODELS.items())
def test_adapters_alone_are_trained_and_sent(model, rank):
    weights = parameters(lora.adapted(rank, 0))
    assert len(weights) == 2 * 4 * lora.BLOCKS
    assert {min(weight.shape) for weight in weights.values()} == {rank}
    dense = perform("Identity()", model)
    sizes = 4 * sum(weight.numel() for weight in weights.values())
    assert dense[-1].dense_bytes == 4 * 2 * sizes
    assert 1 < dense[-1].uplink_bytes / dense[-1].dense_bytes < 1.01


@needs_peft
def test_a_run_is_the_same_again_and_another_seed_is_not():
    once = perform(SUBSPACE)
    lora._pretrained.cache_clear()
    assert perform(SUBSPACE) == once
    assert [e.loss for e in perform(SUBSPACE, seed=1)] != [e.loss for e in once]


@needs_peft
def test_a_round_is_a_step_of_adamw_with_the_mean_gradient_of_both_workers():
    training = training_of(Run("lora", "lora-4", "Identity()", 0), None, None, short=True)
    found = [round_.loss for round_ in run(training, read_methods("Identity()")[0])]
    model = training.initial_model()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=training.lr, weight_decay=0.0)
    generators = [torch.Generator().manual_seed(worker) for worker in (0, 1)]
    size = len(training.parts[0])
    orders = [torch.randperm(size, generator=generator) for generator in generators]
    data, losses = training.dataset, []
    for number in range(training.rounds):
        optimizer.zero_grad()
        for part, order in zip(training.parts, orders, strict=True):
            rows = part[order[8 * number : 8 * number + 8]]
            logits = model(data.train_images[rows]).flatten(0, 1)
            labels = data.train_labels[rows].flatten()
            (torch.nn.functional.cross_entropy(logits, labels) / 2).backward()
        optimizer.step()
        losses.append(evaluate(model, parameters(model), data.test_images, data.test_labels)[1])
    assert found == pytest.approx(losses, rel=1e-4)
    assert losses[-1] < losses[0]


@needs_peft
@pytest.mark.parametrize("model", lora.MODELS)
def test_a_subspace_sends_no_more_than_top_k_of_a_hundredth_with_lbgm(model):
    assert perform(SUBSPACE, model)[-1].uplink_bytes < perform(ENTRIES, model)[-1].uplink_bytes


@needs_peft
@pytest.mark.timeout(120)
def test_the_command_prints_losses_and_bytes(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(frontier, "make_pool", frontier.concurrent.futures.ThreadPoolExecutor)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    options = ["--settings", "lora", "--models", "lora-4", "--seeds", "0", "--short", "--jobs", "1"]
    methods = ["--methods", f"Identity(), {SUBSPACE}", "--out", str(tmp_path)]
    assert frontier.main([*options, *methods]) == 0
    said = capsys.readouterr().out
    assert "LoRA of a small GPT-2" in said
    assert "loss" in said
    assert (tmp_path / "frontier-lora.png").read_bytes().startswith(b"\x89PNG")


def test_missing_packages_are_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(lora, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        frontier.main(["--settings", "lora", "--out", str(tmp_path)])
    assert stopped.value.code == 2
    assert "needs peft and transformers: pip install peft" in capsys.readouterr().err
    with pytest.raises(ValueError, match="needs peft and transformers"):
        lora.adapted(4, 0)
