"""Elastic jobs: what ``horovod.torch.elastic.TorchState`` does with a distributed optimizer."""

from __future__ import annotations

import copy
import functools
from typing import Any

__all__ = ["Distributed", "register_elastic"]


class Distributed:
    """Base class of all distributed optimizers, by which TorchState knows them."""


class ElasticState:
    """Keeps a copy of an optimizer's state and of its compression's, from commit to commit."""

    def __init__(self, hvd: Any, value: Any) -> None:
        self.hvd = hvd
        self.set_value(value)

    def set_value(self, value: Any) -> None:
        self.value = value
        self.save()

    def save(self) -> None:
        states = self.value.state_dict(), self.value.compression.state_dict()
        self._saved = copy.deepcopy(states)

    def restore(self) -> None:
        optimizer, compression = copy.deepcopy(self._saved)
        self.value.load_state_dict(optimizer)
        self.value.compression.restore(compression)
        # Ranks may hold commits of different steps.
        self.value.compression.rejoin()

    def sync(self) -> None:
        self.hvd.broadcast_optimizer_state(self.value, root_rank=0)
        self.value.compression.rejoin()
        self.save()


def register_elastic(hvd: Any) -> None:
    """Register `ElasticState` with TorchState, before the entry for plain optimizers."""
    state = hvd.elastic.state
    registry = state.get_handler_registry()
    if all(kind is not Distributed for kind, _ in registry):
        entry = (Distributed, functools.partial(ElasticState, hvd))
        state.set_handler_registry([entry, *registry])
