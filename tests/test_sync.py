"""Messages that are lost, repeated or reordered, and ends that are restarted."""

from __future__ import annotations

import copy
import random
from collections import Counter

import pytest
import torch

from lbgm_compress import (
    LBGM,
    ErrorFeedback,
    LookBackSubspace,
    OutOfSyncError,
    Receiver,
    Sender,
    TopK,
)
from lbgm_compress.wire.message import HEADER_SIZE, Kind
from tests.laws import assert_same_bits

SHAPES = {"a": (6, 8), "b": (20,)}


class Worker:
    """A sender and, beside it, what each of its messages stands for.

    Every gradient is drawn anew, so that two look-back gradients never have the same elements.
    """

    def __init__(self, compressor, rng):
        self.compressor = compressor
        self.generator = torch.Generator().manual_seed(rng.randrange(2**31))
        self.sender = Sender(compressor)
        self.direction = self.draw()

    def draw(self):
        return {
            name: torch.randn(shape, generator=self.generator) for name, shape in SHAPES.items()
        }

    def send(self, rng, peer=None):
        for name, fresh in self.draw().items():
            if rng.random() < 0.3:
                self.direction[name] = fresh
        grads = {
            name: rng.uniform(-2, 2) * direction + 0.01 * fresh
            for (name, direction), fresh in zip(
                self.direction.items(), self.draw().values(), strict=True
            )
        }
        return self.sent(grads, peer)

    def sent(self, grads, peer):
        message = self.sender.compress(grads, peer=peer)
        expected, needs, sets = {}, {}, {}
        for name, report in self.sender.report().items():
            kept = self.sender.state_dict()["tensors"][name]["state"]["look_back"]
            compressed = self.compressor.inner.compress(grads[name], {})[1]
            rho = (compressed * kept).sum() / (kept * kept).sum()
            expected[name] = rho * kept if report.recycled else compressed
            needs[name] = kept.clone() if report.recycled else None
            sets[name] = None if report.recycled else kept.clone()
        return Sent(message, expected, needs, sets)


class SubspaceWorker(Worker):
    """A sender of `LookBackSubspace`, whose directions are looked up in its state."""

    def directions(self, name):
        state = self.sender.state_dict()["tensors"].get(name, {}).get("state", {})
        return state.get("inner", state).get("directions")

    def sent(self, grads, peer):
        before = {name: self.directions(name) for name in grads}
        message, decoded = self.sender.encode(grads, peer=peer)
        kinds = dict(zip(sorted(grads), message[HEADER_SIZE:].tolist(), strict=False))
        return Sent(
            message,
            {name: tensor.dense().clone() for name, tensor in decoded.items()},
            {name: before[name] if kinds[name] & Kind.USES else None for name in grads},
            {name: self.directions(name) if kinds[name] & Kind.SETS else None for name in grads},
        )


class Sent:
    def __init__(self, message, expected, needs, sets):
        self.message, self.expected = message, expected
        self.needs, self.sets = needs, sets
        self.recycled = sum(
            needs[name] is not None and sets[name] is None for name in self.expected
        )
        self.replaced = sum(
            needs[name] is not None and sets[name] is not None for name in self.expected
        )


def deliver(receiver, sent, held):
    """Decode one message; `held` is what a receiver must hold, computed without its code.

    Returns whether it was decoded.
    """
    fits = all(
        sent.needs[name] is None
        or (held.get(name) is not None and torch.equal(held[name], sent.needs[name]))
        for name in SHAPES
    )
    before = copy.deepcopy(receiver.state_dict())
    try:
        decoded = receiver.decompress("worker", sent.message)
    except OutOfSyncError:
        assert not fits, "refused although it held what the message recycles"
        assert_same_bits(receiver.state_dict(), before)
        return False
    assert fits, "decoded although it did not hold what the message recycles"
    for name, tensor in decoded.items():
        assert torch.allclose(tensor, sent.expected[name], rtol=1e-5, atol=1e-6)
        if sent.sets[name] is not None:
            held[name] = sent.sets[name]
    return True


@pytest.mark.parametrize("digests", [True, False], ids=["with digests", "without digests"])
@pytest.mark.parametrize(
    "compressor",
    [
        LBGM(),
        LBGM(TopK(0.3)),
        LookBackSubspace(2, 0.3, view="flat"),
        ErrorFeedback(LookBackSubspace(2, 0.5, values="int4")),
    ],
    ids=repr,
)
def test_no_wrong_gradient_in_rounds_of_losses_and_restarts(compressor, digests):
    rng = random.Random(1)
    rounds = 10_000 if isinstance(compressor, LBGM) and digests else 2_000
    worker = (Worker if isinstance(compressor, LBGM) else SubspaceWorker)(compressor, rng)
    receiver = Receiver(compressor, worker.direction)
    held, waiting, seen = {}, [], Counter()
    sender_states, receiver_states = [worker.sender.state_dict()], [(receiver.state_dict(), {})]
    for _ in range(rounds):
        event = rng.random()
        if event < 0.01:
            worker.sender = Sender(compressor)
            seen["sender restarted from nothing"] += 1
        elif event < 0.03:
            worker.sender.load_state_dict(rng.choice(sender_states))
            seen["sender restarted from an older checkpoint"] += 1
        elif event < 0.035:
            receiver.drop("worker")
            held = {}
            seen["receiver restarted from nothing"] += 1
        elif event < 0.045:
            state, known = rng.choice(receiver_states)
            receiver.load_state_dict(state)
            held = dict(known)
            seen["receiver restarted from an older checkpoint"] += 1
        elif event < 0.1:
            sender_states = [*sender_states[-9:], copy.deepcopy(worker.sender.state_dict())]
            receiver_states = [
                *receiver_states[-9:],
                (copy.deepcopy(receiver.state_dict()), dict(held)),
            ]

        sent = worker.send(rng, receiver.digest("worker") if digests else None)
        seen["recycled"] += sent.recycled
        seen["replaced"] += sent.replaced
        fate = rng.random()
        if fate < 0.15:
            seen["lost"] += 1
            continue
        if fate < 0.3:
            waiting.append(sent)
            seen["reordered"] += 1
        else:
            decoded = deliver(receiver, sent, held)
            seen["decoded" if decoded else "refused"] += 1
            if digests:
                # Whatever happened before, the next message that arrives in time is understood.
                assert decoded
            elif not decoded:
                worker.sender.reset()
            if fate < 0.4:
                waiting.append(sent)
                seen["repeated"] += 1
        if waiting and rng.random() < 0.25:
            late = waiting.pop(rng.randrange(len(waiting)))
            seen["late decoded" if deliver(receiver, late, held) else "late refused"] += 1
    for what in (
        "sender restarted from nothing",
        "sender restarted from an older checkpoint",
        "receiver restarted from nothing",
        "receiver restarted from an older checkpoint",
        "late refused",
        "late decoded",
        *(() if digests else ("refused",)),
    ):
        assert seen[what] >= rounds / 500, seen
    for what in ("lost", "reordered", "repeated", "decoded", "recycled"):
        assert seen[what] >= rounds / 20, seen
    assert isinstance(compressor, LBGM) or seen["replaced"] >= rounds / 20, seen
