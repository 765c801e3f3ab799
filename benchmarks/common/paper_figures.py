"""The settings and methods of the figures of `benchmarks/paper.py`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from lbgm_compress import (
    LBGM,
    Atomo,
    Compressor,
    ErrorFeedback,
    Identity,
    LookBackSubspace,
    NormBudget,
    SignSGD,
    TopK,
)

__all__ = ["FIGURES", "Column", "Setting"]

DENSE, LOOK_BACK = Identity(), LBGM()
TOP, ATOMO, SIGNS = TopK(0.1), Atomo(2), SignSGD(scaled=True)
SUBSPACE = ErrorFeedback(LookBackSubspace(values="int4"))
DELTAS = (0.01, 0.05, 0.1, 0.2, 0.5, 0.9)


@dataclass(frozen=True)
class Setting:
    """The training that all methods of a column have in common, as arguments of compare.py."""

    dataset: str
    model: str
    partition: str = "iid"
    lr: float = 0.01
    rounds: int = 200
    workers: int = 100
    participation: float = 1.0
    engine: str = "process"
    images: int | None = None
    """Training images of each worker; None for all, or for as many as the CPU has time for."""

    @property
    def name(self) -> str:
        """The name of its folder."""
        parts = [self.dataset, self.model, self.partition.replace(":", "-"), f"lr-{self.lr:g}"]
        if self.participation < 1:
            parts.append(f"sampled-{self.participation:g}")
        if self.engine != "process":
            parts.append(f"{self.engine}-{self.workers}")
        if self.images:
            parts.append(f"images-{self.images}")
        return "-".join(parts)

    @property
    def title(self) -> str:
        """The heading of its column, without the images that `heading` adds."""
        split = {"iid": "iid", "classes:3": "3 classes a worker"}[self.partition]
        sampled = f", {self.participation:.0%} a round" if self.participation < 1 else ""
        rate = "" if self.model == "linear" and self.engine == "process" else f", lr {self.lr:g}"
        return f"{self.dataset}, {self.model}{rate}\n{self.workers} workers, {split}{sampled}"

    def arguments(self, device: str, quick: bool) -> list[str]:
        """Return the command line of compare.py, without methods and folder.

        On the CPU the cnn has fewer images: a full round of it takes ten seconds on two cores.
        """
        if self.engine != "process":
            device = "cpu"
        values: dict[str, Any] = {
            "dataset": self.dataset,
            "model": self.model,
            "partition": self.partition,
            "workers": self.workers,
            "rounds": self.rounds,
            "lr": self.lr,
        }
        if self.participation < 1:
            values["participation"] = self.participation
        if self.engine != "process":
            values["engine"] = self.engine
        if device != "cpu":
            values["device"] = device
        if self.images:
            values["images"] = self.images
            values["evaluate-every"] = 10
        elif self.model != "linear" and device == "cpu":
            values["images"] = 2000 // self.workers
            values["test-images"] = 2000
            values["evaluate-every"] = 4
        elif self.model != "linear":
            values["rounds"] = 5 * self.rounds
            values["evaluate-every"] = 4
        if quick:
            values.update({"dataset": "digits", "rounds": 4, "images": 30, "test-images": 100})
            values["workers"] = 2 if self.engine != "process" else 6
            values["model"] = "linear" if self.model == "linear" else "small-cnn"
        return [part for name, value in values.items() for part in (f"--{name}", str(value))]


Column = tuple[Setting, Sequence[Compressor]]


def _settings(dataset: str, model: str, **changes: Any) -> tuple[Setting, Setting]:
    """Return a setting with iid workers, and one with three classes a worker."""
    if model == "cnn":
        changes = {"lr": 0.03, "rounds": 60, **changes}
    iid = Setting(dataset, model, **changes)
    return iid, dataclasses.replace(iid, partition="classes:3")


FASHION, FASHION_CNN = _settings("fashion-mnist", "linear"), _settings("fashion-mnist", "cnn")
MNIST, MNIST_CNN = _settings("mnist", "linear"), _settings("mnist", "cnn")


def _columns(settings: Iterable[Setting], methods: Iterable[Compressor]) -> list[Column]:
    return [(setting, tuple(methods)) for setting in settings]


# The pages of each figure.
FIGURES: dict[str, dict[str, list[Column]]] = {
    "standalone": {
        "linear": _columns((*MNIST, *FASHION), (DENSE, LOOK_BACK)),
        "cnn": _columns((*MNIST_CNN, *FASHION_CNN), (DENSE, LOOK_BACK)),
        "cnn-slow": _columns(
            _settings("fashion-mnist", "cnn", lr=0.01, rounds=100), (DENSE, LOOK_BACK)
        ),
        "cnn-long": _columns(
            _settings("fashion-mnist", "cnn", images=100, rounds=200)[:1],
            (DENSE, LOOK_BACK),
        ),
    },
    "threshold": {
        "linear": _columns(FASHION, (DENSE, *(LBGM(delta=delta) for delta in DELTAS))),
        "cnn": _columns(FASHION_CNN[:1], (DENSE, *(LBGM(delta=delta) for delta in DELTAS))),
    },
    "stacked": {
        "mnist": _columns(MNIST, (DENSE, TOP, LBGM(TOP), ATOMO, LBGM(ATOMO))),
        "fashion-mnist": _columns(
            (*FASHION, *FASHION_CNN), (DENSE, TOP, LBGM(TOP), ATOMO, LBGM(ATOMO))
        ),
    },
    "sampled": {
        model: _columns(
            [
                dataclasses.replace(setting, participation=share)
                for setting in settings
                for share in (0.5, 0.1)
            ],
            (DENSE, LOOK_BACK, LBGM(TOP)),
        )
        for model, settings in (("linear", FASHION), ("cnn", FASHION_CNN))
    },
    "distributed": {
        "ddp": [
            (dataclasses.replace(setting, workers=8, engine="ddp"), (DENSE, SIGNS, LBGM(SIGNS)))
            for setting in (*FASHION, *FASHION_CNN[:1])
        ]
    },
    "options": {
        "compare": [
            *_columns(
                FASHION[:1],
                (
                    *(TOP, LBGM(TOP), LBGM(TOP, compare="raw")),
                    *(TopK(0.01), LBGM(TopK(0.01)), LBGM(TopK(0.01), compare="raw")),
                    *(ATOMO, LBGM(ATOMO), LBGM(ATOMO, compare="raw")),
                    *(SIGNS, LBGM(SIGNS), LBGM(SIGNS, compare="raw")),
                ),
            ),
            *_columns(
                FASHION_CNN[:1],
                (
                    *(TOP, LBGM(TOP), LBGM(TOP, compare="raw")),
                    *(ATOMO, LBGM(ATOMO), LBGM(ATOMO, compare="raw")),
                ),
            ),
        ],
        "budget": [
            *_columns(
                FASHION[:1],
                (
                    DENSE,
                    *(LBGM(delta=delta) for delta in (0.05, 0.2, 0.5)),
                    *(LBGM(delta=NormBudget(budget)) for budget in (0.1, 0.3, 1.0)),
                ),
            ),
            *_columns(
                FASHION_CNN[:1],
                (
                    DENSE,
                    *(LBGM(delta=delta) for delta in (0.05, 0.2, 0.5)),
                    *(LBGM(delta=NormBudget(budget)) for budget in (0.1, 0.3, 1.0)),
                ),
            ),
        ],
    },
    "rivals": {
        "all": _columns(
            (*FASHION, *FASHION_CNN),
            (
                *(DENSE, LOOK_BACK, LBGM(TOP), LBGM(ATOMO), LBGM(SIGNS)),
                *(ErrorFeedback(TopK(0.01)), ErrorFeedback(ATOMO), SUBSPACE),
            ),
        )
    },
}
