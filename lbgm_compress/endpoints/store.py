"""The states of many tensors at one end, and how a step is taken back."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any, Generic, TypeVar

from torch import Tensor

from lbgm_compress._util.checks import check_whole
from lbgm_compress._util.ends import (
    STATE_FORMAT,
    check_entry,
    check_state,
    check_unchanged,
    copied,
    packed_identifiers,
)
from lbgm_compress.algorithm import Algorithm
from lbgm_compress.endpoints.tensors import Sent, TensorReport

__all__ = ["Store"]

A = TypeVar("A", bound=Algorithm)


class Store(Generic[A]):
    """The states of an algorithm for the tensors of one worker.

    Parameters
    ----------
    algorithm
        The algorithm.
    seed
        Seed of its randomness, if it has any.

    Attributes
    ----------
    sent
        Statistics of the last round.
    """

    # The name of the part of an entry that the algorithm's methods take.
    _mine = "state"

    def __init__(self, algorithm: A, seed: int) -> None:
        check_whole("seed", seed, error=TypeError)
        self.compressor = algorithm
        self.seed = seed
        # Entries are replaced and never changed, so that the ones before a step can be kept.
        self._tensors: dict[str, dict[str, Any]] = {}
        self._before: dict[str, dict[str, Any] | None] | None = None
        self.sent = Sent([], [], [], [])

    def report(self) -> dict[str, TensorReport]:
        """Return statistics of each tensor in the last round; empty before the first."""
        return self.sent.report()

    def _known(self, name: str, grad: Tensor) -> dict[str, Any]:
        """Return what is kept of a tensor, or what is kept at the beginning."""
        entry = self._tensors.get(name)
        if entry is not None:
            check_unchanged(name, grad, entry)
            return entry
        state = self.compressor.initial_state(self._seed(name))
        return {
            "id": 0,
            "shape": tuple(grad.shape),
            "dtype": str(grad.dtype),
            "scale": 1.0,
            self._mine: state,
        }

    def _forgotten(self, entry: Mapping[str, Any]) -> dict[str, Any]:
        """Return what is kept of a tensor whose next round is full."""
        return {**entry, "id": 0, self._mine: self.compressor.forget(entry[self._mine])}

    def _seed(self, name: str) -> int:
        # Tensors of one worker must not share their randomness.
        return int.from_bytes(
            hashlib.blake2b(f"{self.seed} {name}".encode(), digest_size=7).digest(), "little"
        )

    # --- steps that are not applied ---------------------------------------------------------------

    def begin_step(self) -> None:
        """Begin a step of one or more rounds, to which `undo` returns.

        The state before the step is kept until `commit` or the next step: of each tensor, the
        residual and a look-back gradient that is replaced.
        """
        self._before = {}

    def undo(self) -> None:
        """Return to the state before the step, bit for bit; do nothing without `begin_step`.

        The other end has to do the same, or to be sent in full (`reset`).
        """
        for name, entry in (self._before or {}).items():
            if entry is None:
                del self._tensors[name]
            else:
                self._tensors[name] = entry
        self._before = None

    def commit(self) -> None:
        """Keep the step: what `undo` needs is freed."""
        self._before = None

    def give_back(self, decoded: Mapping[str, Tensor]) -> None:
        """Add tensors to the residuals: what a round carried that was never applied.

        Do nothing for an algorithm without a residual. An undone step needs no more than `undo`:
        this is for a message of which a worker learns later that it was lost or not used.

        Parameters
        ----------
        decoded
            The decoded tensors of the message by name, all or some, with the shapes and dtypes of
            the gradients.

        Raises
        ------
        ValueError
            If a tensor has another shape or dtype than its gradients. Nothing is changed.
        """
        if not self.compressor.has_residual:
            return
        entries = {}
        for name, tensor in decoded.items():
            entry = self._known(name, tensor)
            given = self.compressor.give_back(entry[self._mine], tensor)
            entries[name] = {**entry, self._mine: given}
        self._replace(entries)

    def _replace(self, entries: Mapping[str, dict[str, Any]]) -> None:
        if self._before is not None:
            for name in entries:
                self._before.setdefault(name, self._tensors.get(name))
        self._tensors.update(entries)

    # --- what others hold, too --------------------------------------------------------------------

    def digest(self, names: Iterable[str] | None = None) -> Tensor:
        """Return the identifiers of the look-back gradients that the next round may use.

        Parameters
        ----------
        names
            Names of tensors; all that are known unless given.

        Returns
        -------
        Tensor
            Flat uint8 on the CPU: eight bytes for each name in sorted order, zeros where there is
            none. It equals the digest of another end that holds the same.
        """
        chosen = sorted(self._tensors if names is None else set(names))
        return packed_identifiers(
            self._identifier(name) if name in self._tensors else 0 for name in chosen
        )

    def _identifier(self, name: str) -> int:
        """Return the identifier of what is held of a tensor that is known, 0 for nothing."""
        identifier: int = self._tensors[name]["id"]
        return identifier

    def reset(self, names: Iterable[str] | None = None) -> None:
        """Drop look-back gradients, so that the next round is full; residuals are kept.

        Parameters
        ----------
        names
            Names of tensors; all of them unless given.
        """
        for name in list(self._tensors) if names is None else set(names) & self._tensors.keys():
            self._tensors[name] = self._forgotten(self._tensors[name])
        self._before = None

    # --- saved states -----------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the state as a nested dict of tensors and numbers, which are not copied.

        It survives `torch.save` and ``torch.load(weights_only=True)``.
        """
        return {
            "format": STATE_FORMAT,
            "compressor": repr(self.compressor),
            "seed": self.seed,
            "tensors": copied(self._tensors),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace the state by one that `state_dict` returned.

        Raises
        ------
        ValueError
            If `state` is that of another compressor, or no such state. The state is then unchanged.
        """
        check_state(state, repr(self.compressor), ("seed", "tensors"))
        self._tensors = self._checked_entries(state["tensors"])
        self.seed = state["seed"]
        self._before = None
        self.sent = Sent([], [], [], [])

    # The names of the entry of a tensor, and whose they are in an error.
    _parts: tuple[str, ...] = ("state",)
    _owner = "this end"

    def _checked_entries(self, saved: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """Return the entries of a saved state, or raise `ValueError`."""
        keys = {"id", "shape", "dtype", "scale", *self._parts}
        tensors = {}
        for name, entry in saved.items():
            # States of releases before loss scales were known have none.
            tensors[name] = {"scale": 1.0, **entry} if isinstance(entry, Mapping) else entry
            check_entry(name, tensors[name], keys, self._owner)
        return tensors
