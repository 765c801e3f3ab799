"""Callbacks for Lightning's Trainer, on two ranks that Lightning takes for its own."""

from __future__ import annotations

import contextlib
import csv
import importlib.util
import io
import os
import pickle
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

if importlib.util.find_spec("lightning") is None:
    pytest.skip("Lightning is not installed", allow_module_level=True)

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from lbgm_compress import LBGM, ErrorFeedback, Identity, SharedSubspace, TopK
from lbgm_compress.adapters.lightning import CompressionCallback, ProbeCallback
from tests.laws import assert_same_bits, without_ids
from tests.ranks import run_ranks

# What several tests look at is then trained once, not once in each of pytest's processes.
pytestmark = pytest.mark.xdist_group("lightning")
ROOT = Path(__file__).parent.parent
WORLD = 2
COMPRESSORS = {"messages": LBGM(ErrorFeedback(TopK(0.1))), "sums": ErrorFeedback(SharedSubspace(2))}
# Each rank has 12 batches in an epoch, and so 6 steps of two batches.
BATCHES, STEPS = 12, 6


class Layers:
    """Two layers that regress. `fail_at` is the step at which training fails, once."""

    def __init__(self, optimizer=torch.optim.SGD, fail_at=None):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 1))
        self.optimizer, self.fail_at = optimizer, fail_at

    def training_step(self, batch, index):
        if self.global_step == self.fail_at:
            self.fail_at = None
            raise ArithmeticError("as told")
        [x] = batch
        return (self.layers(x) - x[:, :1].sin()).square().mean()

    def validation_step(self, batch, index):
        self.training_step(batch, index)

    def configure_optimizers(self):
        return self.optimizer(self.parameters(), lr=0.05)


class Net(Layers, LightningModule):
    pass


class Manual(Net):
    """It steps the optimizer itself, and averages no gradients if `synced` is False."""

    def __init__(self, synced):
        super().__init__()
        self.automatic_optimization = False
        self.synced = synced

    def training_step(self, batch, index):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        loss = super().training_step(batch, index)
        strategy = self.trainer.strategy
        with contextlib.nullcontext() if self.synced else strategy.block_backward_sync():
            self.manual_backward(loss)
        optimizer.step()


def batches(factor=None):
    """Return a loader of batches, of which one is multiplied by `factor`."""
    x = torch.randn(WORLD * BATCHES * 4, 12, generator=torch.Generator().manual_seed(0))
    if factor is not None:
        x[WORLD * 4 * 2] *= factor
    return DataLoader(TensorDataset(x), batch_size=4)


QUIET = {"enable_progress_bar": False, "enable_model_summary": False}


def trainer(folder, *callbacks, kind=Trainer, **options):
    checkpointed = any(isinstance(one, ModelCheckpoint) for one in callbacks)
    given = {
        "accelerator": "cpu",
        "devices": WORLD,
        "strategy": "ddp",
        "logger": False,
        "enable_checkpointing": checkpointed,
        "max_epochs": 2,
        "default_root_dir": folder,
        **QUIET,
    }
    return kind(callbacks=list(callbacks), **{**given, **options})


def parameters(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def fit(folder, *callbacks, model=None, loader=None, ckpt_path=None, **options):
    """Train a model, and return the trainer and the parameters."""
    model = Net() if model is None else model
    made = trainer(folder, *callbacks, **options)
    made.fit(model, batches() if loader is None else loader, ckpt_path=ckpt_path)
    return made, parameters(model)


def found_error(function):
    """Return the type and message of the error that a function raises."""
    try:
        function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def kept(callback):
    """Return the state of a rank, without the random numbers that name look-back gradients."""
    return without_ids(callback.state.state_dict())


ALL = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5, "precision": "bf16-mixed"}


def resume(rank, folder):
    """Train for four epochs, and again from the checkpoint of the second one."""
    found = {}
    for name, compressor in COMPRESSORS.items():
        into = f"{folder}/{name}"
        saving = ModelCheckpoint(into, filename="{epoch}", every_n_epochs=1, save_top_k=-1)
        callback = CompressionCallback(compressor)
        logger = CSVLogger(into, name="", version="logs")
        options = {"max_epochs": 4, "log_every_n_steps": 1, **ALL}
        model = Net(torch.optim.AdamW)
        made, straight = fit(into, callback, saving, model=model, logger=logger, **options)
        stats = callback.state.stats()
        saved = kept(callback)
        steps = made.global_step, callback.state.step

        again, model = CompressionCallback(compressor), Net(torch.optim.AdamW)
        path = f"{into}/epoch=1.ckpt"
        _, resumed = fit(into, again, model=model, ckpt_path=path, **options)
        found[name] = {
            "straight": (straight, saved),
            "resumed": (resumed, kept(again)),
            "steps": steps,
            "stats": {name: stats[name] for name in ("message_bytes", "ratio", "recycled_share")},
        }
    path = f"{folder}/messages/epoch=1.ckpt"
    other = CompressionCallback(LBGM(TopK(0.5)))
    found["other"] = found_error(lambda: fit(folder, other, ckpt_path=path, max_epochs=4, **ALL))

    made, _ = fit(folder, max_epochs=1)
    path = f"{folder}/plain.ckpt"
    made.save_checkpoint(path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(folder, CompressionCallback(LBGM()), ckpt_path=path, max_epochs=2)
    said = [str(one.message) for one in caught]
    found["warnings"] = [one for one in said if "no state of CompressionCallback" in one]
    return found


def compare(rank, folder):
    """Train in ways that have to be the same as others."""
    found = {}
    options = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5}
    _, found["plain"] = fit(folder, **options)
    _, found["identity"] = fit(folder, CompressionCallback(Identity()), **options)

    # The probe changes nothing.
    probe = ProbeCallback(deltas=(0.1, 0.5), cost=None)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        _, found["probed"] = fit(folder, probe, **options)
    found["report"] = probe.report.rounds, str(probe.report) in printed.getvalue()

    # Two trainings are one of twice the length.
    callback = CompressionCallback(COMPRESSORS["messages"])
    _, found["once"] = fit(folder, callback, max_epochs=4)
    once = kept(callback)
    callback, model = CompressionCallback(COMPRESSORS["messages"]), Net()
    made = trainer(folder, callback)
    made.validate(model, batches(), verbose=False)
    for epochs in (2, 4):
        made.fit_loop.max_epochs = epochs
        made.fit(model, batches())
    found["twice"] = parameters(model)
    found["states"] = once, kept(callback)

    # Another model begins anew.
    made, _ = fit(folder, callback, model=Net())
    found["another model"] = made.global_step, callback.state.step
    return found


def fail(rank, folder):
    """Train with an exception, with inf under loss scaling, and without averages."""
    found = {}
    saving = ModelCheckpoint(folder, filename="failed", save_on_exception=True, save_last=True)
    callback, model = CompressionCallback(COMPRESSORS["messages"]), Net(fail_at=7)
    probe = ProbeCallback()
    made = trainer(folder, callback, probe, saving)
    with contextlib.redirect_stdout(io.StringIO()):
        found["error"] = found_error(lambda: made.fit(model, batches()))
        found["rounds"] = probe.report.rounds
        steps = callback.state.step
        made.fit(model, batches())
    found["steps"] = steps, callback.state.step, made.global_step
    found["after failure"] = parameters(model)
    [path] = Path(folder).glob("failed.ckpt")
    again, model = CompressionCallback(COMPRESSORS["messages"]), Net()
    with contextlib.redirect_stdout(io.StringIO()):
        made, found["resumed"] = fit(folder, again, model=model, ckpt_path=str(path))
    found["resumed steps"] = again.state.step

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=5)
    plugin = MixedPrecision("16-mixed", "cpu", scaler)
    callback = CompressionCallback(ErrorFeedback(TopK(0.1)))
    made, found["scaled"] = fit(
        folder, callback, loader=batches(1e9), plugins=[plugin], max_epochs=1
    )
    asked = callback.state.loss_scale
    found["scale"] = scaler.get_scale(), callback.state.loss_scale()
    found["scaler's own"] = getattr(asked, "__self__", None) is scaler
    given = CompressionCallback(Identity(), loss_scale=1.0)
    fit(folder, given, plugins=[plugin], max_epochs=1)
    found["given"] = given.state.loss_scale

    for synced in (True, False):
        callback = CompressionCallback(COMPRESSORS["messages"])
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            _, found[f"manual {synced}"] = fit(folder, callback, model=Manual(synced))
        found[f"warnings {synced}"] = [
            str(one.message) for one in caught if "averaged no gradients" in str(one.message)
        ]
        found[f"steps {synced}"] = callback.state.step

    class Taken(Callback):
        def on_fit_start(self, trainer, pl_module):
            trainer.strategy.model.register_comm_hook(None, allreduce_hook)

    found["taken"] = found_error(lambda: fit(folder, Taken(), CompressionCallback(Identity())))
    return found


def train_by_the_other_package(rank, folder):
    """Return the parameters of Lightning's training and of the same by pytorch_lightning."""
    import pytorch_lightning

    class Other(Layers, pytorch_lightning.LightningModule):
        pass

    found = []
    for kind, model in ((Trainer, Net()), (pytorch_lightning.Trainer, Other())):
        callback = CompressionCallback(COMPRESSORS["messages"])
        made = trainer(folder, callback, kind=kind, max_epochs=1)
        made.fit(model, batches())
        found.append((parameters(model), callback.state.step, made.global_step))
    return found


def as_lightning_rank(rank, function, folder):
    os.environ["LOCAL_RANK"] = str(rank)
    warnings.filterwarnings("ignore", module="lightning")
    return function(rank, folder)


def run(function, folder):
    return run_ranks(as_lightning_rank, WORLD, function, str(folder), timeout=280)


def assert_ranks_agree(results, *names):
    for name in names:
        assert_same_bits(results[0][name], results[1][name], f"{name}, on both ranks")


# --- checkpoints, accumulation, clipping, precision, metrics --------------------------------------


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resumed")
    return folder, run(resume, folder)


@pytest.mark.parametrize("name", COMPRESSORS)
def test_resumed_training_has_the_bits_of_one_that_was_not_stopped(resumed, name):
    _, results = resumed
    for rank, found in enumerate(results):
        assert_same_bits(*(found[name][way] for way in ("resumed", "straight")), f"rank {rank}")
    residual = [one[name]["straight"][1]["sender"] for one in results]
    with pytest.raises(AssertionError):
        assert_same_bits(*residual)


@pytest.mark.parametrize("name", COMPRESSORS)
def test_replicas_agree_and_gradients_are_exchanged_once_for_each_step(resumed, name):
    _, results = resumed
    assert_same_bits(*(found[name]["straight"][0] for found in results))
    for found in results:
        assert found[name]["steps"] == (4 * STEPS, 4 * STEPS)


@pytest.mark.parametrize("name", COMPRESSORS)
def test_logger_of_lightning_has_the_totals_of_the_first_rank(resumed, name):
    folder, results = resumed
    with (folder / name / "logs" / "metrics.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["compression/ratio"]]
    assert len(rows) == 4 * STEPS
    stats = results[0][name]["stats"]
    assert stats["message_bytes"] > 0
    assert 0 < stats["ratio"] < 1
    for metric, value in stats.items():
        assert float(rows[-1][f"compression/{metric}"]) == pytest.approx(value)
    sent = [float(row["compression/message_bytes"]) for row in rows]
    assert sent == sorted(set(sent))


def test_checkpoint_is_read_without_running_code_and_refused_by_another_compressor(resumed):
    folder, results = resumed
    saved = torch.load(folder / "messages" / "epoch=1.ckpt", weights_only=True)
    state = saved["callbacks"]["CompressionCallback"]
    assert sorted(state["senders"]) == [0, 1]
    for found in results:
        assert found["other"].startswith("ValueError: ")
        assert "LBGM(TopK(0.5))" in found["other"]
        assert "remove checkpoint['callbacks']['CompressionCallback']" in found["other"]


def test_checkpoint_from_before_compression_gives_a_warning(resumed):
    for found in resumed[1]:
        [message] = found["warnings"]
        assert "compression begins anew, with full messages" in message


# --- other trainings ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    return run(compare, tmp_path_factory.mktemp("compared"))


def test_without_loss_it_is_training_without_the_callback(compared):
    for found in compared:
        torch.testing.assert_close(found["identity"], found["plain"], rtol=1e-5, atol=1e-6)


def test_probe_changes_no_bit_and_has_a_round_for_each_step(compared):
    for rank, found in enumerate(compared):
        assert_same_bits(found["probed"], found["plain"])
        assert found["report"] == (2 * STEPS, rank == 0)


def test_second_training_of_a_model_goes_on_from_the_first(compared):
    for found in compared:
        assert_same_bits(found["twice"], found["once"])
        assert_same_bits(*found["states"])


def test_training_of_another_model_begins_anew(compared):
    for found in compared:
        assert found["another model"] == (2 * BATCHES, 2 * BATCHES)


# --- failures, loss scaling, steps without averages -----------------------------------------------


@pytest.fixture(scope="module")
def failed(tmp_path_factory):
    return run(fail, tmp_path_factory.mktemp("failed"))


def test_training_goes_on_after_an_exception(failed):
    assert_ranks_agree(failed, "after failure")
    for found in failed:
        assert found["error"] == "ArithmeticError: as told"
        assert found["rounds"] == 7
        assert found["steps"][0] == 7
        assert found["steps"][1] == found["steps"][2] > 7


def test_checkpoint_of_an_exception_has_no_state_of_the_compression(failed):
    assert_ranks_agree(failed, "resumed")
    for found in failed:
        assert found["resumed steps"] == 2 * BATCHES - 7


def test_loss_scale_is_that_of_the_scaler_unless_given(failed):
    assert_ranks_agree(failed, "scaled")
    for found in failed:
        assert found["scaler's own"]
        # It was halved in the step with inf, and doubled after each five of the others.
        assert found["scale"] == (2.0**11, 2.0**11)
        assert all(p.isfinite().all() for p in found["scaled"].values())
        assert found["given"] == 1.0


def test_steps_without_averages_are_warned_of_once(failed):
    assert_ranks_agree(failed, "manual True")
    for found in failed:
        assert found["warnings True"] == []
        assert found["steps True"] == 2 * BATCHES
        [message] = found["warnings False"]
        assert "nothing was compressed and replicas may differ" in message
        assert found["steps False"] == 0
    assert not torch.equal(*(f["manual False"]["layers.0.weight"] for f in failed))


def test_model_that_has_a_hook_already_is_refused(failed):
    for found in failed:
        assert "RuntimeError: the model takes no hook: it has one already" in found["taken"]


# --- wrong uses -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CompressionCallback(LBGM), r"write LBGM\(\.\.\.\), with brackets"),
        (lambda: CompressionCallback("lbgm"), "expected a compressor such as LBGM"),
        (lambda: CompressionCallback(LBGM(), start_step=-1), "start_step must be a whole number"),
        (lambda: CompressionCallback(LBGM(), weight=0), "weight must be above 0 and finite"),
        (
            lambda: CompressionCallback(LBGM(), loss_scale=torch.amp.GradScaler("cpu")),
            "give its method, scaler.get_scale",
        ),
        (lambda: ProbeCallback(delta=0.1), "unexpected keyword argument 'delta'"),
        (lambda: ProbeCallback(updates=True), r"LookBackProbe\(model, updates=True\)"),
    ],
)
def test_wrong_argument_is_refused_by_the_constructor(make, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make()


def test_strategy_without_ddp_is_refused_before_the_training(tmp_path):
    made = trainer(tmp_path, CompressionCallback(LBGM()), devices=1, strategy="auto")
    with pytest.raises(
        TypeError, match=r'Trainer\(strategy="ddp", devices=2\).*the place of SingleDeviceStrategy'
    ):
        made.fit(Net(), batches())
    assert made.global_step == 0


def test_probe_works_on_a_single_device(tmp_path, capsys):
    probe = ProbeCallback(deltas=(0.1,), cost=None)
    made = trainer(tmp_path, probe, devices=1, strategy="auto", max_epochs=1, limit_train_batches=4)
    made.fit(Net(), batches())
    assert probe.report.rounds == 4
    assert str(probe.report) in capsys.readouterr().out


def test_callbacks_go_to_other_processes():
    callback = pickle.loads(pickle.dumps(CompressionCallback(LBGM(TopK(0.1)), weight=2.0)))
    assert callback.state is None
    assert pickle.loads(pickle.dumps(ProbeCallback(deltas=(0.1,)))).report is None


def test_trainer_of_the_package_pytorch_lightning_takes_the_callbacks(tmp_path):
    if importlib.util.find_spec("pytorch_lightning") is None:
        pytest.skip("pytorch_lightning is not installed")
    for found in run(train_by_the_other_package, tmp_path):
        assert_same_bits(*found)
        assert found[0][1:] == (BATCHES, BATCHES)


def test_missing_lightning_is_named():
    program = """
import sys
sys.modules["lightning"] = None
import lbgm_compress.adapters.attached
import lbgm_compress.adapters.lightning
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    last = done.stderr.splitlines()[-1]
    assert last.startswith("ImportError: lbgm_compress.adapters.lightning needs Lightning")
    assert last.endswith("pip install 'lbgm_compress[lightning]'")


def test_example_trains_with_processes_that_lightning_starts(tmp_path):
    found = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "lightning_train.py")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=250,
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
    )
    assert found.returncode == 0, found.stderr
    [last] = [line for line in found.stdout.splitlines() if line.startswith("accuracy")]
    assert float(last.split()[1]) > 0.85
    assert float(last.split(" of the dense bytes")[0].split()[-1].rstrip("%")) < 50
    assert list(tmp_path.iterdir()) == []
