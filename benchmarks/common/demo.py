"""DeMo, decoupled momentum (arXiv 2411.19870, algorithm 1), over `torch.distributed`."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lbgm_compress import Receiver, Sender, TopK
from lbgm_compress.collective.transport import ProcessGroupTransport
from lbgm_compress.wire.message import body_size

__all__ = ["DeMo"]

SIDE = 64
KEPT = 32


class DeMo(torch.optim.Optimizer):
    """Steps by the signs of the sum of each rank's largest momentum components.

    Components are those of the discrete cosine transform of tiles of 64 x 64 elements (of runs of
    64 for vectors), of which 32 a tile are sent, with float16 values. What is sent leaves the
    momentum.

    Parameters
    ----------
    params
        The parameters.
    lr
        Learning rate.
    decay
        Decay of the momentum.

    Attributes
    ----------
    sent : int
        Bytes of this rank's messages so far.
    """

    def __init__(self, params: Iterable[Tensor], lr: float, decay: float = 0.999) -> None:
        super().__init__(params, {"lr": lr, "decay": decay})
        self.sent = 0
        compressor = TopK(KEPT / SIDE**2, "float16", chunk=SIDE**2)
        self._transport = ProcessGroupTransport(dist.new_group())  # type: ignore[arg-type]
        self._sender = Sender(compressor)
        self._receiver = Receiver(compressor, self._components(self._momenta()))

    def _momenta(self) -> dict[str, Tensor]:
        found = {}
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(parameter)
                found[str(len(found))] = state["momentum"]
        return found

    @staticmethod
    def _components(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: _transformed(tensor) for name, tensor in tensors.items()}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        parameters = [p for group in self.param_groups for p in group["params"]]
        momenta = self._momenta()
        for parameter, momentum in zip(parameters, momenta.values(), strict=True):
            momentum.mul_(self.defaults["decay"]).add_(parameter.grad)
        message, own = self._sender.encode(self._components(momenta))
        self.sent += message.numel()
        for name, decoded in own.items():
            momenta[name].sub_(_restored(decoded.dense(), momenta[name]))
        head = self._receiver.head_size()
        pending = self._transport.begin_gather(message, head, lambda of, _: body_size(of), "demo")
        sums = self._components({name: torch.zeros_like(of) for name, of in momenta.items()})
        for rank, received in enumerate(pending.result()):
            self._receiver.accumulate(rank, received, sums, 1.0)
        for parameter, (name, summed) in zip(parameters, sums.items(), strict=True):
            step = _restored(summed, momenta[name]).sign_()
            parameter.sub_(step, alpha=self.defaults["lr"])


@functools.lru_cache
def _basis(size: int) -> Tensor:
    """Return the orthonormal DCT-II matrix, a basis vector a row."""
    position = torch.arange(size, dtype=torch.float64)
    basis = torch.cos(math.pi / size * (position + 0.5) * position[:, None])
    basis *= math.sqrt(2 / size)
    basis[0] /= math.sqrt(2)
    return basis.float()


def _sides(like: Tensor) -> tuple[int, int]:
    """Return the sides of a tile: the largest divisors of the tensor's of at most 64."""
    matrix = like.reshape(len(like), -1) if like.ndim > 1 else like.reshape(1, -1)
    return tuple(max(d for d in range(1, SIDE + 1) if n % d == 0) for n in matrix.shape)  # type: ignore[return-value]


def _transformed(tensor: Tensor) -> Tensor:
    """Return the DCT of each tile, tile after tile."""
    a, b = _sides(tensor)
    rows = len(tensor) if tensor.ndim > 1 else 1
    tiles = tensor.reshape(rows // a, a, -1, b).transpose(1, 2)
    return (_basis(a) @ tiles @ _basis(b).T).reshape(-1)


def _restored(components: Tensor, like: Tensor) -> Tensor:
    """Return what `_transformed` was given, in the shape of `like`."""
    a, b = _sides(like)
    rows = len(like) if like.ndim > 1 else 1
    tiles = components.reshape(rows // a, -1, a, b)
    return (_basis(a).T @ tiles @ _basis(b)).transpose(1, 2).reshape(like.shape)
