"""Compressors of this package for GRACE, and GRACE's for this package.

GRACE (sands-lab/grace, packages ``grace_dl.torch`` for Horovod and ``grace_dl.dist`` for
torch.distributed) is on no package index; its users have a checkout. Nothing of it is imported
here: both directions keep to its protocol.

- `GraceCompressor` makes a compressor of this package one of GRACE's, for its Allgather.
- `FromGrace` makes a compressor of GRACE's one of this package, so that LBGM can stand over it.
"""

from lbgm_compress.adapters.grace.compressor import GraceCompressor
from lbgm_compress.adapters.grace.from_grace import FromGrace

__all__ = ["FromGrace", "GraceCompressor"]
