"""The last message of a client, kept until the client learns whether it went into the model.

With error feedback, what a message carries has left the client's residual. If the server throws the
round away, the client takes the tensors back from the message, which it decodes as the server would
have. It therefore keeps the message, and what its receiver held before it if decoding needs that.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lbgm_compress.adapters.flower.request import Request
from lbgm_compress.endpoints import Receiver, Sender
from lbgm_compress.wire.message import Kind

__all__ = ["give_back", "last_message"]

USES, SETS = int(Kind.USES), int(Kind.SETS)


def last_message(
    message: Tensor, before: Mapping[str, Any], sender: Sender, number: int
) -> dict[str, Any]:
    """Return what is kept of a message, as a nested dict of tensors, numbers and strings.

    Parameters
    ----------
    message
        The message that is sent: flat uint8.
    before
        `Sender.state_dict` of the compact sender before the message.
    sender
        The sender after it.
    number
        The number of the round.
    """
    names, kinds = sender.sent.names, sender.sent.kinds
    return {
        "round": number,
        "names": names,
        "message": message,
        # What has not been replaced is in the sender's own state, and what is not used is not
        # needed.
        "held": {
            name: _held(before["tensors"][name])
            for name, kind in zip(names, kinds, strict=True)
            if kind & USES and kind & SETS
        },
    }


def give_back(sender: Sender, last: Mapping[str, Any], request: Request) -> bool:
    """Add the tensors of the last message to the residuals if it did not go into the model.

    Parameters
    ----------
    sender
        The sender as it was after the message.
    last
        What `last_message` returned.
    request
        The server's request, which says what went into the model.

    Returns
    -------
    bool
        True if the message was given back; False if it went into the model, or if the server does
        not know.

    Raises
    ------
    ValueError, KeyError, TypeError, AttributeError, RuntimeError
        If `last` is not what `last_message` returned. The sender is unchanged.
    """
    if request.round is None or last["round"] <= request.applied:
        return False
    entries = sender.state_dict()["tensors"]
    names = list(last["names"])
    likes = {name: _like(entries[name]) for name in names}
    receiver = Receiver(sender.compressor, likes)
    held = {name: last["held"].get(name, _held(entries[name])) for name in names}
    receiver.load_state_dict({**receiver.state_dict(), "senders": {0: held}})
    sender.give_back(receiver.decompress(0, last["message"]))
    return True


def _held(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entry of a receiver that holds what a compact sender does."""
    return {"id": entry["id"], "state": entry["held"]}


def _like(entry: Mapping[str, Any]) -> Tensor:
    dtype = getattr(torch, entry["dtype"].removeprefix("torch."))
    return torch.empty((), dtype=dtype).expand(entry["shape"])
