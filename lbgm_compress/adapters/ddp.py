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
- in a step, for one bucket of B bytes at a time, B for the average, and at most K B for the
  messages of all ranks.
"""

# Without `from __future__ import annotations`: `register_comm_hook` compares annotations by value.

import datetime
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import GradBucket
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from lbgm_compress.collective.average import Average, sum_dtype
from lbgm_compress.collective.background import BackgroundAverager
from lbgm_compress.collective.transport import ProcessGroupTransport
from lbgm_compress.compressor import Compressor, check_compressor

__all__ = ["CompressionState", "compress", "compression_hook"]

NAMED = "give model.named_parameters()"


def compress(
    model: DistributedDataParallel,
    compressor: Compressor,
    *,
    start_step: int = 0,
    weight: float = 1.0,
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
    start_step, weight
        As in `CompressionState`.

    Returns
    -------
    CompressionState
        For `stats`, `state_dict` and `load_state_dict`.

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
        model.named_parameters(),
        model.process_group,
        start_step=start_step,
        weight=weight,
    )
    try:
        model.register_comm_hook(state, compression_hook)
    except RuntimeError as error:
        raise RuntimeError(
            f"the model takes no hook: it has one already, or is not to communicate ({error})"
        ) from None
    return state


class CompressionState(BackgroundAverager):
    """The state of `compression_hook`, for one model on one rank.

    Building one is a collective call: all ranks of the process group build theirs, for their
    models in the same order.

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

    Raises
    ------
    TypeError, ValueError
        If an argument is of the wrong type or out of range.
    RuntimeError
        If `torch.distributed` is not initialised.
    """

    def __init__(
        self,
        compressor: Compressor,
        named_parameters: Iterable[tuple[str, Tensor]],
        process_group: dist.ProcessGroup | None = None,
        start_step: int = 0,
        weight: float = 1.0,
    ) -> None:
        if isinstance(named_parameters, Compressor):
            raise TypeError(
                "the arguments are swapped: write CompressionState(compressor, "
                "model.named_parameters())"
            )
        check_compressor(compressor)
        parameters = {name: p for name, p in _named(named_parameters) if p.requires_grad}
        if not dist.is_available() or not dist.is_initialized():
            raise RuntimeError("call torch.distributed.init_process_group() first")
        self.process_group = process_group if process_group is not None else _default_group()
        transport = ProcessGroupTransport(_group_like(self.process_group))
        super().__init__(compressor, parameters, transport, start_step, weight)
        self._names = {id(parameter): name for name, parameter in parameters.items()}
        # Keeps the parameters alive, so that no other tensor gets one of their ids.
        self._parameters = list(parameters.values())

    def _hook(self, bucket: GradBucket) -> torch.futures.Future[Tensor]:
        self.begin_step()
        future = self._all_reduce(bucket) if self.warming_up else self._submit(bucket)
        if bucket.is_last():
            self.end_step()
        return future

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

    def _named_gradients(self, bucket: GradBucket) -> dict[str, Tensor]:
        parameters, gradients = bucket.parameters(), bucket.gradients()
        names = []
        for parameter in parameters:
            if id(parameter) not in self._names:
                raise ValueError(
                    f"a parameter of shape {tuple(parameter.shape)} is not among the "
                    "named_parameters that CompressionState was given: build it from the same model"
                )
            names.append(self._names[id(parameter)])
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


def _named(named_parameters: Any) -> list[tuple[str, Tensor]]:
    """Return pairs of names and parameters, or raise an error that names the mistake."""
    if isinstance(named_parameters, torch.nn.Module):
        found = type(named_parameters).__name__
        raise TypeError(f"named_parameters is the model itself, a {found}: {NAMED}")
    if isinstance(named_parameters, Mapping):
        raise TypeError(
            "named_parameters is a mapping, such as state_dict() returns, whose tensors need not "
            f"be the parameters: {NAMED}"
        )
    if not isinstance(named_parameters, Iterable):
        raise TypeError(f"named_parameters is a {type(named_parameters).__name__}: {NAMED}")
    pairs = list(named_parameters)
    if not pairs:
        raise ValueError(
            "named_parameters has no parameter that requires a gradient, for it is empty: if it is "
            "an iterator that was used before, call model.named_parameters() again"
        )
    names = set()
    for pair in pairs:
        if isinstance(pair, Tensor):
            raise TypeError(
                f"named_parameters has tensors without names, as model.parameters() has: {NAMED}"
            )
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise TypeError(f"named_parameters has {pair!r} in the place of a pair: {NAMED}")
        name, parameter = pair
        if not isinstance(name, str) or not isinstance(parameter, Tensor):
            raise TypeError(
                f"named_parameters has a pair of {type(name).__name__} and "
                f"{type(parameter).__name__} in the place of a name and a parameter: {NAMED}"
            )
        if name in names:
            raise ValueError(
                f"named_parameters has two parameters of the name {name!r}: a CompressionState is "
                "for one model"
            )
        if hasattr(parameter, "device_mesh"):
            raise TypeError(
                f"parameter {name!r} is a DTensor, as fully_shard makes them: compression works "
                "with DistributedDataParallel"
            )
        names.add(name)
    return [(name, parameter) for name, parameter in pairs]


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
