"""Files that pytest does not import, and a last line about skipped tests."""

from __future__ import annotations

from typing import Any

import pytest

# Programs that tests start, which pytest is not to import when it looks for doctests.
collect_ignore = ["elastic_job.py", "flower_job", "grace_job.py"]

# How to get what a test was skipped for, by a word of the reason.
REMEDIES = {
    "Horovod": "`make horovod` builds it (about four minutes)",
    "Flower": "Flower needs Python 3.11 or newer",
    "NVFlare": "pip install nvflare",
    "Lightning": "pip install lightning",
    "transformers": "pip install transformers accelerate",
    "Accelerate": "pip install accelerate",
    "peft": "pip install peft",
    "Ray Train": "pip install 'ray[train]'",
    "torchft": "pip install torchft (Linux on x86-64, Python 3.10 to 3.13)",
    "grace": "set GRACE_DL_PATH to a checkout of sands-lab/grace",
    "CUDA": "they need a GPU",
}
SKIPPED = pytest.StashKey[dict[str, int]]()


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    counts: dict[str, int] = {}
    for report in terminalreporter.stats.get("skipped", []):
        reason = str(report.longrepr[-1]) if isinstance(report.longrepr, tuple) else ""
        for word in REMEDIES:
            if word.lower() in reason.lower():
                counts[word] = counts.get(word, 0) + 1
                break
    config.stash[SKIPPED] = counts


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    """Print a line after pytest's own last one, if tests were skipped for a missing engine."""
    counts = config.stash.get(SKIPPED, {})
    if counts:
        parts = [f"{count} for {word}: {REMEDIES[word]}" for word, count in counts.items()]
        print(f"Skipped tests: {'; '.join(parts)}.")
