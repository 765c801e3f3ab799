"""An optimizer for Horovod that averages compressed gradients.

>>> from lbgm_compress import LBGM, TopK
>>> def wrap(optimizer, model):  # in the place of horovod.torch.DistributedOptimizer
...     from lbgm_compress.adapters.horovod import DistributedOptimizer
...     return DistributedOptimizer(optimizer, LBGM(TopK(0.01)), model.named_parameters())

Gradients are grouped into buckets as they become ready in the backward pass. A thread encodes each
bucket and hands its message to Horovod, which gathers the messages of all ranks in one collective.
Each rank adds up the same decoded tensors in rank order, so that replicas stay bit-identical.

Messages pass through the CPU's memory, so that a Horovod built with gloo alone serves GPUs too.

The memory of a rank is as in `lbgm_compress.adapters.ddp`; an elastic job holds a second copy of
it from each commit to the next.
"""

from lbgm_compress.adapters.horovod.compression import Compression
from lbgm_compress.adapters.horovod.optimizer import DistributedOptimizer
from lbgm_compress.adapters.horovod.transport import HorovodTransport

__all__ = ["Compression", "DistributedOptimizer", "HorovodTransport"]
