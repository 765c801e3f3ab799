"""Tensors of few elements, which are handled together: results are those of each by itself."""

from __future__ import annotations

import gc

import pytest
import torch

from lbgm_compress import LBGM, ErrorFeedback, Identity, Receiver, Sender, TopK
from lbgm_compress._util.batches import SMALL, STACK, batches
from tests.compressors import COMPRESSORS
from tests.laws import assert_same_bits

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
SHAPES = [(0,), (), (1,), (2,), (4,), (2, 2), (7,), (33,), (768,), (24, 32), (SMALL + 1,)]


def rounds(dtype, count=4):
    """Return gradients of every shape, three of each, for rounds in which they turn by and by."""
    generator = torch.Generator().manual_seed(0)

    def normal(shape):
        return torch.randn(shape, generator=generator)

    base = {f"{shape} {i}": normal(shape) for shape in SHAPES for i in range(3)}
    found = []
    for number in range(count):
        grads = {name: (g + 0.4 * number * normal(g.shape)).to(dtype) for name, g in base.items()}
        found.append(grads)
    # Among others of its shape: zeros, few that are not zero, inf, and another order in memory.
    found[1]["(4,) 1"].zero_()
    found[1]["(33,) 0"][3:].zero_()
    found[2]["(7,) 2"][3] = float("inf")
    found[2]["(24, 32) 0"] = found[2]["(24, 32) 0"].T.contiguous().T
    return found


@pytest.mark.parametrize("compressor", COMPRESSORS, ids=repr)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_small_tensors_are_sent_and_received_as_each_by_itself(compressor, dtype):
    run = rounds(dtype)
    together = {name: compressor.initial_state(3) for name in run[0]}
    alone, held = dict(together), {name: {} for name in run[0]}
    for grads in run:
        names = list(grads)
        batch = compressor.encode_batch(list(grads.values()), [together[n] for n in names])
        bodies = [None if encoding.body is None else encoding.body() for encoding in batch]
        read = compressor.read_batch(
            [encoding.head for encoding in batch],
            bodies,
            [held[name] for name in names],
            list(grads.values()),
        )
        for name, encoding, body, (tensor, state) in zip(names, batch, bodies, read, strict=True):
            [single] = compressor.encode_batch([grads[name]], [alone[name]])
            assert single.head == encoding.head
            assert_same_bits(
                (single.body is None, single.state, single.phase_error),
                (body is None, encoding.state, encoding.phase_error),
                name,
            )
            if body is not None:
                assert_same_bits(single.body(), body, name)
            expected = compressor.read(encoding.head, body, held[name], grads[name])
            assert_same_bits((tensor.dense(), state), (expected[0].dense(), expected[1]), name)
            assert_same_bits(tensor.dense(), single.decoded.dense(), name)
            together[name], alone[name], held[name] = encoding.state, single.state, state


@pytest.mark.parametrize("compressor", [Identity(), TopK(0.1), LBGM(TopK(0.3))], ids=repr)
def test_sums_of_small_tensors_are_those_of_each_by_itself(compressor):
    sender, run = Sender(compressor), rounds(torch.float32)
    receiver = Receiver(compressor, run[0])
    for grads in run:
        message, own = sender.encode(grads)
        into = {name: torch.full_like(grad, 0.3) for name, grad in grads.items()}
        expected = {name: tensor.clone() for name, tensor in into.items()}
        receiver.accumulate(0, message, into, 1 / 3)
        for name, decoded in own.items():
            decoded.add_to(expected[name], 1 / 3)
        assert_same_bits(into, expected)


@pytest.mark.parametrize("compressor", COMPRESSORS, ids=repr)
def test_small_tensors_do_not_depend_on_where_they_are_in_memory(compressor):
    generator = torch.Generator().manual_seed(0)
    states = [compressor.initial_state(0)] * 2
    for _ in range(5):
        grad = torch.randn(13, generator=generator) + 1
        moved = torch.empty(14)[1:].copy_(grad)
        results = [compressor.compress(g, s) for g, s in zip((grad, moved), states, strict=True)]
        assert_same_bits(results[0], results[1])
        states = [result[2] for result in results]


def test_an_error_in_a_small_tensor_names_it():
    grads = {f"w{i}": torch.ones(4) for i in range(5)}
    message = Sender(TopK(0.5)).compress(grads)
    # The number of entries in the payload of the third tensor: 14 bytes each follow 5 sizes.
    position = 16 + 5 + 5 + 2 * ((message.numel() - 26) // 5)
    assert message[position] == 2
    message[position] = 3
    with pytest.raises(ValueError, match="tensor 'w2': 3 entries in the payload, at most 2"):
        Receiver(TopK(0.5), grads).decompress(0, message)


def test_what_is_kept_of_a_small_tensor_keeps_no_other():
    grads = {f"w{i}": torch.randn(4) for i in range(50)}
    sender = Sender(ErrorFeedback(LBGM(TopK(0.5))))
    receiver = Receiver(sender.compressor, grads)
    receiver.decompress(0, sender.compress(grads))

    def check(state):
        if isinstance(state, torch.Tensor):
            assert state.untyped_storage().nbytes() == state.numel() * state.itemsize
        elif isinstance(state, dict):
            for value in state.values():
                check(value)

    check(sender.state_dict())
    check(receiver.state_dict())


def test_batches_are_stacks_of_small_tensors_and_each_large_one():
    small, wide, large = torch.zeros(4), torch.zeros(2, 2), torch.zeros(SMALL + 1)
    assert batches([small, large, wide, small, large]) == [[0, 3], [2], [1], [4]]
    assert batches([small, small.half()]) == [[0], [1]]
    assert [len(batch) for batch in batches([torch.zeros(SMALL)] * 100)] == [
        STACK // SMALL,
        100 - STACK // SMALL,
    ]
    assert batches([]) == []


def test_the_search_for_cycles_is_as_before_after_a_message_and_after_an_error():
    grads = {"w": torch.ones(4)}
    for enabled in (True, False):
        (gc.enable if enabled else gc.disable)()
        try:
            Receiver(TopK(0.5), grads).decompress(0, Sender(TopK(0.5)).compress(grads))
            assert gc.isenabled() == enabled
            with pytest.raises(TypeError):
                Sender(TopK(0.5)).compress({"w": None})
            assert gc.isenabled() == enabled
        finally:
            gc.enable()
