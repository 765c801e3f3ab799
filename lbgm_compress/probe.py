"""What LBGM and look-back subspaces would save in a training that runs without them.

``python -m lbgm_compress.probe script.py [args]`` watches an unmodified script that steps a torch
optimizer, and prints the report when the script ends.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import functools
import gc
import math
import os
import runpy
import struct
import sys
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from lbgm_compress.compressor import Compressor, Encoding, State, check_gradient
from lbgm_compress.compressors.identity import Identity
from lbgm_compress.compressors.lbgm import LBGM
from lbgm_compress.compressors.look_back_subspace import LookBackSubspace
from lbgm_compress.compressors.norm_budget import NormBudget
from lbgm_compress.decoded import Decoded, Dense
from lbgm_compress.endpoints import Sender
from lbgm_compress.expression import parse_compressor
from lbgm_compress.wire.message import Kind, Message

__all__ = ["DELTAS", "LookBackProbe", "Report", "Row"]

DELTAS = (0.01, 0.05, 0.1, 0.2, 0.5)
RANKS = (1, 2, 4, 8, 16)
# Powers of two, so that each sum is made of two of the one before.
AVERAGED = (2, 4, 8, 16)
FORMAT = 1
# Kinds of payload that look back and set nothing new.
RECYCLED = frozenset(int(kind) for kind in (Kind.USES, Kind.USES | Kind.BODY))
# Of so many full payloads of a tensor one is made, unless all are wanted: coding takes time.
SIZED_EVERY = 8
_NOTHING = torch.zeros(1, dtype=torch.uint8)
# Shares of the bytes above which a saving is worth a line of advice.
WORTH = 0.3


@dataclass(frozen=True)
class Row:
    """What one method would have done to one tensor, or to all of them."""

    method: str
    """The expression that builds the compressor."""
    steps: int
    """How many steps' gradients are averaged before they are sent."""
    tensor: str | None
    """The tensor's name; None for all together."""
    rounds: int
    """Rounds that were played, each of `steps` steps."""
    recycled_share: float
    """Share of the rounds in which the tensor is recycled; of all, the mean over tensors."""
    bytes_per_step: float
    """Uplink; of all, that of whole messages."""
    of_dense: float
    """Share of what sending each step's gradient uncompressed would take."""
    relative_error: float
    """Root mean square over rounds of |g - applied| / |g|."""


@dataclass(frozen=True)
class Report:
    """What a probe saw; `str` gives it as a page of text."""

    rows: Sequence[Row]
    rounds: int
    """Gradients seen."""
    skipped: int
    """Gradients with inf or nan, which are sent as they are and left out here."""
    dense_bytes: int
    """What one step's gradients weigh uncompressed, as a message."""
    seconds: float
    """What the probe took of the time since it was attached."""
    share_of_time: float
    """The same, as a share."""
    advice: str
    """One sentence."""

    def all_tensors(self) -> list[Row]:
        """Return the rows about all tensors together."""
        return [row for row in self.rows if row.tensor is None]

    def write_csv(self, file: str | os.PathLike[str]) -> None:
        """Write all rows as CSV."""
        names = list(Row.__dataclass_fields__)
        with Path(file).open("w", newline="") as lines:
            writer = csv.writer(lines, lineterminator="\n")
            writer.writerow(names)
            for row in self.rows:
                values = (getattr(row, name) for name in names)
                writer.writerow("" if value is None else value for value in values)

    def __str__(self) -> str:
        """Lay out the rows about all tensors, the shares of each tensor, and the advice."""
        if not self.rounds:
            return f"LookBackProbe: {self.advice}"
        dense = _human(self.dense_bytes)
        lines = [
            f"LookBackProbe: {self.rounds} gradients of {dense} watched"
            + (f", {self.skipped} with inf or nan left out" if self.skipped else "")
            + f"; watching took {self.share_of_time:.1%} of the time",
            "",
        ]
        whole = self.all_tensors()
        table: list[Sequence[str]] = [
            ("would send", "rounds", "recycled", "uplink a step", "of dense", "error")
        ]
        for row in whole:
            averaged = "" if row.steps == 1 else f", {row.steps} steps averaged"
            table.append(
                (
                    row.method + averaged,
                    str(row.rounds),
                    f"{row.recycled_share:.1%}",
                    _human(row.bytes_per_step),
                    f"{row.of_dense:.2%}",
                    f"{row.relative_error:.1%}",
                )
            )
        lines += _aligned(table)
        methods = [row.method for row in whole if row.steps == 1 and row.method.startswith("LBGM")]
        tensors = list(dict.fromkeys(row.tensor for row in self.rows if row.tensor is not None))
        shares = {
            (row.tensor, row.method): f"{row.recycled_share:.1%}"
            for row in self.rows
            if row.steps == 1
        }
        lines += ["", "recycled, tensor by tensor"]
        short = [method.split("delta=")[-1].rstrip(")") for method in methods]
        table = [("delta", *("0.2" if text.startswith("LBGM(") else text for text in short))]
        table += [(name, *(shares.get((name, m), "") for m in methods)) for name in tensors]
        lines += _aligned(table)
        return "\n".join([*lines, "", self.advice])


class LookBackProbe:
    """Watches the gradients of a training and says what looking back would save.

    It plays LBGM (arXiv 2202.00280, algorithm 1) at several thresholds, `LookBackSubspace` at
    several ranks, and LBGM on gradients averaged over several steps, all at once, on the gradients
    that pass by. The training is left as it is: this is the open loop. With compression the model
    would take other steps, and see gradients a little different from these.

    Attach it before the first backward pass; a gradient is taken when backward passes have
    accumulated it, before anything averages or clips it, and a round ends when an optimizer steps.
    On a rank of DistributedDataParallel or Horovod it is thus that rank's own gradient, which is
    what it would send. Parameters that get no gradient in a step are left out of that round.

    It costs a few passes over the gradients, one more for each look-back gradient that differs
    between thresholds, and what `inner` takes. Averages and subspaces cost more, and are played on
    some of the steps alone (`cost`), as if those were all: where gradients change slowly, that
    makes them look worse than they are. Memory: one model, another for each threshold at most, and
    two for each of `averaged`.

    Parameters
    ----------
    model
        The module whose parameters are watched (the one inside, or the wrapped one), or pairs of
        names and parameters.
    deltas
        Thresholds of LBGM, 0 to 1.
    inner
        The compressor under LBGM; it must not look back itself.
    ranks
        Ranks of `LookBackSubspace`; empty for none.
    averaged
        How many steps' gradients to average before they are sent: powers of two, ascending from 2;
        empty for none. They are played at the threshold nearest to 0.2.
    cost
        Share of the time that may go into watching. Thresholds are played on every step, whatever
        they take; averages and subspaces have the rest, half each, and a tenth of the whole at
        least. None plays all on every step, and makes every payload; else one of eight is made, and
        its size is that of the next seven.
    updates
        Take one update a ``with`` block in the place of gradients: what the parameters have moved
        by in it, as a federated client sends it. The model then needs no optimizer of torch's.
    file
        Where to keep what was seen, so that the next probe with this file goes on: for clients that
        are made anew in each round. It is read when the probe is made, and written by `close`.

    Raises
    ------
    TypeError, ValueError
        If an argument is not what it should be, or the file is that of another probe.

    Examples
    --------
    >>> import torch
    >>> model = torch.nn.Linear(20, 5)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> probe = LookBackProbe(model)
    >>> for step in range(3):
    ...     optimizer.zero_grad()
    ...     model(torch.ones(8, 20)).square().mean().backward()
    ...     optimizer.step()
    >>> [row.recycled_share for row in probe.report().all_tensors()][:2]
    [0.6666666666666666, 0.6666666666666666]
    """

    def __init__(
        self,
        model: nn.Module | Iterable[tuple[str, Tensor]],
        deltas: Sequence[float] = DELTAS,
        inner: Compressor = Identity(),  # noqa: B008  frozen, and so safe to share
        *,
        ranks: Sequence[int] = RANKS,
        averaged: Sequence[int] = AVERAGED,
        cost: float | None = 0.1,
        updates: bool = False,
        file: str | os.PathLike[str] | None = None,
    ) -> None:
        named = model.named_parameters() if isinstance(model, nn.Module) else model
        self._parameters = {name: p for name, p in named if p.requires_grad}
        if not self._parameters:
            raise ValueError("there are no parameters to watch: none requires a gradient")
        for name, parameter in self._parameters.items():
            check_gradient(parameter, name)
        if not deltas:
            raise ValueError("deltas is empty: give at least one threshold, such as 0.2")
        if list(averaged) != [2 ** (i + 1) for i in range(len(averaged))]:
            raise ValueError(f"averaged must be 2, 4, 8 and so on, not {tuple(averaged)}")
        if cost is not None and not 0 < cost < math.inf:
            raise ValueError(f"cost must be above 0, or None, not {cost}")
        if any(isinstance(delta, NormBudget) for delta in deltas):
            raise ValueError("deltas are numbers from 0 to 1; a NormBudget is not played")
        self._nearest = min(range(len(deltas)), key=lambda i: abs(deltas[i] - 0.2))
        compressors = [LBGM(inner, delta) for delta in deltas]
        exact = cost is None
        self._play = _LookBackPlay(compressors, exact=exact)
        one = [compressors[self._nearest]]
        self._averages = [_LookBackPlay(one, steps, exact) for steps in averaged]
        self._subspaces = _SubspacePlay([LookBackSubspace(rank) for rank in ranks])
        self._sums: list[dict[str, Tensor] | None] = [None for _ in averaged]
        self._cost, self._updates = cost, updates
        self._file = None if file is None else Path(file)
        self._seen = self._skipped = 0
        self._earlier = self._seconds = 0.0
        self._extra = {"averages": 0.0, "subspaces": 0.0}
        self._last = dict(self._extra)
        self._began = time.perf_counter()
        self._buffers: dict[str, Tensor] = {}
        self._fresh: dict[str, None] = {}
        self._start: dict[str, Tensor] = {}
        self._handles: list[RemovableHandle] = []
        if self._file is not None and self._file.exists():
            self.load_state_dict(torch.load(self._file, weights_only=True))
        if not updates:
            self._attach()

    # --- watching --------------------------------------------------------------------------------

    def observe(self, grads: Mapping[str, Tensor]) -> None:
        """Take one round's gradients, or updates, by name: for a training without an optimizer.

        Raises
        ------
        TypeError, ValueError
            If they are not gradients of the watched parameters. Nothing is counted then.
        """
        for name, grad in grads.items():
            if name not in self._parameters:
                raise ValueError(f"the probe watches no parameter {name!r}")
            check_gradient(grad, name)
            expected = self._parameters[name].shape
            if grad.shape != expected:
                raise ValueError(
                    f"the gradient {name!r} has shape {tuple(grad.shape)}, expected "
                    f"{tuple(expected)}"
                )
        if not grads:
            raise ValueError("there are no gradients")
        with self._timed():
            self._round({name: grads[name].detach() for name in sorted(grads)})

    def close(self) -> None:
        """Stop watching, and write the file, if there is to be one; the report stays."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if self._file is not None:
            temporary = self._file.with_name(f".{self._file.name}.{os.getpid()}")
            torch.save(self.state_dict(), temporary)
            os.replace(temporary, self._file)

    def __enter__(self) -> LookBackProbe:
        """Begin an update, if `updates` are watched."""
        if self._updates:
            with self._timed():
                self._start = {name: p.detach().clone() for name, p in self._parameters.items()}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Take the update, unless an error ended the block, and close."""
        if self._updates and kind is None:
            self.observe({n: self._start[n] - p.detach() for n, p in self._parameters.items()})
        self._start = {}
        self.close()

    def _attach(self) -> None:
        """Copy gradients when they are complete, and end a round when an optimizer steps."""
        # What the hooks hold must not keep the probe alive.
        this = weakref.ref(self)
        identities = {id(parameter) for parameter in self._parameters.values()}

        def copy(name: str) -> Callable[[Tensor], None]:
            def hook(parameter: Tensor) -> None:
                probe = this()
                if probe is not None and parameter.grad is not None:
                    probe._copy(name, parameter.grad)

            return hook

        def stepped(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            probe = this()
            if probe is None or not probe._fresh:
                return
            groups = optimizer.param_groups
            if any(id(parameter) in identities for g in groups for parameter in g["params"]):
                probe._step()

        for name, parameter in self._parameters.items():
            handle = parameter.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
                copy(name)
            )
            self._handles.append(handle)
        self._handles.append(register_optimizer_step_pre_hook(stepped))
        for handle in self._handles:
            weakref.finalize(self, handle.remove)

    def _copy(self, name: str, grad: Tensor) -> None:
        start = time.perf_counter()
        if grad.layout == torch.strided:
            if name not in self._buffers:
                self._buffers[name] = torch.empty_like(grad, memory_format=torch.contiguous_format)
            self._buffers[name].copy_(grad.detach())
            self._fresh[name] = None
        self._seconds += time.perf_counter() - start

    def _step(self) -> None:
        with self._timed():
            names = sorted(self._fresh)
            self._fresh = {}
            self._round({name: self._buffers[name] for name in names})

    @contextlib.contextmanager
    def _timed(self) -> Iterator[None]:
        start = time.perf_counter()
        with torch.no_grad():
            yield
        self._seconds += time.perf_counter() - start

    def _round(self, grads: dict[str, Tensor]) -> None:
        self._seen += 1
        seen = [_Seen(grad) for grad in grads.values()]
        # A finite square means finite entries; only an infinite one needs a closer look.
        for gradient in seen:
            if not math.isfinite(gradient.square) and not bool(gradient.grad.isfinite().all()):
                self._skipped += 1
                return
        self._play.round(grads, seen)
        self._average(grads)
        if self._affordable("subspaces"):
            with self._spent("subspaces"):
                self._subspaces.round(grads, seen)

    def _affordable(self, what: str) -> bool:
        """Whether more of this may be played: half of what the thresholds leave of the cost."""
        if self._cost is None:
            return True
        most = self._cost * (time.perf_counter() - self._began)
        others = sum(self._extra.values())
        left = max(most - (self._seconds - others), most / 10)
        # As much again as the last time, which is nothing the first time.
        return self._extra[what] + self._last[what] <= left / 2

    @contextlib.contextmanager
    def _spent(self, what: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._last[what] = time.perf_counter() - start
        self._extra[what] += self._last[what]

    def _average(self, grads: dict[str, Tensor]) -> None:
        """Add up pairs, pairs of pairs and so on, and play each sum that is complete."""
        own = False
        for level, play in enumerate(self._averages):
            held = self._sums[level]
            if held is None or held.keys() != grads.keys():
                self._sums[level] = grads if own else {n: g.clone() for n, g in grads.items()}
                return
            for name, grad in grads.items():
                held[name] += grad
            self._sums[level] = None
            grads, own = held, True
            if self._affordable("averages"):
                with self._spent("averages"):
                    play.round(grads, [_Seen(grad) for grad in grads.values()])

    # --- what was seen ---------------------------------------------------------------------------

    def report(self) -> Report:
        """Return what was seen so far."""
        dense = self._dense_bytes()
        plays: list[_Play] = [self._play, *self._averages, self._subspaces]
        rows = [row for play in plays for row in play.rows(dense)]
        elapsed = self._earlier + time.perf_counter() - self._began
        return Report(
            rows=rows,
            rounds=self._seen,
            skipped=self._skipped,
            dense_bytes=dense[None],
            seconds=self._seconds,
            share_of_time=self._seconds / max(elapsed, 1e-9),
            advice=self._advice(rows),
        )

    def _dense_bytes(self) -> dict[str | None, int]:
        sender = Sender(Identity())
        message = sender.compress({n: p.detach() for n, p in self._parameters.items()})
        sizes: dict[str | None, int] = {n: r.bytes for n, r in sender.report().items()}
        return {**sizes, None: message.numel()}

    def _advice(self, rows: Sequence[Row]) -> str:
        if self._play.rounds < 2:
            return (
                f"{self._play.rounds} gradients were seen, and it takes two to compare: was the "
                "probe attached before the backward pass, and does an optimizer of torch's step?"
            )
        whole = [row for row in rows if row.tensor is None]
        count = len(self._play.compressors)
        plain, whole = whole[:count], whole[count:]
        averages = [
            (play, next(row for row in whole if row.steps == play.steps))
            for play in self._averages
            if play.rounds > 1
        ]
        subspaces = [row for row in whole if row.method.startswith("LookBackSubspace")]
        here, saved = plain[self._nearest], self._play.saved(self._nearest)
        if saved >= WORTH:
            return (
                f"{here.method} would recycle {here.recycled_share:.0%} of the tensors and save "
                f"{saved:.0%} of the bytes, with gradients off by {here.relative_error:.0%}: try "
                "it, and compare accuracies."
            )
        said = f"At this batch size {here.recycled_share:.0%} of the tensors recycle"
        for play, row in averages:
            if play.saved(0) >= max(WORTH, 2 * saved):
                return (
                    f"{said}; averaging gradients over {row.steps} steps before sending would "
                    f"make it {row.recycled_share:.0%}, and save {play.saved(0):.0%} of the bytes "
                    f"of a message, of which there are {row.steps} times fewer."
                )
        if averages:
            last = averages[-1][1]
            said += f", and {last.recycled_share:.0%} averaged over {last.steps} steps"
        useful = [row for row in subspaces if row.rounds > 1 and row.of_dense < 0.5]
        if not useful:
            return (
                f"{said}: looking back saves little here. Take ErrorFeedback(TopK(0.01)) or larger "
                "batches."
            )
        best = min(useful, key=lambda row: (row.relative_error > 0.9, row.of_dense))
        return (
            f"{said}: LBGM has little to recycle. ErrorFeedback({best.method}) would send about "
            f"{best.of_dense:.1%} of the dense bytes, and have to make up for "
            f"{best.relative_error:.0%} of each gradient: try it, and compare accuracies."
        )

    def state_dict(self) -> dict[str, Any]:
        """Return what was seen as a nested dict of tensors and numbers, for `torch.save`."""
        plays: list[_Play] = [self._play, *self._averages, self._subspaces]
        return {
            "format": FORMAT,
            "methods": [repr(c) for play in plays for c in play.compressors],
            "seen": self._seen,
            "skipped": self._skipped,
            "seconds": self._seconds,
            "elapsed": self._earlier + time.perf_counter() - self._began,
            "plays": [play.state_dict() for play in plays],
            "sums": [{} if held is None else held for held in self._sums],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned.

        Raises
        ------
        ValueError
            If it is that of a probe with other arguments, or no such state. What was seen is as it
            was.
        """
        plays: list[_Play] = [self._play, *self._averages, self._subspaces]
        methods = [repr(c) for play in plays for c in play.compressors]
        if not isinstance(state, Mapping) or state.get("format") != FORMAT:
            raise ValueError("this is not the state of a LookBackProbe of this release")
        if state["methods"] != methods or len(state["sums"]) != len(self._sums):
            raise ValueError(
                f"the state is that of a probe that plays {', '.join(state['methods'])}, and this "
                f"one plays {', '.join(methods)}: use the same arguments, or another file"
            )
        known = {name for kept in state["plays"] for of in kept["tallies"] for name in of}
        if known - set(self._parameters):
            name = min(known - set(self._parameters))
            raise ValueError(f"the state is that of a model with a parameter {name!r}")
        for play, kept in zip(plays, state["plays"], strict=True):
            play.load_state_dict(kept)
        self._sums = [dict(held) or None for held in state["sums"]]
        self._seen, self._skipped = state["seen"], state["skipped"]
        self._seconds, self._earlier = state["seconds"], state["elapsed"]


# --- playing ------------------------------------------------------------------------------------


@dataclass
class _Tally:
    """What a method did to one tensor so far."""

    rounds: int = 0
    recycled: int = 0
    bytes: int = 0
    error: float = 0.0
    """Sum over rounds of |g - applied|^2 / |g|^2."""
    full_bytes: int = 0


class _Play:
    """One stream of gradients, and the methods that are played on it."""

    def __init__(self, compressors: Sequence[Compressor], steps: int = 1) -> None:
        self.compressors, self.steps = list(compressors), steps
        self.rounds = 0
        self.states: list[dict[str, State]] = [{} for _ in compressors]
        self.tallies: list[dict[str, _Tally]] = [{} for _ in compressors]
        self.messages = [0 for _ in compressors]
        self.errors = [0.0 for _ in compressors]

    def count(
        self,
        which: int,
        names: Sequence[str],
        encodings: Sequence[Encoding],
        seen: Sequence[_Seen],
        missed: Sequence[float],
    ) -> None:
        """Add a round of one method, which missed these |g - applied|^2."""
        bodies = [None if encoding.body is None else encoding.body() for encoding in encodings]
        message = Message(0, 0, 0, [encoding.head for encoding in encodings], bodies)
        self.messages[which] += message.numel()
        total = sum(gradient.square for gradient in seen)
        self.errors[which] += sum(missed) / total if total else 0.0
        tallies, states = self.tallies[which], self.states[which]
        for name, encoding, size, gradient, lost in zip(
            names, encodings, message.sizes(), seen, missed, strict=True
        ):
            states[name] = encoding.state
            tally = tallies.setdefault(name, _Tally())
            tally.rounds += 1
            tally.bytes += size
            tally.error += lost / gradient.square if gradient.square else 0.0
            if encoding.head[0] in RECYCLED:
                tally.recycled += 1
            else:
                tally.full_bytes += size

    def rows(self, dense: Mapping[str | None, int]) -> Iterator[Row]:
        """Yield a row about all tensors, and one for each, of every method."""
        if not self.rounds:
            return
        for compressor, tallies, total, error in zip(
            self.compressors, self.tallies, self.messages, self.errors, strict=True
        ):

            def row(name: str | None, rounds: int, share: float, total: int, error: float) -> Row:
                uplink = total / rounds / self.steps
                return Row(
                    repr(compressor),  # noqa: B023  called within this turn
                    self.steps,
                    name,
                    rounds,
                    share,
                    uplink,
                    uplink / dense[name],
                    math.sqrt(error / rounds),
                )

            recycled = sum(tally.recycled for tally in tallies.values())
            count = sum(tally.rounds for tally in tallies.values())
            yield row(None, self.rounds, recycled / count, total, error)
            for name, tally in tallies.items():
                share = tally.recycled / tally.rounds
                yield row(name, tally.rounds, share, tally.bytes, tally.error)

    def saved(self, which: int) -> float:
        """Return the share of the bytes that recycling saves, of what would be sent without it."""
        sent = without = 0.0
        for tally in self.tallies[which].values():
            sent += tally.bytes
            if tally.rounds > tally.recycled:
                without += tally.full_bytes / (tally.rounds - tally.recycled) * tally.rounds
        return 1 - sent / without if without else 0.0

    def state_dict(self) -> dict[str, Any]:
        return {
            "rounds": self.rounds,
            "states": self.states,
            "tallies": [
                {name: dict(vars(tally)) for name, tally in of.items()} for of in self.tallies
            ],
            "messages": self.messages,
            "errors": self.errors,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.rounds = state["rounds"]
        self.states = [dict(states) for states in state["states"]]
        self.tallies = [
            {name: _Tally(**tally) for name, tally in of.items()} for of in state["tallies"]
        ]
        self.messages, self.errors = list(state["messages"]), list(state["errors"])


class _Seen(Decoded):
    """A gradient, whose inner products and copy are made once for all thresholds.

    Thresholds that sent the same gradient in full look back at one and the same tensor.
    """

    def __init__(self, grad: Tensor) -> None:
        self.grad = grad
        self._copy: Tensor | None = None
        self._square = Dense(grad).dots(None)[0]
        self._products: dict[int, Tensor] = {}
        self.square = float(self._square)

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

    def missed(self, encoding: Encoding, before: State) -> float:
        """Return |g - applied|^2 of a round of LBGM that began with this state."""
        if encoding.head[0] & Kind.RAW:
            return 0.0
        rho, applied = 1.0, encoding.state
        if encoding.body is None:
            [rho], applied = struct.unpack("<f", encoding.head[1:]), before
        if applied["look_back"] is self._copy:
            return 0.0
        product = float(self.dots(applied["look_back"])[1])
        missed: float = self.square - 2 * rho * product + rho * rho * applied["square_norm"]
        return max(0.0, missed)


class _Once(Decoded):
    """What the inner compressor made of a gradient; as `_Seen`, made dense and multiplied once."""

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


class _LookBackPlay(_Play):
    """LBGM at several thresholds, over one inner compressor that runs once for all."""

    compressors: list[LBGM]  # type: ignore[assignment]

    def __init__(self, compressors: Sequence[LBGM], steps: int = 1, exact: bool = False) -> None:
        super().__init__(compressors, steps)
        self._exact = exact
        self._sizes: dict[str, tuple[int, Tensor]] = {}

    def _sized(self, name: str, body: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """Return a body of the size of this one, or of one of the last few of the tensor.

        Where sizes differ at all, as those of coded indices do, they change slowly.
        """

        @functools.cache
        def stand_in() -> Tensor:
            age, last = self._sizes.get(name, (SIZED_EVERY, _NOTHING))
            if self._exact or age == SIZED_EVERY:
                age, last = 0, _NOTHING.expand(body().numel())
            self._sizes[name] = age + 1, last
            return last

        return stand_in

    def round(self, grads: Mapping[str, Tensor], seen: Sequence[_Seen]) -> None:
        """Play one round; the gradients may change afterwards."""
        self.rounds += 1
        names, tensors = list(grads), list(grads.values())
        inner, before = self.compressors[0].inner, self.states[0]
        made = []
        for name, grad, gradient in zip(names, tensors, seen, strict=True):
            state = before.get(name, {}).get("inner") or inner.initial_state(0)
            encoding = inner.encode(grad, state)
            lossless = isinstance(encoding.decoded, Dense) and encoding.decoded.tensor is grad
            body = None if encoding.body is None else self._sized(name, encoding.body)
            decoded = gradient if lossless else _Once(encoding.decoded)
            made.append(encoding._replace(body=body, decoded=decoded))
        for which, compressor in enumerate(self.compressors):
            states = [self.states[which].get(name, {}) for name in names]
            encodings = compressor.encode_over(made, tensors, states)
            missed = [
                gradient.missed(encoding, state)
                for gradient, encoding, state in zip(seen, encodings, states, strict=True)
            ]
            self.count(which, names, encodings, seen, missed)


class _SubspacePlay(_Play):
    """Look-back subspaces of several ranks."""

    def round(self, grads: Mapping[str, Tensor], seen: Sequence[_Seen]) -> None:
        """Play one round; the gradients may change afterwards."""
        if not self.compressors:
            return
        self.rounds += 1
        names, tensors = list(grads), list(grads.values())
        for which, compressor in enumerate(self.compressors):
            states = [self.states[which].get(name, {}) for name in names]
            encodings = compressor.encode_batch(tensors, states)
            missed = [
                float(Dense(encoding.decoded.missing_from(grad)).dots(None)[0])
                for encoding, grad in zip(encodings, tensors, strict=True)
            ]
            self.count(which, names, encodings, seen, missed)


def _human(number: float) -> str:
    for size, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.0f} bytes"


def _aligned(table: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
    return [
        "  ".join(
            [
                line[0].ljust(widths[0]),
                *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True)),
            ]
        )
        for line in table
    ]


# --- the command --------------------------------------------------------------------------------


class _Watch:
    """Makes a probe for each optimizer that steps."""

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        self.arguments = arguments
        self.probes: dict[int, LookBackProbe] = {}
        self._optimizers: list[torch.optim.Optimizer] = []
        self._handle = register_optimizer_step_pre_hook(self._stepped)

    def _stepped(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if id(optimizer) in self.probes:
            return
        self._optimizers.append(optimizer)  # So that its id is not given away.
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        watched = {id(p) for probe in self.probes.values() for p in probe._parameters.values()}
        named = [pair for pair in _named(parameters) if id(pair[1]) not in watched]
        if any(parameter.requires_grad for _, parameter in named):
            self.probes[id(optimizer)] = LookBackProbe(named, **self.arguments)

    def close(self) -> None:
        self._handle.remove()
        for probe in self.probes.values():
            probe.close()


def _named(parameters: Sequence[Tensor]) -> list[tuple[str, Tensor]]:
    """Find the parameters' names: those in the module that holds most of them."""
    identities = {id(parameter) for parameter in parameters}
    best: dict[int, str] = {}
    # Of some objects isinstance asks more than their type, and warns.
    for module in [m for m in gc.get_objects() if issubclass(type(m), nn.Module)]:
        names = {id(p): n for n, p in module.named_parameters() if id(p) in identities}
        # Of two that hold as many, the inner one has the shorter names.
        if (len(names), -sum(map(len, names.values()))) > (
            len(best),
            -sum(map(len, best.values())),
        ):
            best = names
    return [(best.get(id(p), f"parameter {i}"), p) for i, p in enumerate(parameters)]


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(","))


def main(arguments: Sequence[str]) -> int:
    """Run a script under a probe, print the report, and return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m lbgm_compress.probe",
        description="Run a training script unchanged, and say what LBGM would have saved.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--deltas", type=_numbers, default=DELTAS, help="thresholds, as 0.05,0.2 (default: five)"
    )
    parser.add_argument(
        "--inner",
        default="Identity()",
        help="what LBGM is over, as TopK(0.1) (default: Identity())",
    )
    parser.add_argument(
        "--csv", metavar="FILE", help="where to write the report's rows as CSV (default: nowhere)"
    )
    parser.add_argument("script", help="the training script, which steps an optimizer of torch's")
    parser.add_argument("args", nargs=argparse.REMAINDER, help="its arguments")
    options = parser.parse_args(arguments)
    script = Path(options.script)
    try:
        if not script.is_file():
            raise ValueError(f"there is no script {script}")
        inner = parse_compressor(options.inner)
        for delta in options.deltas:
            LBGM(inner, delta)
    except ValueError as error:
        parser.error(str(error))
    watch = _Watch({"deltas": options.deltas, "inner": inner})
    sys.argv = [str(script), *options.args]
    sys.path[0] = str(script.resolve().parent)
    try:
        runpy.run_path(str(script), run_name="__main__")
    finally:
        watch.close()
        if _first_rank():
            _print(list(watch.probes.values()), options.csv)
    return 0


def _first_rank() -> bool:
    names = ("RANK", "HOROVOD_RANK", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID")
    return next((os.environ[name] for name in names if name in os.environ), "0") == "0"


def _print(probes: Sequence[LookBackProbe], file: str | None) -> None:
    if not probes:
        print("LookBackProbe: no optimizer of torch's has stepped, and so nothing was seen.")
    for number, probe in enumerate(probes):
        report = probe.report()
        print(f"\n{report}")
        if file is not None:
            path = Path(file)
            report.write_csv(path if not number else path.with_stem(f"{path.stem}-{number + 1}"))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
