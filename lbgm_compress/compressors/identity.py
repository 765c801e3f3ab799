"""No compression, as a baseline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from lbgm_compress.compressor import (
    BODY_HEAD,
    Compressor,
    Encoding,
    State,
    dense_from_bytes,
    dense_from_stack,
)
from lbgm_compress.decoded import Decoded, Dense
from lbgm_compress.wire.values import as_bytes

__all__ = ["Identity"]


@dataclass(frozen=True, repr=False)
class Identity(Compressor):
    """Sends every element uncompressed.

    The body of a payload is the tensor's elements as they are in memory, row by row.

    Examples
    --------
    >>> import torch
    >>> payload, decoded, state = Identity().compress(torch.ones(10), {})
    >>> payload.numel(), bool((decoded == 1).all())
    (41, True)
    """

    @property
    def fixed_size(self) -> bool:
        return True

    def encode(self, grad: Tensor, state: State) -> Encoding:
        return Encoding(BODY_HEAD, lambda: as_bytes(grad.contiguous()), Dense(grad), state)

    def encode_batch(self, grads: Sequence[Tensor], states: Sequence[State]) -> list[Encoding]:
        # Inf and nan need no other treatment here, and looking for them takes time.
        return list(map(self.encode, grads, states))

    def decode(
        self, head: bytes, body: Tensor, state: State, like: Tensor
    ) -> tuple[Decoded, State]:
        return dense_from_bytes(body, like), state

    def decode_small(self, bodies: Tensor, like: Tensor) -> Sequence[Decoded] | None:
        return dense_from_stack(bodies, like)
