"""The ends of a rank whose messages are gathered, and each decoded by each rank."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from lbgm_compress.collective.agreement import drop_unshared
from lbgm_compress.collective.average import Average, CompressedAverage
from lbgm_compress.collective.ends import Ends
from lbgm_compress.collective.heads import DIFFERS, FAILED, body_length, notice
from lbgm_compress.collective.transport import Pending
from lbgm_compress.compressor import Compressor
from lbgm_compress.decoded import Decoded
from lbgm_compress.endpoints import Receiver, Sender

__all__ = ["Gathered"]


class Gathered(Ends):
    """A sender, and a receiver for the messages of the other ranks."""

    def __init__(
        self, compressor: Compressor, parameters: Mapping[str, Tensor], *others: Any
    ) -> None:
        super().__init__(*others)
        self.compressor = compressor
        self.sender = Sender(compressor, seed=self.transport.rank)
        self.receiver = Receiver(compressor, parameters)

    def begin(
        self,
        grads: Mapping[str, Tensor],
        shares: Sequence[float],
        loss_scale: float,
        differs: bool,
        fail: Callable[[BaseException], None],
        spoil: Callable[[], None],
    ) -> Average:
        head_size = self.receiver.head_size(grads)
        own: Mapping[str, Decoded] = {}
        if differs:
            message = notice(DIFFERS, head_size, self.device)
        else:
            try:
                message, own = self.sender.encode(grads, loss_scale=loss_scale)
            except Exception:
                # The other ranks wait for a head.
                self.announce_failure(grads)
                raise
            self.traffic.count(message.numel(), grads, self.sender.sent)
        pending = self._gather(message, head_size, grads)
        return CompressedAverage(
            pending,
            grads,
            fail,
            own,
            self.sender.uncompressed(),
            self.receiver,
            shares,
            self.transport.rank,
            spoil,
        )

    def announce_failure(self, grads: Mapping[str, Tensor]) -> None:
        head_size = self.receiver.head_size(grads)
        failed = notice(FAILED, head_size, self.device)
        with contextlib.suppress(RuntimeError):
            self._gather(failed, head_size, grads).result()

    def _gather(
        self, message: Tensor, head_size: int, grads: Mapping[str, Tensor]
    ) -> Pending[list[Tensor]]:
        return self.transport.begin_gather(message, head_size, body_length, min(grads))

    def begin_step(self) -> None:
        self.sender.begin_step()
        self.receiver.begin_step()

    def undo(self) -> None:
        self.sender.undo()
        self.receiver.undo()

    def commit(self) -> None:
        self.sender.commit()
        self.receiver.commit()

    def reset(self) -> None:
        self.sender.reset()
        for rank in self.receiver.senders():
            self.receiver.drop(rank)

    def drop_unshared(self) -> str:
        if not self.compressor.receiver_has_state:
            return ""
        dropped = drop_unshared(self.transport, self.sender, self.receiver, self.device)
        return ", ".join(f"{n} tensor{'s' * (n > 1)} of rank {r}" for r, n in dropped.items())

    def state_dict(self) -> dict[str, Any]:
        return {"sender": self.sender.state_dict(), "receiver": self.receiver.state_dict()}

    def held_of(self, rank: int) -> Mapping[Any, Any]:
        held = self.receiver.state_dict()["senders"]
        return {rank: held[rank]} if rank in held else {}

    def part(self, sender: Any, held: Mapping[Any, Any], rank: int) -> dict[str, Any]:
        senders = {other: one for other, one in held.items() if other != rank}
        return {"sender": sender, "receiver": {**self.receiver.state_dict(), "senders": senders}}

    def of_another(self, sender: Mapping[str, Any]) -> dict[str, Any]:
        return Sender(self.compressor, seed=self.transport.rank).state_dict()

    def check_sender(self, state: Mapping[str, Any]) -> None:
        Sender(self.compressor).load_state_dict(state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        before = self.sender.state_dict()
        self.sender.load_state_dict(state["sender"])
        try:
            self.receiver.load_state_dict(state["receiver"])
        except ValueError:
            self.sender.load_state_dict(before)
            raise
