"""The probe: takes gradients as they pass, and has them played."""

from __future__ import annotations

import contextlib
import io
import math
import os
import time
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from lbgm_compress._util.files import atomic_write
from lbgm_compress.compressor import DTYPES, Compressor, check_gradient
from lbgm_compress.compressors.identity import Identity
from lbgm_compress.compressors.lbgm import LBGM
from lbgm_compress.compressors.look_back_subspace import LookBackSubspace
from lbgm_compress.compressors.norm_budget import NormBudget
from lbgm_compress.probe.replay import LookBackPlay, Play, Seen, SubspacePlay, seen_of
from lbgm_compress.probe.report import Report, advice

__all__ = ["DELTAS", "LookBackProbe"]

DELTAS = (0.01, 0.05, 0.1, 0.2, 0.5)
RANKS = (1, 2, 4, 8, 16)
# Powers of two, so that each mean is one of two of those before.
AVERAGED = (2, 4, 8, 16)
FORMAT = 1
KEYS = ("methods", "shapes", "seen", "skipped", "elapsed", "seconds", "extra", "plays", "means")
EXTRAS = ("averages", "subspaces")


class LookBackProbe:
    """Watches the gradients of a training and says what looking back would save.

    It plays LBGM (arXiv 2202.00280, algorithm 1) at several thresholds, `LookBackSubspace` at
    several ranks, and LBGM on gradients averaged over several steps, all at once, on the gradients
    that pass by. The training is left as it is: this is the open loop. With compression the model
    would take other steps, and see gradients a little different from these.

    Attach it before the first backward pass; a gradient is taken when backward passes have
    accumulated it, before anything averages or clips it, and a round ends when an optimizer of
    torch's steps. On a rank of DistributedDataParallel or Horovod it is thus that rank's own
    gradient, which is what it would send. Parameters that get no gradient in a step are left out of
    that round, sparse gradients always. Whatever goes wrong while it watches ends the watching,
    with a warning, and not the training.

    It costs a few passes over the gradients, one more for each look-back gradient that differs
    between thresholds, and what `inner` takes. Averages and subspaces cost more, and are played on
    some of the steps alone (`cost`), as if those were all: where gradients change slowly, that
    makes them look worse than they are. On a CUDA device it waits for the backward pass, which its
    clock counts. Memory: one model, another for each threshold at most, and two for each of
    `averaged`.

    Parameters
    ----------
    model
        The module whose parameters are watched (the one inside, or the wrapped one), or pairs of
        names and parameters; all on one device.
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
    >>> for round_ in range(3):
    ...     with LookBackProbe(model, updates=True) as probe:
    ...         _ = model.weight.data.add_(1)  # what a client does in a round
    >>> probe.report().rounds
    1
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
        self._parameters, self._left_out = _watched(model)
        for name, given in (("deltas", deltas), ("ranks", ranks), ("averaged", averaged)):
            if isinstance(given, str) or not isinstance(given, Sequence):
                raise TypeError(f"{name} must be a sequence such as (0.1, 0.2), not {given!r}")
        if not deltas:
            raise ValueError("deltas is empty: give at least one threshold, such as 0.2")
        if any(isinstance(delta, NormBudget) for delta in deltas):
            raise ValueError("deltas are numbers from 0 to 1; a NormBudget is not played")
        if list(averaged) != [2 ** (i + 1) for i in range(len(averaged))]:
            raise ValueError(f"averaged must be 2, 4, 8 and so on, not {tuple(averaged)}")
        if cost is not None and not 0 < cost < math.inf:
            raise ValueError(f"cost must be above 0, or None, not {cost}")
        self._file = None if file is None else Path(file).absolute()
        if self._file is not None and not self._file.parent.is_dir():
            raise ValueError(f"file {file}: there is no folder {self._file.parent}")
        compressors = [LBGM(inner, delta) for delta in deltas]
        exact = cost is None
        nearest = min(compressors, key=lambda compressor: abs(compressor.delta - 0.2))  # type: ignore[operator]
        self._play = LookBackPlay(compressors, exact=exact)
        self._averages = [LookBackPlay([nearest], steps, exact) for steps in averaged]
        self._subspaces = SubspacePlay([LookBackSubspace(rank) for rank in ranks])
        self._means: list[dict[str, Tensor] | None] = [None for _ in averaged]
        self._spare: list[dict[str, Tensor]] = [{} for _ in averaged]
        self._cost, self._updates = cost, updates
        self._seen = self._skipped = 0
        self._earlier = self._seconds = 0.0
        self._extra, self._last = dict.fromkeys(EXTRAS, 0.0), dict.fromkeys(EXTRAS, 0.0)
        self._began = time.perf_counter()
        self._stopped: str | None = None
        self._buffers: dict[str, Tensor] = {}
        self._fresh: dict[str, None] = {}
        self._start: dict[str, Tensor] = {}
        self._handles: list[RemovableHandle] = []
        if self._file is not None and self._file.exists():
            device = next(iter(self._parameters.values())).device
            self.load_state_dict(torch.load(self._file, map_location=device, weights_only=True))
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
        self._detach()
        if self._file is not None:
            data = io.BytesIO()
            torch.save(self.state_dict(), data)
            atomic_write(self._file, data.getvalue(), mode=0o600)

    def __enter__(self) -> LookBackProbe:
        """Begin an update, if `updates` are watched."""
        if self._updates:
            with self._timed():
                self._start = {name: p.detach().clone() for name, p in self._parameters.items()}
        elif not self._handles and self._stopped is None:
            self._attach()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Take the update, unless an error ended the block, and close."""
        if self._updates and kind is None:
            with self._guarded():
                names = sorted(self._parameters)
                self._round({n: self._start[n] - self._parameters[n].detach() for n in names})
        self._start = {}
        self.close()

    def _attach(self) -> None:
        """Copy gradients when they are complete, and end a round when an optimizer steps."""
        # What the hooks hold must not keep the probe alive.
        this = weakref.ref(self)

        def copier(name: str) -> Callable[[Tensor], None]:
            def copy(parameter: Tensor) -> None:
                probe = this()
                if probe is not None and parameter.grad is not None:
                    with probe._guarded():
                        probe._copy(name, parameter.grad)

            hook: Callable[[Tensor], None] = torch.compiler.disable(copy)  # type: ignore[no-untyped-call]
            return hook

        for name, parameter in self._parameters.items():
            handle = parameter.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
                copier(name)
            )
            self._handles.append(handle)
        self._listen()
        for handle in self._handles:
            weakref.finalize(self, handle.remove)

    def _listen(self) -> None:
        """Have `stepped` called whenever an optimizer steps."""
        this = weakref.ref(self)

        @torch.compiler.disable  # type: ignore[untyped-decorator]
        def stepping(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            probe = this()
            if probe is not None:
                probe.stepped(optimizer)

        self._handles.append(register_optimizer_step_pre_hook(stepping))

    def _detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def stepped(self, optimizer: torch.optim.Optimizer) -> None:
        """End a round: this optimizer is about to step. Called by itself, unless `updates`."""
        if not self._fresh:
            return
        with self._guarded():
            own = {id(p) for group in optimizer.param_groups for p in group["params"]}
            # A gradient that was thrown away is None by now; others are for another optimizer.
            parameters = ((name, self._parameters[name]) for name in sorted(self._fresh))
            names = [name for name, p in parameters if id(p) in own and p.grad is not None]
            for name in names:
                del self._fresh[name]
            if names:
                self._round({name: self._buffers[name] for name in names})

    def _copy(self, name: str, grad: Tensor) -> None:
        if grad.layout != torch.strided:
            return
        if name not in self._buffers:
            self._buffers[name] = torch.empty_like(grad, memory_format=torch.contiguous_format)
        self._buffers[name].copy_(grad)
        self._fresh[name] = None

    @contextlib.contextmanager
    def _timed(self) -> Iterator[None]:
        start = time.perf_counter()
        with torch.no_grad():
            yield
        self._seconds += time.perf_counter() - start

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        """Time what is done, and stop watching where it fails: the training must go on."""
        try:
            with self._timed():
                yield
        except Exception as error:
            self._stopped = f"{type(error).__name__}: {error}"
            self._detach()
            self._fresh = {}
            warnings.warn(f"LookBackProbe stopped watching: {self._stopped}", stacklevel=2)

    def _round(self, grads: dict[str, Tensor]) -> None:
        seen = seen_of(list(grads.values()))
        if seen is None:
            self._skipped += 1
        else:
            self._play.round(grads, seen)
            self._average(grads)
            self._extras("subspaces", self._subspaces, grads, seen)
        self._seen += 1

    def _average(self, grads: dict[str, Tensor]) -> None:
        """Take means of pairs, of pairs of pairs and so on, and play each that is complete."""
        # Means that could not be played are not begun: to take them costs, too.
        if not any(self._means) and not self._affords("averages"):
            return
        means = grads
        for level, play in enumerate(self._averages):
            held = self._means[level]
            if not held or held.keys() != means.keys():
                self._means[level] = self._kept(level, means)
                return
            # In place: what is allocated in every step makes the training's own slower.
            for name, mean in means.items():
                held[name].add_(mean).mul_(0.5)
            means, self._means[level] = held, None
            narrow = {name: mean.to(grads[name].dtype) for name, mean in means.items()}
            seen = seen_of(list(narrow.values()))
            if seen is not None:
                self._extras("averages", play, narrow, seen)

    def _kept(self, level: int, means: dict[str, Tensor]) -> dict[str, Tensor]:
        """Copy means to where those of this level are kept."""
        kept = self._spare[level]
        for name, mean in means.items():
            if name not in kept:
                # Sums of float16 would overflow, and its means lose digits.
                wide = torch.float32 if mean.dtype.itemsize < 4 else mean.dtype
                kept[name] = torch.empty_like(mean, dtype=wide)
            kept[name].copy_(mean)
        return {name: kept[name] for name in means}

    def _extras(
        self, what: str, play: Play, grads: dict[str, Tensor], seen: Sequence[Seen]
    ) -> None:
        """Play if it can be afforded."""
        if self._affords(what):
            start = time.perf_counter()
            play.round(grads, seen)
            self._last[what] = time.perf_counter() - start
            self._extra[what] += self._last[what]

    def _affords(self, what: str) -> bool:
        """Whether half of what the thresholds leave of the cost is enough for a round of this."""
        if self._cost is None:
            return True
        most = self._cost * self._elapsed()
        left = max(most - (self._seconds - sum(self._extra.values())), most / 10)
        # As much again as the last time, which is nothing the first time.
        return self._extra[what] + self._last[what] <= left / 2

    # --- what was seen ---------------------------------------------------------------------------

    def report(self) -> Report:
        """Return what was seen so far."""
        rows = [row for play in self._plays() for row in play.rows()]
        played = self._play.rounds
        never = [n for n in self._parameters if played and n not in self._play.tallies[0]]
        return Report(
            rows=rows,
            rounds=self._seen,
            skipped=self._skipped,
            dense_bytes=self._play.dense_bytes / played if played else 0,
            seconds=self._seconds,
            share_of_time=self._seconds / max(self._elapsed(), 1e-9),
            left_out=[*self._left_out, *never],
            stopped=self._stopped,
            advice=advice(rows, self._seen, self._skipped, self._updates),
        )

    def _plays(self) -> list[Play]:
        return [self._play, *self._averages, self._subspaces]

    def _elapsed(self) -> float:
        return self._earlier + time.perf_counter() - self._began

    def _methods(self) -> list[str]:
        return [repr(compressor) for play in self._plays() for compressor in play.compressors]

    def _shapes(self) -> dict[str, str]:
        return {n: f"{tuple(p.shape)} {p.dtype}" for n, p in self._parameters.items()}

    def state_dict(self) -> dict[str, Any]:
        """Return what was seen as a nested dict of tensors and numbers, for `torch.save`.

        What is seen later does not change it.
        """
        means = [{} if m is None else {n: t.clone() for n, t in m.items()} for m in self._means]
        return {
            "format": FORMAT,
            "methods": self._methods(),
            "shapes": self._shapes(),
            "seen": self._seen,
            "skipped": self._skipped,
            "elapsed": self._elapsed(),
            "seconds": self._seconds,
            "extra": [[self._extra[what], self._last[what]] for what in EXTRAS],
            "plays": [play.state_dict() for play in self._plays()],
            "means": means,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned.

        Raises
        ------
        ValueError
            If it is that of a probe with other arguments or of another model, or no such state.
            What was seen is as it was.
        """
        known = isinstance(state, Mapping) and set(KEYS) <= set(state)
        if not known or state.get("format") != FORMAT:
            raise ValueError("this is not the state of a LookBackProbe of this release")
        if state["methods"] != self._methods() or len(state["means"]) != len(self._means):
            raise ValueError(
                f"the state is that of a probe that plays {', '.join(state['methods'])}, and this "
                f"one plays {', '.join(self._methods())}: use the same arguments, or another file"
            )
        shapes = self._shapes()
        for name, shape in {**shapes, **state["shapes"]}.items():
            if shapes.get(name) != shape or state["shapes"].get(name) != shape:
                raise ValueError(
                    f"the state is that of another model: parameter {name!r} is "
                    f"{state['shapes'].get(name)} there and {shapes.get(name)} here"
                )
        for play, kept in zip(self._plays(), state["plays"], strict=True):
            play.load_state_dict(kept)
        self._means = [{n: t.clone() for n, t in m.items()} or None for m in state["means"]]
        self._seen, self._skipped = state["seen"], state["skipped"]
        self._seconds, self._earlier = state["seconds"], state["elapsed"]
        for what, (spent, last) in zip(EXTRAS, state["extra"], strict=True):
            self._extra[what], self._last[what] = spent, last


def _watched(
    model: nn.Module | Iterable[tuple[str, Tensor]],
) -> tuple[dict[str, Tensor], list[str]]:
    """Return the parameters to watch by name, and the names of those that cannot be."""
    hint = "give a module, or pairs of names and parameters as named_parameters() gives them"
    named = model.named_parameters() if isinstance(model, nn.Module) else model
    if isinstance(named, Mapping) or not isinstance(named, Iterable):
        raise TypeError(f"cannot watch a {type(model).__name__}: {hint}")
    parameters, left_out = {}, []
    for pair in named:
        if not (isinstance(pair, (tuple, list)) and len(pair) == 2 and isinstance(pair[0], str)):
            raise TypeError(f"{type(pair).__name__} is no pair of a name and a parameter: {hint}")
        name, parameter = pair
        if not isinstance(parameter, Tensor):
            raise TypeError(f"parameter {name!r} is a {type(parameter).__name__}: {hint}")
        if not parameter.requires_grad:
            continue
        if not parameter.is_leaf:
            raise ValueError(f"parameter {name!r} is no leaf: autograd keeps no gradient of it")
        if parameter.dtype in DTYPES and parameter.layout == torch.strided:
            parameters[name] = parameter
        else:
            left_out.append(name)
    if not parameters:
        raise ValueError("there are no parameters to watch: none requires a dense real gradient")
    devices = {parameter.device for parameter in parameters.values()}
    if len(devices) > 1:
        raise ValueError(
            f"parameters are on {', '.join(sorted(map(str, devices)))}: give those of one device"
        )
    return parameters, left_out
