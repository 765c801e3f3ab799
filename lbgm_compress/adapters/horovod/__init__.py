"""An optimizer for Horovod that averages compressed gradients."""

from lbgm_compress.adapters.horovod.optimizer import (
    Compression,
    DistributedOptimizer,
    HorovodTransport,
)

__all__ = ["Compression", "DistributedOptimizer", "HorovodTransport"]
