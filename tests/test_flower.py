"""The adapter for Flower: Flower's own messages, strategies and apps, within one process."""

from __future__ import annotations

import json
import logging
import random
import re
from dataclasses import dataclass

import numpy as np
import pytest
import torch

pytest.importorskip("flwr", reason="Flower is not installed: it needs Python 3.11")

from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import LocalDpMod, adaptiveclipping_mod, fixedclipping_mod
from flwr.common.constant import ErrorCode
from flwr.serverapp import strategy as flower

from lbgm_compress import (
    LBGM,
    Compressor,
    Identity,
    PayloadError,
    SignSGD,
    TopK,
)
from lbgm_compress.adapters.flower import (
    CompressedStrategy,
    CompressionMod,
    compression_mod,
    plot,
    plots,
)
from lbgm_compress.adapters.flower.request import KEY, Request
from lbgm_compress.adapters.grace import FromGrace
from lbgm_compress.compressor import Encoding
from lbgm_compress.decoded import Dense
from lbgm_compress.wire.message import Kind
from lbgm_compress.wire.values import as_bytes, from_bytes
from tests.flower_loopback import Kept, LoopbackGrid, arrays_of, make_app, one_round, start
from tests.grace_protocol import LargestK

pytestmark = pytest.mark.flower


@pytest.fixture(autouse=True)
def same_draws():
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002  Flower's noise comes from there


# --- the inner strategy ---------------------------------------------------------------------------

STRATEGIES = {
    "FedAvg": flower.FedAvg,
    "FedAvg, half": lambda: flower.FedAvg(fraction_train=0.5),
    "FedAvgM": lambda: flower.FedAvgM(server_momentum=0.9),
    "FedAdam": flower.FedAdam,
    "FedYogi": flower.FedYogi,
    "FedProx": lambda: flower.FedProx(proximal_mu=0.1),
    "FedMedian": flower.FedMedian,
    "FedTrimmedAvg": flower.FedTrimmedAvg,
    "Krum": lambda: flower.Krum(num_malicious_nodes=1),
    "server-side clipping": lambda: flower.DifferentialPrivacyServerSideFixedClipping(
        flower.FedAvg(), 0.01, 1.0, 6
    ),
    "adaptive server-side clipping": lambda: flower.DifferentialPrivacyServerSideAdaptiveClipping(
        flower.FedAvg(), 0.01, 6
    ),
}


@pytest.mark.parametrize("name", STRATEGIES)
def test_without_compression_every_strategy_gives_what_it_gives_alone(name):
    results = []
    for mods, wrap in (
        ([], lambda inner: inner),
        ([compression_mod], lambda inner: CompressedStrategy(inner, Identity())),
    ):
        random.seed(1)
        np.random.seed(1)  # noqa: NPY002
        grid = LoopbackGrid(make_app(mods, noise=0.0), 6)
        results.append(start(wrap(STRATEGIES[name]()), grid, arrays_of(), rounds=5))
    plain, ours = results
    assert list(plain) == list(ours)
    for parameter, expected in plain.items():
        assert ours[parameter].dtype == expected.dtype
        assert np.allclose(ours[parameter], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("where", ["inside", "around"])
@pytest.mark.parametrize(
    ("wrapper", "mod", "arguments"),
    [
        (flower.DifferentialPrivacyClientSideFixedClipping, fixedclipping_mod, (0.01, 1.0, 6)),
        (flower.DifferentialPrivacyClientSideAdaptiveClipping, adaptiveclipping_mod, (0.01, 6)),
    ],
)
def test_clients_clip_what_is_compressed_on_either_side_of_the_wrapper(
    wrapper, mod, arguments, where
):
    results = []
    for mods in ([mod], [compression_mod, mod]):
        np.random.seed(1)  # noqa: NPY002
        strategy = flower.FedAvg()
        if len(mods) == 1:
            strategy = wrapper(strategy, *arguments)
        elif where == "inside":
            strategy = CompressedStrategy(wrapper(strategy, *arguments), Identity())
        else:
            strategy = wrapper(CompressedStrategy(strategy, Identity()), *arguments)
        grid = LoopbackGrid(make_app(mods, noise=0.0), 6)
        results.append(start(strategy, grid, arrays_of(), rounds=3))
    for parameter, expected in results[0].items():
        assert np.allclose(results[1][parameter], expected, rtol=1e-4, atol=1e-4)


def test_wrapper_that_reads_replies_fails_aloud_when_it_is_on_the_outside():
    inner = CompressedStrategy(flower.FedAvg(), Identity())
    strategy = flower.DifferentialPrivacyServerSideFixedClipping(inner, 0.01, 1.0, 6)
    grid = LoopbackGrid(make_app([compression_mod]), 6)
    with pytest.raises(TypeError, match="lbgm_compress"):
        start(strategy, grid, arrays_of(), rounds=1)


def test_noise_that_a_client_adds_is_compressed_too():
    mods = [compression_mod, LocalDpMod(1.0, 0.1, 10.0, 1e-5)]
    strategy = CompressedStrategy(flower.FedAvg(), LBGM(TopK(0.1)))
    grid = LoopbackGrid(make_app(mods), 3)
    result = strategy.start(grid, arrays_of(), num_rounds=3)
    assert all(m["rejected-replies"] == 0 for m in result.train_metrics_clientapp.values())


def test_dtypes_integers_masks_and_excluded_arrays_arrive_exactly():
    mask = np.where(np.tri(5) > 0, 0.0, -np.inf).astype(np.float32)
    others = {
        "norm.counter": np.array(7, dtype=np.int64),
        "empty": np.zeros((0, 3), dtype=np.float32),
        "flags": np.array([True, False]),
        "half": np.linspace(-1, 1, 64, dtype=np.float16),
        "double": np.linspace(-1, 1, 50),
        "head.weight": np.linspace(-1, 1, 20, dtype=np.float32).reshape(4, 5),
        "mask": mask,
        "spectrum": np.array([1 + 2j], dtype=np.complex64),
    }
    seen = {}

    def train(arrays, partition):
        new = {name: array + array.dtype.type(1) for name, array in arrays.items()}
        new["flags"] = ~arrays["flags"].astype(bool)
        new["mask"] = arrays["mask"]
        new["norm.counter"] = np.asarray(arrays["norm.counter"].astype(np.int64) + 1)
        new["head.weight"] = np.float32(0.1) + arrays["head.weight"] * np.float32(1 / 3)
        seen[partition] = {k: np.asarray(v, dtype=others.get(k, v).dtype) for k, v in new.items()}
        return seen[partition]

    inner = Kept()
    strategy = CompressedStrategy(inner, TopK(0.1), exclude=["head.*"])
    grid = LoopbackGrid(make_app([compression_mod], train), 3)
    arrays = arrays_of(**others)
    for _ in range(2):
        # In the second round FedAvg has made float64 of the integers.
        arrays = strategy.start(grid, arrays, num_rounds=1).arrays
        received = inner.received()
        assert len(received) == 3
        for partition, node in enumerate(received):
            for name in ("norm.counter", "empty", "flags", "head.weight", "mask", "spectrum"):
                assert received[node][name].dtype == seen[partition][name].dtype
                assert np.array_equal(received[node][name], seen[partition][name])
            for name in ("half", "double"):
                assert received[node][name].dtype == others[name].dtype


def test_app_sees_neither_the_request_nor_a_changed_record():
    configs = []
    app = ClientApp(mods=[compression_mod])

    @app.train()
    def train(message: Message, ctxt: Context) -> Message:
        configs.append(
            {key: dict(record) for key, record in message.content.config_records.items()}
        )
        message.content["arrays"].to_torch_state_dict(keep_input=False)
        arrays = arrays_of(1)
        content = {"arrays": arrays, "metrics": MetricRecord({"num-examples": 1})}
        return Message(RecordDict(content), reply_to=message)

    class Sparse(flower.FedAvg):
        def configure_train(self, server_round, arrays, config, grid):
            for message in super().configure_train(server_round, arrays, config, grid):
                del message.content["config"]
                yield message
                break

    grid = LoopbackGrid(app, 2)
    strategy = CompressedStrategy(flower.FedAvg(fraction_evaluate=0.0), Identity())
    train_config = ConfigRecord({"lr": 0.1})
    strategy.start(grid, arrays_of(), num_rounds=1, train_config=train_config)
    assert configs == 2 * [{"config": {"lr": 0.1, "server-round": 1}}]
    assert KEY not in train_config
    configs.clear()
    strategy = CompressedStrategy(Sparse(fraction_evaluate=0.0), Identity())
    result = strategy.start(grid, arrays_of(), num_rounds=1)
    assert configs == [{}]
    assert result.train_metrics_clientapp[1]["rejected-replies"] == 0


def test_mod_does_nothing_to_messages_of_other_strategies():
    results = []
    for mods in ([], [compression_mod]):
        random.seed(1)
        results.append(start(flower.FedAvg(), LoopbackGrid(make_app(mods), 3), arrays_of(), 2))
    for name, value in results[0].items():
        assert np.array_equal(value, results[1][name])


# --- requests and replies -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("train", "reason"),
    [
        (lambda arrays, _: {"other": np.ones(3)}, "did not return the array 'layer.bias'"),
        (lambda arrays, _: {**arrays, "new": np.ones(3)}, "an array 'new' that it did not receive"),
        (
            lambda arrays, _: {**arrays, "layer.bias": np.ones(3, dtype=np.float32)},
            r"'layer.bias' with shape \(3,\), it received \(30,\)",
        ),
        (lambda arrays, _: {**arrays, "layer.bias": np.array(30 * ["a"])}, "only float16"),
    ],
)
def test_app_that_returns_other_arrays_gets_an_error_that_says_so(train, reason):
    replies = []

    def tamper(found):
        replies.extend(found)
        return found

    one_round(
        CompressedStrategy(flower.FedAvg(), LBGM()), make_app([compression_mod], train), tamper
    )
    for reply in replies:
        assert reply.has_error()
        assert reply.error.code == 6
        assert re.search(reason, reply.error.reason)


def test_request_of_another_release_is_refused_by_the_client():
    request = Request(LBGM(TopK(0.1)), ("head.*",), "training", b"layout", b"12345678")
    assert Request.unpack(request.pack()) == request
    for data in (
        request.pack().replace(b'"version": 1', b'"version": 2'),
        request.pack().replace(b"LBGM", b"__import__"),
        b"",
        b"{}\0",
        "text",
        b"[" * 100_000,
    ):
        with pytest.raises(ValueError, match=r"request|version|compressor"):
            Request.unpack(data)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((flower.FedAvg(), LBGM()), {"exclude": [1]}, TypeError, "list of str"),
        ((flower.FedAvg, LBGM()), {}, TypeError, "wraps a flwr"),
        (
            (
                flower.DifferentialPrivacyClientSideFixedClipping(
                    CompressedStrategy(flower.FedAvg(), LBGM()), 0.01, 1.0, 6
                ),
                LBGM(),
            ),
            {},
            TypeError,
            "Clipping has a CompressedStrategy inside already: use it as it is",
        ),
        ((flower.FedAvg(), "LBGM()"), {}, TypeError, "expected a compressor"),
        ((flower.FedAvg(), SignSGD(vote=True)), {}, ValueError, "majority vote"),
        ((flower.FedAvg(), LBGM()), {"exclude": "head"}, TypeError, "list of patterns"),
        ((flower.FedAvg(), LBGM()), {"keep_rounds": -1}, ValueError, "0 or more"),
        ((flower.FedAvg(), LBGM()), {"memory_limit": 1e9}, TypeError, "whole number"),
    ],
)
def test_wrong_arguments_are_refused(arguments, options, error, message):
    with pytest.raises(error, match=message):
        CompressedStrategy(*arguments, **options)


def test_strategy_that_sends_two_records_is_refused():
    class Two(flower.FedAvg):
        def configure_train(self, server_round, arrays, config, grid):
            messages = super().configure_train(server_round, arrays, config, grid)
            for message in messages:
                message.content["more"] = arrays
            return messages

    with pytest.raises(ValueError, match="needs one ArrayRecord"):
        one_round(CompressedStrategy(Two(), LBGM()))


def test_arrays_come_in_the_dtypes_that_most_clients_return():
    def train(arrays, partition):
        dtype = {0: np.float16, 1: np.float32, 2: np.float32}[partition]
        return {name: (array + 1).astype(dtype) for name, array in arrays.items()}

    inner = Kept()
    result = one_round(CompressedStrategy(inner, LBGM()), make_app([compression_mod], train))
    assert result.train_metrics_clientapp[1]["rejected-replies"] == 0
    received = inner.received()
    assert set(received) == {100, 101, 102}
    for parameters in received.values():
        for name, array in arrays_of().items():
            assert parameters[name].dtype == np.float32
            assert np.allclose(parameters[name], array.numpy() + 1, atol=0.01)


def test_arrays_that_cannot_be_sent_are_told_at_the_server():
    long = np.ones(3, dtype=np.longdouble)
    if long.dtype.name == "float64":
        pytest.skip("longdouble is float64 here")
    grid = LoopbackGrid(make_app([compression_mod]), 3)
    strategy = CompressedStrategy(flower.FedAvg(), LBGM())
    with pytest.raises(ValueError, match="'long' is"):
        strategy.start(grid, arrays_of(long=long), num_rounds=1)


# --- compressors of one's own ---------------------------------------------------------------------


@dataclass(frozen=True, repr=False)
class EveryNth(Compressor):
    """A compressor that sends every n-th element."""

    step: int = 2

    def encode(self, grad, state):
        chosen = grad.reshape(-1)[:: self.step].contiguous()
        decoded = torch.zeros(grad.numel(), dtype=grad.dtype)
        decoded[:: self.step] = chosen
        body = as_bytes(chosen)
        return Encoding(bytes([Kind.BODY]), lambda: body, Dense(decoded.view(grad.shape)), state)

    def decode(self, head, body, state, like):
        decoded = torch.zeros(like.numel(), dtype=like.dtype)
        count = decoded[:: self.step].numel()
        if body.numel() != count * like.dtype.itemsize:
            raise PayloadError(f"{body.numel()} bytes for {count} elements")
        decoded[:: self.step] = from_bytes(body, like.dtype)
        return Dense(decoded.view(like.shape)), state


class OtherEveryNth(EveryNth):
    """A class of the same name, elsewhere."""


OtherEveryNth.__name__ = "EveryNth"


@pytest.mark.parametrize(
    ("compressor", "classes", "share"),
    [
        (EveryNth(5), [EveryNth], 1 / 5),
        (LBGM(EveryNth(10), delta=1.0), [EveryNth], 1 / 10),
        (LBGM(FromGrace(LargestK(0.1)), delta=1.0), [FromGrace, LargestK], 3 / 10),
    ],
    ids=repr,
)
def test_compressors_of_ones_own_work_where_both_ends_know_their_classes(
    compressor, classes, share
):
    inner = Kept()
    strategy = CompressedStrategy(inner, compressor, compressors=classes)
    grid = LoopbackGrid(make_app([CompressionMod(compressors=classes)], noise=0.0), 3)
    result = strategy.start(grid, arrays_of(), num_rounds=3)
    metrics = list(result.train_metrics_clientapp.values())
    assert [m["rejected-replies"] for m in metrics] == [0, 0, 0]
    assert len(inner.received()) == 3
    sent = metrics[0]["uplink-bytes"] / metrics[0]["dense-bytes"]
    # A message has a head of 16 bytes.
    assert sent == pytest.approx(share, rel=0.1)
    assert metrics[-1]["recycled-share"] == compressor.receiver_has_state


def test_client_that_lacks_a_class_answers_with_an_error_that_names_it():
    replies = []
    for known, missing in ([], "FromGrace, LargestK"), ([FromGrace], "LargestK"):
        replies.clear()
        strategy = CompressedStrategy(
            flower.FedAvg(), LBGM(FromGrace(LargestK(0.1))), compressors=[FromGrace, LargestK]
        )
        app = make_app([CompressionMod(compressors=known)])
        result = one_round(strategy, app, lambda found: replies.extend(found) or found)
        assert len(replies) == 3
        for reply in replies:
            assert reply.error.code == ErrorCode.MOD_FAILED_PRECONDITION
            assert reply.error.reason == (
                "compression_mod: the server's compressor is LBGM(FromGrace(LargestK(0.1))), and "
                f"this client does not know {missing}: use CompressionMod(compressors=[{missing}])"
            )
        assert result.train_metrics_clientapp[1]["uplink-bytes"] == 0


class Unreadable(EveryNth):
    """A compressor whose repr is not an expression."""

    def __repr__(self):
        return "<every other>"


class Forgetful(EveryNth):
    """A compressor whose repr leaves out an argument."""

    def __repr__(self):
        return "Forgetful()"


@pytest.mark.parametrize(
    ("compressor", "classes", "message"),
    [
        (
            LBGM(EveryNth(3)),
            [],
            r"clients do not know EveryNth of LBGM\(EveryNth\(step=3\)\): pass "
            r"compressors=\[EveryNth\] to CompressedStrategy, and use "
            r"CompressionMod\(compressors=\[EveryNth\]\) at the clients",
        ),
        (FromGrace(LargestK(0.1)), [], r"do not know FromGrace, LargestK of FromGrace\(Lar"),
        (FromGrace(LargestK(0.1)), [FromGrace], r"compressors=\[LargestK\] to CompressedStrategy"),
        (Unreadable(), [Unreadable], "the repr of a compressor must be the expression that builds"),
        (Forgetful(3), [Forgetful], "clients would build another compressor"),
        (EveryNth(), [OtherEveryNth], "clients would build another compressor"),
        (EveryNth(), [EveryNth, OtherEveryNth], "known has twice"),
    ],
    ids=lambda value: None if isinstance(value, str) else repr(value),
)
def test_server_refuses_at_its_start_what_clients_could_not_build(compressor, classes, message):
    with pytest.raises(ValueError, match=message):
        CompressedStrategy(flower.FedAvg(), compressor, compressors=classes)


def test_known_classes_must_be_classes_at_either_end():
    for make in (
        lambda wrong: CompressionMod(compressors=[wrong]),
        lambda wrong: CompressedStrategy(flower.FedAvg(), LBGM(), compressors=[wrong]),
    ):
        for wrong in ("EveryNth", EveryNth(2)):
            with pytest.raises(TypeError, match="takes classes"):
                make(wrong)


# --- metrics and log ------------------------------------------------------------------------------


def test_metrics_summary_and_lines_of_json_tell_bytes(tmp_path, caplog):
    caplog.set_level(logging.INFO, "flwr")
    log = tmp_path / "rounds.jsonl"
    strategy = CompressedStrategy(flower.FedAvg(), LBGM(TopK(0.1), delta=0.9), log_file=log)
    grid = LoopbackGrid(make_app([compression_mod], noise=0.0), 4)

    def evaluate(server_round, arrays):
        return MetricRecord({"accuracy": 0.1 * server_round})

    result = strategy.start(grid, arrays_of(), num_rounds=3, evaluate_fn=evaluate)
    first, second, third = result.train_metrics_clientapp.values()
    assert first["dense-bytes"] == 4 * 4 * 1230
    assert 0.1 * first["dense-bytes"] < first["uplink-bytes"] < 0.15 * first["dense-bytes"]
    assert first["recycled-share"] == 0
    # A message of two tensors, and two bytes.
    assert second["uplink-bytes"] == third["uplink-bytes"] == 4 * (16 + 2 * 5 + 2)
    assert second["recycled-share"] == 1
    assert "loss" in first

    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["round"] for line in lines] == [1, 2, 3]
    for line, metrics in zip(lines, result.train_metrics_clientapp.values(), strict=True):
        assert line["train"] == dict(metrics)
        assert line["uplink-bytes"] == metrics["uplink-bytes"]
        assert line["evaluate"] == pytest.approx({"accuracy": 0.25})
        assert line["evaluate-server"] == {"accuracy": pytest.approx(0.1 * line["round"])}
        assert line["held-clients"] == 4

    text = "\n".join(record.getMessage() for record in caplog.records)
    assert "\t│\t├── Compressor: LBGM(TopK(0.1), delta=0.9)" in text
    total = sum(m["uplink-bytes"] for m in result.train_metrics_clientapp.values())
    assert f"\t├── Uplink: {total / 1000:.3g} kB" in text
    caplog.clear()
    strategy.summary()
    text = "\n".join(record.getMessage() for record in caplog.records)
    assert "\t│\t├── Recycled: 66.7 % of the tensors" in text

    for source in (result, log):
        plot(source, tmp_path / "picture.png")
        assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
        (tmp_path / "picture.png").unlink()
    with pytest.raises(ValueError, match="was the training run by CompressedStrategy"):
        plot(flower.Result(), tmp_path / "picture.png")


def test_lines_are_written_for_rounds_without_evaluation_too(tmp_path):
    log = tmp_path / "rounds.jsonl"
    inner = flower.FedAvg(fraction_evaluate=0.0)
    one_round(CompressedStrategy(inner, LBGM(), log_file=log))
    [line] = [json.loads(line) for line in log.read_text().splitlines()]
    assert line["evaluate"] is None
    assert line["training-round"] == 1


def test_restored_training_is_drawn_as_one(tmp_path):
    log = tmp_path / "new" / "rounds.jsonl"
    strategy = CompressedStrategy(flower.FedAvg(), LBGM(), log_file=log)
    grid = LoopbackGrid(make_app([compression_mod]), 3)
    strategy.start(grid, arrays_of(), num_rounds=3)
    restored = CompressedStrategy(flower.FedAvg(), LBGM(), log_file=log)
    restored.load_state_dict(strategy.state_dict())
    restored.start(grid, arrays_of(), num_rounds=2)
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["training-round"] for line in lines] == [1, 2, 3, 4, 5]
    assert [line["round"] for line in lines] == [1, 2, 3, 1, 2]
    assert list(plots._of_file(log)) == [1, 2, 3, 4, 5]
