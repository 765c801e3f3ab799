"""The settings and methods of `benchmarks/frontier.py`."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from benchmarks.common import lora
from benchmarks.common.baselines import TorchPowerSGD
from benchmarks.common.data import Dataset, load, load_plays
from benchmarks.common.partition import partition, subsets
from benchmarks.common.training import Training
from lbgm_compress import (
    LBGM,
    Atomo,
    ErrorFeedback,
    Identity,
    LookBackSubspace,
    PowerSGD,
    SharedLBGM,
    SharedSubspace,
    SignSGD,
    TopK,
)
from lbgm_compress.algorithm import Algorithm

__all__ = ["DENSE", "POWER_SGD", "SETTINGS", "Run", "Setting", "methods_of", "training_of"]

TEST_IMAGES = 4000
EVALUATIONS = 20


def subspace(rank: int, delta: float) -> Algorithm:
    """Return a look-back subspace with error feedback and few bits for each number."""
    inner = LookBackSubspace(rank, delta, values="int4", directions="int2")
    return ErrorFeedback(inner)


SIGN = ErrorFeedback(SignSGD(scaled=True))
DENSE = Identity()
TOPK = tuple(ErrorFeedback(TopK(ratio, "int8")) for ratio in (0.003, 0.01, 0.03, 0.1))
COARSE_TOPK = tuple(ErrorFeedback(TopK(ratio, "int2")) for ratio in (0.01, 0.03, 0.1))
ATOMO = tuple(ErrorFeedback(Atomo(rank)) for rank in (1, 2, 4, 8))
LOOK_BACK = (
    LBGM(delta=0.5),
    LBGM(ErrorFeedback(TopK(0.01, "int8")), delta=0.5),
    LBGM(SIGN, delta=0.5),
    LBGM(ErrorFeedback(Atomo(2)), delta=0.5),
)
SUBSPACES = (
    *(subspace(rank, 0.9) for rank in (1, 2, 4, 8)),
    *(subspace(rank, 0.8) for rank in (4, 8)),
    *(ErrorFeedback(LookBackSubspace(rank, 0.9, values="int4")) for rank in (4, 8)),
    ErrorFeedback(LookBackSubspace(8, 0.7, refresh=2, values="int4")),
    ErrorFeedback(LookBackSubspace(12, 0.7, refresh=2, values="int4")),
    ErrorFeedback(LookBackSubspace(16, 0.5, refresh=4, values="int4")),
    ErrorFeedback(LookBackSubspace(8, 0.5, refresh=8, values="int4")),
    ErrorFeedback(LookBackSubspace(4, 0.9, values="int8")),
    ErrorFeedback(LookBackSubspace(4, 0.9, values="int2")),
    ErrorFeedback(LookBackSubspace(8, 0.1, view="flat", values="int8")),
)
# Contributions add up: for these all workers take part in every round.
SUMS = (
    ErrorFeedback(SharedSubspace(8)),
    ErrorFeedback(SharedSubspace(8, refresh_every=1)),
    ErrorFeedback(SharedSubspace(4)),
    ErrorFeedback(SharedSubspace(16, refresh_every=2)),
    *(ErrorFeedback(PowerSGD(rank)) for rank in (1, 2, 4)),
    SharedLBGM(0.5),
)
POWER_SGD = (TorchPowerSGD(1), TorchPowerSGD(2), TorchPowerSGD(4))
ALL = (DENSE, *TOPK, *COARSE_TOPK, SIGN, *ATOMO, *LOOK_BACK, *SUBSPACES)
ADAPTERS = (
    DENSE,
    LBGM(TopK(0.01)),
    *(ErrorFeedback(TopK(ratio, "int4")) for ratio in (0.01, 0.03)),
    *(ErrorFeedback(LookBackSubspace(8, delta, values="int4")) for delta in (0.9, 0.7)),
    ErrorFeedback(SharedSubspace(8)),
    ErrorFeedback(PowerSGD(1)),
    ErrorFeedback(PowerSGD(4)),
)
# For models that train slowly.
FEW = (DENSE, *TOPK[1:], *COARSE_TOPK, *SUBSPACES[2:4], *SUBSPACES[7:12])


@dataclass(frozen=True)
class Setting:
    """A way to train that all methods of a picture have in common."""

    title: str
    rounds: dict[str, int]
    """Rounds by model."""
    workers: int = 10
    images: dict[str, int] = field(default_factory=lambda: {"fcn": 600, "small-cnn": 400})
    """Training images of a worker, by model."""
    partition: str = "iid"
    local_steps: int = 1
    batch_size: int | None = None
    lr: float = 0.05
    server_momentum: float = 0.0
    adamw_lr: float | None = None
    """Learning rate of AdamW inside, or None for SGD."""
    server_adamw: bool = False
    """If the server steps by AdamW."""
    data_parallel: bool = False
    """If training can run on DDP, and so with its baselines."""


LOCAL = {"local_steps": 10, "batch_size": 20}
PARALLEL = {
    "workers": 4,
    "images": {"fcn": 15_000, "small-cnn": 15_000},
    "lr": 0.02,
    "server_momentum": 0.9,
    "data_parallel": True,
}
SETTINGS = {
    "full-batch": Setting(
        "one full-batch step a round, 3 classes a worker, 10 workers, server momentum 0.9",
        {"fcn": 150, "small-cnn": 100},
        partition="classes:3",
        lr=0.02,
        server_momentum=0.9,
    ),
    "local-iid": Setting(
        "10 local steps of 20 images, iid, 10 workers", {"fcn": 100, "small-cnn": 100}, **LOCAL
    ),
    "local-3-classes": Setting(
        "10 local steps of 20 images, 3 classes a worker, 10 workers",
        {"fcn": 100, "small-cnn": 100},
        partition="classes:3",
        **LOCAL,
    ),
    "large-batch": Setting(
        "data-parallel, 4 workers with batches of 256, momentum 0.9",
        {"fcn": 300, "small-cnn": 100},
        batch_size=256,
        **PARALLEL,
    ),
    "small-batch": Setting(
        "data-parallel, 4 workers with batches of 32, momentum 0.9",
        {"fcn": 600, "small-cnn": 600},
        batch_size=32,
        **PARALLEL,
    ),
    "small-batch-16": Setting(
        "data-parallel, 16 workers with batches of 32, momentum 0.9",
        {"fcn": 300},
        batch_size=32,
        **{**PARALLEL, "workers": 16, "images": {"fcn": 3750}},
    ),
    "text": Setting(
        "a transformer on Shakespeare's plays, one a worker, 10 local steps of AdamW with 10 x 32 "
        "characters, outer Nesterov 0.7 / 0.9",
        {"transformer": 100},
        local_steps=10,
        batch_size=10,
        lr=0.7,
        server_momentum=0.9,
        adamw_lr=2e-3,
    ),
    "lora": Setting(
        "LoRA of a small GPT-2, data-parallel, 2 workers with batches of 8, AdamW",
        dict.fromkeys(lora.MODELS, 300),
        workers=2,
        batch_size=8,
        lr=3e-3,
        server_adamw=True,
    ),
}


class Run(NamedTuple):
    """One run: the unit that is kept, and not done again."""

    setting: str
    model: str
    method: str
    """The expression of the method."""
    seed: int


def methods_of(setting: str, model: str) -> tuple[Algorithm, ...]:
    """Return the default methods."""
    if setting == "lora":
        return ADAPTERS
    methods = ALL if model == "fcn" else FEW
    return (*methods, *SUMS, *POWER_SGD) if SETTINGS[setting].data_parallel else methods


@functools.lru_cache(maxsize=2)
def images(data_dir: str | None, seed: int) -> Dataset:
    """Return Fashion-MNIST with fewer test images."""
    dataset = load("fashion-mnist", data_dir, seed)
    return dataclasses.replace(
        dataset,
        test_images=dataset.test_images[:TEST_IMAGES],
        test_labels=dataset.test_labels[:TEST_IMAGES],
    )


def training_of(what: Run, data_dir: str | None, text_dir: str | None, short: bool) -> Training:
    """Return the training of a run, which is the same for all methods.

    Raises
    ------
    DatasetMissing
        If the data set is not found.
    """
    setting = SETTINGS[what.setting]
    if what.model == "transformer":
        dataset, parts = load_plays(text_dir or "", setting.workers)
        step = len(dataset.test_labels) // 400
        dataset = dataclasses.replace(
            dataset,
            test_images=dataset.test_images[::step],
            test_labels=dataset.test_labels[::step],
        )
    elif what.model in lora.MODELS:
        dataset = lora.language(what.seed)
        parts = list(torch.arange(len(dataset.train_labels)).tensor_split(setting.workers))
    else:
        dataset = images(data_dir, what.seed)
        parts = partition(dataset.train_labels, setting.workers, setting.partition, what.seed)
        parts = subsets(parts, setting.images[what.model], what.seed)
    rounds = 4 if short else setting.rounds[what.model]
    return Training(
        dataset=dataset,
        parts=parts,
        model=what.model,
        rounds=rounds,
        local_steps=setting.local_steps,
        batch_size=setting.batch_size,
        participation=1.0,
        lr=setting.lr,
        server_momentum=setting.server_momentum,
        adamw_lr=setting.adamw_lr,
        server_adamw=setting.server_adamw,
        seed=what.seed,
        device=torch.device("cpu"),
        evaluate_every=max(1, rounds // EVALUATIONS),
    )
