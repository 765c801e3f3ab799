"""One round as the server keeps it: the train messages, and the replies to them."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from flwr.app import ArrayRecord, Error, Message
from flwr.common.constant import ErrorCode

from lbgm_compress.adapters.flower.claim import OUT_OF_SYNC
from lbgm_compress.adapters.flower.personal import Personal, personal_of
from lbgm_compress.adapters.flower.reply import NDArray, Part, default_parts, matching

__all__ = ["Asked", "Received", "Sent", "Round"]

logger = logging.getLogger("flwr")


class Asked(NamedTuple):
    """A train message to a client, and its only ArrayRecord."""

    message: Message
    key: str
    record: ArrayRecord


class Sent(NamedTuple):
    """The arrays of a train message."""

    arrays: dict[str, NDArray]
    """All but those that are personal."""
    parts: dict[str, Part]
    """The form in which each travels back if its dtype stays."""
    excluded: frozenset[str]
    """Names of the arrays that are to be sent exactly."""
    personal: dict[str, Personal]
    """The personal arrays, as the server has them."""


@dataclass
class Received:
    """A reply, and the verdict on it."""

    message: Message
    asked: Asked | None = None
    """The train message that it answers; None if there is none."""
    rejection: str | None = None
    """The reason to treat the reply as an error; None as long as there is none."""

    @property
    def accepted(self) -> bool:
        """Return whether the reply is neither an error nor rejected."""
        return self.rejection is None and not self.message.has_error()

    @property
    def out_of_sync(self) -> bool:
        """Return whether the client lacks something that the server took it to hold."""
        message = self.message
        return message.has_error() and (message.error.reason or "").startswith(OUT_OF_SYNC)

    def verdict(self) -> Message:
        """Return the reply, or an error in its place if it is rejected; a rejection is logged."""
        if self.rejection is None:
            return self.message
        node = self.message.metadata.src_node_id
        logger.warning("compression: the reply of client %s is rejected: %s", node, self.rejection)
        reason = f"lbgm_compress: the reply of {node} is rejected: {self.rejection}"
        asked = self.message if self.asked is None else self.asked.message
        return Message(Error(ErrorCode.UNKNOWN, reason), reply_to=asked)


class Round:
    """The train or evaluate messages of one round.

    Parameters
    ----------
    exclude
        Patterns for names of arrays to be sent as they are.
    personal
        Patterns for names of arrays that stay at each client.
    """

    def __init__(self, exclude: Sequence[str], personal: Sequence[str]) -> None:
        self.exclude, self.personal = exclude, personal
        self._asked: dict[int, list[Asked]] = {}
        self._sent: dict[int, Sent] = {}

    def add(self, message: Message) -> None:
        """Add a train message before it is sent.

        Raises
        ------
        ValueError
            If it does not have exactly one ArrayRecord, or an array that cannot travel, or if
            `personal_of` finds a mistake.
        """
        records = message.content.array_records
        if len(records) != 1:
            raise ValueError(
                "CompressedStrategy needs one ArrayRecord in a train message, and the inner "
                f"strategy sends {len(records)}"
            )
        [(key, record)] = records.items()
        # An array that cannot travel is an error here, before every client finds it.
        self.sent(record)
        self._asked.setdefault(message.metadata.dst_node_id, []).append(Asked(message, key, record))

    def messages(self) -> list[Asked]:
        """Return all messages that have been added."""
        return [asked for of_client in self._asked.values() for asked in of_client]

    def all_sent(self) -> Sent | None:
        """Return the arrays of all messages; None if there are no messages.

        Raises
        ------
        ValueError
            If the arrays are not the same in all messages.
        """
        records = {id(asked.record): asked.record for asked in self.messages()}
        found = [self.sent(record) for record in records.values()]
        if any(not _equal(found[0].arrays, other.arrays) for other in found[1:]):
            raise ValueError(
                "downlink sends one model to all clients, and the inner strategy sends several in "
                "one round: leave downlink out"
            )
        return found[0] if found else None

    def with_personal(self, arrays: ArrayRecord) -> ArrayRecord:
        """Return aggregated arrays with the personal ones as they were sent."""
        kept = {n: one for sent in self._sent.values() for n, one in sent.personal.items()}
        found = {n: kept[n].array if n in kept else array for n, array in arrays.items()}
        return ArrayRecord(found) if kept else arrays

    def asked_once(self, node: int) -> bool:
        """Return whether a client has been sent exactly one message."""
        return len(self._asked.get(node, ())) == 1

    def receive(self, reply: Message) -> Received:
        """Return a reply together with the message of this round that it answers, if there is one.

        Its sender is taken from Flower's metadata.
        """
        for asked in self._asked.get(reply.metadata.src_node_id, ()):
            if asked.message.metadata.message_id == reply.metadata.reply_to_message_id:
                return Received(reply, asked)
        return Received(reply)

    def sent(self, record: ArrayRecord) -> Sent:
        """Return the arrays of a record that was sent.

        Most clients are sent the same record, which is read once.
        """
        if id(record) not in self._sent:
            personal = personal_of(record, self.personal, self.exclude)
            others = {name: array for name, array in record.items() if name not in personal}
            try:
                arrays = {name: np.asarray(array.numpy()) for name, array in others.items()}
            except TypeError as error:
                raise ValueError(f"CompressedStrategy needs numpy arrays: {error}") from None
            excluded = matching(arrays, self.exclude)
            parts = default_parts(arrays, excluded)
            self._sent[id(record)] = Sent(arrays, parts, excluded, personal)
        return self._sent[id(record)]


def _equal(one: Mapping[str, NDArray], other: Mapping[str, NDArray]) -> bool:
    """Return whether two records have the same names in the same order, and the same bits."""
    return list(one) == list(other) and all(
        (one[n].shape, one[n].dtype) == (other[n].shape, other[n].dtype)
        and one[n].tobytes() == other[n].tobytes()
        for n in one
    )
