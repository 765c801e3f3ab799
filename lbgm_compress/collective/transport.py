"""Messages of unequal size between ranks.

A message is a head of fixed size and a body (`lbgm_compress.wire.message`). An exchange over a
process group takes two phases: all ranks swap the heads, which are of fixed size; only if some head
announces a body do they gather the bodies. When every tensor of every rank is recycled, there is no
second phase.

The bodies of a group on the CPU go round a ring in chunks, so that a rank passes on the beginning
of a body while its end is still on its way: a single large body takes about its own time on one
link, whatever the number of ranks. A group on GPUs gathers bodies that are padded to the largest.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from lbgm_compress.wire.message import body_size

__all__ = [
    "FRONT",
    "Pending",
    "ProcessGroupTransport",
    "Transport",
    "exchange",
    "following",
    "gather_texts",
]

# Large enough to fill a link, small enough to keep all links of a ring busy.
CHUNK = 256 * 1024
# So much of a head says how long the message is.
FRONT = 8
# The tag of data of equal size; chunks have those that follow.
EQUAL = 0


class Pending(NamedTuple):
    """An exchange that is under way."""

    ready: Callable[[], bool]
    """Says whether `messages` would return at once."""
    messages: Callable[[], list[Tensor]]
    """Waits for the messages of all ranks, and returns them: see `exchange`."""


class Transport(abc.ABC):
    """What an engine has to offer."""

    rank: int
    """This rank, from 0; with elastic engines it may change."""
    size: int
    """The number of ranks; with elastic engines it may change."""

    @abc.abstractmethod
    def gather_equal(self, data: Tensor) -> Tensor:
        """Gather `data` (n; uint8), of one size on all ranks, as the rows of a (size, n) tensor."""

    @abc.abstractmethod
    def start(self, message: Tensor, head_size: int, key: str) -> Pending:
        """Begin to gather one message of every rank: see `exchange`.

        Exchanges that are under way at one time have different keys, the same on all ranks.
        """


class ProcessGroupTransport(Transport):
    """Ranks of a process group of `torch.distributed`, whose only user this is."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)

    def gather_equal(self, data: Tensor) -> Tensor:
        rows = data.new_empty(self.size, data.numel())
        if data.device.type == "cpu":
            self._swap(data, rows)
        else:
            dist.all_gather(list(rows), data, group=self.group)
        return rows

    def _swap(self, data: Tensor, rows: Tensor) -> None:
        """Fill `rows` with the data of all ranks, each sent straight to each.

        Not by a collective: gloo's threads let go of a collective's tensors some time after it is
        over, which takes Python's lock, and if the interpreter ends meanwhile the process is
        aborted (pytorch #190489). Sends and receives belong to those who wait for them.
        """
        peers = [(self.rank + step) % self.size for step in range(1, self.size)]
        works = [
            dist.irecv(rows[peer], group=self.group, group_src=peer, tag=EQUAL)
            for peer in reversed(peers)
        ]
        works += [dist.isend(data, group=self.group, group_dst=peer, tag=EQUAL) for peer in peers]
        rows[self.rank] = data
        for work in works:
            assert work is not None
            work.wait()

    def start(self, message: Tensor, head_size: int, key: str) -> Pending:
        # Collectives that gloo runs side by side get mixed up: this one is over when it returns.
        messages = self._gather(message, head_size)
        return Pending(lambda: True, lambda: messages)

    def _gather(self, message: Tensor, head_size: int) -> list[Tensor]:
        heads = self.gather_equal(message[:head_size])
        fronts = heads[:, :FRONT].tolist()
        sizes = [following(bytes(front), rank) for rank, front in enumerate(fronts)]
        if not any(sizes):
            return list(heads)
        messages = []
        for rank, size in enumerate(sizes):
            if rank == self.rank:
                messages.append(message)
            else:
                messages.append(heads.new_empty(head_size + size))
                messages[rank][:head_size] = heads[rank]
        self.gather_unequal([whole[head_size:] for whole in messages])
        return messages

    def gather_unequal(self, parts: Sequence[Tensor]) -> None:
        """Fill every rank's part (uint8, contiguous), of sizes that all ranks know.

        ``parts[rank]`` holds this rank's own data; the others are overwritten.
        """
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
            before = 1 + EQUAL + sum(-(-parts[rank].numel() // CHUNK) for rank in range(origin))
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
    return transport.start(message, head_size, "").messages()


def following(front: bytes, rank: int) -> int:
    """Read from the first `FRONT` bytes of a rank's message how many follow its head.

    Raises
    ------
    PayloadError
        If the rank sends another version of the wire format.
    RuntimeError
        If the rank had no message.
    """
    # No version is 0.
    if not any(front):
        raise RuntimeError(f"rank {rank} failed before it could send: see the error there")
    return body_size(front)


def gather_texts(transport: Transport, text: str, device: torch.device) -> list[str]:
    """Gather a text of every rank, in rank order, through tensors on `device`."""
    # With a byte in front, as no tensor may be empty.
    data = torch.frombuffer(bytearray(b" " + text.encode()), dtype=torch.uint8)
    length = torch.tensor([data.numel()]).view(torch.uint8)
    gathered = transport.gather_equal(length.to(device)).cpu().contiguous()
    lengths = gathered.view(torch.int64).view(-1).tolist()
    padded = torch.zeros(max(lengths), dtype=torch.uint8)
    padded[: data.numel()] = data
    rows = transport.gather_equal(padded.to(device)).tolist()
    return [bytes(row[1:end]).decode() for row, end in zip(rows, lengths, strict=True)]
