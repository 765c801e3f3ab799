"""Local training over `torch.distributed`: DiLoCo with compressed pseudo-gradients."""

from __future__ import annotations

from types import TracebackType

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lbgm_compress._util.groups import check_group, default_group, group_like
from lbgm_compress.collective.local import LocalTraining
from lbgm_compress.collective.local.options import check_options
from lbgm_compress.collective.local.training import Accept
from lbgm_compress.collective.transport import ProcessGroupTransport
from lbgm_compress.compressor import Compressor

__all__ = ["DiLoCo"]


class DiLoCo(LocalTraining):
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
        The worker's model. A model in `DistributedDataParallel` is taken as one worker: build
        DiLoCo on all its ranks, with `process_group` and `local_group`.
    inner_optimizer
        Optimizer of the parameters. Its steps are counted, and its state stays the worker's own.
    compressor
        Compresses the pseudo-gradients: any compressor, the same on all ranks.
    sync_every
        Number of inner steps from one exchange to the next, H.
    outer_optimizer
        Optimizer of the same parameters, which applies the averages: `torch.optim.SGD` with
        learning rate 0.7 and Nesterov momentum 0.9 unless given.
    process_group
        The ranks that exchange; the default group unless given.
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
        Compresses what `finish` exchanges, such as ``TopK(1.0, "int4")``; `Identity` unless given.
    accept
        Called with the averages (a dict of tensors by name) of each exchange, which are the same
        on all ranks. If it returns False, the exchange is not applied, and nothing of it is lost.
        With a delay it is called on another thread.
    weight
        This rank's weight in the average; positive.

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
        compressor: Compressor,
        sync_every: int = 30,
        outer_optimizer: torch.optim.Optimizer | None = None,
        process_group: dist.ProcessGroup | None = None,
        *,
        residual: str = "model",
        fragments: int = 1,
        delay: int = 0,
        final: Compressor | None = None,
        accept: Accept | None = None,
        weight: float = 1.0,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"model must be a torch.nn.Module, not {type(model).__name__}: write "
                "DiLoCo(model, optimizer, compressor)"
            )
        check_options(compressor, sync_every, residual, fragments, delay, final, weight)
        if not dist.is_available() or not dist.is_initialized():
            raise RuntimeError("call torch.distributed.init_process_group() first")
        if process_group is not None:
            check_group(process_group)
        group = default_group() if process_group is None else process_group
        super().__init__(
            model.module if isinstance(model, DistributedDataParallel) else model,
            inner_optimizer,
            compressor,
            ProcessGroupTransport(group_like(group)),
            sync_every=sync_every,
            outer_optimizer=outer_optimizer,
            residual=residual,
            fragments=fragments,
            delay=delay,
            final=final,
            accept=accept,
            weight=weight,
        )
        self._hook = inner_optimizer.register_step_post_hook(lambda *_: self.step())

    def close(self) -> None:
        """Stop counting the inner optimizer's steps; the model stays as it is."""
        self._hook.remove()

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
