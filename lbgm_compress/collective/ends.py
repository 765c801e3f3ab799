"""What a rank keeps from step to step, and how it exchanges gradients."""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lbgm_compress.collective.average import Average
from lbgm_compress.collective.traffic import Traffic
from lbgm_compress.collective.transport import Transport

__all__ = ["Ends"]


class Ends(abc.ABC):
    """The ends of one rank.

    Parameters
    ----------
    transport
        Connects the ranks.
    device
        The device of the gradients.
    traffic
        Counts what is sent.
    """

    nodes: Sequence[Sequence[int]] = ()
    """The ranks of each node, where only the first of each exchanges compressed gradients."""
    witness: int = 1
    """A rank that holds what others hold of rank 0."""

    def __init__(self, transport: Transport, device: torch.device, traffic: Traffic) -> None:
        self.transport = transport
        self.device = device
        self.traffic = traffic

    @abc.abstractmethod
    def begin(
        self,
        grads: Mapping[str, Tensor],
        shares: Sequence[float],
        loss_scale: float,
        differs: bool,
        fail: Callable[[BaseException], None],
        spoil: Callable[[], None],
    ) -> Average:
        """Encode gradients and begin to exchange them.

        Parameters
        ----------
        grads
            This rank's gradients by name.
        shares
            The share of each rank in the average.
        loss_scale
            The factor by which the loss was multiplied.
        differs
            If True, nothing is encoded, and all ranks are told to compare states.
        fail, spoil
            Called by the average with an error, and if it has inf or nan.
        """

    @abc.abstractmethod
    def announce_failure(self, grads: Mapping[str, Tensor]) -> None:
        """Have the other ranks raise an error, in the place of `begin` for these gradients."""

    @abc.abstractmethod
    def begin_step(self) -> None:
        """Begin a step, to which `undo` returns."""

    @abc.abstractmethod
    def undo(self) -> None:
        """Return to the state before the step."""

    @abc.abstractmethod
    def commit(self) -> None:
        """Free what `undo` needs."""

    @abc.abstractmethod
    def reset(self) -> None:
        """Forget what is looked back at; residuals stay."""

    @abc.abstractmethod
    def drop_unshared(self) -> str:
        """Drop, on all ranks alike, what not all of them hold; return what, or nothing.

        All ranks call it together.
        """

    @abc.abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Return the entries "sender" and "receiver" of this rank's state."""

    @abc.abstractmethod
    def held_of(self, rank: int) -> Mapping[Any, Any]:
        """Return the state of what this rank holds of another."""

    @abc.abstractmethod
    def part(self, sender: Any, held: Mapping[Any, Any], rank: int) -> dict[str, Any]:
        """Return what `state_dict` returns for a rank, from its sender and all that is held."""

    @abc.abstractmethod
    def of_another(self, sender: Mapping[str, Any]) -> dict[str, Any]:
        """Return what this rank can use of the saved sender of another rank."""

    @abc.abstractmethod
    def check_sender(self, state: Mapping[str, Any]) -> None:
        """Raise `ValueError` unless it is the state of a sender of this algorithm."""

    @abc.abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace the state, or raise `ValueError` and leave it as it was."""
