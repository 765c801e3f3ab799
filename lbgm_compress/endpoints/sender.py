"""The end of a worker."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from lbgm_compress._util.collection import paused_collection
from lbgm_compress._util.ends import (
    identifiers_of,
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
from lbgm_compress.endpoints.store import Store
from lbgm_compress.endpoints.tensors import Sent, layout_of
from lbgm_compress.wire.message import Kind, Message, look_back_check

__all__ = ["Sender"]

# Operations on members of an enumeration are slow.
RAW, USES, SETS = int(Kind.RAW), int(Kind.USES), int(Kind.SETS)


class Sender(Store[Compressor]):
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

    Attributes
    ----------
    sent
        Statistics of the last message.

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
        super().__init__(compressor, seed)
        self.compact = compact
        self._mine = "own" if compact else "state"
        self._parts = ("own", "held") if compact else ("state",)
        self._owner = f"a Sender with compact={compact}"
        self._layouts: dict[tuple[str, ...], int] = {}

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

    @paused_collection()
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
        names = sorted_names(grads)
        tensors = _checked(names, grads)
        entries = [self._known(*of) for of in zip(names, tensors, strict=True)]
        if peer is not None:
            held = identifiers_of(peer, len(names))
            # Where the receiver holds something else, the tensor is sent in full.
            entries = [
                entry if entry["id"] == identifier else self._forgotten(entry)
                for entry, identifier in zip(entries, held, strict=True)
            ]
        states = [self._state(*of, loss_scale) for of in zip(entries, tensors, strict=True)]
        encodings = self.compressor.encode_batch(tensors, states)

        heads = [encoding.head for encoding in encodings]
        kinds = [head[0] for head in heads]
        bodies = [None if encoding.body is None else encoding.body() for encoding in encodings]
        used = [
            entry["id"] if kind & USES else 0 for entry, kind in zip(entries, kinds, strict=True)
        ]
        layout = layout_of(self._layouts, self.compressor, dict(zip(names, tensors, strict=True)))
        identifier = secrets.randbits(64) or 1
        message = Message(layout, look_back_check(used), identifier, heads, bodies)
        packed = message.pack(tensors[0].device)

        phase_errors = [encoding.phase_error for encoding in encodings]
        new = zip(entries, tensors, encodings, bodies, strict=True)
        self._replace(
            {
                name: self._entry(*of, identifier, loss_scale)
                for name, of in zip(names, new, strict=True)
            }
        )
        self.sent = Sent(names, kinds, phase_errors, message.sizes())
        return packed, {
            name: encoding.decoded for name, encoding in zip(names, encodings, strict=True)
        }

    def _known(self, name: str, grad: Tensor) -> dict[str, Any]:
        entry = super()._known(name, grad)
        return {"held": {}, **entry} if self.compact else entry

    def _state(self, entry: Mapping[str, Any], like: Tensor, loss_scale: float) -> State:
        """Return the compressor's state from what was kept, for gradients of this scale."""
        state: State
        if self.compact:
            state = self.compressor.sender_state(entry["own"], entry["held"], like)
        else:
            state = entry["state"]
        if entry["scale"] == loss_scale:
            return state
        return self.compressor.rescale(state, loss_scale / entry["scale"])

    def _entry(
        self,
        before: Mapping[str, Any],
        grad: Tensor,
        encoding: Encoding,
        body: Tensor | None,
        identifier: int,
        loss_scale: float,
    ) -> dict[str, Any]:
        """Return what is kept of a tensor until the next round."""
        sets = encoding.head[0] & SETS
        entry = {
            "id": identifier if sets else before["id"],
            "shape": before["shape"],
            "dtype": before["dtype"],
            "scale": loss_scale,
        }
        if not self.compact:
            entry["state"] = encoding.state
            return entry
        entry["own"] = self.compressor.own_state(encoding.state)
        entry["held"] = before["held"]
        if sets:
            entry["held"] = self.compressor.read(encoding.head, body, before["held"], grad)[1]
        return entry

    def _forgotten(self, entry: Mapping[str, Any]) -> dict[str, Any]:
        forgotten = super()._forgotten(entry)
        return {**forgotten, "held": {}} if self.compact else forgotten

    def uncompressed(self) -> list[str]:
        """Return the names of tensors in the last message that went as they are.

        A tensor with inf or nan is sent so, and one that would leave the range of its dtype.
        """
        return [
            name for name, kind in zip(self.sent.names, self.sent.kinds, strict=True) if kind & RAW
        ]

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace the state by one that `state_dict` returned.

        Raises
        ------
        ValueError
            If `state` is that of another compressor, of a compact sender where this one is not (or
            the other way round), or no such state. The sender's state is then unchanged.
        """
        super().load_state_dict(state)
        self._layouts = {}


def _checked(names: Sequence[str], grads: Mapping[str, Tensor]) -> list[Tensor]:
    """Return the gradients with these names, or raise an error that names a wrong one."""
    tensors = []
    for name in names:
        grad = grads[name]
        check_gradient(grad, name)
        tensors.append(grad.detach() if grad.requires_grad else grad)
    device = tensors[0].device
    for name, grad in zip(names, tensors, strict=True):
        if grad.device != device:
            raise ValueError(
                f"the gradient {name!r} is on {grad.device} and {names[0]!r} on {device}: a "
                "message's gradients share a device"
            )
    return tensors
