"""Compressors of this package for GRACE, and GRACE's for this package."""

from lbgm_compress.adapters.grace.compressor import FromGrace, GraceCompressor

__all__ = ["FromGrace", "GraceCompressor"]
