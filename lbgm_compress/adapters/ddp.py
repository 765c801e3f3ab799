"""A communication hook for `torch.nn.parallel.DistributedDataParallel`.

>>> from lbgm_compress import LBGM, TopK
>>> from lbgm_compress.adapters.ddp import compress
>>> def compress_gradients(model):  # a model wrapped in DistributedDataParallel
...     return compress(model, LBGM(TopK(0.01)))

`compress` makes a `CompressionState` and registers `compression_hook` with it. Both can be used by
themselves where a framework registers hooks.

Each rank encodes its gradients, all ranks gather the messages, and each adds up the same decoded
tensors in rank order. So the averages have the same bits on all ranks, and replicas do not drift
apart.

Memory of a rank beyond what `DistributedDataParallel` takes, for K ranks, a model of M bytes and
compressed look-back gradients of C bytes (C = M for ``LBGM()``, about ratio * M and the indices for
``LBGM(TopK(ratio))``):

- between steps, M + (K - 1) C for LBGM, nothing for compressors without a state, and M for each
  `ErrorFeedback`;
- from the backward pass to ``optimizer.step()``, M more for each `ErrorFeedback`, and the look-back
  gradients that the step replaced, so that the step can be undone;
- in a step, for one bucket of B bytes at a time, B for the average, and at most K B for the
  messages of all ranks.
"""

# Without `from __future__ import annotations`: `register_comm_hook` compares annotations by value.

import datetime
import gc
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import GradBucket
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from lbgm_compress.collective.average import Average, sum_dtype
from lbgm_compress.collective.background import BackgroundAverager
from lbgm_compress.collective.parameters import NamedParameters, may_have_gradient, named_pairs
from lbgm_compress.collective.saved import check_saved
from lbgm_compress.collective.transport import ProcessGroupTransport
from lbgm_compress.compressor import Compressor, check_compressor

__all__ = ["CompressionState", "compress", "compression_hook"]


def compress(
    model: DistributedDataParallel,
    compressor: Compressor,
    *,
    start_step: int = 0,
    weight: float = 1.0,
    loss_scale: float | Callable[[], float] = 1.0,
) -> "CompressionState":
    """Have the gradients of a model averaged in compressed form, from the next step on.

    All ranks of the model's process group call it, for their models in the same order.

    Parameters
    ----------
    model
        The model, wrapped in `DistributedDataParallel`; its process group, the names of its
        parameters and the parameters are taken from it.
    compressor
        Compresses the gradients: any compressor, the same on all ranks.
    start_step, weight, loss_scale
        As in `CompressionState`.

    Returns
    -------
    CompressionState
        For `stats`, `undo`, `state_dict`, `gather_state_dict` and `load_state_dict`.

    Raises
    ------
    TypeError, ValueError
        If an argument is of the wrong type or out of range.
    RuntimeError
        If the model has a communication hook already.
    """
    if isinstance(model, Compressor):
        raise TypeError("the arguments are swapped: write compress(model, compressor)")
    if not isinstance(model, DistributedDataParallel):
        wrapped = getattr(model, "_orig_mod", None)
        advice = "wrap the model first, as DistributedDataParallel(model)"
        if isinstance(wrapped, DistributedDataParallel):
            advice = "compress the DistributedDataParallel model before torch.compile takes it"
        raise TypeError(f"expected a DistributedDataParallel, not {type(model).__name__}: {advice}")
    check_compressor(compressor)
    # The hook is registered at the end: a model is not left with half of it.
    state = CompressionState(
        compressor,
        _averaged(model),
        model.process_group,
        start_step=start_step,
        weight=weight,
        loss_scale=loss_scale,
    )
    state._model = weakref.ref(model)
    try:
        model.register_comm_hook(state, compression_hook)
    except RuntimeError as error:
        raise RuntimeError(
            f"the model takes no hook: it has one already, or is not to communicate ({error})"
        ) from None
    return state


class CompressionState(BackgroundAverager):
    """The state of `compression_hook`, for one model on one rank.

    `compress` makes one and registers it, which is all that most programs need. Where a framework
    registers hooks, there are two ways to build one:

    - ``CompressionState(compressor)`` can be built before there is a model or a process group. The
      first backward pass binds it to the model whose hook it is, with the model's names and process
      group. A state that is loaded before is kept until then.
    - ``CompressionState(compressor, model.named_parameters())`` is a collective call: all ranks of
      the process group build theirs, for their models in the same order.

    Parameters may be frozen and unfrozen between any two steps (``requires_grad``), on all ranks
    alike. A parameter that was frozen when the model was wrapped is not averaged by
    `DistributedDataParallel`; it is an error if it requires a gradient later.

    Parameters
    ----------
    compressor
        Compresses the gradients: any compressor, the same on all ranks.
    named_parameters
        ``model.named_parameters()``, of the model or of its wrapper, the same on all ranks.
    process_group
        The group that the model was wrapped with; the default group unless given.
    start_step
        Number of steps of plain all-reduce at the beginning. Gradients change fastest there.
    weight
        This rank's weight in the average, for example its number of samples; positive. Its share
        is the weight divided by the sum of the weights of all ranks.
    loss_scale
        The factor by which the loss is multiplied: a number, or a callable that returns it, such as
        ``scaler.get_scale``. It is asked for in the backward pass. Residuals and `NormBudget`
        follow it.

    Raises
    ------
    TypeError, ValueError
        If an argument is of the wrong type or out of range.
    RuntimeError
        If `named_parameters` is given, and `torch.distributed` is not initialised.
    """

    def __init__(
        self,
        compressor: Compressor,
        named_parameters: NamedParameters | None = None,
        process_group: dist.ProcessGroup | None = None,
        start_step: int = 0,
        weight: float = 1.0,
        *,
        loss_scale: float | Callable[[], float] = 1.0,
    ) -> None:
        if isinstance(named_parameters, Compressor):
            raise TypeError(
                "the arguments are swapped: write CompressionState(compressor, "
                "model.named_parameters())"
            )
        self.check_options(compressor, start_step, weight, loss_scale)
        if named_parameters is None and process_group is not None:
            raise TypeError(
                "process_group without named_parameters: leave out both, and the model's are taken "
                "in the first backward pass"
            )
        self._bound = False
        self._model: Callable[[], DistributedDataParallel | None] = _nothing
        self._group_given = process_group is not None
        self._saved: Mapping[str, Any] | None = None
        self._options = {"start_step": start_step, "weight": weight, "loss_scale": loss_scale}
        self._given = compressor
        if named_parameters is not None:
            self._bind(named_pairs(named_parameters), process_group)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or self.__dict__.get("_bound", True):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        raise AttributeError(
            "this CompressionState has no model yet: the first backward pass binds it to the model "
            "whose hook it is"
        )

    def _bind(
        self, pairs: Iterable[tuple[str, Tensor]], process_group: dist.ProcessGroup | None
    ) -> None:
        """Take the parameters and the group, of which all ranks make a new one together."""
        if not dist.is_available() or not dist.is_initialized():
            raise RuntimeError("call torch.distributed.init_process_group() first")
        parameters = {name: p for name, p in pairs if may_have_gradient(p)}
        if not any(p.requires_grad for p in parameters.values()):
            raise ValueError("named_parameters has no parameter that requires a gradient")
        self.process_group = process_group if process_group is not None else _default_group()
        transport = ProcessGroupTransport(_group_like(self.process_group))
        super().__init__(self._given, parameters, transport, **self._options)
        self._names = {id(parameter): name for name, parameter in parameters.items()}
        # Keeps the parameters alive, so that no other tensor gets one of their ids.
        self._parameters = list(parameters.values())
        # Those that no bucket has had yet, by name. After a whole step, none will.
        self._outside = dict(parameters)
        self._whole_step = False
        self._bound = True
        if self._saved is not None:
            state, self._saved = self._saved, None
            self.load_state_dict(state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if self._bound:
            super().load_state_dict(state)
            return
        check_saved(state, type(self).__name__)
        self._saved = state

    def _hook(self, bucket: GradBucket) -> torch.futures.Future[Tensor]:
        if not self._bound or (not self._whole_step and self._model() is None):
            self._find_model(bucket)
        if not self._whole_step or not self.under_way:
            self._check_parameters(bucket)
        self.begin_step()
        future = self._all_reduce(bucket) if self.warming_up else self._submit(bucket)
        if bucket.is_last():
            self.end_step()
        return future

    def _find_model(self, bucket: GradBucket) -> None:
        """Find the model that a bucket is of, and bind this state to it or compare their groups."""
        model = _model_of(bucket.parameters()[0], self)
        if model is not None:
            self._model = weakref.ref(model)
        if not self._bound:
            if model is None:
                raise RuntimeError(
                    "the model of this CompressionState is not found: write compress(model, "
                    "compressor)"
                )
            self._bind(_averaged(model), model.process_group)
        elif model is not None and not self._group_given:
            theirs, ours = (
                dist.get_process_group_ranks(group)
                for group in (model.process_group, self.process_group)
            )
            if theirs != ours:
                raise ValueError(
                    f"the model averages over ranks {theirs}, and its CompressionState over "
                    f"{ours}: write compress(model, compressor), which takes the model's group, or "
                    "give process_group=model.process_group"
                )

    def _check_parameters(self, bucket: GradBucket) -> None:
        """Raise an error for a parameter that has a gradient and is in no bucket."""
        if not self._whole_step:
            for name in self._names_of(bucket):
                self._outside.pop(name, None)
            if not bucket.is_last():
                return
            model = self._model()
            ignored = set() if model is None else model.parameters_to_ignore
            for name in list(self._outside):
                if name in ignored or name.removeprefix("module.") in ignored:
                    del self._outside[name]
            self._whole_step = True
        for name, parameter in self._outside.items():
            if parameter.requires_grad:
                raise RuntimeError(
                    f"parameter {name!r} was frozen when the model was wrapped, and requires a "
                    "gradient now, which DistributedDataParallel does not average: wrap the model "
                    "again, and then compress it"
                )

    def _all_reduce(self, bucket: GradBucket) -> torch.futures.Future[Tensor]:
        """Average as without a hook: on the model's own group, beside the backward pass."""
        factor = self.share * self.transport.size
        if factor != 1:
            bucket.buffer().mul_(factor)
        return allreduce_hook(self.process_group, bucket)

    def _submit(self, bucket: GradBucket) -> torch.futures.Future[Tensor]:
        buffer, grads = bucket.buffer(), self._named_gradients(bucket)
        future: torch.futures.Future[Tensor] = torch.futures.Future(
            devices=[buffer.device] if buffer.device.type == "cuda" else None
        )

        def deliver(average: Average | None) -> None:
            # Without a result the backward pass would never end; `end_step` raises the error.
            future.set_result(buffer if average is None else _flat(average, buffer, grads))

        self.submit(grads, deliver)
        return future

    def _names_of(self, bucket: GradBucket) -> list[str]:
        names = []
        for parameter in bucket.parameters():
            if id(parameter) not in self._names:
                raise ValueError(
                    f"a parameter of shape {tuple(parameter.shape)} is not one of the model that "
                    "this CompressionState belongs to: every model needs a state of its own"
                )
            names.append(self._names[id(parameter)])
        return names

    def _named_gradients(self, bucket: GradBucket) -> dict[str, Tensor]:
        names = self._names_of(bucket)
        parameters, gradients = bucket.parameters(), bucket.gradients()
        if bucket.buffer().is_sparse:
            raise TypeError(
                f"the gradient of {names[0]!r} is sparse, and compression needs dense ones: build "
                "the embedding with sparse=False"
            )
        for name, parameter, grad in zip(names, parameters, gradients, strict=True):
            if grad.dtype != parameter.dtype:
                raise TypeError(
                    f"the gradient of {name!r} has {grad.dtype}, and the parameter "
                    f"{parameter.dtype}: register compression_hook by itself, without "
                    "fp16_compress_wrapper or bf16_compress_wrapper; a compressor has values=..."
                )
        return dict(zip(names, gradients, strict=True))


def compression_hook(
    state: CompressionState, bucket: GradBucket
) -> torch.futures.Future[torch.Tensor]:
    """Average the gradients of a bucket over all ranks, in compressed form.

    For ``model.register_comm_hook(state, compression_hook)``. One thread with a process group of
    its own encodes, exchanges and decodes, beside the backward pass.

    Raises
    ------
    TypeError
        If `state` is not a `CompressionState`, or a gradient cannot be compressed.
    ValueError
        In the first step, on every rank, if the ranks were given different compressors or models.
    RuntimeError
        If another rank failed or cannot be reached; the message is torch's own.
    """
    if not isinstance(state, CompressionState):
        raise TypeError(
            f"the state of compression_hook is a CompressionState, not {state!r}: write "
            "compress(model, compressor) in the place of model.register_comm_hook(...)"
        )
    if not isinstance(bucket, GradBucket):
        raise TypeError(
            f"compression_hook was called with a {type(bucket).__name__} in the place of a bucket, "
            'as by torch._dynamo.config.optimize_ddp = "python_reducer": set it to True'
        )
    return state._hook(bucket)


def _averaged(model: DistributedDataParallel) -> list[tuple[str, Tensor]]:
    """Return the parameters of a model by name, without those that it was told to ignore."""
    return [
        (name, parameter)
        for name, parameter in named_pairs(model.named_parameters())
        if name.removeprefix("module.") not in model.parameters_to_ignore
    ]


def _model_of(parameter: Tensor, state: CompressionState) -> DistributedDataParallel | None:
    """Return the model that has a parameter, and of several the one whose hook has the state."""
    # The type of an object is asked for, since isinstance would call code of proxies.
    models = [one for one in gc.get_objects() if issubclass(type(one), DistributedDataParallel)]
    found = [m for m in models if any(p is parameter for p in m.parameters())]
    hooked = [m for m in found if any(s is state for _, s in getattr(m, "_comm_hooks", ()))]
    chosen = hooked or found
    return chosen[0] if len(chosen) == 1 else None


def _nothing() -> None:
    return None


def _flat(average: Average, buffer: Tensor, grads: Mapping[str, Tensor]) -> Tensor:
    """Finish an average as one tensor in the layout of a bucket's buffer.

    `grads` are views of the buffer.
    """
    out = torch.zeros_like(buffer, dtype=sum_dtype(buffer.dtype))
    into = {
        name: out.as_strided(
            grad.shape, grad.stride(), grad.storage_offset() - buffer.storage_offset()
        )
        for name, grad in grads.items()
    }
    for name, finished in average.finish(into).items():
        if finished is not into[name]:
            into[name].copy_(finished)
    return out.to(buffer.dtype)


def _default_group() -> dist.ProcessGroup:
    group = dist.group.WORLD
    assert group is not None
    return group


def _group_like(group: dist.ProcessGroup) -> dist.ProcessGroup:
    """Return a new group of the same ranks, with the same backend and time-out.

    The averages need one of their own: two users of one group would mix up their collectives.
    """
    ranks = dist.get_process_group_ranks(group)
    made = dist.new_group(
        ranks,
        timeout=_timeout(group),
        backend=dist.get_backend(group),
        use_local_synchronization=True,
    )
    assert isinstance(made, dist.ProcessGroup)
    return made


def _timeout(group: dist.ProcessGroup) -> datetime.timedelta | None:
    """Return the time-out that a group was made with, or None if its backend does not tell."""
    backend = "cuda" if dist.get_backend(group) == "nccl" else "cpu"
    try:
        timeout = group._get_backend(torch.device(backend)).options._timeout
    except (AttributeError, RuntimeError):
        return None
    return timeout if isinstance(timeout, datetime.timedelta) else None
