"""Damaged and forged messages and payloads."""

from __future__ import annotations

import random
import resource

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lbgm_compress import (
    LBGM,
    Atomo,
    LookBackSubspace,
    OutOfSyncError,
    PayloadError,
    Receiver,
    Sender,
    TopK,
)
from lbgm_compress.wire.message import Kind
from tests.compressors import COMPRESSORS
from tests.laws import assert_same_bits
from tests.soak import length

SHAPES = {"matrix": (40, 50), "half": (300,), "scalar": (), "empty": (0, 3)}


def gradients(rng, scale=1.0):
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    grads = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    grads["half"] = grads["half"].half()
    return {name: grad * scale for name, grad in grads.items()}


def mutated(rng, message, others, head_size):
    """Return a damaged message."""
    data = bytearray(message)
    for _ in range(rng.choice((1, 1, 2, 5))):
        where = rng.randrange(len(data) or 1)
        # Most fields that can be wrong are in the first bytes of a section.
        where = min(where, rng.randrange(64)) if rng.random() < 0.5 else where
        what = rng.randrange(8)
        if what == 0:
            del data[where:]
        elif what == 1:
            data[where:where] = rng.randbytes(rng.randrange(20))
        elif what == 2:
            del data[where : where + rng.randrange(20)]
        elif what == 3:
            data[where : where + 8] = rng.choice((b"\xff", b"\x00", b"\x7f", b"\x80")) * 8
        elif what == 4:
            other = rng.choice(others)
            data[where:] = other[where:]
        elif what == 5:
            data += data[where:]
        elif data:
            where = min(where, len(data) - 1)
            data[where] ^= 1 << rng.randrange(8)
    if rng.random() < 0.5 and len(data) >= 8:
        # With the right size in the header, the receiver reads the rest.
        data[3:8] = max(0, len(data) - head_size).to_bytes(5, "little")
    return bytes(data)


def tensor_of(data):
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0).byte()


@pytest.mark.timeout(280)
@pytest.mark.parametrize("compressor", COMPRESSORS, ids=repr)
@pytest.mark.parametrize(
    "strings",
    [500, pytest.param(length(10_000, 2_000), marks=pytest.mark.soak)],
    ids=["few", "many"],
)
def test_any_bytes_give_tensors_of_the_right_shape_or_an_error_and_change_nothing(
    compressor, strings
):
    rng = random.Random(repr(compressor))
    grads = gradients(rng)
    sender, receiver = Sender(compressor), Receiver(compressor, grads)
    shadow = Receiver(compressor, grads)
    messages = []
    accepted = refused = 0
    peak = None
    for number in range(strings):
        if number % 50 == 0:
            # The next good message decodes exactly, whatever came before it.
            if rng.random() < 0.5:
                grads = gradients(rng)
            message = sender.compress({name: g * rng.uniform(0.5, 2) for name, g in grads.items()})
            assert_same_bits(
                receiver.decompress("worker", message), shadow.decompress("worker", message)
            )
            messages.append(bytes(message.tolist()))
            before = receiver.state_dict()
        if number == strings // 4:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        if number % 10 == 0:
            data = rng.randbytes(rng.randrange(200))
        else:
            message = rng.choice(messages[-20:])
            data = mutated(rng, message, messages[-20:], receiver.head_size())
        try:
            decoded = receiver.decompress("worker", tensor_of(data))
        except PayloadError:
            refused += 1
            assert same_objects(receiver.state_dict(), before)
        else:
            accepted += 1
            for name, grad in grads.items():
                assert (decoded[name].shape, decoded[name].dtype) == (grad.shape, grad.dtype)
            receiver.load_state_dict(before)
    assert refused > strings / 3
    assert accepted > 0
    # In kilobytes. A forged size could ask for much more.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 50_000


def same_objects(a, b):
    """Return whether nested dicts are equal and hold the same tensor objects."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_objects(a[key], b[key]) for key in a)
    return a is b or (not isinstance(a, torch.Tensor) and a == b)


def test_an_out_of_sync_error_is_a_payload_error():
    assert issubclass(OutOfSyncError, PayloadError)


def check_payload(compressor, data):
    """Check that a payload gives a tensor of the right shape or an error."""
    kinds = st.sampled_from(sorted({*map(int, compressor.kinds), Kind.RAW | Kind.BODY}))
    kind = data.draw(st.one_of(kinds, st.integers(0, 255)))
    body = data.draw(st.binary(max_size=300))
    like = torch.empty(9, 12)
    head = bytes([kind]) + bytes(compressor.head_size(like) - 1)
    for payload in (tensor_of(head + body), tensor_of(bytes([kind]) + body)):
        try:
            tensor, _ = compressor.decompress(payload, {}, like)
        except PayloadError:
            continue
        assert (tensor.shape, tensor.dtype) == (like.shape, like.dtype)


@pytest.mark.parametrize("compressor", COMPRESSORS, ids=repr)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_payload_gives_a_tensor_of_the_right_shape_or_an_error(compressor, data):
    check_payload(compressor, data)


@pytest.mark.soak
@pytest.mark.parametrize("compressor", COMPRESSORS, ids=repr)
@settings(max_examples=length(1000, 300), deadline=None)
@given(data=st.data())
def test_many_payloads_give_a_tensor_of_the_right_shape_or_an_error(compressor, data):
    check_payload(compressor, data)


@pytest.mark.parametrize(
    "compressor", [TopK(1.0), LBGM(TopK(1.0)), Atomo(3), LookBackSubspace(3)], ids=repr
)
def test_forged_counts_allocate_nothing(compressor):
    like = torch.empty(1, dtype=torch.float32).expand(1 << 12, 1 << 12)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for count in (1 << 23, 1 << 24, 1 << 40, 1 << 62):
        varint = bytearray()
        while count > 127:
            varint.append(count & 127 | 128)
            count >>= 7
        varint.append(count)
        head = b"\x01" if compressor.head_size(like) == 1 else b"\x09\x00\x00\x80\x3f"
        head = b"\x09" if isinstance(compressor, LookBackSubspace) else head
        with pytest.raises(PayloadError):
            compressor.decompress(tensor_of(head + bytes(varint) + bytes(100)), {}, like)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000
