"""Replays of compression methods on a stream of gradients; nothing is sent."""

from __future__ import annotations

import abc
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lbgm_compress.compressor import Encoding, State, raw
from lbgm_compress.compressors.identity import Identity
from lbgm_compress.compressors.lbgm import LBGM, Decision, LookBack
from lbgm_compress.compressors.look_back_subspace import LookBackSubspace
from lbgm_compress.decoded import Dense
from lbgm_compress.endpoints import Sender
from lbgm_compress.probe.gradient_statistics import CachedDecoded, GradientStatistics, dot64
from lbgm_compress.probe.report import Row
from lbgm_compress.wire.message import Kind, Message, recycles

__all__ = ["LookBackReplay", "Replay", "SubspaceReplay"]

# One of so many full payloads of a tensor is made, unless all are wanted: coding takes time.
SIZED_EVERY = 8
RAW = int(Kind.RAW)
NOTHING = torch.zeros(1, dtype=torch.uint8)


class Step(NamedTuple):
    """The payload of one tensor in one round, and what comes of it."""

    head: bytes
    body: Callable[[], Tensor] | None
    """Makes a body of the payload's size."""
    state: Any
    """The method's state of this tensor after the round."""
    missed: float
    """|g - applied|^2."""


@dataclass
class Tally:
    """Sums over the rounds of one method and one tensor."""

    rounds: int = 0
    recycled: int = 0
    bytes: int = 0
    full_bytes: int = 0
    """Bytes in the rounds in which the tensor was not recycled."""
    dense_bytes: int = 0
    """Bytes of one uncompressed payload a round."""
    error: float = 0.0
    """Sum of |g - applied|^2 / |g|^2."""
    held: int = 0
    """Rounds after which a receiver held something to look back at."""


class Replay(abc.ABC):
    """Methods that are replayed on one stream of gradients.

    Parameters
    ----------
    compressors
        The methods.
    steps
        Number of training steps whose mean is one gradient of the stream.
    """

    def __init__(self, compressors: Sequence[LBGM | LookBackSubspace], steps: int = 1) -> None:
        self.compressors, self.steps = list(compressors), steps
        self.rounds = 0
        self.dense_bytes = 0
        self.states: list[dict[str, Any]] = [{} for _ in compressors]
        self.tallies: list[dict[str, Tally]] = [{} for _ in compressors]
        self.messages = [0 for _ in compressors]
        self.errors = [0.0 for _ in compressors]
        self._dense: dict[tuple[str, ...], tuple[int, dict[str, int]]] = {}

    def round(self, grads: Mapping[str, Tensor], statistics: Sequence[GradientStatistics]) -> None:
        """Replay one round; the gradients may change afterwards."""
        if not self.compressors:
            return
        made = self.encode(grads, statistics)
        # Nothing is counted before everything is made: an error leaves the counts as they were.
        total, dense = self._dense_sizes(grads)
        sizes: dict[tuple[int, ...], tuple[int, list[int]]] = {}
        for method, steps in enumerate(made):
            key = tuple(map(id, steps))
            if key not in sizes:
                bodies = [None if step.body is None else step.body() for step in steps]
                message = Message(0, 0, 0, [step.head for step in steps], bodies)
                sizes[key] = message.numel(), message.sizes()
            self._count(method, list(grads), steps, statistics, dense, *sizes[key])
        self.rounds += 1
        self.dense_bytes += total

    @abc.abstractmethod
    def encode(
        self, grads: Mapping[str, Tensor], statistics: Sequence[GradientStatistics]
    ) -> list[list[Step]]:
        """Return, for each method, the step of each tensor; no state changes."""

    def _dense_sizes(self, grads: Mapping[str, Tensor]) -> tuple[int, dict[str, int]]:
        """Return the bytes of the uncompressed message, and of each tensor in it."""
        key = tuple(grads)
        if key not in self._dense:
            sender = Sender(Identity())
            size = sender.compress(dict(grads)).numel()
            self._dense[key] = size, {name: r.bytes for name, r in sender.report().items()}
        return self._dense[key]

    def _count(
        self,
        method: int,
        names: Sequence[str],
        steps: Sequence[Step],
        statistics: Sequence[GradientStatistics],
        dense: Mapping[str, int],
        message_size: int,
        sizes: Sequence[int],
    ) -> None:
        self.messages[method] += message_size
        total = sum(gradient.square for gradient in statistics)
        self.errors[method] += sum(step.missed for step in steps) / total if total else 0.0
        tallies, states = self.tallies[method], self.states[method]
        for name, step, size, gradient in zip(names, steps, sizes, statistics, strict=True):
            states[name] = step.state
            tally = tallies.setdefault(name, Tally())
            tally.rounds += 1
            tally.bytes += size
            tally.dense_bytes += dense[name]
            tally.error += step.missed / gradient.square if gradient.square else 0.0
            tally.held += bool(step.head[0] & (Kind.USES | Kind.SETS))
            if recycles(step.head[0]):
                tally.recycled += 1
            else:
                tally.full_bytes += size

    def rows(self) -> Iterator[Row]:
        """Yield a row about all tensors, and one for each tensor, of every method."""
        if not self.rounds:
            return
        for compressor, tallies, sent, error in zip(
            self.compressors, self.tallies, self.messages, self.errors, strict=True
        ):
            make = functools.partial(
                Row,
                method=repr(compressor),
                delta=_delta(compressor),
                steps=self.steps,
                subspace=isinstance(compressor, LookBackSubspace),
            )
            of_all = list(tallies.values())
            yield make(
                tensor=None,
                rounds=self.rounds,
                recycled_share=sum(t.recycled for t in of_all) / sum(t.rounds for t in of_all),
                bytes_per_step=sent / self.rounds / self.steps,
                of_dense=sent / self.dense_bytes / self.steps,
                saved=_saved(of_all),
                never_held=_never_held(of_all),
                relative_error=math.sqrt(error / self.rounds),
            )
            for name, tally in tallies.items():
                yield make(
                    tensor=name,
                    rounds=tally.rounds,
                    recycled_share=tally.recycled / tally.rounds,
                    bytes_per_step=tally.bytes / tally.rounds / self.steps,
                    of_dense=tally.bytes / tally.dense_bytes / self.steps,
                    saved=_saved([tally]),
                    never_held=_never_held([tally]),
                    relative_error=math.sqrt(tally.error / tally.rounds),
                )

    def state_dict(self) -> dict[str, Any]:
        """Return states and counts; later rounds do not change them."""
        return {
            "rounds": self.rounds,
            "dense_bytes": self.dense_bytes,
            "states": self._saved_states(),
            "tallies": [
                {name: dict(vars(tally)) for name, tally in of.items()} for of in self.tallies
            ],
            "messages": list(self.messages),
            "errors": list(self.errors),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        self.rounds, self.dense_bytes = state["rounds"], state["dense_bytes"]
        self._load_states(state["states"])
        self.tallies = [
            {name: Tally(**tally) for name, tally in of.items()} for of in state["tallies"]
        ]
        self.messages, self.errors = list(state["messages"]), list(state["errors"])

    def _saved_states(self) -> list[dict[str, State]]:
        # The states of compressors are replaced, and never changed.
        return [dict(states) for states in self.states]

    def _load_states(self, saved: Sequence[Mapping[str, State]]) -> None:
        self.states = [dict(states) for states in saved]


class EncodedInner(NamedTuple):
    """A gradient, and what the inner compressor made of it."""

    name: str
    grad: Tensor
    statistics: GradientStatistics
    encoding: Encoding
    """`decoded` caches its products; `body` makes a body of the right size."""
    before: State
    """The inner compressor's state before the round."""


class LookBackState(NamedTuple):
    """State of LBGM for one tensor."""

    look_back: LookBack | None
    """Shared by thresholds as long as they decide alike."""
    inner: State
    """The inner compressor's state, the same at all thresholds."""


class LookBackReplay(Replay):
    """LBGM at several thresholds, over one inner compressor that runs once for all of them.

    Parameters
    ----------
    compressors
        LBGM at several thresholds, over the same inner compressor.
    steps
        As in `Replay`.
    exact
        If True, make every full payload; else make one of `SIZED_EVERY`, and take its size for
        those that follow.
    """

    compressors: list[LBGM]  # type: ignore[assignment]
    states: list[dict[str, LookBackState]]

    def __init__(self, compressors: Sequence[LBGM], steps: int = 1, exact: bool = False) -> None:
        super().__init__(compressors, steps)
        self._exact = exact
        self._sizes: dict[str, tuple[int, Tensor]] = {}

    def encode(
        self, grads: Mapping[str, Tensor], statistics: Sequence[GradientStatistics]
    ) -> list[list[Step]]:
        gradients = [
            self._encode_inner(name, grad, gradient)
            for (name, grad), gradient in zip(grads.items(), statistics, strict=True)
        ]
        # What a threshold decided from one look-back gradient holds for most others.
        known: dict[tuple[str, int], tuple[Decision, Step]] = {}
        steps = []
        for compressor, states in zip(self.compressors, self.states, strict=True):
            keys = []
            rest: dict[tuple[str, int], tuple[EncodedInner, LookBack | None]] = {}
            for gradient in gradients:
                state = states.get(gradient.name)
                look_back = None if state is None else state.look_back
                key = gradient.name, id(look_back)
                keys.append(key)
                if key not in known or not known[key][0].holds_at(_delta(compressor)):
                    rest[key] = gradient, look_back
            known.update(zip(rest, _look_back_steps(compressor, list(rest.values())), strict=True))
            steps.append([known[key][1] for key in keys])
        return steps

    def _encode_inner(
        self, name: str, grad: Tensor, statistics: GradientStatistics
    ) -> EncodedInner:
        inner, state = self.compressors[0].inner, self.states[0].get(name)
        before = (None if state is None else state.inner) or inner.initial_state(0)
        # The gradient is finite, as `Compressor.encode` requires.
        encoding = inner.encode(grad, before)
        lossless = isinstance(encoding.decoded, Dense) and encoding.decoded.tensor is grad
        encoding = encoding._replace(
            body=None if encoding.body is None else self._sized(name, encoding.body),
            decoded=statistics if lossless else CachedDecoded(encoding.decoded, grad),
        )
        return EncodedInner(name, grad, statistics, encoding, before)

    def _sized(self, name: str, body: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """Return a body of the size of this one, or of one of the last few of the tensor.

        Sizes that differ, as those of coded indices do, change slowly.
        """

        @functools.cache
        def stand_in() -> Tensor:
            age, last = self._sizes.get(name, (SIZED_EVERY, NOTHING))
            if self._exact or age == SIZED_EVERY:
                age, last = 0, NOTHING.expand(body().numel())
            self._sizes[name] = age + 1, last
            return last

        return stand_in

    def _saved_states(self) -> list[dict[str, State]]:
        return [
            {
                name: {"inner": state.inner}
                if state.look_back is None
                else {
                    "look_back": state.look_back.gradient,
                    "square_norm": state.look_back.square_norm,
                    "inner": state.inner,
                }
                for name, state in states.items()
            }
            for states in self.states
        ]

    def _load_states(self, saved: Sequence[Mapping[str, State]]) -> None:
        # Thresholds that shared a look-back gradient share it again.
        look_backs: dict[int, LookBack] = {}

        def loaded(state: State) -> LookBackState:
            look_back = None
            if "look_back" in state:
                gradient = state["look_back"]
                look_back = look_backs.setdefault(
                    id(gradient), LookBack(gradient, state["square_norm"])
                )
            return LookBackState(look_back, state.get("inner", {}))

        self.states = [{n: loaded(state) for n, state in states.items()} for states in saved]


def _look_back_steps(
    compressor: LBGM, gradients: Sequence[tuple[EncodedInner, LookBack | None]]
) -> list[tuple[Decision, Step]]:
    """Return what LBGM decides and sends for gradients with these look-back gradients."""
    decisions = compressor.decide(
        [gradient.encoding.decoded for gradient, _ in gradients],
        [look_back for _, look_back in gradients],
    )
    payloads = []
    applied: list[tuple[GradientStatistics, float, LookBack | None]] = []
    for (gradient, look_back), decision in zip(gradients, decisions, strict=True):
        inner, statistics = gradient.encoding, gradient.statistics
        if inner.head[0] & RAW or not math.isfinite(decision.square_norm):
            sent_raw = raw(compressor, gradient.grad, {})
            payloads.append(
                (sent_raw.head, sent_raw.body, LookBackState(look_back, gradient.before))
            )
            applied.append((statistics, 1.0, None))
            continue
        if not decision.recycled:
            look_back = LookBack(inner.decoded.dense(), decision.square_norm)
        payload = compressor.pack(decision, inner, gradient.grad.device)
        payloads.append((*payload, LookBackState(look_back, inner.state)))
        applied.append((statistics, decision.rho, look_back))
    return [
        (decision, Step(*payload, missed))
        for decision, payload, missed in zip(decisions, payloads, _missed(applied), strict=True)
    ]


def _missed(
    applied: Sequence[tuple[GradientStatistics, float, LookBack | None]],
) -> list[float]:
    """Return |g - rho l|^2 for each g, rho and l, with one synchronisation; 0 without l."""
    parts = [
        (None, 0.0) if look_back is None else gradient.products(look_back)
        for gradient, _, look_back in applied
    ]
    products = [product.double() for product, _ in parts if product is not None]
    values = iter(torch.stack(products).tolist() if products else [])
    return [
        0.0
        if product is None
        else max(0.0, gradient.square - 2 * rho * next(values) + rho * rho * square)
        for (gradient, rho, _), (product, square) in zip(applied, parts, strict=True)
    ]


class SubspaceReplay(Replay):
    """Look-back subspaces of several ranks."""

    def encode(
        self, grads: Mapping[str, Tensor], statistics: Sequence[GradientStatistics]
    ) -> list[list[Step]]:
        steps = []
        for compressor, states in zip(self.compressors, self.states, strict=True):
            before = [states.get(name, {}) for name in grads]
            encodings = compressor.encode_batch(list(grads.values()), before)
            products = []
            for encoding, grad in zip(encodings, grads.values(), strict=True):
                rest = encoding.decoded.missing_from(grad)
                products.append(dot64(rest, rest))
            steps.append(
                [
                    Step(encoding.head, encoding.body, encoding.state, missed)
                    for encoding, missed in zip(
                        encodings, torch.stack(products).tolist(), strict=True
                    )
                ]
            )
        return steps


def _delta(compressor: LBGM | LookBackSubspace) -> float:
    return float(compressor.delta)  # type: ignore[arg-type]  # A probe replays no NormBudget.


def _never_held(tallies: Sequence[Tally]) -> float:
    """Return the share of bytes in tensors of which nothing was held to look back at."""
    return sum(t.bytes for t in tallies if not t.held) / sum(t.bytes for t in tallies)


def _saved(tallies: Sequence[Tally]) -> float:
    """Return the share of bytes that recycling saves, of those that would be sent without it."""
    sent = without = 0.0
    for tally in tallies:
        sent += tally.bytes
        full = tally.rounds - tally.recycled
        without += tally.full_bytes / full * tally.rounds if full else tally.bytes
    return 1 - sent / without
