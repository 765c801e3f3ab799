"""Bytes that no sender made."""

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
    ErrorFeedback,
    Identity,
    LookBackSubspace,
    OutOfSyncError,
    PayloadError,
    Receiver,
    Sender,
    SignSGD,
    TopK,
)
from tests.laws import assert_same_bits

COMPRESSORS = [
    Identity(),
    TopK(0.05),
    TopK(0.3, values="int8"),
    SignSGD(scaled=True),
    Atomo(2),
    LBGM(),
    LBGM(TopK(0.05)),
    LBGM(TopK(0.4, values="float16")),
    LBGM(SignSGD()),
    ErrorFeedback(LBGM(Atomo(2, unbiased=True))),
    LookBackSubspace(3, 0.5, refresh=2, values="float32"),
    LookBackSubspace(4, 0.9, values="int4", directions="int2"),
    LookBackSubspace(2, 0.3, view="flat", values="float16"),
]
STRINGS = 10_000  # for each of the compressors
SHAPES = {"matrix": (40, 50), "half": (300,), "scalar": (), "empty": (0, 3)}


def gradients(rng, scale=1.0):
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    grads = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    grads["half"] = grads["half"].half()
    return {name: grad * scale for name, grad in grads.items()}


def mutated(rng, message, others):
    """Return a message that something happened to."""
    data = bytearray(message)
    for _ in range(rng.choice((1, 1, 2, 5))):
        where = rng.randrange(len(data) or 1)
        # Most of what can be wrong stands in the first bytes of a section.
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
        # With the right size in the header, the rest is looked at.
        heads = 16 + 5 * len(SHAPES) if message[16] > 3 else 16 + len(SHAPES)
        data[3:8] = max(0, len(data) - heads).to_bytes(5, "little")
    return bytes(data)


def tensor_of(data):
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0).byte()


@pytest.mark.timeout(280)
@pytest.mark.parametrize("compressor", COMPRESSORS, ids=repr)
def test_any_bytes_give_tensors_of_the_right_shape_or_an_error_and_change_nothing(compressor):
    rng = random.Random(repr(compressor))
    grads = gradients(rng)
    sender, receiver = Sender(compressor), Receiver(compressor, grads)
    shadow = Receiver(compressor, grads)
    messages = []
    accepted = refused = 0
    peak = None
    for number in range(STRINGS):
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
        if number == 500:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        if number % 10 == 0:
            data = rng.randbytes(rng.randrange(200))
        else:
            data = mutated(rng, rng.choice(messages[-20:]), messages[-20:])
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
    assert refused > STRINGS / 3
    assert accepted > 0
    # In kilobytes: nothing like what a forged size could ask for.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 50_000


def same_objects(a, b):
    """Compare nested dicts, tensors by identity."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_objects(a[key], b[key]) for key in a)
    return a is b or (not isinstance(a, torch.Tensor) and a == b)


def test_an_out_of_sync_error_is_a_payload_error():
    assert issubclass(OutOfSyncError, PayloadError)


@pytest.mark.parametrize("compressor", COMPRESSORS, ids=repr)
@settings(max_examples=300, deadline=None)
@given(kind=st.integers(0, 255), body=st.binary(max_size=300))
def test_any_payload_gives_a_tensor_of_the_right_shape_or_an_error(compressor, kind, body):
    like = torch.empty(9, 12)
    head = bytes([kind]) + bytes(compressor.head_size(like) - 1)
    for payload in (tensor_of(head + body), tensor_of(bytes([kind]) + body)):
        try:
            tensor, _ = compressor.decompress(payload, {}, like)
        except PayloadError:
            continue
        assert (tensor.shape, tensor.dtype) == (like.shape, like.dtype)


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
