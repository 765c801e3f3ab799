"""The ranks of a process set of Horovod."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lbgm_compress.collective.transport import BodyLength, Pending, Transport

__all__ = ["HorovodTransport"]


class HorovodTransport(Transport):
    """Moves bytes between the ranks of a process set, through the memory of the CPU.

    Horovod's all-gather takes data of unequal sizes, which the other ranks need not know: messages
    take one collective, which overlaps whatever else a rank does.

    Parameters
    ----------
    hvd
        The module `horovod.torch`.
    process_set
        A ``horovod.torch.ProcessSet`` that has been added.

    Attributes
    ----------
    name : str
        Prefix of the names of its exchanges. Transports that a process uses at one time need
        different names, the same on all ranks.
    """

    def __init__(self, hvd: Any, process_set: Any) -> None:
        self.hvd = hvd
        self.process_set = process_set
        if not isinstance(process_set, hvd.ProcessSet):
            raise TypeError(
                f"process_set must be a horovod.torch.ProcessSet, not {process_set!r}: write "
                "process_set=hvd.add_process_set(ranks)"
            )
        if process_set.process_set_id is None or process_set.included() is None:
            raise ValueError(
                "Horovod or the process set is not initialised: call hvd.init() (with "
                "process_sets) or hvd.add_process_set() first"
            )
        self.name = "lbgm_compress"

    @property
    def included(self) -> bool:
        """True if this process belongs to the process set."""
        return bool(self.process_set.included())

    @property
    def rank(self) -> int:  # type: ignore[override]
        return int(self.process_set.rank()) if self.included else 0

    @property
    def size(self) -> int:  # type: ignore[override]
        return int(self.process_set.size()) if self.included else 1

    # Horovod adds up no int8.
    adds_int8 = False

    def gather_equal(self, data: Tensor) -> Tensor:
        # Under one name for all optimizers, since ranks may differ in what `name` is made of.
        rows = self.hvd.allgather(
            data.cpu(), name="lbgm_compress.gather_equal", process_set=self.process_set
        )
        return rows.view(self.size, data.numel()).to(data.device)  # type: ignore[no-any-return]

    def begin_gather(
        self, message: Tensor, head_size: int, body_length: BodyLength, key: str
    ) -> Pending[list[Tensor]]:
        handle = self.hvd.allgather_async(
            message.cpu(), name=f"{self.name}.{key}", process_set=self.process_set
        )

        def result() -> list[Tensor]:
            gathered = self.hvd.synchronize(handle)
            sizes: list[int] = []
            for rank in range(self.size):
                position = sum(sizes)
                head = gathered[position : position + head_size].numpy().tobytes()
                sizes.append(head_size + body_length(head, rank))
            return [part.to(message.device) for part in torch.split(gathered, sizes)]

        return Pending(lambda: bool(self.hvd.poll(handle)), result)

    def all_reduce(self, data: Tensor) -> Tensor:
        return self.begin_all_reduce(data, "all_reduce").result()

    def begin_all_reduce(self, data: Tensor, key: str) -> Pending[Tensor]:
        total = data.cpu()
        handle = self.hvd.allreduce_async_(
            total, name=f"{self.name}.{key}", op=self.hvd.Sum, process_set=self.process_set
        )

        def result() -> Tensor:
            self.hvd.synchronize(handle)
            return total.to(data.device)

        return Pending(lambda: bool(self.hvd.poll(handle)), result)
