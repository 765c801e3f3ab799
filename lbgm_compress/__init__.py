"""LBGM, the Look-Back Gradient Multiplier, as a stackable gradient compressor for PyTorch.

>>> import torch
>>> from lbgm_compress import LBGM, Receiver, Sender, TopK
>>> compressor = LBGM(TopK(0.01), delta=0.2)
>>> sender = Sender(compressor)
>>> grads = {"weight": torch.randn(1000, 100)}
>>> receiver = Receiver(compressor, like=grads)
>>> full = receiver.decompress("worker 0", sender.compress(grads))
>>> sender.compress(grads).numel()
21
"""

from lbgm_compress.compressor import Compressor, OutOfSyncError, PayloadError
from lbgm_compress.compressors import (
    LBGM,
    Atomo,
    ErrorFeedback,
    Identity,
    LookBackSubspace,
    NormBudget,
    SignSGD,
    TopK,
)
from lbgm_compress.compressors.parse import parse_compressor
from lbgm_compress.endpoints import Receiver, Sender
from lbgm_compress.reducibles import PowerSGD, SharedLBGM, SharedSubspace

__all__ = [
    "Atomo",
    "Compressor",
    "ErrorFeedback",
    "Identity",
    "LBGM",
    "LookBackSubspace",
    "NormBudget",
    "OutOfSyncError",
    "PayloadError",
    "PowerSGD",
    "Receiver",
    "Sender",
    "SharedLBGM",
    "SharedSubspace",
    "SignSGD",
    "TopK",
    "parse_compressor",
]

__version__ = "0.1.0"
