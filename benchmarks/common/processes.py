"""The environment of the processes that commands start."""

from __future__ import annotations

import os
import sys
from pathlib import Path

__all__ = ["OFFLINE", "ROOT", "environment"]

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
