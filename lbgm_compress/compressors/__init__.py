"""The compressors, one algorithm a file, and the parser of their expressions."""

from lbgm_compress.compressors.atomo import Atomo
from lbgm_compress.compressors.error_feedback import ErrorFeedback
from lbgm_compress.compressors.identity import Identity
from lbgm_compress.compressors.lbgm import LBGM
from lbgm_compress.compressors.look_back_subspace import LookBackSubspace
from lbgm_compress.compressors.norm_budget import NormBudget
from lbgm_compress.compressors.signsgd import SignSGD
from lbgm_compress.compressors.topk import TopK

# What expressions may name (`lbgm_compress.compressors.parse`): compressors and their arguments.
__all__ = [
    "Atomo",
    "ErrorFeedback",
    "Identity",
    "LBGM",
    "LookBackSubspace",
    "NormBudget",
    "SignSGD",
    "TopK",
]
