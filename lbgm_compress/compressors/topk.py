"""Top-k sparsification."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lbgm_compress._util.batches import rows, stack
from lbgm_compress._util.checks import check_choice, check_number
from lbgm_compress.compressor import (
    BODY_HEAD,
    Compressor,
    Encoding,
    PayloadError,
    State,
    returning,
)
from lbgm_compress.decoded import Decoded, Sparse
from lbgm_compress.wire.bits import read_varints, varint
from lbgm_compress.wire.indices import (
    decode_index_rows,
    decode_indices,
    encode_index_rows,
    encode_indices,
)
from lbgm_compress.wire.values import (
    PRECISIONS,
    decode_rows,
    decode_values,
    encode_rows,
    encode_values,
    values_size,
)

__all__ = ["TopK"]


@dataclass(frozen=True, repr=False)
class TopK(Compressor):
    """Sends the k = max(1, round(ratio * n)) entries of largest magnitude of n (arXiv 1704.05021).

    Among entries of equal magnitude, those with lower indices come first. On the CPU zeros are not
    sent: for a tensor with fewer than k nonzero entries, only these are.

    The body of a payload is the number of entries (unsigned LEB128), their values in the order of
    their indices (`lbgm_compress.wire.values`) and their indices (`lbgm_compress.wire.indices`).

    Parameters
    ----------
    ratio
        Fraction of the entries to send, above 0 and at most 1.
    values
        Precision of the values: "float64", "float32", "float16", "bfloat16", or "int8", "int4" and
        "int2" in blocks of 256 values with a scale each. The values of a tensor whose dtype is
        narrower are sent in that dtype.

    Raises
    ------
    ValueError
        If a parameter is outside its range.

    Examples
    --------
    >>> import torch
    >>> payload, decoded, state = TopK(0.5).compress(torch.tensor([1.0, -3.0, 0.5, 2.0]), {})
    >>> decoded
    tensor([ 0., -3.,  0.,  2.])
    """

    ratio: float
    values: str = "float32"

    def __post_init__(self) -> None:
        check_number("ratio", self.ratio)
        if not 0 < self.ratio <= 1:
            raise ValueError(f"ratio must be above 0 and at most 1, not {self.ratio}")
        check_choice("values", self.values, PRECISIONS)

    def encode(self, grad: Tensor, state: State) -> Encoding:
        flat = grad.reshape(-1)
        indices = _largest(flat, self._count(flat.numel()))
        section, values = encode_values(flat[indices], self.values)

        def body() -> Tensor:
            count = torch.frombuffer(bytearray(varint(indices.numel())), dtype=torch.uint8)
            return torch.cat(
                [count.to(flat.device), section, encode_indices(indices, flat.numel())]
            )

        return Encoding(BODY_HEAD, body, Sparse(indices, values, grad.shape), state)

    def decode(
        self, head: bytes, body: Tensor, state: State, like: Tensor
    ) -> tuple[Decoded, State]:
        n = like.numel()
        [count], start = read_varints(body[:9].tolist(), 1)
        if count > self._count(n):
            raise PayloadError(f"{count} entries in the payload, at most {self._count(n)} expected")
        end = start + values_size(count, self.values, like.dtype)
        values = decode_values(body[start:end], count, self.values, like.dtype)
        indices = decode_indices(body[end:], count, n)
        return Sparse(indices, values, like.shape), state

    def encode_small(self, grads: Sequence[Tensor], states: Sequence[State]) -> list[Encoding]:
        matrix = rows(stack(grads))
        n = matrix.shape[1]
        order, counts = _ranking(matrix, self._count(n))
        results: dict[int, Encoding] = {}
        for count in set(counts.tolist()):
            chosen = np.flatnonzero(counts == count)
            indices = np.sort(order[chosen, :count], 1)
            index_sections = encode_index_rows(indices, n)
            if index_sections is None:
                results.update((i, self.encode(grads[i], states[i])) for i in chosen.tolist())
                continue
            positions = torch.from_numpy(indices)
            values = matrix[torch.from_numpy(chosen)].gather(1, positions)
            sections, values = encode_rows(values, self.values)
            front = torch.frombuffer(bytearray(varint(count)), dtype=torch.uint8)
            fronts = front.expand(len(chosen), len(front))
            bodies = torch.cat([fronts, sections, torch.from_numpy(index_sections)], 1)
            for i, body, *entries in zip(
                chosen.tolist(), bodies.unbind(), positions.unbind(), values.unbind(), strict=True
            ):
                decoded = Sparse(entries[0], entries[1], grads[i].shape)
                results[i] = Encoding(BODY_HEAD, returning(body), decoded, states[i])
        return [results[i] for i in range(len(grads))]

    def decode_small(self, bodies: Tensor, like: Tensor) -> list[Decoded] | None:
        n = like.numel()
        # A number of entries in one byte, the same in all.
        count = int(bodies[0, 0]) if bodies.numel() else 0
        end = 1 + values_size(count, self.values, like.dtype)
        if not 0 < count <= min(self._count(n), 127) or bodies.shape[1] < end:
            return None
        if (bodies[:, 0] != count).any():
            return None
        positions = decode_index_rows(bodies[:, end:].numpy(), count, n)
        if positions is None:
            return None
        values = decode_rows(bodies[:, 1:end], count, self.values, like.dtype)
        indices = torch.from_numpy(positions)
        return [
            Sparse(*entries, like.shape)
            for entries in zip(indices.unbind(), values.unbind(), strict=True)
        ]

    def _count(self, n: int) -> int:
        return min(n, max(1, round(self.ratio * n)))


def _ranking(matrix: Tensor, k: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return the indices of the `k` largest magnitudes of each row, largest first.

    Besides, the number of them that are not zero. Of equal magnitudes the first come first.
    """
    wide = matrix.float() if matrix.dtype.itemsize < 4 else matrix
    magnitudes = wide.abs().numpy()
    order = np.argsort(-magnitudes, axis=1, kind="stable")[:, :k]
    return order, np.minimum(np.count_nonzero(magnitudes, axis=1), k)


def _largest(flat: Tensor, k: int) -> Tensor:
    """Return the ascending indices (int64) of the `k` entries of largest magnitude."""
    if flat.device.type != "cpu":
        return torch.topk(flat.abs(), k, sorted=False).indices.sort().values
    if flat.dtype.itemsize < 4:
        flat = flat.float()
    return torch.from_numpy(_largest_on_cpu(flat.detach().numpy(), k))


def _largest_on_cpu(flat: npt.NDArray[np.floating], k: int) -> npt.NDArray[np.int64]:
    indices = _candidates(flat, k)
    excess = indices.size - k
    if excess <= 0:
        return indices
    magnitudes = np.abs(flat[indices])
    smallest = np.partition(magnitudes, excess)[excess]
    chosen = magnitudes >= smallest
    ties = np.count_nonzero(chosen) - k
    if ties:
        chosen[np.flatnonzero(magnitudes == smallest)[-ties:]] = False
    kept: npt.NDArray[np.int64] = indices[chosen]
    return kept


def _candidates(flat: npt.NDArray[np.floating], k: int) -> npt.NDArray[np.int64]:
    """Return ascending indices that include the k nonzero entries of largest magnitude.

    A threshold that slightly more than k magnitudes should reach is estimated from a sample. If
    fewer than k reach it, all nonzero entries are returned.
    """
    step = flat.size // max(2048, min(16384, flat.size // 64))
    if step > 1 and k < flat.size // 2:
        # An odd step is seldom a multiple of the number of rows or channels.
        sample = np.abs(flat[:: step | 1])
        expected = k / flat.size * sample.size
        rank = min(sample.size, math.ceil(expected + 4 * math.sqrt(expected) + 2))
        threshold = np.partition(sample, sample.size - rank)[sample.size - rank]
        if threshold > 0:
            # Two comparisons are faster than an array of magnitudes, written and read again.
            indices = np.flatnonzero((flat >= threshold) | (flat <= -threshold))
            if indices.size >= k:
                return indices
    return np.flatnonzero(flat)
