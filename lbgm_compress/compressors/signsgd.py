"""Sign compression: one bit an element."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lbgm_compress._util.batches import rows, stack
from lbgm_compress._util.checks import check_flag
from lbgm_compress.compressor import (
    BODY_HEAD,
    Compressor,
    Encoding,
    PayloadError,
    State,
    returning,
)
from lbgm_compress.decoded import Decoded
from lbgm_compress.wire.bits import pack_fixed_on_device, unpack_fixed_on_device
from lbgm_compress.wire.values import as_bytes, from_bytes

__all__ = ["SignSGD"]

# Row v holds the eight signs of byte v, lowest bit first.
SIGNS = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
SIGNS_FLOAT = SIGNS.astype(np.float32) * 2 - 1


@dataclass(frozen=True, repr=False)
class SignSGD(Compressor):
    """Sends the sign of every element; zero counts as +1.

    The body of a payload is the scale, if it is sent (float32; float64 for a float64 tensor), and
    the signs: one bit an element, 1 for +1, lowest bit first.

    Parameters
    ----------
    scaled
        If True, also send the mean magnitude |g|_1 / n, and decode to plus or minus that value
        (EF-SignSGD, arXiv 1901.09847, algorithm 1). Otherwise the decoded values are +1 and -1.
    vote
        If True, replace the average of all workers by its sign, which is a majority vote
        (arXiv 1810.05291, algorithm 1). A tie gives 0.

    Raises
    ------
    ValueError
        If both are True, since a vote would discard the scales, or one is not a bool.

    Examples
    --------
    >>> import torch
    >>> payload, decoded, state = SignSGD(scaled=True).compress(torch.tensor([3.0, -1.0, 0.0]), {})
    >>> payload.numel(), decoded
    (6, tensor([ 1.3333, -1.3333,  1.3333]))
    """

    scaled: bool = False
    vote: bool = False

    def __post_init__(self) -> None:
        check_flag("scaled", self.scaled)
        check_flag("vote", self.vote)
        if self.scaled and self.vote:
            raise ValueError("SignSGD(scaled=True, vote=True): a majority vote discards the scales")

    @property
    def finishes_average(self) -> bool:
        return self.vote

    def encode(self, grad: Tensor, state: State) -> Encoding:
        flat = grad.reshape(-1)
        positive = flat >= 0
        if flat.device.type == "cpu":
            bits = torch.from_numpy(np.packbits(positive.numpy(), bitorder="little"))
        else:
            bits = pack_fixed_on_device(positive.long(), 1)
        scale = self._mean_magnitudes(flat[None])[0] if self.scaled else None
        body = bits if scale is None else torch.cat([as_bytes(scale), bits])
        decoded = Signs(bits, scale, grad)
        return Encoding(BODY_HEAD, lambda: body, decoded, state)

    def decode(
        self, head: bytes, body: Tensor, state: State, like: Tensor
    ) -> tuple[Decoded, State]:
        size = _scale_dtype(like).itemsize if self.scaled else 0
        expected = size + -(-like.numel() // 8)
        if body.numel() != expected:
            raise PayloadError(
                f"{body.numel()} bytes for {like.numel()} signs, expected {expected}"
            )
        scale = None
        if self.scaled:
            scale = from_bytes(body[:size], _scale_dtype(like))
            value = scale.item()
            if not 0 <= value < math.inf:
                raise PayloadError(f"the scale of the signs is {value}, not a finite magnitude")
        return Signs(body[size:], scale, like), state

    def encode_small(self, grads: Sequence[Tensor], states: Sequence[State]) -> list[Encoding]:
        matrix = rows(stack(grads))
        bits = torch.from_numpy(np.packbits((matrix >= 0).numpy(), axis=1, bitorder="little"))
        bodies = bits
        scales: Sequence[Tensor | None] = [None] * len(grads)
        if self.scaled:
            column = self._mean_magnitudes(matrix)
            bodies = torch.cat([column.view(torch.uint8), bits], 1)
            scales = column.unbind()
        return [
            Encoding(BODY_HEAD, returning(body), Signs(row, scale, grad), state)
            for body, row, scale, grad, state in zip(
                bodies.unbind(), bits.unbind(), scales, grads, states, strict=True
            )
        ]

    def decode_small(self, bodies: Tensor, like: Tensor) -> list[Decoded] | None:
        size = _scale_dtype(like).itemsize if self.scaled else 0
        if bodies.shape[1] != size + -(-like.numel() // 8):
            return None
        scales: Sequence[Tensor | None] = [None] * len(bodies)
        if self.scaled:
            column = from_bytes(bodies[:, :size].reshape(-1), _scale_dtype(like))[:, None]
            if not ((column >= 0) & (column < math.inf)).all():
                return None
            scales = column.unbind()
        return [
            Signs(bits, scale, like)
            for bits, scale in zip(bodies[:, size:].unbind(), scales, strict=True)
        ]

    def finish(self, mean: Tensor) -> Tensor:
        if not self.vote:
            return mean
        # The sign of inf would hide it, and the ranks apply a step that they should skip.
        return torch.where(mean.isfinite(), mean.sign(), mean)

    def _mean_magnitudes(self, matrix: Tensor) -> Tensor:
        """Return the mean magnitude of each row, as a column."""
        # The sum cannot overflow if the terms are divided first.
        terms = matrix.abs().to(_scale_dtype(matrix)) / max(matrix.shape[1], 1)
        return terms.sum(1, keepdim=True).clamp(max=torch.finfo(matrix.dtype).max)


def _scale_dtype(like: Tensor) -> torch.dtype:
    return torch.float64 if like.dtype == torch.float64 else torch.float32


class Signs(Decoded):
    """A tensor of plus or minus `scale` (1 element, or None for 1) by `bits` (flat uint8)."""

    def __init__(self, bits: Tensor, scale: Tensor | None, like: Tensor) -> None:
        self.bits = bits
        self.scale = scale
        self.shape, self.dtype, self.count = like.shape, like.dtype, like.numel()

    def dense(self) -> Tensor:
        if self.bits.device.type == "cpu":
            signs = torch.from_numpy(np.take(SIGNS_FLOAT, self.bits.numpy(), axis=0))
            signs = signs.view(-1)[: self.count]
        else:
            signs = unpack_fixed_on_device(self.bits, 1, self.count).float() * 2 - 1
        if self.scale is not None:
            signs = signs * self.scale
        return signs.to(self.dtype).view(self.shape)

    @classmethod
    def dense_stack(cls, decoded: Sequence[Signs]) -> Tensor:
        first = decoded[0]
        octets = torch.stack([one.bits for one in decoded]).numpy()
        signs = torch.from_numpy(np.take(SIGNS_FLOAT, octets, axis=0))
        signs = signs.view(len(decoded), -1)[:, : first.count]
        if first.scale is not None:
            signs = signs * torch.stack([one.scale for one in decoded if one.scale is not None])
        return signs.to(first.dtype).reshape(len(decoded), *first.shape)
