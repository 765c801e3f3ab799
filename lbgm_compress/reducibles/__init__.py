"""The algorithms whose contributions add up over ranks, one a file."""

from lbgm_compress.reducibles.power_sgd import PowerSGD
from lbgm_compress.reducibles.shared_lbgm import SharedLBGM
from lbgm_compress.reducibles.shared_subspace import SharedSubspace

__all__ = ["PowerSGD", "SharedLBGM", "SharedSubspace"]
