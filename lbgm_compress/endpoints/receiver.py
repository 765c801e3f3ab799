"""The end of a server or of another rank."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lbgm_compress._util.collection import paused_collection
from lbgm_compress._util.ends import (
    STATE_FORMAT,
    check_entry,
    check_state,
    check_targets,
    copied,
    packed_identifiers,
    sorted_names,
    tensor_bytes,
)
from lbgm_compress.compressor import (
    Compressor,
    State,
    check_compressor,
    check_gradient,
    owned,
)
from lbgm_compress.decoded import Decoded, add_all
from lbgm_compress.endpoints.tensors import TensorReport, layout_of
from lbgm_compress.wire.errors import OutOfSyncError, PayloadError
from lbgm_compress.wire.message import HEADER_SIZE, Kind, Message, look_back_check, recycles

__all__ = ["Receiver"]

# Operations on members of an enumeration are slow.
RAW, USES, SETS = int(Kind.RAW), int(Kind.USES), int(Kind.SETS)


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
        shared: dict[Any, Tensor] = {}
        for name in sorted_names(like):
            check_gradient(like[name], name)
            shape, dtype, device = like[name].shape, like[name].dtype, like[name].device
            # An expanded element has the shape, and takes no memory of the tensor's size.
            element = torch.empty((), dtype=dtype, device=device).expand(shape)
            self._like[name] = shared.setdefault((shape, dtype, device), element)
        self._layouts: dict[tuple[str, ...], int] = {}
        self._senders: dict[int | str, dict[str, dict[str, Any]]] = {}
        # The entries that a step has replaced.
        self._before: dict[tuple[int | str, str], dict[str, Any] | None] | None = None

    @paused_collection()
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
        decoded, states, _ = self._read(sender_id, message, self._likes(names))
        tensors = {name: owned(tensor, message) for name, tensor in decoded.items()}
        if check is not None:
            check(tensors)
        self._commit(sender_id, states)
        return tensors

    @paused_collection()
    def accumulate(
        self,
        sender_id: int | str,
        message: Tensor,
        into: Mapping[str, Tensor],
        weight: float,
        names: Iterable[str] | None = None,
    ) -> list[str]:
        """Add `weight` times the decoded tensors to the tensors of `into`, in place.

        `into` has a tensor for each name, of the shape and on the device of `like`; the sum is
        taken in that tensor's dtype. A sparse payload of k entries costs O(k). The other parameters
        and the errors are those of `decompress`, and `ValueError` if a tensor of `into` is missing
        or has another shape. After any error `into` is unchanged.

        Returns
        -------
        list
            The names of tensors that came uncompressed, as one with inf or nan does.
        """
        likes = self._likes(names)
        check_targets(into, likes)
        decoded, states, uncompressed = self._read(sender_id, message, likes)
        add_all(list(decoded.values()), [into[name] for name in decoded], weight)
        self._commit(sender_id, states)
        return uncompressed

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
        return packed_identifiers(identifiers)

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

    def names(self) -> list[str]:
        """Return the names of the tensors that this receiver knows, sorted."""
        return list(self._like)

    def senders(self) -> list[int | str]:
        """Return the ids of the senders of which this receiver holds look-back gradients."""
        return list(self._senders)

    def drop(self, sender_id: int | str, names: Iterable[str] | None = None) -> None:
        """Drop the state of a sender, which may be unknown; its next message must be full.

        Parameters
        ----------
        sender_id
            The sender.
        names
            Names of tensors; all of them unless given.
        """
        if names is None:
            self._senders.pop(sender_id, None)
        for name in names or ():
            self._senders.get(sender_id, {}).pop(name, None)
        self._before = None

    def begin_step(self) -> None:
        """Begin a step of messages of any senders, to which `undo` returns.

        Until `commit` or the next step, states that messages of the step have replaced are kept.
        """
        self._before = {}

    def undo(self) -> None:
        """Return to the state before the step; do nothing without `begin_step`."""
        for (sender_id, name), entry in (self._before or {}).items():
            if entry is None:
                del self._senders[sender_id][name]
                if not self._senders[sender_id]:
                    del self._senders[sender_id]
            else:
                self._senders[sender_id][name] = entry
        self._before = None

    def commit(self) -> None:
        """Keep the step: what `undo` needs is freed."""
        self._before = None

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
        self._before = None

    def _likes(self, names: Iterable[str] | None) -> dict[str, Tensor]:
        """Return the tensors with these names, sorted; all of them for None."""
        chosen = self._like if names is None else sorted(set(names))
        for name in chosen:
            if name not in self._like:
                raise ValueError(f"this receiver knows no tensor {name!r}")
        return {name: self._like[name] for name in chosen}

    def _read(
        self, sender_id: int | str, message: Tensor, likes: Mapping[str, Tensor]
    ) -> tuple[dict[str, Decoded], dict[str, dict[str, Any]], list[str]]:
        """Return the tensors of a message, the states that it sets, and uncompressed names."""
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

        states = [held[name]["state"] if name in held else {} for name in likes]
        found = self._decode(parts, states, likes)
        decoded = {name: tensor for name, (tensor, _) in zip(likes, found, strict=True)}
        new = {
            name: {"id": parts.identifier, "state": state}
            for name, head, (_, state) in zip(likes, parts.heads, found, strict=True)
            if head[0] & SETS
        }
        uncompressed = [n for n, head in zip(likes, parts.heads, strict=True) if head[0] & RAW]
        return decoded, new, uncompressed

    def _decode(
        self, parts: Message, states: Sequence[State], likes: Mapping[str, Tensor]
    ) -> list[tuple[Decoded, State]]:
        """Decode all payloads of a message; an error names the tensor."""
        read = self.compressor.read
        payloads = parts.heads, parts.bodies, states
        try:
            return self.compressor.read_batch(*payloads, list(likes.values()))
        except PayloadError:
            for payload, (name, like) in zip(
                zip(*payloads, strict=True), likes.items(), strict=True
            ):
                try:
                    read(*payload, like)
                except PayloadError as error:
                    raise type(error)(f"tensor {name!r}: {error}") from None
            raise

    def _unpack(self, message: Tensor, likes: Mapping[str, Tensor]) -> Message:
        if not isinstance(message, Tensor) or message.dtype != torch.uint8 or message.dim() != 1:
            raise TypeError("a message is a flat uint8 tensor")
        sizes = [self.compressor.head_size(like) for like in likes.values()]
        layout = layout_of(self._layouts, self.compressor, likes)
        return Message.unpack(message.contiguous(), layout, sizes)

    def _commit(self, sender_id: int | str, states: dict[str, dict[str, Any]]) -> None:
        if not states:
            return
        held = self._senders.setdefault(sender_id, {})
        if self._before is not None:
            for name in states:
                self._before.setdefault((sender_id, name), held.get(name))
        held.update(states)
