"""Spectral ATOMO: a matrix as the sum of a few singular triplets."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lbgm_compress._util.checks import check_flag, check_whole
from lbgm_compress.compressor import (
    Compressor,
    Encoding,
    PayloadError,
    State,
    dense_from_bytes,
    dense_from_stack,
    raw,
)
from lbgm_compress.compressors.svd import decomposition, leading_triplets
from lbgm_compress.decoded import Decoded, Dense, LowRank, working_dtype
from lbgm_compress.wire.bits import read_varints, varint
from lbgm_compress.wire.message import Kind
from lbgm_compress.wire.values import as_bytes, decode_values, encode_values, values_size

__all__ = ["Atomo"]


@dataclass(frozen=True, repr=False)
class Atomo(Compressor):
    """Sends a few singular triplets of the tensor, seen as a matrix (first dimension, rest).

    This is spectral ATOMO (arXiv 1806.04090). A tensor with fewer than two dimensions, or for which
    `rank` pairs of factors would be no smaller than the tensor, is sent uncompressed.

    The body of a payload is the number r of triplets (unsigned LEB128), the left factors (m x r)
    and the right factors (n x r), each row by row as a section of values
    (`lbgm_compress.wire.values`) in the tensor's own precision. The decoded matrix is the left
    factors times the transposed right factors. The body of an uncompressed tensor is its elements,
    row by row.

    Parameters
    ----------
    rank
        Number of triplets, at least 1.
    unbiased
        False: send the leading `rank` triplets, as the LBGM paper's experiments do. For a matrix
        whose smaller side exceeds 256 they come from four steps of subspace iteration with eight
        extra vectors.
        True: sample triplets with the probabilities of ATOMO's algorithm 1, `rank` of them in
        expectation, and divide each by its probability. The decoded tensor is then an unbiased
        estimate. The sender's state holds a seed and the number of the round.

    Raises
    ------
    ValueError
        If a parameter is outside its range.

    Examples
    --------
    >>> import torch
    >>> grad = torch.outer(torch.arange(8.0), torch.arange(9.0))
    >>> payload, decoded, state = Atomo(rank=1).compress(grad, {})
    >>> payload.numel(), torch.allclose(decoded, grad, atol=1e-4)
    (70, True)
    """

    rank: int
    unbiased: bool = False

    def __post_init__(self) -> None:
        check_whole("rank", self.rank, least=1)
        check_flag("unbiased", self.unbiased)

    def initial_state(self, seed: int) -> State:
        return {"seed": seed, "round": 0} if self.unbiased else {}

    def encode(self, grad: Tensor, state: State) -> Encoding:
        sides = self._sides(grad)
        if sides is None:
            head = bytes([Kind.BODY])
            return Encoding(head, lambda: as_bytes(grad.contiguous()), Dense(grad), state)
        matrix = grad.reshape(sides)
        matrix = matrix.float() if grad.dtype.itemsize < 4 else matrix
        # With magnitudes of at most 1, squares neither overflow nor vanish.
        magnitude = matrix.abs().max()
        matrix = matrix / torch.where(magnitude > 0, magnitude, 1.0)
        if self.unbiased:
            left, right, state = self._sampled(matrix, state)
        else:
            left, right = leading_triplets(matrix, self.rank)
        right = right * magnitude
        if not bool(right.isfinite().all()):
            return raw(self, grad, state)

        precision = str(grad.dtype).removeprefix("torch.")
        count = left.shape[1]
        left_section, left = encode_values(left.reshape(-1), precision)
        right_section, right = encode_values(right.reshape(-1), precision)

        def body() -> Tensor:
            front = torch.frombuffer(bytearray(varint(count)), dtype=torch.uint8)
            return torch.cat([front.to(grad.device), left_section, right_section])

        decoded = LowRank(left.view(sides[0], count), right.view(sides[1], count), grad)
        return Encoding(bytes([Kind.BODY]), body, decoded, state)

    def decode(
        self, head: bytes, body: Tensor, state: State, like: Tensor
    ) -> tuple[Decoded, State]:
        sides = self._sides(like)
        if sides is None:
            return dense_from_bytes(body, like), state
        m, n = sides
        [count], start = read_varints(body[:9].tolist(), 1)
        most = min(m, n) if self.unbiased else min(m, n, self.rank)
        if count > most:
            raise PayloadError(f"{count} triplets in the payload, at most {most} expected")
        precision = str(like.dtype).removeprefix("torch.")
        dtype = working_dtype(like)
        end = start + values_size(count * m, precision, dtype)
        left = decode_values(body[start:end], count * m, precision, dtype)
        right = decode_values(body[end:], count * n, precision, dtype)
        # A product may depend on the alignment of its factors. The sender's are aligned.
        return LowRank(left.view(m, count).clone(), right.view(n, count).clone(), like), state

    def decode_small(self, bodies: Tensor, like: Tensor) -> Sequence[Decoded] | None:
        return dense_from_stack(bodies, like) if self._sides(like) is None else None

    def _sides(self, like: Tensor) -> tuple[int, int] | None:
        """Return the sides of the matrix, or None for a tensor that is sent uncompressed."""
        if like.dim() < 2 or like.numel() == 0:
            return None
        m, n = like.shape[0], like.numel() // like.shape[0]
        return (m, n) if self.rank * (m + n) < m * n else None

    def _sampled(self, matrix: Tensor, state: State) -> tuple[Tensor, Tensor, State]:
        """Return factors (m x r, n x r) of sampled triplets, and the new state."""
        state = state or self.initial_state(0)
        left, right = decomposition(matrix)
        sigma = (left.norm(dim=0) * right.norm(dim=0)).cpu()
        probabilities = _probabilities(sigma, self.rank)
        seed = hashlib.blake2b(struct.pack("<qQ", state["seed"], state["round"]), digest_size=7)
        generator = torch.Generator().manual_seed(int.from_bytes(seed.digest(), "little"))
        draw = torch.rand(sigma.numel(), generator=generator, dtype=torch.float64)
        chosen = torch.nonzero(draw < probabilities).reshape(-1)
        weight = (1 / probabilities[chosen]).to(matrix.device, matrix.dtype)
        chosen = chosen.to(matrix.device)
        state = {"seed": state["seed"], "round": state["round"] + 1}
        return left[:, chosen], right[:, chosen] * weight, state


def _probabilities(sigma: Tensor, budget: int) -> Tensor:
    """Return the sampling probabilities of ATOMO's algorithm 1 (float64, on the CPU).

    `sigma` descends. The largest values, whose share of the budget would exceed 1, have probability
    1. The others share the rest of the budget in proportion to their magnitude.
    """
    sigma = sigma.double()
    # tails[i] is the sum from i on.
    tails = sigma.flip(0).cumsum(0).flip(0)
    probabilities = torch.ones_like(sigma)
    for i in range(min(budget, sigma.numel())):
        if sigma[i] * (budget - i) <= tails[i]:
            if tails[i] > 0:
                probabilities[i:] = sigma[i:] * (budget - i) / tails[i]
            break
    else:
        probabilities[budget:] = 0
    return probabilities
