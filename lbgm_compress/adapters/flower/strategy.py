"""The server's end: a strategy around another one."""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from lbgm_compress._util.units import human_bytes
from lbgm_compress.adapters.flower.archive import unpack_state, write_state
from lbgm_compress.adapters.flower.client_states import ClientStates
from lbgm_compress.adapters.flower.downlink import Downlink
from lbgm_compress.adapters.flower.log import RoundLog
from lbgm_compress.adapters.flower.personal import check_patterns, personal_of
from lbgm_compress.adapters.flower.request import (
    KEY,
    Request,
    check_expression,
    check_residual,
    with_request,
)
from lbgm_compress.adapters.flower.round import Received, Round
from lbgm_compress.adapters.flower.screening import Screening
from lbgm_compress.adapters.flower.statistics import Statistics
from lbgm_compress.adapters.flower.uplink import Uplink
from lbgm_compress.compressor import Compressor, check_compressor
from lbgm_compress.compressors.identity import Identity

__all__ = ["CompressedStrategy"]

FORMAT = 1
# The keys of the downlink, and of the patterns for personal arrays, in a saved state.
DOWNLINK, PERSONAL = "downlink", "personal"
logger = logging.getLogger("flwr")
EvaluateFn = Callable[[int, ArrayRecord], MetricRecord | None]


class CompressedStrategy(Strategy):
    """Lets clients send compressed updates to any strategy of Flower's message API.

    Clients need `compression_mod` in their ClientApp. A reply that is not compressed is an error of
    that client, and the error says what to do. The inner strategy gets the replies that it would
    get without compression: dense, with one ArrayRecord, in the dtypes that most clients return.
    Wrappers that read replies, such as `DifferentialPrivacyServerSideFixedClipping`, belong inside.
    Wrappers whose clients clip, such as `DifferentialPrivacyClientSideFixedClipping`, fit on either
    side.

    The server holds for every client the state that the client's next message may look back at,
    compressed as it arrived (`lbgm_compress.Receiver`). A client whose state has been dropped sends
    one full update the next time.

    Replies are not trusted. The sender of a reply is taken from Flower's metadata, and must be the
    client that the message was sent to. A reply is rejected if it is malformed, if it brings inf or
    nan where the server's own parameter is finite, or if its MetricRecord has other names than
    those of the majority where the inner strategy needs them alike. A rejected reply becomes an
    error reply, is logged and counted, and changes no state of another client. Replies to an
    evaluation are rejected in the same way.

    The replies of a round are thrown away if the inner strategy returns None in the place of arrays
    (too few replies) or raises an error. Clients with error feedback learn from the next train
    message that their reply was thrown away, rejected or lost, and add what it carried to their
    residual. A strategy that keeps replies for a later round must therefore not return None.

    With a `downlink`, the server keeps w, the model that its clients hold, beside x, the model that
    the inner strategy aggregates. One message for all clients carries a compressed x - w and moves
    w; what it loses comes with the next message. Clients train from w.
    The inner strategy gets x plus each client's update, so that nothing is lost from x. A client
    confirms with its reply which version of w it holds, and is sent the messages that it lacks, or
    the whole of w where that is shorter. A client that cannot rebuild w replies with an error, and
    is sent the whole of w the next time.

    The aggregated MetricRecord of a round gets six more entries. Three are about the replies that
    were decoded:

    - ``uplink-bytes``: their size, without Flower's own envelopes;
    - ``dense-bytes``: the size of their arrays without compression;
    - ``recycled-share``: the share of tensors that were sent as look-back coefficients alone.

    ``rejected-replies`` is the number of replies that were rejected. ``downlink-bytes`` is the size
    of the arrays in the messages to clients, as they travel, with the request in each, and
    ``downlink-dense-bytes`` that of the arrays without compression. With a `downlink`, the metrics
    of an evaluation get the last two as well.

    Parameters
    ----------
    strategy
        The strategy that aggregates.
    compressor
        The compressor that clients use. They get its expression (its repr) from the server.
    exclude
        Patterns (`fnmatch.fnmatchcase`) for names of arrays to be sent as they are, for example
        ``("head.*",)``. Arrays that are not float16, float32 or float64 are always sent so.
    personal
        Patterns for names of arrays that stay at each client, as the heads of FedPer and FedRep
        do, in training and evaluation. A client's app sees what it returned last; before its first
        training, and after its state is lost, the server's initial arrays, which are sent to a
        client until a reply of it has gone into the model. The inner strategy, and an
        `evaluate_fn`, get the initial arrays. Sizes without compression are those of the others.
    compressors
        Classes besides those of `lbgm_compress` that the compressor's expression names: compressors
        of your own, and classes that their constructors take as arguments. Clients need the same
        classes: ``CompressionMod(compressors=[...])``.
    keep_rounds
        The number of rounds after which the state of a client that has not replied is dropped,
        and after which the server forgets that a reply went into the model. None keeps both for
        good.
    memory_limit
        The largest number of bytes to hold of all clients together between rounds. The states of
        the least recently seen clients are dropped first. None is no limit.
    log_file
        A file to append one line of JSON to for each round: bytes, recycled share, replies, memory,
        and the metrics of training and evaluation. Its folder is made if it does not exist.
    downlink
        The compressor of the model on its way to clients, in train and evaluate messages, for
        example ``LookBackSubspace(4, values="int4")``. It needs no error feedback. Arrays that
        `exclude` names, and those of other dtypes, are sent as they are. None sends the model as
        the inner strategy does.
    first
        The precision in which a whole model travels: "float32" (its own), "float16" or "int8". The
        next message carries what rounding lost. With "int8", clients get the first model of the
        training in int8 and all messages since, as long as that is shorter than float16.
    history
        The largest number of bytes of messages to keep for clients that missed some. More than the
        size of a whole model is never kept. None is no other limit.
    residual
        Where clients keep what their messages have lost. With "memory", the app trains from the
        model that the server sent, and error feedback adds the residual to the update. With
        "model", the app trains from that model plus the residual, and the difference of its new
        parameters and the server's model is what is compressed. It takes the same memory.

    Raises
    ------
    TypeError
        If an argument is not of its type.
    ValueError
        If a bound is negative; if the compressor does more to an average than the inner strategy
        would (``SignSGD(vote=True)``); if a client could not build the compressor from its
        expression; if a pattern is in both of `exclude` and `personal`; if `downlink` keeps a
        residual; if `first` or `residual` is none of its values; or ``residual="model"`` without an
        `ErrorFeedback` of decay 1 around all else.
    """

    def __init__(
        self,
        strategy: Strategy,
        compressor: Compressor,
        *,
        exclude: Sequence[str] = (),
        personal: Sequence[str] = (),
        compressors: Sequence[type] = (),
        keep_rounds: int | None = 100,
        memory_limit: int | None = None,
        log_file: str | os.PathLike[str] | None = None,
        downlink: Compressor | None = None,
        first: str = "float32",
        history: int | None = None,
        residual: str = "memory",
    ) -> None:
        if isinstance(strategy, CompressedStrategy):
            raise TypeError(
                "the strategy is a CompressedStrategy already: wrap the strategy inside it once"
            )
        if not isinstance(strategy, Strategy):
            raise TypeError(
                f"CompressedStrategy wraps a flwr.serverapp.strategy.Strategy, not {strategy!r}"
            )
        if _compresses_inside(strategy):
            raise TypeError(
                f"the {type(strategy).__name__} has a CompressedStrategy inside already: use it as "
                "it is"
            )
        check_compressor(compressor)
        if compressor.finishes_average:
            raise ValueError(
                f"{compressor!r} does more to an average than the inner strategy would: use "
                "SignSGD(scaled=True) in the place of a majority vote"
            )
        check_expression(compressor, compressors)
        check_patterns(personal, exclude)
        for name, bound in (("keep_rounds", keep_rounds), ("memory_limit", memory_limit)):
            if bound is not None and (isinstance(bound, bool) or not isinstance(bound, int)):
                raise TypeError(f"{name} must be a whole number or None, not {bound!r}")
            if bound is not None and bound < 0:
                raise ValueError(f"{name} must be 0 or more, not {bound}")
        check_residual(residual, compressor)
        if downlink is not None:
            check_compressor(downlink)
            check_expression(downlink, compressors)
        self.strategy = strategy
        self.compressor = compressor
        self.downlink, self.first, self.history = downlink, first, history
        self.residual = residual
        self.exclude, self.personal = tuple(exclude), tuple(personal)
        self.compressors = tuple(compressors)
        self.training = secrets.token_hex(16)
        self.totals = Statistics()
        self._states = ClientStates(compressor, keep_rounds, memory_limit)
        self._uplink = Uplink(self._states)
        self._screening = Screening()
        self._downlink = self._new_downlink()
        self._round, self._evaluation = self._new_round(), self._new_round()
        # Of the round's messages to clients.
        self._sent, self._sent_to_evaluate = Statistics(), Statistics()
        self._log = RoundLog(log_file)
        self.log_file = self._log.path

    # --- calls of Flower --------------------------------------------------------------------------

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Let the inner strategy configure the round, and add a request to each message."""
        self._log.write_line()
        messages = list(self.strategy.configure_train(server_round, arrays, config, grid))
        self._round = self._new_round()
        self._states.rounds += 1
        for message in messages:
            self._round.add(message)
        self._sent = self._prepare(self._round)
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Decode the replies, and let the inner strategy aggregate them.

        If it raises, or returns no arrays, the replies are thrown away. Clients learn of it with
        the next train message.
        """
        received = [self._round.receive(reply) for reply in replies]
        claims = self._confirm(received)
        self._screening.check_metrics(received, self.strategy, "train")
        statistics = self._uplink.decode(self._round, received)
        statistics.uplink += claims
        statistics.add(self._sent)
        dense = [reply.verdict() for reply in received]
        self._states.end_round()
        if self._downlink is not None:
            keep, most = self._states.keep_rounds, self._states.memory_limit
            room = None if most is None else most - self._states.nbytes()
            self._downlink.end_round(self._states.rounds, keep, room)
        self.totals.add(statistics)
        sizes = statistics.directions().items()
        sent = "; ".join(f"{name.lower()} {size}" for name, size in sizes)
        logger.info("compression: %s; held of %d clients: %s", sent, *self._held_now())
        arrays, metrics = self.strategy.aggregate_train(server_round, dense)
        if arrays is not None:
            self._states.set_applied(
                reply.asked.message.metadata.dst_node_id
                for reply in received
                if reply.accepted and reply.asked is not None
            )
            arrays = self._round.with_personal(arrays)
        if received:
            metrics = MetricRecord() if metrics is None else metrics
            for name, value in statistics.metrics().items():
                metrics[name] = value
        self._log.open_line(
            {
                "training": self.training,
                "round": server_round,
                "training-round": self._states.rounds,
                "replies": statistics.replies,
                "failed-replies": statistics.failed,
                **statistics.metrics(),
                "held-clients": len(self._states),
                "held-bytes": self.held_bytes(),
            },
            metrics,
        )
        self._round, self._sent = self._new_round(), Statistics()
        return arrays, metrics

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Return the inner strategy's messages; with a downlink, its updates in them.

        They have no personal arrays but those that a client does not hold.
        """
        messages = list(self.strategy.configure_evaluate(server_round, arrays, config, grid))
        self._evaluation = self._new_round()
        if self._downlink is None and not self.personal:
            size = sum(map(_size, messages))
            self._sent_to_evaluate = Statistics(downlink=size, downlink_dense=size)
            return messages
        for message in messages:
            self._evaluation.add(message)
        self._sent_to_evaluate = self._prepare(self._evaluation)
        return messages

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Let the inner strategy aggregate the replies that are not rejected."""
        received = [self._evaluation.receive(reply) for reply in replies]
        sent, self._sent_to_evaluate = self._sent_to_evaluate, Statistics()
        sent.uplink = self._confirm(received)
        self._screening.check_metrics(received, self.strategy, "evaluate")
        accepted = [reply.verdict() for reply in received]
        metrics = self.strategy.aggregate_evaluate(server_round, accepted)
        self.totals.add(sent)
        if self._downlink is not None and received:
            metrics = MetricRecord() if metrics is None else metrics
            for name, value in sent.downlink_metrics().items():
                metrics[name] = value
        self._evaluation = self._new_round()
        self._log.add_evaluation(metrics)
        return metrics

    def summary(self) -> None:
        """Log the settings, the statistics so far, and the inner strategy's summary."""
        logger.info("\t├──> Compression:")
        logger.info("\t│\t├── Compressor: %r", self.compressor)
        logger.info("\t│\t├── Sent as they are: %s", ", ".join(self.exclude) or "integers alone")
        if self.personal:
            logger.info("\t│\t├── Personal: %s", ", ".join(self.personal))
        rounds, most = self._states.keep_rounds, self._states.memory_limit
        keep = "for good" if rounds is None else f"for {rounds} rounds"
        limit = "no limit" if most is None else f"at most {human_bytes(most)}"
        if self.downlink is not None:
            kept = "no limit" if self.history is None else f"at most {human_bytes(self.history)}"
            logger.info("\t│\t├── Downlink: %r", self.downlink)
            logger.info("\t│\t├── The first model: %s; missed messages: %s", self.first, kept)
        if self.residual == "model":
            logger.info("\t│\t├── Residual: in the client's model")
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
        """Run the training as `flwr.serverapp.strategy.Strategy.start` does.

        Raises
        ------
        ValueError
            Before the first round if a pattern of `personal` matches none of the arrays, all arrays
            are personal, or one matches a pattern of `exclude` too.
        """
        personal_of(initial_arrays, self.personal, self.exclude)
        observed = evaluate_fn
        if evaluate_fn is not None:

            def observed(server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
                metrics = evaluate_fn(server_round, arrays)
                self._log.add_server_evaluation(metrics)
                return metrics

        self._log.server_evaluates = evaluate_fn is not None
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
            self._log.write_line()
        logger.info("Compression:")
        self._log_totals("\t")
        return result

    # --- states of the clients --------------------------------------------------------------------

    def held_bytes(self) -> int:
        """Return the number of bytes held of all clients together."""
        versions = 0 if self._downlink is None else self._downlink.nbytes()
        return self._states.nbytes() + versions

    def held_clients(self) -> list[int]:
        """Return the ids of the clients whose states are held, the least recently seen first."""
        return self._states.clients()

    def state_dict(self) -> dict[str, Any]:
        """Return the clients' states as a nested dict of tensors, numbers and strings.

        The dict survives `torch.save` and ``torch.load(weights_only=True)``; `save` and `load`
        write and read it without pickle. It does not contain the parameters, nor the state of the
        inner strategy, such as a momentum. Save the parameters of the same round with it: clients
        give back a last message that the state does not know as applied.
        """
        state = {"format": FORMAT, "training": self.training, **self._states.state_dict()}
        if self._downlink is not None:
            state[DOWNLINK] = self._downlink.state_dict()
        if self.personal:
            state[PERSONAL] = list(self.personal)
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a dict that `state_dict` returned, so that clients may go on to recycle.

        Raises
        ------
        ValueError
            If it is not such a dict, or that of another compressor or release, or of other personal
            arrays. Nothing is changed.
        """
        try:
            if state["format"] != FORMAT:
                raise ValueError(
                    f"the state has format {state['format']}, this release reads {FORMAT}"
                )
            if tuple(state.get(PERSONAL, self.personal)) != self.personal:
                raise ValueError(
                    f"the state has personal={state[PERSONAL]!r}, and this strategy "
                    f"{self.personal!r}"
                )
            training = str(state["training"])
            downlink = self._new_downlink()
            if downlink is not None and DOWNLINK in state:
                downlink.load_state_dict(state[DOWNLINK])
            self._states.load_state_dict(state)
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            raise ValueError(
                f"this is not a state that CompressedStrategy.state_dict returned: {error!r}"
            ) from None
        self.training, self._downlink = training, downlink

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write `state_dict` to a file of safetensors, in one step if the file exists already."""
        write_state(Path(path), self.state_dict())

    def load(self, path: str | os.PathLike[str]) -> None:
        """Load the state from a file that `save` wrote.

        Raises
        ------
        OSError
            If the file cannot be read.
        ValueError
            If it does not hold such a state. Nothing is changed.
        """
        self.load_state_dict(unpack_state(Path(path).read_bytes()))

    # --- internal ---------------------------------------------------------------------------------

    def _new_downlink(self) -> Downlink | None:
        if self.downlink is None:
            return None
        return Downlink(self.downlink, self.first, self.history)

    def _new_round(self) -> Round:
        return Round(self.exclude, self.personal)

    def _prepare(self, round_: Round) -> Statistics:
        """Add requests to the messages of a round, and compress the model in them."""
        statistics = Statistics()
        if self._downlink is not None and (all_sent := round_.all_sent()):
            self._downlink.publish(all_sent)
        for asked in round_.messages():
            message, node = asked.message, asked.message.metadata.dst_node_id
            sent = round_.sent(asked.record)
            size = dense = sum(part.nbytes for part in sent.parts.values())
            content, positions = message.content, None
            arrays = {name: asked.record[name] for name in sent.arrays}
            if self._downlink is not None:
                arrays = {KEY: self._downlink.array(node)}
                size = len(arrays[KEY].data)
            if self.personal:
                personal = {} if self._states.has_state(node) else sent.personal
                positions = {name: one.position for name, one in personal.items()}
                arrays |= {name: one.array for name, one in personal.items()}
                size += sum(len(one.array.data) for one in personal.values())
            if self._downlink is not None or self.personal:
                content = RecordDict({**content, asked.key: ArrayRecord(arrays)})
            request = self._request(node, round_, positions)
            message.content = with_request(content, request)
            statistics.downlink += size + len(request)
            statistics.downlink_dense += dense
        if self._downlink is not None:
            self._downlink.free()
        return statistics

    def _confirm(self, received: Sequence[Received]) -> int:
        """Take what clients say of what they hold; return the size of their claims in bytes."""
        for reply in received:
            if reply.asked is not None and reply.out_of_sync:
                self._states.set_lost(reply.asked.message.metadata.dst_node_id)
        if self._downlink is None:
            return 0
        return self._downlink.confirm(received, self._states.rounds)

    def _request(self, node: int, round_: Round, personal: Mapping[str, int] | None) -> bytes:
        """Return the request for one client."""
        settings = self.downlink, self.first, personal
        # An evaluation has no updates, so that these settings of them would travel for nothing.
        request = Request(Identity(), (), self.training, b"", b"", None, 0, "memory", *settings)
        if round_ is not self._evaluation:
            layout, digest = self._states.digest(node)
            number = self._states.rounds if round_.asked_once(node) else None
            applied = self._states.applied(node)
            updates = self.compressor, self.exclude, self.training, layout, digest, number, applied
            request = Request(*updates, self.residual, *settings)
        return request.pack()

    def _held_now(self) -> tuple[int, str]:
        return len(self._states), human_bytes(self._states.nbytes())

    def _log_totals(self, indent: str) -> None:
        totals = self.totals
        for name, size in totals.directions().items():
            logger.info("%s├── %s: %s", indent, name, size)
        logger.info("%s├── Recycled: %.1f %% of the tensors", indent, 100 * totals.recycled_share)
        logger.info(
            "%s├── Replies: %d, failed %d, rejected %d",
            *(indent, totals.replies, totals.failed, totals.rejected),
        )
        logger.info("%s└── Held now of %d clients: %s", indent, *self._held_now())


def _compresses_inside(strategy: Any) -> bool:
    """Return whether a strategy has a `CompressedStrategy` inside, at any depth."""
    inner = getattr(strategy, "strategy", None)
    return inner is not None and (
        isinstance(inner, CompressedStrategy) or _compresses_inside(inner)
    )


def _size(message: Message) -> int:
    """Return the size of a message's arrays in bytes."""
    records = message.content.array_records.values()
    return sum(len(array.data) for record in records for array in record.values())
