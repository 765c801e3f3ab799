"""Methods to compare compressors with, which average gradients by DDP's own means.

A baseline is named in lists of methods as a compressor is, and makes no messages. `register` is how
every command puts a method on a DDP model.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from torch import Tensor, nn

from lbgm_compress import Compressor
from lbgm_compress.algorithm import Algorithm
from lbgm_compress.collective.averager import Averager
from lbgm_compress.compressor import Encoding, State
from lbgm_compress.decoded import Decoded

if TYPE_CHECKING:
    from torch.nn.parallel import DistributedDataParallel

__all__ = [
    "BASELINES",
    "BFloat16",
    "Baseline",
    "Counter",
    "Dense",
    "Float16",
    "NoExchange",
    "TorchPowerSGD",
    "Sent",
    "counter_of",
    "current_name",
    "register",
]


class Sent(NamedTuple):
    """The messages of one rank."""

    bytes: int
    """Their size, all steps together."""
    recycled: int
    """Tensors of the last step that were sent as a look-back coefficient."""
    tensors: int
    """All tensors of the last step."""
    recycled_share: float
    """The share of tensors recycled, all steps together."""


Counter = Callable[[int], Sent]
"""Returns what this rank has sent after a number of steps, the last of which is over."""


@dataclass(frozen=True, repr=False)
class Baseline(Compressor):
    """A method of DDP's. Its ranks average gradients before each has those of the others."""

    @abc.abstractmethod
    def hook(self) -> tuple[Any, Callable[..., Any]] | None:
        """Return a new state and the communication hook, or None for DDP's own all-reduce."""

    @abc.abstractmethod
    def sent_bytes(self, state: Any, size: int, steps: int) -> int:
        """Return the bytes that a rank contributed to averages in so many steps.

        `state` is that of `hook`; `size` is the number of parameters, in float32.
        """

    def encode(self, grad: Tensor, state: State) -> Encoding:
        raise NotImplementedError(f"{self!r} makes no messages: DDP averages the gradients")

    def decode(
        self, head: bytes, body: Tensor, state: State, like: Tensor
    ) -> tuple[Decoded, State]:
        raise NotImplementedError(f"{self!r} makes no messages: DDP averages the gradients")


@dataclass(frozen=True, repr=False)
class Dense(Baseline):
    """DDP's own all-reduce of float32 gradients."""

    def hook(self) -> tuple[Any, Callable[..., Any]] | None:
        return None

    def sent_bytes(self, state: Any, size: int, steps: int) -> int:
        return 4 * size * steps


@dataclass(frozen=True, repr=False)
class NoExchange(Baseline):
    """No average: each rank goes on with its own gradients. No method takes less time."""

    def hook(self) -> tuple[Any, Callable[..., Any]] | None:
        # Without annotations, which torch would compare with its own.
        return None, lambda _, bucket: _completed(bucket.buffer())

    def sent_bytes(self, state: Any, size: int, steps: int) -> int:
        return 0


@dataclass(frozen=True, repr=False)
class Float16(Baseline):
    """torch's hook that averages gradients in float16."""

    def hook(self) -> tuple[Any, Callable[..., Any]] | None:
        from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

        return None, default_hooks.fp16_compress_hook

    def sent_bytes(self, state: Any, size: int, steps: int) -> int:
        return 2 * size * steps


@dataclass(frozen=True, repr=False)
class BFloat16(Baseline):
    """torch's hook that averages gradients in bfloat16."""

    def hook(self) -> tuple[Any, Callable[..., Any]] | None:
        from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

        return None, default_hooks.bf16_compress_hook

    def sent_bytes(self, state: Any, size: int, steps: int) -> int:
        return 2 * size * steps


@dataclass(frozen=True, repr=False)
class TorchPowerSGD(Baseline):
    """torch's PowerSGD hook (arXiv 1905.13727), with error feedback and two dense steps first.

    On gloo it hangs with more than one bucket.
    """

    rank: int
    DENSE_STEPS: ClassVar[int] = 2

    def __post_init__(self) -> None:
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1:
            raise ValueError(f"rank must be a whole number of at least 1, not {self.rank!r}")

    def hook(self) -> tuple[Any, Callable[..., Any]] | None:
        from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook

        state = powerSGD_hook.PowerSGDState(
            None, matrix_approximation_rank=self.rank, start_powerSGD_iter=self.DENSE_STEPS
        )
        return state, powerSGD_hook.powerSGD_hook

    def sent_bytes(self, state: Any, size: int, steps: int) -> int:
        dense = min(steps, self.DENSE_STEPS) * size
        return 4 * (dense + int(state.total_numel_after_compression))


BASELINES: tuple[type[Baseline], ...] = (Dense, NoExchange, Float16, BFloat16, TorchPowerSGD)


def _completed(result: Tensor) -> Any:
    import torch

    future: Any = torch.futures.Future()
    future.set_result(result)
    return future


# Names of methods in kept results: before methods were expressions, and before the package had a
# PowerSGD of its own, whose expressions are PowerSGD() and PowerSGD(rank=1).
EARLIER = {
    "dense": "Dense()",
    "fp16": "Float16()",
    **{f"PowerSGD({rank})": f"TorchPowerSGD({rank})" for rank in (1, 2, 4)},
}


def current_name(name: str) -> str:
    """Return the expression of a method that kept results may name otherwise."""
    return EARLIER.get(name, name)


def register(
    model: DistributedDataParallel,
    compressor: Algorithm,
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    weight: float = 1.0,
) -> Counter:
    """Register the communication hook of a compressor or a baseline, and return its counter.

    Parameters
    ----------
    model
        A DDP model with one bucket.
    compressor
        A compressor or a baseline.
    named_parameters
        The parameters under the names that messages are made with.
    weight
        This rank's weight in the average. Baselines average with equal weights.
    """
    if not isinstance(compressor, Baseline):
        from lbgm_compress.adapters.ddp import CompressionState, compression_hook

        state = CompressionState(compressor, named_parameters, weight=weight)
        model.register_comm_hook(state, compression_hook)
        return counter_of(state)
    baseline, hook = compressor, compressor.hook()
    if hook is not None:
        model.register_comm_hook(*hook)
    own = None if hook is None else hook[0]
    size = sum(parameter.numel() for parameter in model.parameters())
    return lambda steps: Sent(baseline.sent_bytes(own, size, steps), 0, 1, 0.0)


def counter_of(averager: Averager) -> Counter:
    """Return the counter of an averager's messages."""

    def count(steps: int) -> Sent:
        report, stats = averager.sender.report().values(), averager.stats()
        recycled = sum(tensor.recycled for tensor in report)
        return Sent(
            int(stats["message_bytes"]), recycled, len(report), float(stats["recycled_share"])
        )

    return count
