"""The end of a worker."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lbgm_compress._util.checks import check_whole
from lbgm_compress._util.ends import (
    STATE_FORMAT,
    check_entry,
    check_state,
    check_unchanged,
    copied,
    identifiers_of,
    packed_identifiers,
    sorted_names,
)
from lbgm_compress.compressor import (
    Compressor,
    Encoding,
    State,
    check_compressor,
    check_gradient,
)
from lbgm_compress.decoded import Decoded
from lbgm_compress.endpoints.tensors import TensorReport, layout_of
from lbgm_compress.wire.message import Kind, Message, look_back_check, recycles

__all__ = ["Sender"]

# Operations on members of an enumeration are slow.
RAW, USES, SETS = int(Kind.RAW), int(Kind.USES), int(Kind.SETS)


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
        # Entries are replaced and never changed, so that the ones before a step can be kept.
        self._tensors: dict[str, dict[str, Any]] = {}
        self._before: dict[str, dict[str, Any] | None] | None = None
        self._layouts: dict[tuple[str, ...], int] = {}
        self._report: dict[str, TensorReport] = {}
        self._uncompressed: list[str] = []

    def compress(
        self, grads: Mapping[str, Tensor], peer: Tensor | None = None, *, loss_scale: float = 1.0
    ) -> Tensor:
        """Compress the gradients of one round into a message.

        Parameters
        ----------
        grads
            Tensors by name: of any shape; float32, float16, bfloat16 or float64; all on one
            device. Their order does not matter. A name must keep its shape and dtype.
        peer
            The receiver's `Receiver.digest` for the same names. A tensor for which the receiver
            holds another look-back gradient than this sender is sent in full.
        loss_scale
            The factor by which the loss was multiplied, and with it these gradients. If it changes,
            residuals and `NormBudget` follow.

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
        return self.encode(grads, peer, loss_scale=loss_scale)[0]

    def encode(
        self, grads: Mapping[str, Tensor], peer: Tensor | None = None, *, loss_scale: float = 1.0
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
        parts = self._parts(grads, loss_scale)
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
        layout = layout_of(self._layouts, self.compressor, tensors)
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
            entries[part.name] = self._entry(part, encoding, body, loss_scale)
            report[part.name] = TensorReport(recycles(kind), encoding.phase_error, size)
            decoded[part.name] = encoding.decoded
        self._uncompressed = [
            part.name
            for part, encoding in zip(parts, encodings, strict=True)
            if encoding.head[0] & RAW
        ]
        self._replace(entries)
        self._report = report
        return packed, decoded

    def _parts(self, grads: Mapping[str, Tensor], loss_scale: float) -> list[_Part]:
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
                part = _Part(name, grad, state, 0, {}, 1.0)
            else:
                check_unchanged(name, grad, entry)
                state = self._state(entry, grad)
                held = entry.get("held", {})
                part = _Part(name, grad, state, entry["id"], held, entry["scale"])
            if part.scale != loss_scale:
                part.state = self.compressor.rescale(part.state, loss_scale / part.scale)
            parts.append(part)
        return parts

    def _entry(
        self, part: _Part, encoding: Encoding, body: Tensor | None, loss_scale: float
    ) -> dict[str, Any]:
        """Return what is kept of a tensor until the next round."""
        shape, dtype = tuple(part.grad.shape), str(part.grad.dtype)
        entry = {"id": part.identifier, "shape": shape, "dtype": dtype, "scale": loss_scale}
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

    def uncompressed(self) -> list[str]:
        """Return the names of tensors in the last message that went as they are.

        A tensor with inf or nan is sent so, and one that would leave the range of its dtype.
        """
        return list(self._uncompressed)

    # --- steps that are not applied ---------------------------------------------------------------

    def begin_step(self) -> None:
        """Begin a step of one or more messages, to which `undo` returns.

        The state before the step is kept until `commit` or the next step: of each tensor that is
        sent, the residual and a look-back gradient that is replaced.
        """
        self._before = {}

    def undo(self) -> None:
        """Return to the state before the step, bit for bit; do nothing without `begin_step`.

        The receiver has to do the same, or to be sent in full (`reset`).
        """
        for name, entry in (self._before or {}).items():
            if entry is None:
                del self._tensors[name]
            else:
                self._tensors[name] = entry
        self._before = None

    def commit(self) -> None:
        """Keep the step: what `undo` needs is freed."""
        self._before = None

    def give_back(self, decoded: Mapping[str, Tensor]) -> None:
        """Add tensors to the residuals: what a message carried that was never applied.

        Do nothing for a compressor without a residual. An undone step needs no more than `undo`:
        this is for a message of which a worker learns later that it was lost or not used.

        Parameters
        ----------
        decoded
            The decoded tensors of the message by name, all or some, with the shapes and dtypes of
            the gradients.

        Raises
        ------
        ValueError
            If a tensor has another shape or dtype than its gradients. Nothing is changed.
        """
        if not self.compressor.has_residual:
            return
        entries = {}
        for name, tensor in decoded.items():
            entry = self._tensors.get(name)
            if entry is None:
                shape, dtype = tuple(tensor.shape), str(tensor.dtype)
                state = self.compressor.initial_state(self._seed(name))
                entry = {"id": 0, "shape": shape, "dtype": dtype, "scale": 1.0}
                entry |= {"own": state, "held": {}} if self.compact else {"state": state}
            check_unchanged(name, tensor, entry)
            mine = "own" if self.compact else "state"
            entries[name] = {**entry, mine: self.compressor.give_back(entry[mine], tensor)}
        self._replace(entries)

    def _replace(self, entries: Mapping[str, dict[str, Any]]) -> None:
        if self._before is not None:
            for name in entries:
                self._before.setdefault(name, self._tensors.get(name))
        self._tensors.update(entries)

    # --- what the receiver holds ------------------------------------------------------------------

    def digest(self, names: Iterable[str] | None = None) -> Tensor:
        """Return the identifiers of the look-back gradients that the next message may use.

        Parameters
        ----------
        names
            Names of tensors; all that have been sent unless given.

        Returns
        -------
        Tensor
            Flat uint8 on the CPU: eight bytes for each name in sorted order, zeros where there is
            none. It equals the `Receiver.digest` of a receiver that holds the same.
        """
        chosen = sorted(self._tensors if names is None else set(names))
        return packed_identifiers(
            self._tensors[name]["id"] if name in self._tensors else 0 for name in chosen
        )

    def reset(self, names: Iterable[str] | None = None) -> None:
        """Drop look-back gradients, so that the next message is full; residuals are kept.

        Parameters
        ----------
        names
            Names of tensors; all of them unless given.
        """
        for name in list(self._tensors) if names is None else set(names) & self._tensors.keys():
            entry = {**self._tensors[name], "id": 0}
            mine = "own" if self.compact else "state"
            entry[mine] = self.compressor.forget(entry[mine])
            if self.compact:
                entry["held"] = {}
            self._tensors[name] = entry
        self._before = None

    # --- saved states -----------------------------------------------------------------------------

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
        tensors = {}
        for name, entry in state["tensors"].items():
            owner = f"a Sender with compact={self.compact}"
            # States of releases before loss scales were known have none.
            tensors[name] = {"scale": 1.0, **entry} if isinstance(entry, Mapping) else entry
            check_entry(name, tensors[name], {"id", "shape", "dtype", "scale", *parts}, owner)
        self.seed = state["seed"]
        self._tensors = tensors
        self._before = None
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
    scale: float
    """The loss scale of the last round."""
