"""The benchmark over links of known rate."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import link
from tests.idx import write_idx

ROOT = Path(__file__).parent.parent
SCRIPT = [sys.executable, str(ROOT / "benchmarks" / "link.py")]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Return a folder of IDX files."""
    folder = tmp_path_factory.mktemp("idx")
    write_idx(folder, train=2048, test=400)
    return folder


@pytest.fixture
def allowed():
    reason = link.missing()
    if reason is not None:
        pytest.skip(reason)


def namespaces():
    return subprocess.run(["ip", "netns"], capture_output=True, text=True, check=True).stdout


def run(*arguments, timeout=240, **options):
    return subprocess.run(
        [*SCRIPT, *arguments], capture_output=True, text=True, timeout=timeout, **options
    )


@pytest.mark.netns
@pytest.mark.timeout(280)
def test_methods_train_over_a_slow_link_and_bytes_on_the_wire_are_theirs(allowed, images, tmp_path):
    before = namespaces()
    methods = "dense; fp16; PowerSGD(1); LBGM(TopK(0.01), delta=0.5)"
    arguments = ["--ranks", "2", "--rates", "200", "--cases", "large", "--epochs", "2"]
    found = run(
        *arguments, "--methods", methods, "--images", "2048", "--data-dir", str(images),
        "--out", str(tmp_path),
    )  # fmt: skip
    assert found.returncode == 0, found.stdout + found.stderr
    assert namespaces() == before
    with (tmp_path / "link.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["method"] for row in rows[::2]] == [m.strip() for m in methods.split(";")]
    for row in rows:
        sent, message = float(row["interface_bytes"]), float(row["message_bytes"])
        # What is on the wire is at least the messages: a ring of two sends each byte once.
        assert message < sent < 1.3 * message + 10_000, row
        assert 0 < float(row["accuracy"]) <= 1
    assert float(rows[0]["message_bytes"]) > 30 * float(rows[-1]["message_bytes"])
    assert (tmp_path / "accuracy-large-2-200.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "step-large-2.png").exists()
    for method in ("dense", "PowerSGD(1)", "LBGM(TopK(0.01), delta=0.5)"):
        assert method in found.stdout


@pytest.mark.netns
@pytest.mark.timeout(120)
def test_exchange_is_measured_by_itself(allowed, tmp_path):
    before = namespaces()
    found = run("--probe-only", "--ranks", "3", "--rates", "100", "--out", str(tmp_path))
    assert found.returncode == 0, found.stdout + found.stderr
    assert namespaces() == before
    [probe] = json.loads((tmp_path / "exchange.json").read_text())
    # A link cannot be beaten.
    assert probe["body_ms"] > 0.9 * probe["link_ms"]
    assert "Mbit/s" in found.stdout


@pytest.mark.netns
@pytest.mark.timeout(120)
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM], ids=lambda s: s.name)
def test_interrupted_run_leaves_nothing_behind(allowed, images, tmp_path, how):
    before = namespaces()
    process = subprocess.Popen(
        [*SCRIPT, "--data-dir", str(images), "--rates", "0.5", "--out", str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 60
    while f"lbgm-{process.pid}-1" not in namespaces():
        assert process.poll() is None
        assert time.monotonic() < deadline
    process.send_signal(how)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143}[how], errors
    assert namespaces() == before


def test_without_its_tools_it_says_so_and_makes_nothing(images, tmp_path):
    found = run(
        "--data-dir", str(images), "--out", str(tmp_path / "out"),
        env={**os.environ, "PATH": str(tmp_path)},
    )  # fmt: skip
    assert found.returncode == 2
    assert found.stderr == ("link.py: error: there is no 'ip': install Debian's package iproute2\n")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "dense; LBGM(Tpok(1))"], "unknown compressor 'Tpok'"),
        (["--cases", "huge"], "none of large, small"),
        (["--ranks", "1"], "from 2 to 16"),
        (["--rates", "0"], "from 0.1 to 10000"),
        (["--epochs", "0"], "starts at 1"),
        (["--data-dir", "nowhere"], "nowhere"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_input_gives_one_line_and_exit_code_2(
    arguments, message, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        link.main(arguments)
    assert stopped.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("link.py: error: ")
    assert message in line
