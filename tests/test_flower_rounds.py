"""Rounds that are thrown away: what clients sent in them comes back into their residuals."""

from __future__ import annotations

import json
import logging
import random
from typing import Any

import numpy as np
import pytest

pytest.importorskip("flwr", reason="Flower is not installed: it needs Python 3.11")

from flwr.app import ConfigRecord, Message
from flwr.serverapp.strategy import FedAvg

from lbgm_compress import LBGM, ErrorFeedback, LookBackSubspace, SignSGD, TopK
from lbgm_compress.adapters.flower import CompressedStrategy, CompressionMod
from lbgm_compress.adapters.flower.archive import pack_state, unpack_state
from lbgm_compress.adapters.flower.request import KEY, Request
from tests.flower_loopback import LoopbackGrid, Receding, arrays_of, make_app
from tests.laws import saved_and_loaded

pytestmark = pytest.mark.flower

COMPRESSORS = [
    ErrorFeedback(TopK(0.05)),
    ErrorFeedback(SignSGD(scaled=True)),
    ErrorFeedback(LookBackSubspace(2, values="int4")),
    ErrorFeedback(LBGM(TopK(0.1))),
    LBGM(ErrorFeedback(TopK(0.1)), delta=0),
]
Arrays = dict[str, np.ndarray]


@pytest.fixture(autouse=True)
def same_draws(monkeypatch):
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002  Flower's noise comes from there
    # The machine does not fail, and waiting for its disk would take most of the time.
    monkeypatch.setattr("os.fsync", lambda handle: None)


class Fragile(FedAvg):
    """FedAvg that fails, or finds too few replies, when told to."""

    fate = "fine"

    def aggregate_train(self, server_round, replies):
        self.replies = list(replies)
        if self.fate == "raises":
            raise RuntimeError("the aggregate fails")
        if self.fate == "too few":
            return None, None
        return super().aggregate_train(server_round, self.replies)


class Federation:
    """A training that counts, for each client, its updates and what the model got of them."""

    def __init__(self, compressor: Any, files: Any = None, nodes: int = 3, **options: Any) -> None:
        self.mod = CompressionMod(state_dir=files)
        self.compressor, self.options = compressor, options
        self.updates: dict[int, Arrays] = {}
        self.applied: dict[int, Arrays] = {}
        # Of each client since the checkpoint: the replies that the model got.
        self.recent: dict[int, list[Arrays]] = {}
        self.failing: set[int] = set()
        self.receding = Receding()
        app = make_app([self.mod], self._train, self._before)
        self.grid = LoopbackGrid(app, nodes)
        self.everyone = dict(self.grid.contexts)
        self.inner = Fragile(fraction_evaluate=0.0, min_train_nodes=1, min_available_nodes=1)
        self.strategy = CompressedStrategy(self.inner, compressor, **options)
        self.arrays = arrays_of()

    def _before(self, message: Message, ctxt: Any) -> None:
        if ctxt.node_id in self.failing:
            raise RuntimeError("the client is out of memory")

    def _train(self, arrays: Arrays, partition: int) -> Arrays:
        new = self.receding(arrays, partition)
        _add(self.updates, 100 + partition, _difference(new, arrays))
        # A reply that has not been applied comes back: it is no loss.
        self.recent.setdefault(100 + partition, []).append({})
        return new

    def run(self, fate: str = "fine", asked: Any = None, number: int = 1) -> None:
        """Run rounds in which `asked`, or all, are asked, and which end as `fate` says."""
        self.grid.contexts = {node: self.everyone[node] for node in asked or self.everyone}
        victim = next(iter(self.grid.contexts))
        self.inner.fate = fate
        self.grid.losses = lambda number, node: fate == "lost" and node == victim
        self.grid.tamper = lambda replies: [
            _damaged(reply)
            if fate == "rejected" and reply.metadata.src_node_id == victim
            else reply
            for reply in replies
        ]
        self.failing = {victim} if fate == "client fails" else set()
        for _ in range(number):
            sent = {name: array.numpy() for name, array in self.arrays.items()}
            self.inner.replies = []
            try:
                result = self.strategy.start(self.grid, self.arrays, num_rounds=1)
            except RuntimeError:
                assert fate == "raises"
                continue
            if fate == "too few":
                continue
            self.arrays = result.arrays or self.arrays
            for reply in self.inner.replies:
                if not reply.has_error():
                    [record] = reply.content.array_records.values()
                    new = {name: array.numpy() for name, array in record.items()}
                    node, change = reply.metadata.src_node_id, _difference(new, sent)
                    _add(self.applied, node, change)
                    self.recent[node][-1] = change

    def checkpoint(self) -> Any:
        """Return what a server saves after a round."""
        state = saved_and_loaded(self.strategy.state_dict())
        applied = {node: dict(sums) for node, sums in self.applied.items()}
        self.recent.clear()
        return state, self.arrays, applied

    def restore(self, checkpoint: Any) -> None:
        """Restart the server from a checkpoint.

        A client can give back its last message, and no others that it has sent since.
        """
        for node, changes in self.recent.items():
            for change in changes[:-1]:
                _add(self.updates, node, {name: -value for name, value in change.items()})
        self.recent.clear()
        state, self.arrays, applied = checkpoint
        self.applied = {node: dict(sums) for node, sums in applied.items()}
        self.strategy = CompressedStrategy(self.inner, self.compressor, **self.options)
        self.strategy.load_state_dict(state)

    def state(self, node: int) -> Any:
        """Return what a client keeps."""
        if self.mod.state_dir is None:
            return unpack_state(self.everyone[node].state[KEY]["state"])
        file = self.mod.state_dir / f"{self.strategy.training}-{node}.safetensors"
        return unpack_state(file.read_bytes())

    def change_state(self, node: int, change: Any) -> None:
        """Change what a client keeps in its context, or forget it if `change` returns None."""
        record = self.everyone[node].state[KEY]
        state = change(unpack_state(record["state"]))
        self.everyone[node].state[KEY] = ConfigRecord({**record, "state": pack_state(state)})

    def missing(self, node: int) -> float:
        """Return the largest part of a client's updates neither applied nor in its residual.

        The client's last message has been applied.
        """
        residuals = {
            name: _residual(entry["own"]) for name, entry in self.state(node)["tensors"].items()
        }
        return max(
            float(np.abs(total - self.applied[node][name] - residuals[name]).max())
            for name, total in self.updates[node].items()
        )


def _difference(new: Arrays, old: Arrays) -> Arrays:
    return {name: value.astype(float) - old[name].astype(float) for name, value in new.items()}


def _add(sums: dict[int, Arrays], node: int, change: Arrays) -> None:
    total = sums.setdefault(node, {})
    for name, value in change.items():
        total[name] = total.get(name, 0.0) + value


def _residual(own: Any) -> np.ndarray:
    while "residual" not in own:
        own = own["inner"]
    return own["residual"].numpy()


def _damaged(reply: Message) -> Message:
    [record] = reply.content.array_records.values()
    array = record[KEY]
    array.data = array.data[:-1]
    return reply


FATES = ("fine", "too few", "raises", "lost", "rejected", "client fails", "restored")


@pytest.mark.parametrize("files", [False, True], ids=["context", "files"])
@pytest.mark.parametrize("compressor", COMPRESSORS, ids=repr)
def test_all_of_an_update_is_in_the_model_or_in_the_residual(compressor, files, tmp_path):
    rng = random.Random(repr(compressor) + str(files))
    federation = Federation(compressor, tmp_path if files else None)
    federation.run()
    checkpoint, seen = federation.checkpoint(), set()
    for number in range(20):
        fate = FATES[number % 7] if number < 14 else rng.choice(FATES)
        asked = rng.sample(list(federation.everyone), rng.choice((1, 2, 3)))
        if fate == "restored":
            federation.restore(checkpoint)
        elif rng.random() < 0.3:
            checkpoint = federation.checkpoint()
        federation.run("fine" if fate == "restored" else fate, asked)
        seen.add(fate)
        if fate in ("fine", "restored"):
            for node in asked:
                assert federation.missing(node) < 2e-5
    assert seen == set(FATES)
    federation.run()
    sizes = []
    for node in federation.everyone:
        assert federation.missing(node) < 2e-5
        sizes += [np.abs(total).max() for total in federation.updates[node].values()]
    assert min(sizes) > 0.1


def test_error_of_the_inner_strategy_propagates_and_the_round_comes_back_once():
    federation = Federation(ErrorFeedback(TopK(0.05)), nodes=2)
    federation.run()
    federation.inner.fate = "raises"
    with pytest.raises(RuntimeError, match="the aggregate fails"):
        federation.strategy.start(federation.grid, federation.arrays, num_rounds=1)
    federation.run("client fails", [100], number=2)
    federation.run("too few", number=3)
    federation.run("lost", [101])
    federation.run()
    federation.run("client fails", [100], number=2)
    federation.run()
    assert federation.missing(100) < 1e-5
    assert federation.missing(101) < 1e-5


@pytest.mark.parametrize("where", ["dict", "file"])
def test_server_saved_after_a_thrown_away_round_still_tells_of_it(where, tmp_path):
    federation = Federation(ErrorFeedback(LBGM(TopK(0.1))))
    federation.run(number=2)
    federation.run("raises")
    if where == "dict":
        federation.restore(federation.checkpoint())
    else:
        federation.strategy.save(tmp_path / "held")
        federation.strategy = CompressedStrategy(federation.inner, federation.compressor)
        federation.strategy.load(tmp_path / "held")
    federation.run()
    assert max(map(federation.missing, federation.everyone)) < 1e-5


# --- where the outcome is not known ---------------------------------------------------------------


def test_reply_that_was_applied_never_comes_back_after_its_record_was_dropped():
    federation = Federation(ErrorFeedback(TopK(0.05)), keep_rounds=3)
    federation.run()
    federation.run(asked=[101], number=6)
    assert federation.strategy.state_dict()["applied"].keys() == {101}
    federation.run()
    assert max(map(federation.missing, federation.everyone)) < 1e-5


def test_round_that_was_thrown_away_before_keep_rounds_is_lost():
    federation = Federation(ErrorFeedback(TopK(0.05)), keep_rounds=3)
    federation.run()
    federation.run("too few")
    federation.run(asked=[101], number=2)
    federation.run(asked=[101, 102])
    federation.run()
    # Round 2 is one of the last three before round 5, and not before round 6.
    assert federation.missing(100) > 0.1
    assert federation.missing(101) < 1e-5
    assert federation.missing(102) < 1e-5


def test_state_of_an_older_release_loads_and_nothing_comes_back():
    federation = Federation(ErrorFeedback(TopK(0.05)))
    federation.run(number=2)
    state, *others = federation.checkpoint()
    for key in ("applied", "unknown-until"):
        del state[key]
    federation.restore((state, *others))
    federation.run()
    federation.run("too few")
    federation.run()
    assert max(map(federation.missing, federation.everyone)) < 1e-5


def test_client_restored_from_an_old_file_gives_nothing_back_that_was_applied(tmp_path):
    federation = Federation(ErrorFeedback(TopK(0.05)), tmp_path)
    federation.run()
    [old] = tmp_path.glob("*-100.safetensors")
    data = old.read_bytes()
    federation.run()
    before, first = federation.updates[100].copy(), federation.state(100)
    old.write_bytes(data)
    assert first["last"]["round"] == federation.state(100)["last"]["round"] + 1
    state = federation.state(100)
    federation.run()
    # The second update's residual is lost with the file, and the first update is not sent twice.
    for name, entry in state["tensors"].items():
        step = federation.updates[100][name] - before[name]
        applied = federation.applied[100][name]
        expected = before[name] - _residual(first["tensors"][name]["own"])
        expected = expected + step + _residual(entry["own"])
        rest = _residual(federation.state(100)["tensors"][name]["own"])
        assert np.abs(applied + rest - expected).max() < 1e-5


def test_client_that_is_asked_twice_in_a_round_gives_nothing_back():
    class Twice(Fragile):
        def configure_train(self, server_round, arrays, config, grid):
            for message in super().configure_train(server_round, arrays, config, grid):
                yield message
                yield Message(message.content, message.metadata.dst_node_id, "train")

    federation = Federation(ErrorFeedback(TopK(0.05)), nodes=2)
    federation.inner = Twice(fraction_evaluate=0.0)
    federation.strategy = CompressedStrategy(federation.inner, federation.compressor)
    federation.run(number=2)
    assert "last" not in federation.state(100)
    assert federation.missing(100) < 1e-5


@pytest.mark.parametrize("old", ["server", "client"])
def test_older_release_at_one_end_works_as_before(old, monkeypatch):
    if old == "server":
        pack = Request.pack

        def as_before(self):
            head, _, digest = pack(self).partition(b"\0")
            known = json.loads(head)
            del known["round"], known["applied"]
            return json.dumps(known).encode() + b"\0" + digest

        monkeypatch.setattr(Request, "pack", as_before)
    else:
        unpack = Request.unpack

        def without(data, compressors=()):
            request = unpack(data, compressors)
            return Request(
                *(request.compressor, request.exclude, request.training),
                *(request.layout, request.digest),
            )

        monkeypatch.setattr(Request, "unpack", staticmethod(without))
    federation = Federation(ErrorFeedback(LBGM(TopK(0.1))))
    federation.run(number=4)
    assert "last" not in federation.state(100)
    assert max(map(federation.missing, federation.everyone)) < 1e-5
    # From one release to the other in mid-training.
    monkeypatch.undo()
    federation.run("too few")
    federation.run()
    assert max(map(federation.missing, federation.everyone)) < 1e-5


# --- sizes ----------------------------------------------------------------------------------------


def test_client_keeps_its_message_and_compressed_state_alone():
    federation = Federation(LBGM(TopK(0.1)))
    federation.run(number=2)
    assert "last" not in federation.state(100)
    federation = Federation(ErrorFeedback(TopK(0.01)))
    federation.run(number=2)
    state = federation.state(100)
    assert state["last"]["held"].keys() == set()
    # Top-k of 1 % of 1230 elements, about 100 bytes.
    assert len(pack_state(state)) - len(pack_state({**state, "last": {}})) < 700
    federation = Federation(ErrorFeedback(LBGM(delta=0)))
    federation.run(number=2)
    state = federation.state(100)
    # A full message does not need the look-back gradient that it replaces.
    assert state["last"]["held"].keys() == set()
    dense = 4 * 1230
    assert len(pack_state(state)) - len(pack_state({**state, "last": {}})) < 1.2 * dense
    federation = Federation(ErrorFeedback(LookBackSubspace(2, values="int4")))
    federation.run(number=4)
    state = federation.state(100)
    assert state["last"]["held"].keys() == {"layer.weight"}
    assert len(pack_state(state)) - len(pack_state({**state, "last": {}})) < 0.4 * dense


# --- wrong inputs ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {"round": "3"},
        {"round": True},
        {"round": 2.0},
        {"round": -1},
        {"round": 0},
        {"round": 2**80},
        {"applied": None},
        {"applied": [1]},
        {"applied": -1},
        {"applied": 2},
    ],
    ids=repr,
)
def test_damaged_round_in_a_request_is_an_error_and_keeps_the_state(change, monkeypatch):
    federation = Federation(ErrorFeedback(TopK(0.05)))
    federation.run()
    before = pack_state(federation.state(100))
    pack = Request.pack

    def damaged(self):
        head, _, digest = pack(self).partition(b"\0")
        return json.dumps({**json.loads(head), **change}).encode() + b"\0" + digest

    monkeypatch.setattr(Request, "pack", damaged)
    federation.run()
    [error, *_] = federation.inner.replies
    assert "the request cannot be read" in error.error.reason
    assert pack_state(federation.state(100)) == before
    monkeypatch.undo()
    federation.run()
    assert max(map(federation.missing, federation.everyone)) < 1e-5


@pytest.mark.parametrize(
    "change",
    [
        lambda last: 5,
        lambda last: {},
        lambda last: {**last, "round": "1"},
        lambda last: {**last, "names": ["other"]},
        lambda last: {**last, "names": ["layer.bias"]},
        lambda last: {**last, "message": last["message"][:-1]},
        lambda last: {**last, "message": last["message"].flip(0)},
        lambda last: {**last, "message": last["message"].float()},
        lambda last: {**last, "message": "bytes"},
        lambda last: {**last, "held": {"layer.bias": {"id": 1, "state": {}}}},
        lambda last: {**last, "held": {"layer.bias": 3}},
        lambda last: {**last, "held": 3},
    ],
)
def test_damaged_last_message_is_logged_and_not_used(change, caplog):
    federation = Federation(ErrorFeedback(LBGM(TopK(0.1), delta=1)), nodes=1)
    federation.run(number=2)
    federation.run("too few")
    before = federation.state(100)
    federation.change_state(100, lambda state: {**state, "last": change(state["last"])})
    with caplog.at_level(logging.WARNING, "flwr"):
        federation.run()
    assert "the last message is not given back" in caplog.text
    assert before["last"]["round"] == 3
    assert federation.state(100)["last"]["round"] == 4
    # That update is lost, and all later ones are whole.
    lost = federation.missing(100)
    assert lost > 0.01
    federation.run("too few")
    federation.run()
    assert federation.missing(100) == pytest.approx(lost, abs=1e-5)


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state.update(applied=3),
        lambda state: state["applied"].update({100: 99}),
        lambda state: state["applied"].update({100: -1}),
        lambda state: state["applied"].update({100: "one"}),
        lambda state: state["applied"].update(node=1),
        lambda state: state.update({"unknown-until": 99}),
        lambda state: state.update({"unknown-until": None}),
    ],
)
def test_saved_rounds_that_are_damaged_are_refused_and_change_nothing(change):
    federation = Federation(ErrorFeedback(LBGM(TopK(0.1))))
    federation.run()
    state = saved_and_loaded(federation.strategy.state_dict())
    change(state)
    before = pack_state(federation.strategy.state_dict())
    with pytest.raises(ValueError, match=r"state|round|int"):
        federation.strategy.load_state_dict(state)
    assert pack_state(federation.strategy.state_dict()) == before
    federation.run()
    assert max(map(federation.missing, federation.everyone)) < 1e-5
