"""Methods played on a stream of gradients, without anything being sent."""

from __future__ import annotations

import abc
import functools
import math
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lbgm_compress.compressor import Encoding, State
from lbgm_compress.compressors.identity import Identity
from lbgm_compress.compressors.lbgm import LBGM, MARGIN, SQUARES
from lbgm_compress.compressors.look_back_subspace import LookBackSubspace
from lbgm_compress.decoded import Decoded, Dense
from lbgm_compress.endpoints import Sender
from lbgm_compress.probe.report import Row
from lbgm_compress.wire.message import Kind, Message, recycles

__all__ = ["LookBackPlay", "Play", "Seen", "SubspacePlay", "seen_of"]

RAW = int(Kind.RAW)
# Of so many full payloads of a tensor one is made, unless all are wanted: coding takes time.
SIZED_EVERY = 8
NOTHING = torch.zeros(1, dtype=torch.uint8)


class Seen(Decoded):
    """A gradient, whose inner products and copy are made once for all thresholds.

    Thresholds that sent the same gradient in full look back at one and the same tensor.
    """

    def __init__(self, grad: Tensor, square: Tensor, value: float) -> None:
        self.grad = grad
        self._copy: Tensor | None = None
        self._square = square
        self._products: dict[int, Tensor] = {}
        # Outside this range float32 has lost bits, or overflowed.
        self._precise = not SQUARES[0] < value < SQUARES[1]
        self.square = float(_dot64(grad, grad)) if self._precise else value

    def dense(self) -> Tensor:
        if self._copy is None:
            # Look-back gradients outlive the buffer that the gradient is in.
            self._copy = self.grad.clone(memory_format=torch.contiguous_format)
        return self._copy

    def dots(self, other: Tensor | None) -> tuple[Tensor, Tensor]:
        if other is None:
            return self._square, self._square
        # Look-back gradients live as long as the round, so that no identity comes again.
        if id(other) not in self._products:
            flat = self.grad.reshape(-1), other.reshape(-1)
            a, b = (f.float() if f.dtype.itemsize < 4 else f for f in flat)
            self._products[id(other)] = torch.dot(a, b)
        return self._square, self._products[id(other)]

    def missed(self, encoding: Encoding, before: State) -> tuple[Tensor | None, float, float]:
        """Return <g, l>, rho and |l|^2, which give |g - rho l|^2 of a round that began so.

        None in the place of the product stands for nothing that is missed.
        """
        rho, applied = 1.0, encoding.state
        if encoding.head[0] & RAW:
            return None, 0.0, 0.0
        if encoding.body is None:
            [rho], applied = struct.unpack("<f", encoding.head[1:]), before
        look_back = applied["look_back"]
        if look_back is self._copy:
            return None, 0.0, 0.0
        if self._precise:
            return _dot64(self.grad, look_back), rho, float(_dot64(look_back, look_back))
        return self.dots(look_back)[1], rho, applied["square_norm"]


def seen_of(grads: Sequence[Tensor]) -> list[Seen] | None:
    """Look at gradients, with one synchronisation; None if one has inf or nan."""
    squares = [Dense(grad).dots(None)[0].double() for grad in grads]
    values = torch.stack(squares).tolist()
    # A finite square means finite entries; only an infinite one needs a closer look.
    for grad, value in zip(grads, values, strict=True):
        if not math.isfinite(value) and not bool(grad.isfinite().all()):
            return None
    return [Seen(*of) for of in zip(grads, squares, values, strict=True)]


def _dot64(a: Tensor, b: Tensor) -> Tensor:
    return torch.dot(a.reshape(-1).double(), b.reshape(-1).double())


class _Once(Decoded):
    """What the inner compressor made of a gradient; as `Seen`, made dense and multiplied once."""

    def __init__(self, decoded: Decoded) -> None:
        self._decoded = decoded
        self._dense: Tensor | None = None
        self._products: dict[int, tuple[Tensor, Tensor]] = {}

    def dense(self) -> Tensor:
        if self._dense is None:
            self._dense = self._decoded.dense()
        return self._dense

    def dots(self, other: Tensor | None) -> tuple[Tensor, Tensor]:
        if id(other) not in self._products:
            self._products[id(other)] = self._decoded.dots(other)
        return self._products[id(other)]


@dataclass
class Tally:
    """What a method did to one tensor so far."""

    rounds: int = 0
    recycled: int = 0
    bytes: int = 0
    full_bytes: int = 0
    """Of the rounds in which it was not recycled."""
    dense_bytes: int = 0
    """Of one uncompressed payload a round."""
    error: float = 0.0
    """Sum over rounds of |g - applied|^2 / |g|^2."""


class Play(abc.ABC):
    """One stream of gradients, and the methods that are played on it."""

    def __init__(self, compressors: Sequence[LBGM | LookBackSubspace], steps: int = 1) -> None:
        self.compressors, self.steps = list(compressors), steps
        self.rounds = 0
        self.dense_bytes = 0
        self.states: list[dict[str, State]] = [{} for _ in compressors]
        self.tallies: list[dict[str, Tally]] = [{} for _ in compressors]
        self.messages = [0 for _ in compressors]
        self.errors = [0.0 for _ in compressors]
        self._dense: dict[tuple[str, ...], tuple[int, dict[str, int]]] = {}

    def round(self, grads: Mapping[str, Tensor], seen: Sequence[Seen]) -> None:
        """Play one round; the gradients may change afterwards."""
        if not self.compressors:
            return
        names = list(grads)
        made = [self.encode(which, grads, seen) for which in range(len(self.compressors))]
        # Nothing is counted before everything is made: an error leaves things as they were.
        total, dense = self._dense_sizes(grads)
        sizes: dict[tuple[int, ...], tuple[int, list[int]]] = {}
        for which, (encodings, missed) in enumerate(made):
            key = tuple(map(id, encodings))
            if key not in sizes:
                bodies = [None if e.body is None else e.body() for e in encodings]
                message = Message(0, 0, 0, [encoding.head for encoding in encodings], bodies)
                sizes[key] = message.numel(), message.sizes()
            self._count(which, names, encodings, seen, missed, dense, *sizes[key])
        self.rounds += 1
        self.dense_bytes += total

    @abc.abstractmethod
    def encode(
        self, which: int, grads: Mapping[str, Tensor], seen: Sequence[Seen]
    ) -> tuple[list[Encoding], list[float]]:
        """Return one method's encodings, and |g - applied|^2 of each."""

    def _dense_sizes(self, grads: Mapping[str, Tensor]) -> tuple[int, dict[str, int]]:
        key = tuple(grads)
        if key not in self._dense:
            sender = Sender(Identity())
            size = sender.compress(dict(grads)).numel()
            self._dense[key] = size, {name: r.bytes for name, r in sender.report().items()}
        return self._dense[key]

    def _count(
        self,
        which: int,
        names: Sequence[str],
        encodings: Sequence[Encoding],
        seen: Sequence[Seen],
        missed: Sequence[float],
        dense: Mapping[str, int],
        message: int,
        sizes: Sequence[int],
    ) -> None:
        self.messages[which] += message
        total = sum(gradient.square for gradient in seen)
        self.errors[which] += sum(missed) / total if total else 0.0
        tallies, states = self.tallies[which], self.states[which]
        for name, encoding, size, gradient, lost in zip(
            names, encodings, sizes, seen, missed, strict=True
        ):
            states[name] = encoding.state
            tally = tallies.setdefault(name, Tally())
            tally.rounds += 1
            tally.bytes += size
            tally.dense_bytes += dense[name]
            tally.error += lost / gradient.square if gradient.square else 0.0
            if recycles(encoding.head[0]):
                tally.recycled += 1
            else:
                tally.full_bytes += size

    def rows(self) -> Iterator[Row]:
        """Yield a row about all tensors, and one for each, of every method."""
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
            of = list(tallies.values())
            yield make(
                tensor=None,
                rounds=self.rounds,
                recycled_share=sum(t.recycled for t in of) / sum(t.rounds for t in of),
                bytes_per_step=sent / self.rounds / self.steps,
                of_dense=sent / self.dense_bytes / self.steps,
                saved=_saved(of),
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
                    relative_error=math.sqrt(tally.error / tally.rounds),
                )

    def state_dict(self) -> dict[str, Any]:
        """Return what was played; later rounds do not change it."""
        return {
            "rounds": self.rounds,
            "dense_bytes": self.dense_bytes,
            # The states of compressors are replaced, and never changed.
            "states": [dict(states) for states in self.states],
            "tallies": [
                {name: dict(vars(tally)) for name, tally in of.items()} for of in self.tallies
            ],
            "messages": list(self.messages),
            "errors": list(self.errors),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        self.rounds, self.dense_bytes = state["rounds"], state["dense_bytes"]
        self.states = [dict(states) for states in state["states"]]
        self.tallies = [
            {name: Tally(**tally) for name, tally in of.items()} for of in state["tallies"]
        ]
        self.messages, self.errors = list(state["messages"]), list(state["errors"])


class LookBackPlay(Play):
    """LBGM at several thresholds, over one inner compressor that runs once for all."""

    compressors: list[LBGM]  # type: ignore[assignment]

    def __init__(self, compressors: Sequence[LBGM], steps: int = 1, exact: bool = False) -> None:
        super().__init__(compressors, steps)
        self._exact = exact
        self._sizes: dict[str, tuple[int, Tensor]] = {}
        self._made: list[Encoding] = []
        self._found: dict[tuple[str, int], tuple[Encoding, float]] = {}

    def round(self, grads: Mapping[str, Tensor], seen: Sequence[Seen]) -> None:
        inner, states = self.compressors[0].inner, self.states[0]
        self._made, self._found = [], {}
        for (name, grad), gradient in zip(grads.items(), seen, strict=True):
            state = states.get(name, {}).get("inner") or inner.initial_state(0)
            # Gradients are known to be finite here.
            encoding = inner.encode(grad, state)
            lossless = isinstance(encoding.decoded, Dense) and encoding.decoded.tensor is grad
            body = None if encoding.body is None else self._sized(name, encoding.body)
            decoded = gradient if lossless else _Once(encoding.decoded)
            self._made.append(encoding._replace(body=body, decoded=decoded))
        super().round(grads, seen)
        self._made, self._found = [], {}

    def encode(
        self, which: int, grads: Mapping[str, Tensor], seen: Sequence[Seen]
    ) -> tuple[list[Encoding], list[float]]:
        # Thresholds that decide alike share their states, and what comes of them.
        states, delta = self.states[which], _delta(self.compressors[which])
        keys = [(name, id(states.get(name))) for name in grads]
        rest = [i for i, key in enumerate(keys) if not self._holds(self._found.get(key), delta)]
        if rest:
            tensors = list(grads.values())
            some = [tensors[i] for i in rest]
            before = [states.get(keys[i][0], {}) for i in rest]
            made = [self._made[i] for i in rest]
            encodings = self.compressors[which].encode_over(made, some, before)
            missed = self._missed([seen[i] for i in rest], encodings, before)
            self._found.update(
                zip((keys[i] for i in rest), zip(encodings, missed, strict=True), strict=True)
            )
        found = [self._found[key] for key in keys]
        return [encoding for encoding, _ in found], [missed for _, missed in found]

    def _holds(self, found: tuple[Encoding, float] | None, delta: float) -> bool:
        """Whether what one threshold came to is what another comes to from the same state."""
        if found is None:
            return False
        phase_error = found[0].phase_error
        if phase_error is None:
            return True
        if recycles(found[0].head[0]):
            return phase_error < delta - MARGIN
        return phase_error > delta + MARGIN

    def _missed(
        self, seen: Sequence[Seen], encodings: Sequence[Encoding], before: Sequence[State]
    ) -> list[float]:
        parts = [
            gradient.missed(encoding, state)
            for gradient, encoding, state in zip(seen, encodings, before, strict=True)
        ]
        products = [product.double() for product, _, _ in parts if product is not None]
        values = iter(torch.stack(products).tolist() if products else [])
        return [
            0.0
            if product is None
            else max(0.0, gradient.square - 2 * rho * next(values) + rho * rho * square)
            for gradient, (product, rho, square) in zip(seen, parts, strict=True)
        ]

    def _sized(self, name: str, body: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """Return a body of the size of this one, or of one of the last few of the tensor.

        Where sizes differ at all, as those of coded indices do, they change slowly.
        """

        @functools.cache
        def stand_in() -> Tensor:
            age, last = self._sizes.get(name, (SIZED_EVERY, NOTHING))
            if self._exact or age == SIZED_EVERY:
                age, last = 0, NOTHING.expand(body().numel())
            self._sizes[name] = age + 1, last
            return last

        return stand_in


class SubspacePlay(Play):
    """Look-back subspaces of several ranks."""

    def encode(
        self, which: int, grads: Mapping[str, Tensor], seen: Sequence[Seen]
    ) -> tuple[list[Encoding], list[float]]:
        states = [self.states[which].get(name, {}) for name in grads]
        encodings = self.compressors[which].encode_batch(list(grads.values()), states)
        products = []
        for encoding, grad in zip(encodings, grads.values(), strict=True):
            rest = encoding.decoded.missing_from(grad)
            products.append(_dot64(rest, rest))
        return encodings, torch.stack(products).tolist()


def _delta(compressor: LBGM | LookBackSubspace) -> float:
    return float(compressor.delta)  # type: ignore[arg-type]  # A probe plays no NormBudget.


def _saved(tallies: Sequence[Tally]) -> float:
    """Return the share of the bytes that recycling saves, of what would be sent without it."""
    sent = without = 0.0
    for tally in tallies:
        sent += tally.bytes
        full = tally.rounds - tally.recycled
        without += tally.full_bytes / full * tally.rounds if full else tally.bytes
    return 1 - sent / without
