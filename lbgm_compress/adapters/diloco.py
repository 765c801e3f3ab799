"""Local training over `torch.distributed`: DiLoCo with compressed pseudo-gradients."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lbgm_compress._util.groups import check_group, default_group, group_like
from lbgm_compress.algorithm import Algorithm
from lbgm_compress.collective.local import LocalTraining
from lbgm_compress.collective.local.group import GroupTransport
from lbgm_compress.collective.local.node import Follower, Node
from lbgm_compress.collective.local.options import (
    check_optimizers,
    check_options,
    check_same,
    parameters_of,
)
from lbgm_compress.collective.local.training import Accept
from lbgm_compress.collective.local.warned import warn
from lbgm_compress.compressors.identity import Identity

__all__ = ["DiLoCo"]

# Optimizers whose steps are counted.
_counted: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()


class DiLoCo:
    """Has workers train on their own, and averages compressed pseudo-gradients now and then.

    Every `sync_every` steps of the inner optimizer, the difference between the common model and
    the worker's own is compressed, exchanged, averaged and given to an outer optimizer (DiLoCo,
    arXiv 2311.08105)::

        with DiLoCo(model, optimizer, TopK(1 / 64, "int2")) as diloco:
            for batch in batches:
                ...  # as without it: loss.backward(), optimizer.step()

    All ranks of `process_group` build it together. Their models begin with the parameters and
    buffers of rank 0. Leaving the ``with`` block calls `finish`, unless an error is on its way:
    the models of all ranks are then the mean of the workers' own. Without ``with``, call `finish`
    and `close`.

    Each rank may take another number of steps. An exchange whose averages have inf or nan is not
    applied, and nothing of it is lost. If a rank is gone, the exchanges of the others raise
    `RuntimeError` within the time-out of the process group.

    Parameters
    ----------
    model
        The worker's model. The ranks of a model in `DistributedDataParallel` are one worker, a
        node: all of them build DiLoCo, and the first one exchanges for them (see the guide).
    inner_optimizer
        Optimizer of the parameters. Its steps are counted, and its state stays the worker's own.
        If there are several, give the one whose step comes last.
    compressor
        Compresses the pseudo-gradients: any compressor, the same on all ranks.
    sync_every
        Number of inner steps from one exchange to the next, H.
    outer_optimizer
        Optimizer of the same parameters, which applies the averages: `torch.optim.SGD` with
        learning rate 0.7 and Nesterov momentum 0.9 unless given.
    process_group
        All ranks, those of all nodes; the default group unless given.
    residual
        Where the part of a pseudo-gradient is kept that a message leaves out: "model", in the
        worker's own model, or "memory", in the residual of `ErrorFeedback`, which is put around a
        compressor without one.
    fragments
        Number of parts of the model that are exchanged one after the other, each every
        `sync_every` steps (Streaming DiLoCo, arXiv 2501.18512).
    delay
        Number of inner steps from an exchange to its application, during which it goes on in the
        background; below ``sync_every / fragments``.
    final
        Compresses what `finish` exchanges, such as ``TopK(1.0, "int2")``; `Identity` unless given.
    accept
        Called with the averages (a dict of tensors by name) of each exchange, which are the same
        on all ranks. If it returns False, the exchange is not applied, and nothing of it is lost.
        With a delay it is called on another thread.
    weight
        This worker's weight in the average; positive.

    Attributes
    ----------
    model : torch.nn.Module
        The worker's model, without `DistributedDataParallel`.
    local_step, exchanges : int
        Numbers of inner steps and of exchanges so far.

    Raises
    ------
    TypeError, ValueError
        If an argument is of the wrong type or out of range; on all ranks, if the ranks were given
        different compressors, models or options.
    RuntimeError
        If `torch.distributed` is not initialised.
    """

    def __init__(
        self,
        model: nn.Module,
        inner_optimizer: torch.optim.Optimizer,
        compressor: Algorithm,
        sync_every: int = 30,
        outer_optimizer: torch.optim.Optimizer | None = None,
        process_group: dist.ProcessGroup | None = None,
        *,
        residual: str = "model",
        fragments: int = 1,
        delay: int = 0,
        final: Algorithm | None = None,
        accept: Accept | None = None,
        weight: float = 1.0,
    ) -> None:
        _check_arguments(model, inner_optimizer, compressor)
        check_options(compressor, sync_every, residual, fragments, delay, final, accept, weight)
        if not dist.is_available() or not dist.is_initialized():
            raise RuntimeError("call torch.distributed.init_process_group() first")
        if process_group is not None:
            check_group(process_group)
        group = default_group() if process_group is None else process_group
        node_group: dist.ProcessGroup | None = None
        if isinstance(model, DistributedDataParallel):
            node_group, model = model.process_group, model.module
        self.model: nn.Module = model
        parameters = parameters_of(self.model)
        check_optimizers(inner_optimizer, outer_optimizer, parameters)
        schedule = {"sync_every": sync_every, "fragments": fragments, "delay": delay}
        transport = GroupTransport(group_like(group))
        device = next(iter(parameters.values())).device
        options = {**schedule, "residual": residual, "compressor": compressor}
        options["final"] = final or Identity()
        check_same(transport, [f"{name} {value}" for name, value in options.items()], device)
        ranks = [dist.get_rank()]
        if node_group is not None:
            ranks = sorted(dist.get_process_group_ranks(node_group))
        peers = _peers(transport, ranks, device)
        node = within = None
        if len(peers) < transport.size:
            # Each rank makes as many groups as the others, since torch numbers them on each rank.
            members = dist.get_process_group_ranks(group)
            transport = GroupTransport(group_like(group, [members[peer] for peer in peers]))
            inside = group_like(node_group or group, ranks, patience=2)
            within = GroupTransport(inside)
            node = Node(within, parameters, inner_optimizer)
        self._training: LocalTraining | Follower
        if node is not None and node.transport.rank > 0:
            self._training = Follower(self.model, node, **schedule)
        else:
            self._training = LocalTraining(
                self.model,
                inner_optimizer,
                compressor,
                transport,
                **schedule,
                outer_optimizer=outer_optimizer,
                residual=residual,
                final=final,
                accept=accept,
                weight=weight,
                node=node,
            )
        self._transports = [transport] if within is None else [transport, within]
        for each in self._transports:
            each.training = weakref.ref(self._training)
        self._inner = inner_optimizer
        self._loaded = False
        _counted.add(inner_optimizer)
        self._hook = inner_optimizer.register_step_post_hook(lambda *_: self._training.step())

    @property
    def local_step(self) -> int:
        return self._training.local_step

    @property
    def exchanges(self) -> int:
        return self._training.exchanges

    def step(self) -> None:
        """Raise `RuntimeError`: the inner optimizer's steps are counted by themselves."""
        raise RuntimeError(
            "the steps of the inner optimizer are counted by themselves: call optimizer.step() "
            "alone, without diloco.step()"
        )

    def finish(self) -> None:
        """Replace the models of all workers by their mean, in one last exchange.

        All ranks call it, after any number of steps. Differences from the common model are
        compressed by `final`. Floating-point buffers are averaged without compression; others are
        those of rank 0. Training may go on afterwards.

        Raises
        ------
        RuntimeError
            If another rank failed or cannot be reached.
        """
        if self.local_step == 0 and not self._loaded:
            warn(
                "the optimizer given to DiLoCo took no step: is it the one that your loop steps? "
                "Steps of another one are not counted, and nothing is exchanged before finish()"
            )
        for transport in self._transports:
            transport.finishing = True
        try:
            self._training.finish()
        finally:
            for transport in self._transports:
                transport.finishing = False

    def common_model(self) -> AbstractContextManager[nn.Module]:
        """Return a context in which the model has the common parameters, such as to evaluate it.

        They are the same on all ranks. The worker's own come back at the end of the ``with`` block,
        which has the model, without `DistributedDataParallel`.

        Raises
        ------
        RuntimeError
            Within the block's ``with``, if this is a rank of a node other than the first.
        """
        return self._training.common_model()

    def stats(self) -> dict[str, Any]:
        """Return what this rank has sent since it was built, the exchanges of `finish` included.

        Returns
        -------
        dict
            ``message_bytes`` and ``dense_bytes`` of all exchanges, their ``ratio``,
            ``final_bytes`` (the message bytes of `finish` alone), ``recycled_share`` (the share of
            tensors sent as a coefficient alone), ``exchanges``, ``local_steps``, and
            ``bits_per_step``: bits for each parameter and inner step. All of the bytes are 0 on the
            ranks of a node other than the first.
        """
        return self._training.stats()

    def state_dict(self) -> dict[str, Any]:
        """Return this rank's state as a nested dict of tensors and numbers.

        It has the common model and the outer optimizer's state, and goes beside the worker's own
        model and inner optimizer, which differ from rank to rank: each rank saves its own. Save or
        copy it before the next step, which changes it. An exchange under way is waited for.
        """
        return self._training.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was called; the model and the inner optimizer are loaded apart.

        The ranks of one node call it together. The next exchange compares the ranks first. If
        their common models differ, as those of different steps do, all go on from that of the rank
        with the most exchanges. With the state of another rank the worker goes on from the common
        model, with a warning. An exchange under way is waited for, and is not applied.

        Raises
        ------
        ValueError
            If it is the state of another compressor or model, or no such state. Nothing is changed.
        """
        self._training.load_state_dict(state)
        self._loaded = True

    def close(self) -> None:
        """Stop counting the inner optimizer's steps; the model stays as it is."""
        self._hook.remove()
        _counted.discard(self._inner)

    def __enter__(self) -> DiLoCo:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
        if error is None:
            self.finish()


def _check_arguments(model: Any, optimizer: Any, compressor: Any) -> None:
    """Raise `TypeError` that names the right call, unless the arguments are in order."""
    call = "write DiLoCo(model, optimizer, compressor)"
    if not isinstance(model, nn.Module) or isinstance(compressor, torch.optim.Optimizer):
        if any(isinstance(of, nn.Module) for of in (model, optimizer, compressor)):
            raise TypeError(f"the arguments are swapped: {call}")
        raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}: {call}")
    if optimizer in _counted:
        raise ValueError(
            "another DiLoCo counts the steps of this inner optimizer: call its close() first"
        )


def _peers(transport: GroupTransport, ranks: list[int], device: torch.device) -> list[int]:
    """Return the ranks of the transport with this rank's place in their nodes, such as the first.

    `ranks` are those of this rank's node.

    Raises
    ------
    ValueError
        On all ranks, if there is one node alone, or if a node is not whole.
    """
    place = ranks.index(dist.get_rank())
    mine = torch.tensor([ranks[0], len(ranks), place], dtype=torch.int64).view(torch.uint8)
    rows = transport.gather_equal(mine.to(device)).cpu().view(torch.int64).view(-1, 3).tolist()
    for first, size, _ in rows:
        found = sum(other == first for other, _, _ in rows)
        if found != size:
            raise ValueError(
                f"process_group has {found} of the {size} ranks of DistributedDataParallel's group "
                f"of rank {first}: give DiLoCo a process_group with all ranks of every node"
            )
    if len({first for first, _, _ in rows}) == 1 and len(rows) > 1:
        raise ValueError(
            "DistributedDataParallel has all ranks, so that there is no other worker to exchange "
            "with: give it the process_group of this node's ranks, or leave it out"
        )
    return [rank for rank, (_, _, other) in enumerate(rows) if other == place]
