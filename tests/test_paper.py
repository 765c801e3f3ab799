"""The figures of the paper as smoke tests, and the runs that they keep."""

from __future__ import annotations

import csv
import json

import pytest

from benchmarks import compare, paper
from benchmarks.common.command_line import INTERRUPTED
from lbgm_compress import LBGM, Identity
from lbgm_compress.compressors.parse import parse_compressor


def read(file):
    with file.open(newline="") as lines:
        return list(csv.DictReader(lines))


@pytest.fixture(scope="module")
def standalone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("paper")
    arguments = ["standalone", "--quick", "--out", str(folder)]
    assert paper.main([*arguments, "--only", "fashion-mnist-linear"]) == 0
    return folder


def test_figure_leaves_a_picture_a_table_and_the_rounds_of_each_setting(standalone):
    names = sorted(path.name for path in standalone.iterdir())
    assert names == [
        "fashion-mnist-linear-classes-3-lr-0.01",
        "fashion-mnist-linear-iid-lr-0.01",
        "standalone-linear.png",
        "standalone.csv",
    ]
    table = read(standalone / "standalone.csv")
    assert [row["method"] for row in table] == ["Identity()", "LBGM()"] * 2
    for row in table:
        rounds = read(standalone / row["setting"] / "rounds.csv")
        mine = [r for r in rounds if r["method"] == row["method"]]
        assert len(mine) == 4
        assert int(row["uplink"]) == sum(int(r["uplink_bytes"]) for r in mine)
        assert float(row["final accuracy"]) == pytest.approx(float(mine[-1]["accuracy"]), abs=1e-4)


def test_command_that_is_kept_repeats_the_setting(standalone):
    summary = json.loads(
        (standalone / "fashion-mnist-linear-iid-lr-0.01" / "summary.json").read_text()
    )
    import shlex

    program, script, *arguments = shlex.split(summary["command"])
    assert (program, script) == ("python", "benchmarks/compare.py")
    options = compare.build_parser().parse_args(arguments)
    assert (options.dataset, options.workers, options.rounds) == ("digits", 6, 4)
    assert compare.methods_of(options) == [Identity(), LBGM()]


def test_what_is_kept_is_not_run_again_and_what_is_missing_is(standalone, monkeypatch):
    asked = []
    monkeypatch.setattr(compare, "main", lambda arguments: asked.append(arguments) or 1)
    common = ["--quick", "--out", str(standalone), "--only", "fashion-mnist-linear-iid"]
    assert paper.main(["standalone", *common]) == 0
    assert asked == []
    assert paper.main(["threshold", *common]) == 1
    [arguments] = asked
    methods = arguments[arguments.index("--methods") + 1]
    assert "LBGM(delta=0.01)" in methods
    assert "Identity()" not in methods


def test_what_was_run_with_other_arguments_is_not_taken_for_these(standalone, capsys):
    for more, message in (
        (["--quick", "--seed", "7"], "was run with --seed 0, and not with 7"),
        ([], "was run with --dataset digits, and not with fashion-mnist"),
    ):
        with pytest.raises(SystemExit) as stopped:
            paper.main(["standalone", *more, "--out", str(standalone)])
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err


def test_kept_methods_grow_and_are_replaced_by_name(tmp_path):
    def run(methods, seed):
        found = tmp_path / f"found-{seed}"
        arguments = ["--workers", "3", "--rounds", "2", "--methods", methods, "--seed", str(seed)]
        assert compare.main([*arguments, "--out", str(found)]) == 0
        paper.keep(found, tmp_path / "kept")

    run("Identity(), LBGM()", 0)
    first = read(tmp_path / "kept" / "rounds.csv")
    run("LBGM(), TopK(0.1)", 1)
    rows = read(tmp_path / "kept" / "rounds.csv")
    assert [row["method"] for row in rows[::2]] == ["Identity()", "LBGM()", "TopK(0.1)"]
    assert rows[:2] == first[:2]
    assert rows[2:4] != first[2:4]
    methods = json.loads((tmp_path / "kept" / "summary.json").read_text())["methods"]
    assert [row["method"] for row in methods] == ["Identity()", "LBGM()", "TopK(0.1)"]


@pytest.mark.timeout(200)
def test_distributed_figure_goes_through_real_ranks(tmp_path):
    only = ["--only", "linear-iid"]
    assert paper.main(["distributed", "--quick", *only, "--out", str(tmp_path)]) == 0
    rows = {row["method"]: row for row in read(tmp_path / "distributed.csv")}
    assert set(rows) == {"Identity()", "SignSGD(scaled=True)", "LBGM(SignSGD(scaled=True))"}
    summary = json.loads(next(tmp_path.glob("*/summary.json")).read_text())
    assert summary["arguments"]["engine"] == "ddp"
    assert all(row["wire_bytes"] > 0 for row in summary["methods"])


@pytest.mark.parametrize("figure", paper.FIGURES)
def test_every_run_of_every_figure_is_one_that_compare_takes(figure):
    settings = set()
    for columns in paper.FIGURES[figure].values():
        for setting, methods in columns:
            assert setting.name not in settings or figure in ("options", "threshold", "rivals")
            settings.add(setting.name)
            assert len({repr(method) for method in methods}) == len(methods)
            for device, quick in (("cpu", False), ("cpu", True), ("cuda", False)):
                arguments = setting.arguments(device, quick)
                options = compare.build_parser().parse_args(
                    [*arguments, "--methods", ", ".join(map(repr, methods))]
                )
                assert compare.methods_of(options) == list(methods)
                assert options.device == ("cpu" if setting.engine != "process" else device)
                whole = setting.model == "linear" or options.device == "cuda"
                assert (options.images is None) == (whole and not quick and not setting.images)
            assert parse_compressor(repr(methods[-1])) == methods[-1]
    if figure in ("standalone", "sampled", "stacked"):
        assert any("classes-3" in name for name in settings)


def test_interrupted_figure_keeps_what_is_finished(tmp_path, monkeypatch):
    original = compare.train

    def stopped(methods, *arguments):
        results, _ = original(methods[:1], *arguments)
        return results, True

    monkeypatch.setattr(compare, "train", stopped)
    only = ["--only", "fashion-mnist-linear-iid", "--out", str(tmp_path)]
    assert paper.main(["standalone", "--quick", *only]) == INTERRUPTED
    assert [row["method"] for row in read(tmp_path / "standalone.csv")] == ["Identity()"]
    assert (tmp_path / "standalone-linear.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["everything"], "invalid choice: 'everything'"),
        (
            ["standalone", "--only", "cifar"],
            "--only cifar: no setting has such a name; there are mnist",
        ),
        (["standalone", "--quick", "--seed", "-1"], "--seed -1 is not from 0"),
        (["standalone", "--quick", "--device", "tpu"], "neither cpu nor cuda"),
    ],
)
def test_wrong_input_gives_one_line_and_exit_code_2(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        paper.main([*arguments, "--out", str(tmp_path)])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
