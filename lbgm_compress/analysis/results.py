"""The part of `GradientSpace` that tables and plots read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from lbgm_compress.analysis.gram import Matrix

__all__ = ["Results", "check_one_per_epoch"]


class Results(Protocol):
    """Results of the analysis of one gradient an epoch.

    Methods take the name of a layer, or None for the whole gradient.
    """

    @property
    def per_layer(self) -> bool:
        """True if layers are analysed as well as the whole gradient."""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the tensors by name."""

    @property
    def layers(self) -> tuple[str, ...]:
        """The names of the layers; empty without `per_layer`."""

    def __len__(self) -> int:
        """Return the number of epochs."""

    def history(self, share: float = ..., layer: str | None = ...) -> list[int]:
        """Return the number of principal components after each epoch."""

    def cosines(self, layer: str | None = ...) -> Matrix:
        """Return the cosines between gradients (T, T)."""

    def principal_cosines(self, share: float = ..., *, layer: str | None = ...) -> Matrix:
        """Return the cosines between gradients and leading principal components (T, N)."""


def check_one_per_epoch(results: Results, numbers: Mapping[str, Sequence[float]]) -> None:
    """Raise `ValueError` unless each sequence has a number for each epoch."""
    for name, sequence in numbers.items():
        if len(sequence) != len(results):
            raise ValueError(
                f"{name} has {len(sequence)} numbers, expected {len(results)}, one for each epoch"
            )
