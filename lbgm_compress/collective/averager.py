"""The average of all ranks' gradients, whatever engine moves their messages.

What the adapters for `torch.distributed` and Horovod share: every rank encodes its gradients, all
ranks gather the messages, and each adds up the same decoded tensors in rank order. Averages are
bit-identical on all ranks, and replicas do not drift apart.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import math
import queue
import struct
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lbgm_compress.collective.transport import Transport, gather_texts
from lbgm_compress.compressor import Compressor
from lbgm_compress.endpoints import Receiver, Sender

__all__ = ["Average", "Averager", "Worker", "ready_event", "stream_after", "sum_dtype"]

FORMAT = 1
# Seconds to wait for a thread whose owner is gone; it may be waiting for a rank that is, too.
END_TIMEOUT = 5.0
STATE_KEYS = frozenset({"format", "rank", "world_size", "step", "sender", "receiver"})


@dataclass
class Traffic:
    """What one parameter has cost so far."""

    message_bytes: int = 0
    dense_bytes: int = 0
    recycled: int = 0
    steps: int = 0

    def stats(self) -> dict[str, float]:
        """Return the counts, and the shares that they give."""
        return {
            "message_bytes": self.message_bytes,
            "dense_bytes": self.dense_bytes,
            "ratio": self.message_bytes / self.dense_bytes if self.dense_bytes else 0.0,
            "recycled_share": self.recycled / self.steps if self.steps else 0.0,
        }


class Average(NamedTuple):
    """An average that is under way."""

    ready: Callable[[], bool]
    """Says whether all messages are here."""
    finish: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
    """Waits for them, and adds up in the given tensors, which have the gradients' shapes and hold
    zeros; returns the averages by name: those tensors, or new ones if the compressor finishes
    the average."""


class Averager:
    """One rank's sender, and its receiver for the other ranks.

    A rank does not decode its own message: what it stands for is known from encoding.

    Parameters
    ----------
    compressor
        What compresses the gradients: any, the same on all ranks.
    parameters
        Tensors with the names, shapes, dtypes and device of the gradients, the same on all ranks.
    transport
        What connects the ranks.
    start_step
        How many steps of plain all-reduce come first. Gradients change fastest at the start.
    weight
        This rank's weight in the average, for example its number of samples; positive. Its share
        is the weight divided by the sum of all ranks' weights.

    Attributes
    ----------
    compressor, transport, start_step
        As given.
    step : int
        The steps so far.
    sender, receiver
        The ends.

    Raises
    ------
    TypeError, ValueError
        If an argument is not what it should be.
    """

    def __init__(
        self,
        compressor: Compressor,
        parameters: Mapping[str, Tensor],
        transport: Transport,
        start_step: int = 0,
        weight: float = 1.0,
    ) -> None:
        if not isinstance(compressor, Compressor):
            raise TypeError(
                f"expected a compressor such as LBGM(TopK(0.01)), not {type(compressor).__name__}"
            )
        if isinstance(start_step, bool) or not isinstance(start_step, int) or start_step < 0:
            raise ValueError(f"start_step must be a whole number of at least 0, not {start_step!r}")
        if isinstance(weight, bool) or not isinstance(weight, (int, float)):
            raise TypeError(f"weight must be a number, not {weight!r}")
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
        self._weight = float(weight)
        self._shares: list[float] = []
        self._device = next(iter(parameters.values())).device
        self._description = [f"compressor {compressor!r}", f"start_step {start_step}"]
        self._description += [
            f"parameter {name!r} of shape {tuple(p.shape)} and {p.dtype}"
            for name, p in parameters.items()
        ]
        self._members: tuple[int, int] | None = None
        self._failure: BaseException | None = None
        self._traffic = {name: Traffic() for name in parameters}
        self._message_bytes = 0

    @property
    def warming_up(self) -> bool:
        """Whether the step that is going on is one of plain all-reduce."""
        return self.step < self.start_step

    @property
    def share(self) -> float:
        """This rank's share of the average, known once the ranks agree."""
        return self._shares[self.transport.rank]

    @property
    def agreed(self) -> bool:
        """Whether `agree` has nothing to do."""
        return self._members == (self.transport.rank, self.transport.size)

    def agree(self) -> None:
        """Compare what the ranks were given. All ranks do so, before their first step.

        Where an elastic engine has changed the ranks since, look-back gradients are dropped.

        Raises
        ------
        ValueError
            On every rank, if the ranks were given different compressors or models.
        """
        if self._members is not None:
            self.reset()
            self._members = None
        digest = hashlib.blake2b("\n".join(self._description).encode(), digest_size=16).digest()
        mine = digest + struct.pack("<qd", self.step, self._weight)
        data = torch.frombuffer(bytearray(mine), dtype=torch.uint8).to(self._device)
        rows = [bytes(row) for row in self.transport.gather_equal(data).tolist()]
        if any(row[:16] != digest for row in rows):
            self._tell_difference()
        numbers = [struct.unpack("<qd", row[16:]) for row in rows]
        # A rank that has joined a running job goes on where the others are.
        self.step = max(step for step, _ in numbers)
        total = sum(weight for _, weight in numbers)
        self._shares = [weight / total for _, weight in numbers]
        self._members = self.transport.rank, self.transport.size

    def start(self, grads: Mapping[str, Tensor]) -> Average:
        """Encode gradients, and begin to exchange them.

        `grads` are this rank's gradients by name: any part of the tensors, the same on all ranks.
        They must not change until the average is finished.
        """
        head_size = self.receiver.head_size(grads)
        try:
            message, own = self.sender.encode(grads)
        except Exception:
            # The other ranks wait for a head.
            nothing = torch.zeros(head_size, dtype=torch.uint8, device=self._device)
            with contextlib.suppress(RuntimeError):
                self.transport.start(nothing, head_size, min(grads)).messages()
            raise
        self._message_bytes += message.numel()
        for name, report in self.sender.report().items():
            traffic = self._traffic[name]
            traffic.message_bytes += report.bytes
            traffic.dense_bytes += grads[name].numel() * grads[name].element_size()
            traffic.recycled += report.recycled
            traffic.steps += 1
        pending = self.transport.start(message, head_size, min(grads))

        def finish(into: Mapping[str, Tensor]) -> dict[str, Tensor]:
            for rank, received in enumerate(pending.messages()):
                share = self._shares[rank]
                if rank == self.transport.rank:
                    for name, decoded in own.items():
                        decoded.add_to(into[name], share)
                else:
                    self.receiver.accumulate(rank, received, into, share, names=grads)
            return self.receiver.finish({name: into[name] for name in grads})

        return Average(pending.ready, finish)

    def stats(self) -> dict[str, Any]:
        """Return what this rank has sent since it was built, warm-up aside.

        Returns
        -------
        dict
            ``message_bytes`` (whole messages) and ``dense_bytes`` (the gradients) of all steps,
            their ``ratio``, ``recycled_share`` (the share of tensors sent as a coefficient alone),
            and ``parameters``: the same by parameter, without the messages' own bytes.
        """
        total = Traffic()
        for traffic in self._traffic.values():
            total.dense_bytes += traffic.dense_bytes
            total.recycled += traffic.recycled
            total.steps += traffic.steps
        total.message_bytes = self._message_bytes
        return {
            **total.stats(),
            "parameters": {name: traffic.stats() for name, traffic in self._traffic.items()},
        }

    def reset(self) -> None:
        """Forget all look-back gradients, on all ranks: the next step is full. Residuals stay."""
        self.sender.reset()
        for rank in self.receiver.senders():
            self.receiver.drop(rank)

    def rejoin(self) -> None:
        """Take the ranks for others, and what they hold for lost: the next step is full."""
        self.reset()
        self._members = None
        self._failure = None

    def fail(self, error: BaseException) -> None:
        """Remember what broke a step, after which the ranks are no longer in step."""
        self._failure = error

    def check_usable(self) -> None:
        """Raise `RuntimeError` after a step that failed."""
        if self._failure is not None:
            raise RuntimeError(
                "an earlier step failed, and the ranks are no longer in step: load a checkpoint"
            ) from self._failure

    def state_dict(self) -> dict[str, Any]:
        """Return what is needed to go on, as a nested dict of tensors and numbers.

        Every rank has its own, and must save it. `torch.load` reads it with ``weights_only=True``.
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
        """Go on where `state_dict` was taken. All ranks do so at the same step.

        If that was another rank, or there were more or fewer ranks, look-back gradients are dropped
        with a warning, and the next step is full.

        Raises
        ------
        ValueError
            If it is the state of another compressor or model, or no such state. This state is then
            as it was.
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
        """Do `load_state_dict` without a look at the ranks, which may be unknown at the moment."""
        if not isinstance(state, Mapping) or not set(state) >= STATE_KEYS:
            raise ValueError(
                f"this is not a state that {type(self).__name__}.state_dict() returned"
            )
        if state["format"] != FORMAT:
            raise ValueError(f"the state has format {state['format']}, this release reads {FORMAT}")
        before = self.sender.state_dict()
        self.sender.load_state_dict(state["sender"])
        try:
            self.receiver.load_state_dict(state["receiver"])
        except ValueError:
            self.sender.load_state_dict(before)
            raise
        self.step = state["step"]
        self._failure = None

    def _tell_difference(self) -> None:
        """Raise `ValueError` that says in what the ranks differ."""
        theirs = gather_texts(self.transport, "\n".join(self._description), self._device)
        first = theirs[0].split("\n")
        for rank, other in enumerate(theirs):
            for a, b in itertools.zip_longest(first, other.split("\n"), fillvalue="nothing"):
                if a != b:
                    raise ValueError(
                        f"the ranks were given different compressors or models: rank 0 has {a} "
                        f"where rank {rank} has {b}"
                    )


class Worker:
    """A thread that does one thing after the other, beside the backward pass.

    It ends with `owner`, which its tasks must not keep alive between them.
    """

    def __init__(self, owner: object) -> None:
        self._tasks: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        # A daemon: it must not keep a process alive whose peers are gone.
        thread = threading.Thread(target=_work, args=(self._tasks,), daemon=True)
        thread.start()
        weakref.finalize(owner, _end, self._tasks, thread)

    def submit(self, task: Callable[[], None]) -> None:
        """Do a task, which must not raise, after those before it."""
        self._tasks.put(task)

    def run(self, task: Callable[[], None]) -> None:
        """Do a task after those before it, wait for it, and raise what it raises."""
        errors: list[BaseException] = []
        done = threading.Event()

        def guarded() -> None:
            try:
                task()
            except BaseException as error:
                errors.append(error)
            finally:
                done.set()

        self._tasks.put(guarded)
        done.wait()
        if errors:
            raise errors[0]


def _work(tasks: queue.SimpleQueue[Callable[[], None] | None]) -> None:
    while (task := tasks.get()) is not None:
        task()
        # Else it would keep its gradients alive until the next one.
        del task


def _end(tasks: queue.SimpleQueue[Callable[[], None] | None], thread: threading.Thread) -> None:
    """Have the thread end, at the interpreter's end at the latest.

    A thread that frees tensors while the interpreter is taken down aborts the process.
    """
    tasks.put(None)
    if thread is not threading.current_thread():
        thread.join(END_TIMEOUT)


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype to add up in: float32 for half precision."""
    return torch.float32 if dtype.itemsize < 4 else dtype


def ready_event(device: torch.device) -> Any:
    """Return an event for what the current stream has done so far; None on the CPU."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(device))
    return event


@contextlib.contextmanager
def stream_after(ready: Any, device: torch.device) -> Iterator[None]:
    """Run on a stream of its own, after `ready`; on the CPU do nothing."""
    if ready is None:
        yield
        return
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    stream.wait_event(ready)
    with torch.cuda.stream(stream):
        yield
