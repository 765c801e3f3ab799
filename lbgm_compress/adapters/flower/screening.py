"""Screening of replies: rejects those that the inner strategy cannot aggregate with the others.

Strategies of Flower fail for a whole round if the MetricRecord of one reply has other names than
that of the first. Here the replies that differ from the majority are rejected, and the round goes
on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from typing import Any, TypeVar

from flwr.app import Message
from flwr.serverapp.strategy.strategy_utils import aggregate_metricrecords

from lbgm_compress.adapters.flower.round import Received

__all__ = ["Screening", "majority"]

# A larger weight of one client could make the sum of all overflow.
LARGEST_WEIGHT = float(2**63)
Signature = TypeVar("Signature", bound=Hashable)


def majority(
    found: Iterable[Signature], preferred: Sequence[Signature | None] = ()
) -> Signature | None:
    """Return the most frequent of some values, or None if there are none.

    If several are equally frequent, the first of `preferred` that is among them is returned, or
    else the one that was found first.
    """
    counts = Counter(found)
    if not counts:
        return None
    most = max(counts.values())
    winners = [signature for signature, count in counts.items() if count == most]
    return next((choice for choice in preferred if choice in winners), winners[0])


class Screening:
    """Rejects replies whose metrics, or weight, an inner strategy cannot aggregate.

    It remembers the majority of the round before, which decides where as many replies differ as
    agree.
    """

    def __init__(self) -> None:
        self._signatures: dict[str, Hashable] = {}

    def check_metrics(self, replies: Sequence[Received], strategy: Any, stage: str) -> None:
        """Reject replies whose MetricRecord has no valid weight, or differs from the majority's.

        Parameters
        ----------
        replies
            The replies of a round.
        strategy
            The strategy that will aggregate them. Its own strategies are left alone: all of
            Flower's weigh replies by a metric, and one that does not may do as it likes.
        stage
            ``"train"`` or ``"evaluate"``.
        """
        weight_key = _weight_key(strategy)
        if weight_key is None:
            return
        lengths = _averages_lists(strategy, stage)
        signatures: list[tuple[Received, Hashable]] = []
        for reply in replies:
            if reply.accepted:
                reply.rejection = _wrong_weight(reply.message, weight_key)
            if reply.accepted:
                signatures.append((reply, _signature(reply.message, lengths)))
        chosen = majority((signature for _, signature in signatures), [self._signatures.get(stage)])
        for reply, signature in signatures:
            if signature != chosen:
                reply.rejection = (
                    "its MetricRecord has other names or sizes than those of most clients"
                )
        if chosen is not None:
            self._signatures[stage] = chosen


def _signature(reply: Message, lengths: bool) -> Hashable:
    """Return the names and types in a reply's MetricRecords, and the lengths of lists if asked."""
    return tuple(
        sorted(
            (key, tuple(sorted((name, _kind(value, lengths)) for name, value in record.items())))
            for key, record in reply.content.metric_records.items()
        )
    )


def _kind(value: Any, lengths: bool) -> int:
    if not isinstance(value, list):
        return -1
    return len(value) if lengths else -2


def _weight_key(strategy: Any) -> str | None:
    """Return the name of the metric by which a strategy, or one inside it, weighs replies."""
    while strategy is not None:
        key = getattr(strategy, "weighted_by_key", None)
        if isinstance(key, str):
            return key
        strategy = getattr(strategy, "strategy", None)
    return None


def _averages_lists(strategy: Any, stage: str) -> bool:
    """Return whether a strategy, or one inside it, averages lists by element, as Flower does."""
    while strategy is not None:
        aggregate = getattr(strategy, f"{stage}_metrics_aggr_fn", None)
        if aggregate is not None:
            return aggregate is aggregate_metricrecords
        strategy = getattr(strategy, "strategy", None)
    return True


def _wrong_weight(reply: Message, weight_key: str) -> str | None:
    """Return the reason why a reply's weight is not valid, or None if it is."""
    weight = _weight(reply, weight_key)
    if weight is None:
        return f"it has no {weight_key!r}, one number, in its MetricRecord"
    # A strategy that picks one reply, as Krum does, would divide by its weight.
    return None if 0 < weight <= LARGEST_WEIGHT else f"its {weight_key!r} is {weight}"


def _weight(reply: Message, weight_key: str) -> int | float | None:
    for record in reply.content.metric_records.values():
        weight = record.get(weight_key)
        if isinstance(weight, (int, float)):
            return weight
    return None
