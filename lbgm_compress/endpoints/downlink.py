"""The downlink of a federation: one model that many clients hold, and how it moves.

The server has x, the model as it aggregates it, and w, the model that its clients hold. A
`Publisher` compresses x - w into one message for all clients, and w moves by what the message
decodes to. So what a message loses is in the next difference, and there is no residual. A
`Subscriber` is the other end, which decodes messages and holds w.

Each message makes a version of w. A version is named by a hash of the version before and the
message, so that no two models have one name, also after the server has returned to an older state.
A client that missed messages is sent those that it lacks, in order, or the whole of w where that is
shorter (`Publisher.update`). With ``first="int8"`` the first version can travel in int8, and all
messages since follow it.
"""

from __future__ import annotations

import hashlib
import itertools
import secrets
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lbgm_compress._util.checks import check_whole
from lbgm_compress._util.ends import STATE_FORMAT, check_state, sorted_names, tensor_bytes
from lbgm_compress.compressor import Compressor, check_compressor, check_gradient
from lbgm_compress.endpoints.receiver import Receiver
from lbgm_compress.endpoints.sender import Sender
from lbgm_compress.wire.errors import OutOfSyncError
from lbgm_compress.wire.values import as_bytes, decode_values, encode_values, values_size

__all__ = ["Chain", "Publisher", "Subscriber", "Whole", "decoded", "travels_in_half"]

VERSION_SIZE = 16
PRECISIONS = "float32", "float16", "int8"
# The name of the server at its clients' receivers.
SERVER = 0


class Whole(NamedTuple):
    """All that a client needs which holds nothing."""

    version: bytes
    model: dict[str, Tensor]
    """The tensors of w by name. Those of which `travels_in_half` is true, and which are not in
    `coded`, lose nothing in half precision."""
    state: dict[str, Any]
    """What later messages look back at: a nested dict of tensors and numbers."""
    coded: Mapping[str, Tensor] = MappingProxyType({})
    """Sections in int8 (`lbgm_compress.wire.values`), flat uint8, that `decoded` turns into tensors
    of `model`."""
    messages: tuple[Tensor, ...] = ()
    """Messages that follow, as those of a `Chain`."""

    def versions(self) -> list[bytes]:
        """Return the names of all versions from `version` to the last."""
        return Chain(self.version, self.messages).versions()


class Chain(NamedTuple):
    """Messages from one version on, in order."""

    base: bytes
    """The version before the first message."""
    messages: tuple[Tensor, ...]
    """Flat uint8."""

    def versions(self) -> list[bytes]:
        """Return the names of all versions from `base` to the last."""
        return list(itertools.accumulate(self.messages, _hash, initial=self.base))


Update = Whole | Chain


class Publisher:
    """The server's end of the downlink.

    Parameters
    ----------
    compressor
        Compresses the difference of x and w, for example ``LookBackSubspace(4, values="int4")``. It
        needs no error feedback.
    first
        The precision in which a whole model travels: "float32" (its own), "float16" or "int8". In
        float16, w is rounded to half precision in every version, and the next message carries what
        rounding lost. A tensor with elements beyond its range is left as it is. "int8" is the same,
        and rounds the first version to int8: as long as that version and all messages since are
        shorter than a whole model in float16, they travel in its place.
    history
        The largest number of bytes of messages to keep for clients that missed some. More than the
        size of a whole model is never kept, since a whole model is then shorter.

    Attributes
    ----------
    version : bytes
        The name of the current version, 16 bytes; empty before the first.
    model : dict
        The tensors of w by name.

    Raises
    ------
    TypeError, ValueError
        If an argument is of the wrong type or out of range.
    """

    def __init__(
        self, compressor: Compressor, *, first: str = "float32", history: int | None = None
    ) -> None:
        check_compressor(compressor)
        if compressor.finishes_average:
            raise ValueError(
                f"{compressor!r} does more to an average than a sum: use SignSGD(scaled=True)"
            )
        if compressor.has_residual:
            raise ValueError(
                f"{compressor!r} keeps a residual, and a downlink has none to keep, since the next "
                "message carries what this one lost: leave out ErrorFeedback"
            )
        if first not in PRECISIONS:
            raise ValueError(f"first must be 'float32', 'float16' or 'int8', not {first!r}")
        if history is not None:
            check_whole("history", history, 0)
        self.compressor = compressor
        self.first = first
        self.history = history
        self.version = b""
        self.model: dict[str, Tensor] = {}
        # The version before each message, and the message; the oldest first.
        self._messages: dict[bytes, Tensor] = {}
        # The tensors of the first version, or their sections in int8, as long as new clients are
        # sent these and all messages.
        self._begun: dict[str, Tensor] = {}
        self._published = b""
        self._sender = Sender(compressor)
        self._receiver: Receiver | None = None

    def publish(self, model: Mapping[str, Tensor]) -> bytes:
        """Make the next version, from the model as the server aggregates it.

        Nothing is done if it has the same bits as the last time. If names, shapes or dtypes
        differ, or a difference to w is inf or nan, the model itself is the next version, and all
        clients are sent the whole of it.

        Parameters
        ----------
        model
            Tensors by name, float16, float32, bfloat16 or float64, on one device.

        Returns
        -------
        bytes
            The name of the version.

        Raises
        ------
        TypeError, ValueError
            If there are no tensors, or one is not dense or not of floating point.
        """
        given = {name: model[name].detach() for name in sorted_names(model)}
        for name, tensor in given.items():
            check_gradient(tensor, name)
        published = _hash(b"", *given.values())
        if published == self._published:
            return self.version
        differences = _differences(given, self.model)
        if differences is None:
            self._begin(given)
        elif any(bool(d.any()) for d in differences.values()):
            self._advance(differences)
        self._published = published
        return self.version

    def _begin(self, given: Mapping[str, Tensor]) -> None:
        self.model = {name: _rounded(tensor, self.first) for name, tensor in given.items()}
        self._begun = {}
        if self.first == "int8":
            coded = {name: _section(tensor) for name, tensor in given.items() if _shrinks(tensor)}
            self.model |= {name: decoded(coded[name], given[name]) for name in coded}
            self._begun = {**self.model, **coded} if coded else {}
        self.version = secrets.token_bytes(VERSION_SIZE)
        self._messages = {}
        self._sender = Sender(self.compressor)
        self._receiver = Receiver(self.compressor, self.model)

    def _advance(self, differences: Mapping[str, Tensor]) -> None:
        assert self._receiver is not None
        message = self._sender.compress(differences)
        self.model = _moved(self._receiver, message, self.model, self.first)
        self._messages[self.version] = message
        self.version = _hash(self.version, message)
        limit = whole = self._now_bytes()
        if self.history is not None:
            limit = min(limit, self.history)
        if self.whole_bytes() > whole:
            self._begun = {}
        while self._messages and self.held_bytes() > limit:
            del self._messages[next(iter(self._messages))]
            self._begun = {}

    def knows(self, version: bytes) -> bool:
        """Return whether a version is the current one, or one from which messages are kept."""
        return version == self.version or version in self._messages

    def update(self, version: bytes | None = None) -> Update:
        """Return what a client needs to hold the current version.

        Parameters
        ----------
        version
            The version that the client holds; None if that is not known. A version that this end
            does not know counts as none.

        Raises
        ------
        RuntimeError
            Before the first `publish`.
        """
        if not self.version or self._receiver is None:
            raise RuntimeError("there is no version yet: call publish() first")
        if version == self.version:
            return Chain(version, ())
        if version in self._messages:
            # Messages are kept only as long as they are shorter than the whole.
            versions = list(self._messages)
            kept = versions[versions.index(version) :]
            return Chain(version, tuple(self._messages[one] for one in kept))
        if self._begun:
            coded = {n: t for n, t in self._begun.items() if t.dtype == torch.uint8}
            model = self._begun | {name: decoded(coded[name], self.model[name]) for name in coded}
            base = next(iter(self._messages), self.version)
            return Whole(base, model, {}, coded, tuple(self._messages.values()))
        state = self._receiver.state_dict()["senders"].get(SERVER, {})
        return Whole(self.version, dict(self.model), state)

    def held_bytes(self) -> int:
        """Return the number of bytes of all messages that are kept."""
        return sum(message.numel() for message in self._messages.values())

    def whole_bytes(self) -> int:
        """Return the size of what a client needs that holds nothing."""
        if self._begun:
            return tensor_bytes(self._begun) + self.held_bytes()
        return self._now_bytes()

    def _now_bytes(self) -> int:
        """Return the size of w, with what messages look back at."""
        assert self._receiver is not None
        state = tensor_bytes(self._receiver.state_dict()["senders"])
        return state + sum(
            tensor.numel() * (2 if travels_in_half(tensor, self.first) else tensor.element_size())
            for tensor in self.model.values()
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the state as a nested dict of tensors, numbers and strings."""
        return {
            "format": STATE_FORMAT,
            "compressor": repr(self.compressor),
            "first": self.first,
            "version": self.version.hex(),
            "published": self._published.hex(),
            "model": dict(self.model),
            "messages": {version.hex(): message for version, message in self._messages.items()},
            "begun": dict(self._begun),
            "sender": self._sender.state_dict(),
            "receiver": {} if self._receiver is None else self._receiver.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was called.

        Raises
        ------
        ValueError
            If it is not such a dict, or that of another compressor or precision. Nothing is
            changed.
        """
        keys = "first", "version", "published", "model", "messages", "sender", "receiver"
        check_state(state, repr(self.compressor), keys)
        if state["first"] != self.first:
            raise ValueError(f"the state has first={state['first']!r}, and this end {self.first!r}")
        sender, receiver = Sender(self.compressor), None
        sender.load_state_dict(state["sender"])
        if state["model"]:
            receiver = Receiver(self.compressor, state["model"])
            receiver.load_state_dict(state["receiver"])
        versions = [bytes.fromhex(state[key]) for key in ("version", "published")]
        messages = {bytes.fromhex(key): message for key, message in state["messages"].items()}
        self.version, self._published = versions
        self.model, self._messages = dict(state["model"]), messages
        # States of older releases do not hold it.
        self._begun = dict(state.get("begun", {}))
        self._sender, self._receiver = sender, receiver


class Subscriber:
    """A client's end of the downlink.

    Parameters
    ----------
    compressor, first
        As the `Publisher` has them.

    Attributes
    ----------
    version : bytes
        The name of the version that is held, 16 bytes; empty before the first.
    model : dict
        The tensors of w by name, with the bits of the server's on the same kind of processor. They
        must not be changed.
    """

    def __init__(self, compressor: Compressor, *, first: str = "float32") -> None:
        check_compressor(compressor)
        self.compressor = compressor
        self.first = first
        self.version = b""
        self.model: dict[str, Tensor] = {}
        self._receiver: Receiver | None = None

    def apply(self, update: Update) -> None:
        """Take an update, after which `model` is the server's w.

        Raises
        ------
        OutOfSyncError
            If it is a `Chain` without the version that is held: ask for the whole.
        PayloadError
            If a message cannot be decoded. After any error nothing has changed.
        """
        receiver, version, model = self._receiver, self.version, self.model
        versions = update.versions()
        if isinstance(update, Whole) and version not in versions:
            version, model = update.version, update.model
            receiver = Receiver(self.compressor, model)
            senders = {SERVER: update.state} if update.state else {}
            receiver.load_state_dict({**receiver.state_dict(), "senders": senders})
        if receiver is None or version not in versions:
            raise OutOfSyncError("the client does not hold a version that this update begins with")
        lacking = update.messages[versions.index(version) :]
        receiver.begin_step()
        try:
            for message in lacking:
                model = _moved(receiver, message, model, self.first)
        except BaseException:
            receiver.undo()
            raise
        receiver.commit()
        self._receiver, self.version, self.model = receiver, versions[-1], model

    def state_dict(self) -> dict[str, Any]:
        """Return the state as a nested dict of tensors, numbers and strings."""
        state = {} if self._receiver is None else self._receiver.state_dict()["senders"]
        return {
            "format": STATE_FORMAT,
            "compressor": repr(self.compressor),
            "version": self.version.hex(),
            "model": dict(self.model),
            "state": state.get(SERVER, {}),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was called.

        Raises
        ------
        ValueError
            If it is not such a dict, or that of another compressor. Nothing is changed.
        """
        check_state(state, repr(self.compressor), ("version", "model", "state"))
        self.apply(Whole(bytes.fromhex(state["version"]), dict(state["model"]), state["state"]))


def decoded(section: Tensor, like: Tensor) -> Tensor:
    """Return the tensor of a section in int8, of the shape and dtype of another.

    Raises
    ------
    PayloadError
        If it is not a section for such a tensor.
    """
    found = decode_values(section, like.numel(), "int8", like.dtype)
    return found.view(like.shape)


def _section(tensor: Tensor) -> Tensor:
    return encode_values(tensor.reshape(-1), "int8")[0]


def _shrinks(tensor: Tensor) -> bool:
    """Return whether a tensor can travel in int8, and is then shorter than in float16."""
    size = values_size(tensor.numel(), "int8", tensor.dtype)
    return size < 2 * tensor.numel() and bool(tensor.isfinite().all())


def travels_in_half(tensor: Tensor, first: str) -> bool:
    """Return whether a tensor of w loses nothing in float16."""
    if first == "float32" or tensor.dtype not in (torch.float32, torch.float64):
        return False
    return bool(tensor.numel() and tensor.abs().amax() <= torch.finfo(torch.float16).max)


def _rounded(tensor: Tensor, first: str) -> Tensor:
    """Return a tensor as w holds it, in memory of its own."""
    if travels_in_half(tensor, first):
        return tensor.half().to(tensor.dtype)
    return tensor.clone(memory_format=torch.contiguous_format)


def _moved(
    receiver: Receiver, message: Tensor, model: Mapping[str, Tensor], first: str
) -> dict[str, Tensor]:
    """Return w after a message."""
    decoded = receiver.decompress(SERVER, message)
    return {name: _rounded(tensor + decoded[name], first) for name, tensor in model.items()}


def _differences(
    given: Mapping[str, Tensor], held: Mapping[str, Tensor]
) -> dict[str, Tensor] | None:
    """Return x - w, or None if only the whole of x will do."""
    if {n: (t.shape, t.dtype) for n, t in given.items()} != {
        n: (t.shape, t.dtype) for n, t in held.items()
    }:
        return None
    found = {}
    for name, tensor in given.items():
        # A mask of -inf stays as it is.
        found[name] = torch.where(tensor == held[name], 0, tensor - held[name]).to(tensor.dtype)
        if not found[name].isfinite().all():
            return None
    return found


def _hash(before: bytes, *tensors: Tensor) -> bytes:
    hashed = hashlib.blake2b(before, digest_size=VERSION_SIZE)
    for tensor in tensors:
        hashed.update(as_bytes(tensor.cpu()).numpy().data)
    return hashed.digest()
