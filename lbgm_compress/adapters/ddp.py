"""A communication hook for `torch.nn.parallel.DistributedDataParallel`.

>>> from lbgm_compress import LBGM, TopK
>>> from lbgm_compress.adapters.ddp import CompressionState, compression_hook
>>> def compress_gradients(model):  # a model wrapped in DistributedDataParallel
...     state = CompressionState(LBGM(TopK(0.01)), model.named_parameters())
...     model.register_comm_hook(state, compression_hook)
...     return state

Every rank encodes its gradients, all ranks gather the messages, and each adds up the same decoded
tensors in rank order: averages are bit-identical on all ranks, and replicas do not drift apart.

Memory of a rank, beyond what `DistributedDataParallel` takes, for K ranks, a model of M bytes and
compressed look-back gradients of C bytes (C = M for ``LBGM()``, about ratio * M + indices for
``LBGM(TopK(ratio))``): between steps M + (K - 1) C under LBGM, nothing for compressors without a
memory, and M for each `ErrorFeedback`; in a step, for one bucket of B bytes at a time, B for the
average and the messages of all ranks, at most K B.
"""

# Without `from __future__ import annotations`: `register_comm_hook` compares annotations by value.

import contextlib
import datetime
import hashlib
import itertools
import queue
import threading
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import GradBucket
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from lbgm_compress.compressor import Compressor
from lbgm_compress.exchange import Averager, ProcessGroupTransport

__all__ = ["CompressionState", "compression_hook"]

FORMAT = 1


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


class CompressionState:
    """What `compression_hook` needs to know and keeps, for one model on one rank.

    To build one is a collective: all ranks of the process group do, for their models in the same
    order.

    Parameters
    ----------
    compressor
        What compresses the gradients: any, the same on all ranks.
    named_parameters
        ``model.named_parameters()``, of the model or of its wrapper, the same on all ranks.
    process_group
        The group that the model was wrapped with; the default group unless given.
    start_step
        How many steps of plain all-reduce come first. Gradients change fastest at the start.

    Raises
    ------
    TypeError, ValueError
        If an argument is not what it should be.
    RuntimeError
        If `torch.distributed` is not initialised.
    """

    def __init__(
        self,
        compressor: Compressor,
        named_parameters: Iterable[tuple[str, Tensor]],
        process_group: dist.ProcessGroup | None = None,
        start_step: int = 0,
    ) -> None:
        if not isinstance(compressor, Compressor):
            raise TypeError(
                f"expected a compressor such as LBGM(TopK(0.01)), not {type(compressor).__name__}"
            )
        if isinstance(start_step, bool) or not isinstance(start_step, int) or start_step < 0:
            raise ValueError(f"start_step must be a whole number of at least 0, not {start_step!r}")
        if not dist.is_available() or not dist.is_initialized():
            raise RuntimeError("call torch.distributed.init_process_group() first")
        parameters = {name: p for name, p in named_parameters if p.requires_grad}
        if not parameters:
            raise ValueError("named_parameters has no parameter that requires a gradient")
        self.compressor = compressor
        self.start_step = start_step
        self.step = 0
        self.process_group = process_group if process_group is not None else _default_group()
        self._names = {id(parameter): name for name, parameter in parameters.items()}
        # Parameters are told apart by their identity, which lasts while they do.
        self._parameters = list(parameters.values())
        self._averager = Averager(
            compressor, parameters, ProcessGroupTransport(_group_like(self.process_group))
        )
        self._traffic = {name: Traffic() for name in parameters}
        self._message_bytes = 0
        self._checked = False
        self._failure: BaseException | None = None
        self._broken = False
        self._worker = _Worker()
        weakref.finalize(self, self._worker.stop)

    def stats(self) -> dict[str, Any]:
        """Return what this rank has sent since the state was built, warm-up aside.

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
        self._averager.reset()

    def state_dict(self) -> dict[str, Any]:
        """Return what is needed to go on, as a nested dict of tensors and numbers.

        Every rank has its own, and must save it. `torch.load` reads it with ``weights_only=True``.
        """
        return {
            "format": FORMAT,
            "rank": self._averager.transport.rank,
            "world_size": self._averager.transport.size,
            "step": self.step,
            "sender": self._averager.sender.state_dict(),
            "receiver": self._averager.receiver.state_dict(),
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
        keys = {"format", "rank", "world_size", "step", "sender", "receiver"}
        if not isinstance(state, Mapping) or not keys <= set(state):
            raise ValueError("this is not a state that CompressionState.state_dict() returned")
        if state["format"] != FORMAT:
            raise ValueError(f"the state has format {state['format']}, this release reads {FORMAT}")
        transport = self._averager.transport
        before = self._averager.sender.state_dict()
        self._averager.sender.load_state_dict(state["sender"])
        try:
            self._averager.receiver.load_state_dict(state["receiver"])
        except ValueError:
            self._averager.sender.load_state_dict(before)
            raise
        self.step = state["step"]
        found = state["rank"], state["world_size"]
        if found != (transport.rank, transport.size):
            warnings.warn(
                f"the state is that of rank {found[0]} of {found[1]}, this is rank "
                f"{transport.rank} of {transport.size}: look-back gradients are dropped, and the "
                "next step is full",
                stacklevel=2,
            )
            self.reset()

    def _hook(self, bucket: GradBucket) -> torch.futures.Future[Tensor]:
        if self._broken:
            raise RuntimeError(
                "an earlier step failed, and the ranks are no longer in step: load a checkpoint"
            ) from self._failure
        last = bucket.is_last()
        warming_up = self.step < self.start_step
        if last:
            self.step += 1
        if warming_up:
            return allreduce_hook(self.process_group, bucket)
        buffer, grads = bucket.buffer(), {}
        for parameter, grad in zip(bucket.parameters(), bucket.gradients(), strict=True):
            if id(parameter) not in self._names:
                raise ValueError(
                    f"a parameter of shape {tuple(parameter.shape)} is not among the "
                    "named_parameters that CompressionState was given: build it from the same model"
                )
            grads[self._names[id(parameter)]] = grad
        on_gpu = buffer.device.type == "cuda"
        ready = torch.cuda.Event() if on_gpu else None  # type: ignore[no-untyped-call]
        if ready is not None:
            ready.record(torch.cuda.current_stream(buffer.device))
        future: torch.futures.Future[Tensor] = torch.futures.Future(
            devices=[buffer.device] if on_gpu else None
        )

        def work() -> None:
            # Without a result the backward pass would never end; its last hook raises the error.
            try:
                if self._failure is None:
                    with _stream_after(ready, buffer.device):
                        future.set_result(self._average(buffer, grads))
                    return
            except BaseException as error:
                self._failure = error
            future.set_result(buffer)

        self._worker.submit(work)
        if last:
            self._end_step()
        return future

    def _end_step(self) -> None:
        """Wait for the worker, and raise what it met."""
        self._worker.wait()
        if self._failure is not None:
            self._broken = True
            raise self._failure

    def _average(self, buffer: Tensor, grads: Mapping[str, Tensor]) -> Tensor:
        if not self._checked:
            self._check_alike()
            self._checked = True
        # Sums of half precision are taken in float32.
        dtype = torch.float32 if buffer.dtype.itemsize < 4 else buffer.dtype
        out = torch.zeros_like(buffer, dtype=dtype)
        into = {
            name: out.as_strided(
                grad.shape, grad.stride(), grad.storage_offset() - buffer.storage_offset()
            )
            for name, grad in grads.items()
        }
        averages, size = self._averager.average(grads, into)
        for name, average in averages.items():
            if average is not into[name]:
                into[name].copy_(average)
        self._message_bytes += size
        for name, report in self._averager.report().items():
            traffic = self._traffic[name]
            traffic.message_bytes += report.bytes
            traffic.dense_bytes += grads[name].numel() * grads[name].element_size()
            traffic.recycled += report.recycled
            traffic.steps += 1
        return out.to(buffer.dtype)

    def _check_alike(self) -> None:
        """Raise `ValueError` on every rank unless all have the same compressor and parameters."""
        transport = self._averager.transport
        mine = [f"compressor {self.compressor!r}", f"start_step {self.start_step}"]
        mine += [
            f"parameter {self._names[id(p)]!r} of shape {tuple(p.shape)} and {p.dtype}"
            for p in self._parameters
        ]
        digest = hashlib.blake2b("\n".join(mine).encode(), digest_size=16).digest()
        device = self._parameters[0].device
        data = torch.frombuffer(bytearray(digest), dtype=torch.uint8).to(device)
        rows = transport.gather_equal(data)
        if bool((rows == rows[0]).all()):
            return
        theirs: list[Any] = [None] * transport.size
        assert isinstance(transport, ProcessGroupTransport)
        dist.all_gather_object(theirs, mine, group=transport.group)
        for rank, other in enumerate(theirs):
            for a, b in itertools.zip_longest(theirs[0], other, fillvalue="nothing"):
                if a != b:
                    raise ValueError(
                        f"the ranks were given different compressors or models: rank 0 has {a} "
                        f"where rank {rank} has {b}"
                    )


def compression_hook(
    state: CompressionState, bucket: GradBucket
) -> torch.futures.Future[torch.Tensor]:
    """Average the gradients of a bucket over all ranks, in compressed form.

    For ``model.register_comm_hook(state, compression_hook)``. Work is done on one thread with a
    process group of its own, beside the backward pass.

    Raises
    ------
    ValueError
        In the first step, on every rank, if the ranks were given different compressors or models.
    RuntimeError
        If another rank failed or cannot be reached; the message is torch's own.
    """
    return state._hook(bucket)


class _Worker:
    """A thread that does one thing after the other."""

    def __init__(self) -> None:
        self._tasks: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        # A daemon: it must not keep a process alive whose peers are gone.
        threading.Thread(target=_work, args=(self._tasks,), daemon=True).start()

    def submit(self, task: Callable[[], None]) -> None:
        self._tasks.put(task)

    def wait(self) -> None:
        done = threading.Event()
        self._tasks.put(done.set)
        done.wait()

    def stop(self) -> None:
        self._tasks.put(None)


def _work(tasks: "queue.SimpleQueue[Callable[[], None] | None]") -> None:
    while (task := tasks.get()) is not None:
        task()
        # Else it would keep its gradients alive until the next one.
        del task


@contextlib.contextmanager
def _stream_after(ready: Any, device: torch.device) -> Any:
    """Run on a stream of its own, after `ready`; on the CPU do nothing."""
    if ready is None:
        yield
        return
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    stream.wait_event(ready)
    with torch.cuda.stream(stream):
        yield


def _default_group() -> dist.ProcessGroup:
    group = dist.group.WORLD
    assert group is not None
    return group


def _group_like(group: dist.ProcessGroup) -> dist.ProcessGroup:
    """Return a new group of the same ranks, with the same backend and time-out.

    Two users of one group would mix up their collectives.
    """
    ranks = dist.get_process_group_ranks(group)
    made = dist.new_group(
        ranks,
        timeout=_timeout(group),
        backend=dist.get_backend(group),
        use_local_synchronization=True,
    )
    assert isinstance(made, dist.ProcessGroup)
    return made


def _timeout(group: dist.ProcessGroup) -> datetime.timedelta | None:
    """Return the time-out that a group was made with, or None where it does not tell."""
    backend = "cuda" if dist.get_backend(group) == "nccl" else "cpu"
    try:
        timeout = group._get_backend(torch.device(backend)).options._timeout
    except (AttributeError, RuntimeError):
        return None
    return timeout if isinstance(timeout, datetime.timedelta) else None
