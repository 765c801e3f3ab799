"""Arrays that stay at each client in Flower: what apps see, what travels, and what faults cost."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

pytest.importorskip("flwr", reason="Flower is not installed: it needs Python 3.11")

from flwr.app import ArrayRecord, ConfigRecord, Message
from flwr.common.constant import ErrorCode
from flwr.serverapp import strategy as flower
from flwr.serverapp.strategy import FedAvg

from lbgm_compress import ErrorFeedback, Identity, LookBackSubspace, TopK
from lbgm_compress.adapters.flower import CompressedStrategy, CompressionMod, compression_mod
from lbgm_compress.adapters.flower.archive import unpack_state
from lbgm_compress.adapters.flower.claim import OUT_OF_SYNC
from lbgm_compress.adapters.flower.request import ADDED, KEY, Request
from tests.flower_loopback import Kept, LoopbackGrid, Receding, arrays_of, make_app
from tests.laws import saved_and_loaded

pytestmark = pytest.mark.flower

SUBSPACES = LookBackSubspace(4, values="int4")
UPLINK = ErrorFeedback(SUBSPACES)
PERSONAL = ("head.*", "norm.count")
# Large enough for a part of its bytes to be found nowhere by chance.
HEADS = {
    "head.bias": np.linspace(-1, 1, 10),
    "norm.count": np.array(7),
    "head.weight": np.linspace(2, 3, 40, dtype=np.float32).reshape(4, 10),
}


@pytest.fixture(autouse=True)
def same_draws(monkeypatch, tmp_path):
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002  Flower's noise comes from there
    # The machine does not fail, and waiting for its disk would take most of the time.
    monkeypatch.setattr("os.fsync", lambda handle: None)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))


def initial():
    """Return arrays of which the second, the fourth and the last are personal."""
    [(weight, first), (bias, second)] = arrays_of().items()
    heads = arrays_of(**HEADS)
    return ArrayRecord(
        {
            weight: first,
            "head.bias": heads["head.bias"],
            bias: second,
            **{name: heads[name] for name in ("norm.count", "head.weight")},
        }
    )


def train(arrays, partition):
    """Move each array by a step that depends on the client and the array's place alone."""
    return {
        name: (array + (1 + partition) * (1 + place) / 16).astype(array.dtype)
        for place, (name, array) in enumerate(arrays.items())
    }


class Watched(LoopbackGrid):
    """A grid that notes what apps see, and the bytes that travel.

    Attributes
    ----------
    seen
        The type, the node and the arrays of each message that an app got.
    travelled
        The node, and all bytes of arrays and settings, of each message and reply.
    """

    def __init__(self, nodes, mod=compression_mod, train=train, **options):
        super().__init__(make_app([mod, self._watch], train, **options), nodes)
        self.seen: list[Any] = []
        self.travelled: list[tuple[int, bytes]] = []
        self.replies: list[Message] = []

    def _watch(self, message, ctxt, call_next):
        [record] = message.content.array_records.values()
        arrays = {name: array.numpy() for name, array in record.items()}
        self.seen.append((message.metadata.message_type, ctxt.node_id, arrays))
        return call_next(message, ctxt)

    def send_and_receive(self, messages, *, timeout=None):
        messages = list(messages)
        self.travelled += [(m.metadata.dst_node_id, bytes_of(m)) for m in messages]
        replies = super().send_and_receive(messages, timeout=timeout)
        self.travelled += [(m.metadata.src_node_id, bytes_of(m)) for m in replies]
        self.replies += replies
        return replies

    def heads_seen(self, node, kind="train"):
        """Return the personal arrays that the app of a client saw, by message."""
        return [
            {name: arrays[name] for name in HEADS}
            for one, of, arrays in self.seen
            if (one, of) == (kind, node)
        ]

    def sent_initial(self):
        """Return how many messages to each client had the server's personal arrays in them."""
        found = dict.fromkeys(self.contexts, 0)
        for node, data in self.travelled:
            found[node] = found.get(node, 0) + (HEADS["head.weight"].tobytes() in data)
        return found


def bytes_of(message):
    if message.has_error():
        return b""
    arrays = [a.data for record in message.content.array_records.values() for a in record.values()]
    configs = [v for c in message.content.config_records.values() for v in c.values()]
    return b"|".join([*arrays, *(value for value in configs if isinstance(value, bytes))])


def personal_strategy(inner=None, **options):
    options = {"personal": PERSONAL, "compressor": UPLINK, **options}
    return CompressedStrategy(inner or FedAvg(), options.pop("compressor"), **options)


def assert_heads(found, expected):
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape)
        assert found[name].tobytes() == array.tobytes(), name


def trained(partition, times):
    """Return the personal arrays of a client that has trained so many times."""
    arrays = {name: array.numpy() for name, array in initial().items()}
    for _ in range(times):
        arrays = train(arrays, partition)
    return {name: arrays[name] for name in HEADS}


BOTH = pytest.mark.parametrize("downlink", [None, SUBSPACES], ids=["up", "both"])


@BOTH
@pytest.mark.parametrize("residual", ["memory", "model"])
@pytest.mark.parametrize("files", [False, True], ids=["context", "files"])
def test_app_sees_what_it_returned_last_among_the_others(downlink, residual, files, tmp_path):
    mod = CompressionMod(state_dir=tmp_path / "state") if files else compression_mod
    grid = Watched(3, mod)
    strategy = personal_strategy(Kept(), downlink=downlink, residual=residual)
    result = strategy.start(grid, initial(), num_rounds=4)
    assert not any(reply.has_error() for reply in grid.replies)
    assert len(grid.seen) == 4 * 3 * 2
    for _, _, arrays in grid.seen:
        assert list(arrays) == list(initial())
    for partition, node in enumerate(grid.contexts):
        for times, heads in enumerate(grid.heads_seen(node)):
            assert_heads(heads, trained(partition, times))
        for times, heads in enumerate(grid.heads_seen(node, "evaluate"), start=1):
            assert_heads(heads, trained(partition, times))
    for arrays in (*strategy.strategy.received().values(), _numpy(result.arrays)):
        assert list(arrays) == list(initial())
        assert_heads({name: arrays[name] for name in HEADS}, trained(0, 0))
    assert not np.array_equal(result.arrays["layer.bias"].numpy(), initial()["layer.bias"].numpy())


def _numpy(record):
    return {name: array.numpy() for name, array in record.items()}


@BOTH
def test_personal_arrays_travel_to_a_client_once_and_never_back(downlink):
    grid = Watched(3)
    strategy = personal_strategy(FedAvg(0.5, min_train_nodes=2), downlink=downlink)
    strategy.start(grid, initial(), num_rounds=8)
    # The replies have none; clients that have not trained yet are evaluated with them.
    first = {node: len(grid.heads_seen(node)) > 0 for node in grid.contexts}
    assert all(first.values())
    for partition, node in enumerate(grid.contexts):
        trainings = len(grid.heads_seen(node))
        heads = [trained(partition, times) for times in range(1, trainings + 1)]
        for _, data in grid.travelled:
            for one in heads:
                for name in ("head.weight", "head.bias"):
                    assert one[name].tobytes()[:32] not in data
    for node, count in grid.sent_initial().items():
        seen = [kind for kind, of, _ in grid.seen if of == node]
        assert count == seen.index("train") + 1


@BOTH
def test_sizes_count_personal_arrays_where_they_are_sent(downlink):
    grid = Watched(2)
    strategy = personal_strategy(downlink=downlink, first="float16")
    result = strategy.start(grid, initial(), num_rounds=3)
    metrics = result.train_metrics_clientapp
    dense = 2 * 4 * 1230
    for one in metrics.values():
        assert one["downlink-dense-bytes"] == one["dense-bytes"] == dense
    sent = sum(len(initial()[name].data) for name in HEADS)
    if downlink is None:
        more = metrics[1]["downlink-bytes"] - metrics[2]["downlink-bytes"]
        # The requests of the second round have digests of what the server holds, 48 bytes each.
        assert 2 * sent - 100 < more < 2 * (sent + 80)
    assert metrics[1]["downlink-bytes"] > 2 * sent


@BOTH
@pytest.mark.parametrize("files", [False, True], ids=["context", "files"])
def test_client_that_lost_its_state_starts_from_the_server_s_arrays(downlink, files, tmp_path):
    mod = CompressionMod(state_dir=tmp_path / "state") if files else compression_mod
    grid = Watched(2, mod)
    strategy = personal_strategy(FedAvg(fraction_evaluate=0.0), downlink=downlink)
    arrays = strategy.start(grid, initial(), num_rounds=2).arrays
    if files:
        [lost] = (tmp_path / "state").glob(f"{strategy.training}-100.*")
        lost.unlink()
    else:
        grid.restart(100)
    grid.replies.clear()
    grid.seen.clear()
    arrays = strategy.start(grid, arrays, num_rounds=1).arrays
    [error] = [reply for reply in grid.replies if reply.has_error()]
    assert error.metadata.src_node_id == 100
    assert error.error.code == ErrorCode.MOD_FAILED_PRECONDITION
    assert error.error.reason.startswith(OUT_OF_SYNC)
    assert "personal" in error.error.reason
    grid.replies.clear()
    strategy.start(grid, arrays, num_rounds=2)
    assert not any(reply.has_error() for reply in grid.replies)
    for times, heads in enumerate(grid.heads_seen(100)):
        assert_heads(heads, trained(0, times))
    for times, heads in enumerate(grid.heads_seen(101), start=2):
        assert_heads(heads, trained(1, times))
    assert grid.sent_initial() == {100: 2, 101: 1}


@BOTH
def test_damaged_state_counts_as_lost(downlink, tmp_path):
    grid = Watched(2, CompressionMod(state_dir=tmp_path / "state"))
    strategy = personal_strategy(FedAvg(fraction_evaluate=0.0), downlink=downlink)
    arrays = strategy.start(grid, initial(), num_rounds=1).arrays
    for path in (tmp_path / "state").glob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:-7])
    strategy.start(grid, arrays, num_rounds=1)
    assert sum(reply.has_error() for reply in grid.replies) == 2
    grid.seen.clear()
    strategy.start(grid, arrays, num_rounds=1)
    for node in grid.contexts:
        [heads] = grid.heads_seen(node)
        assert_heads(heads, trained(0, 0))


@BOTH
def test_client_keeps_what_it_trained_in_rounds_that_were_lost_or_thrown_away(downlink):
    class Fragile(FedAvg):
        def aggregate_train(self, server_round, replies):
            found = super().aggregate_train(server_round, replies)
            return (None, None) if self.thrown else found

    grid = Watched(2)
    inner = Fragile(fraction_evaluate=0.0)
    strategy = personal_strategy(inner, downlink=downlink)
    arrays = initial()
    for thrown, lost in ((True, None), (False, 101), (False, None), (False, None)):
        inner.thrown = thrown
        grid.losses = lambda number, node, lost=lost: node == lost
        arrays = strategy.start(grid, arrays, num_rounds=1).arrays or arrays
    for partition, node in enumerate(grid.contexts):
        assert len(grid.heads_seen(node)) == 4
        for times, heads in enumerate(grid.heads_seen(node)):
            assert_heads(heads, trained(partition, times))
    # They are sent until a reply has gone into the model.
    assert grid.sent_initial() == {100: 2, 101: 3}


@BOTH
def test_client_that_the_server_forgot_keeps_its_own(downlink):
    grid = Watched(2)
    everyone = dict(grid.contexts)
    inner = FedAvg(min_train_nodes=1, min_available_nodes=1, fraction_evaluate=0.0)
    strategy = personal_strategy(inner, downlink=downlink, keep_rounds=2)
    arrays = strategy.start(grid, initial(), num_rounds=1).arrays
    grid.contexts = {100: everyone[100]}
    arrays = strategy.start(grid, arrays, num_rounds=3).arrays
    grid.contexts = everyone
    strategy.start(grid, arrays, num_rounds=1)
    assert grid.sent_initial() == {100: 1, 101: 2}
    assert_heads(grid.heads_seen(101)[-1], trained(1, 1))


@BOTH
def test_restored_server_goes_on_and_other_patterns_are_refused(downlink, tmp_path):
    grid = Watched(2)
    strategy = personal_strategy(FedAvg(fraction_evaluate=0.0), downlink=downlink)
    arrays = strategy.start(grid, initial(), num_rounds=2).arrays
    strategy.save(tmp_path / "held")
    restored = personal_strategy(FedAvg(fraction_evaluate=0.0), downlink=downlink)
    restored.load(tmp_path / "held")
    restored.start(grid, arrays, num_rounds=2)
    assert not any(reply.has_error() for reply in grid.replies)
    assert grid.sent_initial() == {100: 1, 101: 1}
    assert_heads(grid.heads_seen(101)[-1], trained(1, 3))
    other = personal_strategy(personal=("head.*",), downlink=downlink)
    with pytest.raises(ValueError, match="the state has personal="):
        other.load(tmp_path / "held")


def test_training_without_personal_arrays_can_go_on_with_them():
    plain = CompressedStrategy(FedAvg(fraction_evaluate=0.0), UPLINK)
    grid = Watched(2)
    arrays = plain.start(grid, initial(), num_rounds=1).arrays
    expected = {name: arrays[name].numpy() for name in HEADS}
    strategy = personal_strategy(FedAvg(fraction_evaluate=0.0))
    strategy.load_state_dict(saved_and_loaded(plain.state_dict()))
    # One error of each client, and then the server's arrays.
    strategy.start(grid, arrays, num_rounds=1)
    assert sum(reply.has_error() for reply in grid.replies) == 2
    grid.seen.clear()
    strategy.start(grid, arrays, num_rounds=1)
    for node in grid.contexts:
        [heads] = grid.heads_seen(node)
        assert_heads(heads, expected)


@BOTH
@pytest.mark.parametrize("inner", [flower.FedAdam, flower.FedMedian, flower.Krum])
def test_every_strategy_leaves_the_server_s_own_as_they_were(inner, downlink):
    strategy = personal_strategy(inner(), compressor=Identity(), downlink=downlink)
    grid = Watched(6, train=Receding())
    result = strategy.start(grid, initial(), num_rounds=3)
    assert not any(reply.has_error() for reply in grid.replies)
    assert_heads({name: result.arrays[name].numpy() for name in HEADS}, trained(0, 0))


def test_without_compression_the_others_are_those_of_plain_averaging():
    """The head of FedPer: the body is averaged as if it were all of the model."""
    grid = Watched(3, train=Receding(noise=0.0))
    strategy = personal_strategy(compressor=Identity())
    ours = strategy.start(grid, initial(), num_rounds=3).arrays
    plain = FedAvg().start(LoopbackGrid(make_app([], noise=0.0), 3), initial(), num_rounds=3)
    for name in ("layer.weight", "layer.bias"):
        assert np.allclose(ours[name].numpy(), plain.arrays[name].numpy(), rtol=1e-5, atol=1e-5)


def test_app_must_return_the_personal_arrays():
    def forget(arrays, partition):
        return {name: array for name, array in arrays.items() if name != "head.bias"}

    grid = Watched(2, train=forget)
    personal_strategy().start(grid, initial(), num_rounds=1)
    errors = [reply.error.reason for reply in grid.replies if reply.has_error()]
    assert len(errors) == 2
    assert all("'head.bias' is not in the reply" in error for error in errors)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"personal": "head.*"}, TypeError, r"such as \('head.\*',\)"),
        ({"personal": [1]}, TypeError, "personal is a list of str"),
        ({"exclude": ["head.*"]}, ValueError, "in exclude and in personal"),
    ],
)
def test_wrong_arguments_are_refused_before_any_array_is_known(options, error, message):
    with pytest.raises(error, match=message):
        personal_strategy(**options)


@BOTH
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"personal": ["head.*", "tail.*"]},
            r"'tail\.\*', which matches none of the arrays",
        ),
        ({"personal": ["*"]}, "none is left to be averaged"),
        ({"exclude": ["*.bias"]}, "'head.bias' matches a pattern of exclude and one of personal"),
    ],
)
def test_wrong_patterns_are_refused_before_anything_is_sent(options, message, downlink):
    grid = Watched(2)
    with pytest.raises(ValueError, match=message):
        personal_strategy(downlink=downlink, **options).start(grid, initial())
    assert not grid.travelled
    strategy = personal_strategy(downlink=downlink, **options)
    with pytest.raises(ValueError, match=message):
        strategy.configure_train(1, initial(), ConfigRecord(), grid)


def test_request_with_personal_arrays_has_a_version_that_older_clients_refuse():
    for positions in ({"head.weight": 4, "head.bias": 1}, {}):
        request = Request(UPLINK, (), "training", b"", b"", 3, 1, personal=positions)
        assert Request.unpack(request.pack()) == request
        assert b'"version": 3,' in request.pack()
        later = request.pack().replace(b'"version": 3', b'"version": 4')
        with pytest.raises(ValueError, match="version 4, this client reads versions 1 to 3: use"):
            Request.unpack(later)
    for wrong in (b"[1]", b"3", b"null", b'{"head.weight": "first"}'):
        data = request.pack().replace(b'"personal": {}', b'"personal": ' + wrong)
        with pytest.raises(ValueError, match="cannot be read"):
            Request.unpack(data)


def test_evaluation_is_untouched_without_personal_arrays():
    found = []

    def spy(message, ctxt, call_next):
        if message.metadata.message_type == "evaluate":
            found.append(message.content)
        return call_next(message, ctxt)

    for personal in ((), PERSONAL):
        grid = LoopbackGrid(make_app([spy, compression_mod], train), 2)
        personal_strategy(personal=personal).start(grid, initial(), num_rounds=1)
    for content in found[:2]:
        assert list(content["arrays"]) == list(initial())
        assert KEY not in content["config"]
        assert ADDED not in content
    for content in found[2:]:
        assert list(content["arrays"]) == ["layer.weight", "layer.bias"]


def test_state_of_a_client_has_residuals_of_the_others_alone():
    grid = Watched(2)
    strategy = personal_strategy(compressor=ErrorFeedback(TopK(0.1)), residual="model")
    strategy.start(grid, initial(), num_rounds=2)
    for ctxt in grid.contexts.values():
        state = unpack_state(ctxt.state[KEY]["state"])
        assert set(state["tensors"]) == {"layer.weight", "layer.bias"}
        assert set(state["personal"]) == set(HEADS)
