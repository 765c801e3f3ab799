"""Averages over ranks, for engines of any kind: transports, averaging, a background thread."""

from lbgm_compress.collective.average import Average, RanksDiffer
from lbgm_compress.collective.averager import Averager
from lbgm_compress.collective.background import BackgroundAverager
from lbgm_compress.collective.transport import (
    BodyLength,
    Pending,
    ProcessGroupTransport,
    Transport,
)

__all__ = [
    "Average",
    "Averager",
    "BackgroundAverager",
    "BodyLength",
    "Pending",
    "ProcessGroupTransport",
    "RanksDiffer",
    "Transport",
]
