"""The comparison as users run it, and its parts."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.common import report
from benchmarks.common.data import load
from benchmarks.common.partition import partition, subsets
from benchmarks.common.training import Training, run
from benchmarks.compare import build_parser, main, methods_of
from lbgm_compress import (
    LBGM,
    Atomo,
    ErrorFeedback,
    Identity,
    LookBackSubspace,
    SignSGD,
    TopK,
)
from lbgm_compress._util.units import human_bytes
from tests.horovod_ranks import needs_horovod

ROOT = Path(__file__).parent.parent
FILES = [
    "accuracy_vs_round.png",
    "accuracy_vs_uplink.png",
    "report.html",
    "rounds.csv",
    "summary.json",
    "uplink_per_round.png",
]
SMALL = ["--workers", "5", "--rounds", "6", "--lr", "0.1"]
FEW = ["--methods", "LBGM(), TopK(0.1)"]


def compare(*arguments, cwd):
    return subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "compare.py"), *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=240,
    )


@pytest.fixture
def compare_here(tmp_path, monkeypatch):
    """Return a function that runs the command in this process, without drawing pictures."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(report, "chart", lambda *arguments: b"")
    return lambda *arguments: main([*arguments])


def rows_of(folder):
    with (folder / "rounds.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Return a small run of all nine methods: its folder and what it printed."""
    folder = tmp_path_factory.mktemp("compare")
    process = compare(*SMALL, "--out", "results", cwd=folder)
    assert process.returncode == 0, process.stderr
    return folder / "results", process.stdout


def test_run_ends_with_the_table_and_the_files(finished):
    folder, printed = finished
    assert sorted(path.name for path in folder.iterdir()) == FILES
    for name in FILES:
        if name.endswith(".png"):
            assert (folder / name).read_bytes().startswith(b"\x89PNG")
    for method in ("Identity()", "LBGM(TopK(0.1))", "Atomo(2)", "LBGM(SignSGD(scaled=True))"):
        assert re.search(rf"│ {re.escape(method)} +│ +\d\d\.\d\d% │", printed)
    assert printed.rstrip().endswith("report.html")


def test_every_method_and_round_has_a_row_and_the_sums_agree(finished):
    folder, _ = finished
    rows = rows_of(folder)
    summary = json.loads((folder / "summary.json").read_text())
    assert len(rows) == 9 * 6
    assert len(summary["methods"]) == 9
    for method in summary["methods"]:
        mine = [row for row in rows if row["method"] == method["method"]]
        assert [int(row["round"]) for row in mine] == [1, 2, 3, 4, 5, 6]
        assert sum(int(row["uplink_bytes"]) for row in mine) == method["uplink_bytes"]
        assert int(mine[-1]["uplink_bytes_total"]) == method["uplink_bytes"]
        assert float(mine[-1]["accuracy"]) == pytest.approx(method["final_accuracy"], abs=1e-6)
    dense = summary["methods"][0]
    assert dense["method"] == "Identity()"
    assert dense["ratio_to_dense"] == 1
    # 64 x 128 + 128 + 128 x 10 + 10 float32, 4 tensors of 1 + 3 bytes at most, and 16: 5 workers.
    assert 0 <= int(rows[0]["uplink_bytes"]) - 5 * (4 * 9610 + 16) <= 5 * 4 * 4


def test_lbgm_recycles_and_saves_bytes_in_a_real_run(finished):
    summary = json.loads((finished[0] / "summary.json").read_text())
    by_name = {method["method"]: method for method in summary["methods"]}
    for name in ("Identity()", "TopK(0.1)", "Atomo(2)", "SignSGD(scaled=True)"):
        inner = "" if name == "Identity()" else name
        assert by_name[f"LBGM({inner})"]["uplink_bytes"] < by_name[name]["uplink_bytes"]
        assert by_name[f"LBGM({inner})"]["recycled_share"] > 0


def test_page_is_self_contained_and_repeats_the_command(finished):
    page = (finished[0] / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 3
    assert not re.search(r"(?:src|href)=\"(?!data:)", page)
    assert "benchmarks/compare.py --workers 5 --rounds 6 --lr 0.1 --out results" in page


def test_summary_names_versions_arguments_and_seed(finished):
    summary = json.loads((finished[0] / "summary.json").read_text())
    assert summary["seed"] == 0
    assert summary["versions"]["torch"] == torch.__version__
    assert summary["arguments"]["workers"] == 5
    assert summary["arguments"]["batch-size"] == "full"


def test_same_seed_gives_the_same_csv_and_another_seed_another(finished, tmp_path, compare_here):
    def numbers(folder):
        return [{k: v for k, v in row.items() if k != "seconds"} for row in rows_of(folder)]

    assert compare_here(*SMALL, "--seed", "0", "--out", "seed-0") == 0
    assert numbers(tmp_path / "seed-0") == numbers(finished[0])
    assert compare_here(*SMALL, "--seed", "1", "--methods", "Identity()", "--out", "seed-1") == 0
    same = numbers(tmp_path / "seed-0")[:6]
    assert {row["method"] for row in same} == {"Identity()"}
    assert numbers(tmp_path / "seed-1") != same


@pytest.mark.parametrize(
    "arguments",
    [
        ["--model", "cnn", "--workers", "2", "--rounds", "2", *FEW],
        ["--model", "linear", "--partition", "classes:3", "--participation", "0.4", *FEW],
        ["--partition", "dirichlet:0.3", "--local-steps", "3", "--batch-size", "16", *FEW],
        ["--dataset", "mnist", "--workers", "4", "--rounds", "2", "--error-feedback"],
        ["--model", "small-cnn", "--local-steps", "2", "--batch-size", "8", *FEW],
        ["--server-momentum", "0", "--values", "int8", "--ratio", "0.02", "--rank", "1"],
    ],
    ids=" ".join,
)
def test_options_work_together(arguments, tmp_path, compare_here):
    assert compare_here(*SMALL, "--rounds", "3", *arguments) == 0
    rows = rows_of(tmp_path / "compare-results")
    assert len({row["method"] for row in rows}) == (2 if "--methods" in arguments else 9)
    assert all(float(row["loss"]) < 10 for row in rows)


def test_methods_are_those_that_were_asked_for(tmp_path, compare_here):
    expression = "TopK(0.01), LBGM(ErrorFeedback(TopK(0.01)), delta=0.1)"
    arguments = ["--methods", expression, "--target-accuracy", "0.05"]
    assert compare_here(*SMALL, *arguments) == 0
    summary = json.loads((tmp_path / "compare-results" / "summary.json").read_text())
    names = [method["method"] for method in summary["methods"]]
    assert names == ["TopK(0.01)", "LBGM(ErrorFeedback(TopK(0.01)), delta=0.1)"]
    assert all(method["bytes_to_target"] for method in summary["methods"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "LBGM(Tpok(0.1))"], "unknown compressor 'Tpok'"),
        (["--methods", "TopK(2)"], "ratio must be above 0 and at most 1, not 2"),
        (["--methods", "__import__('os').system('true')"], "is not a compressor"),
        (["--methods", "TopK(0.1), TopK(0.1)"], "twice"),
        (["--known", "nowhere:Few", "--methods", "Few(0.1)"], "cannot import 'nowhere:Few'"),
        (["--ratio", "2"], "ratio must be above 0 and at most 1, not 2"),
        (["--delta", "-1"], "delta must be from 0 to 1"),
        (["--rank", "0"], "rank must be a whole number of at least 1"),
        (["--values", "int3"], "values must be one of"),
        (["--ratio", "0.1", "--methods", "TopK(0.1)"], "--ratio shapes the default methods"),
        (["--partition", "classes:11"], "11 classes a worker, the data have 1 to 10"),
        (["--partition", "shards"], "none of iid, classes:N"),
        (["--partition", "dirichlet:0"], "alpha must be above 0"),
        (["--workers", "2000"], "more than there are images"),
        (["--workers", "0"], "whole number of at least 1"),
        (["--workers", "900", "--partition", "classes:5"], "use fewer workers"),
        (["--dataset", "cifar10"], "invalid choice"),
        (["--dataset", "fashion-mnist", "--data-dir", "nowhere"], "no such folder"),
        (["--dataset", "fashion-mnist", "--data-dir", "."], "train-images-idx3-ubyte"),
        (["--data-dir", "."], "--data-dir is for fashion-mnist"),
        (["--participation", "0"], "not a number above 0 to 1"),
        (["--lr", "nan"], "not a number"),
        (["--device", "tpu"], "neither cpu nor cuda"),
        (["--out", "file/below"], "cannot write there"),
        (["--out", "file"], "cannot write there"),
        (["--round", "5"], "unrecognized arguments"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_input_gives_one_line_and_exit_code_2(
    arguments, message, tmp_path, compare_here, capsys
):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(SystemExit) as stopped:
        compare_here(*arguments)
    assert stopped.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    [line] = printed.err.splitlines()
    assert line.startswith("compare.py: error: ")
    assert message in line
    assert not (tmp_path / "compare-results" / "rounds.csv").exists()


def test_wrong_input_ends_the_process_before_anything_is_done(tmp_path):
    process = compare("--methods", "TopK(2)", cwd=tmp_path)
    assert (process.returncode, process.stdout) == (2, "")
    assert process.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_interrupted_run_keeps_what_is_finished(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "compare.py"), "--rounds", "300"]
    process = subprocess.Popen(
        [*command, "--workers", "3", "--methods", "Identity(), LBGM(), TopK(0.5)"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        # A shell starts its background jobs with interrupts ignored, which children inherit.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    results = tmp_path / "compare-results"
    try:
        # The first line comes when the first method is finished; the second one is under way.
        assert "Identity()" in process.stdout.readline()
        process.send_signal(signal.SIGINT)
        printed, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130, errors
    assert errors == ""
    assert "Interrupted" in printed
    assert sorted(path.name for path in results.iterdir()) == FILES
    summary = json.loads((results / "summary.json").read_text())
    assert summary["interrupted"] is True
    assert summary["methods"][0]["finished"] is True
    assert summary["methods"][0]["rounds"] == 300
    assert sum(not method["finished"] for method in summary["methods"]) <= 1
    assert "nterrupted" in (results / "report.html").read_text()


def labels(classes=10, each=60):
    return torch.arange(classes).repeat(each)


@pytest.mark.parametrize("scheme", ["iid", "classes:1", "classes:4", "dirichlet:0.1"])
def test_partition_gives_every_image_once(scheme):
    parts = partition(labels(), 20, scheme, seed=0)
    assert len(parts) == 20
    assert all(len(part) for part in parts)
    assert torch.equal(torch.cat(parts).sort().values, torch.arange(600))
    again = partition(labels(), 20, scheme, seed=0)
    assert all(torch.equal(a, b) for a, b in zip(parts, again, strict=True))


def test_partition_by_classes_gives_exactly_so_many_classes():
    for number in (1, 3, 10):
        parts = partition(labels(), 20, f"classes:{number}", seed=1)
        assert {len(set(labels()[part].tolist())) for part in parts} == {number}


def test_partition_iid_is_as_even_as_possible():
    sizes = {len(part) for part in partition(labels(), 7, "iid", seed=0)}
    assert sizes == {85, 86}


def test_partition_by_dirichlet_is_more_uneven_for_smaller_alpha():
    def spread(alpha):
        parts = partition(labels(each=500), 10, f"dirichlet:{alpha}", seed=0)
        counts = [np.bincount(labels(each=500)[part], minlength=10) for part in parts]
        return float(np.mean([c.max() / c.sum() for c in counts]))

    assert spread(0.05) > spread(1) > spread(100)


def test_default_methods_are_all_nine_and_feed_errors_back_inside_lbgm():
    options = build_parser().parse_args([])
    assert methods_of(options) == [
        Identity(),
        LBGM(),
        TopK(0.1),
        LBGM(TopK(0.1)),
        Atomo(2),
        LBGM(Atomo(2)),
        SignSGD(scaled=True),
        LBGM(SignSGD(scaled=True)),
        ErrorFeedback(LookBackSubspace()),
    ]
    options = build_parser().parse_args(["--error-feedback", "--delta", "0.5"])
    assert methods_of(options)[1:4] == [
        LBGM(delta=0.5),
        ErrorFeedback(TopK(0.1)),
        LBGM(ErrorFeedback(TopK(0.1)), delta=0.5),
    ]


def test_fewer_images_and_evaluations_leave_the_training_alone(tmp_path, compare_here):
    methods = ["--methods", "Identity(), LBGM()", "--rounds", "7"]
    few = [*methods, "--evaluate-every", "3", "--average", "2", "--target-accuracy", "0.1"]
    for name, arguments in (("all", methods), ("few", few)):
        assert compare_here(*SMALL, *arguments, "--out", name) == 0
    all_, few_ = (numbers_of(tmp_path / name) for name in ("all", "few"))
    assert [(row[0], row[1], row[3]) for row in all_] == [(r[0], r[1], r[3]) for r in few_]
    evaluated = [accuracy for method, _, accuracy, _ in all_ if method == "Identity()"]
    repeated = [accuracy for method, _, accuracy, _ in few_ if method == "Identity()"]
    assert repeated == [evaluated[i] for i in (0, 0, 2, 2, 2, 5, 6)]
    summary = json.loads((tmp_path / "few" / "summary.json").read_text())
    mean = (evaluated[5] + evaluated[6]) / 2
    assert summary["methods"][0]["final_accuracy"] == pytest.approx(mean, abs=1e-6)

    less = ["--images", "20", "--test-images", "50", "--out", "less"]
    assert compare_here(*SMALL, *methods, *less) == 0
    less = numbers_of(tmp_path / "less")
    assert less != all_
    assert all(round(accuracy * 50, 4) % 1 == 0 for _, _, accuracy, _ in less)


def test_subsets_are_of_each_part_and_no_larger_than_asked_for():
    parts = [torch.arange(10), torch.arange(10, 13)]
    first, second = subsets(parts, 5, seed=0)
    assert len(first) == 5
    assert set(first.tolist()) < set(range(10))
    assert first.tolist() == sorted(first.tolist())
    assert torch.equal(second, parts[1])
    assert not torch.equal(first, subsets(parts, 5, seed=1)[0])


def test_one_worker_without_compression_is_plain_gradient_descent():
    dataset = load("digits", None, 0)
    count = len(dataset.train_labels)
    training = Training(
        dataset=dataset,
        parts=[torch.arange(count)],
        model="linear",
        rounds=5,
        local_steps=1,
        batch_size=None,
        participation=1.0,
        lr=0.1,
        server_momentum=0.9,
        seed=0,
        device=torch.device("cpu"),
    )
    rounds = list(run(training, Identity()))
    model = training.initial_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for round_ in rounds:
        optimizer.zero_grad()
        logits = model(dataset.train_images)
        torch.nn.functional.cross_entropy(logits, dataset.train_labels).backward()
        optimizer.step()
        with torch.no_grad():
            loss = torch.nn.functional.cross_entropy(
                model(dataset.test_images), dataset.test_labels
            )
        assert round_.loss == pytest.approx(loss.item(), rel=1e-4)


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (9_996, "10.0 kB"),
        (999_400, "999 kB"),
        (999_600, "1.00 MB"),
        (27_432_100, "27.4 MB"),
        (2.5e12, "2.50 TB"),
    ],
)
def test_bytes_are_written_with_three_digits(number, text):
    assert human_bytes(number) == text


def numbers_of(folder):
    return [
        (row["method"], row["round"], float(row["accuracy"]), int(row["uplink_bytes"]))
        for row in rows_of(folder)
    ]


OWN = """
from dataclasses import dataclass
from lbgm_compress import TopK

@dataclass(frozen=True, repr=False)
class Few(TopK):
    pass
"""


def known(engine, folder):
    """Write a module with a compressor of one's own, and return the option that names it."""
    # A module is imported once in this process: each engine has its own.
    (folder / f"own_{engine}.py").write_text(OWN)
    return ["--known", f"own_{engine}:Few"]


@pytest.mark.timeout(280)
@pytest.mark.parametrize(
    ("engine", "arguments"),
    [
        ("ddp", ["--model", "cnn", "--local-steps", "2", "--batch-size", "16", "--rounds", "5"]),
        pytest.param(
            "horovod",
            ["--partition", "dirichlet:0.5"],
            marks=[pytest.mark.horovod, needs_horovod],
        ),
    ],
    ids=["ddp, local steps", "horovod, full batch"],
)
def test_real_engines_give_what_one_process_gives(
    engine, arguments, tmp_path, compare_here, capsys
):
    methods = "LBGM(), LBGM(Few(0.1)), LBGM(SignSGD(scaled=True)), Identity()"
    common = ["--workers", "3", "--rounds", "12", "--lr", "0.1", *arguments]
    common += known(engine, tmp_path)
    assert compare_here(*common, "--methods", methods, "--out", "process") == 0
    # DDP's own average is that of messages without compression.
    methods += ", Dense()" if engine == "ddp" else ""
    assert compare_here(*common, "--methods", methods, "--engine", engine, "--out", engine) == 0
    assert "on the wire" in capsys.readouterr().out
    expected, found = numbers_of(tmp_path / "process"), numbers_of(tmp_path / engine)
    if engine == "ddp":
        dense = [row for row in expected if row[0] == "Identity()"]
        expected += [("Dense()", *row[1:]) for row in dense]
    assert len(expected) == len(found)
    for (method, number, accuracy, uplink), other in zip(expected, found, strict=True):
        assert other[:2] == (method, number)
        # Float rounding may turn an image of 360, or a decision close to the threshold.
        assert other[2] == pytest.approx(accuracy, abs=2 / 360)
        assert other[3] == pytest.approx(uplink, rel=0.02)
    summary = json.loads((tmp_path / engine / "summary.json").read_text())
    for method in summary["methods"]:
        if method["method"] != "Dense()":
            # Every message goes to two others.
            assert method["wire_bytes"] > 2 * method["uplink_bytes"]


@pytest.mark.timeout(280)
@pytest.mark.parametrize(
    "engine",
    ["ddp", pytest.param("horovod", marks=[pytest.mark.horovod, needs_horovod])],
)
def test_contributions_add_up_on_real_engines_as_in_one_process(
    engine, tmp_path, compare_here, capsys
):
    methods = "ErrorFeedback(SharedSubspace(4, 2, 'float32')), ErrorFeedback(PowerSGD(2)), "
    methods += "SharedLBGM(0.5)"
    common = ["--workers", "3", "--rounds", "8", "--lr", "0.1", "--partition", "dirichlet:0.5"]
    common += ["--methods", methods]
    for name in ("process", engine):
        assert compare_here(*common, "--engine", name, "--out", name) == 0
    expected, found = numbers_of(tmp_path / "process"), numbers_of(tmp_path / engine)
    assert len(expected) == len(found) == 3 * 8
    for (method, number, accuracy, uplink), other in zip(expected, found, strict=True):
        assert other[:2] == (method, number)
        assert other[2] == pytest.approx(accuracy, abs=2 / 360)
        # A real sum begins with three numbers about the ranks.
        assert 0 < other[3] - uplink <= 3 * 3 * 4
    shares = [
        [float(row["recycled_share"]) for row in rows_of(tmp_path / name)]
        for name in ("process", engine)
    ]
    assert shares[0] == shares[1]
    assert max(shares[0][-8:]) > 0
    summary = json.loads((tmp_path / engine / "summary.json").read_text())
    for method in summary["methods"]:
        assert method["wire_bytes"] > method["uplink_bytes"]


@pytest.mark.flower
@pytest.mark.xdist_group("flower")
@pytest.mark.skipif(
    importlib.util.find_spec("flwr") is None,
    reason="Flower is not installed: it needs Python 3.11",
)
def test_flowers_simulation_gives_what_one_process_gives(tmp_path, compare_here):
    methods = ["--methods", "Identity(), LBGM(Few(0.1), delta=0.5)", *known("flower", tmp_path)]
    sampled = ["--workers", "6", "--participation", "0.5", "--local-steps", "2"]
    common = [*methods, *sampled, "--batch-size", "40", "--rounds", "5", "--lr", "0.1"]
    for name in ("process", "flower"):
        assert compare_here(*common, "--engine", name, "--out", name) == 0
    expected, found = numbers_of(tmp_path / "process"), numbers_of(tmp_path / "flower")
    assert len(expected) == len(found) == 10
    for (method, number, accuracy, uplink), other in zip(expected, found, strict=True):
        assert other[:2] == (method, number)
        assert other[2] == pytest.approx(accuracy, abs=2 / 360)
        # Each reply begins with two bytes of its own.
        assert other[3] == pytest.approx(uplink + 3 * 2, rel=0.02)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--engine", "ddp", "--participation", "0.5"], "all ranks take part in every round"),
        (["--engine", "ddp", "--device", "cuda"], "--device"),
        (["--engine", "mpi"], "invalid choice"),
        (["--methods", "TorchPowerSGD(2)"], "TorchPowerSGD(2) is part of DistributedDataParallel"),
        (["--engine", "ddp", "--methods", "TorchPowerSGD(0)"], "rank must be a whole number"),
        (
            ["--methods", "SharedLBGM()", "--participation", "0.5"],
            "SharedLBGM() averages by sums over all workers, and --participation is 0.5",
        ),
        (["--methods", "SharedLBGM()", "--open-loop"], "no messages that --open-loop could"),
        (["--engine", "flower", "--methods", "ErrorFeedback(PowerSGD())"], "which Flower has not"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_engines_say_what_they_cannot_do(arguments, message, compare_here, capsys):
    with pytest.raises(SystemExit) as stopped:
        compare_here(*arguments)
    assert stopped.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert message in line


def test_engine_that_fails_shows_what_its_workers_printed(
    tmp_path, compare_here, capsys, monkeypatch
):
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys\n"
        "if os.environ.get('RANK') == '1':\n    sys.exit('this rank is out of order')\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert compare_here(*SMALL, "--engine", "ddp", "--workers", "2") == 1
    printed = capsys.readouterr().err
    assert "compare.py: error: --engine ddp:" in printed
    assert "this rank is out of order" in printed
