"""A process group for torchft whose sums are exchanged compressed.

>>> from lbgm_compress import ErrorFeedback, TopK
>>> def manager_of(model, optimizer, **options):
...     from torchft import Manager
...     from lbgm_compress.adapters.torchft import CompressedProcessGroup
...     group = CompressedProcessGroup(ErrorFeedback(TopK(0.01)))
...     manager = Manager(pg=group, **options)
...     group.attach(manager)
...     return manager

torchft's data parallelism and its `DiLoCo` average by ``manager.allreduce``, which calls the group
for one tensor after the other. The group waits until the first result is needed. It then sends one
message for all tensors of this batch to every other replica, and each replica adds up the same
decoded tensors in the order of replicas: sums have the same bits everywhere.

A batch is known by its shapes and dtypes, by how many batches of the same shapes came before it in
the step, and, for `DiLoCo` with fragments, by the fragment whose turn it is. Replicas compare this
before they send, so that another order gives an error and never a wrong sum.

Fault tolerance is torchft's:

- A new quorum, which follows each failed step and each replica that leaves or joins, makes every
  replica drop its look-back gradients. The next step is sent in full.
- A residual is the replica's own and stays. If a step fails, its content returns to the residual,
  unless another replica committed that step: the replicas ask each other in the first exchange of a
  quorum. A process that starts again begins without a residual.
- A replica that is being healed, or a spare, does not take part in the sum, and sends nothing.

Memory beyond torchft's own is as in `lbgm_compress.adapters.ddp`, but what is needed to take a step
back is kept until the next step, since torchft does not say when a step has been applied.
"""

try:
    from lbgm_compress.adapters.torchft.group import CompressedProcessGroup
except ModuleNotFoundError as error:
    if (error.name or "").split(".")[0] != "torchft":
        raise
    raise ImportError(
        "lbgm_compress.adapters.torchft needs torchft 0.2: pip install 'lbgm_compress[torchft]'"
    ) from error

__all__ = ["CompressedProcessGroup"]
