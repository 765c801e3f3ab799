"""The optimizer that averages compressed gradients before each step."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor

from lbgm_compress._util.checks import check_whole
from lbgm_compress.adapters.horovod.compression import Compression
from lbgm_compress.adapters.horovod.elastic import Distributed, register_elastic
from lbgm_compress.adapters.horovod.transport import HorovodTransport
from lbgm_compress.algorithm import Algorithm, check_algorithm
from lbgm_compress.collective.parameters import NamedParameters, may_have_gradient, named_pairs

__all__ = ["DistributedOptimizer"]

MISSING = (
    "Horovod is not installed, or not for this torch: `python -m lbgm_compress.install_horovod` "
    "(in a checkout, `make horovod`) builds and installs it"
)


def DistributedOptimizer(
    optimizer: torch.optim.Optimizer,
    compressor: Algorithm | None = None,
    named_parameters: NamedParameters | None = None,
    backward_passes_per_step: int = 1,
    process_set: Any = None,
    start_step: int = 0,
    *,
    weight: float = 1.0,
    bucket_cap_mb: float = 25.0,
    loss_scale: float | Callable[[], float] = 1.0,
    **misused: Any,
) -> Any:
    """Return an optimizer that averages compressed gradients over all ranks before each step.

    It is used as the result of `horovod.torch.DistributedOptimizer`: communication overlaps the
    backward pass, and `synchronize`, `skip_synchronize`, `zero_grad`, `broadcast_parameters`,
    `broadcast_optimizer_state` and ``elastic.TorchState(model, optimizer)`` work as there. Its
    class is derived from that of `optimizer`, whose parameters, state and hooks it shares.

    Its attribute ``compression`` is a `Compression`: ``stats()`` counts bytes, ``undo()`` takes
    back a step that is not applied, ``reset()`` makes the next step full, and ``state_dict()``,
    ``gather_state_dict()`` and ``load_state_dict()`` save the state that a rank has beside the
    optimizer's own. ``step(closure)`` averages the gradients and the loss of each call of the
    closure. Parameters may be frozen and unfrozen between any two steps (``requires_grad``).

    Parameters
    ----------
    optimizer
        Any optimizer of torch.
    compressor
        Compresses the gradients: any compressor, the same on all ranks. It has to be given.
    named_parameters
        ``model.named_parameters()``; the parameters are numbered if it is not given.
    backward_passes_per_step
        Number of backward passes whose gradients add up before they are sent.
    process_set
        The ``horovod.torch.ProcessSet`` to average over; all ranks unless given. The optimizers of
        other ranks average nothing.
    start_step
        Number of steps of plain all-reduce at the beginning. Gradients change fastest there.
    weight
        This rank's weight in the average, for example its number of samples; positive. Its share
        is the weight divided by the sum of the weights of all ranks.
    bucket_cap_mb
        Size in MB (2^20 bytes) up to which gradients are grouped into one message.
    loss_scale
        The factor by which the loss is multiplied: a number, or a callable that returns it, such as
        ``scaler.get_scale``. It is asked for in the backward pass. Residuals and `NormBudget`
        follow it.

    Raises
    ------
    ImportError
        If Horovod is not installed.
    TypeError, ValueError
        If an argument is of the wrong type or out of range, parameters have no name or names are
        not unique, or Horovod is not initialised.
    """
    checked = _check_call(optimizer, compressor, named_parameters, misused)
    parameters = _named(optimizer, named_parameters)
    hvd = _engine()
    if type(optimizer).__module__ == hvd.DistributedOptimizer.__module__:
        raise ValueError("the optimizer is distributed already: give the one that it was made from")
    check_whole("backward_passes_per_step", backward_passes_per_step, error=TypeError)
    if backward_passes_per_step <= 0:
        raise ValueError(f"backward_passes_per_step must be > 0, not {backward_passes_per_step}")
    compression = Compression(
        checked,
        parameters,
        HorovodTransport(hvd, process_set or hvd.global_process_set),
        backward_passes_per_step,
        start_step,
        weight,
        bucket_cap_mb,
        loss_scale,
    )
    distributed = _distributed(type(optimizer), hvd.DistributedOptimizer.__module__)
    made = distributed.__new__(distributed)
    made.__dict__.update(optimizer.__dict__)
    # A scheduler that was made before has put its own step there, which would not synchronise.
    made.__dict__.pop("step", None)
    made.compression = compression
    made._should_synchronize = True
    register_elastic(hvd)
    return made


def _distributed(base: type, module: str) -> Any:
    """Derive the class of a distributed optimizer from that of an optimizer."""

    class Optimizer(base, Distributed):  # type: ignore[misc]
        compression: Compression
        _should_synchronize: bool

        def synchronize(self) -> None:
            """Wait until ``p.grad`` of every parameter is the average over all ranks."""
            self.compression.synchronize()

        @contextlib.contextmanager
        def skip_synchronize(self) -> Iterator[None]:
            """Have ``step()`` use the gradients as they are; call `synchronize` before."""
            self._should_synchronize = False
            try:
                yield
            finally:
                self._should_synchronize = True

        def step(self, closure: Callable[[], Any] | None = None, **options: Any) -> Any:
            if closure is not None:
                return super().step(self._averaged(closure), **options)
            if self._should_synchronize:
                if self.compression.synchronized:
                    warnings.warn(
                        "optimizer.step() called without optimizer.skip_synchronize() context "
                        "after optimizer.synchronize(): the averages are taken as they are",
                        stacklevel=2,
                    )
                else:
                    self.synchronize()
            self.compression.synchronized = False
            return super().step(**options)

        def _averaged(self, closure: Callable[[], Any]) -> Callable[[], Any]:
            if not self._should_synchronize:
                raise ValueError(
                    "step(closure) computes new gradients, which skip_synchronize() would leave "
                    "without an average: call step(closure) outside of it"
                )

            def averaged() -> Any:
                loss = closure()
                self.synchronize()
                self.compression.synchronized = False
                return self.compression.average_loss(loss)

            return averaged

        def zero_grad(self, *arguments: Any, **options: Any) -> None:
            if self.compression.under_way:
                raise AssertionError(
                    "optimizer.zero_grad() was called after loss.backward() but before "
                    "optimizer.step() or optimizer.synchronize(). This is prohibited as it can "
                    "cause a race condition."
                )
            super().zero_grad(*arguments, **options)

        def load_state_dict(self, state_dict: Any) -> None:
            self.compression.abandon()
            super().load_state_dict(state_dict)

        def set_backward_passes_per_step(self, passes: int) -> None:
            """Send gradients after `passes` backward passes, from now on."""
            self.compression.set_passes(passes)

        def add_param_group(self, param_group: Any) -> None:
            raise ValueError(
                "the gradients of parameters that are added now would not be averaged: add them "
                "to the optimizer before it is given to DistributedOptimizer"
            )

    Optimizer.__name__ = Optimizer.__qualname__ = base.__name__
    # broadcast_optimizer_state takes an optimizer for a distributed one, and makes its first step
    # without the other ranks, only if it is of Horovod's own module.
    Optimizer.__module__ = module
    return Optimizer


def _engine() -> Any:
    try:
        import horovod.torch as hvd
    except ImportError as error:
        raise ImportError(MISSING) from error
    return hvd


def _check_call(
    optimizer: Any, compressor: Any, named_parameters: Any, misused: Mapping[str, Any]
) -> Algorithm:
    """Return the compressor; raise `TypeError` for another call, such as that of Horovod's own."""
    call = "write DistributedOptimizer(optimizer, compressor, model.named_parameters())"
    if not isinstance(optimizer, torch.optim.Optimizer):
        is_class = isinstance(optimizer, type)
        found = f"the class {optimizer.__name__}" if is_class else type(optimizer).__name__
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, not {found}: {call}")
    if "compression" in misused:
        raise TypeError(f"the compressor is the second argument, not compression=...: {call}")
    if compressor is None:
        raise TypeError(f"there is no compressor: {call}")
    if misused:
        name = next(iter(misused))
        raise TypeError(
            f"DistributedOptimizer has no argument {name!r}, which Horovod's own may have: {call}"
        )
    if isinstance(compressor, Iterable) and not isinstance(compressor, (str, type)):
        if isinstance(named_parameters, Algorithm):
            raise TypeError(f"the arguments are swapped: {call}")
        raise TypeError(f"the arguments are those of Horovod's own DistributedOptimizer: {call}")
    check_algorithm(compressor)
    return cast("Algorithm", compressor)


def _named(optimizer: torch.optim.Optimizer, named_parameters: Any) -> dict[str, Tensor]:
    """Return the optimizer's parameters that may have a gradient, by name.

    Raises
    ------
    TypeError, ValueError
        If names are missing or not unique, or something else is given.
    """
    groups = [group["params"] for group in optimizer.param_groups]
    if named_parameters is None:
        named_parameters = [
            (f"noname.{i}.{j}", p) for i, group in enumerate(groups) for j, p in enumerate(group)
        ]
    named = named_pairs(named_parameters)
    mine = {id(p): p for group in groups for p in group}
    found = {id(p): name for name, p in named}
    unnamed = [tuple(p.shape) for key, p in mine.items() if key not in found]
    if unnamed:
        raise ValueError(
            "named_parameters was specified, but one or more model parameters were not named: give "
            "model.named_parameters() of the model that the optimizer was made for. The shapes of "
            f"those without a name: {', '.join(map(str, unnamed))}"
        )
    return {name: p for name, p in named if id(p) in mine and may_have_gradient(p)}
