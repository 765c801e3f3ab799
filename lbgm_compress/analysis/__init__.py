"""The space that the gradients of a training span (arXiv 2202.00280, section 2)."""

from lbgm_compress.analysis.gradient_space import GradientSpace

__all__ = ["GradientSpace"]
