"""The wire format: sizes, round trips, errors, and version 1, which must decode for good."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lbgm_compress import PayloadError, Receiver
from lbgm_compress.compressors.parse import parse_compressor
from lbgm_compress.wire import bits, indices, message
from lbgm_compress.wire.indices import FIXED, decode_indices, encode_indices
from tests import golden
from tests.laws import assert_same_bits

GOLDEN = json.loads((Path(__file__).parent / "golden.json").read_text())


def entropy_bytes(n, k):
    return (math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)) / math.log(2) / 8


@pytest.mark.parametrize("share", [0.001, 0.01, 0.1])
def test_random_indices_take_at_most_five_percent_above_their_entropy(share):
    n = 1_000_000
    k = int(share * n)
    for seed in range(3):
        positions = np.sort(np.random.default_rng(seed).choice(n, k, replace=False))
        section = encode_indices(torch.from_numpy(positions), n)
        assert section.numel() <= 1.05 * entropy_bytes(n, k)


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_indices_round_trip_in_every_method(data):
    n = data.draw(st.one_of(st.integers(1, 3000), st.integers(1, 2**40)))
    chosen = data.draw(st.sets(st.integers(0, n - 1), min_size=1, max_size=600))
    positions = torch.tensor(sorted(chosen))
    section = encode_indices(positions, n)
    assert torch.equal(decode_indices(section, len(chosen), n), positions)
    width = (n - 1).bit_length()
    fixed = bits.pack_fixed_on_device(positions, width)
    if 0 < len(chosen) < n:
        section = torch.cat([torch.tensor([FIXED], dtype=torch.uint8), fixed])
        assert torch.equal(decode_indices(section, len(chosen), n), positions)
        section = torch.from_numpy(indices._encode_rice(positions.numpy()))
        assert torch.equal(decode_indices(section, len(chosen), n), positions)
    if 0 < len(chosen) < min(n, 257):
        section = torch.from_numpy(indices._encode_enumerated(positions.tolist(), n))
        assert torch.equal(decode_indices(section, len(chosen), n), positions)


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_few_indices_take_at_most_five_percent_above_their_entropy_and_two_bytes(data):
    n = data.draw(st.integers(2, 10**6))
    chosen = data.draw(st.sets(st.integers(0, n - 1), min_size=1, max_size=min(n - 1, 100)))
    size = encode_indices(torch.tensor(sorted(chosen)), n).numel()
    assert size <= max(1.05 * entropy_bytes(n, len(chosen)), entropy_bytes(n, len(chosen)) + 2)


@given(st.binary(max_size=80), st.integers(1, 300), st.integers(2, 2**40))
@settings(max_examples=500, deadline=None)
def test_bytes_that_are_no_indices_are_refused_or_ascend_within_the_tensor(data, count, n):
    count = min(count, n - 1)
    try:
        section = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0)
        positions = decode_indices(section, count, n).tolist()
    except PayloadError:
        return
    assert positions == sorted(set(positions))
    assert len(positions) == count
    assert 0 <= positions[0] <= positions[-1] < n


@given(st.integers(0, 40), st.lists(st.integers(0, 2**40), max_size=50))
def test_packing_on_a_device_gives_the_bytes_of_packing_on_the_cpu(width, numbers):
    array = np.array([number % (1 << width) for number in numbers], np.int64)
    packed = bits.pack_fixed(array, width)
    if array.size and width:
        on_device = bits.pack_fixed_on_device(torch.from_numpy(array), width)
        assert torch.equal(torch.from_numpy(packed), on_device)
        unpacked = bits.unpack_fixed_on_device(on_device, width, array.size)
        assert unpacked.tolist() == array.tolist()
    assert bits.unpack_fixed(packed, width, array.size).tolist() == array.tolist()


@given(st.lists(st.integers(0, 2**63 - 1), max_size=20))
def test_variable_length_integers_round_trip(numbers):
    data = b"".join(map(bits.varint, numbers))
    assert bits.read_varints(data + b"\xff", len(numbers)) == (numbers, len(data))


@pytest.mark.parametrize("data", [b"", b"\x80", b"\xff" * 9, b"\xff" * 20])
def test_variable_length_integer_that_does_not_end_is_refused(data):
    with pytest.raises(PayloadError):
        bits.read_varints(data, 1)


@pytest.mark.parametrize(
    "case", GOLDEN["messages"] + GOLDEN["earlier"], ids=lambda case: case["compressor"]
)
def test_messages_of_version_1_decode_for_good(case):
    like = golden.gradients(0)
    receiver = Receiver(parse_compressor(case["compressor"]), like)
    for round_ in case["rounds"]:
        data = torch.frombuffer(bytearray.fromhex(round_["message"]), dtype=torch.uint8)
        found = receiver.decompress("golden", data)
        for name, expected in round_["decoded"].items():
            assert found[name].dtype == like[name].dtype
            assert found[name].reshape(-1).tolist() == pytest.approx(
                expected, rel=1e-6, abs=1e-7, nan_ok=True
            )


@pytest.mark.parametrize("case", GOLDEN["messages"], ids=lambda case: case["compressor"])
def test_messages_of_version_1_are_still_made(case, monkeypatch):
    made = golden.record(case["compressor"], monkeypatch.setattr)
    if not any(name in case["compressor"] for name in ("Atomo", "LookBackSubspace", "int2")):
        assert [r["message"] for r in made["rounds"]] == [r["message"] for r in case["rounds"]]
        return
    # The last bits of matrix products and of means depend on the processor, and so do the signs of
    # singular vectors and codes of values half-way between two integers.
    for ours, recorded in zip(made["rounds"], case["rounds"], strict=True):
        assert len(ours["message"]) == len(recorded["message"])
        for name, expected in recorded["decoded"].items():
            found, wanted = np.array(ours["decoded"][name]), np.array(expected)
            finite = np.isfinite(wanted)
            assert np.array_equal(finite, np.isfinite(found))
            missed = np.linalg.norm(found[finite] - wanted[finite])
            assert missed <= 0.01 * np.linalg.norm(wanted[finite])


@pytest.mark.parametrize("case", GOLDEN["indices"], ids=lambda case: f"of {case['n']}")
def test_indices_of_version_1_decode_for_good_and_are_still_made(case):
    positions = torch.tensor(golden.positions(case["n"], case["step"]))
    section = torch.frombuffer(bytearray.fromhex(case["section"]), dtype=torch.uint8)
    assert torch.equal(decode_indices(section, positions.numel(), case["n"]), positions)
    assert torch.equal(encode_indices(positions, case["n"]), section)


def test_message_of_another_version_names_both():
    case = GOLDEN["messages"][0]
    data = bytearray.fromhex(case["rounds"][0]["message"])
    data[0] = 2
    receiver = Receiver(parse_compressor(case["compressor"]), golden.gradients(0))
    with pytest.raises(PayloadError, match="version 2, this receiver reads version 1"):
        receiver.decompress("golden", torch.frombuffer(data, dtype=torch.uint8))


def test_message_survives_being_taken_apart():
    head = bytes([message.Kind.BODY | message.Kind.SETS]), bytes([message.Kind.USES])
    body = torch.arange(200, dtype=torch.uint8)
    whole = message.Message(7, 8, 9, head, [body, None])
    again = message.Message.unpack(whole.pack(torch.device("cpu")), 7, [1, 1])
    assert (again.layout, again.check, again.identifier) == (7, 8, 9)
    assert tuple(again.heads) == head
    assert_same_bits(again.bodies[0], body)
    assert again.bodies[1] is None
