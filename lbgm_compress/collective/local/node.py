"""Ranks that train one worker's model together, of which the first exchanges with other workers."""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lbgm_compress.collective.local.common_model import share
from lbgm_compress.collective.local.rounds import Rounds
from lbgm_compress.collective.transport import Transport

__all__ = ["FORMAT", "Follower", "Node", "News"]

FORMAT = 1
HEAD = "<?qqqq?"
FAILED = struct.pack(HEAD, True, 0, 0, 0, 0, False)
UNCHANGED, CHANGED, FORGOTTEN = range(3)


@dataclass
class News:
    """The counters of a leader, and the parameters that it has changed.

    Attributes
    ----------
    local_step, exchanges, clock, due, starts_over
        As in `Rounds`.
    changed, forgotten
        Names of parameters with new values, and of those whose inner optimizer's state is dropped.
    """

    local_step: int
    exchanges: int
    clock: int
    due: int | None
    starts_over: bool
    changed: Collection[str] = ()
    forgotten: Collection[str] = ()


class Node:
    """The ranks of one worker, which hold the same model and take the same inner steps.

    Parameters
    ----------
    transport
        Connects them. Its rank 0 is the leader.
    parameters
        The parameters of the model by name.
    inner_optimizer
        Their optimizer.
    """

    def __init__(
        self,
        transport: Transport,
        parameters: Mapping[str, Tensor],
        inner_optimizer: torch.optim.Optimizer,
    ) -> None:
        self.transport = transport
        self._parameters = parameters
        self._inner = inner_optimizer
        self._device = next(iter(parameters.values())).device

    def tell(self, news: News) -> None:
        """Give followers, which call `hear`, the leader's counters and changed parameters."""
        due = -1 if news.due is None else news.due
        head = struct.pack(
            HEAD,
            False,
            news.local_step,
            news.exchanges,
            news.clock,
            due,
            news.starts_over,
        )
        marks = bytes(
            FORGOTTEN if n in news.forgotten else CHANGED if n in news.changed else UNCHANGED
            for n in self._parameters
        )
        self._share(head + marks)
        share(self.transport, 0, [self._parameters[name].detach() for name in self._names(marks)])

    def fail(self) -> None:
        """Have `hear` raise an error on the followers."""
        with contextlib.suppress(Exception):
            self._share(FAILED + bytes(len(self._parameters)))

    def hear(self) -> News:
        """Take what the leader tells.

        Raises
        ------
        RuntimeError
            If the leader failed, or cannot be reached.
        """
        data = self._share(bytes(len(FAILED) + len(self._parameters)))
        failed, local_step, exchanges, clock, due, starts_over = struct.unpack(
            HEAD, data[: len(FAILED)]
        )
        if failed:
            raise RuntimeError(
                "the first rank of this node, which exchanges for all of them, failed: see the "
                "error there"
            )
        marks = data[len(FAILED) :]
        names = self._names(marks)
        share(self.transport, 0, [self._parameters[name].detach() for name in names])
        forgotten = [n for n, mark in zip(self._parameters, marks, strict=True) if mark > CHANGED]
        for name in forgotten:
            self._inner.state.pop(self._parameters[name], None)
        return News(
            local_step,
            exchanges,
            clock,
            None if due < 0 else due,
            starts_over,
            names,
            forgotten,
        )

    def share_all(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite tensors of the followers with those of the leader; all call it together."""
        share(self.transport, 0, tensors)

    def _share(self, data: bytes) -> bytes:
        tensor = torch.frombuffer(bytearray(data), dtype=torch.uint8).to(self._device)
        share(self.transport, 0, [tensor])
        return bytes(tensor.tolist())

    def _names(self, marks: bytes) -> list[str]:
        return [n for n, mark in zip(self._parameters, marks, strict=True) if mark != UNCHANGED]


class Follower(Rounds):
    """The part of a rank in the local training of its node, whose leader exchanges.

    It has the methods of `LocalTraining`. Parameters and buffers are the leader's after each
    exchange.
    """

    def __init__(self, model: nn.Module, node: Node, **schedule: int) -> None:
        super().__init__(**schedule)
        self.model = model
        self._node = node
        self._hear()
        node.share_all([*model.parameters(), *model.buffers()])

    def _hear(self) -> None:
        news = self._node.hear()
        self.local_step, self.exchanges = news.local_step, news.exchanges
        self._clock, self._due, self._starts_over = news.clock, news.due, news.starts_over

    @torch.no_grad()
    def _apply(self) -> None:
        self._hear()

    @torch.no_grad()
    def _start_over(self) -> None:
        self._hear()

    @torch.no_grad()
    def finish(self) -> None:
        """Take the mean of all workers' models, as `LocalTraining.finish`."""
        if self._starts_over:
            self._start_over()
        if self._due is not None:
            self._apply()
        self._hear()
        self._node.share_all(self.model.buffers())

    @contextlib.contextmanager
    def common_model(self) -> Iterator[nn.Module]:
        """Raise `RuntimeError`: the leader alone holds the common model."""
        raise RuntimeError(
            "the first rank of each node holds the common model: call common_model() there alone, "
            "and evaluate the model that it yields, without DistributedDataParallel"
        )
        yield self.model

    def stats(self) -> dict[str, Any]:
        """Return counts as `LocalTraining.stats`: this rank sends nothing to other workers."""
        return {
            "message_bytes": 0,
            "dense_bytes": 0,
            "ratio": 0.0,
            "final_bytes": 0,
            "recycled_share": 0.0,
            "exchanges": self.exchanges,
            "local_steps": self.local_step,
            "bits_per_step": 0.0,
        }

    def state_dict(self) -> dict[str, Any]:
        """Return counts; what has to be kept of the node's exchanges is in the leader's state."""
        return {"format": FORMAT, "local_step": self.local_step, "exchanges": self.exchanges}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on as the leader, which loads its state at the same time.

        Raises
        ------
        ValueError
            If it is no state of local training.
        RuntimeError
            If the leader could not load its state.
        """
        self._hear()
        if not isinstance(state, Mapping) or "exchanges" not in state:
            raise ValueError(
                "this is not a state of local training, as DiLoCo.state_dict() returns it"
            )
