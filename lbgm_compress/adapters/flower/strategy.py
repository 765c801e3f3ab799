"""The server's end: a strategy around any other."""

from __future__ import annotations

import json
import logging
import math
import os
import secrets
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Error,
    Message,
    MetricRecord,
    RecordDict,
)
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy
from torch import Tensor

from lbgm_compress._util.units import human_bytes
from lbgm_compress.adapters.flower.archive import unpack_state, write_state
from lbgm_compress.adapters.flower.client_states import Held
from lbgm_compress.adapters.flower.screening import (
    averages_lists,
    check_weight,
    metrics_signature,
    usual,
    weight_key_of,
)
from lbgm_compress.adapters.flower.update import (
    ADDED,
    KEY,
    NDArray,
    Part,
    Reply,
    Request,
    compressible,
    default_parts,
    excluded,
    tensor_of,
)
from lbgm_compress.compressor import Compressor
from lbgm_compress.wire.errors import PayloadError

__all__ = ["CompressedStrategy"]

FORMAT = 1
logger = logging.getLogger("flwr")
Parameters = dict[str, NDArray]
EvaluateFn = Callable[[int, ArrayRecord], MetricRecord | None]


class CompressedStrategy(Strategy):
    """Lets clients send compressed updates to any strategy of Flower's message API.

    Clients need `compression_mod` in their ClientApp; a reply that is not compressed counts as that
    client's error, and its reason says so. The inner strategy sees what it would have seen without
    compression: dense replies with one ArrayRecord, in the dtypes that most clients return.
    Wrappers that look into replies, as `DifferentialPrivacyServerSideFixedClipping` does, belong
    inside; those whose clients clip, as `DifferentialPrivacyClientSideFixedClipping`, fit on either
    side.

    Of every client the server keeps what the client's next message may look back at, compressed as
    it came (`lbgm_compress.Receiver`). Whoever is dropped sends one full update the next time.

    Replies are not trusted. Who sent one is taken from Flower's metadata, and must be whom the
    message was sent to. One that is malformed, that brings inf or nan where the server's own
    parameter is finite, or whose MetricRecord has other names than those of most others where the
    inner strategy needs them alike, becomes an error reply, is logged and counted, and changes
    nothing. So does such a reply to an evaluation.

    The aggregated MetricRecord of a round also holds, of the replies that were decoded:

    - ``uplink-bytes``: what they weigh, without Flower's own envelopes;
    - ``dense-bytes``: what their elements weigh without compression;
    - ``recycled-share``: share of the tensors sent as look-back coefficients alone;

    and ``rejected-replies``, those that became errors here.

    Parameters
    ----------
    strategy
        The strategy that aggregates.
    compressor
        What clients use; they learn it from the server.
    exclude
        Patterns (`fnmatch.fnmatchcase`) for names of arrays to be sent as they are, for example
        ``("head.*",)``. Arrays that are not float16, float32 or float64 always are.
    keep_rounds
        What is held of a client is dropped when it has not replied for so many rounds; None never
        does.
    memory_limit
        Bytes to hold of all clients together between rounds, at most: the least recently seen are
        dropped first. None is no limit.
    log_file
        A file to append a line of JSON a round to: bytes, recycled share, replies, what is held,
        and the metrics of training and evaluation. Its folder is made if it does not exist.

    Raises
    ------
    TypeError, ValueError
        If an argument is not what it should be; or the compressor's average is not a plain one
        (``SignSGD(vote=True)``), which the inner strategy knows nothing of.
    """

    def __init__(
        self,
        strategy: Strategy,
        compressor: Compressor,
        *,
        exclude: Sequence[str] = (),
        keep_rounds: int | None = 100,
        memory_limit: int | None = None,
        log_file: str | os.PathLike[str] | None = None,
    ) -> None:
        if not isinstance(strategy, Strategy):
            raise TypeError(
                f"CompressedStrategy wraps a flwr.serverapp.strategy.Strategy, not {strategy!r}"
            )
        if not isinstance(compressor, Compressor):
            raise TypeError(
                f"expected a compressor such as LBGM(TopK(0.01)), not {type(compressor).__name__}"
            )
        probe = torch.tensor([0.5, -0.25])
        if not torch.equal(compressor.finish(probe.clone()), probe):
            raise ValueError(
                f"{compressor!r} does more to an average than the inner strategy would: use "
                "SignSGD(scaled=True) in the place of a majority vote"
            )
        if isinstance(exclude, str):
            raise TypeError(f"exclude is a list of patterns, such as ({exclude!r},), not a str")
        for pattern in exclude:
            if not isinstance(pattern, str):
                raise TypeError(f"exclude is a list of str, and {pattern!r} is none")
        for name, bound in (("keep_rounds", keep_rounds), ("memory_limit", memory_limit)):
            if bound is not None and (isinstance(bound, bool) or not isinstance(bound, int)):
                raise TypeError(f"{name} must be a whole number or None, not {bound!r}")
            if bound is not None and bound < 0:
                raise ValueError(f"{name} must be 0 or more, not {bound}")
        self.strategy = strategy
        self.compressor = compressor
        self.exclude = tuple(exclude)
        self.log_file = None if log_file is None else Path(log_file)
        if self.log_file is not None:
            self.log_file.parent.mkdir(parents=True, exist_ok=True)
        self.training = secrets.token_hex(16)
        self.totals = Tally()
        self._held = Held(compressor, keep_rounds, memory_limit)
        self._round = _Round()
        # What the replies of earlier rounds looked like: where as many differ as do not, that
        # decides.
        self._usual: dict[str, Hashable] = {}
        self._usual_dtypes: tuple[str, ...] | None = None
        self._line: dict[str, Any] | None = None
        self._line_waits = False

    # --- what Flower calls -----------------------------------------------------------------------

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Let the inner strategy configure the round, and tell each client what to do."""
        self._flush_line()
        messages = list(self.strategy.configure_train(server_round, arrays, config, grid))
        self._round = _Round()
        for message in messages:
            records = message.content.array_records
            if len(records) != 1:
                raise ValueError(
                    "CompressedStrategy needs one ArrayRecord in a train message, and the inner "
                    f"strategy sends {len(records)}"
                )
            [(key, record)] = records.items()
            # What cannot be sent is told now, and not by every client.
            self._round.sent(record, self.exclude)
            node = message.metadata.dst_node_id
            self._round.asked.setdefault(node, []).append(_Asked(message, key, record))
            message.content = self._with_request(message.content, node)
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Decode the replies, and let the inner strategy aggregate them."""
        replies = list(replies)
        self._held.rounds += 1
        tally = Tally(replies=len(replies))
        asked = [self._asked_for(reply) for reply in replies]
        wrong = self._screen("train", replies)
        received, dtypes = self._unpacked(replies, asked, wrong)
        dense: list[Message] = []
        for i, (reply, ask) in enumerate(zip(replies, asked, strict=True)):
            if not reply.has_error() and i not in wrong:
                assert ask is not None
                try:
                    self._decode(ask, reply, received[i], dtypes, tally)
                except PayloadError as error:
                    wrong[i] = str(error)
            tally.failed += reply.has_error()
            dense.append(_rejection(ask, reply, wrong[i]) if i in wrong else reply)
        self._held.end_round()
        tally.rejected = len(wrong)
        self.totals.add(tally)
        logger.info("compression: %s; held of %d clients: %s", tally, *self._held_now())
        arrays, metrics = self.strategy.aggregate_train(server_round, dense)
        if replies:
            metrics = MetricRecord() if metrics is None else metrics
            for name, value in tally.metrics().items():
                metrics[name] = value
        self._start_line(server_round, tally, metrics)
        self._round = _Round()
        return arrays, metrics

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Do what the inner strategy does."""
        return self.strategy.configure_evaluate(server_round, arrays, config, grid)

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Let the inner strategy aggregate the replies that fit together."""
        replies = list(replies)
        for i, reason in self._screen("evaluate", replies).items():
            replies[i] = _rejection(None, replies[i], reason)
        metrics = self.strategy.aggregate_evaluate(server_round, replies)
        if self._line is not None:
            self._line["evaluate"] = _plain(metrics)
            if not self._line_waits:
                self._flush_line()
        return metrics

    def summary(self) -> None:
        """Log the settings, what has been sent so far, and the inner strategy's summary."""
        logger.info("\t├──> Compression:")
        logger.info("\t│\t├── Compressor: %r", self.compressor)
        logger.info("\t│\t├── Sent as they are: %s", ", ".join(self.exclude) or "integers alone")
        rounds, most = self._held.keep_rounds, self._held.memory_limit
        keep = "for good" if rounds is None else f"for {rounds} rounds"
        limit = "no limit" if most is None else f"at most {human_bytes(most)}"
        last = "├" if self.totals.replies else "└"
        logger.info("\t│\t%s── Held of a client: %s, %s", last, keep, limit)
        if self.totals.replies:
            self._log_totals("\t│\t")
        self.strategy.summary()

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: EvaluateFn | None = None,
    ) -> Result:
        """Run the training as `flwr.serverapp.strategy.Strategy.start` does."""
        observed = evaluate_fn
        if evaluate_fn is not None:

            def observed(server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
                metrics = evaluate_fn(server_round, arrays)
                if self._line is not None:
                    self._line["evaluate-server"] = _plain(metrics)
                    self._flush_line()
                return metrics

        self._line_waits = evaluate_fn is not None
        try:
            result = super().start(
                grid,
                initial_arrays,
                num_rounds,
                timeout,
                train_config,
                evaluate_config,
                observed,
            )
        finally:
            self._flush_line()
        logger.info("Compression:")
        self._log_totals("\t")
        return result

    # --- what is held ----------------------------------------------------------------------------

    def held_bytes(self) -> int:
        """Return how many bytes are held of all clients together."""
        return self._held.nbytes()

    def held_clients(self) -> list[int]:
        """Return the ids of the clients of which something is held, least recently seen first."""
        return self._held.clients()

    def state_dict(self) -> dict[str, Any]:
        """Return what is held as a nested dict of tensors, numbers and strings.

        It survives `torch.save` and ``torch.load(weights_only=True)``; `save` and `load` write and
        read it without pickle. The parameters, and what the inner strategy remembers, such as a
        momentum, are not in it.
        """
        return {"format": FORMAT, "training": self.training, **self._held.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned: clients are recognised, and recycle on.

        Raises
        ------
        ValueError
            If it is the state of another compressor or release, or none. Nothing is changed.
        """
        try:
            if state["format"] != FORMAT:
                raise ValueError(
                    f"the state has format {state['format']}, this release reads {FORMAT}"
                )
            training = str(state["training"])
            self._held.load_state_dict(state)
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            raise ValueError(
                f"this is not a state that CompressedStrategy.state_dict returned: {error!r}"
            ) from None
        self.training = training

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write `state_dict` to a file of safetensors; an older file is replaced as a whole."""
        write_state(Path(path), self.state_dict())

    def load(self, path: str | os.PathLike[str]) -> None:
        """Do `load_state_dict` with a file that `save` wrote.

        Raises
        ------
        OSError, ValueError
            If there is no such file, or it is no such state. Nothing is changed.
        """
        self.load_state_dict(unpack_state(Path(path).read_bytes()))

    # --- inside ----------------------------------------------------------------------------------

    def _with_request(self, content: RecordDict, node: int) -> RecordDict:
        """Return a client's own copy of a message's content, with the request in it."""
        held = self._held.digest(node)
        request = Request(self.compressor, self.exclude, self.training, *held).pack()
        configs = content.config_records
        if configs:
            # Mods of differential privacy want one ConfigRecord, no more.
            key, config = next(iter(configs.items()))
            return RecordDict({**content, key: ConfigRecord({**config, KEY: request})})
        key = ADDED
        while key in content:
            key += "."
        return RecordDict({**content, key: ConfigRecord({ADDED: request})})

    def _screen(self, stage: str, replies: list[Message]) -> dict[int, str]:
        """Say what is wrong with the metrics of replies, by position."""
        weight_key = weight_key_of(self.strategy)
        if weight_key is None:
            # Not one of Flower's own, which all weigh replies: it may do with them what it wants.
            return {}
        lengths = averages_lists(self.strategy, stage)
        wrong: dict[int, str] = {}
        signatures: dict[int, Hashable] = {}
        for i, reply in enumerate(replies):
            if reply.has_error():
                continue
            reason = check_weight(reply, weight_key)
            if reason is None:
                signatures[i] = metrics_signature(reply, lengths)
            else:
                wrong[i] = reason
        chosen = usual(signatures.values(), [self._usual.get(stage)])
        for i, signature in signatures.items():
            if signature != chosen:
                wrong[i] = "its MetricRecord has other names or sizes than those of most clients"
        if chosen is not None:
            self._usual[stage] = chosen
        return wrong

    def _unpacked(
        self, replies: list[Message], asked: list[_Asked | None], wrong: dict[int, str]
    ) -> tuple[dict[int, Reply], dict[str, str]]:
        """Take replies apart, and return them and the dtypes that most have, by name.

        Those that cannot be taken apart are added to `wrong`.
        """
        answers = Counter(
            id(ask) for reply, ask in zip(replies, asked, strict=True) if not reply.has_error()
        )
        received: dict[int, Reply] = {}
        found: list[tuple[str, ...]] = []
        names: list[str] = []
        sent_dtypes: tuple[str, ...] | None = None
        for i, (reply, ask) in enumerate(zip(replies, asked, strict=True)):
            if reply.has_error() or i in wrong:
                continue
            try:
                if ask is None or answers[id(ask)] > 1:
                    raise PayloadError("it is not the one answer to a message of this round")
                _, defaults, outside = self._round.sent(ask.record, self.exclude)
                received[i] = Reply.unpack(_array_of(reply, ask), defaults, outside)
            except PayloadError as error:
                wrong[i] = str(error)
                continue
            names = list(defaults)
            sent_dtypes = tuple(part.dtype for part in defaults.values())
            found.append(tuple(part.dtype for part in received[i].parts.values()))
        chosen = usual(found, [self._usual_dtypes, sent_dtypes])
        if chosen is None:
            return received, {}
        self._usual_dtypes = chosen
        return received, dict(zip(names, chosen, strict=True))

    def _asked_for(self, reply: Message) -> _Asked | None:
        """Return what a reply answers, or None if its sender was not asked for it."""
        for asked in self._round.asked.get(reply.metadata.src_node_id, ()):
            if asked.message.metadata.message_id == reply.metadata.reply_to_message_id:
                return asked
        return None

    def _decode(
        self,
        asked: _Asked,
        reply: Message,
        received: Reply,
        dtypes: Mapping[str, str],
        tally: Tally,
    ) -> None:
        """Make a reply what the inner strategy expects, and hold what it brings."""
        sent, _, outside = self._round.sent(asked.record, self.exclude)
        parts = received.parts
        new: dict[str, NDArray] = {}
        recycled = 0

        def add(name: str, array: NDArray) -> None:
            _check_finite(name, array, sent[name])
            with np.errstate(over="ignore", invalid="ignore"):
                new[name] = array.astype(dtypes.get(name, array.dtype), copy=False)
            _check_finite(name, new[name], sent[name])

        for name, array in received.exact.items():
            add(name, array)
        if received.message is not None:

            def check(changes: Mapping[str, Tensor]) -> None:
                for name, change in changes.items():
                    add(name, (tensor_of(sent[name], parts[name].dtype) + change).numpy())

            report = self._held.decode(
                asked.message.metadata.dst_node_id,
                compressible(parts, outside),
                received.message,
                [name for name, part in parts.items() if not part.exact],
                check,
            )
            recycled = sum(tensor.recycled for tensor in report.values())
        tally.uplink += len(_array_of(reply, asked).data)
        tally.dense += sum(part.nbytes for part in parts.values())
        tally.recycled += recycled
        tally.tensors += len(parts) - len(received.exact)
        arrays = ArrayRecord({name: Array(np.asarray(new[name])) for name in sent})
        others = {
            name: other
            for name, other in reply.content.items()
            if name not in reply.content.array_records
        }
        reply.content = RecordDict({asked.key: arrays, **others})

    def _held_now(self) -> tuple[int, str]:
        return len(self._held), human_bytes(self._held.nbytes())

    def _start_line(self, server_round: int, tally: Tally, metrics: MetricRecord | None) -> None:
        if self.log_file is None:
            return
        self._line = {
            "training": self.training,
            "round": server_round,
            "training-round": self._held.rounds,
            "replies": tally.replies,
            "failed-replies": tally.failed,
            **tally.metrics(),
            "held-clients": len(self._held),
            "held-bytes": self._held.nbytes(),
            "train": _plain(metrics),
        }

    def _flush_line(self) -> None:
        """Write a round's line, if there is one that has not been written."""
        line, self._line = self._line, None
        if line is not None and self.log_file is not None:
            with self.log_file.open("a") as file:
                file.write(json.dumps(line) + "\n")

    def _log_totals(self, indent: str) -> None:
        totals = self.totals
        logger.info("%s├── Uplink: %s", indent, totals)
        logger.info("%s├── Recycled: %.1f %% of the tensors", indent, 100 * totals.recycled_share)
        logger.info(
            "%s├── Replies: %d, failed %d, rejected %d",
            *(indent, totals.replies, totals.failed, totals.rejected),
        )
        logger.info("%s└── Held now of %d clients: %s", indent, *self._held_now())


@dataclass
class Tally:
    """What replies weighed, and what became of them."""

    replies: int = 0
    failed: int = 0
    """Replies that came as errors."""
    rejected: int = 0
    """Replies that became errors here."""
    uplink: int = 0
    """Bytes of the payloads of all others."""
    dense: int = 0
    """Bytes of the elements that they stand for."""
    recycled: int = 0
    """Tensors sent as look-back coefficients alone."""
    tensors: int = 0
    """Tensors sent in compressed form."""

    @property
    def recycled_share(self) -> float:
        """Share of the tensors, 0 if there were none."""
        return self.recycled / self.tensors if self.tensors else 0.0

    def add(self, other: Tally) -> None:
        """Add up, in place."""
        for one in fields(self):
            setattr(self, one.name, getattr(self, one.name) + getattr(other, one.name))

    def metrics(self) -> dict[str, int | float]:
        """Return what goes into a MetricRecord."""
        return {
            "uplink-bytes": self.uplink,
            "dense-bytes": self.dense,
            "recycled-share": self.recycled_share,
            "rejected-replies": self.rejected,
        }

    def __str__(self) -> str:
        share = f", {self.uplink / self.dense:.2%} of dense" if self.dense else ""
        return f"{human_bytes(self.uplink)}{share}"


class _Asked(NamedTuple):
    """A message that a client was sent."""

    message: Message
    key: str
    record: ArrayRecord


@dataclass
class _Round:
    """What clients were sent in this round."""

    asked: dict[int, list[_Asked]] = field(default_factory=dict)
    _sent: dict[int, tuple[Parameters, dict[str, Part], frozenset[str]]] = field(
        default_factory=dict
    )

    def sent(
        self, record: ArrayRecord, exclude: Sequence[str]
    ) -> tuple[Parameters, dict[str, Part], frozenset[str]]:
        """Return arrays that were sent, how they travel back, and the names of those excluded.

        Most clients are sent the same record, which is read once.
        """
        if id(record) not in self._sent:
            try:
                arrays = {name: np.asarray(array.numpy()) for name, array in record.items()}
            except TypeError as error:
                raise ValueError(f"CompressedStrategy needs numpy arrays: {error}") from None
            outside = excluded(arrays, exclude)
            self._sent[id(record)] = arrays, default_parts(arrays, outside), outside
        return self._sent[id(record)]


def _array_of(reply: Message, asked: _Asked) -> Array:
    """Return the array that a compressed reply consists of."""
    records = reply.content.array_records
    if len(records) != 1:
        raise PayloadError(f"it has {len(records)} ArrayRecords, expected one")
    [(key, record)] = records.items()
    if list(record) != [KEY]:
        raise PayloadError(
            "it is not compressed: put compression_mod first into ClientApp(mods=[...])"
        )
    if key != asked.key and asked.key in reply.content:
        raise PayloadError(f"another record has the name of its arrays, {asked.key!r}")
    return record[KEY]


def _check_finite(name: str, array: NDArray, sent: NDArray) -> None:
    """Refuse inf and nan where the server's own parameter is finite.

    That goes for what becomes of the elements in the server's dtype, too.
    """
    if array.dtype.kind not in "fc":
        return
    finite = np.isfinite(array)
    if sent.dtype.kind in "fc" and sent.dtype.itemsize < array.dtype.itemsize:
        with np.errstate(over="ignore", invalid="ignore"):
            finite &= np.isfinite(array.astype(sent.dtype))
    if not finite.all() and (~finite & np.isfinite(sent)).any():
        raise PayloadError(f"it makes elements of {name!r} inf or nan")


def _rejection(asked: _Asked | None, reply: Message, reason: str) -> Message:
    """Return an error in the place of a reply, and log it."""
    node = reply.metadata.src_node_id
    logger.warning("compression: the reply of client %s is rejected: %s", node, reason)
    error = Error(ErrorCode.UNKNOWN, f"lbgm_compress: the reply of {node} is rejected: {reason}")
    return Message(error, reply_to=reply if asked is None else asked.message)


def _plain(metrics: MetricRecord | None) -> dict[str, Any] | None:
    """Return metrics as JSON has them, which knows neither inf nor nan."""
    if metrics is None:
        return None
    return {name: _number(value) for name, value in metrics.items()}


def _number(value: Any) -> Any:
    if isinstance(value, list):
        return [_number(element) for element in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
