"""Memory of the two ends between rounds."""

from __future__ import annotations

import gc

import pytest
import torch

from lbgm_compress import (
    LBGM,
    Atomo,
    Identity,
    LookBackSubspace,
    Receiver,
    Sender,
    SignSGD,
    TopK,
)
from lbgm_compress.wire.values import values_size

N = 1_000_000
TENSORS = 3
DENSE = 4 * N
SMALL = 10_000


def held(*owners: object) -> int:
    """Return the bytes of all tensors that `owners` reach, each storage once."""
    seen: set[int] = set()
    storages: dict[int, int] = {}
    queue = list(owners)
    while queue:
        item = queue.pop()
        if id(item) in seen or isinstance(item, type):
            continue
        seen.add(id(item))
        if isinstance(item, torch.Tensor):
            storage = item.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        elif isinstance(item, (dict, list, tuple, set)) or hasattr(item, "__dict__"):
            queue += gc.get_referents(item)
    return sum(storages.values())


def rounds(compressor, count=4):
    generator = torch.Generator().manual_seed(0)
    base = {f"t{i}": torch.randn(1000, N // 1000, generator=generator) for i in range(TENSORS)}
    sender, receiver = Sender(compressor), Receiver(compressor, base)
    sizes = []
    for number in range(count):
        grads = {name: grad * (1 + number) for name, grad in base.items()}
        if number == count - 1:
            grads = {name: torch.randn(1000, 1000, generator=generator) for name in base}
        message = sender.compress(grads)
        receiver.decompress("worker", message)
        sizes.append(message.numel())
        del grads
    return sender, receiver, sizes


@pytest.mark.parametrize("inner", [Identity(), TopK(0.01), SignSGD(), Atomo(2)], ids=repr)
def test_sender_holds_one_dense_look_back_gradient_a_tensor_and_nothing_else(inner):
    sender, _, _ = rounds(LBGM(inner))
    assert TENSORS * DENSE <= held(sender) <= TENSORS * DENSE + SMALL


@pytest.mark.parametrize("inner", [Identity(), TopK(0.01), SignSGD(), Atomo(2)], ids=repr)
def test_receiver_holds_the_inner_payloads_and_nothing_else(inner):
    _, receiver, sizes = rounds(LBGM(inner))
    assert sizes[-1] / 1.01 - SMALL <= held(receiver) <= sizes[-1] + SMALL


@pytest.mark.parametrize("compressor", [Identity(), TopK(0.01), SignSGD(), Atomo(2)], ids=repr)
def test_compressors_without_a_memory_hold_nothing(compressor):
    sender, receiver, _ = rounds(compressor)
    assert held(sender) + held(receiver) <= SMALL


@pytest.mark.parametrize("values", ["float32", "int8", "int2"])
def test_both_ends_of_a_subspace_hold_directions_as_they_were_sent(values):
    compressor = LookBackSubspace(4, 0.1, values=values)
    sender, receiver, _ = rounds(compressor)
    directions = 4 * values_size(1000, values, torch.float32)
    assert 0 <= held(receiver) - TENSORS * directions < 100
    # And two in float32 to start from.
    assert 0 <= held(sender) - TENSORS * (directions + 2 * 4 * 1000) < 100


def test_receiver_of_many_workers_holds_their_compressed_gradients():
    compressor = LBGM(TopK(0.01))
    receiver = Receiver(compressor, {"x": torch.empty(N)})
    total = 0
    for worker in range(10):
        generator = torch.Generator().manual_seed(worker)
        message = Sender(compressor).compress({"x": torch.randn(N, generator=generator)})
        receiver.decompress(worker, message)
        total += message.numel()
    assert held(receiver) <= total + SMALL < DENSE
