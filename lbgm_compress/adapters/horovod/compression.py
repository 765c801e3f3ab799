"""The averages of a distributed optimizer, in buckets that follow the backward pass."""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lbgm_compress._util.checks import check_number
from lbgm_compress.adapters.horovod.transport import HorovodTransport
from lbgm_compress.algorithm import Algorithm
from lbgm_compress.collective.average import Average
from lbgm_compress.collective.background import BackgroundAverager
from lbgm_compress.collective.parameters import zeros_of

__all__ = ["Bucket", "Compression"]


@dataclass(eq=False)
class Bucket:
    """Parameters whose gradients go into one message."""

    parameters: dict[str, Tensor]
    waiting: int = 0
    """The number of those that require a gradient and have none yet in this step."""
    submitted: bool = False


class Compression(BackgroundAverager):
    """Averages the gradients of a distributed optimizer, on one rank.

    `DistributedOptimizer` makes it, and keeps it as its attribute ``compression``.
    """

    transport: HorovodTransport

    def __init__(
        self,
        compressor: Algorithm,
        parameters: dict[str, Tensor],
        transport: HorovodTransport,
        backward_passes_per_step: int,
        start_step: int,
        weight: float,
        bucket_cap_mb: float,
        loss_scale: float | Callable[[], float],
    ) -> None:
        check_number("bucket_cap_mb", bucket_cap_mb, error=TypeError)
        if not bucket_cap_mb > 0:
            raise ValueError(f"bucket_cap_mb must be above 0, not {bucket_cap_mb}")
        super().__init__(
            compressor,
            parameters,
            transport,
            start_step,
            weight,
            must_match=[f"bucket_cap_mb {bucket_cap_mb}"],
            loss_scale=loss_scale,
        )
        # Two optimizers of one process must not share the names of their exchanges.
        key = hashlib.blake2b(self.description.encode(), digest_size=6).hexdigest()
        transport.name = f"lbgm_compress.{key}"
        self.passes = backward_passes_per_step
        self._buckets = _buckets(parameters, int(bucket_cap_mb * 2**20))
        self._bucket_of = {p: b for b in self._buckets for p in b.parameters.values()}
        self._delay = dict.fromkeys(self._bucket_of, self.passes)
        # Whether the averages have arrived, and no gradient has come since.
        self.synchronized = False
        if transport.included:
            # Parameters outlive an optimizer that is thrown away, and must not go on sending.
            itself = weakref.ref(self)

            def hook(parameter: Tensor) -> None:
                compression = itself()
                if compression is not None:
                    compression._hook(parameter)

            for p in self._bucket_of:
                # A frozen parameter takes no hook, and keeps one that it has.
                needs_gradient = p.requires_grad
                p.requires_grad_(True)
                p.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
                p.requires_grad_(needs_gradient)

    def set_passes(self, passes: int) -> None:
        """Send gradients after `passes` backward passes, from now on."""
        self.passes = passes
        self.under_way = False
        self._clear()

    def synchronize(self) -> None:
        """Send the gradients that have not been sent, and wait for all averages."""
        if self.transport.included:
            self.begin_step()
            for bucket in self._buckets:
                if not bucket.submitted:
                    self._submit(bucket)
            try:
                self.end_step()
            finally:
                self._clear()
        self.synchronized = True

    def abandon(self) -> None:
        """Wait for averages that are under way, and forget that their gradients were sent."""
        self.abandon_step()
        self._clear()

    def undo(self) -> None:
        if self.under_way:
            raise RuntimeError(
                "undo() before the averages of the step are there: call optimizer.synchronize() "
                "after the backward pass, and then undo()"
            )
        super().undo()

    def average_loss(self, loss: Any) -> Any:
        """Return the average of a closure's loss, so that all ranks take the same decisions."""
        if loss is None or not self.transport.included:
            return loss
        value = torch.tensor([float(loss)], dtype=torch.float64) * self.share
        mean = self.transport.begin_all_reduce(value, "loss").result()
        return loss.new_tensor(mean.item()) if isinstance(loss, Tensor) else mean.item()

    def begin_step(self) -> None:
        if not self.under_way:
            # What is frozen now gets no gradient in this step, for which its bucket would wait.
            for bucket in self._buckets:
                bucket.waiting = sum(p.requires_grad for p in bucket.parameters.values())
        super().begin_step()
        self.synchronized = False

    def _hook(self, parameter: Tensor) -> None:
        """Count a gradient that has been accumulated, and send its bucket when it is complete."""
        if self._delay[parameter] <= 0:
            raise AssertionError(
                "Gradients were computed more than backward_passes_per_step times before call to "
                "step(). Increase backward_passes_per_step to accumulate gradients locally."
            )
        self.begin_step()
        bucket = self._bucket_of[parameter]
        if bucket.submitted:
            raise AssertionError(
                f"a parameter of shape {tuple(parameter.shape)} was unfrozen between two backward "
                "passes of one step, whose gradients are sent already: unfreeze it before the first"
            )
        self._delay[parameter] -= 1
        if self._delay[parameter] == 0:
            bucket.waiting -= 1
            if bucket.waiting == 0:
                self._submit(bucket)

    def _submit(self, bucket: Bucket) -> None:
        bucket.submitted = True
        grads, targets = {}, {}
        for name, parameter in bucket.parameters.items():
            if not parameter.requires_grad and self._delay[parameter] == self.passes:
                # Frozen: its gradient, if it has one, is of an earlier step.
                grads[name] = zeros_of(parameter)
                continue
            if parameter.grad is None:
                # Another rank may have used it.
                parameter.grad = torch.zeros_like(parameter)
            if parameter.grad.is_sparse:
                raise TypeError(
                    f"the gradient of {name!r} is sparse, and compression needs dense ones: build "
                    "the embedding with sparse=False"
                )
            grads[name] = targets[name] = parameter.grad

        def deliver(average: Average | None) -> None:
            if average is None:
                return
            for name, mean in average.finish().items():
                if name in targets:
                    targets[name].copy_(mean)
            device = next(iter(grads.values())).device
            if device.type == "cuda":
                torch.cuda.current_stream(device).synchronize()

        self.submit(grads, deliver)

    def _clear(self) -> None:
        self._delay = dict.fromkeys(self._delay, self.passes)
        for bucket in self._buckets:
            bucket.submitted = False


def _buckets(parameters: Mapping[str, Tensor], cap: int) -> list[Bucket]:
    """Group parameters from the last to the first, the order in which gradients become ready."""
    groups: list[dict[str, Tensor]] = []
    size = 0
    for name, parameter in reversed(list(parameters.items())):
        grown = size + parameter.numel() * parameter.element_size()
        device = next(iter(groups[-1].values())).device if groups else None
        if grown > cap or parameter.device != device:
            groups.append({})
            grown = parameter.numel() * parameter.element_size()
        groups[-1][name] = parameter
        size = grown
    return [Bucket(group) for group in groups]
