"""Partitions of a data set: the images of each worker."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

__all__ = ["check_scheme", "partition", "subsets"]


def check_scheme(scheme: str, classes: int) -> tuple[str, float]:
    """Return the name and the number of ``iid``, ``classes:N`` or ``dirichlet:ALPHA``.

    Raises
    ------
    ValueError
        If `scheme` is none of them, or the number does not fit `classes`.
    """
    name, _, argument = scheme.partition(":")
    try:
        if name == "iid" and not argument:
            return name, 0.0
        if name == "classes":
            number = int(argument)
            if not 1 <= number <= classes:
                raise ValueError(
                    f"{scheme} asks for {number} classes a worker, the data have 1 to {classes}"
                )
            return name, number
        if name == "dirichlet":
            alpha = float(argument)
            if not 0 < alpha < math.inf:
                raise ValueError(f"{scheme}: alpha must be above 0 and finite")
            return name, alpha
    except ValueError as error:
        if "invalid literal" not in str(error) and "could not convert" not in str(error):
            raise
    raise ValueError(f"{scheme!r} is none of iid, classes:N (such as classes:3), dirichlet:ALPHA")


def partition(labels: Tensor, workers: int, scheme: str, seed: int) -> list[Tensor]:
    """Return the indices (int64, ascending) of each worker's images.

    ``iid`` deals images at random, in parts as equal as possible. ``classes:N`` gives every worker
    images of exactly N classes, and deals each class evenly among its workers (after McMahan et
    al., arXiv 1602.05629, whose shards may mix classes). ``dirichlet:ALPHA`` deals each class in
    shares drawn from a symmetric Dirichlet distribution (arXiv 1909.06335): the smaller ALPHA, the
    more uneven. Every worker has at least one image.

    Parameters
    ----------
    labels
        The labels of all images (N; int64).
    workers
        The number of workers.
    scheme
        One of the three.
    seed
        The seed of all draws.

    Raises
    ------
    ValueError
        If the scheme is unknown or impossible for so many workers.
    """
    classes = int(labels.max()) + 1
    name, argument = check_scheme(scheme, classes)
    if workers > len(labels):
        raise ValueError(f"{workers} workers are more than there are images, {len(labels)}")
    rng = np.random.default_rng(seed)
    values = labels.numpy()
    if name == "iid":
        parts = np.array_split(rng.permutation(len(values)), workers)
    elif name == "classes":
        parts = _by_classes(values, workers, int(argument), classes, rng)
    else:
        parts = _by_dirichlet(values, workers, argument, classes, rng)
    return [torch.from_numpy(np.sort(part).astype(np.int64)) for part in parts]


def subsets(parts: list[Tensor], most: int, seed: int) -> list[Tensor]:
    """Return a random subset of at most `most` images of each part, ascending."""
    generator = torch.Generator().manual_seed(seed)
    return [part[torch.randperm(len(part), generator=generator)[:most]].sort()[0] for part in parts]


def _by_classes(
    labels: np.ndarray, workers: int, per_worker: int, classes: int, rng: np.random.Generator
) -> list[np.ndarray]:
    # Workers take turns through shuffled decks, so that classes are chosen about equally often.
    decks: list[int] = []
    wanted: list[list[int]] = []
    for _ in range(workers):
        chosen: list[int] = []
        while len(chosen) < per_worker:
            if not decks:
                decks = rng.permutation(classes).tolist()
            position = next((i for i, c in enumerate(decks) if c not in chosen), None)
            if position is None:
                decks += rng.permutation(classes).tolist()
                continue
            chosen.append(decks.pop(position))
        wanted.append(chosen)
    shares: list[list[np.ndarray]] = [[] for _ in range(workers)]
    for label in range(classes):
        takers = [worker for worker in range(workers) if label in wanted[worker]]
        images = rng.permutation(np.flatnonzero(labels == label))
        if len(images) < len(takers):
            raise ValueError(
                f"classes:{per_worker}: {len(takers)} of {workers} workers need images of class "
                f"{label}, which has {len(images)}: use fewer workers or classes a worker"
            )
        if takers:
            for worker, part in zip(takers, np.array_split(images, len(takers)), strict=True):
                shares[worker].append(part)
    return [np.concatenate(share) for share in shares]


def _by_dirichlet(
    labels: np.ndarray, workers: int, alpha: float, classes: int, rng: np.random.Generator
) -> list[np.ndarray]:
    shares: list[list[np.ndarray]] = [[] for _ in range(workers)]
    for label in range(classes):
        images = rng.permutation(np.flatnonzero(labels == label))
        cuts = np.cumsum(rng.dirichlet(np.full(workers, alpha)))[:-1]
        for worker, part in enumerate(np.split(images, (cuts * len(images)).astype(int))):
            shares[worker].append(part)
    parts = [np.concatenate(share) for share in shares]
    for worker, part in enumerate(parts):
        if len(part) == 0:
            richest = max(range(workers), key=lambda w: len(parts[w]))
            parts[worker], parts[richest] = parts[richest][:1], parts[richest][1:]
    return parts
