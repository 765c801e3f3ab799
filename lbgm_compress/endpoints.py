"""The two ends of a connection, which alone hold state between rounds."""

from __future__ import annotations

import hashlib
import secrets
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lbgm_compress._util.checks import check_whole
from lbgm_compress._util.ends import (
    STATE_FORMAT,
    check_entry,
    check_state,
    check_targets,
    check_unchanged,
    copied,
    identifiers_of,
    sorted_names,
    tensor_bytes,
)
from lbgm_compress.compressor import (
    Compressor,
    Encoding,
    State,
    check_compressor,
    check_gradient,
    owned,
)
from lbgm_compress.decoded import Decoded
from lbgm_compress.wire.errors import OutOfSyncError, PayloadError
from lbgm_compress.wire.message import (
    HEADER_SIZE,
    Kind,
    Message,
    layout_hash,
    look_back_check,
    recycles,
)

__all__ = ["Receiver", "Sender", "TensorReport"]

# Operations on members of an enumeration are slow.
USES, SETS = int(Kind.USES), int(Kind.SETS)


@dataclass(frozen=True)
class TensorReport:
    """Statistics of one tensor in the last message."""

    recycled: bool
    """True if the look-back gradient was used and no new one was sent."""
    phase_error: float | None
    """sin^2 of the angle to the look-back gradient; None without one."""
    bytes: int
    """Bytes of the tensor's payload, without the header of the message."""


class Sender:
    """The end of a worker, which turns its gradients into messages.

    Parameters
    ----------
    compressor
        The compressor, the same at both ends.
    seed
        Seed of the compressor's randomness, if it has any. Every worker needs another one.
    compact
        If True, keep look-back gradients compressed, as the receiver does. This saves memory and
        makes `state_dict` small, and costs one decoding a round. A residual is kept as it is.

    Raises
    ------
    TypeError
        If `compressor` is not a compressor, or `seed` not an int.

    Examples
    --------
    >>> import torch
    >>> from lbgm_compress import LBGM
    >>> sender = Sender(LBGM())
    >>> grads = {"weight": torch.ones(100, 10), "bias": torch.ones(10)}
    >>> sender.compress(grads).numel(), sender.compress(grads).numel()
    (4077, 26)
    >>> sender.report()["weight"]
    TensorReport(recycled=True, phase_error=0.0, bytes=5)
    """

    def __init__(self, compressor: Compressor, *, seed: int = 0, compact: bool = False) -> None:
        check_compressor(compressor)
        check_whole("seed", seed, error=TypeError)
        self.compressor = compressor
        self.seed = seed
        self.compact = compact
        self._tensors: dict[str, dict[str, Any]] = {}
        self._layouts: dict[tuple[str, ...], int] = {}
        self._report: dict[str, TensorReport] = {}

    def compress(self, grads: Mapping[str, Tensor], peer: Tensor | None = None) -> Tensor:
        """Compress the gradients of one round into a message.

        Parameters
        ----------
        grads
            Tensors by name: of any shape; float32, float16, bfloat16 or float64; all on one
            device. Their order does not matter. A name must keep its shape and dtype.
        peer
            The receiver's `Receiver.digest` for the same names. A tensor for which the receiver
            holds another look-back gradient than this sender is sent in full.

        Returns
        -------
        Tensor
            The message: flat uint8, on the gradients' device.

        Raises
        ------
        TypeError
            If a gradient is not a dense floating-point tensor.
        ValueError
            If there are no gradients, a shape, dtype or device does not fit, or `peer` is not a
            digest for these tensors. The sender's state is then unchanged.
        """
        return self.encode(grads, peer)[0]

    def encode(
        self, grads: Mapping[str, Tensor], peer: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Decoded]]:
        """Compress the gradients of one round, and return the message and the decoded tensors.

        For a worker that needs the average itself: it need not decode its own message. Parameters
        and errors are those of `compress`.

        Returns
        -------
        message
            As `compress` returns it.
        decoded
            What receivers will decode, by name. The tensors may share memory with `grads`. Adding
            them up with `Decoded.add_to` gives the bits of `Receiver.accumulate`.
        """
        parts = self._parts(grads)
        if peer is not None:
            for part, identifier in zip(parts, identifiers_of(peer, len(parts)), strict=True):
                if part.identifier != identifier:
                    # The receiver holds something else: the tensor is sent in full.
                    part.state, part.identifier = self.compressor.forget(part.state), 0
                    part.held = {}

        encodings = self.compressor.encode_batch([p.grad for p in parts], [p.state for p in parts])
        bodies = [None if encoding.body is None else encoding.body() for encoding in encodings]
        used = [
            part.identifier if encoding.head[0] & USES else 0
            for part, encoding in zip(parts, encodings, strict=True)
        ]
        tensors = {part.name: part.grad for part in parts}
        layout = _layout(self._layouts, self.compressor, tensors)
        identifier = secrets.randbits(64) or 1
        heads = [encoding.head for encoding in encodings]
        message = Message(layout, look_back_check(used), identifier, heads, bodies)
        packed = message.pack(parts[0].grad.device)

        entries, report, decoded = {}, {}, {}
        for part, encoding, body, size in zip(
            parts, encodings, bodies, message.sizes(), strict=True
        ):
            kind = encoding.head[0]
            if kind & SETS:
                part.identifier = identifier
            entries[part.name] = self._entry(part, encoding, body)
            report[part.name] = TensorReport(recycles(kind), encoding.phase_error, size)
            decoded[part.name] = encoding.decoded
        self._tensors.update(entries)
        self._report = report
        return packed, decoded

    def _parts(self, grads: Mapping[str, Tensor]) -> list[_Part]:
        """Check the gradients, and return them with what is known of each, sorted by name."""
        names = sorted_names(grads)
        for name in names:
            check_gradient(grads[name], name)
        device = grads[names[0]].device
        parts = []
        for name in names:
            grad = grads[name].detach()
            if grad.device != device:
                raise ValueError(
                    f"the gradient {name!r} is on {grad.device} and {names[0]!r} on {device}: a "
                    "message's gradients share a device"
                )
            entry = self._tensors.get(name)
            if entry is None:
                state = self.compressor.initial_state(self._seed(name))
                parts.append(_Part(name, grad, state, 0, {}))
            else:
                check_unchanged(name, grad, entry)
                state = self._state(entry, grad)
                parts.append(_Part(name, grad, state, entry["id"], entry.get("held", {})))
        return parts

    def _entry(self, part: _Part, encoding: Encoding, body: Tensor | None) -> dict[str, Any]:
        """Return what is kept of a tensor until the next round."""
        shape, dtype = tuple(part.grad.shape), str(part.grad.dtype)
        entry = {"id": part.identifier, "shape": shape, "dtype": dtype}
        if not self.compact:
            return {**entry, "state": encoding.state}
        held = part.held
        if encoding.head[0] & SETS:
            held = self.compressor.read(encoding.head, body, held, part.grad)[1]
        return {**entry, "own": self.compressor.own_state(encoding.state), "held": held}

    def _state(self, entry: Mapping[str, Any], like: Tensor) -> State:
        """Return the compressor's state from what was kept."""
        if self.compact:
            return self.compressor.sender_state(entry["own"], entry["held"], like)
        state: State = entry["state"]
        return state

    def report(self) -> dict[str, TensorReport]:
        """Return statistics of each tensor in the last message; empty before the first."""
        return dict(self._report)

    def reset(self) -> None:
        """Drop all look-back gradients, so that the next message is full; residuals are kept."""
        for entry in self._tensors.values():
            mine = "own" if self.compact else "state"
            entry[mine] = self.compressor.forget(entry[mine])
            entry["id"] = 0
            if self.compact:
                entry["held"] = {}

    def state_dict(self) -> dict[str, Any]:
        """Return the state as a nested dict of tensors and numbers, which are not copied.

        It survives `torch.save` and ``torch.load(weights_only=True)``.
        """
        return {
            "format": STATE_FORMAT,
            "compressor": repr(self.compressor),
            "seed": self.seed,
            "tensors": copied(self._tensors),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace the state by one that `state_dict` returned.

        Raises
        ------
        ValueError
            If `state` is that of another compressor, of a compact sender where this one is not (or
            the other way round), or no such state. The sender's state is then unchanged.
        """
        check_state(state, repr(self.compressor), ("seed", "tensors"))
        parts = {"own", "held"} if self.compact else {"state"}
        for name, entry in state["tensors"].items():
            owner = f"a Sender with compact={self.compact}"
            check_entry(name, entry, {"id", "shape", "dtype", *parts}, owner)
        self.seed = state["seed"]
        self._tensors = copied(state["tensors"])
        self._layouts = {}
        self._report = {}

    def _seed(self, name: str) -> int:
        # Tensors of one worker must not share their randomness.
        return int.from_bytes(
            hashlib.blake2b(f"{self.seed} {name}".encode(), digest_size=7).digest(), "little"
        )


@dataclass(slots=True)
class _Part:
    """One tensor of a message that is being made."""

    name: str
    grad: Tensor
    state: State
    """The sender's state before this round."""
    identifier: int
    """Identifier of the look-back gradient that the receiver holds; 0 for none."""
    held: State
    """The receiver's state, which a compact sender keeps."""


class Receiver:
    """The end of a server or of another rank, which decodes the messages of many senders.

    For every sender it holds what that sender's messages look back at: with `LBGM`, the compressed
    payloads that carried the look-back gradients.

    Parameters
    ----------
    compressor
        The compressor, the same at both ends.
    like
        Tensors with the names, shapes, dtypes and the device of the gradients, for example the
        model's parameters. Their values do not matter, and they are not kept.

    Raises
    ------
    TypeError, ValueError
        If `compressor` is not a compressor, or `like` holds something else than dense
        floating-point tensors, or nothing.

    Examples
    --------
    >>> import torch
    >>> from lbgm_compress import LBGM, Sender
    >>> grads = {"weight": torch.ones(2, 3)}
    >>> sender, receiver = Sender(LBGM()), Receiver(LBGM(), like=grads)
    >>> receiver.decompress(0, sender.compress(grads))
    {'weight': tensor([[1., 1., 1.],
            [1., 1., 1.]])}
    """

    def __init__(self, compressor: Compressor, like: Mapping[str, Tensor]) -> None:
        check_compressor(compressor)
        self.compressor = compressor
        self._like: dict[str, Tensor] = {}
        for name in sorted_names(like):
            check_gradient(like[name], name)
            # An expanded element has the shape, and takes no memory of the tensor's size.
            element = torch.empty((), dtype=like[name].dtype, device=like[name].device)
            self._like[name] = element.expand(like[name].shape)
        self._layouts: dict[tuple[str, ...], int] = {}
        self._senders: dict[int | str, dict[str, dict[str, Any]]] = {}

    def decompress(
        self,
        sender_id: int | str,
        message: Tensor,
        names: Iterable[str] | None = None,
        *,
        check: Callable[[Mapping[str, Tensor]], None] | None = None,
    ) -> dict[str, Tensor]:
        """Decode one message.

        Parameters
        ----------
        sender_id
            Id of the sender, as the transport knows it; it is never taken from the message.
        message
            Flat uint8, as `Sender.compress` returned it.
        names
            Names of the tensors in the message; all of `like` by default.
        check
            Called with the decoded tensors. If it raises, the message is refused.

        Returns
        -------
        dict
            The decoded tensors by name, dense, with the shapes, dtypes and device of `like`.

        Raises
        ------
        PayloadError
            If the bytes are not a message for these tensors.
        OutOfSyncError
            If the message recycles a look-back gradient that this receiver does not hold.
        RuntimeError
            If the compressor breaks the contract: it returned a new state from a payload that sets
            none.

        After any error the receiver's state is unchanged.
        """
        decoded, states = self._read(sender_id, message, self._likes(names))
        tensors = {name: owned(tensor, message) for name, tensor in decoded.items()}
        if check is not None:
            check(tensors)
        self._commit(sender_id, states)
        return tensors

    def accumulate(
        self,
        sender_id: int | str,
        message: Tensor,
        into: Mapping[str, Tensor],
        weight: float,
        names: Iterable[str] | None = None,
    ) -> None:
        """Add `weight` times the decoded tensors to the tensors of `into`, in place.

        `into` has a tensor for each name, of the shape and on the device of `like`; the sum is
        taken in that tensor's dtype. A sparse payload of k entries costs O(k). The other parameters
        and the errors are those of `decompress`, and `ValueError` if a tensor of `into` is missing
        or has another shape. After any error `into` is unchanged.
        """
        likes = self._likes(names)
        check_targets(into, likes)
        decoded, states = self._read(sender_id, message, likes)
        for name, tensor in decoded.items():
            tensor.add_to(into[name], weight)
        self._commit(sender_id, states)

    def finish(self, mean: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the result of a step: `Compressor.finish` of the average over all senders."""
        return {name: self.compressor.finish(tensor) for name, tensor in mean.items()}

    def digest(self, sender_id: int | str, names: Iterable[str] | None = None) -> Tensor:
        """Return the identifiers of the look-back gradients that this receiver holds of a sender.

        Returns
        -------
        Tensor
            Flat uint8 on the CPU: eight bytes for each name in sorted order, zeros where nothing is
            held. It is the argument `peer` of `Sender.compress`.
        """
        held = self._senders.get(sender_id, {})
        identifiers = [held[name]["id"] if name in held else 0 for name in self._likes(names)]
        data = struct.pack(f"<{len(identifiers)}Q", *identifiers)
        return torch.frombuffer(bytearray(data), dtype=torch.uint8)

    def report(
        self, message: Tensor, names: Iterable[str] | None = None
    ) -> dict[str, TensorReport]:
        """Return statistics of each tensor in a message, without decoding it.

        The phase errors are None: they are not in the message.

        Raises
        ------
        PayloadError
            If the bytes are not a message for these tensors.
        """
        likes = self._likes(names)
        parts = self._unpack(message, likes)
        return {
            name: TensorReport(recycles(head[0]), None, size)
            for name, head, size in zip(likes, parts.heads, parts.sizes(), strict=True)
        }

    def held_bytes(self, sender_id: int | str) -> int:
        """Return the size in bytes of all tensors that this receiver holds of a sender."""
        entries = self._senders.get(sender_id, {}).values()
        return sum(tensor_bytes(entry["state"]) for entry in entries)

    def head_size(self, names: Iterable[str] | None = None) -> int:
        """Return the size in bytes of the fixed-size head of a message for these tensors."""
        return HEADER_SIZE + sum(map(self.compressor.head_size, self._likes(names).values()))

    def senders(self) -> list[int | str]:
        """Return the ids of the senders of which this receiver holds look-back gradients."""
        return list(self._senders)

    def drop(self, sender_id: int | str) -> None:
        """Drop the state of a sender, which may be unknown; its next message must be full."""
        self._senders.pop(sender_id, None)

    def state_dict(self) -> dict[str, Any]:
        """Return the state as a nested dict of tensors and numbers, which are not copied.

        It survives `torch.save` and ``torch.load(weights_only=True)``.
        """
        senders = {sender_id: copied(tensors) for sender_id, tensors in self._senders.items()}
        return {"format": STATE_FORMAT, "compressor": repr(self.compressor), "senders": senders}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace the state by one that `state_dict` returned.

        Raises
        ------
        ValueError
            If `state` is that of another compressor or of other tensors, or no such state. The
            receiver's state is then unchanged.
        """
        check_state(state, repr(self.compressor), ("senders",))
        for sender_id, tensors in state["senders"].items():
            for name, entry in tensors.items():
                if name not in self._like:
                    raise ValueError(
                        f"the state of sender {sender_id!r} has a tensor {name!r}, "
                        "which this receiver does not know"
                    )
                check_entry(name, entry, {"id", "state"}, "a Receiver")
        self._senders = {
            sender_id: copied(tensors) for sender_id, tensors in state["senders"].items()
        }

    def _likes(self, names: Iterable[str] | None) -> dict[str, Tensor]:
        """Return the tensors with these names, sorted; all of them for None."""
        chosen = self._like if names is None else sorted(set(names))
        for name in chosen:
            if name not in self._like:
                raise ValueError(f"this receiver knows no tensor {name!r}")
        return {name: self._like[name] for name in chosen}

    def _read(
        self, sender_id: int | str, message: Tensor, likes: Mapping[str, Tensor]
    ) -> tuple[dict[str, Decoded], dict[str, dict[str, Any]]]:
        """Return the decoded tensors of a message, and the states that it sets."""
        if not isinstance(sender_id, (int, str)):
            raise TypeError(f"a sender's id is an int or a str, not {type(sender_id).__name__}")
        parts = self._unpack(message, likes)

        held = self._senders.get(sender_id, {})
        used = []
        for name, head in zip(likes, parts.heads, strict=True):
            if head[0] & USES and name not in held:
                raise OutOfSyncError(
                    f"the message of sender {sender_id!r} recycles a look-back gradient of "
                    f"{name!r}, and this receiver holds none: send in full (Sender.reset, or "
                    "Sender.compress with this receiver's digest)"
                )
            used.append(held[name]["id"] if head[0] & USES else 0)
        if look_back_check(used) != parts.check:
            raise OutOfSyncError(
                f"the message of sender {sender_id!r} recycles look-back gradients other than "
                "those that this receiver holds: send in full (Sender.reset, or Sender.compress "
                "with this receiver's digest)"
            )

        decoded: dict[str, Decoded] = {}
        states: dict[str, dict[str, Any]] = {}
        for (name, like), head, body in zip(likes.items(), parts.heads, parts.bodies, strict=True):
            state = held[name]["state"] if name in held else {}
            try:
                decoded[name], state = self.compressor.read(head, body, state, like)
            except PayloadError as error:
                raise type(error)(f"tensor {name!r}: {error}") from None
            if head[0] & SETS:
                states[name] = {"id": parts.identifier, "state": state}
        return decoded, states

    def _unpack(self, message: Tensor, likes: Mapping[str, Tensor]) -> Message:
        if not isinstance(message, Tensor) or message.dtype != torch.uint8 or message.dim() != 1:
            raise TypeError("a message is a flat uint8 tensor")
        sizes = [self.compressor.head_size(like) for like in likes.values()]
        layout = _layout(self._layouts, self.compressor, likes)
        return Message.unpack(message.contiguous(), layout, sizes)

    def _commit(self, sender_id: int | str, states: dict[str, dict[str, Any]]) -> None:
        if states:
            self._senders.setdefault(sender_id, {}).update(states)


def _layout(
    known: dict[tuple[str, ...], int], compressor: Compressor, tensors: Mapping[str, Tensor]
) -> int:
    """Return the hash of the tensors of a message, from `known` if it is there."""
    # A name keeps its shape and dtype, so that the names identify a layout.
    names = tuple(tensors)
    if names not in known:
        described = ((name, tensor.shape, tensor.dtype) for name, tensor in tensors.items())
        known[names] = layout_hash(repr(compressor), described)
    return known[names]
