"""The two ends of a connection: the only holders of state."""

from __future__ import annotations

import hashlib
import secrets
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lbgm_compress.compressor import Compressor, State, check_gradient, owned
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

FORMAT = 1


@dataclass(frozen=True)
class TensorReport:
    """What became of one tensor in the last message."""

    recycled: bool
    """Whether a look-back gradient stood in for it and nothing new was set."""
    phase_error: float | None
    """sin^2 of the angle to what was looked back at; None if nothing was."""
    bytes: int
    """Its share of the message, without the message's own 16 bytes."""


class Sender:
    """A worker's end: turns its gradients into messages.

    Parameters
    ----------
    compressor
        What both ends use.
    seed
        Seed of the compressor's randomness, if it has any: give every worker another one.
    compact
        Keep what is looked back at as the receiver does, compressed, for a worker whose memory is
        scarce, or whose state is moved about: it costs a decoding a round. What only the sender
        knows, such as a residual, stays as it is.

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
        _check_compressor(compressor)
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise TypeError(f"seed must be a whole number, not {seed!r}")
        self.compressor = compressor
        self.seed = seed
        self.compact = compact
        self._tensors: dict[str, dict[str, Any]] = {}
        self._layouts: dict[tuple[str, ...], int] = {}
        self._report: dict[str, TensorReport] = {}

    def compress(self, grads: Mapping[str, Tensor], peer: Tensor | None = None) -> Tensor:
        """Compress one round's gradients into a message.

        Parameters
        ----------
        grads
            Tensors by name: of any shape; float32, float16, bfloat16 or float64; all on one
            device. Their order does not matter. A name keeps its shape and dtype for good.
        peer
            The receiver's `Receiver.digest` for the same names. Where it differs from what this
            sender looks back at, the tensor is sent in full.

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
            digest for these tensors. The sender's state is as it was.
        """
        return self.encode(grads, peer)[0]

    def encode(
        self, grads: Mapping[str, Tensor], peer: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Decoded]]:
        """Do `compress`, and return the message and what receivers will make of it.

        The decoded tensors, by name, may share memory with `grads`; adding them up with `add_to`
        gives the bits of `Receiver.accumulate`. For a worker that needs the average itself, and
        would otherwise decode its own message.
        """
        names = _sorted_names(grads)
        tensors = []
        for name in names:
            check_gradient(grads[name], name)
            tensors.append(grads[name].detach())
        for name, tensor in zip(names, tensors, strict=True):
            if tensor.device != tensors[0].device:
                raise ValueError(
                    f"the gradient {name!r} is on {tensor.device} and {names[0]!r} on "
                    f"{tensors[0].device}: a message's gradients share a device"
                )
            self._check_known(name, tensor)
        known = [self._tensors.get(name) for name in names]
        states = [self._state(*pair) for pair in zip(names, known, tensors, strict=True)]
        identifiers = [entry["id"] if entry else 0 for entry in known]
        held = [entry["held"] if entry and self.compact else {} for entry in known]
        if peer is not None:
            for i, identifier in enumerate(_from_digest(peer, len(names))):
                if identifier != identifiers[i]:
                    states[i] = self.compressor.forget(states[i])
                    identifiers[i] = 0
                    held[i] = {}

        encodings = self.compressor.encode_batch(tensors, states)
        kinds = [encoding.head[0] for encoding in encodings]
        used = [i if kind & Kind.USES else 0 for i, kind in zip(identifiers, kinds, strict=True)]
        new = secrets.randbits(64) or 1
        bodies = [None if e.body is None else e.body() for e in encodings]
        layout = _layout(self._layouts, self.compressor, dict(zip(names, tensors, strict=True)))
        heads = [encoding.head for encoding in encodings]
        message = Message(layout, look_back_check(used), new, heads, bodies)
        packed = message.pack(tensors[0].device)

        for i, name in enumerate(names):
            state: dict[str, Any] = {"state": encodings[i].state}
            if self.compact:
                if kinds[i] & Kind.SETS:
                    held[i] = self.compressor.read(heads[i], bodies[i], held[i], tensors[i])[1]
                state = {"own": self.compressor.own_state(encodings[i].state), "held": held[i]}
            self._tensors[name] = {
                "id": new if kinds[i] & Kind.SETS else identifiers[i],
                "shape": tuple(tensors[i].shape),
                "dtype": str(tensors[i].dtype),
                **state,
            }
        self._report = {
            name: TensorReport(
                recycled=recycles(kind),
                phase_error=encoding.phase_error,
                bytes=size,
            )
            for name, kind, encoding, size in zip(
                names, kinds, encodings, message.sizes(), strict=True
            )
        }
        return packed, dict(zip(names, (e.decoded for e in encodings), strict=True))

    def report(self) -> dict[str, TensorReport]:
        """Return what became of each tensor of the last message; empty before the first."""
        return dict(self._report)

    def reset(self) -> None:
        """Forget all look-back gradients: the next message is full. Residuals stay."""
        for entry in self._tensors.values():
            mine = "own" if self.compact else "state"
            entry[mine] = self.compressor.forget(entry[mine])
            entry["id"] = 0
            if self.compact:
                entry["held"] = {}

    def state_dict(self) -> dict[str, Any]:
        """Return the state as a nested dict of tensors and numbers, which shares their memory.

        It survives `torch.save` and ``torch.load(weights_only=True)``.
        """
        return {
            "format": FORMAT,
            "compressor": repr(self.compressor),
            "seed": self.seed,
            "tensors": {name: dict(entry) for name, entry in self._tensors.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace the state by one that `state_dict` returned.

        Raises
        ------
        ValueError
            If it is that of another compressor, of a compact sender where this is none (or the
            other way round), or no such state. The state is as it was.
        """
        _check_state(state, self.compressor, ("seed", "tensors"))
        parts = {"own", "held"} if self.compact else {"state"}
        for name, entry in state["tensors"].items():
            if not isinstance(entry, Mapping) or set(entry) != {"id", "shape", "dtype", *parts}:
                raise ValueError(
                    f"the state of tensor {name!r} is not that of a Sender with "
                    f"compact={self.compact}"
                )
        self.seed = state["seed"]
        self._tensors = {name: dict(entry) for name, entry in state["tensors"].items()}
        self._layouts = {}
        self._report = {}

    def _state(self, name: str, entry: dict[str, Any] | None, like: Tensor) -> State:
        """Return a tensor's state as the compressor wants it."""
        if entry is None:
            return self.compressor.initial_state(self._seed(name))
        if not self.compact:
            state: State = entry["state"]
            return state
        return self.compressor.sender_state(entry["own"], entry["held"], like)

    def _seed(self, name: str) -> int:
        # Tensors of one worker must not share their randomness.
        return int.from_bytes(
            hashlib.blake2b(f"{self.seed} {name}".encode(), digest_size=7).digest(), "little"
        )

    def _check_known(self, name: str, tensor: Tensor) -> None:
        entry = self._tensors.get(name)
        if entry is None:
            return
        found, expected = (tuple(tensor.shape), str(tensor.dtype)), (entry["shape"], entry["dtype"])
        if found != expected:
            raise ValueError(
                f"the gradient {name!r} has shape and dtype {found}, before it had {expected}: "
                "use a new Sender for another model"
            )


class Receiver:
    """The server's end, or another rank's: turns the messages of many senders into gradients.

    It holds, for every sender, what that sender's messages look back at: for `LBGM` the payloads
    that carried the look-back gradients, as compressed as they came.

    Parameters
    ----------
    compressor
        What both ends use.
    like
        Tensors with the names, shapes, dtypes and the device of the gradients, for example the
        model's parameters; their values do not matter and they are not kept.

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
        _check_compressor(compressor)
        self.compressor = compressor
        self._like: dict[str, Tensor] = {}
        for name in _sorted_names(like):
            check_gradient(like[name], name)
            # One element stands for all, so that nothing of the tensor's size is kept.
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
            Who sent it, as the transport knows; never taken from the message.
        message
            Flat uint8, as `Sender.compress` returned it.
        names
            The tensors in the message; all of them unless given.
        check
            Called with the decoded tensors: what it raises refuses the message.

        Returns
        -------
        dict
            The decoded tensors by name, dense, with the shapes, dtypes and device of `like`.

        Raises
        ------
        PayloadError
            If the bytes are not a message for these tensors. The receiver's state is as it was.
        OutOfSyncError
            If the message recycles a look-back gradient that this receiver does not hold. The
            receiver's state is as it was.
        """
        decoded, states = self._read(sender_id, message, names)
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
        """Add `weight` times the decoded tensors to those of `into`, in place.

        `into` holds a tensor of the right shape for each name, on the device of `like`; the sum is
        taken in its dtype. Parameters and errors are otherwise those of `decompress`; when an
        error is raised, `into` is unchanged. A sparse payload costs O(k).
        """
        names = self._names(names)
        for name in names:
            if name not in into:
                raise ValueError(f"there is no tensor {name!r} to add to")
            if into[name].shape != self._like[name].shape:
                raise ValueError(
                    f"the tensor {name!r} to add to has shape {tuple(into[name].shape)}, "
                    f"expected {tuple(self._like[name].shape)}"
                )
        decoded, states = self._read(sender_id, message, names)
        for name, tensor in decoded.items():
            tensor.add_to(into[name], weight)
        self._commit(sender_id, states)

    def finish(self, mean: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return what the compressor makes of the average over all senders."""
        return {name: self.compressor.finish(tensor) for name, tensor in mean.items()}

    def digest(self, sender_id: int | str, names: Iterable[str] | None = None) -> Tensor:
        """Say what this receiver holds of a sender, tensor by tensor.

        Returns
        -------
        Tensor
            Flat uint8 on the CPU, eight bytes for each name in sorted order: the identifier of the
            look-back gradient, or zeros. For `Sender.compress`.
        """
        held = self._senders.get(sender_id, {})
        identifiers = [held[name]["id"] if name in held else 0 for name in self._names(names)]
        data = struct.pack(f"<{len(identifiers)}Q", *identifiers)
        return torch.frombuffer(bytearray(data), dtype=torch.uint8)

    def report(
        self, message: Tensor, names: Iterable[str] | None = None
    ) -> dict[str, TensorReport]:
        """Say what a message holds of each tensor, without decoding it.

        Of `TensorReport`, the phase errors are None: they do not travel.

        Raises
        ------
        PayloadError
            If the bytes are not a message for these tensors.
        """
        names = self._names(names)
        parts = self._unpack(message, names)
        return {
            name: TensorReport(recycles(head[0]), None, size)
            for name, head, size in zip(names, parts.heads, parts.sizes(), strict=True)
        }

    def held_bytes(self, sender_id: int | str) -> int:
        """Return how many bytes of tensors this receiver holds of a sender."""
        entries = self._senders.get(sender_id, {}).values()
        return sum(_tensor_bytes(entry["state"]) for entry in entries)

    def head_size(self, names: Iterable[str] | None = None) -> int:
        """Return the size in bytes of the fixed-size head of a message for these tensors."""
        sizes = (self.compressor.head_size(self._like[name]) for name in self._names(names))
        return HEADER_SIZE + sum(sizes)

    def senders(self) -> list[int | str]:
        """Return the ids of the senders of whom this receiver holds something."""
        return list(self._senders)

    def drop(self, sender_id: int | str) -> None:
        """Forget a sender, known or not."""
        self._senders.pop(sender_id, None)

    def state_dict(self) -> dict[str, Any]:
        """Return the state as a nested dict of tensors and numbers, which shares their memory.

        It survives `torch.save` and ``torch.load(weights_only=True)``.
        """
        senders = {
            sender_id: {name: dict(entry) for name, entry in tensors.items()}
            for sender_id, tensors in self._senders.items()
        }
        return {"format": FORMAT, "compressor": repr(self.compressor), "senders": senders}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace the state by one that `state_dict` returned.

        Raises
        ------
        ValueError
            If it is that of another compressor, of other tensors, or no such state. The state is
            as it was.
        """
        _check_state(state, self.compressor, ("senders",))
        for sender_id, tensors in state["senders"].items():
            for name, entry in tensors.items():
                if name not in self._like:
                    raise ValueError(
                        f"the state of sender {sender_id!r} has a tensor {name!r}, "
                        "which this receiver does not know"
                    )
                if not isinstance(entry, Mapping) or set(entry) != {"id", "state"}:
                    raise ValueError(f"the state of tensor {name!r} is not that of a Receiver")
        self._senders = {
            sender_id: {name: dict(entry) for name, entry in tensors.items()}
            for sender_id, tensors in state["senders"].items()
        }

    def _names(self, names: Iterable[str] | None) -> list[str]:
        if names is None:
            return list(self._like)
        chosen = sorted(set(names))
        for name in chosen:
            if name not in self._like:
                raise ValueError(f"this receiver knows no tensor {name!r}")
        return chosen

    def _read(
        self, sender_id: int | str, message: Tensor, names: Iterable[str] | None
    ) -> tuple[dict[str, Decoded], dict[str, dict[str, Any]]]:
        """Decode a message and return the tensors and what the sender's state becomes."""
        if not isinstance(sender_id, (int, str)):
            raise TypeError(f"a sender's id is an int or a str, not {type(sender_id).__name__}")
        names = self._names(names)
        likes = {name: self._like[name] for name in names}
        parts = self._unpack(message, names)

        held = self._senders.get(sender_id, {})
        used = []
        for name, head in zip(names, parts.heads, strict=True):
            if head[0] & Kind.USES and name not in held:
                raise OutOfSyncError(
                    f"the message of sender {sender_id!r} recycles a look-back gradient of "
                    f"{name!r}, and this receiver holds none: send in full (Sender.reset, or "
                    "Sender.compress with this receiver's digest)"
                )
            used.append(held[name]["id"] if head[0] & Kind.USES else 0)
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
            if head[0] & Kind.SETS:
                states[name] = {"id": parts.identifier, "state": state}
        return decoded, states

    def _unpack(self, message: Tensor, names: list[str]) -> Message:
        """Take a message apart."""
        if not isinstance(message, Tensor) or message.dtype != torch.uint8 or message.dim() != 1:
            raise TypeError("a message is a flat uint8 tensor")
        likes = {name: self._like[name] for name in names}
        sizes = [self.compressor.head_size(like) for like in likes.values()]
        layout = _layout(self._layouts, self.compressor, likes)
        return Message.unpack(message.contiguous(), layout, sizes)

    def _commit(self, sender_id: int | str, states: dict[str, dict[str, Any]]) -> None:
        if states:
            self._senders.setdefault(sender_id, {}).update(states)


def _tensor_bytes(state: Any) -> int:
    if isinstance(state, Tensor):
        return state.numel() * state.element_size()
    return sum(map(_tensor_bytes, state.values())) if isinstance(state, Mapping) else 0


def _check_compressor(compressor: Compressor) -> None:
    if not isinstance(compressor, Compressor):
        raise TypeError(
            f"expected a compressor such as LBGM(TopK(0.01)), not {type(compressor).__name__}"
        )


def _sorted_names(tensors: Mapping[str, Tensor]) -> list[str]:
    if not tensors:
        raise ValueError("there are no tensors")
    for name in tensors:
        if not isinstance(name, str):
            raise TypeError(f"a tensor's name is a str, not {name!r}")
    return sorted(tensors)


def _layout(
    cache: dict[tuple[str, ...], int], compressor: Compressor, tensors: Mapping[str, Tensor]
) -> int:
    # A name keeps its shape and dtype at each end, so that the names are key enough.
    key = tuple(tensors)
    if key not in cache:
        described = ((name, tensor.shape, tensor.dtype) for name, tensor in tensors.items())
        cache[key] = layout_hash(repr(compressor), described)
    return cache[key]


def _from_digest(digest: Tensor, count: int) -> tuple[int, ...]:
    if digest.dtype != torch.uint8 or digest.numel() != 8 * count:
        raise ValueError(
            f"a digest for {count} tensors has {8 * count} bytes (uint8), not "
            f"{digest.numel()} of {digest.dtype}"
        )
    return struct.unpack(f"<{count}Q", digest.cpu().numpy().tobytes())


def _check_state(state: Mapping[str, Any], compressor: Compressor, keys: tuple[str, ...]) -> None:
    if not isinstance(state, Mapping) or not {"format", "compressor", *keys} <= set(state):
        raise ValueError("this is not a state that state_dict() of this class returned")
    if state["format"] != FORMAT:
        raise ValueError(f"the state has format {state['format']}, this release reads {FORMAT}")
    if state["compressor"] != repr(compressor):
        raise ValueError(
            f"the state is that of {state['compressor']}, and this end uses {compressor!r}"
        )
