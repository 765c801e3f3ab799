"""The states of all clients at the server, between their replies."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lbgm_compress.adapters.flower.archive import pack_state, unpack_state
from lbgm_compress.compressor import Compressor
from lbgm_compress.endpoints import Receiver, TensorReport
from lbgm_compress.wire.errors import OutOfSyncError

__all__ = ["ClientStates", "layout_of"]

# The number of receivers that are kept for reuse. Clients of one model mostly share one.
RECEIVERS = 8
Layout = tuple[tuple[str, tuple[int, ...], str], ...]


def layout_of(likes: Mapping[str, Tensor]) -> tuple[Layout, bytes]:
    """Return names, shapes and dtypes of tensors, and a hash of them (16 bytes)."""
    layout = tuple(
        (name, tuple(like.shape), str(like.dtype).removeprefix("torch."))
        for name, like in likes.items()
    )
    return layout, hashlib.blake2b(repr(layout).encode(), digest_size=16).digest()


class _Client(NamedTuple):
    """The state of one client, as bytes: objects would take far more memory for small tensors."""

    layout: Layout
    seen: int
    """The round of the client's last reply."""
    layout_id: bytes
    digest: bytes
    state: bytes

    @property
    def nbytes(self) -> int:
        return len(self.state) + len(self.digest) + len(self.layout_id)


class ClientStates:
    """The look-back gradients of many clients, compressed as they arrived.

    Parameters
    ----------
    compressor
        The compressor that the clients use.
    keep_rounds
        The number of rounds after which the state of a client that does not reply is dropped, or
        None.
    memory_limit
        The largest number of bytes to hold between rounds, or None.

    Attributes
    ----------
    rounds
        The number of the current round, or of the last one. A round that fails has a number too.
    """

    def __init__(
        self, compressor: Compressor, keep_rounds: int | None, memory_limit: int | None
    ) -> None:
        self.compressor = compressor
        self.keep_rounds, self.memory_limit = keep_rounds, memory_limit
        self.rounds = 0
        # The number of the last round in which each client's reply went into the model. Of rounds
        # up to `_unknown_until` that is not remembered.
        self._applied: dict[int, int] = {}
        self._unknown_until = 0
        # Of these, clients that have said since that they hold nothing.
        self._lost: set[int] = set()
        # In the order of their last replies, the oldest first.
        self._clients: dict[int, _Client] = {}
        self._bytes = 0
        self._receivers: dict[Layout, Receiver] = {}

    def __len__(self) -> int:
        return len(self._clients)

    def nbytes(self) -> int:
        """Return the number of bytes held of all clients together."""
        return self._bytes

    def clients(self) -> list[int]:
        """Return the ids of the clients, the least recently seen first."""
        return list(self._clients)

    def digest(self, node: int) -> tuple[bytes, bytes]:
        """Return the layout's hash and the digest of a client's state; empty if there is none."""
        client = self._clients.get(node)
        return (b"", b"") if client is None else (client.layout_id, client.digest)

    def decode(
        self,
        node: int,
        likes: Mapping[str, Tensor],
        message: Tensor,
        names: list[str],
        check: Callable[[Mapping[str, Tensor]], None],
    ) -> dict[str, TensorReport]:
        """Decode a client's message, and keep the state that it sets.

        Parameters
        ----------
        node
            The client that sent it.
        likes
            Placeholders for all tensors that the client's messages may be about.
        message
            The message: flat uint8, about the tensors `names`.
        names
            Names of the tensors in the message.
        check
            Called with the decoded tensors. An error that it raises rejects the message.

        Raises
        ------
        PayloadError
            If it is not a message for these tensors. The state of the client is as it was.
        OutOfSyncError
            If it looks back at something that is not held. The state of the client is dropped, so
            that the client sends in full next time.
        """
        layout, layout_id = layout_of(likes)
        receiver = self._receiver(layout)
        client = self._clients.get(node)
        if client is not None and client.layout == layout:
            self._load(receiver, node, client.state)
        try:
            report = receiver.report(message, names)
            receiver.decompress(node, message, names, check=check)
            digest = receiver.digest(node).numpy().tobytes()
            if client is not None and (client.layout_id, client.digest) == (layout_id, digest):
                state = client.state
            else:
                state = pack_state(receiver.state_dict()["senders"].get(node, {}))
            self.drop(node)
            if any(digest):
                self._add(node, _Client(layout, self.rounds, layout_id, digest, state))
        except OutOfSyncError:
            self.drop(node)
            raise
        finally:
            receiver.drop(node)
        return report

    def drop(self, node: int) -> None:
        """Drop the state of a client, if there is one."""
        client = self._clients.pop(node, None)
        if client is not None:
            self._bytes -= client.nbytes

    def applied(self, node: int) -> int:
        """Return the number of a round after which no reply of a client went into the model."""
        return max(self._applied.get(node, 0), self._unknown_until)

    def set_applied(self, nodes: Iterable[int]) -> None:
        """Remember that the replies of these clients in this round went into the model."""
        applied = dict.fromkeys(nodes, self.rounds)
        self._applied.update(applied)
        self._lost -= applied.keys()

    def has_state(self, node: int) -> bool:
        """Return whether a client has a state of this training, as far as is known."""
        return node in self._applied and node not in self._lost

    def set_lost(self, node: int) -> None:
        """Remember that a client has no state of this training."""
        self._lost.add(node)

    def end_round(self) -> None:
        """Drop states that are too old, and the oldest ones as long as the limit is exceeded.

        This must wait for the end of a round, since clients have been sent digests of their states.
        """
        for node, client in list(self._clients.items()):
            old = self.keep_rounds is not None and client.seen <= self.rounds - self.keep_rounds
            full = self.memory_limit is not None and self._bytes > self.memory_limit
            if old or full:
                self.drop(node)
        if self.keep_rounds is not None:
            self._unknown_until = max(self._unknown_until, self.rounds - self.keep_rounds)
            self._applied = {
                node: number
                for node, number in self._applied.items()
                if number > self._unknown_until
            }
        self._lost &= self._applied.keys()

    def state_dict(self) -> dict[str, Any]:
        """Return all states as a nested dict of tensors, numbers and strings."""
        layouts = list(dict.fromkeys(client.layout for client in self._clients.values()))
        positions = {layout: i for i, layout in enumerate(layouts)}
        return {
            "compressor": repr(self.compressor),
            "rounds": self.rounds,
            "applied": dict(self._applied),
            "unknown-until": self._unknown_until,
            "layouts": [list(map(list, layout)) for layout in layouts],
            "clients": {
                node: {
                    "layout": positions[client.layout],
                    "seen": client.seen,
                    "digest": _tensor(client.digest),
                    "state": _tensor(client.state),
                }
                for node, client in self._clients.items()
            },
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace all states by those of a dict that `state_dict` returned.

        Raises
        ------
        ValueError, KeyError, TypeError, IndexError, AttributeError
            If it is not such a dict, or that of another compressor. Nothing is changed.
        """
        if state["compressor"] != repr(self.compressor):
            raise ValueError(
                f"the state is that of {state['compressor']}, and this strategy uses "
                f"{self.compressor!r}"
            )
        layouts: list[Layout] = [
            tuple((str(name), tuple(shape), str(dtype)) for name, shape, dtype in layout)
            for layout in state["layouts"]
        ]
        clients = {}
        for node, entry in state["clients"].items():
            layout = layouts[entry["layout"]]
            receiver = self._receiver(layout)
            data = entry["state"].numpy().tobytes()
            self._load(receiver, node, data)
            digest = receiver.digest(node).numpy().tobytes()
            receiver.drop(node)
            if digest != entry["digest"].numpy().tobytes():
                raise ValueError(f"the state of client {node} does not fit its digest")
            likes = _likes(layout)
            clients[int(node)] = _Client(
                layout, int(entry["seen"]), layout_of(likes)[1], digest, data
            )
        rounds = int(state["rounds"])
        # States of older releases do not hold it.
        unknown_until = int(state.get("unknown-until", rounds))
        applied = {int(node): int(number) for node, number in state.get("applied", {}).items()}
        if not all(0 <= number <= rounds for number in (unknown_until, *applied.values())):
            raise ValueError(f"a round of the state is not one of its {rounds} rounds")
        self.rounds, self._applied, self._unknown_until = rounds, applied, unknown_until
        self._clients = clients
        self._bytes = sum(client.nbytes for client in clients.values())

    def _add(self, node: int, client: _Client) -> None:
        self._clients[node] = client
        self._bytes += client.nbytes

    def _receiver(self, layout: Layout) -> Receiver:
        if layout not in self._receivers:
            if len(self._receivers) >= RECEIVERS:
                del self._receivers[next(iter(self._receivers))]
            self._receivers[layout] = Receiver(self.compressor, _likes(layout))
        return self._receivers[layout]

    def _load(self, receiver: Receiver, node: int, state: bytes) -> None:
        empty = receiver.state_dict()
        receiver.load_state_dict({**empty, "senders": {node: unpack_state(state)}})


def _likes(layout: Layout) -> dict[str, Tensor]:
    return {
        name: torch.empty((), dtype=getattr(torch, dtype)).expand(shape)
        for name, shape, dtype in layout
    }


def _tensor(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)
