"""The runs of `benchmarks/paper.py` that are kept, each setting in a folder of its own."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.common.report import COLUMNS, MethodResult
from benchmarks.common.tables import read_csv, write_csv
from benchmarks.common.training import Round
from lbgm_compress._util.files import atomic_write
from lbgm_compress.algorithm import Algorithm

__all__ = ["keep", "results_of", "summary_of"]


def summary_of(folder: Path) -> dict[str, Any]:
    """Return summary.json of a folder; no methods if there is none."""
    file = folder / "summary.json"
    kept: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {"methods": []}
    return kept


def _rows(folder: Path) -> list[dict[str, str]]:
    return read_csv(folder / "rounds.csv")


def keep(found: Path, folder: Path) -> None:
    """Add the finished methods of a run of compare.py in `found` to those kept in `folder`."""
    summary = summary_of(found)
    finished = [row for row in summary["methods"] if row["finished"]]
    if not finished:
        return
    folder.mkdir(parents=True, exist_ok=True)
    names = {row["method"] for row in finished}
    rows = [row for row in _rows(folder) if row["method"] not in names]
    rows += [row for row in _rows(found) if row["method"] in names]
    methods = [
        row for row in summary_of(folder)["methods"] if row["method"] not in names
    ] + finished
    for row in methods:
        # It depends on the other methods of its run.
        row.pop("bytes_to_target", None)
    # Leave out what belongs to one run only.
    arguments = {k: v for k, v in summary["arguments"].items() if k not in ("out", "methods")}
    versions = {name: of for name, of in summary["versions"].items() if name != "platform"}
    kept = {"title": summary["title"], "arguments": arguments, "versions": versions}
    given = " ".join(f"--{name} {value}" for name, value in arguments.items() if value is not False)
    listed = ", ".join(row["method"] for row in methods)
    kept["command"] = f"python benchmarks/compare.py {given} --methods {shlex.quote(listed)}"
    cells = [[row[column] for column in COLUMNS] for row in rows]
    write_csv(folder / "rounds.csv", COLUMNS, cells)
    atomic_write(
        folder / "summary.json",
        (json.dumps({**kept, "methods": methods}, indent=1) + "\n").encode(),
    )


def results_of(folder: Path, methods: Iterable[Algorithm]) -> list[MethodResult]:
    """Return the kept rounds of these methods."""
    rows: dict[str, list[Round]] = {}
    arguments = summary_of(folder).get("arguments", {})
    every, last = int(arguments.get("evaluate-every", 1)), int(arguments.get("rounds", 0))
    for row in _rows(folder):
        number = int(row["round"])
        rows.setdefault(row["method"], []).append(
            Round(
                number,
                float(row["accuracy"]),
                float(row["loss"]),
                int(row["uplink_bytes"]),
                float(row["recycled_share"]),
                float(row["seconds"]),
                evaluated=number in (1, last) or number % every == 0,
            )
        )
    return [
        MethodResult(method, len(rows[repr(method)]), rows[repr(method)])
        for method in methods
        if repr(method) in rows
    ]
