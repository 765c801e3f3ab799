"""The client's end: a mod that compresses the updates of any ClientApp."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Error, Message, RecordDict
from flwr.common.constant import ErrorCode
from torch import Tensor

from lbgm_compress.adapters.flower.archive import pack_state, unpack_state, write_state
from lbgm_compress.adapters.flower.client_states import layout_of
from lbgm_compress.adapters.flower.update import (
    ADDED,
    KEY,
    NDArray,
    Reply,
    Request,
    compressible,
    default_parts,
    excluded,
    updates,
)
from lbgm_compress.endpoints import Sender
from lbgm_compress.wire.errors import PayloadError

__all__ = ["CompressionMod", "compression_mod"]

ClientAppCallable = Callable[[Message, Context], Message]
logger = logging.getLogger("flwr")


class CompressionMod:
    """A Flower mod that sends compressed updates, as `CompressedStrategy` asks for.

    Put it first into the list of mods: what the others make of the parameters, clipping and noise
    for example, is then what is compressed. Messages that do not come from a `CompressedStrategy`
    pass through unchanged, and so do evaluation and queries.

    Between rounds it keeps a `lbgm_compress.Sender`'s compact state: the compressed look-back
    gradients, and a residual of the model's size for each `ErrorFeedback`. By default it is in
    ``context.state``, where Flower keeps it for the run, and moves it through its messages inside
    the client in every round. What a lost reply carried is lost, residual included, as it would be
    without compression.

    Parameters
    ----------
    state_dir
        A folder for the state instead, made if it does not exist: one file for each training and
        node. It is for large states, and survives a restart of the client where its node id does:
        in deployment, that of a SuperNode with an authentication key. It may hold clients of
        several nodes; files of trainings that are over may be deleted.

    Notes
    -----
    A reply is an error (``MOD_FAILED_PRECONDITION``), and the state stays as it was, if the app
    returns other than one ArrayRecord with the names and shapes that it received.
    """

    def __init__(self, state_dir: str | os.PathLike[str] | None = None) -> None:
        self.state_dir = None if state_dir is None else Path(state_dir)

    def __call__(self, msg: Message, ctxt: Context, call_next: ClientAppCallable) -> Message:
        """Run the app, and compress what it replies."""
        asked = _take_request(msg)
        if asked is None:
            return call_next(msg, ctxt)
        try:
            request = Request.unpack(asked)
            [received] = _one_record(msg, "message").values()
            # The app may empty the record that it is given.
            sent = _arrays(dict(received))
            outside = excluded(sent, request.exclude)
            defaults = default_parts(sent, outside)
        except ValueError as error:
            return _failed(error, msg)
        reply = call_next(msg, ctxt)
        if reply.has_error():
            return reply
        try:
            [(key, record)] = _one_record(reply, "reply").items()
            new = _arrays(dict(record))
            parts, changes = updates(sent, new, outside)
            sender = self._sender(request, ctxt, changes)
            message = None
            if changes:
                peer = _digest(request, compressible(parts, outside), changes)
                try:
                    message = sender.compress(changes, peer)
                except PayloadError as error:
                    sender = self._fresh(request, ctxt)
                    logger.warning("compression_mod: the kept state is not used: %s", error)
                    message = sender.compress(changes, peer)
        except ValueError as error:
            return _failed(error, msg)
        exact = {name: new[name] for name, part in parts.items() if part.exact}
        reply.content[key] = ArrayRecord({KEY: Reply(parts, exact, message).pack(defaults)})
        self._keep(request, ctxt, sender)
        return reply

    def _sender(self, request: Request, ctxt: Context, changes: Mapping[str, Tensor]) -> Sender:
        """Return the sender of this training as the last round left it, or a new one."""
        sender = self._fresh(request, ctxt)
        data = self._kept(request, ctxt)
        if data is None:
            return sender
        try:
            state = unpack_state(data)
            for name, entry in state["tensors"].items():
                like = changes.get(name)
                if like is not None and (entry["shape"], entry["dtype"]) != (
                    tuple(like.shape),
                    str(like.dtype),
                ):
                    raise ValueError(f"the array {name!r} has another shape or dtype")
            sender.load_state_dict(state)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            logger.warning("compression_mod: the kept state is not used: %s", error)
        return sender

    def _fresh(self, request: Request, ctxt: Context) -> Sender:
        # Draws that are to be the same in a second run must not depend on a random node id.
        seed = ctxt.node_config.get("partition-id", ctxt.node_id)
        seed = seed if isinstance(seed, int) else ctxt.node_id
        return Sender(request.compressor, seed=seed, compact=True)

    def _kept(self, request: Request, ctxt: Context) -> bytes | None:
        if self.state_dir is not None:
            try:
                return self._file(request, ctxt).read_bytes()
            except FileNotFoundError:
                return None
        record = ctxt.state.get(KEY)
        if not isinstance(record, ConfigRecord) or record.get("training") != request.training:
            return None
        state = record.get("state")
        return state if isinstance(state, bytes) else None

    def _keep(self, request: Request, ctxt: Context, sender: Sender) -> None:
        state = sender.state_dict()
        if self.state_dir is not None:
            self.state_dir.mkdir(parents=True, exist_ok=True)
            write_state(self._file(request, ctxt), state)
            return
        data = pack_state(state)
        ctxt.state[KEY] = ConfigRecord({"training": request.training, "state": data})

    def _file(self, request: Request, ctxt: Context) -> Path:
        assert self.state_dir is not None
        # The name is the server's word: nothing in it may leave the folder.
        training = "".join(c for c in request.training if c.isalnum())[:64]
        return self.state_dir / f"{training}-{ctxt.node_id}.safetensors"


compression_mod = CompressionMod()
"""The mod with its defaults: ``ClientApp(mods=[compression_mod])``."""


def _digest(request: Request, likes: Mapping[str, Tensor], changes: Mapping[str, Tensor]) -> Tensor:
    """Return the part of a digest that is about the arrays of this round.

    One for other arrays says that the server holds nothing of these.
    """
    digest = request.digest
    if layout_of(likes)[1] != request.layout or len(digest) != 8 * len(likes):
        digest = bytes(8 * len(likes))
    entries = np.frombuffer(digest, dtype=np.uint8).reshape(-1, 8)
    chosen = entries[[name in changes for name in likes]]
    return torch.from_numpy(chosen.reshape(-1))


def _take_request(msg: Message) -> Any:
    """Remove the server's request from a message, and return it, or None if there is none."""
    if msg.metadata.message_type.split(".")[0] != "train" or not msg.has_content():
        return None
    for key, record in msg.content.config_records.items():
        if ADDED in record:
            content = {name: other for name, other in msg.content.items() if name != key}
            msg.content = RecordDict(content)
            return record[ADDED]
        if KEY in record:
            rest = ConfigRecord({name: value for name, value in record.items() if name != KEY})
            msg.content = RecordDict({**msg.content, key: rest})
            return record[KEY]
    return None


def _one_record(msg: Message, what: str) -> Mapping[str, ArrayRecord]:
    records = msg.content.array_records
    if len(records) != 1:
        raise ValueError(f"compression needs one ArrayRecord in the {what}, not {len(records)}")
    return records


def _arrays(record: Mapping[str, Any]) -> dict[str, NDArray]:
    try:
        return {name: np.asarray(array.numpy()) for name, array in record.items()}
    except TypeError as error:
        raise ValueError(f"compression needs numpy arrays: {error}") from None


def _failed(error: ValueError, msg: Message) -> Message:
    reason = f"compression_mod: {error}"
    logger.error(reason)
    return Message(Error(ErrorCode.MOD_FAILED_PRECONDITION, reason), reply_to=msg)
