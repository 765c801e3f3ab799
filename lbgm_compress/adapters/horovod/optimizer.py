"""An optimizer for Horovod that averages compressed gradients.

>>> from lbgm_compress import LBGM, TopK
>>> def wrap(optimizer, model):  # in the place of horovod.torch.DistributedOptimizer
...     from lbgm_compress.adapters.horovod import DistributedOptimizer
...     return DistributedOptimizer(optimizer, LBGM(TopK(0.01)), model.named_parameters())

Gradients are grouped into buckets as they become ready in the backward pass. A thread encodes each
bucket and hands its message to Horovod, which gathers the messages of all ranks in one collective;
each rank adds up the same decoded tensors in rank order, so that replicas stay bit-identical.

Messages pass through the CPU's memory, so that a Horovod built with gloo alone serves GPUs too.

What a rank keeps is as in `lbgm_compress.adapters.ddp`; an elastic job holds a second copy of it
from each commit to the next.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lbgm_compress.collective.averager import (
    Average,
    Averager,
    Worker,
    ready_event,
    stream_after,
    sum_dtype,
)
from lbgm_compress.collective.transport import FRONT, Pending, Transport, following
from lbgm_compress.compressor import Compressor

__all__ = ["Compression", "DistributedOptimizer", "HorovodTransport"]

MISSING = (
    "Horovod is not installed, or not for this torch: `python -m lbgm_compress.install_horovod` "
    "(in a checkout, `make horovod`) builds and installs it"
)
Named = tuple[str, Tensor]


def DistributedOptimizer(
    optimizer: torch.optim.Optimizer,
    compressor: Compressor,
    named_parameters: Iterable[Named] | None = None,
    backward_passes_per_step: int = 1,
    process_set: Any = None,
    start_step: int = 0,
    *,
    weight: float = 1.0,
    bucket_cap_mb: float = 25.0,
) -> Any:
    """Return an optimizer that averages compressed gradients over all ranks before each step.

    It is used as that of `horovod.torch.DistributedOptimizer`: communication overlaps the backward
    pass, and `synchronize`, `skip_synchronize`, `zero_grad`, `broadcast_parameters`,
    `broadcast_optimizer_state` and ``elastic.TorchState(model, optimizer)`` work as there. Its
    class is derived from that of `optimizer`, whose parameters, state and hooks it shares.

    Beyond that, ``optimizer.compression`` is a `Compression`: ``stats()`` tells bytes,
    ``reset()`` makes the next step full, and ``state_dict()`` and ``load_state_dict()`` save what
    a rank holds beside the optimizer's own state. ``step(closure)`` averages the gradients that
    the closure computes, and its loss, each time that it is called.

    Parameters
    ----------
    optimizer
        Any optimizer of torch.
    compressor
        What compresses the gradients: any, the same on all ranks.
    named_parameters
        ``model.named_parameters()``; the parameters are numbered if it is not given.
    backward_passes_per_step
        After how many backward passes a gradient is sent; gradients add up until then.
    process_set
        The ``horovod.torch.ProcessSet`` to average over; all ranks unless given. Other ranks step
        by themselves.
    start_step
        How many steps of plain all-reduce come first. Gradients change fastest at the start.
    weight
        This rank's weight in the average, for example its number of samples; positive. Its share
        is the weight divided by the sum of all ranks' weights.
    bucket_cap_mb
        Size in MB (2^20 bytes) up to which gradients are grouped into one message.

    Raises
    ------
    ImportError
        If Horovod is not installed.
    TypeError, ValueError
        If an argument is not what it should be, parameters have no name or names are not unique,
        or Horovod is not initialised.
    """
    hvd = _engine()
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, not {optimizer!r}")
    if type(optimizer).__module__ == hvd.DistributedOptimizer.__module__:
        raise ValueError("the optimizer is distributed already: give the one that it was made from")
    if isinstance(backward_passes_per_step, bool) or not isinstance(backward_passes_per_step, int):
        raise TypeError(
            f"backward_passes_per_step must be a whole number, not {backward_passes_per_step!r}"
        )
    if backward_passes_per_step <= 0:
        raise ValueError(f"backward_passes_per_step must be > 0, not {backward_passes_per_step}")
    parameters = _named(optimizer, named_parameters)
    compression = Compression(
        compressor,
        parameters,
        HorovodTransport(hvd, process_set or hvd.global_process_set),
        backward_passes_per_step,
        start_step,
        weight,
        bucket_cap_mb,
    )
    distributed = _distributed(type(optimizer), hvd.DistributedOptimizer.__module__)
    made = distributed.__new__(distributed)
    made.__dict__.update(optimizer.__dict__)
    # A scheduler that was made before has put its own step there, which would not synchronise.
    made.__dict__.pop("step", None)
    made.compression = compression
    made._should_synchronize = True
    _register_elastic(hvd)
    return made


class HorovodTransport(Transport):
    """Ranks of a process set of Horovod."""

    def __init__(self, hvd: Any, process_set: Any) -> None:
        self.hvd = hvd
        self.process_set = process_set
        if process_set.process_set_id is None or process_set.included() is None:
            raise ValueError(
                "Horovod or the process set is not initialised: call hvd.init() (with "
                "process_sets) or hvd.add_process_set() first"
            )
        self.name = "lbgm_compress"

    @property
    def included(self) -> bool:
        """Whether this process takes part."""
        return bool(self.process_set.included())

    @property
    def rank(self) -> int:  # type: ignore[override]
        return int(self.process_set.rank()) if self.included else 0

    @property
    def size(self) -> int:  # type: ignore[override]
        return int(self.process_set.size()) if self.included else 1

    def gather_equal(self, data: Tensor) -> Tensor:
        # Under a name of no optimizer's, since ranks compare here what they were given.
        rows = self.hvd.allgather(
            data.cpu(), name="lbgm_compress.agree", process_set=self.process_set
        )
        return rows.view(self.size, data.numel()).to(data.device)  # type: ignore[no-any-return]

    def start(self, message: Tensor, head_size: int, key: str) -> Pending:
        handle = self.hvd.allgather_async(
            message.cpu(), name=f"{self.name}.{key}", process_set=self.process_set
        )

        def messages() -> list[Tensor]:
            return self._split(self.hvd.synchronize(handle), head_size, message.device)

        return Pending(lambda: bool(self.hvd.poll(handle)), messages)

    def _split(self, gathered: Tensor, head_size: int, device: torch.device) -> list[Tensor]:
        """Cut what came from all ranks where the messages say that they end."""
        sizes: list[int] = []
        for rank in range(self.size):
            position = sum(sizes)
            front = gathered[position : position + FRONT].numpy().tobytes()
            sizes.append(head_size + following(front, rank))
        return [part.to(device) for part in torch.split(gathered, sizes)]

    def average(self, tensor: Tensor, share: float, name: str) -> tuple[int, Tensor]:
        """Begin to average a tensor in dense form; returns a handle, and the tensor to be."""
        scaled = tensor.cpu() * share
        handle = self.hvd.allreduce_async_(
            scaled, name=f"{self.name}.{name}", op=self.hvd.Sum, process_set=self.process_set
        )
        return handle, scaled


@dataclass(eq=False)
class Bucket:
    """Parameters whose gradients go into one message."""

    parameters: dict[str, Tensor]
    waiting: int
    """How many of them have no gradient yet."""
    submitted: bool = False


class Compression(Averager):
    """What a distributed optimizer needs to know and keeps, on one rank.

    Made by `DistributedOptimizer`, and its attribute ``compression``.
    """

    def __init__(
        self,
        compressor: Compressor,
        parameters: dict[str, Tensor],
        transport: HorovodTransport,
        backward_passes_per_step: int,
        start_step: int,
        weight: float,
        bucket_cap_mb: float,
    ) -> None:
        super().__init__(compressor, parameters, transport, start_step, weight)
        if isinstance(bucket_cap_mb, bool) or not isinstance(bucket_cap_mb, (int, float)):
            raise TypeError(f"bucket_cap_mb must be a number, not {bucket_cap_mb!r}")
        if not bucket_cap_mb > 0:
            raise ValueError(f"bucket_cap_mb must be above 0, not {bucket_cap_mb}")
        self._description.append(f"bucket_cap_mb {bucket_cap_mb}")
        self.horovod = transport
        # Two optimizers of one process must not share the names of their exchanges.
        key = hashlib.blake2b("\n".join(self._description).encode(), digest_size=6).hexdigest()
        transport.name = f"lbgm_compress.{key}"
        self.passes = backward_passes_per_step
        self._buckets = _buckets(parameters, int(bucket_cap_mb * 2**20))
        self._bucket_of = {p: b for b in self._buckets for p in b.parameters.values()}
        self._delay = dict.fromkeys(self._bucket_of, self.passes)
        # Whether gradients are on their way, and whether they have arrived and none came since.
        self.under_way = self.synchronized = False
        self._pending: list[tuple[Average, dict[str, Tensor]]] = []
        self._error: BaseException | None = None
        self._worker = Worker(self)
        if transport.included:
            # Parameters outlive an optimizer that is thrown away, and must not go on sending.
            itself = weakref.ref(self)

            def hook(parameter: Tensor) -> None:
                compression = itself()
                if compression is not None:
                    compression._hook(parameter)

            for p in self._bucket_of:
                p.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]

    def set_passes(self, passes: int) -> None:
        """Send gradients after so many backward passes, from now on."""
        self.passes = passes
        self._clear()

    def synchronize(self) -> None:
        """Send what is not yet on its way, and wait for the averages."""
        if self.horovod.included:
            self._begin_step()
            for bucket in self._buckets:
                if not bucket.submitted:
                    self._submit(bucket)
            self._worker.run(self._finish_all)
            self._clear()
            if self._error is not None:
                error, self._error = self._error, None
                self.fail(error)
                raise error
            self.step += 1
        self.synchronized = True

    def abandon(self) -> None:
        """Let gradients that are on their way arrive, and forget that they were sent."""
        self._worker.run(self._finish_all)
        self._error = None
        self._clear()

    def average_loss(self, loss: Any) -> Any:
        """Average a closure's loss, so that all ranks decide alike."""
        if loss is None or not self.horovod.included:
            return loss
        value = torch.tensor([float(loss)], dtype=torch.float64)
        handle, mean = self.horovod.average(value, self.share, "loss")
        self.horovod.hvd.synchronize(handle)
        return loss.new_tensor(mean.item()) if isinstance(loss, Tensor) else mean.item()

    def _hook(self, parameter: Tensor) -> None:
        """Take note that a gradient has been accumulated."""
        if self._delay[parameter] <= 0:
            raise AssertionError(
                "Gradients were computed more than backward_passes_per_step times before call to "
                "step(). Increase backward_passes_per_step to accumulate gradients locally."
            )
        self._begin_step()
        self._delay[parameter] -= 1
        if self._delay[parameter] == 0:
            bucket = self._bucket_of[parameter]
            bucket.waiting -= 1
            if bucket.waiting == 0:
                self._submit(bucket)

    def _begin_step(self) -> None:
        if self.under_way:
            return
        self.check_usable()
        if not self.agreed:
            self._worker.run(self.agree)
        self.under_way = True
        self.synchronized = False

    def _submit(self, bucket: Bucket) -> None:
        bucket.submitted = True
        grads = {}
        for name, parameter in bucket.parameters.items():
            if parameter.grad is None:
                # Another rank may have used it.
                parameter.grad = torch.zeros_like(parameter)
            grads[name] = parameter.grad
        device = next(iter(grads.values())).device
        ready, begin = ready_event(device), self._all_reduce if self.warming_up else self.start

        def work() -> None:
            if self._error is not None:
                return
            try:
                with stream_after(ready, device):
                    self._pending.append((begin(grads), grads))
                while self._pending and self._pending[0][0].ready():
                    self._finish(*self._pending.pop(0))
            except BaseException as error:
                self._error = error

        self._worker.submit(work)

    def _finish_all(self) -> None:
        """Wait for what is under way."""
        pending, self._pending = self._pending, []
        try:
            for average, grads in pending:
                if self._error is None:
                    self._finish(average, grads)
        except BaseException as error:
            self._error = error

    def _finish(self, average: Average, grads: Mapping[str, Tensor]) -> None:
        into = {
            name: torch.zeros(grad.shape, dtype=sum_dtype(grad.dtype), device=grad.device)
            for name, grad in grads.items()
        }
        for name, mean in average.finish(into).items():
            grads[name].copy_(mean)
        device = next(iter(grads.values())).device
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()

    def _all_reduce(self, grads: Mapping[str, Tensor]) -> Average:
        """Begin to average in dense form, in one collective."""
        dtype = functools.reduce(torch.promote_types, (sum_dtype(g.dtype) for g in grads.values()))
        flat = torch.cat([grad.reshape(-1).to(dtype) for grad in grads.values()])
        handle, mean = self.horovod.average(flat, self.share, f"dense.{min(grads)}")

        def finish(into: Mapping[str, Tensor]) -> dict[str, Tensor]:
            self.horovod.hvd.synchronize(handle)
            parts = torch.split(mean, [grad.numel() for grad in grads.values()])
            return {name: p.view(into[name].shape) for name, p in zip(grads, parts, strict=True)}

        return Average(lambda: bool(self.horovod.hvd.poll(handle)), finish)

    def _clear(self) -> None:
        self._delay = dict.fromkeys(self._delay, self.passes)
        for bucket in self._buckets:
            bucket.submitted = False
            bucket.waiting = len(bucket.parameters)
        self.under_way = False


class _Marked:
    """What the classes of distributed optimizers have in common, for TorchState."""


def _distributed(base: type, module: str) -> Any:
    """Derive the class of a distributed optimizer from that of an optimizer."""

    class Distributed(base, _Marked):  # type: ignore[misc]
        compression: Compression
        _should_synchronize: bool

        def synchronize(self) -> None:
            """Wait until ``p.grad`` of every parameter is the average over all ranks."""
            self.compression.synchronize()

        @contextlib.contextmanager
        def skip_synchronize(self) -> Iterator[None]:
            """Let ``step()`` take the gradients as they are: call `synchronize` before."""
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
            """Send gradients after so many backward passes, from now on."""
            self.compression.set_passes(passes)

        def add_param_group(self, param_group: Any) -> None:
            raise ValueError(
                "the gradients of parameters that are added now would not be averaged: add them "
                "to the optimizer before it is given to DistributedOptimizer"
            )

    Distributed.__name__ = Distributed.__qualname__ = base.__name__
    # broadcast_optimizer_state takes an optimizer for a distributed one, and makes its first step
    # without the other ranks, only if it is of Horovod's own module.
    Distributed.__module__ = module
    return Distributed


class _ElasticState:
    """What ``horovod.torch.elastic.TorchState`` does with a distributed optimizer of ours."""

    def __init__(self, hvd: Any, value: Any) -> None:
        self.hvd = hvd
        self.set_value(value)

    def set_value(self, value: Any) -> None:
        self.value = value
        self.save()

    def save(self) -> None:
        states = self.value.state_dict(), self.value.compression.state_dict()
        self._saved = copy.deepcopy(states)

    def restore(self) -> None:
        optimizer, compression = copy.deepcopy(self._saved)
        self.value.load_state_dict(optimizer)
        self.value.compression.restore(compression)
        # Ranks may hold commits of different steps.
        self.value.compression.rejoin()

    def sync(self) -> None:
        self.hvd.broadcast_optimizer_state(self.value, root_rank=0)
        self.value.compression.rejoin()
        self.save()


def _register_elastic(hvd: Any) -> None:
    """Tell TorchState how to keep our optimizers, before it takes them for plain ones."""
    state = hvd.elastic.state
    registry = state.get_handler_registry()
    if all(kind is not _Marked for kind, _ in registry):
        entry = (_Marked, functools.partial(_ElasticState, hvd))
        state.set_handler_registry([entry, *registry])


def _engine() -> Any:
    try:
        import horovod.torch as hvd
    except ImportError as error:
        raise ImportError(MISSING) from error
    return hvd


def _named(
    optimizer: torch.optim.Optimizer, named_parameters: Iterable[Named] | None
) -> dict[str, Tensor]:
    """Return the optimizer's parameters that need a gradient, by name.

    Raises
    ------
    ValueError
        If names are missing or not unique.
    """
    groups = [group["params"] for group in optimizer.param_groups]
    if named_parameters is None:
        named: Sequence[Named] = [
            (f"noname.{i}.{j}", p) for i, group in enumerate(groups) for j, p in enumerate(group)
        ]
    else:
        named = list(named_parameters)
    for entry in named:
        if not isinstance(entry, tuple) or len(entry) != 2 or not isinstance(entry[0], str):
            raise ValueError(
                "named_parameters should be a sequence of tuples (name, parameter), usually "
                "produced by model.named_parameters()."
            )
    names = [name for name, _ in named]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(
            "Parameter names in named_parameters must be unique. Found duplicates: "
            + ", ".join(twice)
        )
    mine = {id(p): p for group in groups for p in group}
    found = {id(p): name for name, p in named}
    unnamed = [tuple(p.shape) for key, p in mine.items() if key not in found]
    if unnamed:
        raise ValueError(
            "named_parameters was specified, but one or more model parameters were not named. "
            f"Their shapes: {', '.join(map(str, unnamed))}"
        )
    return {name: p for name, p in named if id(p) in mine and p.requires_grad}


def _buckets(parameters: Mapping[str, Tensor], cap: int) -> list[Bucket]:
    """Group parameters, from the last to the first, as their gradients become ready."""
    groups: list[dict[str, Tensor]] = []
    size = 0
    for name, parameter in reversed(list(parameters.items())):
        grown = size + parameter.numel() * parameter.element_size()
        device = next(iter(groups[-1].values())).device if groups else None
        if grown > cap or parameter.device != device:
            groups.append({})
            grown = parameter.numel() * parameter.element_size()
        groups[-1][name] = parameter
        size = grown
    return [Bucket(group, len(group)) for group in groups]
