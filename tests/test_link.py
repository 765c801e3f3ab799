"""The measurement of training over links of known rate."""

from __future__ import annotations

import csv
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import link
from benchmarks.common import network, tables
from benchmarks.common.command_line import read_methods
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
    reason = network.missing()
    if reason is not None:
        pytest.skip(reason)


def namespaces(pid):
    """Return the network namespaces that a process has made and not removed."""
    found = subprocess.run(["ip", "netns"], capture_output=True, text=True, check=True).stdout
    return [line for line in found.splitlines() if line.startswith(f"lbgm-{pid}-")]


@pytest.mark.netns
@pytest.mark.xdist_group("netns")
@pytest.mark.timeout(280)
def test_methods_train_over_a_slow_link_and_bytes_on_the_wire_are_theirs(
    allowed, images, tmp_path, capsys
):
    methods = "Dense(), Float16(), TorchPowerSGD(1), ErrorFeedback(SharedSubspace(4)), "
    methods += "LBGM(TopK(0.01), delta=0.5), NoExchange()"
    arguments = ["--ranks", "2", "--rates", "200,50", "--cases", "large", "--steps", "6"]
    arguments += ["--report-every", "2", "--timed-steps", "4"]
    arguments += ["--methods", methods, "--images", "2048", "--data-dir", str(images)]
    status = link.main([*arguments, "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert status == 0, printed
    assert namespaces(os.getpid()) == []
    with (tmp_path / "link.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    fast, slow = ([row for row in rows if row["mbit"] == mbit] for mbit in ("200.0", "50.0"))
    for method in map(repr, read_methods(methods)):
        steps = [
            [int(row["steps"]) for row in of if row["method"] == method] for of in (fast, slow)
        ]
        # A method that is far from dense training goes on for three times as many steps.
        assert steps[0][:3] == [2, 4, 6], method
        assert steps[0][-1] <= 18, method
        assert steps[1] == [2, 4], method
    assert len(fast) > 18
    for row in rows:
        sent, message = float(row["interface_bytes"]), float(row["message_bytes"])
        # What is on the wire is at least the messages: a ring of two sends each byte once.
        assert message <= sent < 1.3 * message + 10_000, row
        measured = row in fast and row["method"] != "NoExchange()"
        assert (0 < float(row["accuracy"]) <= 1) == measured
    topk = [row for row in fast if row["method"] == "LBGM(TopK(0.01), delta=0.5)"]
    assert float(rows[0]["message_bytes"]) > 30 * float(topk[-1]["message_bytes"])
    pictures = ["accuracy-large-2-200.png", "accuracy-large-2-50.png", "time-large-2.png"]
    for picture in pictures:
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
    for method in ("Dense()", "TorchPowerSGD(1)", "LBGM(TopK(0.01), delta=0.5)"):
        assert method in printed


@pytest.mark.netns
@pytest.mark.xdist_group("netns")
@pytest.mark.timeout(120)
def test_exchange_is_measured_by_itself(allowed, tmp_path, capsys):
    arguments = ["--probe-only", "--ranks", "3", "--rates", "100", "--out", str(tmp_path)]
    status = link.main(arguments)
    printed = capsys.readouterr().out
    assert status == 0, printed
    assert namespaces(os.getpid()) == []
    [probe] = json.loads((tmp_path / "exchange.json").read_text())
    # A link cannot be beaten.
    assert probe["body_ms"] > 0.9 * probe["link_ms"]
    assert "Mbit/s" in printed


@pytest.mark.netns
@pytest.mark.xdist_group("netns")
@pytest.mark.timeout(120)
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM], ids=lambda s: s.name)
def test_interrupted_run_leaves_nothing_behind(allowed, images, tmp_path, how):
    process = subprocess.Popen(
        [*SCRIPT, "--data-dir", str(images), "--rates", "0.5", "--out", str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 60
    while not Path(f"/run/netns/lbgm-{process.pid}-1").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(how)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143}[how], errors
    assert namespaces(process.pid) == []


def reports(mbit, method, times, accuracies=()):
    """Return the reports of a run, one every ten steps."""
    seconds = list(itertools.accumulate(times))
    found = [*accuracies, *[math.nan] * (len(times) - len(accuracies))]
    return [
        link.Report("small", 4, mbit, method, 10 * i + 10, at, 1.0, 1e3, 1e3, 0.0, accuracy)
        for i, (at, accuracy) in enumerate(zip(seconds, found, strict=True))
    ]


def test_time_to_the_target_is_that_of_its_steps_at_every_rate(capsys):
    runs = [
        *reports(100.0, "Dense()", [4, 4, 4, 4], [0.5, 0.6, 0.69, 0.7]),
        *reports(100.0, "SharedLBGM()", [3, 1, 1, 1], [0.4, 0.695, 0.7, 0.6]),
        *reports(10.0, "Dense()", [40, 41]),
        *reports(10.0, "SharedLBGM()", [9, 2]),
        *reports(10.0, "NoExchange()", [1, 1]),
    ]
    [((case, ranks), found)] = link.groups(runs).items()
    assert (case, ranks, link.target_of(found)) == ("small", 4, pytest.approx(0.695))
    slow = found[10.0]
    assert link.steps_to(link.trained(found, "SharedLBGM()"), 0.695) == 20
    assert [link.seconds_at(slow["SharedLBGM()"], n) for n in (5, 10, 20, 40)] == [4.5, 9, 11, 15]
    # Steps that were not taken are like the last ones, not like the first.
    assert link.seconds_at(slow["Dense()"], 40) == 40 + 3 * 41
    [table] = link.tables(runs)
    tables.console(width=200).print(table)
    lines = [line.split("│")[1:-1] for line in capsys.readouterr().out.splitlines()[4:-1]]
    cells = [[cell.strip() for cell in line] for line in lines if len(line) > 2]
    assert cells[0][1:] == ["1.0", "70.00%", "40", "400", "16.0", "4075", "163.0"]
    assert cells[1][1:] == ["1.0", "60.00%", "20", "150", "4.0", "375", "11.0"]
    assert cells[2][1:] == ["1.0", "-", "-", "-", "-", "100", "-"]


def test_kept_results_are_drawn_without_links(tmp_path):
    kept = ROOT / "benchmarks" / "results" / "link" / "link.csv"
    # Two pictures are enough.
    header, *rows = kept.read_text().splitlines(keepends=True)
    lines = [header, *(row for row in rows if row.startswith("large,4,1000.0,"))]
    (tmp_path / "link.csv").write_text("".join(lines))
    assert link.main(["--draw-only", "--out", str(tmp_path)]) == 0
    pictures = ["accuracy-large-4-1000.png", "link.csv", "time-large-4.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == pictures
    # Drawing does not change the results.
    assert (tmp_path / "link.csv").read_text() == "".join(lines)
    link.write_reports(tmp_path / "link.csv", link.read_reports(kept))
    assert (tmp_path / "link.csv").read_text() == kept.read_text()


def test_without_its_tools_it_says_so_and_makes_nothing(images, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit) as stopped:
        link.main(["--data-dir", str(images), "--out", str(tmp_path / "out")])
    assert stopped.value.code == 2
    printed = capsys.readouterr().err
    assert printed == "link.py: error: there is no 'ip': install Debian's package iproute2\n"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "Dense(), LBGM(Tpok(1))"], "unknown compressor 'Tpok'"),
        (["--methods", "dense"], "write Dense(...)"),
        (["--draw-only"], "there are no reports in link.csv"),
        (["--cases", "huge"], "none of large, small"),
        (["--ranks", "1"], "from 2 to 16"),
        (["--rates", "0"], "from 0.1 to 10000"),
        (["--steps", "10"], "--report-every: from 1 to --steps"),
        (["--timed-steps", "30"], "--timed-steps: at least twice --report-every"),
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
