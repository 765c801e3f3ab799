"""A thread that averages gradients beside the backward pass."""

from __future__ import annotations

import contextlib
import queue
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lbgm_compress.collective.average import Average, RanksDiffer
from lbgm_compress.collective.averager import Averager

__all__ = ["BackgroundAverager", "Worker", "ready_event", "stream_after"]

# Seconds to wait for a thread whose owner is gone; it may be waiting for a rank that is gone, too.
END_TIMEOUT = 5.0


@dataclass(eq=False)
class Bucket:
    """Gradients of a step that are averaged together."""

    grads: Mapping[str, Tensor]
    deliver: Callable[[Average | None], None]
    """Takes the average; see `BackgroundAverager.submit`."""
    ready: Any
    """The event after which the gradients are there."""
    device: torch.device
    average: Average | None = None
    """The average, once it has begun."""
    delivered: bool = False

    def finish(self) -> None:
        """Deliver the average."""
        assert self.average is not None
        self.deliver(self.average)
        self.delivered, self.average = True, None

    def fail(self) -> None:
        """Say that there is no average, unless it is delivered already."""
        if not self.delivered:
            self.deliver(None)
            self.delivered = True


class BackgroundAverager(Averager):
    """Averages the gradients of a step in buckets, on a thread of its own.

    Engines that learn of gradients one after the other in the backward pass call `begin_step`,
    `submit` for each bucket, and `end_step`, all from the thread of the backward pass. Parameters,
    attributes and errors are those of `Averager`.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        # Whether a step has begun and not ended.
        self.under_way = False
        self._submitted: list[Bucket] = []
        # Those that have begun and are not finished.
        self._pending: list[Bucket] = []
        # Whether the step has to begin again, after the states of the ranks have been compared.
        self._again = False
        self._error: BaseException | None = None
        self._worker = Worker(self)

    def begin_step(self) -> None:
        """Begin a step, unless it has begun already.

        Raises
        ------
        ValueError
            On every rank, if the ranks were given different compressors or models; or if the loss
            scale is not a finite number above 0.
        RuntimeError
            If an earlier step failed.
        """
        if self.under_way:
            return
        self.check_usable()
        if not self.ranks_match:
            self._worker.run(self.verify_ranks_match)
        self.open_step()
        self.under_way = True

    def submit(
        self, grads: Mapping[str, Tensor], deliver: Callable[[Average | None], None]
    ) -> None:
        """Have some gradients of the step encoded and exchanged, and return at once.

        Parameters
        ----------
        grads
            As in `Averager.begin`.
        deliver
            Called on the worker thread: with the average, as soon as it can be finished without
            waiting, or at the end of the step; or with None if the step has failed.
        """
        device = next(iter(grads.values())).device
        bucket = Bucket(grads, deliver, ready_event(device), device)

        def task() -> None:
            self._submitted.append(bucket)
            if self._error is not None:
                return
            with stream_after(bucket.ready, device):
                try:
                    bucket.average = self.begin(grads)
                except RanksDiffer:
                    # The rest of the step is exchanged all the same, since ranks may learn of it
                    # at different times.
                    self._again = True
                    return
                except BaseException as error:
                    self._error = error
                    return
                self._pending.append(bucket)
                while self._pending and self._first_is_ready():
                    self._finish_first()

        self._worker.submit(task)

    def end_step(self) -> None:
        """Wait until all averages are delivered, and count the step.

        Raises
        ------
        Exception
            The first error of the step, whose averages must not be used.
        """
        error = self._wait()
        if error is not None:
            self.fail(error)
            raise error
        super().end_step()

    def abandon_step(self) -> None:
        """Wait until all averages are delivered, and take the step back without its error."""
        begun = self.under_way
        self._wait()
        if begun:
            # No step begins after a failure, so that this one is of the abandoned step.
            self._failure = None
            self._take_back()
            self._ask_to_compare()

    def gather_state_dict(self) -> dict[str, Any]:
        gathered: dict[str, Any] = {}
        self._worker.run(
            lambda: gathered.update(super(BackgroundAverager, self).gather_state_dict())
        )
        return gathered

    def _wait(self) -> BaseException | None:
        self._worker.run(self._finish_all)
        self.under_way = False
        error, self._error = self._error, None
        return error

    def _finish_all(self) -> None:
        while self._pending:
            self._finish_first()
        if self._again and self._error is None:
            self._begin_again()
        self._again = False
        for bucket in self._submitted:
            bucket.fail()
        self._submitted.clear()

    def _begin_again(self) -> None:
        """Compare the states of all ranks, and do the whole step, of which nothing is delivered."""
        try:
            self._compare_again()
            # Ranks may have other orders: none may wait for an average that another has not begun.
            for bucket in self._submitted:
                with stream_after(bucket.ready, bucket.device):
                    bucket.average = self.begin(bucket.grads)
            for bucket in self._submitted:
                bucket.finish()
        except BaseException as error:
            self._error = error

    def _first_is_ready(self) -> bool:
        average = self._pending[0].average
        assert average is not None
        try:
            return average.ready()
        except BaseException as error:
            self._error = error
            return True

    def _finish_first(self) -> None:
        bucket = self._pending.pop(0)
        if self._error is not None:
            return
        try:
            bucket.finish()
        except RanksDiffer:
            self._again = True
        except BaseException as error:
            self._error = error


class Worker:
    """A thread that runs tasks one after the other.

    It ends with `owner`, which the thread does not keep alive between tasks.
    """

    def __init__(self, owner: object) -> None:
        self._tasks: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        # A daemon: it must not keep a process alive whose peers are gone.
        thread = threading.Thread(target=_work, args=(self._tasks,), daemon=True)
        thread.start()
        weakref.finalize(owner, _end, self._tasks, thread)

    def submit(self, task: Callable[[], None]) -> None:
        """Run a task, which must not raise, after those before it, and return at once."""
        self._tasks.put(task)

    def run(self, task: Callable[[], None]) -> None:
        """Run a task after those before it, wait for it, and raise what it raises."""
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
    """End the thread, at the interpreter's end at the latest.

    A thread that frees tensors while the interpreter is taken down aborts the process.
    """
    tasks.put(None)
    if thread is not threading.current_thread():
        thread.join(END_TIMEOUT)


def ready_event(device: torch.device) -> Any:
    """Return an event after the work of the current stream so far; None on the CPU."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(device))
    return event


@contextlib.contextmanager
def stream_after(ready: Any, device: torch.device) -> Iterator[None]:
    """Make a new stream current, which waits for the event `ready`; do nothing if it is None."""
    if ready is None:
        yield
        return
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    stream.wait_event(ready)
    with torch.cuda.stream(stream):
        yield
