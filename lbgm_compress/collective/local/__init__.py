"""Local training: many steps of each worker between two exchanges (DiLoCo)."""

from lbgm_compress.collective.local.training import LocalTraining

__all__ = ["LocalTraining"]
