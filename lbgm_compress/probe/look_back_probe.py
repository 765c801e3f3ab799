"""A probe that copies the gradients of a training and replays compression methods on them."""

from __future__ import annotations

import contextlib
import io
import math
import os
import time
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle

from lbgm_compress._util.files import atomic_write
from lbgm_compress.collective.parameters import NamedParameters, named_pairs
from lbgm_compress.compressor import DTYPES, Compressor, check_gradient
from lbgm_compress.compressors.identity import Identity
from lbgm_compress.compressors.lbgm import LBGM
from lbgm_compress.compressors.look_back_subspace import LookBackSubspace
from lbgm_compress.compressors.norm_budget import NormBudget
from lbgm_compress.decoded import working_dtype
from lbgm_compress.probe.gradient_statistics import GradientStatistics, gradient_statistics
from lbgm_compress.probe.replay import LookBackReplay, Replay, SubspaceReplay
from lbgm_compress.probe.report import Report, advice

__all__ = ["DELTAS", "LookBackProbe"]

DELTAS = (0.01, 0.05, 0.1, 0.2, 0.5)
RANKS = (1, 2, 4, 8, 16)
# Powers of two, so that each mean is that of two means of the number before.
AVERAGED = (2, 4, 8, 16)
FORMAT = 1
KEYS = ("methods", "shapes", "seen", "skipped", "elapsed", "seconds", "extra", "plays", "means")
EXTRAS = ("averages", "subspaces")


class LookBackProbe:
    """Observes the gradients of a training and reports what looking back would save.

    The probe replays LBGM (arXiv 2202.00280, algorithm 1) at several thresholds,
    `LookBackSubspace` at several ranks, and LBGM on gradients averaged over several steps, all on
    the same gradients. It does not change the training: this is the open loop. With compression the
    model would take other steps, and its gradients would differ a little from these.

    Attach it before the first backward pass. A gradient is copied when backward passes have
    accumulated it, before anything averages or clips it; a round ends when an optimizer of torch's
    steps. On a rank of DistributedDataParallel or Horovod it is thus that rank's own gradient,
    which is what the rank would send. Parameters that get no gradient in a step are left out of
    that round; sparse gradients always are. An error of the probe detaches it, with a warning, and
    the training goes on.

    The cost is a few passes over the gradients, one more for each look-back gradient that differs
    between thresholds, and the time of `inner`. Averages and subspaces cost more, and are replayed
    on some of the steps only (`cost`), as if there were no other steps: where gradients change
    slowly, that makes them look worse than they are. On a CUDA device the probe waits for the
    backward pass, and its clock counts that. Its memory is that of one model, another for each
    threshold at most, and two for each of `averaged`.

    Parameters
    ----------
    model
        The module whose parameters are observed (the module itself, or one that wraps it), or pairs
        of names and parameters; all on one device.
    deltas
        Thresholds of LBGM, 0 to 1.
    inner
        The compressor under LBGM; its receiver must not keep state.
    ranks
        Ranks of `LookBackSubspace`; empty for none.
    averaged
        Numbers of steps whose gradients are averaged before they are sent: powers of two, ascending
        from 2; empty for none. They are replayed at the threshold nearest to 0.2.
    cost
        Share of the time that the probe may take. Thresholds are replayed on every step, whatever
        they cost. Averages and subspaces get half each of the share that is left, which is taken to
        be at least a tenth of `cost`. None replays everything on every step, and makes every
        payload; otherwise one of eight is made, and its size is taken for the next seven.
    updates
        Observe one update for each ``with`` block in the place of gradients: the parameters at its
        start minus those at its end, as a federated client sends it. The model then needs no
        optimizer of torch's.
    file
        File for the state, so that the next probe with this file goes on: for clients that are
        created anew in each round. It is read when the probe is created, and written by `close`.

    Raises
    ------
    TypeError, ValueError
        If an argument is not as described, or the file is that of another probe.

    Examples
    --------
    >>> import torch
    >>> model = torch.nn.Linear(20, 5)
    >>> for round_ in range(3):
    ...     with LookBackProbe(model, updates=True) as probe:
    ...         _ = model.weight.data.add_(1)  # the client's training
    >>> probe.report().rounds
    1
    """

    def __init__(
        self,
        model: nn.Module | NamedParameters,
        deltas: Sequence[float] = DELTAS,
        inner: Compressor = Identity(),  # noqa: B008  frozen, and so safe to share
        *,
        ranks: Sequence[int] = RANKS,
        averaged: Sequence[int] = AVERAGED,
        cost: float | None = 0.1,
        updates: bool = False,
        file: str | os.PathLike[str] | None = None,
    ) -> None:
        self._parameters, self._left_out = _observable(model)
        for name, given in (("deltas", deltas), ("ranks", ranks), ("averaged", averaged)):
            if isinstance(given, str) or not isinstance(given, Sequence):
                raise TypeError(f"{name} must be a sequence such as (0.1, 0.2), not {given!r}")
        if not deltas:
            raise ValueError("deltas is empty: give at least one threshold, such as 0.2")
        if any(isinstance(delta, NormBudget) for delta in deltas):
            raise ValueError("deltas are numbers from 0 to 1; a NormBudget is not replayed")
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
        self._replay = LookBackReplay(compressors, exact=exact)
        self._averages = [LookBackReplay([nearest], steps, exact) for steps in averaged]
        self._subspaces = SubspaceReplay([LookBackSubspace(rank) for rank in ranks])
        self._means: list[dict[str, Tensor] | None] = [None for _ in averaged]
        self._spare: list[dict[str, Tensor]] = [{} for _ in averaged]
        self._cost, self._updates = cost, updates
        self._observed = self._skipped = 0
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

    # --- observation -----------------------------------------------------------------------------

    def observe(self, grads: Mapping[str, Tensor]) -> None:
        """Observe one round's gradients, or updates, in a training without an optimizer.

        Parameters
        ----------
        grads
            Gradients of observed parameters by name, with the parameters' shapes.

        Raises
        ------
        TypeError, ValueError
            If they are not gradients of observed parameters. Nothing is counted then.
        """
        for name, grad in grads.items():
            if name not in self._parameters:
                raise ValueError(f"the probe observes no parameter {name!r}")
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
        """Detach the probe, and write `file` if there is one; the report stays available."""
        self._detach()
        if self._file is not None:
            data = io.BytesIO()
            torch.save(self.state_dict(), data)
            atomic_write(self._file, data.getvalue(), mode=0o600)

    def __enter__(self) -> LookBackProbe:
        """Copy the parameters at the start of an update, with `updates`; else attach the probe."""
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
        """Observe the update, unless an error ended the block, and close the probe."""
        if self._updates and kind is None:
            with self._guarded():
                names = sorted(self._parameters)
                self._round({n: self._start[n] - self._parameters[n].detach() for n in names})
        self._start = {}
        self.close()

    def _attach(self) -> None:
        """Register hooks that copy complete gradients and end a round when an optimizer steps."""
        # The hooks must not keep the probe alive.
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
        """Register a hook that calls `stepped` whenever an optimizer has stepped."""
        # Not before the step: it may call a closure that has the backward pass.
        this = weakref.ref(self)

        @torch.compiler.disable  # type: ignore[untyped-decorator]
        def after_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            probe = this()
            if probe is not None:
                probe.stepped(optimizer)

        self._handles.append(register_optimizer_step_post_hook(after_step))

    def _detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def stepped(self, optimizer: torch.optim.Optimizer) -> None:
        """End a round after a step of this optimizer; a hook calls it, unless `updates`."""
        if not self._fresh:
            return
        with self._guarded():
            own = {id(p) for group in optimizer.param_groups for p in group["params"]}
            # A dropped gradient is None by now; the rest are for another optimizer.
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
        """Time the block, and detach the probe after an error: the training must go on."""
        try:
            with self._timed():
                yield
        except Exception as error:
            self._stopped = f"{type(error).__name__}: {error}"
            self._detach()
            self._fresh = {}
            warnings.warn(f"LookBackProbe stopped watching: {self._stopped}", stacklevel=2)

    def _round(self, grads: dict[str, Tensor]) -> None:
        statistics = gradient_statistics(list(grads.values()))
        if statistics is None:
            self._skipped += 1
        else:
            self._replay.round(grads, statistics)
            self._average(grads)
            self._replay_if_affordable("subspaces", self._subspaces, grads, statistics)
        self._observed += 1

    def _average(self, grads: dict[str, Tensor]) -> None:
        """Average gradients in pairs, the means in pairs and so on, and replay complete means."""
        # No mean is begun that could not be replayed: averaging costs, too.
        if not any(self._means) and not self._affords("averages"):
            return
        means = grads
        for level, replay in enumerate(self._averages):
            held = self._means[level]
            if not held or held.keys() != means.keys():
                self._means[level] = self._kept(level, means)
                return
            # In place: allocations in every step slow down those of the training.
            for name, mean in means.items():
                held[name].add_(mean).mul_(0.5)
            means, self._means[level] = held, None
            narrow = {name: mean.to(grads[name].dtype) for name, mean in means.items()}
            statistics = gradient_statistics(list(narrow.values()))
            if statistics is not None:
                self._replay_if_affordable("averages", replay, narrow, statistics)

    def _kept(self, level: int, means: dict[str, Tensor]) -> dict[str, Tensor]:
        """Copy means to the buffers of this level."""
        kept = self._spare[level]
        for name, mean in means.items():
            if name not in kept:
                # Sums of float16 would overflow, and its means lose digits.
                kept[name] = torch.empty_like(mean, dtype=working_dtype(mean))
            kept[name].copy_(mean)
        return {name: kept[name] for name in means}

    def _replay_if_affordable(
        self,
        extra: str,
        replay: Replay,
        grads: dict[str, Tensor],
        statistics: Sequence[GradientStatistics],
    ) -> None:
        if self._affords(extra):
            start = time.perf_counter()
            replay.round(grads, statistics)
            self._last[extra] = time.perf_counter() - start
            self._extra[extra] += self._last[extra]

    def _affords(self, extra: str) -> bool:
        """Return whether this extra may take the time of its last round again.

        Each extra may take half of the time that the thresholds leave of the cost.
        """
        if self._cost is None:
            return True
        allowed = self._cost * self._elapsed()
        left = max(allowed - (self._seconds - sum(self._extra.values())), allowed / 10)
        return self._extra[extra] + self._last[extra] <= left / 2

    # --- results and state -----------------------------------------------------------------------

    def report(self) -> Report:
        """Return the results so far."""
        rows = [row for replay in self._replays() for row in replay.rows()]
        replayed = self._replay.rounds
        never = [n for n in self._parameters if replayed and n not in self._replay.tallies[0]]
        return Report(
            rows=rows,
            rounds=self._observed,
            skipped=self._skipped,
            dense_bytes=self._replay.dense_bytes / replayed if replayed else 0,
            seconds=self._seconds,
            share_of_time=self._seconds / max(self._elapsed(), 1e-9),
            left_out=[*self._left_out, *never],
            stopped=self._stopped,
            advice=advice(rows, self._observed, self._skipped, self._updates),
        )

    def _replays(self) -> list[Replay]:
        return [self._replay, *self._averages, self._subspaces]

    def _elapsed(self) -> float:
        return self._earlier + time.perf_counter() - self._began

    def _methods(self) -> list[str]:
        return [repr(compressor) for replay in self._replays() for compressor in replay.compressors]

    def _shapes(self) -> dict[str, str]:
        return {n: f"{tuple(p.shape)} {p.dtype}" for n, p in self._parameters.items()}

    def state_dict(self) -> dict[str, Any]:
        """Return the state as a nested dict of tensors and numbers, for `torch.save`.

        Later rounds do not change it.
        """
        means = [{} if m is None else {n: t.clone() for n, t in m.items()} for m in self._means]
        return {
            "format": FORMAT,
            "methods": self._methods(),
            "shapes": self._shapes(),
            "seen": self._observed,
            "skipped": self._skipped,
            "elapsed": self._elapsed(),
            "seconds": self._seconds,
            "extra": [[self._extra[extra], self._last[extra]] for extra in EXTRAS],
            "plays": [replay.state_dict() for replay in self._replays()],
            "means": means,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned.

        Raises
        ------
        ValueError
            If the state is that of a probe with other arguments or of another model, or not such a
            state. The probe is then as it was.
        """
        known = isinstance(state, Mapping) and set(KEYS) <= set(state)
        if not known or state.get("format") != FORMAT:
            raise ValueError("this is not the state of a LookBackProbe of this release")
        if state["methods"] != self._methods() or len(state["means"]) != len(self._means):
            raise ValueError(
                f"the state is that of a probe that replays {', '.join(state['methods'])}, and "
                f"this one replays {', '.join(self._methods())}: use the same arguments, or "
                "another file"
            )
        shapes = self._shapes()
        for name, shape in {**shapes, **state["shapes"]}.items():
            if shapes.get(name) != shape or state["shapes"].get(name) != shape:
                raise ValueError(
                    f"the state is that of another model: parameter {name!r} is "
                    f"{state['shapes'].get(name)} there and {shapes.get(name)} here"
                )
        for replay, saved in zip(self._replays(), state["plays"], strict=True):
            replay.load_state_dict(saved)
        self._means = [{n: t.clone() for n, t in m.items()} or None for m in state["means"]]
        self._observed, self._skipped = state["seen"], state["skipped"]
        self._seconds, self._earlier = state["seconds"], state["elapsed"]
        for extra, (spent, last) in zip(EXTRAS, state["extra"], strict=True):
            self._extra[extra], self._last[extra] = spent, last


def _observable(
    model: nn.Module | NamedParameters,
) -> tuple[dict[str, Tensor], list[str]]:
    """Return the parameters to observe by name, and the names of those that cannot be."""
    named = model.named_parameters() if isinstance(model, nn.Module) else model
    parameters, left_out = {}, []
    for name, parameter in named_pairs(named, "model"):
        if not parameter.requires_grad:
            continue
        if not parameter.is_leaf:
            raise ValueError(f"parameter {name!r} is no leaf: autograd keeps no gradient of it")
        if parameter.dtype in DTYPES and parameter.layout == torch.strided:
            parameters[name] = parameter
        else:
            left_out.append(name)
    if not parameters:
        raise ValueError("there are no parameters to observe: none requires a dense real gradient")
    devices = {parameter.device for parameter in parameters.values()}
    if len(devices) > 1:
        raise ValueError(
            f"parameters are on {', '.join(sorted(map(str, devices)))}: give those of one device"
        )
    return parameters, left_out
