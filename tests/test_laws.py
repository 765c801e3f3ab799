"""Every law for every compressor and composition, on random and on real gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lbgm_compress import (
    LBGM,
    Atomo,
    ErrorFeedback,
    Identity,
    LookBackSubspace,
    NormBudget,
    SignSGD,
    TopK,
)
from lbgm_compress.wire.values import PRECISIONS
from tests.gradients import awkward_shapes, training_run
from tests.laws import assert_same_bits, check_laws

COMPRESSORS = [
    Identity(),
    TopK(0.01),
    TopK(1.0),
    *(TopK(0.2, values) for values in PRECISIONS),
    SignSGD(),
    SignSGD(scaled=True),
    SignSGD(vote=True),
    Atomo(2),
    Atomo(2, unbiased=True),
    LBGM(),
    LBGM(TopK(0.01)),
    LBGM(TopK(0.1, "int8"), delta=0.9),
    LBGM(SignSGD()),
    LBGM(SignSGD(scaled=True), delta=0.6),
    LBGM(Atomo(rank=2)),
    LBGM(Atomo(rank=2, unbiased=True), delta=1.0),
    LBGM(delta=NormBudget(0.5)),
    LBGM(SignSGD(scaled=True), NormBudget(0.1, local_steps=4)),
    LBGM(TopK(0.1), compare="raw"),
    LBGM(SignSGD(), delta=0.8, compare="raw"),
    LBGM(Atomo(rank=2, unbiased=True), delta=0.5, compare="raw"),
    ErrorFeedback(LBGM(TopK(0.01), NormBudget(0.5), compare="raw")),
    LBGM(delta=0),
    LBGM(delta=1.0),
    ErrorFeedback(Identity()),
    ErrorFeedback(TopK(0.01)),
    ErrorFeedback(SignSGD(scaled=True)),
    LBGM(ErrorFeedback(TopK(0.01))),
    LBGM(ErrorFeedback(Identity())),
    ErrorFeedback(LBGM(TopK(0.01))),
    ErrorFeedback(LBGM(Atomo(rank=2), delta=0.5)),
    ErrorFeedback(LBGM(SignSGD(), delta=0.8)),
    LookBackSubspace(),
    LookBackSubspace(2, 0.3, values="float32"),
    LookBackSubspace(3, 0.5, refresh=2, values="float16"),
    LookBackSubspace(2, 0.0, values="bfloat16"),
    LookBackSubspace(1, 0.9, values="float64"),
    LookBackSubspace(1, 0.2, view="flat", values="float32"),
    LookBackSubspace(4, 0.5, view="flat", refresh=2),
    ErrorFeedback(LookBackSubspace(2, 0.95, values="int2")),
    ErrorFeedback(LookBackSubspace(4, 0.9, values="int4", directions="int2")),
    ErrorFeedback(LookBackSubspace(3, 0.8, view="flat", values="int4")),
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


@pytest.mark.parametrize("compressor", COMPRESSORS, ids=repr)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_laws_hold_on_random_gradients_of_every_shape(compressor, dtype):
    base = awkward_shapes(dtype, seed=0)
    run = []
    for number in range(4):
        noise = awkward_shapes(dtype, seed=number + 1)
        run.append({name: base[name] + 0.3 * noise[name] for name in base})
    run.append({name: -0.5 * grad for name, grad in run[-1].items()})
    run.append({name: torch.zeros_like(grad) for name, grad in base.items()})
    run.append(run[0])
    check_laws(compressor, run)


@pytest.mark.parametrize("compressor", COMPRESSORS, ids=repr)
def test_laws_hold_on_gradients_of_a_training_run(compressor):
    check_laws(compressor, training_run(30))


@pytest.mark.parametrize("compressor", COMPRESSORS, ids=repr)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_non_finite_gradient_arrives_as_it_is_and_changes_no_state(compressor, dtype, value):
    grad = torch.linspace(-1, 1, 600).reshape(30, 20).to(dtype)
    _, _, state = compressor.compress(grad, compressor.initial_state(0))
    payload, _, _ = compressor.compress(grad, compressor.initial_state(0))
    _, held = compressor.decompress(payload, {}, grad)
    broken = grad.clone()
    broken[3, 5] = value
    payload, decoded, after = compressor.compress(broken, state)
    assert_same_bits(decoded, broken)
    tensor, held_after = compressor.decompress(payload, held, grad)
    assert_same_bits(tensor, broken)
    assert_same_bits(held_after, held)
    assert_same_bits(after, state)


@pytest.mark.parametrize("compressor", COMPRESSORS, ids=repr)
def test_non_finite_first_gradient_sets_nothing(compressor):
    initial = compressor.initial_state(0)
    _, _, state = compressor.compress(torch.full((30, 20), float("nan")), initial)
    assert_same_bits(state, initial)


@pytest.mark.parametrize("compressor", COMPRESSORS, ids=repr)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_finite_gradients_of_any_magnitude_decode_to_finite_tensors(compressor, data):
    shape = data.draw(hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=12))
    dtype = data.draw(st.sampled_from(["float32", "float64", "float16"]))
    elements = st.floats(allow_nan=False, allow_infinity=False, width=int(dtype[5:]))
    arrays = hnp.arrays(dtype, shape, elements=elements)
    sender, receiver = compressor.initial_state(0), {}
    for _ in range(3):
        grad = torch.from_numpy(data.draw(arrays).copy())
        payload, decoded, sender = compressor.compress(grad, sender)
        tensor, receiver = compressor.decompress(payload, receiver, grad)
        assert_same_bits(tensor, decoded)
        assert bool(tensor.isfinite().all())


def test_a_receiver_that_looks_back_cannot_be_inside_lbgm():
    for inner in (
        LBGM(),
        LookBackSubspace(),
        ErrorFeedback(LBGM()),
        ErrorFeedback(ErrorFeedback(LBGM(TopK(0.1)))),
    ):
        with pytest.raises(ValueError, match="looks back itself"):
            LBGM(inner)
