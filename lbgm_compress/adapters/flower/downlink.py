"""The server's end of the downlink: the versions that clients hold, and what each is sent."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

from flwr.app import Array

from lbgm_compress.adapters.flower.checksum import Checksum
from lbgm_compress.adapters.flower.claim import take_claim
from lbgm_compress.adapters.flower.reply import compressible, tensor_of
from lbgm_compress.adapters.flower.round import Received, Sent
from lbgm_compress.adapters.flower.update import PackedUpdate
from lbgm_compress.compressor import Compressor
from lbgm_compress.endpoints.downlink import VERSION_SIZE, Publisher, Whole

__all__ = ["Downlink"]

# A version and the number of a round.
CLIENT_BYTES = VERSION_SIZE + 8
logger = logging.getLogger("flwr")


class Downlink:
    """The model as it travels to clients, and the version that each of them holds.

    Parameters
    ----------
    compressor, first, history
        As `lbgm_compress.endpoints.downlink.Publisher` has them.

    Attributes
    ----------
    publisher
        The versions of w.
    """

    def __init__(self, compressor: Compressor, first: str, history: int | None) -> None:
        self.compressor, self.first, self.history = compressor, first, history
        self.publisher = self._new_publisher()
        # All arrays in the order of the server's record, and those that are sent exactly. An array
        # of integers stays among these when the average of it is of floating point.
        self._names: tuple[str, ...] = ()
        self._exact: frozenset[str] = frozenset()
        # The version that a client has confirmed, and the round; the oldest first.
        self._clients: dict[int, tuple[bytes, int]] = {}
        self._sent: Sent | None = None
        self._arrays: dict[bytes | None, Array] = {}
        self._checksum: tuple[bytes, Checksum] | None = None

    def publish(self, sent: Sent) -> None:
        """Make the next version, from the arrays as the server has them.

        Raises
        ------
        ValueError
            If no array is of floating point.
        """
        changing = compressible(sent.parts, sent.excluded)
        names = tuple(sent.arrays)
        exact = frozenset(names) - changing.keys() | self._exact & set(names)
        if len(exact) == len(names):
            raise ValueError(
                "downlink compresses arrays of float16, float32 or float64, and all arrays are "
                "excluded or of other dtypes: leave downlink out"
            )
        if (names, exact) != (self._names, self._exact):
            self.publisher = self._new_publisher()
            self._names, self._exact = names, exact
        self.publisher.publish(
            {
                name: tensor_of(sent.arrays[name], sent.parts[name].dtype)
                for name in names
                if name not in exact
            }
        )
        self._sent, self._arrays = sent, {}

    def array(self, node: int) -> Array:
        """Return what brings a client to the current version."""
        held = self.version(node)
        if held is None or not self.publisher.knows(held):
            held = None
        if held not in self._arrays:
            assert self._sent is not None
            update = self.publisher.update(held)
            exact = [self._sent.arrays[name] for name in self._names if name in self._exact]
            names = self._names if isinstance(update, Whole) else None
            self._arrays[held] = PackedUpdate(update, exact, names).pack(self.first)
        return self._arrays[held]

    def free(self) -> None:
        """Free what has been packed, when the messages of a round have been built."""
        self._sent, self._arrays = None, {}

    def version(self, node: int) -> bytes | None:
        """Return the version that a client has confirmed; None if it holds none."""
        return self._clients.get(node, (None, 0))[0]

    def confirm(self, replies: Iterable[Received], number: int) -> int:
        """Take what replies say of the versions that clients hold, and remove it from them.

        A client that asks for the whole model, or claims to hold anything but the version that it
        was sent, counts as holding nothing.

        Parameters
        ----------
        replies
            The replies to messages of the current version.
        number
            The number of the round.

        Returns
        -------
        int
            The size of all claims in bytes.
        """
        size = 0
        for reply in replies:
            claim = take_claim(reply.message)
            if reply.asked is None:
                continue
            node = reply.asked.message.metadata.dst_node_id
            if reply.out_of_sync:
                self._clients.pop(node, None)
                logger.info("compression: client %s is sent the whole model next", node)
            elif claim is not None:
                size += len(claim)
                self._clients.pop(node, None)
                if self._is_current(claim, node):
                    self._clients[node] = self.publisher.version, number
        return size

    def end_round(self, number: int, keep_rounds: int | None, room: int | None) -> None:
        """Forget clients that have confirmed nothing for long, and the oldest that have no room.

        Parameters
        ----------
        number
            The number of the round.
        keep_rounds
            The number of rounds after which a client is forgotten, or None.
        room
            The largest number of bytes for all clients, or None.
        """
        for node, (version, seen) in list(self._clients.items()):
            old = keep_rounds is not None and seen <= number - keep_rounds
            full = room is not None and self.nbytes() > room
            if old or full or not self.publisher.knows(version):
                del self._clients[node]

    def nbytes(self) -> int:
        """Return the number of bytes held of all clients together."""
        return CLIENT_BYTES * len(self._clients)

    def state_dict(self) -> dict[str, Any]:
        """Return the state as a nested dict of tensors, numbers and strings."""
        return {
            "publisher": self.publisher.state_dict(),
            "names": self._names,
            "exact": sorted(self._exact),
            "clients": {
                node: (version.hex(), seen) for node, (version, seen) in self._clients.items()
            },
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was called.

        Raises
        ------
        ValueError, KeyError, TypeError, AttributeError
            If it is not such a dict, or that of another compressor or precision. Nothing is
            changed.
        """
        publisher = self._new_publisher()
        publisher.load_state_dict(state["publisher"])
        clients = {
            int(node): (bytes.fromhex(version), int(seen))
            for node, (version, seen) in state["clients"].items()
        }
        names, exact = tuple(map(str, state["names"])), frozenset(map(str, state["exact"]))
        self.publisher, self._clients = publisher, clients
        self._names, self._exact = names, exact

    def _new_publisher(self) -> Publisher:
        return Publisher(self.compressor, first=self.first, history=self.history)

    def _is_current(self, claim: bytes, node: int) -> bool:
        version, sums = claim[:VERSION_SIZE], claim[VERSION_SIZE:]
        if version != self.publisher.version:
            return False
        if self._checksum is None or self._checksum[0] != version:
            self._checksum = version, Checksum.of(self.publisher.model)
        if self._checksum[1].agrees(sums, self.first):
            return True
        logger.warning(
            "compression: the model of client %s differs from the server's by more than rounding: "
            "the whole of it is sent next",
            node,
        )
        return False
