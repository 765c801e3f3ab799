"""Top-k sparsification."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lbgm_compress._util.batches import rows, stack
from lbgm_compress._util.checks import check_choice, check_number, check_whole
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

# Groups of elements for each entry that is sent of a chunk (see `_lower_bounds`).
GROUPS = 4


@dataclass(frozen=True, repr=False)
class TopK(Compressor):
    """Sends the k = max(1, round(ratio * n)) entries of largest magnitude of n (arXiv 1704.05021).

    With `chunk`, it sends the k largest of each `chunk` consecutive elements of the flat tensor, of
    which n is then the number; the last chunk may be shorter. SparseLoCo sends 64 of each 4,096
    (arXiv 2508.15706): ``TopK(1 / 64, chunk=4096)``.

    Among entries of equal magnitude, those with lower indices come first. On the CPU zeros are not
    sent: of fewer than k nonzero entries, only these are.

    The body of a payload is the number of entries (unsigned LEB128), their values in the order of
    their indices (`lbgm_compress.wire.values`) and their indices (`lbgm_compress.wire.indices`).

    Parameters
    ----------
    ratio
        Fraction of the entries to send, above 0 and at most 1.
    values
        Precision of the values: "float64", "float32", "float16", "bfloat16", or "int8", "int4" and
        "int2" in blocks of 256 values with a scale each, or "sign", the signs and the mean
        magnitude of each block (arXiv 1903.02891). The values of a tensor whose dtype is
        narrower are sent in that dtype.
    chunk
        Number of elements of a chunk, at least 1; None for one chunk that is the whole tensor.

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
    chunk: int | None = None

    def __post_init__(self) -> None:
        check_number("ratio", self.ratio)
        if not 0 < self.ratio <= 1:
            raise ValueError(f"ratio must be above 0 and at most 1, not {self.ratio}")
        check_choice("values", self.values, PRECISIONS)
        if self.chunk is not None:
            check_whole("chunk", self.chunk, 1)

    def encode(self, grad: Tensor, state: State) -> Encoding:
        flat = grad.reshape(-1)
        indices = _largest(flat, self._parts(flat.numel()))
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
        positions, counts = _largest_of_each(matrix, self._parts(n))
        results: dict[int, Encoding] = {}
        for count in set(counts.tolist()):
            chosen = np.flatnonzero(counts == count)
            indices = positions[chosen, :count]
            index_sections = encode_index_rows(indices, n)
            if index_sections is None:
                results.update((i, self.encode(grads[i], states[i])) for i in chosen.tolist())
                continue
            columns = torch.from_numpy(indices)
            values = matrix[torch.from_numpy(chosen)].gather(1, columns)
            sections, values = encode_rows(values, self.values)
            front = torch.frombuffer(bytearray(varint(count)), dtype=torch.uint8)
            fronts = front.expand(len(chosen), len(front))
            bodies = torch.cat([fronts, sections, torch.from_numpy(index_sections)], 1)
            for i, body, *entries in zip(
                chosen.tolist(), bodies.unbind(), columns.unbind(), values.unbind(), strict=True
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
        return sum(part.chunks * part.k for part in self._parts(n))

    def _parts(self, n: int) -> list[Part]:
        """Return the chunks of a tensor of `n` elements: those of full length, and the last one."""
        length = n if self.chunk is None else min(self.chunk, n)
        if not length:
            return []
        chunks, rest = divmod(n, length)
        parts = [Part(0, chunks, length, self._k(length))]
        if rest:
            parts.append(Part(n - rest, 1, rest, self._k(rest)))
        return parts

    def _k(self, length: int) -> int:
        return max(1, round(self.ratio * length))


class Part(NamedTuple):
    """Chunks of one length, one after the other in a flat tensor."""

    start: int
    chunks: int
    length: int
    k: int
    """The number of entries to send of each."""


def _largest_of_each(
    matrix: Tensor, parts: Sequence[Part]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return the ascending indices of the largest magnitudes in the parts of each row.

    Besides, the number of them that are not zero: these come first. Of equal magnitudes those with
    lower indices are taken.
    """
    wide = matrix.float() if matrix.dtype.itemsize < 4 else matrix
    magnitudes = wide.abs().numpy()
    count, n = magnitudes.shape
    found = []
    for start, chunks, length, k in parts:
        table = magnitudes[:, start : start + chunks * length].reshape(count * chunks, length)
        order = np.argsort(-table, axis=1, kind="stable")[:, :k]
        zero = np.take_along_axis(table, order, 1) == 0
        starts = np.arange(start, start + chunks * length, length)
        order = order.reshape(count, chunks, k) + starts[:, None]
        order[zero.reshape(order.shape)] = n
        found.append(order.reshape(count, chunks * k))
    positions = np.sort(np.concatenate(found, 1), 1)
    return positions, np.count_nonzero(positions < n, axis=1)


def _largest(flat: Tensor, parts: Sequence[Part]) -> Tensor:
    """Return the ascending indices (int64) of the largest magnitudes in the parts."""
    if flat.device.type == "cpu" and flat.dtype.itemsize < 4:
        flat = flat.float()
    found = []
    for start, chunks, length, k in parts:
        table = flat[start : start + chunks * length].detach().view(chunks, length)
        if flat.device.type != "cpu":
            order = torch.topk(table.abs(), k, dim=1, sorted=False).indices.sort(1).values
            starts = torch.arange(start, start + chunks * length, length, device=flat.device)
            found.append((order + starts[:, None]).view(-1))
        else:
            array = table.numpy()
            indices = _largest_on_cpu(array[0], k) if chunks == 1 else _largest_of_rows(array, k)
            found.append(torch.from_numpy(indices + start if start else indices))
    return found[0] if len(found) == 1 else torch.cat(found)


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


def _largest_of_rows(table: npt.NDArray[np.floating], k: int) -> npt.NDArray[np.int64]:
    """Return the ascending indices, in the flat table, of the `k` largest magnitudes of each row.

    Zeros are left out.
    """
    rows, length = table.shape
    bounds = _lower_bounds(table, k)
    chosen = (table >= bounds) | (table <= -bounds)
    if not bounds.all():
        chosen &= table != 0
    indices = np.flatnonzero(chosen)
    counts = np.bincount(indices // length, minlength=rows)
    starts = np.cumsum(counts) - counts
    magnitudes = np.abs(table.reshape(-1)[indices])
    kept = np.ones(indices.size, bool)
    # Rows are put side by side with others of about as many candidates: one crowded row would
    # otherwise widen the table of all.
    crowding = np.where(counts > k, np.frexp(counts)[1], 0)
    for size in np.flatnonzero(np.bincount(crowding)[1:]) + 1:
        chosen_rows = np.flatnonzero(crowding == size)
        numbers = counts[chosen_rows, None]
        columns = np.arange(numbers.max())
        places = starts[chosen_rows, None] + columns
        candidates = np.where(columns < numbers, magnitudes.take(places, mode="clip"), 0)
        keep = _largest_in_rows(candidates, k)
        kept[places[columns < numbers]] = keep[columns < numbers]
    return indices[kept]


def _lower_bounds(table: npt.NDArray[np.floating], k: int) -> npt.NDArray[np.floating]:
    """Return a bound for each row (rows x 1) that at least `k` magnitudes of it reach.

    It is the k-th largest maximum of groups of elements, of which at least k then reach it. Few
    more do if the groups are many times k.
    """
    rows, length = table.shape
    size = max(1, length // (GROUPS * k))
    number = length // size
    maxima: npt.NDArray[np.floating]
    if size == 1:
        maxima = np.abs(table)
    else:
        # Elements of a group are far from each other, as large ones are often neighbours.
        groups = torch.from_numpy(table)[:, : size * number].view(rows, size, number)
        maxima = torch.maximum(groups.amax(1), groups.amin(1).neg_()).numpy()
    maxima.partition(number - k, axis=1)
    return maxima[:, number - k, None].copy()


def _largest_in_rows(magnitudes: npt.NDArray[np.floating], k: int) -> npt.NDArray[np.bool_]:
    """Return where the `k` largest of each row are, the first of equal ones."""
    place = magnitudes.shape[1] - k
    smallest = np.partition(magnitudes, place, axis=1)[:, place, None]
    keep: npt.NDArray[np.bool_] = magnitudes >= smallest
    excess = np.count_nonzero(keep, axis=1) - k
    if excess.any():
        ties = magnitudes == smallest
        # Of the ties, the number from each one to the end of its row.
        following = np.cumsum(ties[:, ::-1], axis=1)[:, ::-1]
        keep &= ~ties | (following > excess[:, None])
    return keep
