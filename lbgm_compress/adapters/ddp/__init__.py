"""A communication hook for `torch.nn.parallel.DistributedDataParallel`.

>>> from lbgm_compress import LBGM, TopK
>>> from lbgm_compress.adapters.ddp import compress
>>> def compress_gradients(model):  # a model wrapped in DistributedDataParallel
...     return compress(model, LBGM(TopK(0.01)))

`compress` makes a `CompressionState` and registers `compression_hook` with it. Both can be used by
themselves where a framework registers hooks.

Each rank encodes its gradients, all ranks gather the messages, and each adds up the same decoded
tensors in rank order. So the averages have the same bits on all ranks, and replicas do not drift
apart.

Memory of a rank beyond what `DistributedDataParallel` takes, for K ranks, a model of M bytes and
compressed look-back gradients of C bytes (C = M for ``LBGM()``, about ratio * M and the indices for
``LBGM(TopK(ratio))``):

- between steps, M + (K - 1) C for LBGM, nothing for compressors without a state, and M for each
  `ErrorFeedback`;
- from the backward pass to ``optimizer.step()``, M more for each `ErrorFeedback`, and the look-back
  gradients that the step replaced, so that the step can be undone;
- in a step, for one bucket of B bytes at a time, B for the average, and at most K B for the
  messages of all ranks.
"""

from lbgm_compress.adapters.ddp.hook import compress, compression_hook
from lbgm_compress.adapters.ddp.state import CompressionState

__all__ = ["CompressionState", "compress", "compression_hook"]
