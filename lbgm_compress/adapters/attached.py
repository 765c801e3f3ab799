"""What callbacks of training frameworks share: a compressor or a probe on the model of a training.

A framework that wraps the model itself calls a callback when it has done so. These classes hold
what such a callback needs, and import no framework.
"""

from __future__ import annotations

import inspect
import warnings
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lbgm_compress.adapters.ddp import CompressionState, compress
from lbgm_compress.algorithm import Algorithm
from lbgm_compress.probe import LookBackProbe
from lbgm_compress.probe.report import Report

__all__ = ["AttachedCompression", "AttachedProbe"]

METRICS = ("message_bytes", "ratio", "recycled_share")


class AttachedCompression:
    """A compressor for the model that a framework wraps in `DistributedDataParallel`.

    It may be made before there is a model or a process group.

    Parameters
    ----------
    compressor
        Compresses the gradients: any compressor or `Reducible`, the same on all ranks.
    start_step, weight, node_group
        As in `CompressionState`.
    loss_scale
        As in `CompressionState`; None for the one that `register` is given.

    Attributes
    ----------
    state : CompressionState or None
        The state of the model that `register` was last given.

    Raises
    ------
    TypeError, ValueError
        If an argument is of the wrong type or out of range.
    """

    def __init__(
        self,
        compressor: Algorithm,
        *,
        start_step: int = 0,
        weight: float = 1.0,
        loss_scale: float | Callable[[], float] | None = None,
        node_group: dist.ProcessGroup | None = None,
    ) -> None:
        CompressionState.check_options(
            compressor, start_step, weight, 1.0 if loss_scale is None else loss_scale
        )
        self._compressor = compressor
        self._loss_scale = loss_scale
        self._options: dict[str, Any] = {
            "start_step": start_step,
            "weight": weight,
            "node_group": node_group,
        }
        self.state: CompressionState | None = None
        self._model: Callable[[], DistributedDataParallel | None] = _nothing
        self._module: Callable[[], nn.Module | None] = _nothing
        self._saved: Mapping[str, Any] | None = None
        # The number of steps before this training, until the first step has been seen.
        self._steps_before: int | None = None

    def register(
        self, model: Any, advice: str, loss_scale: float | Callable[[], float] = 1.0
    ) -> None:
        """Register the compressor on the wrapped model of a training that begins.

        It is a collective call, as `compress` is. The state goes on from what `load` was given. If
        the framework has wrapped the module of the training before again, it goes on from that.

        Parameters
        ----------
        model
            The model as the framework has wrapped it.
        advice
            What to write so that the framework wraps it in `DistributedDataParallel`.
        loss_scale
            As in `CompressionState`, for a compression that was given none.

        Raises
        ------
        TypeError
            If the model is not a `DistributedDataParallel`.
        ValueError
            If the loaded state is that of another compressor or model.
        RuntimeError
            If the model has another communication hook.
        """
        if not isinstance(model, DistributedDataParallel):
            raise TypeError(
                "gradients are compressed where DistributedDataParallel averages them, and this "
                f"model is a {type(model).__name__}: {advice}"
            )
        if self.state is None or self._model() is not model:
            if self.state is not None and self._saved is None and self._module() is model.module:
                # An exception may have ended the training within a step.
                self.state.abandon_step()
                self._saved = self.state.state_dict()
            scale = loss_scale if self._loss_scale is None else self._loss_scale
            self.state = compress(model, self._compressor, loss_scale=scale, **self._options)
            self._model, self._module = weakref.ref(model), weakref.ref(model.module)
        if self._saved is not None:
            saved, self._saved = self._saved, None
            self.state.load_state_dict(saved)
        self._steps_before = self.state.step

    def load(self, state: Mapping[str, Any]) -> None:
        """Keep what `gather` returned on rank 0 for the next `register`, on every rank."""
        self._saved = state

    def gather(self) -> dict[str, Any]:
        """Return the states of all ranks on rank 0, and an empty dict on the others.

        All ranks call it together. Before a training it is empty.
        """
        return {} if self.state is None else self.state.gather_state_dict()

    def metrics(self) -> dict[str, float]:
        """Return what this rank has sent in this training, under names for a logger."""
        if self.state is None:
            return {}
        stats = self.state.stats()
        return {f"compression/{name}": stats[name] for name in METRICS}

    def stepped(self) -> None:
        """Warn if no gradients were compressed before the first optimizer step of a training.

        A callback calls it after an optimizer step.
        """
        if self.state is None or self._steps_before is None:
            return
        if self.state.step == self._steps_before:
            warnings.warn(
                "an optimizer has stepped, and DistributedDataParallel has averaged no gradients, "
                "so that nothing was compressed and replicas may differ: run the backward pass on "
                "the loss of the wrapped model, outside of no_sync()",
                stacklevel=2,
            )
        self._steps_before = None


class AttachedProbe:
    """A `LookBackProbe` on the model of a training.

    Parameters
    ----------
    **options
        Keyword arguments of `LookBackProbe`, without `updates`.

    Attributes
    ----------
    report : Report or None
        The report of the last training that has ended.

    Raises
    ------
    TypeError
        If `LookBackProbe` has no such argument.
    """

    def __init__(self, **options: Any) -> None:
        if "updates" in options:
            raise TypeError(
                "a callback observes gradients: for updates write "
                "with LookBackProbe(model, updates=True) around the training"
            )
        inspect.signature(LookBackProbe).bind(None, **options)
        self._options = options
        self._probe: LookBackProbe | None = None
        self.report: Report | None = None

    def start(self, model: nn.Module) -> None:
        """Begin to observe a model, before its first backward pass."""
        self._probe = LookBackProbe(model, **self._options)

    def stop(self) -> Report | None:
        """Detach the probe, and return its report, unless there is none."""
        if self._probe is None:
            return None
        self._probe.close()
        self.report, self._probe = self._probe.report(), None
        return self.report


def _nothing() -> None:
    return None
