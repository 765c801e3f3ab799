"""The one list of compressors and compositions that tests run over.

A new compressor adds a line here, and is then checked against every law, against damaged messages
and, if its receiver has state, against lost and repeated ones. `REDUCIBLES` is the same list of
algorithms whose contributions add up.
"""

from __future__ import annotations

from lbgm_compress import (
    LBGM,
    Atomo,
    Compressor,
    ErrorFeedback,
    Identity,
    LookBackSubspace,
    NormBudget,
    PowerSGD,
    SharedLBGM,
    SharedSubspace,
    SignSGD,
    TopK,
)
from lbgm_compress.algorithm import Algorithm
from lbgm_compress.wire.values import PRECISIONS

__all__ = ["COMPRESSORS", "REDUCIBLES", "WITH_RECEIVER_STATE"]

COMPRESSORS: list[Compressor] = [
    Identity(),
    TopK(0.01),
    TopK(1.0),
    *(TopK(0.2, values) for values in PRECISIONS),
    SignSGD(),
    SignSGD(scaled=True),
    SignSGD(vote=True),
    Atomo(2),
    Atomo(2, unbiased=True),
    LBGM(),
    LBGM(TopK(0.01)),
    LBGM(TopK(0.1, "int8"), delta=0.9),
    LBGM(SignSGD()),
    LBGM(SignSGD(scaled=True), delta=0.6),
    LBGM(Atomo(rank=2)),
    LBGM(Atomo(rank=2, unbiased=True), delta=1.0),
    LBGM(delta=NormBudget(0.5)),
    LBGM(SignSGD(scaled=True), NormBudget(0.1, local_steps=4)),
    LBGM(TopK(0.1), compare="raw"),
    LBGM(SignSGD(), delta=0.8, compare="raw"),
    LBGM(Atomo(rank=2, unbiased=True), delta=0.5, compare="raw"),
    ErrorFeedback(LBGM(TopK(0.01), NormBudget(0.5), compare="raw")),
    LBGM(delta=0),
    LBGM(delta=1.0),
    ErrorFeedback(Identity()),
    ErrorFeedback(TopK(0.01)),
    ErrorFeedback(SignSGD(scaled=True)),
    LBGM(ErrorFeedback(TopK(0.01))),
    LBGM(ErrorFeedback(Identity())),
    ErrorFeedback(LBGM(TopK(0.01))),
    ErrorFeedback(LBGM(Atomo(rank=2), delta=0.5)),
    ErrorFeedback(LBGM(SignSGD(), delta=0.8)),
    ErrorFeedback(LBGM(Atomo(rank=2, unbiased=True))),
    LBGM(TopK(0.4, "float16")),
    TopK(0.1, chunk=64),
    TopK(0.3, "int2", chunk=7),
    TopK(0.3, "sign"),
    LBGM(TopK(0.1, chunk=100), delta=0.5),
    ErrorFeedback(TopK(0.1, chunk=64), decay=0.95),
    ErrorFeedback(TopK(1 / 64, "int2", chunk=4096), decay=0.95),
    LBGM(ErrorFeedback(TopK(0.1), decay=0.5), delta=0.5),
    ErrorFeedback(LBGM(TopK(0.2, "int8", chunk=32)), decay=0.9),
    LookBackSubspace(),
    LookBackSubspace(2, 0.3, values="float32"),
    LookBackSubspace(3, 0.5, refresh=2, values="float16"),
    LookBackSubspace(2, 0.0, values="bfloat16"),
    LookBackSubspace(1, 0.9, values="float64"),
    LookBackSubspace(1, 0.2, view="flat", values="float32"),
    LookBackSubspace(2, 0.3, view="flat", values="float16"),
    LookBackSubspace(4, 0.5, view="flat", refresh=2),
    ErrorFeedback(LookBackSubspace(2, 0.95, values="int2")),
    ErrorFeedback(LookBackSubspace(4, 0.9, values="int4", directions="int2")),
    ErrorFeedback(LookBackSubspace(3, 0.8, view="flat", values="int4")),
]
WITH_RECEIVER_STATE = [c for c in COMPRESSORS if c.receiver_has_state]

REDUCIBLES: list[Algorithm] = [
    SharedSubspace(),
    SharedSubspace(2),
    SharedSubspace(3, refresh_every=1),
    SharedSubspace(2, values="float32"),
    ErrorFeedback(SharedSubspace(2, refresh_every=2)),
    ErrorFeedback(SharedSubspace(2, refresh_every=1, values="float32")),
    ErrorFeedback(SharedSubspace(4), decay=0.95),
    SharedLBGM(),
    SharedLBGM(0),
    SharedLBGM(0.5, "float32"),
    SharedLBGM(1),
    ErrorFeedback(SharedLBGM(0.5)),
    ErrorFeedback(SharedSubspace(2, 2, "int8")),
    ErrorFeedback(SharedSubspace(2, 2, warm_up=3)),
    ErrorFeedback(PowerSGD(2, "int8")),
    ErrorFeedback(SharedLBGM(0.5, "int8")),
    ErrorFeedback(SharedLBGM(0.9, "float32")),
    PowerSGD(1),
    PowerSGD(4),
    PowerSGD(2, "float32"),
    ErrorFeedback(PowerSGD(2)),
    ErrorFeedback(PowerSGD(1, "float32")),
]
