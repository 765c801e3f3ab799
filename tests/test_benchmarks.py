"""The commands that measure sizes, memory and times."""

from __future__ import annotations

import csv

import pytest
import torch

from benchmarks import encode, gpu, memory, probe_cost, ranks, wire
from benchmarks.common.shapes import resnet50_shapes, transformer_shapes
from lbgm_compress import ErrorFeedback, LookBackSubspace, Receiver, Sender
from lbgm_compress.compressors.parse import parse_compressor


def read(file):
    with file.open(newline="") as lines:
        return list(csv.DictReader(lines))


def part_of_resnet50():
    """Return the shapes of the first two stages, which have convolutions of every kind."""
    shapes = dict(list(resnet50_shapes().items())[:72])
    assert list(shapes)[-1] == "layer2.3.bn3.bias"
    return shapes


@pytest.mark.parametrize("full", [False, pytest.param(True, marks=pytest.mark.soak)])
def test_every_size_keeps_within_its_bound(full, tmp_path, capsys, monkeypatch):
    if not full:
        monkeypatch.setattr(wire, "STEPS", 6)
        monkeypatch.setattr(wire, "resnet50_shapes", part_of_resnet50)
    assert wire.main(["--out", str(tmp_path / "wire.csv")]) == 0
    rows = read(tmp_path / "wire.csv")
    assert len(rows) > 25
    for row in rows:
        assert float(row["measured_bytes"]) <= float(row["bound_bytes"]), row["what"]
    assert "No bounds broken" in capsys.readouterr().out


def test_a_broken_bound_is_told_and_gives_exit_code_1(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(wire, "rows", lambda seed: iter([wire.Row("x", 11, 10.0)]))
    assert wire.main(["--out", str(tmp_path / "wire.csv")]) == 1
    assert "1 bound broken" in capsys.readouterr().out


@pytest.mark.timeout(280)
def test_times_are_measured_beside_their_peers(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(encode, "resnet50_shapes", part_of_resnet50)
    monkeypatch.setattr(encode, "gpt2_shapes", part_of_resnet50)
    monkeypatch.setattr(encode, "COUNT", 40)
    assert encode.main(["--repeats", "1", "--out", str(tmp_path / "encode.csv")]) == 0
    rows = {row["what"]: row for row in read(tmp_path / "encode.csv")}
    for what in ("LBGM(): angle test", "LBGM(TopK(0.01))"):
        assert float(rows[what]["encode_ms"]) > 0
        assert float(rows[what]["ratio_to_peer"]) > 0
        assert rows[what]["peer"] in rows
    for rank in encode.RANKS:
        assert float(rows[encode.power_name(rank)]["encode_ms"]) > 0
        for delta in (0.0, 1.0):
            row = rows[repr(ErrorFeedback(LookBackSubspace(rank, delta)))]
            assert row["peer"] == encode.power_name(rank)
            assert float(row["ratio_to_peer"]) > 0
            assert float(row["decode_ms"]) > 0
    for model in ("ResNet-50", "GPT-2 small"):
        for threads in ("1 thread", "2 threads"):
            for name in encode.SUMS:
                row = rows[f"{name}, {model}, {threads}"]
                assert float(row["ratio_to_peer"]) > 0
                assert row["peer"] == f"{encode.power_name(encode.SUMS_RANK)}, {model}, {threads}"
                assert row["peer"] in rows
    for compressor, bound in encode.BOUNDS.items():
        assert float(rows[f"{compressor!r}, GPT-2 small"]["decode_ms"]) > 0
        row = rows[f"{compressor!r}, {encode.BACKWARD}"]
        assert row["peer"] == encode.BACKWARD
        assert float(row["bound"]) == bound
    assert "LBGM(TopK(0.01))" in capsys.readouterr().out


def test_a_part_that_is_unknown_is_named(capsys):
    with pytest.raises(SystemExit):
        encode.main(["--parts", "angles,speed"])
    assert "'speed' is not one of angles, selections" in capsys.readouterr().err


def test_memory_of_a_model_is_that_of_its_tensors(tmp_path, capsys, monkeypatch):
    shapes = {"a": (64, 512), "b": (64, 512), "bias": (64,)}
    monkeypatch.setattr(memory, "MODELS", {"small": lambda: shapes})
    assert memory.main(["--out", str(tmp_path / "memory.csv")]) == 0
    rows = {row["compressor"]: row for row in read(tmp_path / "memory.csv")}
    grads = {name: torch.randn(shape) for name, shape in shapes.items()}
    for compressor, row in rows.items():
        sender = Sender(parse_compressor(compressor))
        receiver = Receiver(sender.compressor, grads)
        sizes = []
        for _ in range(2):
            receiver.decompress(0, sender.compress(grads))
            sizes.append(sum(report.bytes for report in sender.report().values()))
            grads = {name: torch.randn(shape) for name, shape in shapes.items()}
        assert int(row["dense"]) == 4 * (2 * 64 * 512 + 64)
        kept = memory.kept(receiver.state_dict())
        assert int(row["server"]) == pytest.approx(kept, rel=0.02)
        # Positions and replacements differ with the random gradients, and little.
        assert int(row["first"]) == pytest.approx(sizes[0], rel=0.02)
        assert int(row["later"]) == pytest.approx(sizes[1], rel=0.02)
    assert int(rows["LookBackSubspace(4)"]["server"]) == 2 * 4 * (512 + 8)
    assert "1,000,000" in capsys.readouterr().out


def test_transformer_has_as_many_parameters_as_it_says():
    total = sum(torch.Size(shape).numel() for shape in transformer_shapes().values())
    assert 1.3e9 < total < 1.35e9


def test_cost_of_a_probe_is_measured_beside_a_step(tmp_path, capsys):
    out = tmp_path / "cost.csv"
    arguments = ["--models", "linear", "--batches", "8", "--steps", "4", "--out", str(out)]
    assert probe_cost.main(arguments) == 0
    rows = read(out)
    assert [row["case"] for row in rows] == list(probe_cost.CASES)
    for row in rows:
        assert float(row["probed_ms"]) > 0
        assert float(row["own_overhead"]) > 0
    assert "by its own clock" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "--steps, --threads and --batches are at least 1"),
        (["--models", "vgg"], "--models: there is no model 'vgg'"),
    ],
)
def test_wrong_cost_of_a_probe_is_told(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        probe_cost.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("script", [wire, encode, memory, probe_cost])
def test_file_that_cannot_be_written_is_told_before_measuring(script, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        script.main(["--out", str(tmp_path / "missing" / "x.csv")])
    assert stopped.value.code == 2
    assert "cannot write there" in capsys.readouterr().err


def test_resnet50_has_its_161_tensors():
    shapes = resnet50_shapes()
    assert len(shapes) == 161
    sizes = [1] * 161
    for i, shape in enumerate(shapes.values()):
        for side in shape:
            sizes[i] *= side
    assert sum(sizes) == 25_557_032


def test_cost_of_a_rank_grows_with_messages_and_not_with_sums(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(ranks, "resnet50_shapes", part_of_resnet50)
    assert ranks.main(["--repeats", "1", "--out", str(tmp_path)]) == 0
    rows = read(tmp_path / "ranks.csv")
    assert {int(row["ranks"]) for row in rows} == {*ranks.MEASURED, *ranks.COMPUTED}
    received = {(row["method"], int(row["ranks"])): int(row["received_bytes"]) for row in rows}
    for name in ranks.GATHERED:
        assert received[name, 1024] == 1023 * received[name, 2]
    for name in ranks.SUMMED:
        assert received[name, 1024] == pytest.approx(2 * 1023 / 1024 * received[name, 2], abs=2)
        times = {row["encode_ms"] for row in rows if row["method"] == name}
        assert len(times) == 1
    sizes = sum(torch.Size(shape).numel() for shape in part_of_resnet50().values())
    assert received[ranks.DENSE, 2] == 4 * sizes
    assert (tmp_path / "ranks.png").stat().st_size > 10_000
    assert "a direction replaced" in capsys.readouterr().out


METHODS = "Dense(), TorchPowerSGD(4), ErrorFeedback(SharedSubspace(8)), LBGM(TopK(0.01))"


@pytest.mark.timeout(280)
def test_command_for_a_gpu_tries_itself_out_without_one(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(gpu, "MODELS", {"ResNet-50": part_of_resnet50})
    options = ["--device", "cpu", "--steps", "1", "--methods", METHODS, "--minutes", "4"]
    assert gpu.main([*options, "--out", str(tmp_path)]) == 0, capsys.readouterr().out
    rows = read(tmp_path / "gpu.csv")
    assert [row["ranks"] for row in rows] == ["1"] * 4 + ["2"] * 4
    assert all(float(row["step_ms"]) > 0 and row["error"] == "" for row in rows)
    sent = {row["method"]: int(row["message_bytes"]) for row in rows}
    assert sent["ErrorFeedback(SharedSubspace())"] < sent["Dense()"] / 20


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_command_for_a_gpu_tells_what_it_would_do(tmp_path, capsys):
    assert gpu.main(["--out", str(tmp_path)]) == 1
    assert "There is no CUDA device. On one, this runs `pytest -m gpu`" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--models", "VGG"], "'VGG' is none of ResNet-50, GPT-2 small"),
        (["--methods", "Topk(1)"], "unknown compressor 'Topk'"),
        (["--minutes", "0"], "'0' is not a number above 0"),
    ],
)
def test_wrong_arguments_of_the_command_for_a_gpu_are_told(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        gpu.main([*arguments, "--out", str(tmp_path)])
    assert message in capsys.readouterr().err
