"""Processes that commands start: their environment, and pools of them."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import os
import sys
from pathlib import Path

__all__ = ["OFFLINE", "ROOT", "environment", "make_pool"]

ROOT = Path(__file__).resolve().parents[2]
# Flower and Ray neither report nor install anything.
OFFLINE = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "UV_OFFLINE": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}


def environment(**more: str) -> dict[str, str]:
    """Return the variables of a process that can import `benchmarks`, and `more` of them.

    The programs of this Python (torchrun, flwr) come first in ``PATH``.
    """
    found = dict(os.environ)
    for name, first in (("PYTHONPATH", ROOT), ("PATH", Path(sys.executable).parent)):
        rest = found.get(name)
        found[name] = f"{first}{os.pathsep}{rest}" if rest else str(first)
    return {**found, **OFFLINE, **more}


def make_pool(jobs: int) -> concurrent.futures.Executor:
    """Return an executor with a process for each job."""
    spawn = multiprocessing.get_context("spawn")
    return concurrent.futures.ProcessPoolExecutor(jobs, mp_context=spawn)
