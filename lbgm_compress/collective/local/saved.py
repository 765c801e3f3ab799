"""Saved states of local training."""

from __future__ import annotations

import abc
import contextlib
import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lbgm_compress.collective.local.common_model import CommonAverager, CommonModel, digest_of
from lbgm_compress.collective.local.node import FORMAT
from lbgm_compress.collective.local.pending import Exchanged, Pending, check_state
from lbgm_compress.collective.local.rounds import Rounds
from lbgm_compress.collective.local.warned import warn

__all__ = ["SavedRounds"]


class SavedRounds(Rounds):
    """Rounds of a rank that exchanges, with `state_dict` and `load_state_dict`.

    `LocalTraining` sets the attributes.
    """

    residual: str
    _parameters: Mapping[str, Tensor]
    _common: CommonModel
    _averager: CommonAverager
    _device: torch.device
    _pending: Pending | None
    # What loaded states have added to the counters.
    _loaded_steps: int
    _loaded_exchanges: int

    @abc.abstractmethod
    def _check_own(self) -> None:
        """Raise `RuntimeError` if the model shows the common parameters."""

    @abc.abstractmethod
    def _wait(self) -> Exchanged | None:
        """Wait for the exchange under way, and return its result."""

    @abc.abstractmethod
    def _telling(self) -> contextlib.AbstractContextManager[None]:
        """Tell the node of the counters and changes that are made within a ``with`` block."""

    def state_dict(self) -> dict[str, Any]:
        """Return this rank's state as a nested dict of tensors and numbers.

        It has the common model and the outer optimizer's state, and goes beside the worker's own
        model and inner optimizer, which differ from rank to rank: each rank saves its own. An
        exchange under way is waited for, and is applied when it is due.
        """
        self._check_own()
        pending = None
        if self._pending is not None and self._due is not None:
            pending = self._pending.state_dict(self._due)
        return {
            "format": FORMAT,
            "residual": self.residual,
            "averager": self._averager.state_dict(),
            "common": {name: tensor.clone() for name, tensor in self._common.tensors.items()},
            "outer": self._common.optimizer.state_dict(),
            "own": digest_of(self._parameters.values()).hex(),
            "local_step": self.local_step,
            "exchanges": self.exchanges,
            "clock": self._clock,
            "pending": pending,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was called; the model and the inner optimizer are loaded apart.

        The next exchange compares the ranks first. If their common models differ, as those of
        different steps do, all go on from that of the rank with the most exchanges. With the state
        of another rank the worker goes on from the common model, with a warning. An exchange under
        way is waited for, and is not applied.

        Raises
        ------
        ValueError
            If it is the state of another compressor or model, or no such state. Nothing is changed.
        """
        with self._telling():
            self._load(state)

    @torch.no_grad()
    def _load(self, state: Mapping[str, Any]) -> None:
        self._check_own()
        check_state(state, self._common.tensors, self.residual)
        with contextlib.suppress(Exception):
            # What it raises was raised before, or is of no importance any more.
            self._wait()
        outer = self._common.optimizer
        before = outer.state_dict()
        # A copy, since optimizers go on in the tensors that they are given.
        outer.load_state_dict(copy.deepcopy(state["outer"]))
        try:
            foreign = self._averager.load(state["averager"])
        except BaseException:
            outer.load_state_dict(before)
            raise
        for name, tensor in state["common"].items():
            self._common.tensors[name].copy_(tensor)
        self._common.forget_fetched()
        if not foreign and state["own"] != digest_of(self._parameters.values()).hex():
            warn(
                "the model's parameters are not those beside which this state was saved: build "
                "DiLoCo first, then load the model, the inner optimizer and this state"
            )
        self._loaded_steps += state["local_step"] - self.local_step
        self._loaded_exchanges += state["exchanges"] - self.exchanges
        self.local_step, self.exchanges = state["local_step"], state["exchanges"]
        self._clock = state["clock"]
        self._averager.position = self.exchanges
        self._pending, self._due, self._starts_over = None, None, foreign
        saved = state["pending"]
        if saved is not None:
            self._pending = Pending.loaded(saved, self._device, own=not foreign)
            self._due = saved["due"]
