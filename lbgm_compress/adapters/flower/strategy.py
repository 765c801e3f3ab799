"""The server's end: a strategy around any other."""

from __future__ import annotations

import json
import logging
import os
import secrets
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
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

from lbgm_compress.adapters.flower.archive import pack_state, unpack_state
from lbgm_compress.adapters.flower.update import (
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
from lbgm_compress.endpoints import Receiver
from lbgm_compress.wire.errors import PayloadError

__all__ = ["CompressedStrategy"]

FORMAT = 1
# A larger weight of one client could make the sum of all overflow.
LARGEST_WEIGHT = float(2**63)
logger = logging.getLogger("flwr")
Layout = tuple[tuple[str, tuple[int, ...], str], ...]
Parameters = dict[str, NDArray]
EvaluateFn = Callable[[int, ArrayRecord], MetricRecord | None]


class CompressedStrategy(Strategy):
    """Lets clients send compressed updates to any strategy of Flower's message API.

    Clients need `compression_mod` in their ClientApp; a reply that is not compressed counts as that
    client's error, and its reason says so. The inner strategy sees what it would have seen without
    compression: dense replies with one ArrayRecord, in the dtypes that clients returned. Wrappers
    that look into replies, as `DifferentialPrivacyServerSideFixedClipping` does, belong inside;
    those whose clients clip, as `DifferentialPrivacyClientSideFixedClipping`, fit on either side.

    Of every client the server keeps what the client's next message may look back at, compressed as
    it came (`lbgm_compress.Receiver`). Whoever is dropped sends one full update the next time.

    Replies are not trusted. Who sent one is taken from Flower's metadata, and must be whom the
    message was sent to. One that is malformed, that brings inf or nan where the server's own
    parameter is finite, or whose MetricRecord does not fit those of the others, becomes an error
    reply, is logged and counted, and changes nothing.

    The aggregated MetricRecord of a round also holds:

    - ``uplink-bytes``: what the clients' replies weigh, without Flower's own envelopes;
    - ``dense-bytes``: what the elements of the same replies weigh without compression;
    - ``recycled-share``: share of the tensors sent as look-back coefficients alone;
    - ``rejected-replies``: replies that became errors here.

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
        What is held of a client that has not replied for so many rounds is dropped; None never
        does.
    memory_limit
        Bytes to hold of all clients together, at most: the least recently seen are dropped first.
        None is no limit.
    log_file
        A file for a line of JSON a round: bytes, recycled share, replies, what is held, and the
        metrics of training and evaluation.

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
        for name, bound in (("keep_rounds", keep_rounds), ("memory_limit", memory_limit)):
            if bound is not None and (isinstance(bound, bool) or not isinstance(bound, int)):
                raise TypeError(f"{name} must be a whole number or None, not {bound!r}")
            if bound is not None and bound < 0:
                raise ValueError(f"{name} must be 0 or more, not {bound}")
        self.strategy = strategy
        self.compressor = compressor
        self.exclude = tuple(exclude)
        self.keep_rounds = keep_rounds
        self.memory_limit = memory_limit
        self.log_file = None if log_file is None else Path(log_file)
        self.training = secrets.token_hex(16)
        self.totals = Tally()
        self._rounds = 0
        self._held: dict[Layout, Receiver] = {}
        self._nodes: dict[int, _Node] = {}
        self._round = _Round()
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
            node = message.metadata.dst_node_id
            self._round.asked.setdefault(node, []).append(_Asked(message, key, record))
            message.content = self._with_request(message.content, node)
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Decode the replies, and let the inner strategy aggregate them."""
        replies = list(replies)
        self._rounds += 1
        tally = Tally(replies=len(replies))
        signature, weight_key = _usual_signature(replies), _weight_key(self.strategy)
        asked = [self._asked_for(reply) for reply in replies]
        answers = Counter(
            id(ask) for reply, ask in zip(replies, asked, strict=True) if not reply.has_error()
        )
        dense: list[Message] = []
        for reply, ask in zip(replies, asked, strict=True):
            if reply.has_error():
                tally.failed += 1
                dense.append(reply)
                continue
            try:
                if ask is None or answers[id(ask)] > 1:
                    raise PayloadError("it is not the one answer to a message of this round")
                _check_metrics(reply, signature, weight_key)
                dense.append(self._decoded(ask, reply, tally))
            except PayloadError as error:
                tally.rejected += 1
                dense.append(_rejection(ask, reply, str(error)))
        if dense and _total_weight(dense, weight_key) == 0:
            reason = f"{weight_key!r} is 0 in every reply of this round"
            for i, (reply, ask) in enumerate(zip(dense, asked, strict=True)):
                if not reply.has_error():
                    tally.rejected += 1
                    dense[i] = _rejection(ask, reply, reason)
        self._drop_old()
        self.totals.add(tally)
        held = self.held_bytes()
        logger.info("compression: %s; %s held of %d clients", tally, _human(held), len(self._nodes))
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
        """Do what the inner strategy does."""
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
        keep = "for good" if self.keep_rounds is None else f"for {self.keep_rounds} rounds"
        limit = "no limit" if self.memory_limit is None else f"at most {_human(self.memory_limit)}"
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
        """Return how many bytes of compressed tensors are held of all clients together."""
        return sum(node.bytes for node in self._nodes.values())

    def held_clients(self) -> list[int]:
        """Return the ids of the clients of which something is held, least recently seen first."""
        return sorted(self._nodes, key=lambda node: self._nodes[node].seen)

    def state_dict(self) -> dict[str, Any]:
        """Return what is held as a nested dict of tensors, numbers and strings.

        It survives `torch.save` and ``torch.load(weights_only=True)``; `save` and `load` write and
        read it without pickle. The parameters, and what the inner strategy remembers, such as a
        momentum, are not in it.
        """
        layouts = list(self._held)
        return {
            "format": FORMAT,
            "compressor": repr(self.compressor),
            "training": self.training,
            "rounds": self._rounds,
            "layouts": [list(map(list, layout)) for layout in layouts],
            "receivers": [self._held[layout].state_dict() for layout in layouts],
            "nodes": {
                node: [layouts.index(held.layout), held.seen] for node, held in self._nodes.items()
            },
        }

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
            if state["compressor"] != repr(self.compressor):
                raise ValueError(
                    f"the state is that of {state['compressor']}, and this strategy uses "
                    f"{self.compressor!r}"
                )
            layouts: list[Layout] = [
                tuple((str(name), tuple(shape), str(dtype)) for name, shape, dtype in layout)
                for layout in state["layouts"]
            ]
            held: dict[Layout, Receiver] = {}
            for layout, receiver in zip(layouts, state["receivers"], strict=True):
                held[layout] = self._receiver(layout)
                held[layout].load_state_dict(receiver)
            nodes = {
                int(node): _Node(layouts[index], int(seen), held[layouts[index]].held_bytes(node))
                for node, (index, seen) in state["nodes"].items()
            }
            training, rounds = str(state["training"]), int(state["rounds"])
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            raise ValueError(
                f"this is not a state that CompressedStrategy.state_dict returned: {error!r}"
            ) from None
        self._held, self._nodes = held, nodes
        self.training, self._rounds = training, rounds

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write `state_dict` to a file of safetensors; an older file is replaced as a whole."""
        path = Path(path)
        part = path.with_name(path.name + ".part")
        part.write_bytes(pack_state(self.state_dict()))
        os.replace(part, path)

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
        held = self._nodes.get(node)
        digest = b""
        if held is not None:
            digest = self._held[held.layout].digest(node).numpy().tobytes()
        request = Request(self.compressor, self.exclude, self.training, digest).pack()
        configs = content.config_records
        # Mods of differential privacy want one ConfigRecord, no more.
        key = next(iter(configs), KEY)
        config = ConfigRecord({**configs.get(key, {}), KEY: request})
        return RecordDict({**content, key: config})

    def _asked_for(self, reply: Message) -> _Asked | None:
        """Return what a reply answers, or None if its sender was not asked for it."""
        for asked in self._round.asked.get(reply.metadata.src_node_id, ()):
            if asked.message.metadata.message_id == reply.metadata.reply_to_message_id:
                return asked
        return None

    def _decoded(self, asked: _Asked, reply: Message, tally: Tally) -> Message:
        """Return a reply as the inner strategy expects it, and keep what it brings."""
        records = reply.content.array_records
        if len(records) != 1:
            raise PayloadError(f"it has {len(records)} ArrayRecords, expected one")
        [record] = records.values()
        if list(record) != [KEY]:
            raise PayloadError(
                "it is not compressed: put compression_mod first into ClientApp(mods=[...])"
            )
        sent, defaults, outside = self._round.sent(asked.record, self.exclude)
        received = Reply.unpack(record[KEY], defaults, outside)
        parts = received.parts
        for name, array in received.exact.items():
            _check_finite(name, array, sent[name])
        new: dict[str, NDArray] = dict(received.exact)
        layout = _layout(compressible(parts, outside))
        node = asked.message.metadata.dst_node_id
        recycled = 0
        if received.message is not None:
            receiver = self._held.get(layout) or self._receiver(layout)
            names = [name for name, part in parts.items() if not part.exact]
            report = receiver.report(received.message, names)

            def check(changes: Mapping[str, Tensor]) -> None:
                for name, change in changes.items():
                    new[name] = (tensor_of(sent[name], parts[name].dtype) + change).numpy()
                    _check_finite(name, new[name], sent[name])

            receiver.decompress(node, received.message, names, check=check)
            recycled = sum(tensor.recycled for tensor in report.values())
            self._keep(node, layout, receiver)
        tally.uplink += len(record[KEY].data)
        tally.dense += sum(part.nbytes for part in parts.values())
        tally.recycled += recycled
        tally.tensors += len(parts) - len(received.exact)
        arrays = ArrayRecord({name: Array(np.asarray(new[name])) for name in sent})
        others = {name: other for name, other in reply.content.items() if name not in records}
        reply.content = RecordDict({asked.key: arrays, **others})
        return reply

    def _keep(self, node: int, layout: Layout, receiver: Receiver) -> None:
        """Remember that a client was seen, and what is held of it."""
        before = self._nodes.get(node)
        if before is not None and before.layout != layout:
            self._held[before.layout].drop(node)
        held = receiver.held_bytes(node)
        if not held:
            receiver.drop(node)
            self._nodes.pop(node, None)
            return
        self._held[layout] = receiver
        self._nodes[node] = _Node(layout, self._rounds, held)

    def _drop(self, node: int) -> None:
        self._held[self._nodes.pop(node).layout].drop(node)

    def _drop_old(self) -> None:
        """Forget clients that were not seen for long, and those for which there is no room."""
        if self.keep_rounds is not None:
            oldest = self._rounds - self.keep_rounds
            for node in [node for node, held in self._nodes.items() if held.seen < oldest]:
                self._drop(node)
        if self.memory_limit is not None:
            held = self.held_bytes()
            for node in self.held_clients():
                if held <= self.memory_limit:
                    break
                held -= self._nodes[node].bytes
                self._drop(node)
        used = {node.layout for node in self._nodes.values()}
        self._held = {layout: held for layout, held in self._held.items() if layout in used}

    def _receiver(self, layout: Layout) -> Receiver:
        likes = {
            name: torch.empty((), dtype=getattr(torch, dtype)).expand(shape)
            for name, shape, dtype in layout
        }
        return Receiver(self.compressor, likes)

    def _start_line(self, server_round: int, tally: Tally, metrics: MetricRecord | None) -> None:
        if self.log_file is None:
            return
        self._line = {
            "training": self.training,
            "round": server_round,
            "replies": tally.replies,
            "failed-replies": tally.failed,
            **tally.metrics(),
            "held-clients": len(self._nodes),
            "held-bytes": self.held_bytes(),
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
        logger.info(
            "%s└── Held now: %s of %d clients",
            *(indent, _human(self.held_bytes()), len(self._nodes)),
        )


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
        return f"{_human(self.uplink)}{share}"


class _Asked(NamedTuple):
    """A message that a client was sent."""

    message: Message
    key: str
    record: ArrayRecord


class _Node(NamedTuple):
    """A client of which something is held."""

    layout: Layout
    seen: int
    bytes: int


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


def _layout(likes: Mapping[str, Tensor]) -> Layout:
    return tuple(
        (name, tuple(like.shape), str(like.dtype).removeprefix("torch."))
        for name, like in likes.items()
    )


def _check_finite(name: str, array: NDArray, sent: NDArray) -> None:
    """Refuse inf and nan where the server's own parameter is finite."""
    if array.dtype.kind not in "fc" or np.isfinite(array).all():
        return
    if (~np.isfinite(array) & np.isfinite(sent)).any():
        raise PayloadError(f"it makes elements of {name!r} inf or nan")


Signature = tuple[str, tuple[tuple[str, int], ...]]


def _signature(reply: Message) -> Signature | None:
    """Return the names in a reply's one MetricRecord, with the lengths of lists, or -1."""
    records = reply.content.metric_records
    if len(records) != 1:
        return None
    [(key, record)] = records.items()
    sizes = ((name, len(v) if isinstance(v, list) else -1) for name, v in record.items())
    return key, tuple(sorted(sizes))


def _usual_signature(replies: Iterable[Message]) -> Signature | None:
    """Return what most replies have; strategies refuse all if one differs."""
    found = Counter(
        signature
        for reply in replies
        if not reply.has_error() and (signature := _signature(reply)) is not None
    )
    return found.most_common(1)[0][0] if found else None


def _check_metrics(reply: Message, usual: Signature | None, weight_key: str | None) -> None:
    if len(reply.content.metric_records) != 1:
        raise PayloadError(
            f"it has {len(reply.content.metric_records)} MetricRecords, expected one"
        )
    if _signature(reply) != usual:
        raise PayloadError("its MetricRecord has other names or sizes than those of most clients")
    weight = _weight(reply, weight_key)
    if not (weight is None or 0 <= weight <= LARGEST_WEIGHT):
        raise PayloadError(f"its {weight_key!r} is {weight}")


def _weight(reply: Message, weight_key: str | None) -> int | float | None:
    [record] = reply.content.metric_records.values()
    weight = None if weight_key is None else record.get(weight_key)
    return weight if isinstance(weight, (int, float)) else None


def _total_weight(replies: Iterable[Message], weight_key: str | None) -> float | None:
    """Return the sum of all weights, or None if there are none."""
    weights = [_weight(reply, weight_key) for reply in replies if not reply.has_error()]
    if not weights or None in weights:
        return None
    return float(sum(weight for weight in weights if weight is not None))


def _weight_key(strategy: Any) -> str | None:
    """Return the name of the metric that a strategy, or one inside it, weighs replies by."""
    while strategy is not None:
        key = getattr(strategy, "weighted_by_key", None)
        if isinstance(key, str):
            return key
        strategy = getattr(strategy, "strategy", None)
    return None


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
    return {
        name: None if isinstance(value, float) and not np.isfinite(value) else value
        for name, value in metrics.items()
    }


def _human(count: int) -> str:
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}" if unit != "B" else f"{count} B"
        size /= 1000
    return f"{size:.3g} TB"
