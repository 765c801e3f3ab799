"""LBGM against the paper, and the cases that the paper leaves open."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import pytest
import torch

from lbgm_compress import (
    LBGM,
    Atomo,
    ErrorFeedback,
    Identity,
    NormBudget,
    OutOfSyncError,
    SignSGD,
    TopK,
)
from lbgm_compress.compressors.lbgm import LookBack
from lbgm_compress.decoded import Dense
from tests.gradients import training_run


class PaperAlgorithm1:
    """Algorithm 1 of arXiv 2202.00280 for one worker and tensor, in float64, line by line."""

    def __init__(self, delta):
        self.delta = delta
        self.worker = self.server = None

    def round(self, g):
        g = np.asarray(g, dtype=np.float64).reshape(-1)
        if self.worker is not None:
            cosine = g @ self.worker / (np.linalg.norm(g) * np.linalg.norm(self.worker))
            if 1 - cosine**2 <= self.delta:
                rho = g @ self.worker / np.linalg.norm(self.worker) ** 2
                return True, rho * self.server
        self.worker = self.server = g
        return False, g


@functools.cache
def compressed_run(inner, batch):
    """Return the gradients of the training run as a compressor decodes them."""
    return [
        {name: inner.compress(grad, {})[1] for name, grad in grads.items()}
        for grads in training_run(100, batch)
    ]


@pytest.mark.parametrize("delta", [0.01, 0.05, 0.2, 0.5, 0.9])
@pytest.mark.parametrize(
    "inner", [Identity(), TopK(0.1), SignSGD(), SignSGD(scaled=True), Atomo(2)], ids=repr
)
@pytest.mark.parametrize("batch", [None, 32])
def test_decisions_and_reconstruction_are_those_of_the_paper(delta, inner, batch):
    compressor = LBGM(inner, delta)
    recycled_rounds = 0
    run = training_run(100, batch)
    for name in run[0]:
        paper, state, held = PaperAlgorithm1(delta), {}, {}
        for number, grads in enumerate(run):
            recycled, expected = paper.round(compressed_run(inner, batch)[number][name])
            payload, decoded, state = compressor.compress(grads[name], state)
            tensor, held = compressor.decompress(payload, held, decoded)
            assert (payload.numel() == 5) == recycled
            found = tensor.double().numpy().reshape(-1)
            assert np.linalg.norm(found - expected) <= 1e-5 * np.linalg.norm(expected)
            recycled_rounds += recycled
    if batch is None:
        assert recycled_rounds > 0


@pytest.mark.parametrize("inner", [Identity(), TopK(0.1), ErrorFeedback(TopK(0.5))], ids=repr)
@pytest.mark.parametrize("delta", [0.2, 0.7, NormBudget(0.02)])
def test_public_decisions_make_the_payloads_that_compress_makes(inner, delta):
    compressor, run = LBGM(inner, delta), training_run(40)
    names = sorted(run[0])
    states = [{} for _ in names]
    inner_states, look_backs = [inner.initial_state(0) for _ in names], [None for _ in names]
    recycled = 0
    for grads in run:
        tensors = [grads[name] for name in names]
        expected = compressor.encode_batch(tensors, states)
        states = [encoding.state for encoding in expected]
        encodings = inner.encode_batch(tensors, inner_states)
        inner_states = [encoding.state for encoding in encodings]
        decisions = compressor.decide([encoding.decoded for encoding in encodings], look_backs)
        for i, (decision, encoding) in enumerate(zip(decisions, encodings, strict=True)):
            head, body = compressor.pack(decision, encoding, tensors[i].device)
            assert head == expected[i].head
            assert decision.phase_error == expected[i].phase_error
            assert (body is None) == decision.recycled
            if decision.recycled:
                recycled += 1
                applied = (look_backs[i].gradient * decision.rho).add_(0.0)
                assert torch.equal(applied, expected[i].decoded.dense())
            else:
                assert torch.equal(body(), expected[i].body())
                assert decision.rho == 1
                gradient = encoding.decoded.dense().clone()
                look_backs[i] = LookBack(gradient, decision.square_norm)
    assert 0 < recycled < len(run) * len(names)


def test_a_decision_that_holds_at_another_threshold_is_the_one_made_there():
    deltas = [0.02, 0.1, 0.3, 0.6, 0.95]
    held = 0
    for name in training_run(40, 32)[0]:
        run = [Dense(grads[name]) for grads in training_run(40, 32)]
        look_back = LookBack(run[0].tensor, float(run[0].tensor.square().sum()))
        for gradient in run[1:]:
            made = {d: LBGM(delta=d).decide([gradient], [look_back])[0] for d in deltas}
            for delta in deltas:
                for other in deltas:
                    if made[delta].holds_at(other):
                        held += 1
                        assert made[other].recycled == made[delta].recycled
                        assert made[other].rho == made[delta].rho
    assert held > 1000


def test_the_figures_depend_on_delta():
    sizes = []
    for delta in (0.0, 0.05, 0.2, 0.8):
        state, total = {}, 0
        for grads in training_run(100):
            payload, _, state = LBGM(delta=delta).compress(grads["hidden.weight"], state)
            total += payload.numel()
        sizes.append(total)
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] > 2 * sizes[-1]


def test_recycled_round_sends_one_scalar():
    compressor = LBGM()
    grad = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    payload, _, state = compressor.compress(grad, {})
    assert payload.numel() == 5 + 4000
    payload, decoded, _ = compressor.compress(-0.5 * grad, state)
    assert payload.numel() == 5
    assert torch.allclose(decoded, -0.5 * grad)


def test_decision_near_the_threshold_is_that_of_exact_arithmetic():
    generator = torch.Generator().manual_seed(0)
    look_back = torch.randn(200_000, generator=generator)
    other = torch.randn(200_000, generator=generator)
    for _ in range(50):
        grad = look_back + float(torch.rand((), generator=generator)) * other
        exact_g, exact_l = grad.double(), look_back.double()
        error = 1 - (exact_g @ exact_l) ** 2 / ((exact_g @ exact_g) * (exact_l @ exact_l))
        for nudge in (-1e-9, 1e-9):
            compressor = LBGM(delta=float(error) + nudge)
            state = compressor.compress(look_back, {})[2]
            payload = compressor.compress(grad, state)[0]
            assert (payload.numel() == 5) == (nudge > 0)


def test_delta_zero_recycles_exact_multiples_alone():
    compressor = LBGM(delta=0)
    grad = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    state = compressor.compress(grad, {})[2]
    assert compressor.compress(4 * grad, state)[0].numel() == 5
    almost = grad.clone()
    almost[7] *= 1.001
    assert compressor.compress(almost, state)[0].numel() > 5


def test_zero_gradients_are_defined():
    compressor, zero, grad = LBGM(), torch.zeros(10), torch.arange(10.0)
    payload, decoded, state = compressor.compress(zero, {})
    assert payload.numel() == 5
    assert "look_back" not in state
    assert torch.equal(decoded, zero)
    payload, decoded, state = compressor.compress(grad, state)
    assert payload.numel() == 45
    payload, decoded, state = compressor.compress(zero, state)
    assert payload.numel() == 5
    assert torch.equal(decoded, zero)


@pytest.mark.parametrize("scale", [1e-38, 1e-25, 1e-18, 1e18, 1e30, 1e38])
def test_very_small_and_very_large_gradients_are_recycled_alike(scale):
    compressor = LBGM(delta=0.1)
    grad = torch.rand(1000, generator=torch.Generator().manual_seed(0)) * scale
    state = compressor.compress(grad, {})[2]
    payload, decoded, _ = compressor.compress(grad * 0.5, state)
    assert payload.numel() == 5
    assert torch.allclose(decoded / scale, grad * 0.5 / scale, rtol=1e-5)


def test_float16_multiple_that_would_overflow_is_sent_in_full():
    compressor = LBGM(delta=1.0)
    look_back = torch.zeros(100, dtype=torch.float16)
    look_back[0] = 60000.0
    look_back[1] = 1.0
    state = compressor.compress(look_back, {})[2]
    grad = torch.full((100,), 100.0, dtype=torch.float16)
    grad[0] = 60000.0
    _, decoded, _ = compressor.compress(grad, state)
    assert bool(decoded.isfinite().all())


def test_residual_of_inner_error_feedback_goes_on_in_recycled_rounds():
    compressor = LBGM(ErrorFeedback(TopK(0.5)), delta=1.0)
    grad = torch.tensor([4.0, 3.0, 2.0, 1.0])
    _, _, state = compressor.compress(grad, {})
    assert state["inner"]["residual"].tolist() == [0, 0, 2, 1]
    payload, _, state = compressor.compress(grad, state)
    assert payload.numel() == 5
    assert state["inner"]["residual"].tolist() == [0, 3, 0, 2]


def test_error_feedback_outside_keeps_what_recycling_lost():
    compressor = ErrorFeedback(LBGM(delta=0.9))
    first, second = torch.tensor([1.0, 0.0]), torch.tensor([1.0, 1.0])
    _, _, state = compressor.compress(first, {})
    _, decoded, state = compressor.compress(second, state)
    assert decoded.tolist() == [1, 0]
    assert state["residual"].tolist() == [0, 1]


def test_recycling_without_a_look_back_gradient_raises():
    compressor, grad = LBGM(), torch.ones(4)
    state = compressor.compress(grad, {})[2]
    payload = compressor.compress(grad, state)[0]
    with pytest.raises(OutOfSyncError, match="none is held"):
        compressor.decompress(payload, {}, grad)


@pytest.mark.parametrize("delta", [-0.1, 1.5, float("nan"), "0.2", None, True])
def test_delta_outside_its_range_is_refused(delta):
    with pytest.raises(ValueError, match="delta must be"):
        LBGM(delta=delta)


def test_lbgm_wraps_compressors_alone():
    with pytest.raises(ValueError, match="wraps a compressor"):
        LBGM(0.2)


class BudgetOfTheTheorem(PaperAlgorithm1):
    """Algorithm 1 with the condition of the paper's theorem 1."""

    def __init__(self, budget, local_steps):
        self.allowed = budget * local_steps
        super().__init__(delta=None)

    def round(self, g):
        g = np.asarray(g, dtype=np.float64).reshape(-1)
        if self.worker is not None:
            rho = g @ self.worker / np.linalg.norm(self.worker) ** 2
            if np.linalg.norm(g - rho * self.worker) <= self.allowed:
                return True, rho * self.server
        self.worker = self.server = g
        return False, g


@pytest.mark.parametrize("local_steps", [1, 5])
@pytest.mark.parametrize("budget", [0.001, 0.01, 0.05])
def test_norm_budget_recycles_while_what_is_missed_is_short(budget, local_steps):
    compressor = LBGM(delta=NormBudget(budget, local_steps))
    decisions = []
    for name in ("hidden.weight", "output.bias"):
        theorem, state = BudgetOfTheTheorem(budget, local_steps), {}
        for grads in training_run(100):
            recycled, expected = theorem.round(grads[name])
            payload, decoded, state = compressor.compress(grads[name], state)
            assert (payload.numel() == 5) == recycled
            found = decoded.double().numpy().reshape(-1)
            assert np.linalg.norm(found - expected) <= 1e-5 * np.linalg.norm(expected)
            decisions.append(recycled)
    assert 0 < sum(decisions) < len(decisions)


def test_norm_budget_becomes_looser_as_gradients_become_shorter():
    budget = NormBudget(0.1)
    assert budget.limit(1.0) == pytest.approx(0.01)
    assert budget.limit(0.04) == pytest.approx(0.25)
    assert budget.limit(0.0) == budget.limit(1e-300) == 1.0
    assert NormBudget(0).limit(1.0) == NormBudget(0).limit(1e300) == 0.0
    assert NormBudget(1e-300).limit(1e-600 + 4e-300) >= 0.0
    assert NormBudget(0.1, local_steps=10).limit(4.0) == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"budget": -0.1}, "budget must be at least 0 and finite, not -0.1"),
        ({"budget": float("inf")}, "budget must be at least 0 and finite"),
        ({"budget": "0.1"}, "budget must be a number, not '0.1'"),
        ({"budget": True}, "budget must be a number, not True"),
        ({"budget": 0.1, "local_steps": 0}, "local_steps must be a whole number of at least 1"),
        ({"budget": 0.1, "local_steps": 2.0}, "local_steps must be a whole number of at least 1"),
    ],
)
def test_wrong_budget_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        NormBudget(**arguments)


@dataclasses.dataclass(frozen=True, repr=False)
class Counted(TopK):
    """A compressor that records its calls."""

    ratio: float = 0.1
    runs: list = dataclasses.field(default_factory=list, compare=False)

    def encode(self, grad, state):
        self.runs.append(grad.numel())
        return super().encode(grad, state)


def test_raw_comparison_runs_the_inner_compressor_only_for_what_is_sent():
    inner = Counted()
    compressor = LBGM(inner, delta=0.2, compare="raw")
    state, full = {}, 0
    for grads in training_run(60):
        payload, _, state = compressor.compress(grads["hidden.weight"], state)
        full += payload.numel() > 5
    assert len(inner.runs) == full
    assert 0 < full < 30


@pytest.mark.parametrize("inner", [TopK(0.05), SignSGD(), SignSGD(scaled=True), Atomo(2)], ids=repr)
def test_raw_comparison_takes_the_angle_of_the_gradients_themselves(inner):
    compressor = LBGM(inner, delta=0.1, compare="raw")
    state, held, reference, sent = {}, {}, None, None
    recycled = 0
    for grads in training_run(60):
        g = grads["hidden.weight"].double()
        payload, decoded, state = compressor.compress(grads["hidden.weight"], state)
        tensor, held = compressor.decompress(payload, held, decoded)
        cosine = (
            0 if reference is None else float((g * reference).sum() / g.norm() / reference.norm())
        )
        assert (payload.numel() == 5) == (1 - cosine**2 <= 0.1)
        if payload.numel() == 5:
            rho = float((g * reference).sum() / reference.norm() ** 2)
            assert torch.allclose(tensor.double(), rho * sent, rtol=1e-5)
            recycled += 1
        else:
            reference, sent = g, inner.compress(grads["hidden.weight"], {})[1].double()
            assert torch.equal(tensor.double(), sent)
    assert recycled > 20


def test_raw_comparison_recycles_draws_that_the_compressed_one_cannot():
    inner = Atomo(2, unbiased=True)
    recycled = {}
    for compare in ("compressed", "raw"):
        compressor = LBGM(inner, delta=0.2, compare=compare)
        state, recycled[compare] = compressor.initial_state(0), 0
        for grads in training_run(60):
            payload, _, state = compressor.compress(grads["hidden.weight"], state)
            recycled[compare] += payload.numel() == 5
    assert recycled["raw"] > 40
    assert recycled["compressed"] < 10


def test_raw_comparison_never_leaves_the_range_of_the_dtype():
    compressor = LBGM(SignSGD(), delta=0.5, compare="raw")
    tiny = torch.full((64,), 1e-6, dtype=torch.float16)
    _, _, state = compressor.compress(tiny, {})
    # rho would be 6e10, and signs times it infinite.
    payload, decoded, _ = compressor.compress(torch.full_like(tiny, 6e4), state)
    assert payload.numel() > 5
    assert bool(decoded.isfinite().all())


def test_raw_comparison_refuses_residuals_under_it():
    for inner in (ErrorFeedback(TopK(0.1)), ErrorFeedback(Identity())):
        with pytest.raises(ValueError, match=r"Put ErrorFeedback outside"):
            LBGM(inner, compare="raw")
    with pytest.raises(ValueError, match='compare must be "compressed" or "raw", not \'angle\''):
        LBGM(compare="angle")


def test_alone_raw_and_compressed_comparison_are_one():
    for delta in (0.05, NormBudget(0.02)):
        states = {"raw": {}, "compressed": {}}
        for grads in training_run(60):
            payloads = []
            for compare in states:
                compressor = LBGM(delta=delta, compare=compare)
                payload, _, states[compare] = compressor.compress(
                    grads["hidden.weight"], states[compare]
                )
                payloads.append(payload)
            assert torch.equal(*payloads)
