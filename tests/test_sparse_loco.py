"""SparseLoCo's selection, error feedback and packing (arXiv 2508.15706), and this package's.

The functions below transcribe what the paper's algorithm 1 and its public optimizer do with one
matrix in a round: a decayed error buffer, the 64 largest of each tile of 64 x 64, indices of 12
bits, and values in 2 bits as indices of four centroids that the whole matrix shares.

A chunk of `TopK` is 4,096 consecutive elements. The two agree where the tiles are laid one after
the other, as they are in a matrix of 64 columns.
"""

from __future__ import annotations

import pytest
import torch

from lbgm_compress import ErrorFeedback, Sender, TopK

SIDE, K, DECAY = 64, 64, 0.95
CHUNK = SIDE * SIDE
RANGE = 6.0


def in_tiles(matrix):
    """Return the tiles of a matrix whose sides are multiples of 64 (tiles x 4096)."""
    down, across = (size // SIDE for size in matrix.shape)
    tiles = matrix.view(down, SIDE, across, SIDE).transpose(1, 2)
    return tiles.reshape(down * across, CHUNK)


def largest(tiles):
    """Return the indices in each tile (tiles x 64) of its largest magnitudes, in no order."""
    return tiles.abs().topk(K, dim=1, sorted=False).indices


def with_error_feedback(buffer, pseudo_gradient):
    """Return what is sent, dense, and the new error buffer; values are not quantised."""
    buffer = DECAY * buffer + pseudo_gradient
    indices = largest(buffer)
    sent = torch.zeros_like(buffer).scatter(1, indices, buffer.gather(1, indices))
    return sent, buffer - sent


def quantised(values):
    """Return the 2-bit codes of a matrix's values, and the four values that they stand for.

    Codes are equal steps of 1.5 standard deviations around the mean, and the outermost ones take
    what is beyond. Each stands for the mean of the values that have it.
    """
    mean = values.mean()
    step = RANGE * values.std() / 4
    codes = ((values - mean) / step + 2).round().clamp(0, 3).long()
    members = torch.nn.functional.one_hot(codes.flatten(), 4).float()
    centroids = members.T @ (values - mean).flatten() / members.sum(0).clamp(min=1)
    return codes, centroids + mean


def in_12_bits(indices):
    """Return indices below 4,096, two in three bytes, the first in the lowest bits."""
    first, second = indices.reshape(-1, 2).unbind(1)
    octets = first & 255, first >> 8 | (second & 15) << 4, second >> 4
    return torch.stack(octets, 1).to(torch.uint8).flatten()


def from_12_bits(packed):
    low, middle, high = packed.long().view(-1, 3).unbind(1)
    return torch.stack([low | (middle & 15) << 8, middle >> 4 | high << 4], 1).flatten()


def in_2_bits(codes):
    """Return codes below 4, four in a byte, the first in the lowest bits."""
    shifts = torch.arange(0, 8, 2)
    return (codes.reshape(-1, 4) << shifts).sum(1).to(torch.uint8)


def from_2_bits(packed):
    return (packed.long()[:, None] >> torch.arange(0, 8, 2) & 3).flatten()


def message_of_sparse_loco(matrix):
    """Return indices, codes and the matrix's parameters (the mean and four centroids) as bytes."""
    tiles = in_tiles(matrix)
    indices = largest(tiles)
    codes, _ = quantised(tiles.gather(1, indices))
    return torch.cat([in_12_bits(indices), in_2_bits(codes), torch.zeros(20, dtype=torch.uint8)])


def pseudo_gradients(shape, rounds=8, laplace=False):
    """Return the differences of rounds, with a part that stays and scales that vary by row."""
    generator = torch.Generator().manual_seed(0)

    def noise():
        uniform = torch.rand(shape, generator=generator) - 0.5
        scales = torch.logspace(-2, 0, shape[0])[:, None]
        if laplace:
            return -uniform.sign() * torch.log1p(-2 * uniform.abs()) * scales
        return torch.randn(shape, generator=generator) * scales

    common = noise()
    return [0.3 * common + noise() for _ in range(rounds)]


@pytest.mark.parametrize("shape", [(320, 64), (128, 192)])
@pytest.mark.parametrize("laplace", [False, True])
def test_entries_and_residuals_of_several_rounds_are_those_of_sparse_loco(shape, laplace):
    compressor, state = ErrorFeedback(TopK(K / CHUNK, chunk=CHUNK), decay=DECAY), {}
    buffer = torch.zeros(shape[0] * shape[1] // CHUNK, CHUNK)
    for pseudo_gradient in pseudo_gradients(shape, laplace=laplace):
        tiles = in_tiles(pseudo_gradient)
        sent, buffer = with_error_feedback(buffer, tiles)
        _, decoded, state = compressor.compress(tiles, state)
        assert torch.equal(decoded, sent)
        assert torch.equal(state["residual"], buffer)
        assert (torch.count_nonzero(decoded, 1) == K).all()


def test_tiles_of_a_matrix_of_64_columns_are_chunks_of_consecutive_elements():
    matrix = pseudo_gradients((256, 64), rounds=1)[0]
    assert torch.equal(in_tiles(matrix).flatten(), matrix.flatten())


def test_packing_of_sparse_loco_is_undone():
    tiles = in_tiles(pseudo_gradients((256, 64), rounds=1)[0])
    indices = largest(tiles)
    values = tiles.gather(1, indices)
    codes, centroids = quantised(values)
    assert torch.equal(from_12_bits(in_12_bits(indices)), indices.flatten())
    assert torch.equal(from_2_bits(in_2_bits(codes)), codes.flatten())
    assert (values - centroids[codes]).square().sum() < values.square().sum()


def test_two_centroids_of_sparse_loco_are_in_use_for_the_tails_of_a_normal_distribution():
    tiles = torch.randn(256, CHUNK, generator=torch.Generator().manual_seed(0))
    values = tiles.gather(1, largest(tiles))
    codes, centroids = quantised(values)
    assert codes.unique().tolist() == [1, 3]
    lost = (values - centroids[codes]).square().sum() / values.square().sum()
    assert lost == pytest.approx(0.012, abs=0.001)


@pytest.mark.parametrize("laplace", [False, True])
def test_a_message_takes_fewer_bits_a_parameter_than_that_of_sparse_loco(laplace):
    matrix = pseudo_gradients((8192, 64), rounds=1, laplace=laplace)[0]
    theirs = 8 * message_of_sparse_loco(matrix).numel() / matrix.numel()
    sender = Sender(ErrorFeedback(TopK(K / CHUNK, "int2", CHUNK), decay=DECAY))
    ours = 8 * sender.compress({"w": matrix}).numel() / matrix.numel()
    assert theirs == pytest.approx(0.219, abs=0.0005)
    assert ours == pytest.approx(0.152, abs=0.002)
