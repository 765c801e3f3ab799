"""A grid that waits no longer than it must."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

from flwr.app import Message
from flwr.serverapp import Grid

INTERVAL = 0.1  # seconds


class PromptGrid:
    """Flower's grid, with frequent polls and an early end of rounds.

    Flower's own grid asks for replies every three seconds, and ends a round without some of them
    only at the time-out.

    Parameters
    ----------
    grid
        Flower's grid, which does all communication.
    absent
        Returns for the number of a round and a node whether the node cannot reply in it. When all
        others have replied, the round ends as at a time-out.
    """

    def __init__(self, grid: Grid, absent: Callable[[int, int], bool]) -> None:
        self.grid, self.absent = grid, absent

    def __getattr__(self, name: str) -> Any:
        return getattr(self.grid, name)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        """Send messages, and return the replies that come before the end of the round."""
        messages = list(messages)
        waiting = dict(zip(self.grid.push_messages(messages), messages, strict=True))
        replies: list[Message] = []
        end = float("inf") if timeout is None else time.monotonic() + timeout
        while time.monotonic() < end:
            for reply in self.grid.pull_messages(list(waiting)):
                replies.append(reply)
                waiting.pop(reply.metadata.reply_to_message_id, None)
            if all(self._absent(message) for message in waiting.values()):
                break
            time.sleep(INTERVAL)
        return replies

    def _absent(self, message: Message) -> bool:
        number = int(message.content["config"]["server-round"])
        return self.absent(number, message.metadata.dst_node_id)
