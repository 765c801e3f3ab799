"""Compression between the replicas of a model that is sharded by `fully_shard` (FSDP2).

>>> from torch.distributed.device_mesh import init_device_mesh
>>> from lbgm_compress import ErrorFeedback, SharedSubspace
>>> def shard_and_compress(model, nodes, ranks_per_node):
...     from torch.distributed.fsdp import fully_shard
...     from lbgm_compress.adapters.fsdp import compress
...     names = ("replicate", "shard")
...     mesh = init_device_mesh("cuda", (nodes, ranks_per_node), mesh_dim_names=names)
...     fully_shard(model, mesh=mesh["shard"])
...     return compress(model, ErrorFeedback(SharedSubspace(8)), mesh["replicate"])

The backward pass averages gradients within a replica, and leaves each rank the gradients of its
shard. `CompressionState.average_gradients` then averages them over the ranks that have the same
shard in the other replicas. The averages have the same bits on all of these ranks.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

try:
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
    from torch.distributed.tensor import DTensor
except ImportError as error:
    raise ImportError(
        "lbgm_compress.adapters.fsdp needs torch.distributed.fsdp.fully_shard, which this torch "
        "does not have: pip install 'torch>=2.6'"
    ) from error

from lbgm_compress._util.groups import group_like
from lbgm_compress.algorithm import Algorithm
from lbgm_compress.collective.applied import Parameters
from lbgm_compress.collective.averager import Averager
from lbgm_compress.collective.parameters import may_have_gradient, zeros_of
from lbgm_compress.collective.saved import check_saved
from lbgm_compress.collective.transport import ProcessGroupTransport, Transport

__all__ = ["CompressionState", "compress"]

CALL = 'write compress(model, compressor, mesh["replicate"])'
SHARD = 'call fully_shard(model, mesh=mesh["shard"]), over the dimension of the shards alone'

_states: weakref.WeakSet[CompressionState] = weakref.WeakSet()


class CompressionState(Averager):
    """Averages the gradients of one model's shards over its replicas. It is one rank's part.

    `compress` makes one. The model's parameters keep it, so that the error of a forgotten
    `average_gradients` is raised also where the program does not keep it.

    Attributes
    ----------
    step : int
        Number of steps so far.
    """

    def __init__(
        self,
        compressor: Algorithm,
        model: nn.Module,
        parameters: Mapping[str, DTensor],
        replicas: dist.ProcessGroup,
        start_step: int,
        weight: float,
        loss_scale: float | Callable[[], float],
    ) -> None:
        mesh = next(iter(parameters.values())).device_mesh
        # Nothing else uses the group of the shards outside of the forward and backward passes.
        self._shards = ProcessGroupTransport(mesh.get_group())
        self._place = [self._shards.rank, self._shards.size]
        # That of the gradients is another one where they are offloaded.
        self._device_of_shards = mesh.device_type
        super().__init__(
            compressor,
            {name: _local(p) for name, p in parameters.items()},
            ProcessGroupTransport(group_like(replicas)),
            start_step,
            weight,
            loss_scale=loss_scale,
        )
        # The first line, as the sizes of two shards may differ.
        self.description = "shard {} of {}\n{}".format(*self._place, self.description)
        self._model = weakref.ref(model)
        # Weak, since parameters have this state as their hook, and torch frees no such circle.
        self._references = {name: weakref.ref(p) for name, p in parameters.items()}
        # Optimizers have the parameters, not their shards.
        self._watched = Parameters(parameters.values(), self._applied)
        # Whether there are gradients that the backward pass made since the last average.
        self._waiting = False
        # Whether a parameter had no gradient on this rank, and on one of the replicas.
        self._met_unused = self._some_unused = False
        self.verify_ranks_match()
        for parameter in parameters.values():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
                    self._accumulated
                )

    def average_gradients(self) -> None:
        """Average the gradients over the replicas, in compressed form.

        All ranks call it once a step: after the backward pass, the last one if gradients are
        accumulated, and before they are unscaled, clipped or applied. It replaces each gradient by
        the average. A parameter that no replica used keeps the gradient None, and nothing is
        written to one that does not require a gradient.

        A step whose averages have inf or nan in any shard is taken back on all ranks.

        Raises
        ------
        TypeError, ValueError
            If a gradient cannot be compressed, or the loss scale is out of range.
        RuntimeError
            If another rank failed or cannot be reached, or if an earlier step failed.
        """
        self._check_not_replaced()
        if not self._met_unused and any(p.grad is None for _, p in self._trained()):
            self._met_unused = True
            self._ask_to_compare()
        # Steps of plain all-reduce do not compare.
        ask = self.warming_up
        averages: dict[str, Tensor] = {}
        used: set[str] = set()
        failure: Exception | None = None
        try:
            averages = self.average({name: _gradient(p) for name, p in self._parameters.items()})
            if ask or self._some_unused:
                used = self._used_by_any()
        except Exception as error:
            self.fail(error)
            failure = error
        self._agree_among_shards(failure)
        for name, parameter in self._trained():
            if parameter.grad is not None:
                _local(parameter.grad).copy_(averages[name])
            elif name in used:
                parameter.grad = _like(parameter, averages[name])
        self._waiting = False

    def verify_ranks_match(self) -> None:
        super().verify_ranks_match()
        flag = torch.tensor([self._met_unused], dtype=torch.uint8, device=self._device)
        self._some_unused = bool(self.transport.gather_equal(flag).any())

    def state_dict(self) -> dict[str, Any]:
        """Return the state of this rank's shard as a nested dict of tensors and numbers.

        Every rank has a state of its own, and must save it. `torch.load` reads it with
        ``weights_only=True``.
        """
        return {**super().state_dict(), "shard": self._place}

    def gather_state_dict(self) -> dict[str, Any]:
        """Return the states of a shard in all replicas, on the ranks of the first replica.

        It is an empty dict on the ranks of other replicas. All ranks call it together.
        `load_state_dict` takes the dict of a shard on all ranks that have this shard.
        """
        state = super().gather_state_dict()
        return {**state, "shard": self._place} if state else state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` or `gather_state_dict` was called.

        All ranks call it, between two steps. The number of replicas may be another, and the
        number of shards may not. The next step compares the replicas first: see `Averager`.

        Raises
        ------
        ValueError
            If it is the state of another shard, compressor or model, or no such state. This state
            is then unchanged.
        """
        check_saved(state, type(self).__name__)
        if state.get("shard") != self._place:
            found = "shard {} of {}".format(*state["shard"]) if "shard" in state else "no shard"
            raise ValueError(
                "the state is that of {}, and this rank has shard {} of {}: save a file for every "
                "rank, and load it on the same rank".format(found, *self._place)
            )
        super().load_state_dict(state)

    def has_any(self, parameters: Iterable[Tensor]) -> bool:
        """Return whether this state averages one of these parameters."""
        ids = {id(p) for p in self._parameters.values()}
        return any(id(p) in ids for p in parameters)

    @property
    def _parameters(self) -> dict[str, DTensor]:
        return {name: p for name, ref in self._references.items() if (p := ref()) is not None}

    def _trained(self) -> list[tuple[str, DTensor]]:
        return [(name, p) for name, p in self._parameters.items() if p.requires_grad]

    def _accumulated(self, _: Tensor) -> None:
        self._waiting = True

    def _applied(self) -> None:
        if self._waiting and any(p.grad is not None for _, p in self._trained()):
            raise RuntimeError(
                "an optimizer applied gradients that were not averaged over the replicas, whose "
                "parameters differ now: call state.average_gradients() between loss.backward() and "
                "optimizer.step()"
            )
        super()._applied()

    def _check_not_replaced(self) -> None:
        """Raise `RuntimeError` if the model has other parameters than when it was compressed."""
        model = self._model()
        for name, parameter in [] if model is None else model.named_parameters():
            # A parameter that is whole, as after a forward pass, is another tensor.
            known = self._references.get(name)
            if known is not None and isinstance(parameter, DTensor) and known() is not parameter:
                raise RuntimeError(
                    f"parameter {name!r} was replaced after the model was compressed, as by "
                    "load_state_dict(..., assign=True): call compress, and build the optimizer, "
                    "after that"
                )

    def _used_by_any(self) -> set[str]:
        """Return the names of parameters of which any replica has a gradient.

        All replicas ask together.
        """
        flags = [p.requires_grad and p.grad is not None for p in self._parameters.values()]
        mine = torch.tensor(flags, dtype=torch.uint8, device=self._device)
        found = self.transport.gather_equal(mine).any(dim=0).tolist()
        return {name for name, any_ in zip(self._parameters, found, strict=True) if any_}

    def _agree_among_shards(self, failure: Exception | None) -> None:
        """Take the step back if it is taken back for another shard, and raise errors on all."""
        taken_back = self._versions is None
        notice = torch.tensor(
            [failure is not None, taken_back], dtype=torch.float32, device=self._device_of_shards
        )
        if failure is not None:
            # The ranks with the other shards wait for it.
            with contextlib.suppress(RuntimeError):
                self._shards.all_reduce(notice)
            raise failure
        failed, spoiled = self._shards.all_reduce(notice).tolist()
        if failed:
            error = RuntimeError(
                "a rank with another shard of the model failed: see the error there"
            )
            self.fail(error)
            raise error
        if spoiled and not taken_back:
            self._take_back()


def compress(
    model: nn.Module,
    compressor: Algorithm,
    replicas: DeviceMesh | dist.ProcessGroup,
    *,
    start_step: int = 0,
    weight: float = 1.0,
    loss_scale: float | Callable[[], float] = 1.0,
) -> CompressionState:
    """Prepare compression between the replicas of a model that is sharded by `fully_shard`.

    All ranks call it together, after `fully_shard`. Replicas then begin with the parameters and
    buffers of the first one. After each backward pass, call `CompressionState.average_gradients`.

    Parameters
    ----------
    model
        The model, sharded over the ranks of one replica: over a mesh of one dimension. All of its
        parameters that require a gradient are sharded.
    compressor
        Compresses the gradients of a rank's shard: any compressor or `Reducible`, the same on all
        ranks.
    replicas
        The ranks that have this rank's shard, one of each replica: a mesh of one dimension, such
        as ``mesh["replicate"]``, or a process group.
    start_step
        Number of steps of plain all-reduce at the beginning. Gradients change fastest there.
    weight
        The replica's weight in the average, the same on all of its ranks; positive. Its share is
        the weight divided by the sum of the weights of all replicas.
    loss_scale
        The factor by which the loss is multiplied: a number, or a callable that returns it, such as
        ``scaler.get_scale``. Residuals and `NormBudget` follow it.

    Returns
    -------
    CompressionState
        For `average_gradients`, `stats`, `undo`, `state_dict` and `load_state_dict`.

    Raises
    ------
    TypeError, ValueError
        If an argument is of the wrong type or out of range, or if the model is not sharded as
        above; on all ranks that have one shard, if they were given different compressors or models.
    RuntimeError
        If the model is compressed already.
    """
    if not isinstance(model, nn.Module) or not isinstance(compressor, Algorithm):
        given = (model, compressor, replicas)
        if any(isinstance(of, nn.Module) for of in given) and any(
            isinstance(of, Algorithm) for of in given
        ):
            raise TypeError(f"the arguments are swapped: {CALL}")
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}: {CALL}")
    CompressionState.check_options(compressor, start_step, weight, loss_scale)
    parameters = _sharded_parameters(model)
    group = _group_of(replicas)
    _check_disjoint(group, next(iter(parameters.values())).device_mesh)
    if any(state.has_any(parameters.values()) for state in _states):
        raise RuntimeError(
            "the model is compressed already, by another CompressionState: call compress once"
        )
    state = CompressionState(compressor, model, parameters, group, start_step, weight, loss_scale)
    _states.add(state)
    device = _local(next(iter(parameters.values()))).device
    for tensor in (*model.parameters(), *model.buffers()):
        _take_from_first(state.transport, _local(tensor), device)
    return state


def _sharded_parameters(model: nn.Module) -> dict[str, DTensor]:
    """Return the parameters of a model that may have a gradient, by name.

    Raises
    ------
    TypeError, ValueError
        If the model is not sharded by `fully_shard` over one dimension.
    """
    modules = list(model.modules())
    if any(isinstance(module, FullyShardedDataParallel) for module in modules):
        raise TypeError(
            f"the model is wrapped in FullyShardedDataParallel, which is FSDP1: {SHARD}"
        )
    sharding = [module for module in modules if isinstance(module, FSDPModule)]
    if not sharding:
        raise TypeError(
            f"the model is not sharded: {SHARD}; for a model in DistributedDataParallel take "
            "lbgm_compress.adapters.ddp"
        )
    for module in sharding:
        # After a forward pass alone, parameters may be whole.
        module.reshard()
    parameters: dict[str, DTensor] = {}
    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor):
            _check_sharded(name, parameter)
            if may_have_gradient(parameter):
                parameters[name] = parameter
        elif parameter.requires_grad:
            raise TypeError(
                f"parameter {name!r} is not sharded, so that its gradient is not averaged within "
                f"a replica: {SHARD}, with the outermost module as model, and without this "
                "parameter in ignored_params"
            )
    if not any(p.requires_grad for p in parameters.values()):
        raise ValueError("the model has no parameter that requires a gradient")
    meshes = {p.device_mesh for p in parameters.values()}
    if len(meshes) > 1:
        raise ValueError(f"the parameters are sharded over {len(meshes)} meshes: {SHARD}")
    return parameters


def _check_sharded(name: str, parameter: DTensor) -> None:
    """Raise `TypeError` or `ValueError` unless a parameter is sharded over one dimension."""
    mesh, placements = parameter.device_mesh, parameter.placements
    if any(placement.is_replicate() for placement in placements):
        raise ValueError(
            f"parameter {name!r} has placements {placements}, so that its gradient is averaged "
            f"over the replicas already: {SHARD}"
        )
    if mesh.ndim > 1:
        raise ValueError(
            f"parameter {name!r} is sharded over {mesh.ndim} dimensions {mesh.mesh_dim_names}, "
            f"such as those of tensor parallelism, which is not supported: {SHARD}"
        )
    if parameter.is_meta:
        raise ValueError(
            f"parameter {name!r} is on the meta device: call model.to_empty() and initialise it "
            "before compress"
        )


def _group_of(replicas: Any) -> dist.ProcessGroup:
    """Return the process group of the replicas, or raise `TypeError` or `ValueError`."""
    if isinstance(replicas, DeviceMesh):
        if replicas.ndim != 1:
            raise ValueError(
                f"replicas is a mesh of {replicas.ndim} dimensions {replicas.mesh_dim_names}: give "
                'the one of the replicas, as mesh["replicate"]'
            )
        group = replicas.get_group()
        assert isinstance(group, dist.ProcessGroup)
        return group
    if replicas == dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError("this rank is not in the process group of the replicas: give its own")
    if not isinstance(replicas, dist.ProcessGroup):
        raise TypeError(
            "replicas must be a DeviceMesh of one dimension or a ProcessGroup, not "
            f"{type(replicas).__name__}: {CALL}"
        )
    return replicas


def _check_disjoint(group: dist.ProcessGroup, mesh: DeviceMesh) -> None:
    """Raise `ValueError` if a replica of this rank's shard has another shard of this replica."""
    ranks = dist.get_process_group_ranks(group)
    shards = dist.get_process_group_ranks(mesh.get_group())
    if dist.get_rank() not in ranks or len(set(ranks) & set(shards)) > 1:
        raise ValueError(
            f"ranks {ranks} are given as replicas, and the model is sharded over ranks {shards}: "
            'give the ranks with the same place in the other replicas, as mesh["replicate"]'
        )


def _take_from_first(transport: Transport, tensor: Tensor, device: torch.device) -> None:
    """Replace a tensor by that of the first rank, through `device`; all ranks call it together."""
    data = tensor.contiguous().reshape(-1).view(torch.uint8).to(device)
    transport.gather_unequal([data if rank == 0 else data[:0] for rank in range(transport.size)])
    tensor.copy_(data.view(tensor.dtype).view(tensor.shape))


def _local(tensor: Tensor) -> Tensor:
    """Return this rank's shard, or a whole tensor as it is; writing to it writes to the tensor."""
    with torch.no_grad():
        return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def _gradient(parameter: DTensor) -> Tensor:
    """Return this rank's gradient; zeros if the parameter has none or is frozen."""
    # The gradient of a frozen parameter, if it has one, is of an earlier step.
    if parameter.grad is None or not parameter.requires_grad:
        return zeros_of(_local(parameter))
    return _local(parameter.grad)


def _like(parameter: DTensor, shard: Tensor) -> DTensor:
    """Return a gradient of a parameter that has this rank's `shard`."""
    return DTensor.from_local(
        shard,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )
