"""The README's uses between ranks: the program before the change, and after it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.horovod_ranks import horovodrun, needs_horovod
from tests.test_grace import checkout, needs_checkout

ROOT = Path(__file__).parent.parent
DIFFS = re.findall(r"```diff\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
ENGINES = {
    "Horovod": "import horovod.torch as hvd\n",
    "DDP": "from torch.nn.parallel import DistributedDataParallel\n",
    "GRACE": "from grace_dl.torch.communicator.allgather import Allgather\n",
}


def diff_of(use):
    [found] = [
        diff
        for diff in DIFFS
        if ENGINES[use] in diff and (use == "GRACE") == (ENGINES["GRACE"] in diff)
    ]
    return found


def side(diff, sign):
    """Return the program with the lines of one sign."""
    lines = [line for line in diff.splitlines() if line[:1] in ("", " ", sign)]
    return "\n".join(line[1:] for line in lines) + "\n"


def run(use, tmp_path, sign):
    program = tmp_path / "train.py"
    program.write_text(side(diff_of(use), sign))
    if use == "DDP":
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        # Without the change it is torch alone, which was seen to abort a rank (pytorch #190489).
        for _ in range(2 if sign == "-" else 1):
            done = subprocess.run(
                [*launch, "--nproc-per-node=2", str(program)],
                capture_output=True,
                text=True,
                timeout=100,
                env=environment,
            )
            if "terminate called without an active exception" not in done.stderr:
                break
        assert done.returncode == 0, done.stderr
        return
    path = os.pathsep.join([str(ROOT), *([checkout()] if use == "GRACE" else [])])
    command = ["-np", "2", "--gloo", "--network-interfaces", "lo", sys.executable, str(program)]
    done = horovodrun(command, timeout=100, environment={"PYTHONPATH": path})
    assert done.returncode == 0, done.stdout


@pytest.mark.timeout(250)
@pytest.mark.parametrize("sign", ["-", "+"], ids=["before", "after"])
@pytest.mark.parametrize(
    "use",
    [
        pytest.param("Horovod", marks=[pytest.mark.horovod, needs_horovod]),
        "DDP",
        pytest.param(
            "GRACE",
            marks=[pytest.mark.grace, pytest.mark.horovod, needs_horovod, needs_checkout],
        ),
    ],
)
def test_program_of_the_readme_runs_before_and_after_the_change(use, sign, tmp_path):
    run(use, tmp_path, sign)


@pytest.mark.parametrize("use", ENGINES)
def test_change_of_the_readme_is_a_few_lines(use):
    changed = [line for line in diff_of(use).splitlines() if line[:1] in ("+", "-")]
    assert 3 <= len(changed) <= 6
