"""The client's end: a mod that compresses the updates of a ClientApp."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, RecordDict
from flwr.common.constant import ErrorCode
from torch import Tensor

from lbgm_compress.adapters.flower.archive import pack_state, unpack_state, write_state
from lbgm_compress.adapters.flower.claim import OUT_OF_SYNC, add_claim
from lbgm_compress.adapters.flower.client_states import layout_of
from lbgm_compress.adapters.flower.last_message import give_back, last_message
from lbgm_compress.adapters.flower.models import Models
from lbgm_compress.adapters.flower.personal import (
    Personal,
    pack_personal,
    placed,
    take_personal,
    unpack_personal,
)
from lbgm_compress.adapters.flower.receiving import receive_model
from lbgm_compress.adapters.flower.reply import (
    NDArray,
    Reply,
    compressible,
    default_parts,
    matching,
    tensor_of,
    updates,
)
from lbgm_compress.adapters.flower.request import ADDED, KEY, Request
from lbgm_compress.compressors.parse import parse_compressor
from lbgm_compress.endpoints import Sender
from lbgm_compress.wire.errors import PayloadError

__all__ = ["CompressionMod", "compression_mod"]

# Keys of the last message and the personal arrays in a saved state, beside those of the sender.
LAST, PERSONAL = "last", "personal"
ClientAppCallable = Callable[[Message, Context], Message]
logger = logging.getLogger("flwr")


class CompressionMod:
    """A Flower mod that compresses the updates of a client as `CompressedStrategy` asks for.

    Put it first into the list of mods, so that the changes of the others, such as clipping and
    noise, are compressed too. Messages that do not come from a `CompressedStrategy` pass through
    unchanged, and so do queries, and evaluation unless the strategy has a `downlink` or `personal`.

    With a `downlink`, the mod rebuilds the model before the app sees a message. It keeps the model
    in a file that the clients of one machine share, for the last three versions of each training:
    in `state_dir`, or else in a folder of the user's own for temporary files, where trainings that
    have not been used for a week are removed. A client that does not hold a version that a message
    begins with replies with an error, and is sent the whole model the next time.

    Between rounds the mod keeps the compact state of a `lbgm_compress.Sender`: the compressed
    look-back gradients, and a residual of the model's size for each `ErrorFeedback`. By default
    the state is in ``context.state``, which Flower keeps for the run and moves through its messages
    inside the client in every round.

    Personal arrays, which the strategy names, never leave the client. The app sees them among the
    others, and must return them after training; what it returned is kept with the state, and is
    what it sees next. A client that has none, because its state is lost, replies with an error, and
    is sent the server's initial arrays the next time.

    With error feedback, the mod also keeps its last message and, if decoding it needs that, what
    its receiver held before it, both compressed. If the message did not go into the model, because
    the round was thrown away or the reply was lost, late or rejected, the next request says so.
    What the message carried is then added to the residual. The client trusts its server in this.
    What a message carried is lost if the client is never asked again, or asked after more than the
    server's `keep_rounds` rounds, if its own state is lost, or if the server restarts without its
    saved state.

    Parameters
    ----------
    state_dir
        A folder for the state instead, made if it does not exist, with one file for each training
        and node, and for the models of a downlink. It suits large states, and survives a restart of
        the client if its node id does: in deployment, that of a SuperNode with an authentication
        key. Clients of several nodes may share the folder. Files and folders of trainings that are
        over may be deleted.
    compressors
        Classes besides those of `lbgm_compress` that the server's compressor may name: compressors
        of your own, and classes that their constructors take as arguments. The server needs the
        same: ``CompressedStrategy(..., compressors=[...])``. No other class is ever called.

    Raises
    ------
    TypeError, ValueError
        If `compressors` holds something that is not a class, or two classes of one name.

    Notes
    -----
    A reply is an error (``MOD_FAILED_PRECONDITION``), and the state stays as it was, if the app
    returns anything but one ArrayRecord with the names and shapes that it received, or if the
    server asks for a compressor that this client does not know.

    Examples
    --------
    >>> from flwr.clientapp import ClientApp
    >>> from lbgm_compress.adapters.grace import FromGrace
    >>> class TopKCompressor: ...  # one of GRACE's
    >>> app = ClientApp(mods=[CompressionMod(compressors=[FromGrace, TopKCompressor])])
    """

    def __init__(
        self,
        state_dir: str | os.PathLike[str] | None = None,
        *misused: Any,
        compressors: Sequence[type] = (),
    ) -> None:
        if misused:
            # Flower calls what is in its list of mods, and so a class by its constructor.
            raise TypeError(
                "ClientApp(mods=[CompressionMod]) has the class: write CompressionMod(), with "
                "brackets, or compression_mod"
            )
        self.state_dir = None if state_dir is None else Path(state_dir)
        self.compressors = tuple(compressors)
        # Classes that cannot be used are an error here, before the first message.
        parse_compressor("Identity()", self.compressors)

    def __iter__(self) -> Iterator[Any]:
        """Raise `TypeError`: a mod is not a list of mods."""
        raise TypeError("ClientApp takes a list of mods: write ClientApp(mods=[compression_mod])")

    def __add__(self, other: Any) -> Any:
        """Raise `TypeError`: Flower adds a list of mods to what it takes for another one."""
        return iter(self)

    def __call__(self, msg: Message, ctxt: Context, call_next: ClientAppCallable) -> Message:
        """Run the app, and compress the arrays of its reply."""
        asked = _take_request(msg)
        if asked is None:
            return call_next(msg, ctxt)
        claim = b""
        try:
            request = Request.unpack(asked, self.compressors)
            _one_record(msg, "message")
        except ValueError as error:
            return _failed(error, msg)
        try:
            personal = self._personal(msg, ctxt, request)
            if request.downlink is not None:
                claim = receive_model(msg, request, self._models(request))
        except (ValueError, OSError) as error:
            return _failed(error, msg, OUT_OF_SYNC)
        if _kind(msg) == "train":
            reply = self._train(msg, ctxt, call_next, request, personal)
        else:
            _place(msg, personal)
            reply = call_next(msg, ctxt)
        add_claim(reply, claim)
        return reply

    def _train(
        self,
        msg: Message,
        ctxt: Context,
        call_next: ClientAppCallable,
        request: Request,
        personal: Mapping[str, Personal],
    ) -> Message:
        """Let the app train, and compress the arrays of its reply."""
        try:
            [(key, received)] = msg.content.array_records.items()
            # The app may empty the record that it is given.
            sent = _arrays(dict(received))
            excluded = matching(sent, request.exclude)
            defaults = default_parts(sent, excluded)
            sender = None
            if request.residual == "model":
                sender = self._sender(request, ctxt, compressible(defaults, excluded))
                sent = _with_residuals(sent, sender)
                msg.content[key] = ArrayRecord({n: Array(array) for n, array in sent.items()})
        except ValueError as error:
            return _failed(error, msg)
        _place(msg, personal)
        reply = call_next(msg, ctxt)
        if reply.has_error():
            return reply
        try:
            _one_record(reply, "reply")
            positions = {name: one.position for name, one in personal.items()}
            personal = take_personal(reply, positions, "reply")
            [(key, record)] = reply.content.array_records.items()
            new = _arrays(dict(record))
            parts, changes = updates(sent, new, excluded)
            if sender is None or parts != defaults:
                sender = self._sender(request, ctxt, changes)
            message = None
            before = sender.state_dict()
            if changes:
                peer = _digest(request, compressible(parts, excluded), changes)
                try:
                    message = sender.compress(changes, peer)
                except PayloadError as error:
                    sender = self._fresh(request, ctxt)
                    before = sender.state_dict()
                    logger.warning("compression_mod: the kept state is not used: %s", error)
                    message = sender.compress(changes, peer)
        except ValueError as error:
            return _failed(error, msg)
        exact = {name: new[name] for name, part in parts.items() if part.exact}
        reply.content[key] = ArrayRecord({KEY: Reply(parts, exact, message).pack(defaults)})
        state = sender.state_dict()
        if message is not None and request.round is not None and request.compressor.has_residual:
            state[LAST] = last_message(message, before, sender, request.round)
        if personal:
            state[PERSONAL] = pack_personal(personal)
        self._keep(request, ctxt, state)
        return reply

    def _models(self, request: Request) -> Models:
        return Models(request.training, self.state_dir)

    def _personal(self, msg: Message, ctxt: Context, request: Request) -> dict[str, Personal]:
        """Take the personal arrays out of a message; return those that the app is to see.

        Raises
        ------
        ValueError
            If this client has none, and none are in the message.
        """
        if request.personal is None:
            return {}
        found = take_personal(msg, request.personal)
        data = self._kept(request, ctxt)
        if data is not None:
            try:
                kept = unpack_personal(unpack_state(data).get(PERSONAL, {}))
                found = {name: kept.get(name, one) for name, one in found.items()} or kept
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                logger.warning("compression_mod: the kept state is not used: %s", error)
        if not found:
            raise ValueError("this client does not hold its personal arrays")
        return found

    def _sender(self, request: Request, ctxt: Context, changes: Mapping[str, Tensor]) -> Sender:
        """Return the sender of this training as the last round left it, or a new one.

        A last message that did not go into the model has been given back to it.
        """
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
        try:
            if LAST in state and give_back(sender, state[LAST], request):
                logger.info("compression_mod: the last update did not go into the model")
        except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
            logger.warning("compression_mod: the last message is not given back: %s", error)
        return sender

    def _fresh(self, request: Request, ctxt: Context) -> Sender:
        # A node id is random, and draws must be the same in a second run.
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

    def _keep(self, request: Request, ctxt: Context, state: Mapping[str, Any]) -> None:
        if self.state_dir is not None:
            self.state_dir.mkdir(parents=True, exist_ok=True)
            write_state(self._file(request, ctxt), state)
            return
        data = pack_state(state)
        ctxt.state[KEY] = ConfigRecord({"training": request.training, "state": data})

    def _file(self, request: Request, ctxt: Context) -> Path:
        assert self.state_dir is not None
        # The name comes from the server, and must not lead out of the folder.
        training = "".join(c for c in request.training if c.isalnum())[:64]
        return self.state_dir / f"{training}-{ctxt.node_id}.safetensors"


compression_mod = CompressionMod()
"""The mod with its defaults: ``ClientApp(mods=[compression_mod])``."""


def _digest(request: Request, likes: Mapping[str, Tensor], changes: Mapping[str, Tensor]) -> Tensor:
    """Return the part of the server's digest for the arrays that change in this round.

    A digest for other arrays means that the server holds nothing of these.
    """
    digest = request.digest
    if layout_of(likes)[1] != request.layout or len(digest) != 8 * len(likes):
        digest = bytes(8 * len(likes))
    entries = np.frombuffer(digest, dtype=np.uint8).reshape(-1, 8)
    chosen = entries[[name in changes for name in likes]]
    return torch.from_numpy(chosen.reshape(-1))


def _take_request(msg: Message) -> Any:
    """Remove the server's request from a message and return it; None if there is none."""
    if _kind(msg) not in ("train", "evaluate") or not msg.has_content():
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


def _kind(msg: Message) -> str:
    return msg.metadata.message_type.split(".")[0]


def _with_residuals(arrays: Mapping[str, NDArray], sender: Sender) -> dict[str, NDArray]:
    """Return arrays plus what the sender has not sent of them yet, each in its own dtype."""
    found = dict(arrays)
    for name, entry in sender.state_dict()["tensors"].items():
        residual = entry["own"].get("residual")
        if name in found and residual is not None:
            array = tensor_of(found[name], found[name].dtype.name)
            found[name] = (array + residual).to(array.dtype).numpy()
    return found


def _place(msg: Message, personal: Mapping[str, Personal]) -> None:
    """Put the personal arrays among the others of a message."""
    if not personal:
        return
    [(key, record)] = msg.content.array_records.items()
    msg.content[key] = placed(record, personal)


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


def _failed(error: Exception, msg: Message, start: str = "compression_mod: ") -> Message:
    reason = f"{start}{error}"
    logger.error(reason)
    return Message(Error(ErrorCode.MOD_FAILED_PRECONDITION, reason), reply_to=msg)
