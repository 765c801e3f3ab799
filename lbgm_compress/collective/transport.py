"""Transports, which move bytes between the ranks of a job, and nothing else.

An engine gives its ranks a `Transport`. `Transport.gather_equal` is the only method that it must
write; the others are made of it, and an engine that has something faster replaces them.

Ranks swap messages of unequal sizes. A message begins with a head, whose size is the same on all
ranks, and the head says how many bytes follow it (`Transport.begin_gather`). A transport does not
read heads: it is given a function that does.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["BodyLength", "Pending", "ProcessGroupTransport", "Transport", "gather_texts"]

# Large enough to fill a link, small enough to keep all links of a ring busy.
CHUNK = 256 * 1024
# The largest sum in bytes that is made in few turns; larger ones are made on a ring.
SMALL = 16 * 1024
# Tag of data of equal sizes; the chunks of a ring have the tags that follow.
EQUAL = 0

Result = TypeVar("Result")
BodyLength = Callable[[bytes, int], int]
"""Returns the number of bytes after a head, given the head and its rank; raises to refuse it."""


@dataclass(frozen=True)
class Pending(Generic[Result]):
    """An exchange that has begun."""

    ready: Callable[[], bool]
    """Returns whether `result` would return at once."""
    result: Callable[[], Result]
    """Waits for the other ranks, and returns what was exchanged; called once."""


def done(result: Result) -> Pending[Result]:
    """Return an exchange that is over."""
    return Pending(lambda: True, lambda: result)


class Transport(abc.ABC):
    """Moves bytes between the ranks of a job.

    All ranks call the same methods in the same order, with tensors on the same kind of device. A
    method that returns a result may wait for the other ranks. If a rank is gone or cannot be
    reached, the methods of the others raise RuntimeError, within a time that the engine sets.
    """

    rank: int
    """This rank, from 0. Elastic engines may change it."""
    size: int
    """The number of ranks. Elastic engines may change it."""
    adds_int8: bool = True
    """Whether `all_reduce` takes int8."""

    @abc.abstractmethod
    def gather_equal(self, data: Tensor) -> Tensor:
        """Gather data of one size from all ranks.

        Parameters
        ----------
        data
            Flat uint8, of n bytes, n > 0; the same n on all ranks.

        Returns
        -------
        Tensor
            The data of all ranks in rank order, as the rows of a (size, n) tensor (contiguous, on
            the device of `data`), in memory of its own.
        """

    def gather_unequal(self, parts: Sequence[Tensor]) -> None:
        """Gather data of different sizes, which all ranks know.

        Parameters
        ----------
        parts
            A flat uint8 tensor (contiguous, possibly empty) for each rank, in rank order. Their
            sizes are the same on all ranks. ``parts[rank]`` holds this rank's data; the others are
            overwritten with the data of their ranks.
        """
        own = parts[self.rank]
        longest = max(part.numel() for part in parts)
        if self.size == 1 or longest == 0:
            return
        padded = own.new_zeros(longest)
        padded[: own.numel()] = own
        for rank, row in enumerate(self.gather_equal(padded)):
            if rank != self.rank:
                parts[rank].copy_(row[: parts[rank].numel()])

    def broadcast(self, data: Tensor) -> None:
        """Overwrite flat uint8 data, of one size on all ranks, with that of rank 0."""
        self.gather_unequal([data, *[data[:0]] * (self.size - 1)])

    def begin_gather(
        self, message: Tensor, head_size: int, body_length: BodyLength, key: str
    ) -> Pending[list[Tensor]]:
        """Begin to gather one message of every rank.

        By default two exchanges, which are over when this returns: the heads, and then the bodies
        unless all of them are empty.

        Parameters
        ----------
        message
            This rank's message (flat uint8): a head, and a body of any size. It does not change
            until the exchange is over.
        head_size
            Size of the head in bytes, the same on all ranks.
        body_length
            Returns the size of a rank's body, given its head. What it raises is raised on all
            ranks alike, and the exchange is over.
        key
            Name of the exchange, the same on all ranks. Exchanges that are under way at one time
            have different keys.

        Returns
        -------
        Pending
            Its result is the messages in rank order, this rank's own among them.
        """
        heads = self.gather_equal(message[:head_size])
        rows = heads.cpu().numpy()
        sizes = [body_length(row.tobytes(), rank) for rank, row in enumerate(rows)]
        if not any(sizes):
            return done(list(heads))
        messages = []
        for rank, size in enumerate(sizes):
            if rank == self.rank:
                messages.append(message)
            else:
                messages.append(heads.new_empty(head_size + size))
                messages[rank][:head_size] = heads[rank]
        self.gather_unequal([whole[head_size:] for whole in messages])
        return done(messages)

    def all_reduce(self, data: Tensor) -> Tensor:
        """Add up data of all ranks.

        Parameters
        ----------
        data
            Flat tensor (int8, float16, float32, float64 or int64), of one size and dtype on all
            ranks. It may be overwritten.

        Returns
        -------
        Tensor
            The sum, with the same bits on all ranks; it may be `data`.
        """
        if data.numel() == 0:
            return data
        rows = self.gather_equal(data.contiguous().view(torch.uint8)).view(data.dtype)
        total = rows[0]
        for row in rows[1:]:
            total += row
        return total

    def begin_all_reduce(self, data: Tensor, key: str) -> Pending[Tensor]:
        """Begin `all_reduce`; `key` is as in `begin_gather`. By default it is over at once."""
        return done(self.all_reduce(data))


class ProcessGroupTransport(Transport):
    """The ranks of a process group of `torch.distributed`.

    On the CPU, data of equal sizes goes straight from each rank to each, and data of unequal sizes
    round a ring in chunks: a rank passes on the beginning of a part while its end is still on the
    way, so that one large part takes about its own time on one link, whatever the number of ranks.
    Small sums are made in log2(K) turns, since gloo's ring of 2 (K - 1) turns waits too long.
    On GPUs both are all-gathers, of parts that are padded to the largest; gloo, which has none for
    tensors of a GPU, moves copies in the memory of the host.

    Parameters
    ----------
    group
        The group, which nothing else may use: two users would mix up their exchanges.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        # Sends and receives name ranks of the default group: torch before 2.6 knows no others.
        self._global = [dist.get_global_rank(group, rank) for rank in range(self.size)]
        self._reduced: Tensor | None = None
        self._on_host = dist.get_backend(group) == "gloo"

    def gather_equal(self, data: Tensor) -> Tensor:
        if self._on_host and data.device.type != "cpu":
            return self.gather_equal(data.cpu()).to(data.device)
        rows = data.new_empty(self.size, data.numel())
        if data.device.type == "cpu":
            self._swap(data, rows)
        else:
            dist.all_gather(list(rows), data, group=self.group)
        return rows

    def _swap(self, data: Tensor, rows: Tensor) -> None:
        """Fill `rows` with the data of all ranks, by sends and receives.

        Not by a collective: gloo's threads let go of a collective's tensors some time after it is
        over, which takes Python's lock, and if the interpreter ends meanwhile the process is
        aborted (pytorch #190489). The tensors of sends and receives belong to the thread that waits
        for them.
        """
        peers = [(self.rank + step) % self.size for step in range(1, self.size)]
        works = [
            dist.irecv(rows[peer], self._global[peer], self.group, EQUAL)
            for peer in reversed(peers)
        ]
        works += [dist.isend(data, self._global[peer], self.group, EQUAL) for peer in peers]
        rows[self.rank] = data
        for work in works:
            assert work is not None
            work.wait()

    def gather_unequal(self, parts: Sequence[Tensor]) -> None:
        if self.size > 1 and parts[self.rank].device.type == "cpu":
            self._ring(parts)
        elif self.size > 1 and self._on_host:
            copies = [part.cpu() for part in parts]
            self._ring(copies)
            for part, copy in zip(parts, copies, strict=True):
                part.copy_(copy)
        else:
            super().gather_unequal(parts)

    def broadcast(self, data: Tensor) -> None:
        if data.device.type == "cpu" or self._on_host:
            super().broadcast(data)
        else:
            dist.broadcast(data, self._global[0], group=self.group)

    def _ring(self, parts: Sequence[Tensor]) -> None:
        """Pass every part on to the next rank, chunk by chunk, until all ranks have it."""
        next_rank = (self.rank + 1) % self.size
        previous = (self.rank - 1) % self.size

        def chunks(origin: int) -> list[tuple[int, Tensor]]:
            # Both ends number the chunks alike, so that no two have one tag.
            before = 1 + EQUAL + sum(-(-parts[rank].numel() // CHUNK) for rank in range(origin))
            part = parts[origin]
            pieces = [part[start : start + CHUNK] for start in range(0, part.numel(), CHUNK)]
            return list(enumerate(pieces, start=before))

        def send(tag: int, chunk: Tensor) -> dist.Work:
            work = dist.isend(chunk, self._global[next_rank], self.group, tag)
            assert work is not None
            return work

        # Receives are posted first, in the order in which the previous rank sends.
        receives = []
        for step in range(1, self.size):
            origin = (self.rank - step) % self.size
            for tag, chunk in chunks(origin):
                work = dist.irecv(chunk, self._global[previous], self.group, tag)
                assert work is not None
                receives.append((origin, tag, chunk, work))
        sends = [send(tag, chunk) for tag, chunk in chunks(self.rank)]
        for origin, tag, chunk, work in receives:
            work.wait()
            if origin != next_rank:
                sends.append(send(tag, chunk))
        for work in sends:
            work.wait()

    def all_reduce(self, data: Tensor) -> Tensor:
        if self._on_host and data.device.type != "cpu":
            return self.all_reduce(data.cpu()).to(data.device)
        if data.device.type == "cpu" and data.numel() * data.element_size() <= SMALL:
            return self._double(data)
        dist.all_reduce(data, group=self.group)
        if data.device.type == "cpu":
            # Kept until the next sum, so that no thread of gloo lets go of it last: see `_swap`.
            self._reduced = data
        return data

    def _double(self, data: Tensor) -> Tensor:
        """Add up data of all ranks by recursive doubling.

        Of K ranks, each swaps sums with log2(K) others in turn, where a ring, as gloo's, takes
        2 (K - 1) turns. Where K is no power of two, ranks beyond the largest one leave their data
        to others. A sum of two ranks has the same bits on both.
        """
        turns = self.size.bit_length() - 1
        count = 1 << turns
        if self.rank >= count:
            self._swap_with(self.rank - count, data, None)
            self._swap_with(self.rank - count, None, data)
            return data
        other = torch.empty_like(data)
        partner = self.rank + count
        if partner < self.size:
            self._swap_with(partner, None, other)
            data += other
        for turn in range(turns):
            self._swap_with(self.rank ^ (1 << turn), data, other)
            data += other
        if partner < self.size:
            self._swap_with(partner, data, None)
        return data

    def _swap_with(self, rank: int, data: Tensor | None, into: Tensor | None) -> None:
        """Send data to a rank, and fill `into` with what it sends."""
        works = []
        if into is not None:
            works.append(dist.irecv(into, self._global[rank], self.group, EQUAL))
        if data is not None:
            works.append(dist.isend(data, self._global[rank], self.group, EQUAL))
        for work in works:
            assert work is not None
            work.wait()


def gather_texts(transport: Transport, text: str, device: torch.device) -> list[str]:
    """Gather a text of every rank, in rank order, through tensors on `device`."""
    # With a byte in front, as no tensor may be empty.
    data = torch.frombuffer(bytearray(b" " + text.encode()), dtype=torch.uint8)
    length = torch.tensor([data.numel()]).view(torch.uint8)
    lengths = transport.gather_equal(length.to(device)).cpu().view(torch.int64).view(-1).tolist()
    padded = torch.zeros(max(lengths), dtype=torch.uint8)
    padded[: data.numel()] = data
    rows = transport.gather_equal(padded.to(device)).tolist()
    return [bytes(row[1:end]).decode() for row, end in zip(rows, lengths, strict=True)]
