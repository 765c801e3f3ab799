"""The average of the gradients of all ranks, on any transport.

Each rank encodes its gradients, all ranks gather the messages, and each adds up the same decoded
tensors in rank order. So the averages have the same bits on all ranks, and replicas do not drift
apart.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import math
import struct
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lbgm_compress._util.checks import check_number, check_whole
from lbgm_compress.collective.average import (
    Average,
    CompressedAverage,
    DenseAverage,
    sum_dtype,
)
from lbgm_compress.collective.transport import Pending, Transport, gather_texts
from lbgm_compress.compressor import Compressor, check_compressor
from lbgm_compress.endpoints import Receiver, Sender
from lbgm_compress.wire.message import body_size

__all__ = ["Averager", "body_length"]

FORMAT = 1
STATE_KEYS = frozenset({"format", "rank", "world_size", "step", "sender", "receiver"})
DIGEST_SIZE = 16


@dataclass
class Traffic:
    """Bytes and recycled tensors of one parameter, summed over the steps so far."""

    message_bytes: int = 0
    dense_bytes: int = 0
    recycled: int = 0
    steps: int = 0

    def stats(self) -> dict[str, float]:
        """Return the sums, the ratio of the bytes, and the share of recycled tensors."""
        return {
            "message_bytes": self.message_bytes,
            "dense_bytes": self.dense_bytes,
            "ratio": self.message_bytes / self.dense_bytes if self.dense_bytes else 0.0,
            "recycled_share": self.recycled / self.steps if self.steps else 0.0,
        }


class Averager:
    """Averages gradients over the ranks of a transport. It is one rank's part.

    It holds the rank's sender, and a receiver for the messages of the other ranks.

    All ranks call `average` for each step, or `begin` for each part of the gradients of a step and
    `end_step` after the last part: in the same order, and with the same names.

    Parameters
    ----------
    compressor
        Compresses the gradients: any compressor, the same on all ranks.
    parameters
        Tensors with the names, shapes, dtypes and device of the gradients, the same on all ranks.
    transport
        Connects the ranks.
    start_step
        Number of steps of plain all-reduce at the beginning. Gradients change fastest there.
    weight
        This rank's weight in the average, for example its number of samples; positive. Its share
        is the weight divided by the sum of the weights of all ranks.
    must_match
        Further lines, each a name and a value, that must be the same on all ranks.

    Attributes
    ----------
    compressor, transport, start_step
        As given.
    description : str
        Lines that are the same on all ranks.
    step : int
        Number of steps so far.
    sender, receiver
        The ends.

    Raises
    ------
    TypeError, ValueError
        If an argument is of the wrong type or out of range.

    Examples
    --------
    >>> import torch
    >>> from lbgm_compress import LBGM
    >>> from lbgm_compress.collective import Averager, Transport
    >>> class Alone(Transport):
    ...     rank, size = 0, 1
    ...     def gather_equal(self, data):
    ...         return data.view(1, -1).clone()
    >>> averager = Averager(LBGM(), {"w": torch.empty(2)}, Alone())
    >>> averager.average({"w": torch.ones(2)})
    {'w': tensor([1., 1.])}
    """

    def __init__(
        self,
        compressor: Compressor,
        parameters: Mapping[str, Tensor],
        transport: Transport,
        start_step: int = 0,
        weight: float = 1.0,
        must_match: Sequence[str] = (),
    ) -> None:
        check_compressor(compressor)
        check_whole("start_step", start_step, 0)
        check_number("weight", weight, error=TypeError)
        if not 0 < weight < math.inf:
            raise ValueError(f"weight must be above 0 and finite, not {weight}")
        if not parameters:
            raise ValueError("named_parameters has no parameter that requires a gradient")
        self.compressor = compressor
        self.transport = transport
        self.start_step = start_step
        self.step = 0
        self.sender = Sender(compressor, seed=transport.rank)
        self.receiver = Receiver(compressor, parameters)
        self._likes = {name: (tuple(p.shape), str(p.dtype)) for name, p in parameters.items()}
        self._weight = float(weight)
        self._shares: list[float] = []
        self._device = next(iter(parameters.values())).device
        lines = [f"compressor {compressor!r}", f"start_step {start_step}"]
        lines += [
            f"parameter {name!r} of shape {tuple(p.shape)} and {p.dtype}"
            for name, p in parameters.items()
        ]
        self.description = "\n".join([*lines, *must_match])
        self._members: tuple[int, int] | None = None
        self._failure: BaseException | None = None
        self._traffic = {name: Traffic() for name in parameters}
        self._message_bytes = 0

    @property
    def warming_up(self) -> bool:
        """True if this step is one of plain all-reduce."""
        return self.step < self.start_step

    @property
    def share(self) -> float:
        """This rank's share of the average, known after `verify_ranks_match`."""
        return self._shares[self.transport.rank]

    @property
    def ranks_match(self) -> bool:
        """True if these ranks have been compared, so that `verify_ranks_match` is not needed."""
        return self._members == (self.transport.rank, self.transport.size)

    def average(self, grads: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Average gradients over all ranks: one step.

        Parameters
        ----------
        grads
            This rank's gradients by name: all parameters or some, the same on all ranks. They are
            not modified.

        Returns
        -------
        dict
            The averages by name, with the shapes, dtypes and device of `grads`, and the same bits
            on all ranks.

        Raises
        ------
        TypeError, ValueError
            If a gradient is not dense, not of floating point, or not as the parameter that it is
            named after. In the first step, on every rank, if the ranks were given different
            compressors or models.
        RuntimeError
            If another rank could not encode its gradients, or cannot be reached, or if an earlier
            step failed.
        """
        averages = self.begin(grads).finish()
        self.end_step()
        return averages

    def begin(self, grads: Mapping[str, Tensor]) -> Average:
        """Encode some or all gradients of a step, and begin to exchange them.

        Several averages can be under way at one time. They are finished in the order in which they
        began, and `grads` must not change until then. Parameters and errors are those of `average`.
        """
        self.check_usable()
        if not self.ranks_match:
            self.verify_ranks_match()
        try:
            return self._begin_dense(grads) if self.warming_up else self._begin_compressed(grads)
        except BaseException as error:
            self.fail(error)
            raise

    def end_step(self) -> None:
        """Count a step whose averages have all been finished."""
        self.step += 1

    def _begin_dense(self, grads: Mapping[str, Tensor]) -> Average:
        dtype = functools.reduce(torch.promote_types, (sum_dtype(g.dtype) for g in grads.values()))
        flat = torch.cat([grad.reshape(-1).to(dtype) for grad in grads.values()]).mul_(self.share)
        pending = self.transport.begin_all_reduce(flat, f"dense.{min(grads)}")
        return DenseAverage(pending, grads, self.fail)

    def _begin_compressed(self, grads: Mapping[str, Tensor]) -> Average:
        head_size = self.receiver.head_size(grads)
        try:
            message, own = self.sender.encode(grads)
        except Exception:
            # The other ranks wait for a head.
            nothing = torch.zeros(head_size, dtype=torch.uint8, device=self._device)
            with contextlib.suppress(RuntimeError):
                self._gather(nothing, head_size, grads).result()
            raise
        self._count(grads, message)
        pending = self._gather(message, head_size, grads)
        rank = self.transport.rank
        return CompressedAverage(pending, grads, self.fail, own, self.receiver, self._shares, rank)

    def _gather(
        self, message: Tensor, head_size: int, grads: Mapping[str, Tensor]
    ) -> Pending[list[Tensor]]:
        return self.transport.begin_gather(message, head_size, body_length, min(grads))

    def _count(self, grads: Mapping[str, Tensor], message: Tensor) -> None:
        self._message_bytes += message.numel()
        for name, report in self.sender.report().items():
            traffic = self._traffic[name]
            traffic.message_bytes += report.bytes
            traffic.dense_bytes += grads[name].numel() * grads[name].element_size()
            traffic.recycled += report.recycled
            traffic.steps += 1

    def verify_ranks_match(self) -> None:
        """Compare what the ranks were given, and exchange their weights and steps.

        All ranks do so together. `begin` calls this before the first step, and after an elastic
        engine has changed the ranks; in that case look-back gradients are dropped, and the next
        step is sent in full. A rank that joins goes on at the step of the others.

        Raises
        ------
        ValueError
            On every rank, if the ranks were given different compressors or models.
        """
        if self._members is not None:
            self.reset()
            self._members = None
        digest = hashlib.blake2b(self.description.encode(), digest_size=DIGEST_SIZE).digest()
        mine = digest + struct.pack("<qd", self.step, self._weight)
        data = torch.frombuffer(bytearray(mine), dtype=torch.uint8).to(self._device)
        gathered = self.transport.gather_equal(data)
        expected = self.transport.size, len(mine)
        if gathered.dtype != torch.uint8 or gathered.shape != expected:
            raise TypeError(
                f"{type(self.transport).__name__}.gather_equal returned {gathered.dtype} of shape "
                f"{tuple(gathered.shape)}, expected torch.uint8 of shape {expected}: one row a rank"
            )
        rows = [bytes(row) for row in gathered.tolist()]
        if any(row[:DIGEST_SIZE] != digest for row in rows):
            self._raise_difference()
        numbers = [struct.unpack("<qd", row[DIGEST_SIZE:]) for row in rows]
        self.step = max(step for step, _ in numbers)
        total = sum(weight for _, weight in numbers)
        self._shares = [weight / total for _, weight in numbers]
        self._members = self.transport.rank, self.transport.size

    def _raise_difference(self) -> None:
        """Raise `ValueError` that names the first difference between two ranks."""
        theirs = gather_texts(self.transport, self.description, self._device)
        first = theirs[0].split("\n")
        for rank, other in enumerate(theirs):
            for a, b in itertools.zip_longest(first, other.split("\n"), fillvalue="nothing"):
                if a != b:
                    raise ValueError(
                        f"the ranks were given different compressors or models: rank 0 has {a} "
                        f"where rank {rank} has {b}"
                    )

    def stats(self) -> dict[str, Any]:
        """Return what this rank has sent since it was built, without the all-reduced steps.

        Returns
        -------
        dict
            ``message_bytes`` (whole messages) and ``dense_bytes`` (the gradients) of all steps,
            their ``ratio``, ``recycled_share`` (the share of tensors sent as a coefficient alone),
            and ``parameters``: the same by parameter, without the messages' own bytes.
        """
        total = Traffic(message_bytes=self._message_bytes)
        for traffic in self._traffic.values():
            total.dense_bytes += traffic.dense_bytes
            total.recycled += traffic.recycled
            total.steps += traffic.steps
        return {
            **total.stats(),
            "parameters": {name: traffic.stats() for name, traffic in self._traffic.items()},
        }

    def reset(self) -> None:
        """Forget all look-back gradients: the next step is sent in full. Residuals stay.

        All ranks do so before the same step.
        """
        self.sender.reset()
        for rank in self.receiver.senders():
            self.receiver.drop(rank)

    def rejoin(self) -> None:
        """Prepare for a step among ranks that may be others, and in other states.

        Look-back gradients are dropped, and `verify_ranks_match` is needed. A step that failed is
        forgotten.
        """
        self.reset()
        self._members = None
        self._failure = None

    def fail(self, error: BaseException) -> None:
        """Record the error of a step, after which the states of the ranks do not match."""
        self._failure = error

    def check_usable(self) -> None:
        """Raise `RuntimeError` if an earlier step failed."""
        if self._failure is not None:
            raise RuntimeError(
                "an earlier step failed, and the ranks are no longer in step: load a checkpoint"
            ) from self._failure

    def state_dict(self) -> dict[str, Any]:
        """Return this rank's state as a nested dict of tensors and numbers.

        Every rank has a state of its own, and must save it. `torch.load` reads it with
        ``weights_only=True``.
        """
        rank, size = self._members or (self.transport.rank, self.transport.size)
        return {
            "format": FORMAT,
            "rank": rank,
            "world_size": size,
            "step": self.step,
            "sender": self.sender.state_dict(),
            "receiver": self.receiver.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was called. All ranks do so before the same step.

        If the state is that of another rank or of another number of ranks, look-back gradients are
        dropped with a warning, and the next step is sent in full.

        Raises
        ------
        ValueError
            If it is the state of another compressor or model, or no such state. This averager is
            then unchanged.
        """
        self.restore(state)
        found = state["rank"], state["world_size"]
        if found != (self.transport.rank, self.transport.size):
            warnings.warn(
                f"the state is that of rank {found[0]} of {found[1]}, this is rank "
                f"{self.transport.rank} of {self.transport.size}: look-back gradients are dropped, "
                "and the next step is full",
                stacklevel=2,
            )
            self.reset()

    def restore(self, state: Mapping[str, Any]) -> None:
        """Do `load_state_dict` without comparing ranks, which an elastic engine may not know yet.

        `rejoin` has to follow, or a check that the ranks are those of the state.
        """
        if not isinstance(state, Mapping) or not set(state) >= STATE_KEYS:
            raise ValueError(
                f"this is not a state that {type(self).__name__}.state_dict() returned"
            )
        if state["format"] != FORMAT:
            raise ValueError(f"the state has format {state['format']}, this release reads {FORMAT}")
        before = self.sender.state_dict()
        self.sender.load_state_dict(state["sender"])
        try:
            self._check_tensors(state["sender"]["tensors"])
            self.receiver.load_state_dict(state["receiver"])
        except ValueError:
            self.sender.load_state_dict(before)
            raise
        self.step = state["step"]
        self._failure = None

    def _check_tensors(self, tensors: Mapping[str, Any]) -> None:
        """Raise `ValueError` unless the tensors of a sender's state are those of the parameters."""
        for name, entry in tensors.items():
            found = tuple(entry["shape"]), entry["dtype"]
            if name not in self._likes:
                raise ValueError(f"the state has a tensor {name!r}, which is not a parameter here")
            if found != self._likes[name]:
                raise ValueError(
                    f"the state is that of another model: its tensor {name!r} has shape and dtype "
                    f"{found}, and the parameter has {self._likes[name]}"
                )


def body_length(head: bytes, rank: int) -> int:
    """Return how many bytes of a rank's message follow its head.

    Raises
    ------
    PayloadError
        If the message has another version of the wire format.
    RuntimeError
        If the head is zeros: the rank could not encode its gradients.
    """
    # No version is 0.
    if not any(head[:8]):
        raise RuntimeError(f"rank {rank} failed before it could send: see the error there")
    return body_size(head)
