"""The scripts that measure sizes and times."""

from __future__ import annotations

import csv

import encode
import pytest
import wire
from shapes import resnet50_shapes


def read(file):
    with file.open(newline="") as lines:
        return list(csv.DictReader(lines))


def test_every_size_keeps_within_its_bound(tmp_path, capsys):
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
def test_times_are_measured_beside_their_peers(tmp_path, capsys):
    assert encode.main(["--repeats", "1", "--out", str(tmp_path / "encode.csv")]) == 0
    rows = {row["what"]: row for row in read(tmp_path / "encode.csv")}
    for what in ("LBGM(): angle test", "LBGM(TopK(0.01))"):
        assert float(rows[what]["encode_ms"]) > 0
        assert float(rows[what]["ratio_to_peer"]) > 0
        assert rows[what]["peer"] in rows
    assert "LBGM(TopK(0.01))" in capsys.readouterr().out


@pytest.mark.parametrize("script", [wire, encode])
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
