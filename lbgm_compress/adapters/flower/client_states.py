"""What a server holds of its clients, between their replies."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lbgm_compress.adapters.flower.archive import pack_state, unpack_state
from lbgm_compress.compressor import Compressor
from lbgm_compress.endpoints import Receiver, TensorReport
from lbgm_compress.wire.errors import OutOfSyncError

__all__ = ["Held", "layout_of"]

# Receivers that are kept made: clients of one model mostly share one.
RECEIVERS = 8
Layout = tuple[tuple[str, tuple[int, ...], str], ...]


def layout_of(likes: Mapping[str, Tensor]) -> tuple[Layout, bytes]:
    """Return names, shapes and dtypes of tensors, and 16 bytes that stand for them."""
    layout = tuple(
        (name, tuple(like.shape), str(like.dtype).removeprefix("torch."))
        for name, like in likes.items()
    )
    return layout, hashlib.blake2b(repr(layout).encode(), digest_size=16).digest()


class _Client(NamedTuple):
    """What is held of a client, in bytes: objects would take many times more for small tensors."""

    layout: Layout
    seen: int
    layout_id: bytes
    digest: bytes
    state: bytes

    @property
    def nbytes(self) -> int:
        return len(self.state) + len(self.digest) + len(self.layout_id)


class Held:
    """The look-back gradients of many clients, each as compressed as it came.

    Parameters
    ----------
    compressor
        What the clients use.
    keep_rounds, memory_limit
        As `CompressedStrategy` has them.
    """

    def __init__(
        self, compressor: Compressor, keep_rounds: int | None, memory_limit: int | None
    ) -> None:
        self.compressor = compressor
        self.keep_rounds, self.memory_limit = keep_rounds, memory_limit
        self.rounds = 0
        # The least recently seen first.
        self._clients: dict[int, _Client] = {}
        self._bytes = 0
        self._receivers: dict[Layout, Receiver] = {}

    def __len__(self) -> int:
        return len(self._clients)

    def nbytes(self) -> int:
        """Return how many bytes are held of all clients together."""
        return self._bytes

    def clients(self) -> list[int]:
        """Return the ids of the clients, least recently seen first."""
        return list(self._clients)

    def digest(self, node: int) -> tuple[bytes, bytes]:
        """Return for which layout something is held of a client, and its digest; or nothing."""
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
        """Decode a client's message, and hold what it sets.

        Parameters
        ----------
        node
            Who sent it.
        likes
            Stand-ins for all tensors that the client's messages may be about.
        message
            Flat uint8, about the tensors `names`.
        check
            Called with the decoded tensors: what it raises refuses the message.

        Raises
        ------
        PayloadError
            If it is no such message. What is held is as it was, but for a message that looks back
            at something else than is held: then nothing is, so that the client sends in full.
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
        """Forget a client, known or not."""
        client = self._clients.pop(node, None)
        if client is not None:
            self._bytes -= client.nbytes

    def end_round(self) -> None:
        """Forget clients that have not been seen for too long, and those there is no room for.

        Not before the end of a round: the others have been told what is held of them.
        """
        for node, client in list(self._clients.items()):
            old = self.keep_rounds is not None and client.seen <= self.rounds - self.keep_rounds
            full = self.memory_limit is not None and self._bytes > self.memory_limit
            if old or full:
                self.drop(node)

    def state_dict(self) -> dict[str, Any]:
        """Return everything as a nested dict of tensors, numbers and strings."""
        layouts = list(dict.fromkeys(client.layout for client in self._clients.values()))
        positions = {layout: i for i, layout in enumerate(layouts)}
        return {
            "compressor": repr(self.compressor),
            "rounds": self.rounds,
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
        """Replace everything by what `state_dict` returned.

        Raises
        ------
        ValueError, KeyError, TypeError, IndexError, AttributeError
            If it is no such state, or that of another compressor. Nothing is changed.
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
        self.rounds = int(state["rounds"])
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
