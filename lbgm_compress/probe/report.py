"""The report of a probe: rows of figures, a page of text, and advice."""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from lbgm_compress._util.units import human_bytes

__all__ = ["Report", "Row", "advice"]

# Smallest saving, as a share of the bytes, for which the advice names a method.
WORTHWHILE = 0.3
# Share of a subspace's bytes in tensors without directions from which the report gives it.
NOTEWORTHY = 0.2
# Largest relative error at which recycled gradients still point in a similar direction.
TOLERABLE_ERROR = 0.6


@dataclass(frozen=True)
class Row:
    """Figures of one method for one tensor, or for all tensors together."""

    method: str
    """The expression that builds the compressor."""
    delta: float
    """The compressor's threshold."""
    steps: int
    """Number of steps whose gradients are averaged before they are sent."""
    tensor: str | None
    """The tensor's name; None for all tensors together."""
    rounds: int
    """Number of rounds that were replayed, each of `steps` steps."""
    recycled_share: float
    """Share of the rounds in which the tensor is recycled; for all tensors, their mean share."""
    bytes_per_step: float
    """Uplink in bytes; for all tensors, that of whole messages."""
    of_dense: float
    """Uplink as a share of that of uncompressed gradients, sent in each step."""
    saved: float
    """Share of the method's uplink without recycling that recycling saves."""
    relative_error: float
    """Root mean square over rounds of |g - applied| / |g|."""
    subspace: bool
    """True if the method is a `LookBackSubspace`."""
    never_held: float
    """Share of the bytes in tensors of which a receiver held nothing to look back at."""


@dataclass(frozen=True)
class Report:
    """The results of a probe; `str` gives them as a page of text."""

    rows: Sequence[Row]
    rounds: int
    """Number of gradients that were observed."""
    skipped: int
    """Number of those with inf or nan, which are sent as they are and left out of `rows`."""
    dense_bytes: float
    """Size of a message with one step's uncompressed gradients in bytes; the mean over steps."""
    seconds: float
    """Time that the probe took."""
    share_of_time: float
    """The same, as a share of the time since the probe was created."""
    left_out: Sequence[str]
    """Names of parameters without a gradient, or with one that cannot be compressed."""
    stopped: str | None
    """The error that detached the probe, if there was one; the training went on."""
    advice: str
    """One or two sentences."""

    def all_tensors(self) -> list[Row]:
        """Return the rows for all tensors together."""
        return [row for row in self.rows if row.tensor is None]

    def write_csv(self, file: str | os.PathLike[str]) -> None:
        """Write all rows as CSV."""
        names = [field.name for field in fields(Row)]
        with Path(file).open("w", newline="", encoding="utf-8") as lines:
            writer = csv.writer(lines, lineterminator="\n")
            writer.writerow(names)
            for row in self.rows:
                values = (getattr(row, name) for name in names)
                writer.writerow("" if value is None else value for value in values)

    def __str__(self) -> str:
        """Return the rows for all tensors, the recycled shares of each tensor, and the advice."""
        lines = []
        if self.rows:
            lines += [
                self._summary(),
                "",
                *_aligned(self._methods()),
                *self._without_directions(),
                "",
            ]
            lines += ["recycled, tensor by tensor", *_aligned(self._tensors()), ""]
        if self.left_out:
            names = ", ".join(self.left_out[:5]) + (", ..." if len(self.left_out) > 5 else "")
            lines += [f"Without a gradient that could be watched: {names}.", ""]
        if self.stopped is not None:
            lines += [f"Watching stopped after {_count(self.rounds)}: {self.stopped}", ""]
        text = "\n".join([*lines, self.advice])
        return text if self.rows else f"LookBackProbe: {text}"

    def _summary(self) -> str:
        skipped = f", {self.skipped} with inf or nan left out" if self.skipped else ""
        return (
            f"LookBackProbe: {_count(self.rounds)} of {human_bytes(self.dense_bytes)} watched"
            f"{skipped}; watching took {self.share_of_time:.1%} of the time"
        )

    def _methods(self) -> list[Sequence[str]]:
        table: list[Sequence[str]] = [
            ("would send", "rounds", "recycled", "uplink a step", "of dense", "error")
        ]
        for row in self.all_tensors():
            averaged = "" if row.steps == 1 else f", {row.steps} steps averaged"
            table.append(
                (
                    row.method + averaged,
                    str(row.rounds),
                    f"{row.recycled_share:.1%}",
                    human_bytes(row.bytes_per_step),
                    f"{row.of_dense:.2%}",
                    f"{row.relative_error:.1%}",
                )
            )
        return table

    def _without_directions(self) -> list[str]:
        return [
            f"{row.method} finds no directions in vectors and in small or thin matrices, which "
            f"take {row.never_held:.0%} of its bytes."
            for row in self.all_tensors()
            if row.subspace and row.never_held >= NOTEWORTHY
        ]

    def _tensors(self) -> list[Sequence[str]]:
        shown = [row for row in self.rows if row.steps == 1 and not row.subspace]
        deltas = list(dict.fromkeys(row.delta for row in shown))
        shares: dict[str, dict[float, str]] = {}
        for row in shown:
            if row.tensor is not None:
                shares.setdefault(row.tensor, {})[row.delta] = f"{row.recycled_share:.1%}"
        lines = [(name, *(of.get(d, "") for d in deltas)) for name, of in shares.items()]
        return [("delta", *(f"{delta:g}" for delta in deltas)), *lines]


def advice(rows: Sequence[Row], rounds: int, skipped: int, updates: bool) -> str:
    """Return one or two sentences about what to use.

    Parameters
    ----------
    rows
        Rows of a report.
    rounds, skipped
        Number of gradients that were observed, and of those with inf or nan.
    updates
        True if updates were observed in the place of gradients.
    """
    whole = [row for row in rows if row.tensor is None]
    plain = [row for row in whole if row.steps == 1 and not row.subspace]
    if not plain or plain[0].rounds < 2:
        return _too_few(rounds, skipped, updates)
    here = min(plain, key=lambda row: abs(row.delta - 0.2))
    said = f"{here.recycled_share:.0%} of the tensors recycle with {here.method}"
    if here.saved >= WORTHWHILE:
        if here.relative_error > TOLERABLE_ERROR:
            return (
                f"{said}, but gradients would be off by {here.relative_error:.0%}: that is too "
                "far. Try a lower threshold."
            )
        return (
            f"{here.method} would recycle {here.recycled_share:.0%} of the tensors and save "
            f"{here.saved:.0%} of the bytes, with gradients off by {here.relative_error:.0%}: try "
            "it, and compare accuracies."
        )
    said = f"At this batch size {said}"
    averages = [row for row in whole if row.steps > 1 and row.rounds > 2]
    for row in averages:
        if row.saved >= max(WORTHWHILE, 2 * here.saved):
            return (
                f"{said}; averaging gradients over {row.steps} steps before sending would make it "
                f"{row.recycled_share:.0%}, and save {row.saved:.0%} of the bytes of messages, of "
                f"which there are {row.steps} times fewer."
            )
    if averages:
        said += f", and {averages[-1].recycled_share:.0%} averaged over {averages[-1].steps} steps"
    # Error feedback brings back most of what a subspace misses.
    useful = [row for row in whole if row.subspace and row.rounds > 1 and row.of_dense < 0.5]
    useful = [row for row in useful if row.relative_error <= 0.95]
    if not any(row.subspace and row.rounds > 1 for row in whole):
        return (
            f"{said}: LBGM has little to recycle. Subspaces were not replayed long enough to tell: "
            "run longer, or with --cost 1 (cost=None), or try ErrorFeedback(LookBackSubspace(4, "
            "values='int4'))."
        )
    if not useful:
        return (
            f"{said}: looking back saves little here. Take ErrorFeedback(TopK(0.01)) or larger "
            "batches."
        )
    best = min(useful, key=lambda row: row.of_dense)
    return (
        f"{said}: LBGM has little to recycle. ErrorFeedback({best.method}) would send about "
        f"{best.of_dense:.1%} of the dense bytes, and have to make up for "
        f"{best.relative_error:.0%} of each gradient: try it, and compare accuracies."
    )


def _too_few(rounds: int, skipped: int, updates: bool) -> str:
    if skipped:
        return f"{_count(rounds)} seen, {skipped} of them with inf or nan: there is nothing to say."
    hint = (
        "does the training run inside the probe's `with` block, and does the file stay?"
        if updates
        else "was the probe attached before the backward pass, and does an optimizer of torch's "
        "step? (A script that is watched from outside is met at its first step.)"
    )
    return f"{_count(rounds)} seen, and it takes two to compare: {hint}"


def _count(rounds: int) -> str:
    return "1 gradient" if rounds == 1 else f"{rounds} gradients"


def _aligned(table: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = []
    for first, *rest in table:
        cells = [cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells]))
    return lines
