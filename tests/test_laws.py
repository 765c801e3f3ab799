"""The laws for every compressor and composition, on random gradients and those of a training."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lbgm_compress import (
    LBGM,
    Compressor,
    ErrorFeedback,
    LookBackSubspace,
    Receiver,
    Sender,
    TopK,
)
from lbgm_compress.compressor import Encoding, dense_from_bytes
from lbgm_compress.decoded import Scaled
from lbgm_compress.wire.message import Kind
from lbgm_compress.wire.values import as_bytes
from lbgm_compress.wrapper import Wrapper
from tests.compressors import COMPRESSORS
from tests.gradients import awkward_shapes, training_run
from tests.laws import assert_same_bits, check_laws
from tests.soak import length

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


@pytest.mark.parametrize("compressor", COMPRESSORS, ids=repr)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_laws_hold_on_random_gradients_of_every_shape(compressor, dtype):
    base = awkward_shapes(dtype, seed=0)
    run = []
    for number in range(2):
        noise = awkward_shapes(dtype, seed=number + 1)
        run.append({name: base[name] + 0.3 * noise[name] for name in base})
    run.append({name: -0.5 * grad for name, grad in run[-1].items()})
    run.append({name: torch.zeros_like(grad) for name, grad in base.items()})
    run.append(run[0])
    check_laws(compressor, run)


@pytest.mark.parametrize("compressor", COMPRESSORS, ids=repr)
@pytest.mark.parametrize(
    "rounds", [14, pytest.param(length(100, 30), marks=pytest.mark.soak)], ids=["short", "long"]
)
def test_laws_hold_on_gradients_of_a_training_run(compressor, rounds):
    check_laws(compressor, training_run(rounds))


@pytest.mark.parametrize("compressor", COMPRESSORS, ids=repr)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_non_finite_gradient_arrives_as_it_is_and_changes_no_state(compressor, dtype):
    grad = torch.linspace(-1, 1, 600).reshape(30, 20).to(dtype)
    payload, _, state = compressor.compress(grad, compressor.initial_state(0))
    _, held = compressor.decompress(payload, {}, grad)
    for value in (float("inf"), float("-inf"), float("nan")):
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


def check_magnitudes(compressor: Compressor, data: st.DataObject) -> None:
    """Check that finite gradients of any magnitude decode to finite tensors."""
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


@pytest.mark.parametrize("compressor", COMPRESSORS, ids=repr)
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_finite_gradients_of_any_magnitude_decode_to_finite_tensors(compressor, data):
    check_magnitudes(compressor, data)


@pytest.mark.soak
@pytest.mark.parametrize("compressor", COMPRESSORS, ids=repr)
@settings(max_examples=length(400, 60), deadline=None)
@given(data=st.data())
def test_many_finite_gradients_of_any_magnitude_decode_to_finite_tensors(compressor, data):
    check_magnitudes(compressor, data)


@pytest.mark.parametrize(
    "inner", [TopK(0.1), LBGM(delta=0.5), ErrorFeedback(LookBackSubspace(2))], ids=repr
)
def test_a_wrapper_that_changes_nothing_is_a_compressor_like_its_inner_one(inner):
    wrapper, run = Wrapper(inner), training_run(6)
    check_laws(wrapper, run)
    states = {}, {}
    for grads in run:
        grad = grads["hidden.weight"]
        payload, decoded, mine = wrapper.compress(grad, states[0])
        expected, tensor, of_inner = inner.compress(grad, states[1])
        states = mine, of_inner
        assert_same_bits((payload, decoded), (expected, tensor))


def test_a_receiver_that_looks_back_cannot_be_inside_lbgm():
    for inner in (
        LBGM(),
        LookBackSubspace(),
        ErrorFeedback(LBGM()),
        ErrorFeedback(ErrorFeedback(LBGM(TopK(0.1)))),
    ):
        with pytest.raises(ValueError, match="looks back itself"):
            LBGM(inner)


@dataclasses.dataclass(frozen=True, repr=False)
class AlternatingSigns(Compressor):
    """Sends every second gradient negated; both ends count the rounds."""

    announced: bool = False

    @property
    def kinds(self):
        return frozenset({Kind.BODY | Kind.SETS if self.announced else Kind.BODY})

    @property
    def receiver_has_state(self):
        return self.announced

    def encode(self, grad, state):
        number = state.get("round", 0)
        [kind] = self.kinds
        sign = (-1.0) ** number
        body = as_bytes((grad * sign).contiguous())
        decoded = Scaled(dense_from_bytes(body, grad), sign)
        return Encoding(bytes([kind]), lambda: body, decoded, {"round": number + 1})

    def decode(self, head, body, state, like):
        number = state.get("round", 0)
        decoded = Scaled(dense_from_bytes(body, like), (-1.0) ** number)
        return decoded, {"round": number + 1}

    def forget(self, state):
        return {}

    def own_state(self, state):
        return {}

    def sender_state(self, own, held, like):
        return held


def test_a_receivers_state_that_no_payload_announced_is_an_error():
    compressor, grads = AlternatingSigns(), {"w": torch.arange(4.0)}
    message = Sender(compressor).compress(grads)
    rule = r"AlternatingSigns\(\) returned a new state from a payload of kind 1, .* no Kind.SETS"
    receiver = Receiver(compressor, grads)
    with pytest.raises(RuntimeError, match=rule):
        receiver.decompress("worker", message)
    into = {"w": torch.zeros(4)}
    with pytest.raises(RuntimeError, match=rule):
        receiver.accumulate("worker", message, into, 1.0)
    assert torch.equal(into["w"], torch.zeros(4))
    assert receiver.senders() == []
    payload, _, _ = compressor.compress(grads["w"], {})
    with pytest.raises(RuntimeError, match=rule):
        compressor.decompress(payload, {}, grads["w"])
    with pytest.raises(RuntimeError, match=rule):
        compressor.accumulate(payload, {}, into["w"], 1.0)
    with pytest.raises(RuntimeError, match=rule):
        check_laws(compressor, training_run(5))


def test_a_receivers_state_that_payloads_announce_is_kept():
    compressor = AlternatingSigns(announced=True)
    check_laws(compressor, training_run(5))
