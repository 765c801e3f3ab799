"""The results of a `GradientSpace` as CSV files."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lbgm_compress._util.files import atomic_write
from lbgm_compress.analysis.results import Results, check_one_per_epoch

__all__ = ["write_csv"]

COLUMNS = ("epoch", "layer", "n95", "n99")
WHOLE = "whole"


def write_csv(
    results: Results, folder: str | os.PathLike[str], metrics: Mapping[str, Sequence[float]]
) -> None:
    """Write components.csv, cosines.csv and principal_cosines.csv; see `GradientSpace.write_csv`.

    Raises
    ------
    ValueError
        If a metric does not have one number for each epoch, or has the name of a column. Nothing is
        written.
    """
    check_one_per_epoch(results, metrics)
    for name in metrics:
        if name in COLUMNS:
            raise ValueError(f"components.csv has a column {name!r} already: rename the metric")
    tables = {
        "components": _components(results, metrics),
        "cosines": _cosines(results),
        "principal_cosines": _principal_cosines(results),
    }
    for name, rows in tables.items():
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(rows)
        atomic_write(Path(folder) / f"{name}.csv", text.getvalue().encode())


def _components(results: Results, metrics: Mapping[str, Sequence[float]]) -> list[Sequence[Any]]:
    rows: list[Sequence[Any]] = [(*COLUMNS, *metrics)]
    for layer in (None, *results.layers):
        counts = zip(results.history(0.95, layer), results.history(0.99, layer), strict=True)
        for i, pair in enumerate(counts):
            numbers = [_number(metric[i]) for metric in metrics.values()]
            rows.append((i + 1, _label(layer), *pair, *numbers))
    return rows


def _cosines(results: Results) -> list[Sequence[Any]]:
    rows: list[Sequence[Any]] = [("epoch", "layer", *range(1, len(results) + 1))]
    for layer in (None, *results.layers):
        for i, line in enumerate(results.cosines(layer)):
            rows.append((i + 1, _label(layer), *map(_number, line)))
    return rows


def _principal_cosines(results: Results) -> list[Sequence[Any]]:
    rows: list[Sequence[Any]] = []
    for layer in (None, *results.layers):
        for i, line in enumerate(results.principal_cosines(0.99, layer=layer)):
            rows.append((i + 1, _label(layer), *map(_number, line)))
    widest = max(map(len, rows), default=2) - 2
    return [("epoch", "layer", *(f"pc{k}" for k in range(1, widest + 1))), *rows]


def _label(layer: str | None) -> str:
    return WHOLE if layer is None else layer


def _number(value: float) -> str:
    """Format a number with six decimals, and a negative zero as zero."""
    return f"{round(float(value), 6) + 0.0:.6f}"
