"""The log file of a training: one line of JSON for each round."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flwr.app import MetricRecord

__all__ = ["RoundLog"]


class RoundLog:
    """Appends a line to a file for each round, when all of the round's metrics are known.

    A line is opened after training, gets the metrics of the evaluations that follow, and is written
    after the last of them, or at the latest before the next round.

    Parameters
    ----------
    path
        The file to append to, or None to write nothing. Its folder is made if it does not exist.
    """

    def __init__(self, path: str | os.PathLike[str] | None) -> None:
        self.path = None if path is None else Path(path)
        self.server_evaluates = False
        """True if the server evaluates after the clients do."""
        self._line: dict[str, Any] | None = None
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)

    def open_line(self, values: Mapping[str, Any], train: MetricRecord | None) -> None:
        """Begin the line of a round with some values and the metrics of training."""
        if self.path is not None:
            self._line = {**values, "train": _plain(train)}

    def add_evaluation(self, metrics: MetricRecord | None) -> None:
        """Add the metrics of the clients' evaluation."""
        if self._line is not None:
            self._line["evaluate"] = _plain(metrics)
            if not self.server_evaluates:
                self.write_line()

    def add_server_evaluation(self, metrics: MetricRecord | None) -> None:
        """Add the metrics of the server's own evaluation."""
        if self._line is not None:
            self._line["evaluate-server"] = _plain(metrics)
            self.write_line()

    def write_line(self) -> None:
        """Write the open line, if there is one."""
        line, self._line = self._line, None
        if line is not None and self.path is not None:
            with self.path.open("a") as file:
                file.write(json.dumps(line) + "\n")


def _plain(metrics: MetricRecord | None) -> dict[str, Any] | None:
    """Return metrics with None in the place of inf and nan, which JSON does not have."""
    if metrics is None:
        return None
    return {name: _number(value) for name, value in metrics.items()}


def _number(value: Any) -> Any:
    if isinstance(value, list):
        return [_number(element) for element in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
