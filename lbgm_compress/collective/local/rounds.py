"""The schedule of local training: the inner steps after which exchanges begin and are applied."""

from __future__ import annotations

import abc

__all__ = ["Rounds"]


class Rounds(abc.ABC):
    """Counts inner steps, and calls the methods below after those at which something is due.

    Parameters
    ----------
    sync_every
        Number of inner steps from one exchange of a fragment to the next.
    fragments
        Number of fragments, which are exchanged one after the other.
    delay
        Number of inner steps from an exchange to its application.

    Attributes
    ----------
    local_step : int
        Number of inner steps so far.
    exchanges : int
        Number of exchanges that have begun.
    """

    def __init__(self, sync_every: int, fragments: int, delay: int) -> None:
        self.sync_every = sync_every
        self.delay = delay
        self.local_step = self.exchanges = 0
        # As `local_step`, but follows the ranks that are further.
        self._clock = 0
        self._fragment_count = fragments
        # The time at which the exchange under way is applied; None if there is none.
        self._due: int | None = None
        # Whether the next step puts the parameters back to the common model.
        self._starts_over = False

    def step(self) -> None:
        """Count an inner step, and begin or apply the exchange that is due.

        Raises
        ------
        RuntimeError
            If another rank failed or cannot be reached.
        """
        self.local_step += 1
        self._clock += 1
        if self._starts_over:
            self._start_over()
        if self._due is not None and self._clock >= self._due:
            self._apply()
        if self._clock >= self._time_of(self.exchanges + 1):
            if self._due is not None:
                self._apply()
            self._begin()
            if not self.delay:
                self._apply()

    def _time_of(self, exchange: int) -> int:
        """Return the time at which an exchange begins, which are counted from 1."""
        rounds, part = divmod(exchange, self._fragment_count)
        return rounds * self.sync_every + part * self.sync_every // self._fragment_count

    def _begin(self) -> None:
        """Begin the next exchange."""
        self.exchanges += 1
        self._due = self._clock + self.delay

    @abc.abstractmethod
    def _apply(self) -> None:
        """Wait for the exchange under way, apply it, and set `_due` to None."""

    @abc.abstractmethod
    def _start_over(self) -> None:
        """Put the parameters back to the common model, and set `_starts_over` to False."""
