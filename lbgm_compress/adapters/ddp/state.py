"""The state of the hook: what one rank keeps for one model."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import GradBucket
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from lbgm_compress._util.collection import paused_collection
from lbgm_compress._util.groups import check_group, default_group, group_like
from lbgm_compress.adapters.ddp.wrapped import averaged_parameters, ignored_parameters, wrappers_of
from lbgm_compress.algorithm import Algorithm
from lbgm_compress.collective.average import Average, sum_dtype
from lbgm_compress.collective.background import BackgroundAverager
from lbgm_compress.collective.nodes import check_node_group, nodes_of
from lbgm_compress.collective.parameters import (
    NamedParameters,
    may_have_gradient,
    named_pairs,
    zeros_of,
)
from lbgm_compress.collective.saved import check_saved
from lbgm_compress.collective.transport import ProcessGroupTransport
from lbgm_compress.endpoints import Sender
from lbgm_compress.endpoints.contributor import Contributor

__all__ = ["CompressionState"]


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
        Compresses the gradients: any compressor or `Reducible`, the same on all ranks.
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
    node_group
        The group of the ranks of this rank's node, as the first result of
        ``torch.distributed.new_subgroups``; every rank of `process_group` is in one. Averages in a
        node are dense, and the first rank of each node exchanges compressed gradients with those
        of the other nodes. Residuals and look-back gradients are these ranks' alone.

    Raises
    ------
    TypeError, ValueError
        If an argument is of the wrong type or out of range. On every rank, if `node_group` is not
        that of its own node on some of them.
    RuntimeError
        If `named_parameters` is given, and `torch.distributed` is not initialised.
    """

    def __init__(
        self,
        compressor: Algorithm,
        named_parameters: NamedParameters | None = None,
        process_group: dist.ProcessGroup | None = None,
        start_step: int = 0,
        weight: float = 1.0,
        *,
        loss_scale: float | Callable[[], float] = 1.0,
        node_group: dist.ProcessGroup | None = None,
    ) -> None:
        if isinstance(named_parameters, Algorithm):
            raise TypeError(
                "the arguments are swapped: write CompressionState(compressor, "
                "model.named_parameters())"
            )
        self.check_options(compressor, start_step, weight, loss_scale)
        if process_group is not None:
            check_group(process_group)
        if named_parameters is None and process_group is not None:
            raise TypeError(
                "process_group is given without named_parameters: leave out both, and those of the "
                "model are taken in the first backward pass"
            )
        check_node_group(node_group)
        self._bound = False
        self._node_group = node_group
        self._model: Callable[[], DistributedDataParallel | None] = _nothing
        self._saved: Mapping[str, Any] | None = None
        self._options = {"start_step": start_step, "weight": weight, "loss_scale": loss_scale}
        self._given = compressor
        if named_parameters is not None:
            self._bind(named_pairs(named_parameters), process_group)

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            if name.startswith("__") or self.__dict__.get("_bound", True):
                raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
            raise AttributeError(
                "this CompressionState has no model yet: the first backward pass binds it to the "
                "model that it is registered with"
            )

    def _bind(
        self, pairs: Iterable[tuple[str, Tensor]], process_group: dist.ProcessGroup | None
    ) -> None:
        """Take the parameters and the group, of which all ranks make a new one together."""
        if not dist.is_available() or not dist.is_initialized():
            raise RuntimeError("call torch.distributed.init_process_group() first")
        parameters = {name: p for name, p in pairs if may_have_gradient(p)}
        if not any(p.requires_grad for p in parameters.values()):
            raise ValueError(
                "named_parameters has no parameter that requires a gradient: give "
                "model.named_parameters() of the model that is trained"
            )
        self.process_group = process_group if process_group is not None else default_group()
        transport = ProcessGroupTransport(group_like(self.process_group))
        if transport.size == 1:
            warnings.warn(
                "the process group has one rank: gradients are compressed, which costs accuracy, "
                "and sent to nobody; start several, as with torchrun --nproc-per-node=2",
                stacklevel=3,
            )
        device = next(iter(parameters.values())).device
        nodes = nodes_of(transport, self.process_group, self._node_group, device)
        super().__init__(self._given, parameters, transport, nodes=nodes, **self._options)
        # This keeps the parameters alive, so that no other tensor gets one of their ids.
        self._parameters = parameters
        self._names = {id(parameter): name for name, parameter in parameters.items()}
        self._watch(None)
        self._bound = True
        if self._saved is not None:
            state, self._saved = self._saved, None
            self.load_state_dict(state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if self._bound:
            super().load_state_dict(state)
            return
        check_saved(state, type(self).__name__)
        kind: Any = Contributor if self._given.adds_up else Sender
        for sender in state["senders"].values() if "senders" in state else [state["sender"]]:
            kind(self._given).load_state_dict(sender)
        self._saved = state

    def undo(self) -> None:
        # A loop may undo its very first step before the backward pass.
        if self._bound:
            super().undo()

    @paused_collection()
    def _hook(self, bucket: GradBucket) -> torch.futures.Future[Tensor]:
        if not self._bound or not self.under_way:
            self._find_model(bucket)
        grads = self._named_gradients(bucket)
        self._check_unfrozen(bucket, grads)
        self.begin_step()
        future = self._all_reduce(bucket) if self.warming_up else self._submit(bucket, grads)
        if bucket.is_last():
            self.end_step()
        return future

    # --- the model ----------------------------------------------------------------------------

    def _watch(self, model: DistributedDataParallel | None) -> None:
        """Learn from the next step which parameters a model averages: those in its buckets."""
        self._model = _nothing if model is None else weakref.ref(model)
        self._outside = dict(self._parameters)
        self._whole_step = False

    def _find_model(self, bucket: GradBucket) -> None:
        """Before the first step, bind this state to the bucket's model, or compare their groups."""
        if self._bound:
            self.check_usable()
            if self._whole_step or self._model() is not None:
                return
        models = wrappers_of(bucket.parameters()[0], self)
        groups = [dist.get_process_group_ranks(model.process_group) for model in models]
        if not self._bound:
            if not models or any(ranks != groups[0] for ranks in groups):
                raise RuntimeError(
                    f"{len(models)} models have the parameters of this CompressionState: write "
                    "compress(model, compressor), which says which one it is for"
                )
            self._bind(averaged_parameters(models[0]), models[0].process_group)
        ours = dist.get_process_group_ranks(self.process_group)
        if models and ours not in groups:
            raise ValueError(
                f"the model averages over ranks {groups[0]}, and its CompressionState over {ours}: "
                "write compress(model, compressor), which takes the model's group, or give "
                "process_group=model.process_group"
            )
        if models:
            self._watch(models[groups.index(ours)])

    def _check_unfrozen(self, bucket: GradBucket, names: Iterable[str]) -> None:
        """Raise an error for a parameter that requires a gradient and is in no bucket."""
        if self._whole_step:
            if self.under_way or self._unfrozen() is None:
                return
            others = [
                m for m in wrappers_of(bucket.parameters()[0], self) if m is not self._model()
            ]
            if not others:
                self._raise_unfrozen()
            # The module was wrapped again, and this bucket may be of the new wrapper.
            self._watch(others[0])
        for name in names:
            self._outside.pop(name, None)
        if not bucket.is_last():
            return
        model = self._model()
        for parameter in [] if model is None else ignored_parameters(model):
            self._outside.pop(self._names.get(id(parameter), ""), None)
        self._whole_step = True
        if self._unfrozen() is not None:
            self.abandon_step()
            self._raise_unfrozen()

    def _unfrozen(self) -> str | None:
        """Return the name of a parameter that requires a gradient and is in no bucket."""
        return next((name for name, p in self._outside.items() if p.requires_grad), None)

    def _raise_unfrozen(self) -> None:
        raise RuntimeError(
            f"parameter {self._unfrozen()!r} was frozen when the model was wrapped, and requires a "
            "gradient now, which DistributedDataParallel does not average: wrap the model again, "
            "and then compress it"
        )

    # --- the gradients ------------------------------------------------------------------------

    def _all_reduce(self, bucket: GradBucket) -> torch.futures.Future[Tensor]:
        """Average as without a hook: on the model's own group, beside the backward pass."""
        factor = self.share * self.transport.size
        if factor != 1:
            bucket.buffer().mul_(factor)
        return allreduce_hook(self.process_group, bucket)

    def _submit(
        self, bucket: GradBucket, grads: Mapping[str, Tensor]
    ) -> torch.futures.Future[Tensor]:
        buffer = bucket.buffer()
        future: torch.futures.Future[Tensor] = torch.futures.Future(
            devices=[buffer.device] if buffer.device.type == "cuda" else None
        )

        def deliver(average: Average | None) -> None:
            # Without a result the backward pass would never end; `end_step` raises the error.
            future.set_result(buffer if average is None else _flat(average, buffer, grads))

        # The gradient of a frozen parameter, if it has one, is of an earlier step.
        parameters = zip(grads, bucket.parameters(), strict=True)
        sent = {name: grads[name] if p.requires_grad else zeros_of(p) for name, p in parameters}
        self.submit(sent, deliver)
        return future

    def _named_gradients(self, bucket: GradBucket) -> dict[str, Tensor]:
        """Return the gradients of a bucket by name; raise an error if they cannot be compressed."""
        parameters, gradients = bucket.parameters(), bucket.gradients()
        for parameter in parameters:
            if id(parameter) not in self._names:
                raise ValueError(
                    f"a parameter of shape {tuple(parameter.shape)} is not a parameter of the "
                    "model that this CompressionState belongs to: every model needs a state of "
                    "its own"
                )
        names = [self._names[id(parameter)] for parameter in parameters]
        if bucket.buffer().is_sparse:
            raise TypeError(
                f"the gradient of {names[0]!r} is sparse, and compression needs dense ones: build "
                "the embedding with sparse=False"
            )
        for name, parameter, grad in zip(names, parameters, gradients, strict=True):
            if grad.dtype != parameter.dtype:
                raise TypeError(
                    f"the gradient of {name!r} has dtype {grad.dtype}, and its parameter "
                    f"{parameter.dtype}: register compression_hook by itself, without "
                    "fp16_compress_wrapper or bf16_compress_wrapper; a compressor has values=..."
                )
        return dict(zip(names, gradients, strict=True))


def _nothing() -> None:
    return None


def _flat(average: Average, buffer: Tensor, grads: Mapping[str, Tensor]) -> Tensor:
    """Finish an average as one tensor in the layout of a bucket's buffer.

    `grads` are views of the buffer.
    """
    dtype = sum_dtype(buffer.dtype)
    # Gradients are read until the end of all sums, and averages are written after it.
    out = torch.zeros_like(buffer, dtype=dtype) if average.adds else buffer.to(dtype)
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
