"""The client's end of the downlink: rebuilds the model of a message before the app sees it."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, Message, RecordDict

from lbgm_compress.adapters.flower.checksum import CHECKSUM_SIZE, Checksum
from lbgm_compress.adapters.flower.models import Models
from lbgm_compress.adapters.flower.reply import NDArray
from lbgm_compress.adapters.flower.request import KEY, Request
from lbgm_compress.adapters.flower.update import PackedUpdate
from lbgm_compress.endpoints.downlink import Chain, Subscriber
from lbgm_compress.wire.errors import OutOfSyncError

__all__ = ["receive_model"]

logger = logging.getLogger("flwr")


def receive_model(msg: Message, request: Request, models: Models) -> bytes:
    """Put the model itself in the place of the update in a message, and keep it.

    Parameters
    ----------
    msg
        A message with one ArrayRecord, which holds an update.
    request
        The request in it. It names the compressor of the downlink.
    models
        The models that the clients of this machine hold.

    Returns
    -------
    bytes
        The claim for the reply; empty if the model could not be kept.

    Raises
    ------
    ValueError
        If the update cannot be decoded, also because no version that it begins with is held.
    """
    [(key, record)] = msg.content.array_records.items()
    if list(record) != [KEY]:
        raise ValueError("the server's arrays are not a compressed model")
    packed = PackedUpdate.unpack(record[KEY])
    assert request.downlink is not None
    subscriber = Subscriber(request.downlink, first=request.first)
    names, sums, is_new = _bring(subscriber, packed, models)
    if is_new:
        sums = Checksum.of(subscriber.model).sums
        state = {**subscriber.state_dict(), "names": names, "sums": sums.hex()}
        try:
            models.write(subscriber.version, state)
        except OSError as error:
            logger.warning("compression_mod: the model cannot be kept: %s", error)
            sums = b""
    msg.content = RecordDict({**msg.content, key: _record(subscriber, packed.exact, names)})
    return subscriber.version + sums if sums else b""


def _bring(
    subscriber: Subscriber, packed: PackedUpdate, models: Models
) -> tuple[Sequence[str], bytes, bool]:
    """Bring a subscriber up to date.

    Returns the names of all arrays, the sums of the checksum if the version is kept already, and
    whether it must be kept.
    """
    update = packed.update
    versions = update.versions()
    for version in reversed(versions):
        state = models.read(version)
        held = None if state is None else _held(subscriber, state)
        if held is None:
            continue
        names, sums = held
        if version == versions[-1]:
            return names, sums, False
        subscriber.apply(update)
        return names, b"", True
    if isinstance(update, Chain):
        raise OutOfSyncError("this client does not hold a version that the model begins with")
    assert packed.names is not None
    subscriber.apply(update)
    return packed.names, b"", True


def _held(subscriber: Subscriber, state: Mapping[str, Any]) -> tuple[tuple[str, ...], bytes] | None:
    """Load what was kept of a version; return names and sums, or None if it is of no use."""
    try:
        names, sums = tuple(map(str, state["names"])), bytes.fromhex(state["sums"])
        if len(sums) != CHECKSUM_SIZE:
            raise ValueError("it has no checksum")
        subscriber.load_state_dict(state)
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        logger.warning("compression_mod: a kept model is not used: %s", error)
        return None
    return names, sums


def _record(subscriber: Subscriber, exact: Sequence[NDArray], names: Sequence[str]) -> ArrayRecord:
    """Return the arrays in the order in which the server has them."""
    rest = [name for name in names if name not in subscriber.model]
    if len(rest) != len(exact) or not subscriber.model.keys() <= set(names):
        raise ValueError(f"the server sends {len(exact)} arrays exactly, expected {len(rest)}")
    others = dict(zip(rest, exact, strict=True))
    return ArrayRecord(
        {
            name: Array(np.asarray(others[name] if name in others else subscriber.model[name]))
            for name in names
        }
    )
