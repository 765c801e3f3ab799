"""The downlink in Flower: what travels to clients, what they hold, and what faults cost."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import logging
import os
import random
import shutil
import time
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("flwr", reason="Flower is not installed: it needs Python 3.11")

from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import fixedclipping_mod
from flwr.common.constant import ErrorCode
from flwr.serverapp.strategy import (
    DifferentialPrivacyClientSideFixedClipping,
    FedAvg,
)

from lbgm_compress import (
    LBGM,
    ErrorFeedback,
    Identity,
    LookBackSubspace,
    SignSGD,
    TopK,
)
from lbgm_compress._util.ends import tensor_bytes
from lbgm_compress._util.units import human_bytes
from lbgm_compress.adapters.flower import CompressedStrategy, CompressionMod, compression_mod, plot
from lbgm_compress.adapters.flower.archive import unpack_state
from lbgm_compress.adapters.flower.checksum import Checksum
from lbgm_compress.adapters.flower.claim import CLAIM_SIZE, OUT_OF_SYNC
from lbgm_compress.adapters.flower.models import WEEK, Models
from lbgm_compress.adapters.flower.request import ADDED, KEY, Request
from lbgm_compress.adapters.flower.update import STYPE, PackedUpdate
from lbgm_compress.endpoints.downlink import Chain, Publisher, Whole
from tests.flower_loopback import Kept, LoopbackGrid, arrays_of, make_app, start
from tests.laws import assert_same_bits, saved_and_loaded
from tests.test_flower import STRATEGIES
from tests.test_flower_rounds import COMPRESSORS, FATES, Federation

pytestmark = pytest.mark.flower

SUBSPACES = LookBackSubspace(4, values="int4")
UPLINK = ErrorFeedback(SUBSPACES)


@pytest.fixture(autouse=True)
def same_draws(monkeypatch, tmp_path):
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002  Flower's noise comes from there
    # The machine does not fail, and waiting for its disk would take most of the time.
    monkeypatch.setattr("os.fsync", lambda handle: None)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))


class Watched(LoopbackGrid):
    """A grid that compares each model that an app sees with the server's at that time.

    Attributes
    ----------
    seen
        Of each message that an app got: its type, its node, and its arrays.
    sent
        Of each message that was sent: its type, its node, and the array of bytes.
    """

    def __init__(self, nodes, mod=compression_mod, train=None, **options):
        super().__init__(make_app([mod, self._watch], train, **options), nodes)
        self.strategy: Any = None
        self.model: Any = {}
        self.seen, self.sent, self.replies = [], [], []
        self.wrong: list[Any] = []

    def start(self, strategy, arrays=None, rounds=1):
        self.strategy = strategy
        result = strategy.start(self, arrays or arrays_of(), num_rounds=rounds)
        assert not self.wrong
        return result

    def send_and_receive(self, messages, *, timeout=None):
        messages = list(messages)
        for message in messages:
            metadata, [record] = message.metadata, message.content.array_records.values()
            self.sent.append((metadata.message_type, metadata.dst_node_id, record[KEY]))
        self.model = server_model(self.strategy)
        replies = super().send_and_receive(messages, timeout=timeout)
        self.replies += replies
        return replies

    def _watch(self, message, ctxt, call_next):
        [record] = message.content.array_records.values()
        arrays = {name: array.numpy() for name, array in record.items()}
        self.seen.append((message.metadata.message_type, ctxt.node_id, arrays))
        try:
            self.check(arrays)
        except Exception as error:
            # The grid would make an error reply of it.
            self.wrong.append(error)
        return call_next(message, ctxt)

    def check(self, arrays):
        for name, tensor in self.model.items():
            assert_same_bits(torch.from_numpy(arrays[name]), tensor)

    def wholes(self):
        """Return how many whole models have been sent to each client."""
        return Counter(node for _, node, array in self.sent if is_whole(array))


def server_model(strategy):
    return dict(strategy._downlink.publisher.model)


def is_whole(array):
    return array.data[1] == 0


def both_ways(inner=None, **options):
    options = {"downlink": SUBSPACES, **options}
    return CompressedStrategy(inner or FedAvg(), options.pop("compressor", UPLINK), **options)


def files_in(folder):
    return sorted(path.name for path in folder.rglob("*.safetensors"))


# --- the model ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STRATEGIES)
def test_without_compression_both_ways_every_strategy_gives_what_it_gives_alone(name):
    results = []
    for mods, wrap in (
        ([], lambda inner: inner),
        (
            [compression_mod],
            lambda inner: CompressedStrategy(inner, Identity(), downlink=Identity()),
        ),
    ):
        random.seed(1)
        np.random.seed(1)  # noqa: NPY002
        grid = LoopbackGrid(make_app(mods, noise=0.0), 6)
        arrays = arrays_of(counter=np.array(3))
        results.append(start(wrap(STRATEGIES[name]()), grid, arrays, rounds=5))
    plain, ours = results
    assert list(plain) == list(ours)
    for parameter, expected in plain.items():
        assert ours[parameter].dtype == expected.dtype
        assert np.allclose(ours[parameter], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("where", ["inside", "around"])
def test_clients_that_clip_do_so_with_both_directions_compressed(where):
    results = []
    for mods in ([fixedclipping_mod], [compression_mod, fixedclipping_mod]):
        np.random.seed(1)  # noqa: NPY002

        def wrap(strategy):
            return DifferentialPrivacyClientSideFixedClipping(strategy, 0.01, 1.0, 6)

        if len(mods) == 1:
            strategy = wrap(FedAvg())
        elif where == "inside":
            strategy = both_ways(wrap(FedAvg()), compressor=Identity(), downlink=Identity())
        else:
            strategy = wrap(both_ways(compressor=Identity(), downlink=Identity()))
        results.append(start(strategy, LoopbackGrid(make_app(mods, noise=0.0), 6), arrays_of(), 3))
    for parameter, expected in results[0].items():
        assert np.allclose(results[1][parameter], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("first", ["float32", "float16", "int8"])
@pytest.mark.parametrize("downlink", [SUBSPACES, TopK(0.05, "int2"), LBGM(TopK(0.1))], ids=repr)
def test_every_client_holds_the_server_s_model_bit_for_bit_in_every_round(downlink, first):
    grid = Watched(4)
    strategy = both_ways(FedAvg(fraction_train=0.5), downlink=downlink, first=first)
    grid.start(strategy, arrays_of(double=np.linspace(-1, 1, 50)), rounds=12)
    kinds = Counter(kind for kind, _, _ in grid.seen)
    assert kinds == {"train": 24, "evaluate": 48}
    assert grid.wholes() == dict.fromkeys(range(100, 104), 1)
    lost = np.abs(server_model(strategy)["layer.weight"].numpy() - grid.seen[0][2]["layer.weight"])
    assert lost.max() > 0.01  # The model has moved.


def test_what_the_downlink_loses_is_not_lost_from_the_server_s_model():
    """Updates that do not depend on the parameters add up, however little of x clients know."""
    step = {name: array.numpy() * 0 + 0.5 for name, array in arrays_of().items()}

    def train(arrays, partition):
        return {name: array + step[name] for name, array in arrays.items()}

    grid = Watched(3, train=train)
    strategy = both_ways(compressor=Identity(), downlink=TopK(0.01))
    result = grid.start(strategy, rounds=6)
    for name, initial in arrays_of().items():
        expected = initial.numpy() + 6 * step[name]
        assert np.allclose(result.arrays[name].numpy(), expected, atol=1e-5)
        held = server_model(strategy)[name].numpy()
        assert not np.allclose(held, expected, atol=0.1)


def test_apps_see_ordinary_arrays_in_the_server_s_order():
    others = {
        "zz.counter": np.array(7, dtype=np.int64),
        "flags": np.array([True, False]),
        "empty": np.zeros((0, 3), dtype=np.int32),
        "none": np.zeros((0, 2), dtype=np.float32),
        "half": np.linspace(-1, 1, 64, dtype=np.float16),
        "head.weight": np.linspace(-1, 1, 20, dtype=np.float32).reshape(4, 5),
        "a.mask": np.where(np.tri(5) > 0, 0.0, -np.inf).astype(np.float32),
        "spectrum": np.array([1 + 2j], dtype=np.complex64),
    }
    exact = ("zz.counter", "flags", "empty", "head.weight", "spectrum")

    def train(arrays, partition):
        new = {name: array + array.dtype.type(1) for name, array in arrays.items()}
        new["flags"] = ~arrays["flags"].astype(bool)
        return {**new, "a.mask": arrays["a.mask"], "zz.counter": np.array(7 + partition)}

    grid = Watched(3, train=train)

    class Noting(Kept):
        """Notes the arrays that are sent, beside those that clients saw."""

        def configure_train(self, server_round, arrays, config, grid):
            sent.append({name: array.numpy() for name, array in arrays.items()})
            return super().configure_train(server_round, arrays, config, grid)

    sent = []
    strategy = both_ways(Noting(), exclude=["head.*"], first="float16")
    result = grid.start(strategy, arrays_of(**others), rounds=4)
    trained = [arrays for kind, _, arrays in grid.seen if kind == "train"]
    for number, arrays in enumerate(trained):
        expected = sent[number // 3]
        assert list(arrays) == list(expected)
        for name, array in expected.items():
            assert (arrays[name].dtype, arrays[name].shape) == (array.dtype, array.shape)
            if name in exact:
                assert np.array_equal(arrays[name], array)
        assert np.array_equal(arrays["a.mask"], others["a.mask"])
    # The average of an integer is of floating point, and no second whole model follows.
    assert sent[1]["zz.counter"].dtype == np.float64
    assert grid.wholes() == {100: 1, 101: 1, 102: 1}
    assert all(m["rejected-replies"] == 0 for m in result.train_metrics_clientapp.values())
    for _, _, array in grid.sent:
        assert array.stype == STYPE


def test_personal_copies_of_a_message_may_differ_in_nothing():
    class Different(FedAvg):
        def configure_train(self, server_round, arrays, config, grid):
            for number, message in enumerate(
                super().configure_train(server_round, arrays, config, grid)
            ):
                arrays = arrays_of(number if self.differ else 0)
                message.content = RecordDict({**message.content, "arrays": arrays})
                yield message

    strategy = both_ways(Different(fraction_evaluate=0.0))
    strategy.strategy.differ = False
    grid = Watched(3)
    grid.start(strategy)
    assert len(grid.seen) == 3
    strategy.strategy.differ = True
    with pytest.raises(ValueError, match="sends several in one round"):
        grid.start(strategy)


def test_model_without_arrays_of_floating_point_is_refused_by_name():
    grid = Watched(3)
    counts = ArrayRecord({"counts": Array(np.arange(3))})
    with pytest.raises(ValueError, match="leave downlink out"):
        grid.start(both_ways(), counts)


# --- what travels ---------------------------------------------------------------------------------


def test_messages_are_unchanged_where_both_directions_are_off():
    found = []

    def spy(message, ctxt, call_next):
        found.append((message.metadata.message_type, message.content))
        return call_next(message, ctxt)

    strategy = CompressedStrategy(FedAvg(), UPLINK)
    start(strategy, LoopbackGrid(make_app([spy, compression_mod]), 2), arrays_of(), 1)
    for kind, content in found:
        assert list(content["arrays"]) == list(arrays_of())
        config = content["config"]
        assert (KEY in config) == (kind == "train")
        if kind == "train":
            assert json.loads(config[KEY].partition(b"\0")[0]).keys() == {
                *("version", "compressor", "exclude", "training", "layout", "round", "applied")
            }
            assert b'"version": 1,' in config[KEY]


def test_request_of_an_evaluation_has_no_settings_of_updates():
    found = {}

    def spy(message, ctxt, call_next):
        found[message.metadata.message_type] = message.content["config"][KEY]
        return call_next(message, ctxt)

    grid = Watched(2, train=None)
    grid.app = make_app([spy, compression_mod])
    strategy = both_ways(residual="model", exclude=["absent.*"])
    grid.start(strategy)
    train, evaluate = Request.unpack(found["train"]), Request.unpack(found["evaluate"])
    assert (train.compressor, train.exclude, train.residual) == (UPLINK, ("absent.*",), "model")
    assert (evaluate.compressor, evaluate.exclude) == (Identity(), ())
    assert (evaluate.downlink, evaluate.training) == (SUBSPACES, strategy.training)
    # Older clients read all of it, and use none of the rest.
    keys = {"version", "compressor", "exclude", "training", "layout"}
    keys |= {"residual", "downlink", "first"}
    assert json.loads(found["evaluate"].partition(b"\0")[0]).keys() == keys
    assert len(found["evaluate"]) < 220


@pytest.mark.parametrize(
    "options",
    [{"downlink": SUBSPACES, "first": "float16"}, {"residual": "model"}],
)
def test_request_that_older_clients_must_not_ignore_has_another_version(options):
    request = Request(UPLINK, (), "training", b"", b"", 3, 1, **options)
    assert Request.unpack(request.pack()) == request
    assert b'"version": 2,' in request.pack()
    for old, new in ((b'"first": "', b'"first": "b'), (b'"residual": "', b'"residual": "s')):
        with pytest.raises(ValueError, match="cannot be read"):
            Request.unpack(request.pack().replace(old, new))


@pytest.mark.parametrize("stage", ["train", "evaluate"])
def test_app_without_the_mod_fails_early_and_the_error_names_the_mod(stage):
    app = ClientApp()

    def read(message, ctxt):
        return {name: array.numpy() for name, array in message.content["arrays"].items()}

    getattr(app, stage)()(read)
    grid, chosen = Watched(2), stage == "train"
    grid.app = app
    strategy = both_ways(FedAvg(float(chosen), float(not chosen)))
    grid.start(strategy)
    assert len(grid.sent) == 2
    assert len(grid.replies) == 2
    for reply in grid.replies:
        assert "type for numpy conversion: 'lbgm_compress.compression_mod'" in reply.error.reason


def test_client_that_was_away_is_sent_what_it_lacks_in_a_few_dozen_bytes_more():
    grid = Watched(2)
    strategy = both_ways(FedAvg(min_train_nodes=1, min_available_nodes=1, fraction_evaluate=0.0))
    everyone = dict(grid.contexts)
    arrays = grid.start(strategy).arrays
    grid.contexts = {100: everyone[100]}
    arrays = grid.start(strategy, arrays, rounds=5).arrays
    grid.contexts = everyone
    grid.start(strategy, arrays)
    (_, near, one), (_, far, six) = sorted(grid.sent[-2:], key=lambda sent: sent[1])
    assert (near, far) == (100, 101)
    sizes = []
    for array, count in ((one, 1), (six, 6)):
        chain = PackedUpdate.unpack(array).update
        assert isinstance(chain, Chain)
        assert len(chain.messages) == count
        sizes.append(sum(message.numel() for message in chain.messages))
        assert len(array.data) - sizes[-1] <= 20 + 2 * count
    assert sizes[1] > 3 * sizes[0]
    assert grid.wholes() == {100: 1, 101: 1}


def test_history_bounds_what_is_kept_and_costs_whole_models():
    for history, wholes in ((None, 1), (0, 6)):
        grid = Watched(2)
        strategy = both_ways(FedAvg(fraction_evaluate=0.0), history=history)
        grid.start(strategy, rounds=6)
        assert set(grid.wholes().values()) == {wholes}
        kept = strategy._downlink.publisher.held_bytes()
        assert kept == 0 if history == 0 else 0 < kept < 4 * 1230
        assert len(grid.seen) == 12


def test_first_model_in_fewer_bits_is_shorter_and_the_rest_follows():
    sizes, gaps = [], []
    for first in ("float32", "float16", "int8"):
        grid = Watched(2, noise=0.0)
        arrays = arrays_of(wide=np.random.default_rng(0).normal(size=(200, 100)).astype("float32"))
        strategy = both_ways(compressor=Identity(), downlink=Identity(), first=first)
        result = grid.start(strategy, arrays, rounds=3)
        sizes.append(len(grid.sent[0][2].data))
        model = server_model(strategy)
        gaps.append(max(np.abs(result.arrays[n].numpy() - model[n].numpy()).max() for n in model))
    assert 0.5 < sizes[1] / sizes[0] < 0.55
    assert gaps[0] < 1e-6
    assert 0 < gaps[1] < 2e-3
    assert 0.25 < sizes[2] / sizes[0] < 0.29
    assert 0 < gaps[2] < 2e-3


def test_clients_that_come_later_are_sent_the_first_model_in_int8_and_all_messages_since():
    wide = np.random.default_rng(0).normal(size=(200, 100)).astype(np.float32)
    arrays = arrays_of(wide=wide, counter=np.array(3))
    grid = Watched(5)
    everyone = dict(grid.contexts)
    inner = FedAvg(min_train_nodes=1, min_evaluate_nodes=1, min_available_nodes=1)
    strategy = both_ways(inner, first="int8")
    for count in range(1, 6):
        grid.contexts = dict(list(everyone.items())[:count])
        arrays = grid.start(strategy, arrays).arrays
    assert grid.wholes() == dict.fromkeys(everyone, 1)
    assert len(grid.seen) == 2 * (1 + 2 + 3 + 4 + 5)
    wholes = [array for _, _, array in grid.sent if is_whole(array)]
    updates = [PackedUpdate.unpack(array).update for array in wholes]
    assert len({update.version for update in updates}) == 1
    assert [len(update.messages) for update in updates] == [0, 1, 2, 3, 4]
    # The rest are scales, names and the settings of the format.
    for array, update in zip(wholes, updates, strict=True):
        messages = sum(message.numel() for message in update.messages)
        assert 21_230 < len(array.data) - messages < 1.1 * 21_230


@pytest.mark.parametrize("first", ["float32", "int8"])
def test_update_that_was_cut_short_or_changed_is_refused(first):
    rng = random.Random(0)
    model = {name: torch.from_numpy(a.numpy().copy()) for name, a in arrays_of().items()}
    publisher = Publisher(SUBSPACES, first=first)
    versions = [publisher.publish(model)]
    versions.append(publisher.publish({name: value + 1 for name, value in model.items()}))
    exact = [np.arange(6).reshape(2, 3), np.zeros((0, 5)), np.array(True)]
    names = (*model, "a", "b", "c")
    for held in (None, versions[0]):
        packed = PackedUpdate(publisher.update(held), exact, None if held else names)
        array = packed.pack(first)
        found = PackedUpdate.unpack(array)
        assert isinstance(found.update, Chain if held else Whole)
        assert_same_bits(list(found.update.messages), list(packed.update.messages))
        for ours, theirs in zip(found.exact, exact, strict=True):
            assert ours.dtype == theirs.dtype
            assert np.array_equal(ours, theirs)
        data = bytes(array.data)
        cuts = [data[:size] for size in (*range(90), len(data) - 1)]
        huge = data[:2] + b"\x01\x07\x02" + 2 * (9 * b"\xff" + b"\x01") + data[2:]
        for damaged in (*cuts, huge, data + b"x", b"\x02" + data[1:]):
            changed = Array("uint8", (len(damaged),), STYPE, damaged)
            with pytest.raises(ValueError, match=r"model|state"):
                PackedUpdate.unpack(changed)
        for _ in range(200):
            damaged = bytearray(data)
            damaged[rng.randrange(min(len(data), 100))] ^= 1 << rng.randrange(8)
            with contextlib.suppress(ValueError):
                PackedUpdate.unpack(Array("uint8", (len(damaged),), STYPE, bytes(damaged)))


# --- faults ---------------------------------------------------------------------------------------


class Killed(Exception):
    """Stands for the end of a client's process."""


class Machines:
    """A mod for clients on several machines, each with a folder of its own.

    The first two clients share a machine.
    """

    def __init__(self, folder, count):
        self.folders = [folder / str(max(number, 1)) for number in range(count)]
        self.mods = [CompressionMod(state_dir=one) for one in self.folders]

    def __call__(self, message, ctxt, call_next):
        return self.mods[ctxt.node_config["partition-id"]](message, ctxt, call_next)


CLIENT_FATES = (
    *("fine", "fine", "fine", "lost downlink", "lost reply", "killed in training"),
    *("killed while it writes", "late", "restarted", "new id", "disk lost", "file corrupted"),
)


class Walk(Watched):
    """A grid whose clients and messages meet with random fates."""

    def __init__(self, rng, folder, count):
        self.machines = Machines(folder, count)
        super().__init__(count, self.machines, noise=0.3)
        self.rng, self.faults, self.fates = rng, Counter(), Counter()
        self.late: list[Any] = []
        self.killed: Any = None
        self._new = itertools.count(1000)

    def send_and_receive(self, messages, *, timeout=None):
        replies = []
        waiting, self.late = self.late, []
        self.model = server_model(self.strategy)
        for message in messages:
            [record] = message.content.array_records.values()
            node = message.metadata.dst_node_id
            self.sent.append((message.metadata.message_type, node, record[KEY]))
            replies += self._deliver(message, node, self.rng.choice(CLIENT_FATES))
        for message, model in waiting:
            current, self.model = self.model, model
            if message.metadata.dst_node_id in self.contexts:
                self._answer(message)
            self.model = current
        return replies

    def _deliver(self, message, node, fate):
        self.fates[fate] += 1
        partition = self.contexts[node].node_config["partition-id"]
        folder = self.machines.folders[partition]
        if fate != "fine":
            # What one client does may cost those that share its machine as much.
            for other, ctxt in self.contexts.items():
                if self.machines.folders[ctxt.node_config["partition-id"]] == folder:
                    self.faults[other] += 1
        if fate == "disk lost":
            shutil.rmtree(folder, ignore_errors=True)
        if fate == "file corrupted":
            for path in folder.rglob("*-models/*"):
                data = bytearray(path.read_bytes())
                data[self.rng.randrange(len(data))] ^= 16
                path.write_bytes(data)
        if fate in ("restarted", "disk lost"):
            self.restart(node)
        if fate == "new id":
            self.restart(node, next(self._new))
            return []
        if fate == "lost downlink":
            return []
        if fate == "late":
            self.late.append((message, self.model))
            return []
        self.killed = fate if fate.startswith("killed") else None
        try:
            reply = self._answer(message)
        finally:
            self.killed = None
        return [] if fate == "lost reply" else [reply]

    def _answer(self, message):
        grid = LoopbackGrid.__new__(LoopbackGrid)
        grid.__dict__.update(self.__dict__)
        grid.losses = lambda number, node: False
        grid.tamper = lambda replies: replies
        [reply] = LoopbackGrid.send_and_receive(grid, [message])
        return reply

    def _watch(self, message, ctxt, call_next):
        reply = super()._watch(message, ctxt, call_next)
        if self.killed == "killed in training":
            raise Killed
        return reply


@pytest.mark.parametrize("seed", range(2))
def test_no_client_ever_trains_from_a_wrong_model_and_a_fault_costs_one_dense_model(
    seed, tmp_path, monkeypatch
):
    """A random walk of 100 rounds over faults of clients, messages and the server."""
    rng, first = random.Random(seed), ("float16", "int8")[seed]
    grid = Walk(rng, tmp_path / "machines", 5)
    wide = np.random.default_rng(0).normal(size=(200, 100)).astype(np.float32)
    arrays = arrays_of(wide=wide, counter=np.array(3))

    def write(path, state, write_state=Models.write.__globals__["write_state"]):
        if grid.killed == "killed while it writes":
            (path.parent / f".{path.name}.part").write_bytes(b"half of it")
            raise Killed
        write_state(path, state)

    monkeypatch.setattr("lbgm_compress.adapters.flower.models.write_state", write)

    def made(state=None):
        inner = FedAvg(0.6, min_train_nodes=1, min_evaluate_nodes=1, min_available_nodes=1)
        strategy = both_ways(inner, first=first)
        if state is not None:
            strategy.load_state_dict(state)
        return strategy

    strategy = made()
    checkpoint = saved_and_loaded(strategy.state_dict()), arrays
    events = 12 * ["saved"] + 6 * ["restored"] + 2 * ["restarted"] + 80 * ["none"]
    rng.shuffle(events)
    for event in events:
        if event == "saved":
            checkpoint = saved_and_loaded(strategy.state_dict()), arrays
        elif event != "none":
            # A server without its state begins another training.
            strategy = made(checkpoint[0] if event == "restored" else None)
            arrays = checkpoint[1]
            grid.faults.update(list(grid.contexts))
        arrays = grid.start(strategy, arrays).arrays or arrays
    assert set(grid.fates) == set(CLIENT_FATES)
    # Each arrival at an app was compared with the server's model, also of late messages.
    assert len(grid.seen) > 200
    wholes = grid.wholes()
    assert sum(wholes.values()) < 0.6 * len(grid.sent)
    for node, count in wholes.items():
        assert count <= 1 + grid.faults[node], node


def test_client_without_the_model_answers_with_an_error_and_gets_the_whole_next(tmp_path):
    mod = CompressionMod(state_dir=tmp_path / "state")
    grid = Watched(2, mod)
    strategy = both_ways(FedAvg(fraction_evaluate=0.0))
    arrays = grid.start(strategy, rounds=2).arrays
    shutil.rmtree(tmp_path / "state")
    grid.seen.clear()
    grid.replies.clear()
    grid.start(strategy, arrays)
    assert not grid.seen
    for reply in grid.replies:
        assert reply.error.code == ErrorCode.MOD_FAILED_PRECONDITION
        assert reply.error.reason.startswith(OUT_OF_SYNC)
    grid.start(strategy, arrays, rounds=2)
    assert len(grid.seen) == 4
    assert grid.wholes() == {100: 2, 101: 2}


def test_other_errors_of_a_client_leave_it_the_version_that_it_holds(tmp_path):
    def fail(message, ctxt):
        if failing:
            raise RuntimeError("out of memory")

    failing = False
    grid = Watched(2, before=fail)
    strategy = both_ways(FedAvg(fraction_evaluate=0.0))
    arrays = grid.start(strategy).arrays
    failing = True
    grid.start(strategy, arrays)
    failing = False
    grid.replies.clear()
    grid.start(strategy, arrays)
    assert grid.wholes() == {100: 1, 101: 1}
    assert not any(reply.has_error() for reply in grid.replies)


def test_restored_server_goes_on_without_whole_models(tmp_path):
    grid = Watched(3)
    strategy = both_ways(first="float16")
    arrays = grid.start(strategy, arrays_of(counter=np.array(3)), rounds=3).arrays
    strategy.save(tmp_path / "held")
    restored = both_ways(first="float16")
    restored.load(tmp_path / "held")
    assert restored.held_bytes() == strategy.held_bytes() > 0
    arrays = grid.start(restored, arrays, rounds=2).arrays
    assert grid.wholes() == {100: 1, 101: 1, 102: 1}
    assert not any(reply.has_error() for reply in grid.replies)
    # Back at the older state, clients still have the file of the version that it knows.
    again = both_ways(first="float16")
    again.load(tmp_path / "held")
    arrays = grid.start(again, arrays, rounds=4).arrays
    assert grid.wholes() == {100: 1, 101: 1, 102: 1}
    assert not any(reply.has_error() for reply in grid.replies)
    # And now they do not.
    again.load(tmp_path / "held")
    grid.start(again, arrays, rounds=3)
    assert grid.wholes() == {100: 2, 101: 2, 102: 2}
    assert sum(reply.has_error() for reply in grid.replies) == 3


def test_states_of_servers_without_a_downlink_are_loaded_and_the_other_way_round():
    plain = CompressedStrategy(FedAvg(), UPLINK)
    grid = LoopbackGrid(make_app([compression_mod]), 2)
    arrays = plain.start(grid, arrays_of(), num_rounds=2).arrays
    state = plain.state_dict()
    assert "downlink" not in state
    strategy = both_ways()
    strategy.load_state_dict(state)
    watched = Watched(2)
    watched.start(strategy, arrays)
    assert watched.wholes() == {100: 1, 101: 1}
    plain.load_state_dict(strategy.state_dict())
    with pytest.raises(ValueError, match="the state is that of"):
        both_ways(downlink=TopK(0.1)).load_state_dict(strategy.state_dict())
    with pytest.raises(ValueError, match="the state has first='float32'"):
        both_ways(first="float16").load_state_dict(strategy.state_dict())


def test_clients_that_are_away_too_long_or_have_no_room_are_sent_the_whole():
    inner = {"min_train_nodes": 1, "min_available_nodes": 1, "fraction_evaluate": 0.0}
    for options in ({"keep_rounds": 3}, {"memory_limit": 0}):
        grid = Watched(2)
        everyone = dict(grid.contexts)
        strategy = both_ways(FedAvg(**inner), **options)
        arrays = grid.start(strategy).arrays
        grid.contexts = {100: everyone[100]}
        arrays = grid.start(strategy, arrays, rounds=4).arrays
        grid.contexts = everyone
        grid.start(strategy, arrays)
        assert grid.wholes() == ({100: 1, 101: 2} if "keep_rounds" in options else {100: 6, 101: 2})
        assert not any(reply.has_error() for reply in grid.replies)


# --- hostile replies ------------------------------------------------------------------------------


def test_clients_that_lie_about_what_they_hold_harm_nobody_else():
    """Ten clients lie 1,000 times, in their replies to train and evaluate messages."""
    rng = random.Random(0)
    grid = Watched(12, noise=0.0)
    strategy = both_ways(history=2000)
    publisher = strategy._downlink.publisher
    old: list[bytes] = []

    def lie(reply):
        if reply.metadata.src_node_id >= 110:
            return reply
        what = rng.randrange(9)
        if what == 0:
            return Message(
                error=_error(OUT_OF_SYNC + rng.choice(("", "x" * 10_000))), reply_to=_asked(reply)
            )
        claim = bytearray(reply.content[ADDED][KEY]) if ADDED in reply.content else bytearray(32)
        old.append(bytes(claim))
        changed: Any = {
            1: rng.randbytes(CLAIM_SIZE),
            2: rng.choice(old),
            3: bytes(claim[:16]) + np.array([np.nan, np.inf]).tobytes(),
            4: bytes(claim[:16]) + rng.randbytes(16),
            5: rng.randbytes(rng.choice((0, 1, 31, 33, 10**6))),
            6: "text",
            7: [1, 2, 3],
            8: None,
        }[what]
        if changed is None:
            del reply.content[ADDED]
        else:
            reply.content[ADDED] = ConfigRecord({rng.choice((KEY, KEY, "other")): changed})
        return reply

    def _asked(reply):
        return by_id[reply.metadata.reply_to_message_id]

    by_id: dict[str, Message] = {}
    original = Watched.send_and_receive

    def through(messages, *, timeout=None):
        messages = list(messages)
        replies = original(grid, messages, timeout=timeout)
        by_id.clear()
        by_id.update({m.metadata.message_id: m for m in messages})
        return [lie(reply) for reply in replies]

    grid.send_and_receive = through  # type: ignore[method-assign]
    arrays, held = arrays_of(), []
    for _ in range(50):
        arrays = grid.start(strategy, arrays).arrays
        grid.seen.clear()
        grid.replies.clear()
        held.append(strategy.held_bytes() + tensor_bytes(publisher.state_dict()))
        assert publisher.held_bytes() <= 2000
    wholes = grid.wholes()
    assert wholes[110] == wholes[111] == 1
    assert min(wholes[node] for node in range(100, 110)) > 30
    assert len(strategy._downlink._clients) <= 12
    assert max(held[10:]) - min(held[10:]) < 4000


def _error(reason):
    return Error(ErrorCode.MOD_FAILED_PRECONDITION, reason)


def drifted(reply, strategy, share):
    """Return a reply of a client whose model differs by a share of each element."""
    claim = reply.content[ADDED][KEY]
    model = {
        name: value * (1 + share * torch.randn(value.shape))
        for name, value in server_model(strategy).items()
    }
    reply.content[ADDED] = ConfigRecord({KEY: claim[:16] + Checksum.of(model).sums})
    return reply


def test_model_that_drifts_by_more_than_rounding_is_replaced(caplog):
    caplog.set_level(logging.WARNING, "flwr")
    for share, wholes in ((1e-6, 1), (1e-2, 2)):
        grid = Watched(2)
        strategy = both_ways(FedAvg(fraction_evaluate=0.0))
        arrays = grid.start(strategy).arrays
        drift = functools.partial(drifted, strategy=strategy, share=share)
        grid.tamper = lambda replies, drift=drift: [drift(reply) for reply in replies]
        caplog.clear()
        arrays = grid.start(strategy, arrays).arrays
        assert ("by more than rounding" in caplog.text) == (wholes == 2)
        grid.tamper = lambda replies: replies
        grid.start(strategy, arrays, rounds=2)
        assert set(grid.wholes().values()) == {wholes}


def test_checksum_estimates_the_distance_of_two_models():
    generator = torch.Generator().manual_seed(0)
    estimates = []
    for number in range(100):
        model = {"a": torch.randn(300, 70, generator=generator), "b": torch.tensor(float(number))}
        other = {name: value + 0.1 for name, value in model.items()}
        other["a"][0, : number % 70] = 3.0
        sums = [np.frombuffer(Checksum.of(one).sums) for one in (model, other)]
        distance = sum(float((model[n] - other[n]).double().square().sum()) for n in model)
        estimates += list((sums[0] - sums[1]) ** 2 / distance)
    assert Checksum.of(model).norm == pytest.approx(
        float(torch.cat([v.reshape(-1) for v in model.values()]).double().norm())
    )
    assert 0 < np.mean(estimates) < 5
    masked = {**model, "mask": torch.tensor([0.0, -torch.inf, torch.nan])}
    assert Checksum.of(masked).agrees(Checksum.of(masked).sums, "float32")
    assert not Checksum.of(model).agrees(np.array([np.nan, 0.0]).tobytes(), "float32")


# --- the files of clients -------------------------------------------------------------------------


def test_clients_of_one_machine_share_three_versions_and_contexts_hold_none(tmp_path):
    grid = Watched(20)
    strategy = both_ways()
    wide = np.random.default_rng(0).normal(size=(200, 100)).astype(np.float32)
    grid.start(strategy, arrays_of(wide=wide), rounds=5)
    [folder] = tmp_path.glob("lbgm_compress-*")
    assert folder.stat().st_mode & 0o777 == 0o700
    assert len(files_in(folder)) == 3
    assert [path.name for path in folder.iterdir()] == [f"{strategy.training}-models"]
    for path in folder.rglob("*.safetensors"):
        assert path.stat().st_mode & 0o777 == 0o600
    for ctxt in grid.contexts.values():
        kept = unpack_state(ctxt.state[KEY]["state"])
        assert not {"model", "version"} & set(kept)
        # The residual alone has the size of the model.
        assert len(ctxt.state[KEY]["state"]) < 1.5 * 4 * 21_230


def test_folder_that_others_may_read_is_refused_with_the_way_out(tmp_path):
    (tmp_path / f"lbgm_compress-{os.getuid()}").mkdir(mode=0o755)
    (tmp_path / f"lbgm_compress-{os.getuid()}").chmod(0o755)
    grid = Watched(2)
    grid.start(both_ways(FedAvg(fraction_evaluate=0.0)))
    assert not grid.seen
    for reply in grid.replies:
        assert "CompressionMod(state_dir=...)" in reply.error.reason


def test_model_that_cannot_be_written_costs_a_whole_model_and_no_round(tmp_path, monkeypatch):
    def full(path, state):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lbgm_compress.adapters.flower.models.write_state", full)
    grid = Watched(2)
    grid.start(both_ways(FedAvg(fraction_evaluate=0.0)), rounds=3)
    assert len(grid.seen) == 6
    assert grid.wholes() == {100: 3, 101: 3}


def test_trainings_that_are_over_leave_the_folder_after_a_week(tmp_path):
    grid = Watched(2)
    first = both_ways()
    grid.start(first)
    [old] = tmp_path.rglob("*-models")
    long_ago = time.time() - WEEK - 60
    os.utime(old, (long_ago, long_ago))
    second = both_ways()
    grid.start(second)
    assert [path.name for path in tmp_path.rglob("*-models")] == [f"{second.training}-models"]


def test_name_of_a_training_does_not_lead_out_of_the_folder(tmp_path):
    models = Models("../../other/..", tmp_path)
    models.write(b"1234567890123456", {"a": 1})
    assert models.folder == tmp_path / "other-models"
    assert models.read(b"1234567890123456") == {"a": 1}


# --- the residual in the model --------------------------------------------------------------------


@pytest.mark.parametrize("downlink", [None, SUBSPACES], ids=repr)
@pytest.mark.parametrize("compressor", COMPRESSORS[:4], ids=repr)
def test_with_the_residual_in_the_model_all_of_an_update_is_applied_or_kept(compressor, downlink):
    rng = random.Random(repr(compressor))
    federation = Federation(compressor, residual="model", downlink=downlink)
    federation.run()
    checkpoint = federation.checkpoint()
    for number in range(16):
        fate = FATES[number % 7] if number < 14 else rng.choice(FATES)
        asked = rng.sample(list(federation.everyone), rng.choice((1, 2, 3)))
        if fate == "restored":
            federation.restore(checkpoint)
            if downlink is not None:
                # Clients that are ahead of the server answer with an error, once.
                federation.run("too few")
        elif rng.random() < 0.3:
            checkpoint = federation.checkpoint()
        federation.run("fine" if fate == "restored" else fate, asked)
        if fate in ("fine", "restored"):
            for node in asked:
                assert federation.missing(node) < 2e-5
    federation.run()
    assert max(federation.missing(node) for node in federation.everyone) < 2e-5


@pytest.mark.parametrize("downlink", [None, SUBSPACES], ids=repr)
def test_client_trains_from_the_model_plus_what_it_has_not_sent(downlink, tmp_path):
    mod = CompressionMod(state_dir=tmp_path / "state")

    class Shifted(Watched):
        def check(self, arrays):
            """Compare what the app sees with the model plus the client's residual."""
            kind, node, _ = self.seen[-1]
            if not self.armed:
                return
            for name, tensor in self.expected().items():
                residual = states_of(node)[name] if kind == "train" else 0
                assert np.array_equal(arrays[name], (tensor + residual).numpy())
                if kind == "train":
                    self.shifts.append(float(residual.abs().max()))

        def expected(self):
            if downlink is not None:
                return self.model
            return {n: torch.from_numpy(a.numpy().copy()) for n, a in self.arrays.items()}

    def states_of(node):
        [path] = (tmp_path / "state").glob(f"{strategy.training}-{node}.*")
        entries = unpack_state(path.read_bytes())["tensors"]
        return {name: entry["own"]["residual"] for name, entry in entries.items()}

    strategy = CompressedStrategy(
        FedAvg(fraction_evaluate=0.0),
        ErrorFeedback(TopK(0.05)),
        downlink=downlink,
        residual="model",
    )
    grid = Shifted(3, mod)
    grid.armed, grid.shifts = False, []
    if downlink is None:
        grid.send_and_receive = lambda messages, timeout=None: LoopbackGrid.send_and_receive(  # type: ignore
            grid, messages, timeout=timeout
        )
    grid.arrays = grid.start(strategy).arrays
    grid.armed = True
    for _ in range(4):
        grid.arrays = grid.start(strategy, grid.arrays).arrays
    assert len(grid.shifts) == 4 * 3 * 2
    assert min(grid.shifts) > 0.01


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"residual": "model", "compressor": TopK(0.1)}, ValueError, "needs ErrorFeedback"),
        (
            {"residual": "model", "compressor": LBGM(ErrorFeedback(TopK(0.1)))},
            ValueError,
            "needs ErrorFeedback",
        ),
        (
            {"residual": "model", "compressor": ErrorFeedback(TopK(0.1), decay=0.9)},
            ValueError,
            "decay of 1",
        ),
        ({"residual": "disk"}, ValueError, "must be 'memory' or 'model'"),
        ({"first": "int4"}, ValueError, "first must be"),
        ({"history": -1}, ValueError, "history"),
        ({"downlink": UPLINK}, ValueError, "leave out ErrorFeedback"),
        ({"downlink": SignSGD(vote=True)}, ValueError, "scaled=True"),
        ({"downlink": "TopK(0.1)"}, TypeError, "expected a compressor"),
    ],
)
def test_wrong_arguments_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        both_ways(**options)


# --- bytes ----------------------------------------------------------------------------------------


def test_metrics_summary_log_and_plot_tell_both_directions(tmp_path, caplog):
    caplog.set_level(logging.INFO, "flwr")
    log = tmp_path / "rounds.jsonl"
    strategy = both_ways(log_file=log, residual="model")
    grid = Watched(4)
    grid.check = lambda arrays: None
    result = grid.start(strategy, rounds=4)
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    dense = 4 * 4 * 1230
    sizes = {"train": 0, "evaluate": 0}
    for number, line in enumerate(lines, start=1):
        train = result.train_metrics_clientapp[number]
        evaluate = result.evaluate_metrics_clientapp[number]
        assert line["downlink-bytes"] == train["downlink-bytes"]
        assert line["evaluate"]["downlink-bytes"] == evaluate["downlink-bytes"]
        assert train["downlink-dense-bytes"] == evaluate["downlink-dense-bytes"] == dense
        sizes["train"] += train["downlink-bytes"]
        sizes["evaluate"] += evaluate["downlink-bytes"]
    for stage, size in sizes.items():
        arrays = sum(len(array.data) for kind, _, array in grid.sent if kind == stage)
        # The rest is the request of each message.
        assert arrays + 16 * 150 < size < arrays + 16 * 450
    text = "\n".join(record.getMessage() for record in caplog.records)
    down = sum(sizes.values())
    up = strategy.totals.uplink
    assert strategy.totals.downlink == down
    for name, size in (("Uplink", up), ("Downlink", down), ("Both", up + down)):
        assert f"\t├── {name}: {human_bytes(size)}" in text
    assert f"\t│\t├── Downlink: {SUBSPACES!r}" in text
    assert "\t│\t├── Residual: in the client's model" in text
    for source in (result, log):
        plot(source, tmp_path / "picture.png")
        assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
        (tmp_path / "picture.png").unlink()


def test_server_holds_three_hundredths_of_a_thousand_models_at_most():
    """Client states are left out, so that the test takes little memory."""
    wide = np.random.default_rng(0).normal(size=(300, 300)).astype(np.float32)
    arrays = arrays_of(wide=wide)
    grid = Watched(1000)
    compressor = LookBackSubspace(2, values="int4", directions="int4")
    strategy = both_ways(
        FedAvg(0.1, fraction_evaluate=0.01), compressor=compressor, history=300_000
    )
    for _ in range(12):
        arrays = grid.start(strategy, arrays).arrays
        grid.seen.clear()
        for _, _, array in grid.sent:
            array.data = bytes(array.data[:2])
    seen = len(strategy.held_clients())
    assert seen > 600
    publisher = strategy._downlink.publisher
    held = strategy.held_bytes() + tensor_bytes(publisher.state_dict())
    dense = sum(array.numpy().nbytes for array in arrays_of(wide=wide).values())
    assert publisher.held_bytes() <= 300_000
    assert (held - publisher.held_bytes()) * 1000 / seen < 0.03 * 1000 * dense
