"""Lost, repeated and reordered messages, and ends that are restarted."""

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
    SignSGD,
    TopK,
)
from lbgm_compress.wire.message import HEADER_SIZE, Kind
from tests.compressors import WITH_RECEIVER_STATE
from tests.laws import assert_same_bits
from tests.soak import length

SHAPES = {"a": (6, 8), "b": (20,)}


class Worker:
    """A sender, and the tensors that each of its messages must decode to.

    Every gradient is drawn anew, so that no two look-back gradients have the same elements.
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
    """A sender of `LookBackSubspace`, whose directions are read from its state."""

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
    """Decode one message, and return True unless it was refused.

    `held` is what the receiver must hold, computed without its code.
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
@pytest.mark.parametrize(
    "rounds", [600, pytest.param(length(10_000, 2_000), marks=pytest.mark.soak)]
)
def test_no_wrong_gradient_in_rounds_of_losses_and_restarts(compressor, digests, rounds):
    rng = random.Random(1)
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
                # After any event, the next message that arrives in time can be decoded.
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


class AnySender:
    """A sender of any compressor, and the look-back gradient that each message needs and sets.

    A look-back gradient is its identifier and the state that its receiver holds, which a compact
    sender keeps.
    """

    def __init__(self, compressor, rng):
        self.sender = Sender(compressor, compact=True)
        self.generator = torch.Generator().manual_seed(rng.randrange(2**31))
        self.direction = self.draw()

    def draw(self):
        return {
            name: torch.randn(shape, generator=self.generator) for name, shape in SHAPES.items()
        }

    def held(self):
        tensors = self.sender.state_dict()["tensors"]
        return {name: (entry["id"], entry["held"]) for name, entry in tensors.items()}

    def send(self, rng, peer):
        for name, fresh in self.draw().items():
            if rng.random() < 0.3:
                self.direction[name] = fresh
        grads = {name: rng.uniform(-2, 2) * grad for name, grad in self.direction.items()}
        before = self.held()
        message, decoded = self.sender.encode(grads, peer=peer)
        after = self.held()
        size = HEADER_SIZE
        needs, sets = {}, {}
        for name in sorted(grads):
            kind = int(message[size])
            size += self.sender.compressor.head_size(grads[name])
            if kind & Kind.USES:
                needs[name] = before[name]
            if kind & Kind.SETS:
                sets[name] = after[name]
        return message, {name: d.dense().clone() for name, d in decoded.items()}, needs, sets


@pytest.mark.parametrize("compressor", WITH_RECEIVER_STATE, ids=repr)
@pytest.mark.parametrize("rounds", [60, pytest.param(length(2_000, 300), marks=pytest.mark.soak)])
def test_message_is_decoded_just_where_the_receiver_holds_what_it_needs(compressor, rounds):
    rng = random.Random(repr(compressor))
    worker = AnySender(compressor, rng)
    receiver, held = Receiver(compressor, worker.direction), {}
    checkpoints, waiting, seen = [worker.sender.state_dict()], [], Counter()
    for _ in range(rounds):
        event = rng.random()
        if event < 0.05:
            worker.sender.load_state_dict(rng.choice(checkpoints))
        elif event < 0.1:
            receiver.drop("worker")
            held = {}
        elif event < 0.3:
            checkpoints = [*checkpoints[-4:], worker.sender.state_dict()]
        peer = receiver.digest("worker") if rng.random() < 0.5 else None
        waiting.append(worker.send(rng, peer))
        if rng.random() < 0.2:
            continue
        # Usually the last message arrives, sometimes an older one, which may have come before.
        waiting = waiting[-4:]
        late = rng.random() < 0.3
        message, expected, needs, sets = rng.choice(waiting) if late else waiting[-1]
        fits = all(name in held and held[name][0] == needs[name][0] for name in needs)
        before = receiver.state_dict()
        try:
            decoded = receiver.decompress("worker", message)
        except OutOfSyncError:
            seen["refused"] += 1
            assert not fits, "refused although it held what the message needs"
            assert_same_bits(receiver.state_dict(), before)
            continue
        assert fits, "decoded although it did not hold what the message needs"
        seen["decoded"] += 1
        seen["needed"] += bool(needs)
        for name, tensor in decoded.items():
            assert_same_bits(tensor, expected[name])
        held.update(sets)
        for name, entry in receiver.state_dict()["senders"].get("worker", {}).items():
            assert_same_bits((entry["id"], entry["state"]), held[name])
    assert seen["decoded"] > rounds / 3
    if compressor in (LBGM(delta=1.0), LBGM(SignSGD(scaled=True), 0.6), LookBackSubspace()):
        assert seen["needed"] > 0
        assert seen["refused"] > 0
