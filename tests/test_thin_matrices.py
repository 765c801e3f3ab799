"""Look-back subspaces on matrices with few rows or columns, such as the factors of LoRA."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lbgm_compress import ErrorFeedback, LookBackSubspace, PayloadError, TopK
from lbgm_compress.wire.message import Kind
from lbgm_compress.wire.values import PRECISIONS, values_size
from tests.laws import assert_same_bits, check_laws

# Payloads of release 0.1 for three rounds, and the share of the gradient that they missed.
EARLIER = {
    (4, 16): (
        "0904a9bb4a3d36ff4bf4444fb4fff982613dc3ccd1cccccc1dcc38d4e43d81789c899998c987934bc73d175aa6"
        "7866876aa53aa6bc3e1cbb97e49b76a99a",
        "0d01042064513d383581d17dede81d5d59933e86c77ca86a9888391dd6",
        "0d01059e68793d69e1d842ba4e9cb521cc983eb9877c69aaa5b8b7787ae3f4",
    ),
    (16, 4): (
        "012549123e41aba7131d7975dfdb5652bcb8242e8a85e1eb5753bdb9353f9b96f2fc6864ce",
        "012549123e8185e7eb5d53b5b93b3f9296f8fc6e64c5ca4b41a3a7191d7f75d6db5c52b4b8",
        "012549123ec16e47c5ad4b15a37b19d27f58d6be5c25b48b2ae38159e7bf5d36b59c3bf492",
    ),
}
EARLIER_MISSED = {(4, 16): (0.0075, 0.4064, 0.2503), (16, 4): (0.0042, 0.0048, 0.0046)}


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def earlier_gradient(shape, round_):
    """Return the gradient of a round of `EARLIER`."""
    rows, columns = torch.meshgrid(*map(torch.arange, shape), indexing="ij")
    return ((7 * rows + 3 * columns**2 + 5 * round_ * columns) % 17 - 8) / 8


def missed(grad, decoded):
    return float((grad - decoded).double().square().sum() / grad.double().square().sum())


@st.composite
def thin(draw):
    """Return a compressor, and a matrix in which it finds no directions."""
    rank = draw(st.integers(2, 16))
    tall = draw(st.booleans())
    short = draw(st.integers(2, 4 * rank if tall else rank))
    times = 8 if short > rank else 1
    least = rank * short // (short - 1) + 1
    least = max(least, times * short + tall)
    long = draw(st.integers(least, least + 300))
    compressor = LookBackSubspace(
        rank,
        draw(st.sampled_from([0.0, 0.3, 0.9, 0.99, 1.0])),
        refresh=draw(st.integers(1, rank)),
        values=draw(st.sampled_from(sorted(PRECISIONS.keys() - {"sign"}))),
    )
    grad = normal(*((long, short) if tall else (short, long)), seed=draw(st.integers(0, 1000)))
    # From entries of like size to a few that are far larger than the others.
    grad = grad.sign() * grad.abs() ** draw(st.sampled_from([0.1, 1.0, 5.0]))
    dtype = draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64]))
    return compressor, grad.to(dtype)


@settings(max_examples=150, deadline=None)
@given(thin())
def test_a_thin_matrix_is_never_longer_than_in_full_and_decodes_bit_for_bit(case):
    compressor, grad = case
    payload, decoded, state = compressor.compress(grad, {})
    assert payload.numel() <= 1 + values_size(grad.numel(), compressor.values, grad.dtype)
    assert state == {}
    found, held = compressor.decompress(payload, {}, torch.zeros_like(grad))
    assert_same_bits(found, decoded)
    assert held == {}


@settings(max_examples=60, deadline=None)
@given(thin())
def test_a_thin_matrix_costs_what_top_k_costs_for_the_same_error(case):
    compressor, grad = case
    payload, decoded, _ = compressor.compress(grad, {})
    if payload.numel() == 1 + values_size(grad.numel(), compressor.values, grad.dtype):
        return
    count = int(decoded.count_nonzero())
    same = [TopK(k / grad.numel(), compressor.values) for k in range(count, grad.numel())]
    assert any(torch.equal(payload, top.compress(grad, {})[0]) for top in same)


@pytest.mark.parametrize("delta", [0.1, 0.5, 0.9, 0.97])
@pytest.mark.parametrize("shape", [(4, 300), (300, 4), (300, 32)])
def test_the_fewest_entries_that_the_threshold_allows_are_sent(shape, delta):
    grad = normal(*shape)
    payload, decoded, _ = LookBackSubspace(8, delta, values="float32").compress(grad, {})
    squares = np.sort(grad.double().square().numpy().reshape(-1))[::-1].cumsum()
    fewest = 1 + int(np.argmax(squares >= (1 - delta) * squares[-1]))
    assert int(decoded.count_nonzero()) == fewest
    assert missed(grad, decoded) <= delta
    assert payload[0] == Kind.BODY


def test_both_factors_of_an_adapter_cost_the_same():
    compressor = LookBackSubspace(8, values="int4")
    grad = normal(4, 1000)
    wide, tall = (compressor.compress(g, {})[0].numel() for g in (grad, grad.T.contiguous()))
    # Positions are coded, so that their sizes differ a little.
    assert abs(wide - tall) < 8
    assert wide < 0.06 * values_size(4000, "int4", torch.float32)


@pytest.mark.parametrize("shape", [(4, 200), (200, 4), (200, 16), (8, 30, 5)])
@pytest.mark.parametrize("values", ["float32", "int8", "int4"])
def test_error_feedback_returns_all_that_thin_matrices_miss(shape, values):
    compressor, state = ErrorFeedback(LookBackSubspace(8, values=values)), {}
    total, sent = torch.zeros(shape), torch.zeros(shape)
    for number in range(400):
        grad = normal(*shape, seed=number % 7)
        _, decoded, state = compressor.compress(grad, state)
        total, sent = total + grad, sent + decoded
    assert torch.allclose(total - sent, state["residual"], atol=1e-2)
    assert missed(total, sent) < 0.02


@pytest.mark.parametrize(
    "compressor",
    [
        LookBackSubspace(8, values="int4"),
        LookBackSubspace(8, 0.5, refresh=8, values="int2"),
        ErrorFeedback(LookBackSubspace(4, 0.9, values="float16")),
    ],
    ids=repr,
)
def test_laws_hold_on_thin_matrices(compressor):
    shapes = {"a": (4, 200), "b": (200, 4), "c": (300, 8), "small": (4, 20), "same": (4, 20)}
    run = [
        {
            name: normal(*shape, seed=10 * number + i)
            for i, (name, shape) in enumerate(shapes.items())
        }
        for number in range(4)
    ]
    run[2]["a"] = torch.zeros(4, 200)
    run[3]["b"][7, 1] = float("inf")
    check_laws(compressor, run)


@pytest.mark.parametrize("shape", [(3, 3), (4, 5), (20,), (1, 50), (8, 9)])
def test_too_small_tensors_go_in_full_as_before(shape):
    payload, _, _ = LookBackSubspace(8).compress(normal(*shape), {})
    assert payload.numel() == 1 + values_size(normal(*shape).numel(), "int8", torch.float32)


@pytest.mark.parametrize("shape", [(16, 300), (300, 33), (200, 32), (10, 784), (64, 27)])
def test_matrices_with_more_rows_than_directions_have_directions(shape):
    payload, _, state = LookBackSubspace(8).compress(normal(*shape), {})
    assert payload[0] == Kind.SETS | Kind.BODY
    assert len(state["directions"]) == 8


@pytest.mark.parametrize("shape", EARLIER)
def test_messages_of_the_release_that_sent_directions_or_everything_decode(shape):
    compressor, held = LookBackSubspace(8, 0.1, values="int4"), {}
    for round_, text in enumerate(EARLIER[shape]):
        grad = earlier_gradient(shape, round_)
        payload = torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)
        decoded, held = compressor.decompress(payload, held, grad)
        assert missed(grad, decoded) == pytest.approx(EARLIER_MISSED[shape][round_], abs=1e-4)


def test_states_that_hold_directions_of_a_thin_matrix_go_on():
    """Such a state of a sender or a receiver was saved by an earlier release."""
    compressor, held = LookBackSubspace(8, 0.1, values="int4"), {}
    payload = torch.frombuffer(bytearray.fromhex(EARLIER[4, 16][0]), dtype=torch.uint8)
    _, held = compressor.decompress(payload, held, torch.zeros(4, 16))
    sender = {**held, "ahead": normal(0, 16)}
    for round_ in (1, 2):
        payload, decoded, sender = compressor.compress(earlier_gradient((4, 16), round_), sender)
        assert payload[0] == Kind.BODY
        found, held = compressor.decompress(payload, held, decoded)
        assert_same_bits(found, decoded)


@pytest.mark.parametrize(
    ("shape", "payload", "message"),
    [
        ((4, 100), b"\x01\xff\x7f", "16383 entries in the payload, at most 400"),
        ((4, 100), b"\x01\x03", "values"),
        ((100, 4), b"\x09\x01" + bytes(100), "kind 9 is not for shape"),
        ((100, 4), b"\x01" + bytes(500), "500 bytes of values"),
    ],
)
def test_impossible_payloads_of_thin_matrices_are_named(shape, payload, message):
    data = torch.frombuffer(bytearray(payload), dtype=torch.uint8)
    with pytest.raises(PayloadError, match=message):
        LookBackSubspace(8, values="int4").decompress(data, {}, torch.zeros(shape))
