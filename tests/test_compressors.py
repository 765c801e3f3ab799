"""The payloads and decoded tensors of each compressor."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lbgm_compress import (
    LBGM,
    Atomo,
    ErrorFeedback,
    Identity,
    PayloadError,
    Receiver,
    Sender,
    SignSGD,
    TopK,
)
from tests.gradients import training_run


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("n", [1, 2, 10, 1000, 4095, 4096, 25_000, 16384 * 3 + 5, 300_000])
@pytest.mark.parametrize("ratio", [1e-5, 0.001, 0.01, 0.1, 0.5, 1.0])
def test_topk_keeps_exactly_the_largest_magnitudes(n, ratio):
    grad = normal(n)
    decoded = TopK(ratio).compress(grad, {})[1]
    k = max(1, round(ratio * n))
    order = np.argsort(-np.abs(grad.numpy()), kind="stable")[:k]
    expected = torch.zeros(n)
    expected[order] = grad[order]
    assert torch.equal(decoded, expected)


@pytest.mark.parametrize("values", [[0.5], [0.5, 1.0], [0.0, 0.5], [0.0, -1.0, 1.0, 2.0]])
def test_topk_takes_the_first_of_equal_magnitudes(values):
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randint(len(values), (200_000,), generator=generator)
    grad = torch.tensor(values)[chosen]
    decoded = TopK(0.1).compress(grad, {})[1]
    order = np.argsort(-np.abs(grad.numpy()), kind="stable")[:20_000]
    expected = torch.zeros(200_000)
    expected[order] = grad[order]
    assert torch.equal(decoded, expected)


def test_topk_sends_no_zeros():
    grad = torch.zeros(10_000)
    grad[[3, 77]] = 1.5
    assert TopK(0.5).compress(grad, {})[0].numel() < 20


def largest_of_chunks(grad, ratio, chunk):
    """Return `grad` with the largest magnitudes of each chunk, the first of equal ones."""
    kept = torch.zeros_like(grad)
    for start in range(0, grad.numel(), chunk):
        part = grad[start : start + chunk]
        k = max(1, round(ratio * part.numel()))
        order = np.argsort(-np.abs(part.numpy()), kind="stable")[:k]
        kept[start + order] = part[order]
    return kept


@pytest.mark.parametrize(
    ("n", "chunk"),
    [
        *((1, 1), (5, 2), (1000, 1), (65, 64), (1000, 7), (1025, 64), (4096, 1000), (4097, 4096)),
        *((25_000, 64), (25_000, 4096), (99_999, 1000), (99_999, 33_333), (5000, 10**9)),
    ],
)
@pytest.mark.parametrize("ratio", [1e-5, 1 / 64, 0.1, 0.5, 1.0])
def test_topk_keeps_exactly_the_largest_magnitudes_of_each_chunk(n, chunk, ratio):
    normals = normal(n)
    crowded = normals * (torch.arange(n) % 3 == 0) * 10.0 ** (torch.arange(n) % 50 // 10)
    few_values = torch.tensor([0.0, 0.0, -1.0, 1.0, 2.0])[(normals.abs() * 1e4).long() % 5]
    gaps = torch.where(torch.arange(n) // 500 % 2 == 0, normals, torch.zeros(()))
    for grad in (normals, normals.double(), crowded, few_values, gaps):
        decoded = TopK(ratio, "float64", chunk).compress(grad, {})[1]
        assert torch.equal(decoded, largest_of_chunks(grad, ratio, chunk))


def test_one_chunk_is_the_tensor():
    grad = normal(30, 40)
    for chunk in (1200, 10**6):
        compressors = TopK(0.1, chunk=chunk), TopK(0.1)
        payloads = [compressor.compress(grad, {})[0] for compressor in compressors]
        assert torch.equal(*payloads)


def test_chunks_are_of_consecutive_elements_whatever_the_order_in_memory():
    grad = normal(64, 50)
    expected = TopK(0.1, chunk=100).compress(grad, {})
    found = TopK(0.1, chunk=100).compress(grad.T.contiguous().T, {})
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


def test_more_entries_than_all_chunks_have_are_refused():
    like = torch.zeros(1000)
    whole = TopK(0.5).compress(normal(1000), {})[0]
    with pytest.raises(PayloadError, match="500 entries in the payload, at most 496 expected"):
        TopK(0.496, chunk=125).decompress(whole, {}, like)


@pytest.mark.parametrize(
    ("values", "error"), [("float16", 3e-4), ("bfloat16", 2e-3), ("int8", 8e-3)]
)
@pytest.mark.parametrize("scale", [1e-12, 1e-7, 1.0, 1e10])
def test_topk_values_lose_no_more_than_their_precision(values, error, scale):
    grad = normal(100_000) * scale
    exact = TopK(0.01).compress(grad, {})[1]
    decoded = TopK(0.01, values).compress(grad, {})[1]
    assert (decoded - exact).norm() <= error * exact.norm()


def test_signs_count_zero_as_plus_one():
    grad = torch.tensor([0.0, -0.0, -1e-30, 5.0])
    assert SignSGD().compress(grad, {})[1].tolist() == [1, 1, -1, 1]


def test_scaled_signs_carry_the_mean_magnitude():
    grad = normal(1000)
    decoded = SignSGD(scaled=True).compress(grad, {})[1]
    assert torch.allclose(decoded.abs(), grad.abs().mean())


def test_vote_is_the_sign_of_the_average():
    mean = torch.tensor([0.2, -0.6, 0.0])
    assert SignSGD(vote=True).finish(mean).tolist() == [1, -1, 0]
    assert SignSGD().finish(mean) is mean
    assert ErrorFeedback(SignSGD(vote=True)).finish(mean).tolist() == [1, -1, 0]


def test_a_vote_finishes_the_average_also_inside_other_compressors():
    vote = SignSGD(vote=True)
    for compressor in (vote, LBGM(vote), ErrorFeedback(LBGM(vote))):
        assert compressor.finishes_average
    for compressor in (SignSGD(), LBGM(), ErrorFeedback(TopK(0.1))):
        assert not compressor.finishes_average


@pytest.mark.parametrize("shape", [(64, 200), (200, 64), (16, 8, 5, 5), (400, 700)])
@pytest.mark.parametrize("rank", [1, 3])
def test_atomo_is_the_best_approximation_of_its_rank(shape, rank):
    decay = torch.diag(0.7 ** torch.arange(min(shape[0], normal(*shape)[0].numel())).float())
    m, n = shape[0], normal(*shape)[0].numel()
    left, right = (
        torch.linalg.qr(normal(m, len(decay)))[0],
        torch.linalg.qr(normal(n, len(decay)))[0],
    )
    grad = (left @ decay @ right.T).reshape(shape)
    decoded = Atomo(rank).compress(grad, {})[1]
    best = decay.diagonal()[rank:].norm()
    assert (decoded - grad).norm() <= 1.01 * best
    assert torch.linalg.matrix_rank(decoded.reshape(m, n), rtol=1e-4) == rank


def test_atomo_sends_small_and_flat_tensors_as_they_are():
    for grad in (normal(), normal(50), normal(3, 4), normal(0, 4)):
        assert torch.equal(Atomo(2).compress(grad, {})[1], grad)


def test_sampled_atomo_is_unbiased_and_keeps_its_budget():
    grad = normal(12, 30)
    compressor = Atomo(3, unbiased=True)
    state, total, sizes, rounds = compressor.initial_state(7), torch.zeros(12, 30), 0, 4000
    for _ in range(rounds):
        payload, decoded, state = compressor.compress(grad, state)
        total += decoded
        sizes += (payload.numel() - 2) / (4 * (12 + 30))
    assert abs(sizes / rounds - 3) < 0.1
    spread = (decoded - grad).norm() / grad.norm()
    assert (total / rounds - grad).norm() / grad.norm() < 4 * spread / rounds**0.5


def test_sampled_atomo_differs_by_seed_and_round():
    grad, compressor = normal(12, 30), Atomo(3, unbiased=True)
    first = compressor.compress(grad, compressor.initial_state(1))
    other = compressor.compress(grad, compressor.initial_state(2))
    second = compressor.compress(grad, first[2])
    assert not torch.equal(first[1], other[1])
    assert not torch.equal(first[1], second[1])


@pytest.mark.parametrize("inner", [TopK(0.05), SignSGD(scaled=True), Atomo(1)], ids=repr)
def test_error_feedback_delivers_everything_in_the_end(inner):
    compressor, state = ErrorFeedback(inner), {}
    sent = given = torch.zeros(32, 64)
    for grads in training_run(100):
        _, decoded, state = compressor.compress(grads["hidden.weight"], state)
        sent, given = sent + decoded, given + grads["hidden.weight"]
        assert torch.allclose(sent + state["residual"], given, atol=1e-5)


@pytest.mark.parametrize("size", [60, 5000])
def test_decay_multiplies_the_residual(size):
    compressor = ErrorFeedback(TopK(0.1), decay=0.75)
    first, second = normal(size), normal(size, seed=1)
    residual = first - TopK(0.1).compress(first, {})[1]
    _, _, state = compressor.compress(first, {})
    assert torch.equal(state["residual"], residual)
    corrected = second + 0.75 * residual
    expected = TopK(0.1).compress(corrected, {})[1]
    _, decoded, state = compressor.compress(second, state)
    assert torch.equal(decoded, expected)
    assert torch.equal(state["residual"], corrected - expected)


@pytest.mark.parametrize("size", [60, 5000])
def test_a_zero_gradient_neither_sends_the_residual_nor_lets_it_decay(size):
    compressor = ErrorFeedback(TopK(0.1), decay=0.75)
    _, _, state = compressor.compress(normal(size), {})
    payload, decoded, after = compressor.compress(torch.zeros(size), state)
    assert payload.tolist() == [0]
    assert not decoded.any()
    assert torch.equal(after["residual"], state["residual"])


def test_decay_of_one_is_the_default():
    assert repr(ErrorFeedback(TopK(0.1), decay=1.0)) == "ErrorFeedback(TopK(0.1))"
    assert ErrorFeedback(TopK(0.1), 1) == ErrorFeedback(TopK(0.1))
    assert repr(ErrorFeedback(TopK(0.1), 0.95)) == "ErrorFeedback(TopK(0.1), decay=0.95)"


def test_ends_with_different_decay_or_chunks_refuse_each_other():
    grads = {"w": normal(1000)}
    for sender, receiver in [
        (ErrorFeedback(TopK(0.1), 0.95), ErrorFeedback(TopK(0.1))),
        (TopK(0.1, chunk=64), TopK(0.1)),
    ]:
        message = Sender(sender).compress(grads)
        with pytest.raises(PayloadError):
            Receiver(receiver, grads).decompress(0, message)


def test_residual_of_half_precision_is_kept_in_float32():
    compressor = ErrorFeedback(TopK(0.5))
    _, _, state = compressor.compress(torch.tensor([1.0, 256.0]).bfloat16(), {})
    for _ in range(20):
        grad = torch.tensor([0.01, 256.0]).bfloat16()
        _, _, state = compressor.compress(grad, state)
    expected = 1.0 + 20 * float(torch.tensor(0.01).bfloat16())
    assert state["residual"][0].item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: TopK(0), "ratio must be above 0"),
        (lambda: TopK(2), "ratio must be above 0 and at most 1, not 2"),
        (lambda: TopK(float("nan")), "ratio"),
        (lambda: TopK("1%"), "ratio must be a number"),
        (lambda: TopK(0.1, "int7"), "values must be one of"),
        (lambda: TopK(0.1, chunk=0), "chunk must be a whole number of at least 1, not 0"),
        (lambda: TopK(0.1, chunk=64.0), "chunk must be a whole number of at least 1, not 64.0"),
        (lambda: TopK(0.1, chunk=True), "chunk must be a whole number"),
        (lambda: Atomo(0), "rank must be"),
        (lambda: Atomo(1.5), "rank must be"),
        (lambda: SignSGD(scaled=1), "scaled must be"),
        (lambda: SignSGD(scaled=True, vote=True), "discards the scales"),
        (lambda: ErrorFeedback(0.1), "wraps a compressor"),
        (lambda: ErrorFeedback(TopK(0.1), 0), "decay must be above 0 and at most 1, not 0"),
        (lambda: ErrorFeedback(TopK(0.1), 1.01), "decay must be above 0 and at most 1, not 1.01"),
        (lambda: ErrorFeedback(TopK(0.1), float("nan")), "decay must be above 0"),
        (lambda: ErrorFeedback(TopK(0.1), True), "decay must be a number, not True"),
    ],
)
def test_bad_hyper_parameters_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize(
    ("grad", "message"),
    [
        (torch.arange(5), "int64"),
        (torch.zeros(3, dtype=torch.complex64), "complex64"),
        (torch.eye(3).to_sparse(), "call .to_dense"),
        ([1.0, 2.0], "must be a torch.Tensor, not list"),
    ],
)
def test_what_is_no_dense_floating_point_tensor_is_refused(grad, message):
    with pytest.raises(TypeError, match=message):
        Identity().compress(grad, {})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(
    "compressor",
    [TopK(0.01), TopK(0.01, chunk=4096), SignSGD(scaled=True), Atomo(2)],
    ids=repr,
)
def test_payload_made_on_a_gpu_decodes_there_and_on_the_cpu(compressor):
    grad = normal(300, 200).cuda()
    payload, decoded, _ = compressor.compress(grad, {})
    assert payload.is_cuda
    assert torch.equal(compressor.decompress(payload, {}, grad)[0], decoded)
    on_cpu = compressor.decompress(payload.cpu(), {}, grad.cpu())[0]
    assert torch.allclose(on_cpu, decoded.cpu(), atol=1e-5)
