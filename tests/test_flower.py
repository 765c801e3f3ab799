"""The adapter for Flower: Flower's own messages, strategies and apps, within one process."""

from __future__ import annotations

import contextlib
import json
import logging
import random
import re
import resource
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch

pytest.importorskip("flwr", reason="Flower is not installed: it needs Python 3.11")

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import LocalDpMod, adaptiveclipping_mod, fixedclipping_mod
from flwr.common.constant import ErrorCode
from flwr.serverapp import strategy as flower
from hypothesis import given, settings
from hypothesis import strategies as st

from lbgm_compress import (
    LBGM,
    Atomo,
    Compressor,
    ErrorFeedback,
    Identity,
    LookBackSubspace,
    PayloadError,
    Sender,
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
from lbgm_compress.adapters.flower.archive import pack_state, unpack_state
from lbgm_compress.adapters.flower.reply import DTYPES
from lbgm_compress.adapters.flower.request import KEY, Request
from lbgm_compress.adapters.grace import FromGrace
from lbgm_compress.compressor import Encoding
from lbgm_compress.decoded import Dense
from lbgm_compress.wire.message import Kind
from lbgm_compress.wire.values import as_bytes, from_bytes
from tests.flower_loopback import LoopbackGrid, arrays_of, context, make_app, start
from tests.grace_protocol import LargestK
from tests.laws import assert_same_bits, saved_and_loaded

pytestmark = pytest.mark.flower


@pytest.fixture(autouse=True)
def same_draws():
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002  Flower's noise comes from there


# --- what the inner strategy sees ----------------------------------------------------------------

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


class Kept(flower.FedAvg):
    """FedAvg that keeps the replies it was given."""

    def aggregate_train(self, server_round, replies):
        self.replies = list(replies)
        return super().aggregate_train(server_round, self.replies)

    def received(self):
        return {
            m.metadata.src_node_id: {
                name: array.numpy()
                for record in m.content.array_records.values()
                for name, array in record.items()
            }
            for m in self.replies
            if not m.has_error()
        }


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


# --- staying in step -----------------------------------------------------------------------------


class Honest(Sender):
    """A sender that writes down what its messages mean."""

    meant: ClassVar[list[dict[str, torch.Tensor]]] = []

    def compress(self, grads, peer=None):
        message, decoded = self.encode(grads, peer)
        self.meant.append({name: d.dense().clone() for name, d in decoded.items()})
        return message


@pytest.mark.parametrize(
    "compressor",
    [
        LBGM(delta=0.3),
        LBGM(TopK(0.1), delta=0.3),
        LBGM(ErrorFeedback(Atomo(2)), delta=0.5),
        ErrorFeedback(LookBackSubspace(2, 0.98)),
        LBGM(SignSGD(scaled=True), delta=0.5),
    ],
    ids=repr,
)
@pytest.mark.parametrize("files", [False, True], ids=["context", "files"])
def test_losses_restarts_and_old_checkpoints_cost_bytes_and_never_give_a_wrong_update(
    compressor, files, tmp_path, monkeypatch
):
    monkeypatch.setattr("lbgm_compress.adapters.flower.mod.Sender", Honest)
    rng = random.Random(repr(compressor) + str(files))
    mod = CompressionMod(state_dir=tmp_path if files else None)
    grid = LoopbackGrid(make_app([mod], noise=0.2, rate=0.02), 4)
    inner = Kept(fraction_train=0.5, fraction_evaluate=0.0)
    strategy = CompressedStrategy(inner, compressor)
    arrays, checkpoint, newest, recycled = arrays_of(), None, 1000, 0.0
    for _ in range(80):
        what = rng.random()
        if what < 0.1:
            grid.restart(rng.choice(list(grid.contexts)))
        elif what < 0.15:
            newest += 1
            grid.restart(rng.choice(list(grid.contexts)), new_id=newest)
        elif what < 0.25:
            checkpoint = saved_and_loaded(strategy.state_dict())
        elif what < 0.35 and checkpoint is not None:
            strategy = CompressedStrategy(inner, compressor)
            strategy.load_state_dict(checkpoint)
        lost = rng.random() < 0.2
        grid.losses = lambda number, node, lost=lost: lost
        Honest.meant.clear()
        inner.replies = []
        result = strategy.start(grid, arrays, num_rounds=1)
        assert len(Honest.meant) == 2
        received = inner.received()
        assert len(received) == (0 if lost else 2)
        for parameters, meant in zip(received.values(), Honest.meant, strict=False):
            for name, value in parameters.items():
                expected = torch.from_numpy(arrays[name].numpy()) + meant[name]
                assert_same_bits(torch.from_numpy(value), expected)
        if not lost:
            metrics = result.train_metrics_clientapp[1]
            assert metrics["rejected-replies"] == 0
            recycled += metrics["recycled-share"]
            arrays = result.arrays
    assert recycled > 3


def test_client_without_a_stable_id_and_one_that_joins_late_send_in_full():
    grid = LoopbackGrid(make_app([compression_mod], noise=0.0), 2)
    strategy = CompressedStrategy(flower.FedAvg(), LBGM())
    shares = []
    arrays = arrays_of()
    for number in range(5):
        if number == 2:
            grid.restart(101, new_id=7)
        if number == 4:
            grid.contexts[8] = context(8, 5)
        result = strategy.start(grid, arrays, num_rounds=1)
        arrays = result.arrays
        shares.append(result.train_metrics_clientapp[1]["recycled-share"])
    # Of two clients, and of three at the end.
    assert shares == pytest.approx([0, 1, 0.5, 1, 2 / 3])


def test_files_outlive_a_client_that_restarts_and_belong_to_one_training(tmp_path):
    grid = LoopbackGrid(make_app([CompressionMod(state_dir=tmp_path / "state")], noise=0.0), 2)
    strategy = CompressedStrategy(flower.FedAvg(), LBGM(TopK(0.1)))

    def share(strategy):
        return strategy.start(grid, arrays_of(), 1).train_metrics_clientapp[1]["recycled-share"]

    assert share(strategy) == 0
    assert not any(ctxt.state for ctxt in grid.contexts.values())
    for node in (100, 101):
        grid.restart(node)
    assert share(strategy) == 1
    assert len(list((tmp_path / "state").iterdir())) == 2
    # A server that goes on from its checkpoint is the same training, another one is not.
    restored = CompressedStrategy(flower.FedAvg(), LBGM(TopK(0.1)))
    restored.load_state_dict(strategy.state_dict())
    assert share(restored) == 1
    assert share(CompressedStrategy(flower.FedAvg(), LBGM(TopK(0.1)))) == 0
    # A damaged file is no file.
    rng = random.Random(0)
    for _ in range(20):
        for path in (tmp_path / "state").iterdir():
            data = bytearray(path.read_bytes())
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            # Those of the other training are not written again, and must not become empty.
            path.write_bytes(data if rng.random() < 0.8 else data[: 1 + rng.randrange(len(data))])
        assert share(restored) == 0
        assert share(restored) == 1


def test_app_that_fails_keeps_the_clients_state():
    calls = []

    def train(arrays, partition):
        calls.append(partition)
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        return {name: array + np.float32(0.5) for name, array in arrays.items()}

    grid = LoopbackGrid(make_app([compression_mod], train), 1)
    inner = flower.FedAvg(min_train_nodes=1, min_available_nodes=1, min_evaluate_nodes=1)
    result = CompressedStrategy(inner, LBGM()).start(grid, arrays_of(), num_rounds=3)
    shares = [m["recycled-share"] for m in result.train_metrics_clientapp.values()]
    assert shares == [0, 0, 1]
    assert result.train_metrics_clientapp[2]["uplink-bytes"] == 0


# --- what the server holds -----------------------------------------------------------------------


def test_clients_not_seen_for_long_are_forgotten_and_the_least_recent_go_first():
    app = make_app([compression_mod], noise=0.0)
    grid = LoopbackGrid(app, 4)
    one = {"fraction_evaluate": 0.0, "min_train_nodes": 1, "min_available_nodes": 1}
    strategy = CompressedStrategy(flower.FedAvg(**one), LBGM(TopK(0.1)), keep_rounds=2)
    strategy.start(grid, arrays_of(), num_rounds=1)
    assert sorted(strategy.held_clients()) == [100, 101, 102, 103]
    each = strategy.held_bytes() / 4
    assert 0 < each < 0.3 * 4 * 1230
    away = {node: grid.contexts.pop(node) for node in (101, 103)}
    strategy.start(grid, arrays_of(), num_rounds=1)
    assert set(strategy.held_clients()) == {100, 101, 102, 103}
    strategy.start(grid, arrays_of(), num_rounds=1)
    assert set(strategy.held_clients()) == {100, 102}
    grid.contexts.update(away)
    result = strategy.start(grid, arrays_of(), num_rounds=1)
    assert result.train_metrics_clientapp[1]["recycled-share"] == 0.5

    strategy._states.memory_limit = int(2.5 * each)
    strategy.start(grid, arrays_of(), num_rounds=1)
    assert len(strategy.held_clients()) == 2
    assert strategy.held_bytes() <= 2.5 * each
    strategy._states.memory_limit = 0
    strategy.start(grid, arrays_of(), num_rounds=1)
    assert strategy.held_clients() == []
    assert strategy.state_dict()["clients"] == {}


def test_least_recently_seen_client_goes_first():
    grid = LoopbackGrid(make_app([compression_mod], noise=0.0), 3)
    one = {"fraction_evaluate": 0.0, "min_train_nodes": 1, "min_available_nodes": 1}
    strategy = CompressedStrategy(flower.FedAvg(**one), LBGM())
    everyone = dict(grid.contexts)
    for node in (102, 100, 101):
        grid.contexts = {node: everyone[node]}
        strategy.start(grid, arrays_of(), num_rounds=1)
    assert strategy.held_clients() == [102, 100, 101]
    strategy._states.memory_limit = strategy.held_bytes() - 1
    grid.contexts = {100: everyone[100]}
    strategy.start(grid, arrays_of(), num_rounds=1)
    assert strategy.held_clients() == [101, 100]


@pytest.mark.parametrize("where", ["dict", "file"])
def test_restored_server_goes_on_where_the_saved_one_would_have(where, tmp_path):
    results = []
    for restart in (False, True):
        random.seed(3)
        grid = LoopbackGrid(make_app([compression_mod]), 4)
        strategy = CompressedStrategy(flower.FedAvg(fraction_train=0.5), LBGM(TopK(0.2)))
        first = strategy.start(grid, arrays_of(), num_rounds=4)
        if restart:
            saved, strategy = (
                strategy,
                CompressedStrategy(flower.FedAvg(fraction_train=0.5), LBGM(TopK(0.2))),
            )
            if where == "file":
                saved.save(tmp_path / "held")
                strategy.load(tmp_path / "held")
                assert b"pickle" not in (tmp_path / "held").read_bytes()
            else:
                strategy.load_state_dict(saved_and_loaded(saved.state_dict()))
            assert strategy.held_bytes() == saved.held_bytes()
            assert strategy.held_clients() == saved.held_clients()
        result = strategy.start(grid, first.arrays, num_rounds=4)
        results.append((result.arrays, result.train_metrics_clientapp))
    (plain, metrics), (restored, others) = results
    assert {k: dict(v) for k, v in metrics.items()} == {k: dict(v) for k, v in others.items()}
    assert any(m["recycled-share"] > 0 for m in metrics.values())
    for name in plain:
        assert np.array_equal(plain[name].numpy(), restored[name].numpy())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.update(format=2), "format 2"),
        (lambda s: s.update(compressor="TopK(0.1)"), r"that of TopK\(0.1\)"),
        (lambda s: s.pop("clients"), "not a state"),
        (lambda s: s["clients"][101].update(layout=5), "not a state"),
        (lambda s: s["clients"][101]["state"][200:210].zero_(), "not a saved state"),
        (lambda s: s["clients"][101].update(digest=torch.ones(16).byte()), "fit its digest"),
        (lambda s: s["layouts"][0][0].__setitem__(2, "nonsense"), "not a state"),
    ],
)
def test_state_that_does_not_fit_is_refused_and_changes_nothing(change, message):
    grid = LoopbackGrid(make_app([compression_mod]), 3)
    strategy = CompressedStrategy(flower.FedAvg(), LBGM())
    strategy.start(grid, arrays_of(), num_rounds=1)
    state = saved_and_loaded(strategy.state_dict())
    before = saved_and_loaded(strategy.state_dict())
    change(state)
    with pytest.raises(ValueError, match=message):
        strategy.load_state_dict(state)
    assert strategy.state_dict().keys() == before.keys()
    assert sorted(strategy.held_clients()) == [100, 101, 102]
    assert_same_bits(strategy.state_dict()["clients"], before["clients"])


def test_file_that_is_none_is_refused(tmp_path):
    (tmp_path / "file").write_bytes(b"not safetensors")
    with pytest.raises(ValueError, match="not a saved state"):
        CompressedStrategy(flower.FedAvg(), LBGM()).load(tmp_path / "file")
    with pytest.raises(FileNotFoundError):
        CompressedStrategy(flower.FedAvg(), LBGM()).load(tmp_path / "nothing")


NUMBERS = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.text(), st.floats(allow_nan=False)
)
TENSORS = st.builds(
    lambda shape, dtype: torch.ones(shape, dtype=dtype),
    st.lists(st.integers(0, 4), max_size=3),
    st.sampled_from([torch.uint8, torch.float32, torch.bfloat16, torch.int64]),
)
KEYS = st.one_of(st.text(max_size=5), st.integers(-(2**63), 2**64))


@settings(max_examples=200, deadline=None)
@given(
    st.recursive(
        st.one_of(NUMBERS, TENSORS),
        lambda inner: st.one_of(
            st.dictionaries(KEYS, inner, max_size=4), st.lists(inner, max_size=3).map(tuple)
        ),
    )
)
def test_states_come_back_from_bytes_as_they_were(state):
    assert_equal_states(unpack_state(pack_state(state)), state)


def assert_equal_states(a, b):
    if isinstance(b, tuple):
        assert len(a) == len(b)
        for one, other in zip(a, b, strict=True):
            assert_equal_states(one, other)
    elif isinstance(b, dict):
        assert a.keys() == b.keys()
        for key in b:
            assert_equal_states(a[key], b[key])
    else:
        assert_same_bits(a, b)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_bytes_that_are_no_state_are_refused(data):
    good = bytearray(pack_state({"a": torch.ones(3), "b": [1, {"c": torch.zeros(2).byte()}]}))
    for _ in range(data.draw(st.integers(1, 4))):
        good[data.draw(st.integers(0, len(good) - 1))] ^= data.draw(st.integers(1, 255))
    with contextlib.suppress(ValueError):
        unpack_state(bytes(good[: data.draw(st.integers(0, len(good)))]))


# --- replies that cannot be believed -------------------------------------------------------------


def hostile(rng, reply, others, arrays):
    """Return a reply that something happened to."""
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
        # Other dtypes than all others have, with elements that fit them.
        dtype = rng.choice(("complex128", "float16", "float64", "int8"))
        code = DTYPES.index(dtype) | 128
        new = {name: np.full(s.numpy().shape, 1e300).astype(dtype) for name, s in arrays.items()}
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
    [(LBGM(TopK(0.2), delta=0.4), 1000), (ErrorFeedback(LookBackSubspace(2)), 200)],
    ids=repr,
)
def test_a_thousand_hostile_replies_harm_nobody_else(compressor, rounds, caplog):
    """Client 100 is hostile, the others are not."""
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
        # The honest ones' look-back gradients, as they should be afterwards.
        result = strategy.start(grid, arrays, num_rounds=1)
        metrics = result.train_metrics_clientapp[1]
        rejected += metrics["rejected-replies"]
        received = inner.received()
        assert {101, 102} - set(received) in (set(), {101})
        assert 102 in received
        for name, array in result.arrays.items():
            assert np.isfinite(array.numpy()).all() or name == "mask"
        if 101 not in received:
            # Two replies in its name: neither is believed. The client sends in full next time.
            assert metrics["rejected-replies"] >= 2
        else:
            for node in (101, 102):
                # What the server holds is what the client holds.
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
    """Return what a server holds of a client, tensor by tensor."""
    return unpack_state(strategy.state_dict()["clients"][node]["state"].numpy().tobytes())


def one_round(strategy, app=None, tamper=None, **options):
    grid = LoopbackGrid(app or make_app([compression_mod]), 3)
    if tamper:
        grid.tamper = tamper
    return strategy.start(grid, arrays_of(), num_rounds=1, **options)


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
@pytest.mark.parametrize("clients", [1, 2, 4])
def test_no_hostile_reply_makes_any_strategy_fail(inner, clients, caplog):
    """Whoever answers first, and also where nobody else answers."""
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
    for _ in range(60):
        result = strategy.start(grid, arrays, num_rounds=1)
        for name, array in result.arrays.items():
            value = array.numpy()
            assert np.isfinite(value).all()
            assert value.dtype.kind == "f"
            if name != "counter" and clients == 4 and inner is not flower.FedAdam:
                assert value.dtype == np.float32


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


@pytest.mark.parametrize("change", ["exclude", "dtypes"])
def test_other_arrays_than_before_are_sent_in_full_once(change):
    """What the server holds is for other arrays, as many as before."""
    counting = ["layer.bias"]

    def train(arrays, partition):
        return {
            name: (array + 1).astype(np.int64 if name in counting else np.float32)
            for name, array in arrays.items()
        }

    others = {"other": np.ones(30, dtype=np.float32)}
    options = {"exclude": ["layer.bias"]} if change == "exclude" else {}
    grid = LoopbackGrid(make_app([compression_mod], train), 3)
    strategy = CompressedStrategy(flower.FedAvg(), LBGM(), **options)
    strategy.start(grid, arrays_of(**others), num_rounds=2)
    counting[0] = "other"
    restored = CompressedStrategy(flower.FedAvg(), LBGM(), exclude=["other"])
    restored.load_state_dict(strategy.state_dict())
    result = restored.start(grid, arrays_of(**others), num_rounds=3)
    metrics = list(result.train_metrics_clientapp.values())
    assert [m["rejected-replies"] for m in metrics] == [0, 0, 0]
    assert [m["recycled-share"] for m in metrics] == [0, 1, 1]


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


def test_arrays_that_cannot_be_sent_are_told_at_the_server():
    long = np.ones(3, dtype=np.longdouble)
    if long.dtype.name == "float64":
        pytest.skip("longdouble is float64 here")
    grid = LoopbackGrid(make_app([compression_mod]), 3)
    strategy = CompressedStrategy(flower.FedAvg(), LBGM())
    with pytest.raises(ValueError, match="'long' is"):
        strategy.start(grid, arrays_of(long=long), num_rounds=1)


# --- compressors of one's own --------------------------------------------------------------------


@dataclass(frozen=True, repr=False)
class EveryNth(Compressor):
    """Sends every n-th element."""

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
    """Its repr is no expression."""

    def __repr__(self):
        return "<every other>"


class Forgetful(EveryNth):
    """Its repr leaves out an argument."""

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


# --- what users see ------------------------------------------------------------------------------


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
