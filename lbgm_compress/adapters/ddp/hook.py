"""The hook, and the call that registers it."""

# Without `from __future__ import annotations`: `register_comm_hook` compares annotations by value.

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import GradBucket
from torch.nn.parallel import DistributedDataParallel

from lbgm_compress.adapters.ddp.state import CompressionState
from lbgm_compress.adapters.ddp.wrapped import averaged_parameters
from lbgm_compress.algorithm import Algorithm, check_algorithm

__all__ = ["compress", "compression_hook"]


def compress(
    model: DistributedDataParallel,
    compressor: Algorithm,
    *,
    start_step: int = 0,
    weight: float = 1.0,
    loss_scale: float | Callable[[], float] = 1.0,
    node_group: dist.ProcessGroup | None = None,
) -> CompressionState:
    """Have the gradients of a model averaged in compressed form, from the next step on.

    All ranks of the model's process group call it, for their models in the same order.

    Parameters
    ----------
    model
        The model, wrapped in `DistributedDataParallel`; its process group, the names of its
        parameters and the parameters are taken from it.
    compressor
        Compresses the gradients: any compressor or `Reducible`, the same on all ranks.
    start_step, weight, loss_scale, node_group
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
    if isinstance(model, Algorithm):
        raise TypeError("the arguments are swapped: write compress(model, compressor)")
    if not isinstance(model, DistributedDataParallel):
        wrapped = getattr(model, "_orig_mod", None)
        advice = (
            "wrap the model first, as DistributedDataParallel(model); Accelerate and Ray Train do "
            "so in prepare() and prepare_model() where there are several processes"
        )
        if isinstance(wrapped, DistributedDataParallel):
            advice = "compress the DistributedDataParallel model before torch.compile takes it"
        raise TypeError(f"expected a DistributedDataParallel, not {type(model).__name__}: {advice}")
    check_algorithm(compressor)
    # The hook is registered at the end: a model is not left with half of it.
    state = CompressionState(
        compressor,
        averaged_parameters(model),
        model.process_group,
        start_step=start_step,
        weight=weight,
        loss_scale=loss_scale,
        node_group=node_group,
    )
    state._watch(model)
    try:
        model.register_comm_hook(state, compression_hook)
    except RuntimeError as error:
        raise RuntimeError(
            f"the model takes no hook: it has one already, or is not to communicate ({error})"
        ) from None
    return state


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
