"""Malformed and hostile replies: the server rejects them, and the round goes on."""

from __future__ import annotations

import logging
import random
import resource

import numpy as np
import pytest

pytest.importorskip("flwr", reason="Flower is not installed: it needs Python 3.11")

from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord
from flwr.serverapp import strategy as flower

from lbgm_compress import (
    LBGM,
    ErrorFeedback,
    LookBackSubspace,
    TopK,
)
from lbgm_compress.adapters.flower import (
    CompressedStrategy,
    compression_mod,
)
from lbgm_compress.adapters.flower.archive import unpack_state
from lbgm_compress.adapters.flower.reply import DTYPES
from lbgm_compress.adapters.flower.request import KEY
from tests.flower_loopback import Kept, LoopbackGrid, arrays_of, make_app, one_round
from tests.laws import assert_same_bits
from tests.soak import length

pytestmark = pytest.mark.flower


@pytest.fixture(autouse=True)
def same_draws():
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002  Flower's noise comes from there


def hostile(rng, reply, others, arrays):
    """Return a reply with one of many faults."""
    content = reply.content
    [(key, record)] = content.array_records.items()
    array = record[KEY]
    [(metrics_key, metrics)] = content.metric_records.items()
    what = rng.randrange(17)
    data = bytearray(array.data)
    if what < 7:
        for _ in range(rng.choice((1, 1, 3))):
            where = rng.randrange(len(data) or 1)
            where = min(where, rng.randrange(40)) if rng.random() < 0.6 else where
            kind = rng.randrange(7)
            if kind == 0:
                del data[where:]
            elif kind == 1:
                data[where:where] = rng.randbytes(rng.randrange(30))
            elif kind == 2:
                data[where : where + 8] = rng.choice((b"\xff", b"\0", b"\x7f", b"\x80")) * 8
            elif kind == 3:
                data[where : where + 4] = np.float32(rng.choice((np.nan, np.inf))).tobytes()
            elif kind == 4:
                data[where:] = rng.choice(others)[where:]
            elif kind == 5:
                data += data[where:]
            elif data:
                data[min(where, len(data) - 1)] ^= 1 << rng.randrange(8)
        shape = rng.choice(((len(data),), (2**60,), ()))
        record[KEY] = Array(
            "uint8", shape, rng.choice((array.stype, array.stype, "numpy.ndarray")), bytes(data)
        )
    elif what == 7:
        content[key] = ArrayRecord({name: Array(np.ones(2**10)) for name in ("a", "b")})
    elif what == 8:
        content["more"] = arrays_of()
    elif what == 9:
        del content[rng.choice((key, metrics_key))]
    elif what == 10:
        metrics["num-examples"] = rng.choice((-1, 0, 2**62, float("nan"), float("inf"), [1, 2]))
    elif what == 11:
        metrics["loss"] = rng.choice(([], [1.0, 2.0], 3))
        metrics[rng.choice(("loss", "other"))] = 1.0
    elif what == 12:
        content[metrics_key] = MetricRecord()
    elif what == 13:
        # Other dtypes than those of all others, with elements that fit them.
        dtype = rng.choice(("complex128", "float16", "float64", "int8"))
        code = DTYPES.index(dtype) | 128
        with np.errstate(over="ignore", invalid="ignore"):
            new = {n: np.full(a.numpy().shape, 1e300).astype(dtype) for n, a in arrays.items()}
        parts = bytes([1, 1, *(len(arrays) * [code])])
        data = parts + b"".join(new[name].tobytes() for name in sorted(new))
        record[KEY] = Array("uint8", (len(data),), array.stype, data)
    elif what == 14:
        del content[key]
        content["x"], content[key] = record, ConfigRecord()
    elif what == 15:
        del metrics["num-examples"]
    else:
        metadata = reply.metadata.__dict__
        field = rng.choice(("_src_node_id", "_reply_to_message_id"))
        metadata[field] = rng.choice((101, 5, -1)) if field == "_src_node_id" else "message-1"
    return reply


@pytest.mark.parametrize(
    ("compressor", "rounds"),
    [
        (LBGM(TopK(0.2), delta=0.4), 120),
        (ErrorFeedback(LookBackSubspace(2)), 60),
        pytest.param(LBGM(TopK(0.2), delta=0.4), length(1000, 300), marks=pytest.mark.soak),
        pytest.param(ErrorFeedback(LookBackSubspace(2)), length(1000, 200), marks=pytest.mark.soak),
    ],
    ids=repr,
)
def test_hostile_replies_harm_nobody_else(compressor, rounds, caplog):
    """Client 100 is hostile, the others are honest. `make soak` sends a thousand such replies."""
    caplog.set_level(logging.ERROR, "flwr")
    rng = random.Random(repr(compressor))
    others_data: list[bytes] = []
    grid = LoopbackGrid(make_app([compression_mod], noise=0.2, rate=0.02), 3)
    grid.contexts[100].node_config["partition-id"] = 0
    inner = Kept(fraction_evaluate=0.0)
    strategy = CompressedStrategy(inner, compressor)
    arrays = arrays_of(counter=np.array(3), mask=np.full(3, -np.inf, dtype=np.float32))

    def tamper(replies):
        changed = []
        for reply in replies:
            if reply.metadata.src_node_id == 100:
                others_data.append(
                    bytes(next(iter(reply.content.array_records.values()))[KEY].data)
                )
                reply = hostile(rng, reply, others_data[-10:], arrays)
            changed.append(reply)
        rng.shuffle(changed)
        return changed

    grid.tamper = tamper
    rejected, peak = 0, None
    for number in range(rounds):
        if number == 50:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        result = strategy.start(grid, arrays, num_rounds=1)
        metrics = result.train_metrics_clientapp[1]
        rejected += metrics["rejected-replies"]
        received = inner.received()
        assert {101, 102} - set(received) in (set(), {101})
        assert 102 in received
        for name, array in result.arrays.items():
            assert np.isfinite(array.numpy()).all() or name == "mask"
        if 101 not in received:
            # Two replies in its name are both rejected. The client sends in full next time.
            assert metrics["rejected-replies"] >= 2
        else:
            for node in (101, 102):
                # Server and client hold the same state.
                client = unpack_state(grid.contexts[node].state[KEY]["state"])["tensors"]
                server = held_of(strategy, node)
                assert server.keys() <= client.keys()
                for name in server:
                    assert server[name]["id"] == client[name]["id"]
                    assert_same_bits(dict(server[name]["state"]), dict(client[name]["held"]))
        grid.contexts[100].node_config["partition-id"] = rng.randrange(10)
    assert rejected > rounds / 2
    assert strategy.totals.failed == 0
    # In kilobytes.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 60_000


def held_of(strategy, node):
    """Return the state that a server holds of a client, by tensor."""
    return unpack_state(strategy.state_dict()["clients"][node]["state"].numpy().tobytes())


def test_client_without_the_mod_is_told_what_to_do(caplog):
    caplog.set_level(logging.WARNING, "flwr")
    strategy = CompressedStrategy(flower.FedAvg(), LBGM())
    result = one_round(strategy, make_app([]))
    assert result.train_metrics_clientapp[1]["rejected-replies"] == 3
    assert not result.arrays
    assert "put compression_mod first into ClientApp(mods=[...])" in caplog.text


def test_update_of_inf_or_nan_is_that_clients_error(caplog):
    def train(arrays, partition):
        new = {name: array + np.float32(1) for name, array in arrays.items()}
        if partition == 1:
            new["layer.bias"] = np.full_like(new["layer.bias"], np.nan)
        return new

    inner = Kept()
    strategy = CompressedStrategy(inner, LBGM())
    result = one_round(strategy, make_app([compression_mod], train))
    assert result.train_metrics_clientapp[1]["rejected-replies"] == 1
    assert set(inner.received()) == {100, 102}
    assert "makes elements of 'layer.bias' inf or nan" in caplog.text
    assert set(strategy.held_clients()) == {100, 102}


@pytest.mark.parametrize(
    ("weights", "accepted"), [((1, 2, -3), 2), ((0, 0, 1), 1), ((0, 0, 0), 0), ((1, 1, 2**64), 2)]
)
def test_weights_that_make_no_average_are_refused(weights, accepted):
    def tamper(replies):
        for weight, reply in zip(weights, replies, strict=True):
            reply.content["metrics"]["num-examples"] = float(weight)
        return replies

    inner = Kept()
    result = one_round(CompressedStrategy(inner, LBGM()), tamper=tamper)
    assert len(inner.received()) == accepted
    assert result.train_metrics_clientapp[1]["rejected-replies"] == 3 - accepted
    assert bool(result.arrays) == bool(accepted)


@pytest.mark.parametrize(
    "inner",
    [
        flower.FedAvg,
        flower.FedMedian,
        flower.FedAdam,
        flower.FedTrimmedAvg,
        lambda: flower.Krum(num_malicious_nodes=1),
    ],
    ids=["FedAvg", "FedMedian", "FedAdam", "FedTrimmedAvg", "Krum"],
)
@pytest.mark.parametrize(
    ("clients", "rounds"),
    [
        *((clients, 20) for clients in (1, 2, 4)),
        pytest.param(4, length(300, 30), marks=pytest.mark.soak),
    ],
)
def test_no_hostile_reply_makes_any_strategy_fail(inner, clients, rounds, caplog):
    """The hostile client answers first or last, and in one case is the only one."""
    caplog.set_level(logging.ERROR, "flwr")
    rng = random.Random(clients)
    grid = LoopbackGrid(make_app([compression_mod]), clients)
    strategy = CompressedStrategy(inner(), LBGM(TopK(0.2)))
    strategy.strategy.min_train_nodes = strategy.strategy.min_available_nodes = 1
    strategy.strategy.min_evaluate_nodes = 1
    arrays = arrays_of(counter=np.array(3))
    others: list[bytes] = [b"0"]

    def tamper(replies):
        others.append(bytes(next(iter(replies[0].content.array_records.values()))[KEY].data))
        first = rng.choice(replies)
        rest = [reply for reply in replies if reply is not first]
        return rng.choice((lambda a, b: [a, *b], lambda a, b: [*b, a]))(
            hostile(rng, first, others[-10:], arrays), rest
        )

    grid.tamper = tamper
    for _ in range(rounds):
        result = strategy.start(grid, arrays, num_rounds=1)
        for name, array in result.arrays.items():
            value = array.numpy()
            assert np.isfinite(value).all()
            assert value.dtype.kind == "f"
            if name != "counter" and clients == 4 and inner is not flower.FedAdam:
                assert value.dtype == np.float32


def test_custom_strategy_may_have_clients_without_metrics_or_with_lists_of_any_length():
    class Custom(Kept):
        weighted_by_key = None

        def __init__(self, **options):
            options = {"fraction_evaluate": 0.0, **options}
            super().__init__(train_metrics_aggr_fn=lambda records, key: None, **options)
            self.weighted_by_key = None

        def aggregate_train(self, server_round, replies):
            self.replies = list(replies)
            return None, None

    def with_lists(replies):
        for i, reply in enumerate(replies):
            reply.content["metrics"]["losses"] = [0.5] * (i + 1)
        return replies

    def without_metrics(replies):
        for reply in replies:
            del reply.content["metrics"]
        return replies

    for tamper in (with_lists, without_metrics):
        inner = Custom()
        result = one_round(CompressedStrategy(inner, LBGM()), tamper=tamper)
        assert len(inner.received()) == 3
        assert result.train_metrics_clientapp[1]["rejected-replies"] == 0


def test_reply_to_an_evaluation_that_differs_is_refused_too():
    class Evaluated(LoopbackGrid):
        def send_and_receive(self, messages, *, timeout=None):
            replies = super().send_and_receive(messages, timeout=timeout)
            if replies and replies[0].metadata.message_type == "evaluate":
                replies[0].content["metrics"] = MetricRecord({"num-examples": [1, 2]})
            return replies

    strategy = CompressedStrategy(flower.FedAvg(), LBGM())
    grid = Evaluated(make_app([compression_mod]), 3)
    result = strategy.start(grid, arrays_of(), num_rounds=1)
    assert dict(result.evaluate_metrics_clientapp[1]) == pytest.approx({"accuracy": 0.25})
