"""Messages of unequal size between ranks, and the average of what they stand for.

A message is a head of fixed size and a body (`lbgm_compress.wire.message`). An exchange takes two
phases: all ranks gather the heads in one collective of fixed size; only if some head announces a
body do they gather the bodies. When every tensor of every rank is recycled, there is no second
phase.

The bodies of a group on the CPU go round a ring in chunks, so that a rank passes on the beginning
of a body while its end is still on its way: a single large body takes about its own time on one
link, whatever the number of ranks. A group on GPUs gathers bodies that are padded to the largest.
"""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from lbgm_compress.compressor import Compressor
from lbgm_compress.endpoints import Receiver, Sender, TensorReport
from lbgm_compress.wire.message import body_size

__all__ = ["Averager", "ProcessGroupTransport", "Transport", "exchange"]

# Large enough to fill a link, small enough to keep all links of a ring busy.
CHUNK = 256 * 1024


class Transport(abc.ABC):
    """What an engine has to offer."""

    rank: int
    """This rank, from 0."""
    size: int
    """The number of ranks."""

    @abc.abstractmethod
    def gather_equal(self, data: Tensor) -> Tensor:
        """Gather `data` (n; uint8), of one size on all ranks, as the rows of a (size, n) tensor."""

    @abc.abstractmethod
    def gather_unequal(self, parts: Sequence[Tensor]) -> None:
        """Fill every rank's part (uint8, contiguous), of sizes that all ranks know.

        ``parts[rank]`` holds this rank's own data; the others are overwritten.
        """


class ProcessGroupTransport(Transport):
    """Ranks of a process group of `torch.distributed`, whose only user this is."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)

    def gather_equal(self, data: Tensor) -> Tensor:
        rows = data.new_empty(self.size, data.numel())
        dist.all_gather(list(rows), data, group=self.group)
        return rows

    def gather_unequal(self, parts: Sequence[Tensor]) -> None:
        if self.size == 1:
            return
        if parts[self.rank].device.type == "cpu":
            self._ring(parts)
            return
        longest = max(part.numel() for part in parts)
        padded = parts[self.rank].new_zeros(longest)
        padded[: parts[self.rank].numel()] = parts[self.rank]
        for part, row in zip(parts, self.gather_equal(padded), strict=True):
            part.copy_(row[: part.numel()])

    def _ring(self, parts: Sequence[Tensor]) -> None:
        """Pass every part on to the next rank, chunk by chunk, until all have it."""
        following = (self.rank + 1) % self.size
        previous = (self.rank - 1) % self.size

        def chunks(origin: int) -> list[tuple[int, Tensor]]:
            # Both ends number the chunks alike, so that no tag means two of them.
            before = sum(-(-parts[rank].numel() // CHUNK) for rank in range(origin))
            part = parts[origin]
            pieces = [part[start : start + CHUNK] for start in range(0, part.numel(), CHUNK)]
            return list(enumerate(pieces, start=before))

        def send(tag: int, chunk: Tensor) -> dist.Work:
            work = dist.isend(chunk, group=self.group, group_dst=following, tag=tag)
            assert work is not None
            return work

        # Receives are posted first, in the order in which the previous rank sends.
        receives = []
        for step in range(1, self.size):
            origin = (self.rank - step) % self.size
            for tag, chunk in chunks(origin):
                work = dist.irecv(chunk, group=self.group, group_src=previous, tag=tag)
                assert work is not None
                receives.append((origin, tag, chunk, work))
        sends = [send(tag, chunk) for tag, chunk in chunks(self.rank)]
        for origin, tag, chunk, work in receives:
            work.wait()
            if origin != following:
                sends.append(send(tag, chunk))
        for work in sends:
            work.wait()


def exchange(transport: Transport, message: Tensor, head_size: int) -> list[Tensor]:
    """Gather one message of every rank.

    Parameters
    ----------
    transport
        What connects the ranks.
    message
        This rank's message (flat uint8), or zeros if it could not make one: then all ranks raise.
    head_size
        The size in bytes of the message's head, the same on all ranks (`Receiver.head_size`).

    Returns
    -------
    list of Tensor
        The messages in rank order, this rank's own among them.

    Raises
    ------
    PayloadError
        If a rank sends another version of the wire format.
    RuntimeError
        If a rank had no message, or with the engine's own message if it cannot be reached.
    """
    heads = transport.gather_equal(message[:head_size])
    fronts = [bytes(front) for front in heads[:, :8].tolist()]
    # No version is 0.
    failed = [rank for rank, front in enumerate(fronts) if not any(front)]
    if failed:
        ranks = "rank " + ", ".join(map(str, failed))
        raise RuntimeError(f"{ranks} failed before it could send: see the error there")
    sizes = [body_size(front) for front in fronts]
    if not any(sizes):
        return list(heads)
    messages = []
    for rank, size in enumerate(sizes):
        if rank == transport.rank:
            messages.append(message)
        else:
            messages.append(heads.new_empty(head_size + size))
            messages[rank][:head_size] = heads[rank]
    transport.gather_unequal([whole[head_size:] for whole in messages])
    return messages


class Averager:
    """Every rank's sender, and a receiver for the other ranks.

    All ranks add up the same decoded tensors in rank order, so that their averages agree bit for
    bit. A rank does not decode its own message: what it stands for is known from encoding.

    Parameters
    ----------
    compressor
        What all ranks use.
    like
        Tensors with the names, shapes, dtypes and device of the gradients.
    transport
        What connects the ranks.
    """

    def __init__(
        self, compressor: Compressor, like: Mapping[str, Tensor], transport: Transport
    ) -> None:
        self.transport = transport
        self.sender = Sender(compressor, seed=transport.rank)
        self.receiver = Receiver(compressor, like)

    def average(
        self, grads: Mapping[str, Tensor], into: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], int]:
        """Average `grads` over all ranks.

        Parameters
        ----------
        grads
            This rank's gradients by name: any part of the tensors, the same on all ranks.
        into
            Zeros of the same shapes to add up in.

        Returns
        -------
        averages
            By name: the tensors of `into`, or new ones if the compressor finishes the average.
        size
            What this rank's message weighs, in bytes.
        """
        head_size = self.receiver.head_size(grads)
        try:
            message, own = self.sender.encode(grads)
        except Exception:
            # The other ranks wait for a head.
            device = next(iter(into.values())).device
            nothing = torch.zeros(head_size, dtype=torch.uint8, device=device)
            with contextlib.suppress(RuntimeError):
                exchange(self.transport, nothing, head_size)
            raise
        messages = exchange(self.transport, message, head_size)
        weight = 1 / self.transport.size
        for rank, received in enumerate(messages):
            if rank == self.transport.rank:
                for name, decoded in own.items():
                    decoded.add_to(into[name], weight)
            else:
                self.receiver.accumulate(rank, received, into, weight, names=grads)
        return self.receiver.finish({name: into[name] for name in grads}), message.numel()

    def report(self) -> dict[str, TensorReport]:
        """Return what became of each tensor of this rank's last message."""
        return self.sender.report()

    def reset(self) -> None:
        """Forget what the ranks look back at: the next messages are full. Residuals stay."""
        self.sender.reset()
        for rank in range(self.transport.size):
            self.receiver.drop(rank)
