"""The states that server and clients keep between rounds: losses, restarts, limits, files."""

from __future__ import annotations

import contextlib
import random
from typing import ClassVar

import numpy as np
import pytest
import torch

pytest.importorskip("flwr", reason="Flower is not installed: it needs Python 3.11")

from flwr.serverapp import strategy as flower
from hypothesis import given, settings
from hypothesis import strategies as st

from lbgm_compress import (
    LBGM,
    Atomo,
    ErrorFeedback,
    LookBackSubspace,
    Sender,
    SignSGD,
    TopK,
)
from lbgm_compress.adapters.flower import (
    CompressedStrategy,
    CompressionMod,
    compression_mod,
)
from lbgm_compress.adapters.flower.archive import pack_state, unpack_state
from tests.flower_loopback import Kept, LoopbackGrid, arrays_of, context, make_app
from tests.laws import assert_same_bits, saved_and_loaded
from tests.soak import length

pytestmark = pytest.mark.flower


@pytest.fixture(autouse=True)
def same_draws():
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002  Flower's noise comes from there


# --- losses and restarts --------------------------------------------------------------------------


class Honest(Sender):
    """A sender that records the tensors that its messages decode to."""

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
@pytest.mark.parametrize("rounds", [60, pytest.param(length(300, 80), marks=pytest.mark.soak)])
def test_losses_restarts_and_old_checkpoints_cost_bytes_and_never_give_a_wrong_update(
    compressor, files, rounds, tmp_path, monkeypatch
):
    monkeypatch.setattr("lbgm_compress.adapters.flower.mod.Sender", Honest)
    # The machine does not fail, and waiting for its disk would take most of the time.
    monkeypatch.setattr("os.fsync", lambda handle: None)
    rng = random.Random(repr(compressor) + str(files))
    mod = CompressionMod(state_dir=tmp_path if files else None)
    grid = LoopbackGrid(make_app([mod], noise=0.2, rate=0.02), 4)
    inner = Kept(fraction_train=0.5, fraction_evaluate=0.0)
    strategy = CompressedStrategy(inner, compressor)
    arrays, checkpoint, newest, recycled = arrays_of(), None, 1000, 0.0
    for _ in range(rounds):
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
    # A server that continues from a saved state has the same training, a new one does not.
    restored = CompressedStrategy(flower.FedAvg(), LBGM(TopK(0.1)))
    restored.load_state_dict(strategy.state_dict())
    assert share(restored) == 1
    assert share(CompressedStrategy(flower.FedAvg(), LBGM(TopK(0.1)))) == 0
    # A damaged file counts as a missing one.
    rng = random.Random(0)
    for _ in range(20):
        for path in (tmp_path / "state").iterdir():
            data = bytearray(path.read_bytes())
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            # The files of the other training are not written again, and must not become empty.
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


# --- states at the server -------------------------------------------------------------------------


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


@pytest.mark.parametrize("change", ["exclude", "dtypes"])
def test_other_arrays_than_before_are_sent_in_full_once(change):
    """The state at the server is that of other arrays, of the same number."""
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
