"""The two ends of a federation's downlink."""

from __future__ import annotations

import random

import pytest
import torch

from lbgm_compress import (
    LBGM,
    Atomo,
    ErrorFeedback,
    Identity,
    LookBackSubspace,
    OutOfSyncError,
    PayloadError,
    SignSGD,
    TopK,
)
from lbgm_compress.endpoints import Publisher, Subscriber
from lbgm_compress.endpoints.downlink import Chain, Whole, travels_in_half
from tests.laws import assert_same_bits, saved_and_loaded

SHAPES = {"matrix": (24, 40), "vector": (30,), "scalar": (), "empty": (0, 3)}
SUBSPACE = LookBackSubspace(4, values="int4")
COMPRESSORS = [
    Identity(),
    TopK(0.1, "int2"),
    SUBSPACE,
    LookBackSubspace(2, 0.5, refresh=2, values="int8"),
    LBGM(Atomo(2), delta=0.5),
    SignSGD(scaled=True),
]


def model_of(seed, dtype=torch.float32, like=None, scale=0.05):
    """Return a model, or one that is near to another."""
    generator = torch.Generator().manual_seed(seed)
    noise = {n: torch.randn(shape, generator=generator) for n, shape in SHAPES.items()}
    if like is None:
        return {name: tensor.to(dtype) for name, tensor in noise.items()}
    return {name: like[name] + (scale * noise[name]).to(dtype) for name in SHAPES}


def models(count, dtype=torch.float32):
    """Return the models of a training."""
    found = [model_of(0, dtype)]
    for seed in range(1, count):
        found.append(model_of(seed, dtype, found[-1]))
    return found


@pytest.mark.parametrize("compressor", COMPRESSORS, ids=repr)
@pytest.mark.parametrize("first", ["float32", "float16", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
def test_client_holds_the_model_of_the_server_in_every_round(compressor, first, dtype):
    publisher, subscriber = Publisher(compressor, first=first), Subscriber(compressor, first=first)
    for x in models(6, dtype):
        version = publisher.publish(x)
        subscriber.apply(publisher.update(subscriber.version or None))
        assert subscriber.version == version == publisher.version
        assert_same_bits(subscriber.model, publisher.model)
        for name, tensor in x.items():
            assert (publisher.model[name].shape, publisher.model[name].dtype) == (
                tensor.shape,
                dtype,
            )


def test_without_loss_clients_hold_the_model_that_was_aggregated():
    publisher = Publisher(Identity())
    for x in models(4):
        publisher.publish(x)
        for name, held in publisher.model.items():
            assert torch.allclose(held, x[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("first", ["float32", "float16", "int8"])
def test_what_a_message_loses_comes_with_later_ones(first):
    publisher = Publisher(TopK(0.05), first=first)
    publisher.publish(model_of(0))
    x = model_of(1, like=publisher.model, scale=1.0)
    missing = []
    for step in range(40):
        # The server's model hardly moves, so that there is always something to send.
        publisher.publish({name: tensor + 1e-6 * step for name, tensor in x.items()})
        missing.append(float((publisher.model["matrix"] - x["matrix"]).norm()))
    assert missing[-1] < 0.01 * missing[0]


def test_unchanged_model_makes_no_new_version():
    publisher = Publisher(SUBSPACE)
    first, second = models(2)
    publisher.publish(first)
    version = publisher.publish(second)
    assert publisher.publish({name: tensor.clone() for name, tensor in second.items()}) == version
    assert publisher.update(version) == Chain(version, ())


def test_client_that_missed_rounds_is_sent_what_it_lacks_or_everything():
    publisher = Publisher(TopK(0.2, "int2"))
    early, late, never = (Subscriber(publisher.compressor) for _ in range(3))
    states = models(40)
    publisher.publish(states[0])
    for subscriber in (early, late):
        subscriber.apply(publisher.update())
    for x in states[1:4]:
        publisher.publish(x)
    update = publisher.update(late.version)
    assert isinstance(update, Chain)
    assert len(update.messages) == 3
    late.apply(update)
    for x in states[4:]:
        publisher.publish(x)
    assert publisher.held_bytes() <= publisher.whole_bytes()
    assert isinstance(publisher.update(early.version), Whole)
    for subscriber in (early, late, never):
        subscriber.apply(publisher.update(subscriber.version or None))
        assert_same_bits(subscriber.model, publisher.model)
    # One more message for each of them.
    publisher.publish(model_of(100, like=states[-1]))
    for subscriber in (early, late, never):
        update = publisher.update(subscriber.version)
        assert isinstance(update, Chain)
        assert len(update.messages) == 1
        subscriber.apply(update)
        assert_same_bits(subscriber.model, publisher.model)


def test_history_bounds_what_is_kept():
    publisher = Publisher(Identity(), history=0)
    first, second, third = models(3)
    old = publisher.publish(first)
    publisher.publish(second)
    assert publisher.held_bytes() == 0
    assert not publisher.knows(old)
    assert isinstance(publisher.update(old), Whole)
    publisher = Publisher(TopK(0.01), history=10**9)
    for x in models(200):
        publisher.publish(x)
    assert 0 < publisher.held_bytes() <= publisher.whole_bytes()
    assert publisher.knows(publisher.publish(third))


def test_whole_model_in_half_precision_is_half_as_large_and_loses_nothing():
    sizes = {}
    for first in ("float32", "float16"):
        publisher = Publisher(Identity(), first=first)
        x = {**model_of(0), "large": torch.tensor([1e5, 1.0])}
        publisher.publish(x)
        sizes[first] = publisher.whole_bytes()
        whole = publisher.update()
        for name, tensor in whole.model.items():
            if travels_in_half(tensor, first):
                assert torch.equal(tensor.half().float(), tensor)
            else:
                assert torch.equal(tensor, x[name])
    assert not travels_in_half(whole.model["large"], "float16")
    assert sizes["float32"] - sizes["float16"] == 2 * (24 * 40 + 30 + 1)


def test_first_version_travels_in_int8_with_all_messages_since_as_long_as_that_is_shorter():
    publisher = Publisher(TopK(0.05, "int8"), first="int8")
    xs = models(30)
    base = publisher.publish(xs[0])
    early = Subscriber(publisher.compressor, first="int8")
    early.apply(publisher.update())
    # A scale for each block of 256 elements; the scalar stays as it is.
    assert publisher.whole_bytes() == 24 * 40 + 4 * 4 + 30 + 4 + 4
    half = 2 * (24 * 40 + 30 + 1)
    for name, tensor in early.model.items():
        step = xs[0][name].abs().amax() / 127 if tensor.numel() else 0
        assert ((tensor - xs[0][name]).abs() <= 0.51 * step).all()
        assert (name in publisher.update().coded) == (name in ("matrix", "vector"))
    kinds = []
    for x in xs[1:]:
        publisher.publish(x)
        early.apply(publisher.update(early.version))
        late = Subscriber(publisher.compressor, first="int8")
        update = publisher.update()
        assert isinstance(update, Whole)
        late.apply(update)
        assert late.version == early.version == publisher.version
        assert_same_bits(late.model, publisher.model)
        assert_same_bits(early.model, publisher.model)
        kinds.append(update.version == base)
        assert len(update.messages) == (len(kinds) if kinds[-1] else 0)
        assert bool(update.coded) == kinds[-1]
        assert publisher.whole_bytes() <= half
    # The gap to half precision is 968 bytes, and a message takes 90 to 130.
    assert 7 <= kinds.index(False) <= 11
    assert not any(kinds[kinds.index(False) :])


def test_client_that_holds_a_version_within_a_whole_with_messages_takes_those_that_it_lacks():
    publisher = Publisher(SUBSPACE, first="int8")
    subscriber = Subscriber(SUBSPACE, first="int8")
    for x in models(3):
        publisher.publish(x)
        if not subscriber.version:
            subscriber.apply(publisher.update())
    whole = publisher.update()
    held, state = subscriber.version, subscriber.state_dict()
    assert whole.versions() == [held, *publisher.update(held).versions()[1:]]
    with pytest.raises(PayloadError):
        subscriber.apply(whole._replace(messages=(whole.messages[0], whole.messages[1][:-1])))
    assert_same_bits(subscriber.state_dict(), state)
    subscriber.apply(whole)
    assert_same_bits(subscriber.model, publisher.model)


def test_first_version_in_int8_is_not_kept_where_messages_since_are_not():
    publisher = Publisher(TopK(0.05), first="int8", history=0)
    first, second = models(2)
    publisher.publish(first)
    assert publisher.update().coded
    publisher.publish(second)
    assert not publisher.update().coded
    assert publisher.whole_bytes() == 2 * (24 * 40 + 30 + 1)


def test_mask_of_inf_stays_as_it_is_and_new_inf_sends_everything():
    publisher, subscriber = Publisher(SUBSPACE), Subscriber(SUBSPACE)
    mask = torch.full((8, 8), float("-inf")).triu(1)
    for x in models(3):
        publisher.publish({**x, "mask": mask})
        subscriber.apply(publisher.update(subscriber.version or None))
        assert torch.equal(subscriber.model["mask"], mask)
    assert isinstance(publisher.update(subscriber.version), Chain)
    held = subscriber.version
    broken = {**x, "vector": torch.full((30,), float("inf")), "mask": mask}
    publisher.publish(broken)
    assert isinstance(publisher.update(held), Whole)
    subscriber.apply(publisher.update(held))
    assert_same_bits(subscriber.model, broken)
    publisher.publish({**x, "mask": mask})
    subscriber.apply(publisher.update(subscriber.version))
    assert_same_bits(subscriber.model, publisher.model)
    assert subscriber.model["vector"].isfinite().all()


def test_model_of_another_shape_begins_anew():
    publisher, subscriber = Publisher(SUBSPACE), Subscriber(SUBSPACE)
    publisher.publish(model_of(0))
    subscriber.apply(publisher.update())
    other = {"matrix": torch.randn(3, 5)}
    publisher.publish(other)
    update = publisher.update(subscriber.version)
    assert isinstance(update, Whole)
    subscriber.apply(update)
    assert_same_bits(subscriber.model, other)


def test_update_that_does_not_begin_with_the_held_version_changes_nothing():
    publisher, subscriber = Publisher(SUBSPACE), Subscriber(SUBSPACE)
    first, second, third = models(3)
    publisher.publish(first)
    subscriber.apply(publisher.update())
    held, state = subscriber.model, subscriber.state_dict()
    publisher.publish(second)
    later = publisher.version
    publisher.publish(third)
    for update in (publisher.update(later), Chain(b"x" * 16, ())):
        with pytest.raises(OutOfSyncError, match="does not hold a version"):
            subscriber.apply(update)
    good = publisher.update(subscriber.version)
    with pytest.raises(PayloadError):
        subscriber.apply(good._replace(messages=(good.messages[0], good.messages[1][:-1])))
    assert subscriber.model is held
    assert_same_bits(subscriber.state_dict(), state)
    subscriber.apply(good)
    assert_same_bits(subscriber.model, publisher.model)


@pytest.mark.parametrize("first", ["float16", "int8"])
def test_states_survive_a_file_and_go_on_bit_for_bit(first):
    publisher, subscriber = Publisher(SUBSPACE, first=first), Subscriber(SUBSPACE)
    subscriber.first = first
    xs = models(6)
    for x in xs[:3]:
        publisher.publish(x)
        subscriber.apply(publisher.update(subscriber.version or None))
    other, copy = Publisher(SUBSPACE, first=first), Subscriber(SUBSPACE, first=first)
    other.load_state_dict(saved_and_loaded(publisher.state_dict()))
    copy.load_state_dict(saved_and_loaded(subscriber.state_dict()))
    for x in xs[3:]:
        other.publish(x)
        for one in (subscriber, copy):
            one.apply(other.update(one.version))
            assert_same_bits(one.model, other.model)
    late = Subscriber(SUBSPACE, first=first)
    late.apply(other.update())
    assert_same_bits(late.model, other.model)
    assert bool(other.update().coded) == (first == "int8")
    empty = Publisher(SUBSPACE, first=first)
    empty.load_state_dict(Publisher(SUBSPACE, first=first).state_dict())
    with pytest.raises(RuntimeError, match=r"call publish\(\) first"):
        empty.update()
    with pytest.raises(ValueError, match=f"first='{first}', and this end 'float32'"):
        Publisher(SUBSPACE).load_state_dict(publisher.state_dict())
    with pytest.raises(ValueError, match="the state is that of"):
        Publisher(Identity(), first=first).load_state_dict(publisher.state_dict())


@pytest.mark.parametrize("seed", range(12))
def test_no_client_has_a_wrong_model_on_a_random_walk(seed):
    """Clients lose messages and states; the server returns to older states."""
    draw = random.Random(seed)
    compressor = draw.choice(COMPRESSORS)
    first = ["float32", "float16", "int8"][seed % 3]
    publisher = Publisher(compressor, first=first, history=draw.choice([None, 0, 2000]))
    x = model_of(seed)
    publisher.publish(x)
    saved = [(publisher.state_dict(), x)]
    clients = [Subscriber(compressor, first=first) for _ in range(4)]
    # The versions that clients had confirmed, as the server knows them.
    known = [None] * 4
    backups = [client.state_dict() for client in clients]
    for step in range(100):
        x = model_of(1000 + step, like=x)
        publisher.publish(x)
        if draw.random() < 0.1:
            saved.append((saved_and_loaded(publisher.state_dict()), x))
        if draw.random() < 0.05:
            state, x = draw.choice(saved)
            publisher.load_state_dict(state)
        i = draw.randrange(4)
        event = draw.random()
        if event < 0.1:
            clients[i] = Subscriber(compressor, first=first)
        elif event < 0.2 and clients[i].version:
            backups[i] = saved_and_loaded(clients[i].state_dict())
        elif event < 0.3 and backups[i]["version"]:
            clients[i].load_state_dict(backups[i])
        elif event < 0.4:
            known[i] = None
        wholes = 0
        while True:
            update = publisher.update(known[i])
            wholes += isinstance(update, Whole)
            if draw.random() < 0.15:
                # The message is lost.
                break
            try:
                clients[i].apply(update)
            except OutOfSyncError:
                assert isinstance(update, Chain)
                known[i] = None
                continue
            assert clients[i].version == publisher.version
            assert_same_bits(clients[i].model, publisher.model)
            if draw.random() < 0.8:
                known[i] = clients[i].version
            break
        assert wholes <= 1


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: Publisher("TopK"), TypeError, "compressor"),
        (lambda: Publisher(ErrorFeedback(SUBSPACE)), ValueError, "leave out ErrorFeedback"),
        (lambda: Publisher(SignSGD(vote=True)), ValueError, r"SignSGD\(scaled=True\)"),
        (lambda: Publisher(SUBSPACE, first="int4"), ValueError, "'float32', 'float16' or 'int8'"),
        (lambda: Publisher(SUBSPACE, history=-1), ValueError, "history"),
        (lambda: Publisher(SUBSPACE).publish({}), ValueError, "no tensors"),
        (lambda: Publisher(SUBSPACE).publish({"w": torch.ones(2).int()}), TypeError, "'w'"),
        (lambda: Subscriber(None), TypeError, "compressor"),
    ],
)
def test_wrong_use_names_the_mistake(call, error, message):
    with pytest.raises(error, match=message):
        call()
