"""Which of the clients' replies an inner strategy can do something with.

Strategies of Flower refuse a whole round if the MetricRecord of one reply has other names than that
of the first. Here the reply that differs from most is refused, and the round goes on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from typing import Any, TypeVar

from flwr.app import Message
from flwr.serverapp.strategy.strategy_utils import aggregate_metricrecords

__all__ = [
    "averages_lists",
    "check_weight",
    "metrics_signature",
    "usual",
    "weight_key_of",
]

# A larger weight of one client could make the sum of all overflow.
LARGEST_WEIGHT = float(2**63)
Signature = TypeVar("Signature", bound=Hashable)


def usual(found: Iterable[Signature], preferred: Sequence[Signature | None]) -> Signature | None:
    """Return the most frequent of `found`; of several, a preferred one, or else the first."""
    counts = Counter(found)
    if not counts:
        return None
    most = max(counts.values())
    winners = [signature for signature, count in counts.items() if count == most]
    return next((choice for choice in preferred if choice in winners), winners[0])


def metrics_signature(reply: Message, lengths: bool) -> Hashable:
    """Return the names in a reply's MetricRecords, and which are lists; with their lengths."""
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


def weight_key_of(strategy: Any) -> str | None:
    """Return the name of the metric that a strategy, or one inside it, weighs replies by."""
    while strategy is not None:
        key = getattr(strategy, "weighted_by_key", None)
        if isinstance(key, str):
            return key
        strategy = getattr(strategy, "strategy", None)
    return None


def averages_lists(strategy: Any, stage: str) -> bool:
    """Whether a strategy, or one inside it, averages lists element by element as Flower does."""
    while strategy is not None:
        aggregate = getattr(strategy, f"{stage}_metrics_aggr_fn", None)
        if aggregate is not None:
            return aggregate is aggregate_metricrecords
        strategy = getattr(strategy, "strategy", None)
    return True


def check_weight(reply: Message, weight_key: str) -> str | None:
    """Return what is wrong with a reply's weight, or None."""
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
