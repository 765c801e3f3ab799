"""Callbacks for the Trainer of transformers, on two ranks."""

from __future__ import annotations

import contextlib
import copy
import io
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("accelerate", reason="accelerate is not installed")

from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

from lbgm_compress import LBGM, ErrorFeedback, Identity, SharedSubspace, TopK
from lbgm_compress.adapters.transformers import CompressionCallback, ProbeCallback
from tests.laws import assert_same_bits, without_ids
from tests.ranks import as_torchrun, run_ranks
from tests.training import parameters

ROOT = Path(__file__).parent.parent
WORLD = 2
STEPS = 6
NAMES = ("compression/message_bytes", "compression/ratio", "compression/recycled_share")
FEEDBACK = {
    "messages": LBGM(ErrorFeedback(TopK(0.1)), delta=0.9),
    "sums": ErrorFeedback(SharedSubspace(4)),
}
# It was renamed in transformers 5.
CHECKPOINTING = next(
    name
    for name in ("activation_checkpointing", "gradient_checkpointing")
    if name in TrainingArguments.__dataclass_fields__
)
# All tests ask the same two ranks, since the import of transformers takes seconds.
pytestmark = [pytest.mark.xdist_group("transformers"), pytest.mark.timeout(300)]


def trainer_of(folder, *callbacks, model=None, **options):
    """Return a Trainer of a small GPT-2 with dropout, on random tokens."""
    torch.manual_seed(0)
    if model is None:
        config = GPT2Config(
            vocab_size=32,
            n_positions=8,
            n_embd=16,
            n_layer=2,
            n_head=2,
            bos_token_id=0,
            eos_token_id=0,
        )
        model = GPT2LMHeadModel(config)
    tokens = torch.randint(0, 32, (64, 8), generator=torch.Generator().manual_seed(1))
    data = [{"input_ids": row, "labels": row} for row in tokens]
    defaults = {
        "max_steps": STEPS,
        "learning_rate": 0.01,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_grad_norm": 0.1,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        CHECKPOINTING: True,
    }
    return Trainer(
        model=model,
        args=TrainingArguments(str(folder), **{**defaults, **options}),
        train_dataset=data,
        eval_dataset=data[:8],
        callbacks=list(callbacks),
    )


def trained(folder, *callbacks, resume=None, **options):
    """Train, and return the Trainer and the messages of warnings."""
    trainer = trainer_of(folder, *callbacks, **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train(resume_from_checkpoint=resume)
    return trainer, [str(one.message) for one in caught]


def parts(trainer, callback):
    """Return the parameters and the state of this rank."""
    state = without_ids(callback.state.state_dict())
    return parameters(trainer.model), copy.deepcopy(state)


def copied_by_first(rank, source, target, without=()):
    """Copy a checkpoint without some ranks' files, and return the folder of the copy."""
    if rank == 0:
        shutil.copytree(source, target)
        for other in without:
            (target / f"compression-rank{other}.pt").unlink()
    dist.barrier()
    return str(target)


# --- what the ranks do ----------------------------------------------------------------------------


def resume(rank, folder, compressor):
    def run(place, **options):
        callback = CompressionCallback(compressor)
        trainer, messages = trained(place, callback, **options)
        return parts(trainer, callback), messages

    whole = CompressionCallback(compressor)
    trainer, _ = trained(folder, whole, save_strategy="steps", save_steps=3)
    found = {"whole": (parts(trainer, whole), [])}
    saved = folder / "checkpoint-3"
    found["files"] = sorted(file.name for file in saved.glob("compression*"))
    found["hidden"] = sorted(file.name for file in saved.glob(".*"))
    elsewhere = copied_by_first(rank, saved, folder / "moved" / "elsewhere")
    found["path"] = run(folder / "other", resume=elsewhere)
    newest = copied_by_first(rank, saved, folder / "again" / "checkpoint-3")
    found["newest"] = run(Path(newest).parent, resume=True)
    for name, without in (("one missing", [1]), ("all missing", [0, 1])):
        place = copied_by_first(rank, saved, folder / name.replace(" ", "-"), without)
        found[name] = run(folder / "other", resume=place)
    return found


def rotate(rank, folder):
    callback = CompressionCallback(FEEDBACK["messages"])
    trained(folder, callback, save_strategy="steps", save_steps=2, save_total_limit=1)
    dist.barrier()
    found = sorted(str(file.relative_to(folder)) for file in folder.rglob("compression*"))
    model_alone = folder / "model-alone"
    callback = CompressionCallback(FEEDBACK["messages"])
    trained(model_alone, callback, save_strategy="steps", save_steps=3, save_only_model=True)
    dist.barrier()
    return found, [str(file) for file in model_alone.rglob("compression*")]


class Reporting(TrainerCallback):
    """Keeps the logs that it sees, as callbacks for TensorBoard and others write them."""

    def __init__(self):
        self.seen = []

    def on_log(self, args, state, control, logs=None, **_):
        self.seen.append(dict(logs))


def log(rank, folder):
    reporting, callback = Reporting(), CompressionCallback(FEEDBACK["messages"])
    every = "eval_strategy" if "eval_strategy" in TrainingArguments.__dataclass_fields__ else ""
    trainer, _ = trained(folder, reporting, callback, **{every: "steps", "eval_steps": 3})
    return reporting.seen, trainer.state.log_history, callback.state.stats()


def compare_with_plain(rank, folder):
    plain, _ = trained(folder)
    compressed, _ = trained(folder, CompressionCallback(Identity()))
    probe = ProbeCallback(cost=None)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        probed, _ = trained(folder, probe)
    return {
        "plain": parameters(plain.model),
        "norms": [line["grad_norm"] for line in plain.state.log_history if "grad_norm" in line],
        "compressed": parameters(compressed.model),
        "probed": parameters(probed.model),
        "observed": probe.report.rounds,
        "printed": printed.getvalue(),
    }


def scale_loss(rank, folder):
    found = []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)):
        callback = CompressionCallback(FEEDBACK["messages"])
        # The Trainer unscales gradients before it clips them with fp16=True alone.
        trainer = trainer_of(folder, callback, max_grad_norm=0)
        trainer.accelerator.scaler = scaler
        trainer.train()
        found.append(parameters(trainer.model))
    return found, scaler.get_scale()


def train_twice(rank, folder):
    callback = CompressionCallback(FEEDBACK["messages"])
    trainer = trainer_of(folder, callback)
    found = []
    trainer.train()
    first = callback.state
    found.append((first.step, parameters(trainer.model)))
    trainer.train()
    found.append((callback.state.step, parameters(trainer.model)))
    same = callback.state is first
    # Another Trainer wraps the model anew.
    other, messages = trained(folder, callback, model=trainer.model)
    found.append((callback.state.step, parameters(other.model)))
    return same, found, messages


def load_of_another(rank, folder):
    trained(folder, CompressionCallback(TopK(0.1)), save_strategy="steps", save_steps=3)
    dist.barrier()
    trainer = trainer_of(folder, CompressionCallback(ErrorFeedback(TopK(0.1))))
    with pytest.raises(ValueError, match=r"that of TopK.*this end uses Err.*delete its files"):
        trainer.train(resume_from_checkpoint=str(folder / "checkpoint-3"))


def compile_model(rank, folder):
    callback = CompressionCallback(FEEDBACK["messages"])
    options = {"torch_compile": True, "torch_compile_backend": "eager", CHECKPOINTING: False}
    trainer, _ = trained(folder, callback, max_steps=2, **options)
    return type(trainer.model_wrapped).__name__, callback.state.step, parameters(trainer.model)


def ask_all(rank, folder):
    as_torchrun(rank, WORLD)
    folder = Path(folder)
    found = {name: resume(rank, folder / name, one) for name, one in FEEDBACK.items()}
    for scenario in (
        *(rotate, log, compare_with_plain, scale_loss, train_twice),
        *(load_of_another, compile_model),
    ):
        found[scenario.__name__] = scenario(rank, folder / scenario.__name__)
        dist.barrier()
    return found


# --- what the tests say ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return run_ranks(ask_all, WORLD, str(tmp_path_factory.mktemp("trainer")), timeout=280)


@pytest.mark.parametrize("how", ["path", "newest"])
@pytest.mark.parametrize("name", FEEDBACK)
def test_resumed_training_goes_on_bit_for_bit(ranks, name, how):
    for rank in range(WORLD):
        found = ranks[rank][name]
        assert found["files"] == ["compression-rank0.pt", "compression-rank1.pt"]
        assert found["hidden"] == []
        assert not [one for one in found[how][1] if "compression" in one]
        assert_same_bits(found[how][0], found["whole"][0])
    # The residuals are the ranks' own.
    states = [ranks[rank][name]["whole"][0][1]["sender"]["tensors"] for rank in range(WORLD)]
    with pytest.raises(AssertionError):
        assert_same_bits(*states)


@pytest.mark.parametrize("name", FEEDBACK)
def test_resumed_training_without_files_goes_on_with_a_warning(ranks, name):
    for kind, missing in (("one missing", [1]), ("all missing", [0, 1])):
        replicas = []
        for rank in range(WORLD):
            (weights, state), messages = ranks[rank][name][kind]
            warned = [one for one in messages if f"has no compression-rank{rank}.pt" in one]
            assert len(warned) == (rank in missing)
            assert state["step"] in (3, 6)
            with pytest.raises(AssertionError):
                assert_same_bits(weights, ranks[rank][name]["whole"][0][0])
            replicas.append(weights)
        assert_same_bits(*replicas)


def test_state_of_another_compressor_is_an_error(ranks):
    assert [found["load_of_another"] for found in ranks] == [None, None]


def test_files_go_with_the_checkpoints_that_the_trainer_deletes(ranks):
    for rank in range(WORLD):
        kept, of_model_alone = ranks[rank]["rotate"]
        assert kept == [f"checkpoint-6/compression-rank{other}.pt" for other in range(WORLD)]
        assert of_model_alone == []


def test_logs_have_what_was_sent_before_other_callbacks_see_them(ranks):
    for found in ranks:
        seen, history, stats = found["log"]
        assert len(seen) == len(history)
        training = [line for line in history if "loss" in line or "train_loss" in line]
        assert len(training) == STEPS + 1
        for lines in (seen, history):
            assert [all(name in line for name in NAMES) for line in lines] == [
                line in training for line in history
            ]
            assert [any(name in line for name in NAMES) for line in lines] == [
                line in training for line in history
            ]
        sent = [line["compression/message_bytes"] for line in training]
        assert sent == sorted(sent)
        assert 0 < sent[0] < sent[-1] == stats["message_bytes"]
        assert [training[-1][name] for name in NAMES[1:]] == [
            stats["ratio"],
            stats["recycled_share"],
        ]
        assert 0 < stats["recycled_share"] < 1
        assert stats["ratio"] < 0.5


def test_averages_of_accumulated_gradients_are_those_without_compression(ranks):
    for found in ranks:
        comparison = found["compare_with_plain"]
        # Clipping had something to do.
        assert min(comparison["norms"]) > 0.1
        for name, expected in comparison["plain"].items():
            torch.testing.assert_close(comparison["compressed"][name], expected)


def test_probe_leaves_the_training_alone_and_prints_on_the_main_process(ranks):
    for rank, found in enumerate(ranks):
        comparison = found["compare_with_plain"]
        assert_same_bits(comparison["probed"], comparison["plain"])
        assert comparison["observed"] == STEPS
        assert ("LookBackProbe: 6 gradients" in comparison["printed"]) == (rank == 0)


def test_residuals_follow_the_scale_of_the_loss(ranks):
    for found in ranks:
        (plain, scaled), scale = found["scale_loss"]
        assert scale == 1024 * 2 ** (STEPS // 2)
        assert_same_bits(scaled, plain)


def test_second_training_goes_on_with_the_state_of_the_first(ranks):
    for found in ranks:
        same, trainings, messages = found["train_twice"]
        assert same
        assert [step for step, _ in trainings] == [STEPS, 2 * STEPS, 3 * STEPS]
        assert not [one for one in messages if "compress" in one]
    for (_, one), (_, other) in zip(*(found["train_twice"][1] for found in ranks), strict=True):
        assert_same_bits(one, other)


def test_compiled_model_is_compressed(ranks):
    for found in ranks:
        assert found["compile_model"][:2] == ("OptimizedModule", 2)
    assert_same_bits(*(found["compile_model"][2] for found in ranks))


# --- wrong uses -----------------------------------------------------------------------------------


class Pretend(TrainerCallback):
    """Makes a Trainer say that it uses another engine."""

    def __init__(self, name):
        self.name, self.trainer = name, None

    def on_train_begin(self, *_, **__):
        setattr(self.trainer, self.name, True)


@pytest.mark.parametrize(
    ("engine", "advice"),
    [
        (None, "is a GPT2LMHeadModel: start a process for each device, as with torchrun --nproc"),
        ("is_fsdp_enabled", "leave fsdp out of the TrainingArguments, or compress between repli"),
        ("is_deepspeed_enabled", "leave deepspeed out of the TrainingArguments"),
    ],
)
def test_training_without_distributeddataparallel_is_an_error(tmp_path, engine, advice):
    callbacks = [CompressionCallback(LBGM())]
    if engine is not None:
        callbacks.insert(0, Pretend(engine))
    trainer = trainer_of(tmp_path, *callbacks)
    callbacks[0].trainer = trainer
    with pytest.raises(TypeError, match="averages them") as error:
        trainer.train()
    assert advice in str(error.value)


def test_wrong_arguments_are_an_error_before_the_training():
    model = torch.nn.Linear(2, 2)
    for make, message in [
        (lambda: CompressionCallback(TopK), "compressor"),
        (lambda: CompressionCallback(model), "compressor"),
        (lambda: CompressionCallback(LBGM(), start_step=-1), "start_step must be a whole number"),
        (lambda: CompressionCallback(LBGM(), weight=0), "weight must be above 0 and finite"),
        (lambda: CompressionCallback(LBGM(), loss_scale="big"), "loss_scale"),
        (lambda: ProbeCallback(delta=0.1), "delta"),
        (lambda: ProbeCallback(updates=True), "a callback observes gradients"),
    ]:
        with pytest.raises((TypeError, ValueError), match=message):
            make()


def test_callback_outside_of_a_trainer_is_an_error(tmp_path):
    callback = CompressionCallback(LBGM())
    with pytest.raises(RuntimeError, match=r"write Trainer\(..., callbacks=\[CompressionCallback"):
        callback.on_train_begin(TrainingArguments(str(tmp_path), use_cpu=True), None, None)
    assert callback.state is None


def test_missing_transformers_is_named():
    program = """
import sys
sys.modules["transformers"] = None
import lbgm_compress.adapters.transformers
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stderr.splitlines()[-1] == (
        "ImportError: lbgm_compress.adapters.transformers needs transformers: "
        "pip install 'lbgm_compress[transformers]'"
    )


# --- the example ----------------------------------------------------------------------------------


def test_example_trains_under_torchrun(tmp_path):
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    found = subprocess.run(
        [*command, str(ROOT / "examples" / "trainer_train.py")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=280,
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
    )
    assert found.returncode == 0, found.stderr
    last = found.stdout.splitlines()[-1]
    assert float(last.split("accuracy ")[1].split(" ")[0]) > 0.85
    assert float(last.split(" of the dense bytes")[0].split()[-1].rstrip("%")) < 10
