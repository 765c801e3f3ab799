"""Frameworks that need no adapter: Accelerate, peft and Ray Train."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lbgm_compress import LBGM, ErrorFeedback, LookBackSubspace, SharedSubspace, TopK
from lbgm_compress.adapters.ddp import compress
from tests.laws import assert_same_bits, without_ids
from tests.ranks import as_torchrun, run_ranks
from tests.test_docs import program_of
from tests.training import assert_replicas_agree, parameters

WORLD = 2
FEEDBACK = {
    "messages": LBGM(ErrorFeedback(TopK(0.1)), delta=0.9),
    "sums": ErrorFeedback(SharedSubspace(4)),
}


def needs(name, *modules):
    missing = any(importlib.util.find_spec(module) is None for module in modules)
    return pytest.mark.skipif(missing, reason=f"{name} is not installed")


def batch_of(rank, number):
    generator = torch.Generator().manual_seed(1000 * number + rank)
    return torch.randn(8, 20, generator=generator), torch.randn(8, 4, generator=generator)


# --- Accelerate -----------------------------------------------------------------------------------


class Prepared:
    """A model with dropout that Accelerate has prepared, on one rank."""

    def __init__(self, compressor, seed):
        from accelerate import Accelerator

        torch.manual_seed(seed)
        self.accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        model = nn.Sequential(nn.Linear(20, 16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 4))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.state = compress(self.model, compressor)
        self.norms = []

    def train(self, first, last):
        for number in range(first, last):
            x, y = batch_of(self.accelerator.process_index, number)
            with self.accelerator.accumulate(self.model):
                self.accelerator.backward(nn.functional.mse_loss(self.model(x), y))
                if self.accelerator.sync_gradients:
                    parts = self.model.parameters()
                    self.norms.append(float(self.accelerator.clip_grad_norm_(parts, 0.1)))
                self.optimizer.step()
                self.optimizer.zero_grad()

    def parts(self):
        return parameters(self.model), without_ids(self.state.state_dict())


def resume_accelerate(rank, folder, compressor):
    as_torchrun(rank, WORLD)
    name = f"compression-rank{rank}.pt"
    whole = Prepared(compressor, 0)
    whole.train(0, 6)
    whole.accelerator.save_state(folder)
    torch.save(whole.state.state_dict(), Path(folder, name))
    whole.train(6, 12)
    found = {"whole": whole.parts(), "norms": whole.norms, "steps": whole.state.step}
    for kind in ("resumed", "without"):
        dist.barrier()
        other = Prepared(compressor, 1)
        other.accelerator.load_state(folder)
        if kind == "resumed":
            other.state.load_state_dict(torch.load(Path(folder, name), weights_only=True))
        other.train(6, 12)
        found[kind] = other.parts()
    return found


def register_for_checkpointing(rank, folder):
    as_torchrun(rank, WORLD)
    prepared = Prepared(FEEDBACK["messages"], 0)
    prepared.accelerator.register_for_checkpointing(prepared.state)
    prepared.train(0, 4)
    prepared.accelerator.save_state(folder)
    dist.barrier()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        prepared.accelerator.load_state(folder)
    prepared.train(4, 8)
    messages = [str(one.message) for one in caught if "the state is that of" in str(one.message)]
    return parameters(prepared.model), messages


@needs("Accelerate", "accelerate")
@pytest.mark.parametrize("name", FEEDBACK)
def test_program_of_accelerate_goes_on_bit_for_bit(tmp_path, name):
    results = run_ranks(resume_accelerate, WORLD, str(tmp_path), FEEDBACK[name], timeout=200)
    for found in results:
        # One exchange for two batches, and clipping has something to do.
        assert found["steps"] == 6
        assert len(found["norms"]) == 6
        assert min(found["norms"]) > 0.1
        assert_same_bits(found["resumed"], found["whole"])
        with pytest.raises(AssertionError):
            assert_same_bits(found["without"][0], found["whole"][0])
    for kind in ("whole", "without"):
        assert_replicas_agree([found[kind][0] for found in results])


@needs("Accelerate", "accelerate")
def test_state_that_accelerate_saves_by_itself_is_that_of_the_main_process(tmp_path):
    results = run_ranks(register_for_checkpointing, WORLD, str(tmp_path), timeout=200)
    assert results[0][1] == []
    [message] = results[1][1]
    assert "rank 0 of 2, and this is rank 1 of 2" in message
    assert_replicas_agree([weights for weights, _ in results])


# --- peft -----------------------------------------------------------------------------------------


def train_factors(rank, compressor):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(20, 32), nn.Tanh(), nn.Linear(32, 4))
    before = parameters(net)
    model = get_peft_model(net, LoraConfig(r=4, target_modules=["0", "2"]))
    model = DistributedDataParallel(model)
    state = compress(model, compressor)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    x, y = batch_of(rank, 0)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    after = parameters(model)
    frozen = {
        name: after[f"module.base_model.model.{name.replace('.', '.base_layer.')}"]
        for name in before
    }
    assert_same_bits(frozen, before)
    return after, losses, sorted(state.sender.report()), state.stats()["ratio"]


def train_factors_with_each(rank, compressors):
    return [train_factors(rank, compressor) for compressor in compressors]


@needs("peft", "peft")
def test_factors_of_lora_are_all_that_is_sent():
    compressors = [LBGM(), *FEEDBACK.values(), ErrorFeedback(LookBackSubspace(2))]
    ranks = run_ranks(train_factors_with_each, WORLD, compressors, timeout=200)
    for results in zip(*ranks, strict=True):
        assert_replicas_agree([weights for weights, *_ in results])
        for _, losses, sent, ratio in results:
            assert losses[-1] < 0.7 * losses[0]
            assert sent == [
                f"module.base_model.model.{layer}.lora_{factor}.default.weight"
                for layer in (0, 2)
                for factor in "AB"
            ]
            assert ratio < 1


# --- Ray Train ------------------------------------------------------------------------------------

# The page's program runs in a cluster of its own, whose processes end with it.
START = """
import ray

ray.init(num_cpus=2, include_dashboard=False)
"""
# The workers fail in their third step, and go on from the checkpoint of the second.
FAIL = """

def fail_once():
    step, calls = torch.optim.SGD.step, []

    def stepping(*arguments, **options):
        calls.append(1)
        if len(calls) == 3:
            raise MemoryError("none left")
        return step(*arguments, **options)

    if ray.train.get_checkpoint() is None:
        torch.optim.SGD.step = stepping
    train_with_checkpoints()


run = RunConfig(
    name="failed",
    storage_path=os.path.abspath("results"),
    failure_config=FailureConfig(max_failures=1),
)
TorchTrainer(fail_once, scaling_config=workers, run_config=run).fit()
"""


def last_checkpoint(run):
    """Return what is in the files of the last checkpoint of a run."""
    [*_, folder] = sorted(path for path in run.glob("checkpoint_*") if path.is_dir())
    return {
        file.name: without_ids(torch.load(file, weights_only=True)) for file in folder.glob("*.pt")
    }


# Flower brings Ray without what Ray Train imports.
@needs("Ray Train", "ray", "pyarrow")
@pytest.mark.timeout(600)
def test_program_of_ray_train_goes_on_bit_for_bit_after_a_failure(tmp_path):
    path = tmp_path / "train.py"
    path.write_text(START + program_of("ray", "+") + FAIL)
    # Ray makes sockets in its folder, whose names must be short.
    with tempfile.TemporaryDirectory() as temporary:
        environment = {
            **os.environ,
            "GLOO_SOCKET_IFNAME": "lo",
            "HOME": str(tmp_path),
            "OMP_NUM_THREADS": "1",
            "RAY_TMPDIR": temporary,
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        done = subprocess.run(
            [sys.executable, str(path)],
            capture_output=True,
            text=True,
            timeout=580,
            cwd=tmp_path,
            env=environment,
        )
    assert done.returncode == 0, done.stderr
    assert "MemoryError: none left" in done.stdout + done.stderr
    whole, failed = (last_checkpoint(tmp_path / "results" / n) for n in ("compressed", "failed"))
    assert sorted(whole) == ["compression-rank0.pt", "compression-rank1.pt", "training.pt"]
    assert whole["training.pt"]["done"] == 4
    assert_same_bits(failed, whole)
