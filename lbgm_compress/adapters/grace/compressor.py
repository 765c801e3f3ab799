"""A compressor of this package as one of GRACE's."""

from __future__ import annotations

import struct
import sys
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lbgm_compress.adapters.grace.communicators import calling_communicator, check_communicator
from lbgm_compress.compressor import Compressor, PayloadError, owned
from lbgm_compress.endpoints import Receiver, Sender, TensorReport

__all__ = ["GraceCompressor"]

RANKS = 1 << 16


class Context(NamedTuple):
    """The context that `GraceCompressor.compress` returns for `GraceCompressor.decompress`."""

    name: str
    rank: int
    payload: Tensor
    decoded: Tensor


class GraceCompressor:
    """A compressor of this package with the methods of GRACE's compressors.

    ``Allgather(GraceCompressor(LBGM(TopK(0.01))), NoneMemory(), world_size)`` works as with any
    compressor of GRACE's, and so does ``ResidualMemory``. A payload is the rank of its sender (two
    bytes, lowest first) and a message, since GRACE gives the payloads of all ranks to the same
    `decompress`. Decompressing the own payload again, as memories do, changes no state.

    Parameters
    ----------
    compressor
        The compressor that all ranks use.
    rank
        The rank of this process. By default Horovod or torch.distributed is asked for it at the
        first tensor.

    Attributes
    ----------
    average : bool
        False: `aggregate` averages.
    tensors_size_are_same : bool
        Whether payloads have one size on all ranks (`Compressor.fixed_size`), as Broadcast and
        ``grace_dl.dist`` on the CPU need.

    Raises
    ------
    TypeError
        If `compressor` is not a compressor of this package.
    """

    average = False

    def __init__(self, compressor: Compressor, rank: int | None = None) -> None:
        self.sender = Sender(compressor, seed=0 if rank is None else rank)
        self.compressor = compressor
        self.tensors_size_are_same = compressor.fixed_size
        self._rank = rank
        self._receivers: dict[str, Receiver] = {}

    def compress(self, tensor: Tensor, name: str) -> tuple[list[Tensor], Context]:
        """Compress a gradient.

        Parameters
        ----------
        tensor
            The gradient, of any shape; float32, float16, bfloat16 or float64.
        name
            The name of the parameter, the same on all ranks.

        Returns
        -------
        tensors
            A list of one tensor: flat uint8, on the gradient's device.
        ctx
            The context for `decompress`.

        Raises
        ------
        TypeError
            If GRACE's communicator cannot carry messages (Allreduce, AllToAll, and for payloads of
            unequal size Broadcast, and ``grace_dl.dist`` on the CPU), or if the tensor is not a
            dense floating-point tensor. The state is as it was.
        ValueError
            If the tensor has another shape or dtype than before. The state is as it was.
        """
        if name not in self._receivers:
            communicator = calling_communicator(self)
            check_communicator(communicator, self.tensors_size_are_same, tensor.device)
        if self._rank is None:
            self._rank = _rank()
            self.sender.seed = self._rank
        message, decoded = self.sender.encode({name: tensor})
        if name not in self._receivers:
            self._receivers[name] = Receiver(self.compressor, {name: tensor})
        front = torch.tensor(list(struct.pack("<H", self._rank)), dtype=torch.uint8)
        payload = torch.cat([front.to(message.device), message])
        return [payload], Context(name, self._rank, payload, owned(decoded[name], tensor))

    def decompress(self, tensors: Sequence[Tensor], ctx: Context) -> Tensor:
        """Decompress the payload of any rank.

        Parameters
        ----------
        tensors
            The payload, as `compress` of its sender returned it.
        ctx
            The context that `compress` returned on this rank for the same name.

        Returns
        -------
        Tensor
            The gradient of the sender, as it was compressed.

        Raises
        ------
        PayloadError
            If the bytes are not a payload, but for example a sum of payloads. The state is as it
            was.
        OutOfSyncError
            If the payload looks back at a gradient that this rank does not hold of the sender.
        """
        [payload] = tensors
        if payload.dtype != torch.uint8 or payload.dim() != 1 or payload.numel() < 2:
            raise PayloadError("a payload is a flat uint8 tensor of a rank's number and a message")
        [rank] = struct.unpack("<H", payload[:2].cpu().numpy().tobytes())
        if rank == ctx.rank:
            if not torch.equal(payload, ctx.payload):
                raise PayloadError(
                    f"the payload bears the number of this rank, {rank}, and is not its own: "
                    "payloads can be gathered, not added up"
                )
            return ctx.decoded.clone()
        receiver = self._receivers[ctx.name]
        return receiver.decompress(rank, payload[2:], names=[ctx.name])[ctx.name]

    def aggregate(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return the average of the ranks' tensors, finished as the compressor asks for."""
        tensors = list(tensors)
        mean = torch.stack(tensors).sum(0) / len(tensors)
        return self.compressor.finish(mean)

    def report(self) -> dict[str, TensorReport]:
        """Return the statistics of the last tensor."""
        return self.sender.report()


def _rank() -> int:
    """Return this process's rank in the engine that is running."""
    horovod = sys.modules.get("horovod.torch")
    if horovod is not None and horovod.is_initialized():
        rank = int(horovod.rank())
    elif torch.distributed.is_available() and torch.distributed.is_initialized():
        rank = torch.distributed.get_rank()
    else:
        raise RuntimeError(
            "neither Horovod nor torch.distributed is initialised: do so first, or give "
            "GraceCompressor its rank"
        )
    if rank >= RANKS:
        raise RuntimeError(f"rank {rank} does not fit into two bytes")
    return rank
