"""An exchange that is under way, and saved states of local training."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lbgm_compress.collective.local.node import FORMAT

__all__ = ["Exchanged", "Pending", "check_state"]

STATE_KEYS = frozenset(
    {
        *("format", "averager", "common", "outer", "own"),
        *("local_step", "exchanges", "clock", "pending"),
    }
)
Exchanged = tuple[dict[str, Tensor], dict[str, Tensor]]
"""The averages, and what this rank's message left out."""


@dataclass
class Pending:
    """A fragment's exchange that is under way, or over and not applied yet."""

    base: dict[str, Tensor]
    """What the worker's parameters are compared with when it is applied; empty without delay."""
    result: Future[Exchanged | None]
    """None if nothing was exchanged."""

    def state_dict(self, due: int) -> dict[str, Any]:
        """Wait for the exchange, and return it as a nested dict of tensors and numbers."""
        averages, missing = self.result.result() or ({}, {})
        return {"due": due, "base": dict(self.base), "averages": averages, "missing": missing}

    @classmethod
    def loaded(cls, state: Mapping[str, Any], device: torch.device, own: bool) -> Pending:
        """Return what `state_dict` has saved; unless `own`, without what belongs to a worker."""
        base, averages, missing = (
            {name: of.to(device) for name, of in state[key].items()}
            for key in ("base", "averages", "missing")
        )
        pending = cls(base if own else {}, Future())
        pending.result.set_result((averages, missing if own else {}) if averages else None)
        return pending


def check_state(state: Any, common: Mapping[str, Tensor], residual: str) -> None:
    """Raise `ValueError` unless this is a state of local training with these parameters.

    Earlier states do not name `residual`.
    """
    if isinstance(state, Mapping) and "exchanges" in state and "averager" not in state:
        raise ValueError(
            "this is the state of a rank that does not exchange: load the one that the first rank "
            "of a node has saved"
        )
    if not isinstance(state, Mapping) or not set(state) >= STATE_KEYS:
        raise ValueError("this is not a state of local training, as DiLoCo.state_dict() returns it")
    if state["format"] != FORMAT:
        raise ValueError(f"the state has format {state['format']}, this release reads {FORMAT}")
    found = state.get("residual", residual)
    if found != residual:
        raise ValueError(
            f'the state was saved with residual="{found}", and residual is "{residual}" here: '
            "build DiLoCo with the residual of the state"
        )
    shapes = {name: tuple(tensor.shape) for name, tensor in state["common"].items()}
    expected = {name: tuple(tensor.shape) for name, tensor in common.items()}
    if shapes != expected:
        raise ValueError("the state is that of another model: names or shapes differ")
