"""A plot of the bytes and the accuracy of a training in Flower."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flwr.serverapp.strategy import Result

from lbgm_compress._util.units import byte_unit

__all__ = ["plot"]


def plot(
    training: Result | str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    accuracy: str = "accuracy",
) -> None:
    """Draw the bytes of each round, and the accuracy against all bytes so far, in both directions.

    Log files of older releases, which do not have the bytes to clients, are drawn without them.

    Parameters
    ----------
    training
        The result of `CompressedStrategy.start`, or the `log_file` that it wrote.
    path
        The picture to write, for example ``flower.png``.
    accuracy
        The name of the metric to draw. It is taken from the server's own evaluation if it is there,
        else from that of the clients, else from their training.

    Raises
    ------
    ImportError
        If matplotlib is not installed.
    ValueError
        If no round has the metrics of `CompressedStrategy`, or all replies were rejected.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import PercentFormatter
    except ImportError as error:
        raise ImportError("plot needs matplotlib: pip install matplotlib") from error

    rounds = _of_result(training) if isinstance(training, Result) else _of_file(Path(training))
    if not any(round_["train"]["dense-bytes"] for round_ in rounds.values()):
        raise ValueError(
            "no round has 'uplink-bytes' above 0 among its training metrics: was the training run "
            "by CompressedStrategy, and were replies accepted?"
        )
    numbers = sorted(rounds)
    uplink = [rounds[number]["train"]["uplink-bytes"] for number in numbers]
    downlink = [_downlink(rounds[number], "downlink-bytes") for number in numbers]
    dense = [
        rounds[number]["train"]["dense-bytes"] + _downlink(rounds[number], "downlink-dense-bytes")
        for number in numbers
    ]
    both = [up + down for up, down in zip(uplink, downlink, strict=True)]
    size, unit = byte_unit(max(dense))
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for counts, label, shift in ((uplink, "up", -0.2), (downlink, "down", 0.2)):
        left.bar(
            [number + shift for number in numbers],
            [count / size for count in counts],
            width=0.4,
            label=label,
            color="C0" if label == "up" else "C1",
        )
    left.step(
        [number - 0.5 for number in numbers] + [numbers[-1] + 0.5],
        [count / size for count in [*dense, dense[-1]]],
        where="post",
        label="both, without compression",
        color="C7",
    )
    left.set_yscale("log")
    left.set_xlabel("round")
    left.set_ylabel(f"bytes of all clients in the round, {unit}")
    left.legend(loc="upper center", ncols=3, bbox_to_anchor=(0.5, 1.12), frameon=False)
    reached, total = [], 0
    for number, count in zip(numbers, both, strict=True):
        total += count
        value = _value(rounds[number], accuracy)
        if value is not None:
            reached.append((total, value))
    size, unit = byte_unit(total)
    right.plot([sent / size for sent, _ in reached], [value for _, value in reached], "o-", ms=3)
    right.set_xlabel(f"bytes so far, up and down, {unit}")
    right.set_ylabel(accuracy)
    if reached and all(0 <= value <= 1 for _, value in reached):
        right.yaxis.set_major_formatter(PercentFormatter(1.0))
    if not reached:
        right.text(0.5, 0.5, f"no metric {accuracy!r}", ha="center", transform=right.transAxes)
    share = sum(both) / sum(dense)
    figure.suptitle(f"{len(numbers)} rounds, {share:.2%} of the bytes without compression")
    figure.savefig(path, dpi=130)


def _downlink(round_: Mapping[str, Any], name: str) -> int:
    """Return the bytes of a round's train and evaluate messages to clients."""
    return sum(int((round_.get(stage) or {}).get(name, 0)) for stage in ("train", "evaluate"))


def _value(round_: Mapping[str, Any], name: str) -> float | None:
    for source in ("evaluate-server", "evaluate", "train"):
        metrics = round_.get(source) or {}
        if isinstance(metrics.get(name), (int, float)):
            return float(metrics[name])
    return None


def _of_result(result: Result) -> dict[int, dict[str, Any]]:
    return {
        number: {
            "train": metrics,
            "evaluate": result.evaluate_metrics_clientapp.get(number),
            "evaluate-server": result.evaluate_metrics_serverapp.get(number),
        }
        for number, metrics in result.train_metrics_clientapp.items()
        if "uplink-bytes" in metrics
    }


def _of_file(path: Path) -> dict[int, dict[str, Any]]:
    # Several trainings may have written to the file: the last one is drawn.
    lines = [json.loads(line) for line in path.read_text().splitlines() if line]
    return {
        line["training-round"]: line
        for line in lines
        if line["training"] == lines[-1]["training"] and line.get("train")
    }
