"""A character transformer and the plays that it is trained on."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.common.data import load_plays
from benchmarks.common.models import Linear16, Transformer

__all__ = ["PARTITIONS", "Text", "initial_model", "loss_of", "read_text"]

LENGTH = 64
PARTITIONS = ("iid", "plays")
PLAYS = 36
TEST_SEQUENCES = 480


class Text(NamedTuple):
    """Sequences of characters (N, 65; int64): each worker's, and those of the test."""

    parts: list[Tensor]
    test: Tensor
    characters: int
    """Number of different characters."""


def read_text(folder: str, workers: int, partition: str, seed: int) -> Text:
    """Return the plays, dealt to the workers.

    "iid" deals sequences at random, "plays" whole plays. The last tenth of each play is for
    testing.

    Raises
    ------
    benchmarks.common.data.DatasetMissing
        If the folder has fewer plays.
    """
    dataset, plays = load_plays(folder, PLAYS, LENGTH)
    sequences = torch.cat([dataset.train_images, dataset.train_labels[:, -1:]], 1)
    test = torch.cat([dataset.test_images, dataset.test_labels[:, -1:]], 1)
    if partition == "plays":
        parts = [torch.cat(plays[worker::workers]) for worker in range(workers)]
    else:
        order = torch.randperm(len(sequences), generator=torch.Generator().manual_seed(seed))
        parts = list(order.tensor_split(workers))
    test = test[:: len(test) // TEST_SEQUENCES][:TEST_SEQUENCES]
    return Text([sequences[part] for part in parts], test, dataset.classes)


def initial_model(text: Text, width: int, blocks: int, seed: int) -> nn.Module:
    """Return the model that all workers start from."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Transformer(LENGTH, text.characters, width, blocks=blocks, linear=Linear16)


def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
    """Return the mean cross-entropy of the characters that follow, in nats."""
    logits = model(batch[:, :-1])
    return nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
