"""The transport of local training over `torch.distributed`, whose errors say what to do."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from lbgm_compress.collective.local.rounds import Rounds
from lbgm_compress.collective.transport import ProcessGroupTransport

__all__ = ["GroupTransport"]


class GroupTransport(ProcessGroupTransport):
    """A `ProcessGroupTransport` that names the exchange in which another rank cannot be reached.

    Attributes
    ----------
    training
        A weak reference to the rounds whose exchanges are named; None while they are built.
    finishing : bool
        True within `finish`.
    """

    training: weakref.ref[Rounds] | None = None
    finishing = False
    # Methods call each other: the outermost one names the exchange.
    _inside = False

    def gather_equal(self, data: Tensor) -> Tensor:
        with self._reaching():
            return super().gather_equal(data)

    def gather_unequal(self, parts: Sequence[Tensor]) -> None:
        with self._reaching():
            super().gather_unequal(parts)

    @contextlib.contextmanager
    def _reaching(self) -> Iterator[None]:
        if self._inside:
            yield
            return
        if not dist.is_initialized():
            raise RuntimeError(
                "the process group is destroyed: call finish() before destroy_process_group()"
            )
        self._inside = True
        try:
            yield
        except torch.cuda.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise RuntimeError(
                f"{self._place()}: another rank is gone or did not answer in time: load a "
                "checkpoint to go on"
            ) from error
        finally:
            self._inside = False

    def _place(self) -> str:
        rounds = None if self.training is None else self.training()
        if rounds is None:
            return "DiLoCo(...)"
        step = f"step {rounds.local_step}"
        return f"finish(), {step}" if self.finishing else f"exchange {rounds.exchanges}, {step}"
