"""Look-back subspaces against exact linear algebra and LBGM, and difficult cases."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lbgm_compress import (
    ErrorFeedback,
    LookBackSubspace,
    OutOfSyncError,
    PayloadError,
    Receiver,
    Sender,
)
from lbgm_compress.wire.message import Kind
from tests.gradients import training_run
from tests.laws import assert_same_bits
from tests.test_lbgm import PaperAlgorithm1

FULL, RECYCLED = Kind.SETS | Kind.BODY, Kind.USES | Kind.BODY
REFRESHED = Kind.USES | Kind.SETS | Kind.BODY


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def low_rank(m, n, rank, seed=0):
    return normal(m, rank, seed=seed) @ normal(rank, n, seed=seed + 1000)


def kind(payload):
    return int(payload[0])


def missed(grad, decoded):
    return float((grad - decoded).double().square().sum() / grad.double().square().sum())


@pytest.mark.parametrize("delta", [0.01, 0.05, 0.2, 0.5, 0.9])
@pytest.mark.parametrize("batch", [None, 32])
def test_one_row_of_rank_one_is_lbgm(delta, batch):
    compressor = LookBackSubspace(1, delta, view="flat", values="float32")
    recycled_rounds = 0
    run = training_run(100, batch)
    for name in run[0]:
        paper, state, held = PaperAlgorithm1(delta), {}, {}
        for grads in run:
            recycled, expected = paper.round(grads[name])
            payload, decoded, state = compressor.compress(grads[name], state)
            tensor, held = compressor.decompress(payload, held, decoded)
            assert (payload.numel() == 5) == recycled
            found = tensor.double().numpy().reshape(-1)
            assert np.linalg.norm(found - expected) <= 1e-6 * np.linalg.norm(expected)
            recycled_rounds += recycled
    if batch is None:
        assert recycled_rounds > 0


def test_decision_near_the_threshold_is_that_of_exact_arithmetic():
    basis, other = normal(200_000), normal(200_000, seed=1)
    for seed in range(20):
        grad = basis + float(torch.rand((), generator=torch.Generator().manual_seed(seed))) * other
        unit = LookBackSubspace(1, 1.0, view="flat", values="float32").compress(basis, {})[2]
        held = unit["directions"].view(torch.float32)[0].double()
        exact = grad.double()
        error = 1 - (exact @ held) ** 2 / ((exact @ exact) * (held @ held))
        for nudge in (-1e-9, 1e-9):
            compressor = LookBackSubspace(1, float(error) + nudge, view="flat", values="float32")
            assert (kind(compressor.compress(grad, unit)[0]) == RECYCLED) == (nudge > 0)


def test_several_look_back_gradients_recycle_what_one_does_not():
    a, b = normal(500), normal(500, seed=1)
    rounds = [a, b, 0.3 * a - 2 * b, a + b, b]
    kinds = {}
    for rank in (1, 2):
        compressor, state = LookBackSubspace(rank, 0.1, view="flat", values="float32"), {}
        kinds[rank] = []
        for grad in rounds:
            payload, decoded, state = compressor.compress(grad, state)
            kinds[rank].append(kind(payload))
            assert missed(grad, decoded) < (0.1 if kinds[rank][-1] == RECYCLED else 1e-10)
    assert kinds[1] == [FULL, REFRESHED, RECYCLED, REFRESHED, REFRESHED]
    assert kinds[2] == [FULL, REFRESHED, RECYCLED, RECYCLED, RECYCLED]


@pytest.mark.parametrize("shape", [(40, 90), (90, 40), (300, 700), (64, 3, 7, 7)])
def test_first_message_captures_what_the_leading_singular_vectors_do(shape):
    grad = normal(*shape) + 3 * low_rank(shape[0], normal(*shape)[0].numel(), 3).view(shape)
    compressor = LookBackSubspace(4, values="float32")
    payload, decoded, _ = compressor.compress(grad, {})
    sigma = torch.linalg.svdvals(grad.reshape(shape[0], -1).double())
    best = float(sigma[4:].square().sum() / sigma.square().sum())
    assert kind(payload) == FULL
    assert best - 1e-5 < missed(grad, decoded) < 1.02 * best


def test_sends_nothing_for_directions_that_the_matrix_does_not_have():
    grad = low_rank(30, 50, 2)
    payload, decoded, state = LookBackSubspace(4, values="float32").compress(grad, {})
    assert state["directions"].shape == (2, 200)
    assert missed(grad, decoded) < 1e-10
    # A direction is added when the matrix has it, and not before.
    payload, decoded, state = LookBackSubspace(4, 0.5, values="float32").compress(grad, state)
    assert kind(payload) == RECYCLED
    more = grad + 5 * low_rank(30, 50, 1, seed=5)
    payload, decoded, state = LookBackSubspace(4, 0.01, values="float32").compress(more, state)
    assert kind(payload) == REFRESHED
    assert state["directions"].shape == (3, 200)
    assert missed(more, decoded) < 1e-6


@pytest.mark.parametrize("refresh", [1, 2])
def test_a_refresh_is_as_good_as_the_singular_vectors_of_what_is_missed(refresh):
    """The matrices turn slowly and have noise; the comparison is with an exact decomposition."""
    compressor = LookBackSubspace(4, 0.0, refresh=refresh, values="float32")
    state, left = {}, normal(60, 6)
    right, turn = normal(6, 120, seed=1), normal(6, 120, seed=2)
    excess = []
    for number in range(30):
        grad = left @ (right + 0.05 * number * turn) + 2 * normal(60, 120, seed=10 + number)
        before = state.get("directions")
        payload, decoded, state = compressor.compress(grad, state)
        if number == 0:
            continue
        assert kind(payload) == REFRESHED
        held = before.view(torch.float32).double()
        new = state["directions"].view(torch.float32).double()
        kept = held[[i for i in range(4) if torch.equal(held[i], new[i])]]
        assert len(kept) == 4 - refresh
        basis = torch.linalg.qr(kept.T).Q
        residual = grad.double() - grad.double() @ basis @ basis.T
        best = torch.linalg.svdvals(residual)[:refresh].square().sum()
        left_over = residual.square().sum() - best
        excess.append(float((grad - decoded).double().square().sum() / left_over))
    assert min(excess) > 1 - 1e-6
    assert sum(excess) / len(excess) < 1.01


def test_the_weakest_direction_goes():
    compressor = LookBackSubspace(2, 0.05, values="float32")
    strong, weak, new = (
        torch.outer(normal(20, seed=s), torch.nn.functional.one_hot(torch.tensor(s), 30).float())
        for s in (1, 2, 3)
    )
    _, _, state = compressor.compress(3 * strong + 2 * weak, {})
    payload, _, state = compressor.compress(2 * strong + 0.1 * weak + 3 * new, state)
    assert kind(payload) == REFRESHED
    directions = state["directions"].view(torch.float32).abs()
    assert sorted(directions.argmax(1).tolist()) == [1, 3]


def test_coefficients_are_those_of_least_squares_on_the_decoded_directions():
    compressor = LookBackSubspace(4, 1.0, values="int4")
    _, _, state = compressor.compress(normal(50, 80), {})
    grad = normal(50, 80, seed=1)
    payload, decoded, after = compressor.compress(grad, state)
    assert kind(payload) == RECYCLED
    assert_same_bits(after["directions"], state["directions"])
    # The directions as receivers decode them, from a payload of coefficients alone.
    span = torch.linalg.svd(decoded.double(), full_matrices=False)
    basis = span.Vh[1e-4 * span.S[0] < span.S]
    assert len(basis) == 4
    exact = grad.double() @ basis.T @ basis
    # Four bits lose about a hundredth of the energy of the coefficients, not more.
    assert missed(exact, decoded.double()) < 0.03


def test_two_directions_that_are_almost_parallel_do_no_harm():
    compressor = LookBackSubspace(2, 1.0, values="float32")
    a, b = normal(1, 40)[0], normal(1, 40, seed=1)[0]
    near = torch.stack([a / a.norm(), a / a.norm() + 1e-6 * b])
    state = {"directions": near.view(torch.uint8), "ahead": normal(1, 40, seed=2)}
    grad = normal(20, 1, seed=3) @ a[None] + 0.1 * normal(20, 40, seed=4)
    payload, decoded, _ = compressor.compress(grad, state)
    assert kind(payload) == RECYCLED
    coefficients = payload[1:].clone().view(torch.float32)
    assert float(coefficients.abs().max()) < 10 * float(grad.norm())
    unit = a / a.norm()
    assert torch.allclose(decoded, torch.outer(grad @ unit, unit), atol=1e-4)


def test_bad_starts_do_not_stop_a_refresh():
    """All directions that a sender holds are orthogonal to the later matrices."""
    for values in ("float32", "int2"):
        compressor = ErrorFeedback(LookBackSubspace(2, 0.9, values=values))
        state = {}
        early = torch.zeros(20, 40)
        early[:, :10] = normal(20, 10)
        late = torch.zeros(20, 40)
        late[:, 20:] = low_rank(20, 20, 1, seed=3)
        _, _, state = compressor.compress(early, state)
        total = torch.zeros(20, 40)
        for _ in range(6):
            _, decoded, state = compressor.compress(late, state)
            total += decoded
        assert missed(6 * late + early, total) < 0.5


@pytest.mark.parametrize("values", ["float32", "float16", "bfloat16", "int8", "int4", "int2"])
def test_error_feedback_returns_all_that_is_missed(values):
    compressor, state = ErrorFeedback(LookBackSubspace(2, 0.9, values=values)), {}
    total, sent = torch.zeros(20, 30), torch.zeros(20, 30)
    for number in range(300):
        grad = low_rank(20, 30, 3, seed=number % 7)
        _, decoded, state = compressor.compress(grad, state)
        total, sent = total + grad, sent + decoded
    assert torch.allclose(total - sent, state["residual"], atol=1e-2)
    assert missed(total, sent) < 0.02


def test_zero_matrices_cost_one_byte_and_change_nothing():
    compressor, zero = LookBackSubspace(2), torch.zeros(20, 30)
    payload, decoded, state = compressor.compress(zero, {})
    assert (payload.numel(), state) == (1, {})
    assert torch.equal(decoded, zero)
    _, _, state = compressor.compress(normal(20, 30), state)
    payload, decoded, after = compressor.compress(zero, state)
    assert payload.numel() == 1
    assert_same_bits(after, state)
    tensor, held = compressor.decompress(payload, {}, zero)
    assert torch.equal(tensor, zero)
    assert held == {}


@pytest.mark.parametrize("scale", [1e-38, 1e-25, 1e-18, 1e18, 1e30, 1e37])
def test_very_small_and_very_large_gradients_are_recycled_alike(scale):
    compressor = LookBackSubspace(4, 0.3, values="float32")
    grad = low_rank(20, 30, 4) / 20
    _, _, state = compressor.compress(grad * scale, {})
    payload, decoded, _ = compressor.compress(grad * (-0.5 * scale), state)
    assert kind(payload) == RECYCLED
    assert torch.allclose(decoded / scale, -0.5 * grad, atol=1e-2)


def test_small_tensors_go_in_values_precision():
    sizes = {
        (): 1 + 1 + 4,
        (300,): 1 + 300 + 8,
        (2, 3): 1 + 6 + 4,
        (4, 5, 1): 1 + 20 + 4,
    }
    for shape, size in sizes.items():
        payload, decoded, _ = LookBackSubspace(4).compress(normal(*shape), {})
        assert payload.numel() == size
        assert missed(normal(*shape), decoded) < 1e-3


@pytest.mark.parametrize(("values", "bits"), [("float32", 32), ("int8", 8), ("int4", 4)])
def test_a_recycled_round_sends_coefficients_and_a_refresh_one_direction_more(values, bits):
    compressor = LookBackSubspace(4, 1.0, values=values)

    def section(count):
        return count * bits // 8 + (0 if bits == 32 else 4 * -(-count // 256))

    payload, _, state = compressor.compress(normal(64, 512), {})
    assert payload.numel() == 1 + 1 + 4 * section(512) + section(4 * 64)
    payload, _, _ = compressor.compress(normal(64, 512, seed=1), state)
    assert payload.numel() == 1 + section(4 * 64)
    payload, _, _ = LookBackSubspace(4, 0.1, values=values).compress(normal(64, 512), state)
    assert payload.numel() in (
        1 + section(4 * 64),
        1 + 2 + section(512) + section(4 * 64),
    )


def test_receiver_holds_the_directions_in_wire_precision():
    grads = {"x": normal(256, 1024)}
    compressor = LookBackSubspace(4, 0.9, values="int8")
    sender, receiver = Sender(compressor), Receiver(compressor, grads)
    for seed in range(5):
        receiver.decompress(0, sender.compress({"x": normal(256, 1024, seed=seed)}))
    [entry] = receiver.state_dict()["senders"][0].values()
    assert entry["state"].keys() == {"directions"}
    assert entry["state"]["directions"].untyped_storage().nbytes() == 4 * (1024 + 16)


def test_reports_refreshed_rounds_as_not_recycled():
    sender = Sender(LookBackSubspace(2, 0.5))
    sender.compress({"x": low_rank(20, 30, 2)})
    sender.compress({"x": low_rank(20, 30, 2)})
    assert sender.report()["x"].recycled
    sender.compress({"x": normal(20, 30, seed=9)})
    assert not sender.report()["x"].recycled
    assert sender.report()["x"].phase_error > 0.5


def test_directions_that_are_not_held_are_asked_for():
    compressor, grad = LookBackSubspace(2, 1.0), normal(20, 30)
    _, _, state = compressor.compress(grad, {})
    payload, _, _ = compressor.compress(grad, state)
    with pytest.raises(OutOfSyncError, match="none are held"):
        compressor.decompress(payload, {}, grad)


@pytest.mark.parametrize(
    ("front", "message"),
    [
        (b"\x0d\x02\x00\x01", "2 directions in the payload, 1 to 1"),
        (b"\x0d\x00", "0 directions in the payload"),
        (b"\x0d\x01\x03", "replaces direction 3 of 2"),
        (b"\x09\x03", "3 directions in the payload, 1 to 2"),
        (b"\x01", "kind 1 is not for shape"),
        (b"\x04", "unknown kind"),
    ],
)
def test_impossible_payloads_are_named(front, message):
    compressor, grad = LookBackSubspace(2), normal(20, 30)
    payload, _, _ = compressor.compress(grad, {})
    _, held = compressor.decompress(payload, {}, grad)
    body = bytes(500) if front[0] & Kind.BODY else b""
    forged = torch.frombuffer(bytearray(front + body), dtype=torch.uint8)
    with pytest.raises(PayloadError, match=message):
        compressor.decompress(forged, held, grad)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 0}, "rank must be a whole number of at least 1, not 0"),
        ({"rank": 2.0}, "rank must be a whole number"),
        ({"delta": 1.1}, "delta must be from 0 to 1, not 1.1"),
        ({"delta": "0.9"}, "delta must be a number"),
        ({"view": "rows"}, "view must be"),
        ({"refresh": 5}, "refresh must be at most rank"),
        ({"refresh": True}, "refresh must be a whole number"),
        ({"values": "int3"}, "values must be one of"),
        ({"values": None}, "values must be one of"),
        ({"directions": "int3"}, "directions must be one of"),
    ],
)
def test_bad_parameters_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        LookBackSubspace(**arguments)
