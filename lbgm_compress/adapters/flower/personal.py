"""Personal arrays: those that stay at each client, such as the heads of FedPer and FedRep.

The server keeps its own initial arrays for them, and hands the inner strategy replies that have
these. They travel to a client, beside the others, until a reply of the client has gone into the
model. From then on the client has what its app returned last, in its state.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, Message

from lbgm_compress.adapters.flower.reply import matching

__all__ = [
    "Personal",
    "check_patterns",
    "pack_personal",
    "personal_of",
    "placed",
    "take_personal",
    "unpack_personal",
]


class Personal(NamedTuple):
    """A personal array, and its position among all arrays of the server's record."""

    position: int
    array: Array


def personal_of(
    record: Mapping[str, Array], personal: Sequence[str], exclude: Sequence[str]
) -> dict[str, Personal]:
    """Return the arrays of a record whose names match a pattern.

    Parameters
    ----------
    record
        All arrays, in the server's order.
    personal, exclude
        Patterns, as `CompressedStrategy` has them.

    Raises
    ------
    ValueError
        If a pattern matches no name, if all names match, or if a name matches one of `exclude` too.
    """
    for pattern in personal:
        if not matching(record, [pattern]):
            raise ValueError(
                f"personal has the pattern {pattern!r}, which matches none of the arrays "
                f"{', '.join(map(repr, record))}"
            )
    names = matching(record, personal)
    if both := sorted(names & matching(record, exclude)):
        raise ValueError(
            f"the array {both[0]!r} matches a pattern of exclude and one of personal: leave it out "
            "of exclude, since it does not travel"
        )
    if personal and len(names) == len(record):
        raise ValueError("all arrays match a pattern of personal, and none is left to be averaged")
    return {n: Personal(i, array) for i, (n, array) in enumerate(record.items()) if n in names}


def placed(others: Mapping[str, Array], personal: Mapping[str, Personal]) -> ArrayRecord:
    """Return a record of all arrays in the server's order."""
    items = list(others.items())
    for name, one in sorted(personal.items(), key=lambda item: item[1].position):
        items.insert(one.position, (name, one.array))
    return ArrayRecord(dict(items))


def take_personal(
    message: Message, positions: Mapping[str, int], what: str = "message"
) -> dict[str, Personal]:
    """Remove arrays from the only ArrayRecord of a message, and return them.

    Raises
    ------
    ValueError
        If one is missing.
    """
    [(key, record)] = message.content.array_records.items()
    if missing := sorted(positions.keys() - record.keys()):
        raise ValueError(f"the personal array {missing[0]!r} is not in the {what}")
    message.content[key] = ArrayRecord({n: a for n, a in record.items() if n not in positions})
    return {name: Personal(position, record[name]) for name, position in positions.items()}


def pack_personal(personal: Mapping[str, Personal]) -> dict[str, Any]:
    """Return personal arrays as a nested dict of tensors, numbers and strings."""
    return {
        name: {
            "position": position,
            "dtype": array.dtype,
            "shape": array.shape,
            "stype": array.stype,
            "data": torch.from_numpy(np.frombuffer(array.data, dtype=np.uint8).copy()),
        }
        for name, (position, array) in personal.items()
    }


def unpack_personal(state: Mapping[str, Any]) -> dict[str, Personal]:
    """Return the personal arrays that `pack_personal` made a dict of.

    Raises
    ------
    KeyError, TypeError, AttributeError
        If it is not such a dict.
    """
    return {
        name: Personal(
            one["position"],
            Array(one["dtype"], tuple(one["shape"]), one["stype"], one["data"].numpy().tobytes()),
        )
        for name, one in state.items()
    }


def check_patterns(personal: Sequence[str], exclude: Sequence[str]) -> None:
    """Check the arguments of `CompressedStrategy` before any array is known.

    Raises
    ------
    TypeError
        If one is not a list of str.
    ValueError
        If a pattern is in both.
    """
    for argument, patterns in (("exclude", exclude), ("personal", personal)):
        if isinstance(patterns, str):
            raise TypeError(f"{argument} is a list of patterns, such as ({patterns!r},), not a str")
        for pattern in patterns:
            if not isinstance(pattern, str):
                raise TypeError(f"{argument} is a list of str, and {pattern!r} is none")
    if both := sorted(set(exclude) & set(personal)):
        raise ValueError(
            f"the pattern {both[0]!r} is in exclude and in personal: leave it out of exclude, "
            "since these arrays do not travel"
        )
