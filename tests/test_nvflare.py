"""The filters for NVFlare: in its simulator, and with its objects in one process."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import runpy
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lbgm_compress import (
    LBGM,
    Atomo,
    ErrorFeedback,
    Identity,
    LookBackSubspace,
    SharedSubspace,
    SignSGD,
    TopK,
)
from lbgm_compress.wire.errors import PayloadError
from tests.test_docs import blocks, guide, side
from tests.test_docs import changed as changed_lines

if importlib.util.find_spec("nvflare") is None:
    pytest.skip(
        "NVFlare is not installed: pip install 'lbgm_compress[nvflare]'", allow_module_level=True
    )

from nvflare.apis.dxo import DXO, DataKind, from_shareable
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_constant import FLContextKey, ReturnCode, ServerCommandKey
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable, make_reply
from nvflare.app_common.aggregators import InTimeAccumulateWeightedAggregator
from nvflare.app_common.app_constant import AppConstants
from nvflare.app_common.app_event_type import AppEventType
from nvflare.app_common.decomposers import common_decomposers
from nvflare.app_opt.pt.decomposers import TensorDecomposer
from nvflare.fuel.utils import fobs

from lbgm_compress.adapters.nvflare import CompressUpdates, DecompressUpdates
from lbgm_compress.adapters.nvflare.layout import Form, Layout
from lbgm_compress.adapters.nvflare.messages import KEY, Update

pytestmark = [pytest.mark.nvflare, pytest.mark.timeout(60)]


@pytest.fixture(scope="module", autouse=True)
def decomposers() -> None:
    common_decomposers.register()
    fobs.register(TensorDecomposer)


def test_without_nvflare_its_adapter_says_what_to_install():
    code = (
        "import sys; sys.modules['nvflare'] = None\n"
        "try:\n    import lbgm_compress.adapters.nvflare\n"
        "except ImportError as error:\n    print(error)\n"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert "pip install 'lbgm_compress[nvflare]'" in found.stdout


# --- in the simulator -----------------------------------------------------------------------------


def write_programs(folder: Path) -> None:
    """Write the programs of the guide, with its change, to a folder."""
    [diff] = blocks(guide("nvflare"), "diff")
    # Tasks are looked for every two seconds otherwise.
    quick = (
        '    recipe.add_client_config({"default_task_fetch_interval": 0.1})\n'
        '    recipe.add_server_config({"task_request_interval": 0.1})\n'
    )
    job = side(diff.code, "+").replace("    run = ", f"{quick}    run = ")
    assert quick in job
    (folder / "job.py").write_text(job)
    for name, block in zip(
        ("digits.py", "client.py"), blocks(guide("nvflare"), "python"), strict=True
    ):
        (folder / name).write_text(block.code)


@contextlib.contextmanager
def simulation(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Yield the running job; end its processes, which are a group of their own, at the end."""
    job = subprocess.Popen(
        [sys.executable, "job.py"],
        cwd=folder,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "NVFLARE_SIMULATOR_WORKSPACE_ROOT": str(folder / "run"),
        },
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        yield job
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(job.pid, signal.SIGKILL)
        job.wait()


def averaged(digits: dict[str, Any], rounds: int) -> dict[str, torch.Tensor]:
    """Return the parameters after federated averaging of the same clients, uncompressed."""
    torch.manual_seed(0)
    model = digits["Net"]().state_dict()
    for number in range(rounds):
        changes = [digits["update"](model, number, client) for client in (0, 1)]
        model = {
            name: old + (changes[0][name] + changes[1][name]) / 2 for name, old in model.items()
        }
    return model


@pytest.mark.timeout(300)
@pytest.mark.xdist_group("nvflare")
def test_federation_keeps_its_accuracy_at_a_fiftieth_of_the_uplink(tmp_path):
    write_programs(tmp_path)
    with simulation(tmp_path) as job:
        out, _ = job.communicate(timeout=270)
    assert job.returncode == 0, out[-4000:]
    site = tmp_path / "run" / "digits"
    total = re.search(
        r"compressed updates: (\d+), refused (\d+); .*, ([\d.]+)% of dense",
        (site / "server" / "log.txt").read_text(),
    )
    assert total is not None
    assert (int(total[1]), int(total[2])) == (28, 0)
    assert float(total[3]) <= 2
    digits = runpy.run_path(str(tmp_path / "digits.py"))
    [path] = site.glob("server/simulate_job/app_server/FL_global_model.pt")
    compressed = digits["accuracy"](torch.load(path, weights_only=True)["model"])
    plain = digits["accuracy"](averaged(digits, 14))
    assert plain > 0.95
    assert compressed > plain - 0.02
    for name in ("site-1", "site-2"):
        log = (site / name / "log.txt").read_text()
        assert log.count("compressed update: ") == 14
        assert "has lost what" not in log


def test_change_of_the_guide_is_a_few_lines():
    [diff] = blocks(guide("nvflare"), "diff")
    assert len(changed_lines(diff.code)) <= 6
    compile(side(diff.code, "-"), "job.py", "exec")


# --- in one process -------------------------------------------------------------------------------

Data = dict[str, Any]


def context(identity: str, peer: str) -> FLContext:
    """Return the context of one end of a connection, as NVFlare's runners make it."""
    ctx, other = FLContext(), FLContext()
    ctx.set_prop("__identity_name__", identity, private=False, sticky=False)
    other.set_prop("__identity_name__", peer, private=False, sticky=False)
    ctx.set_peer_context(other)
    assert ctx.get_peer_context().get_identity_name() == peer
    return ctx


def travelled(shareable: Shareable) -> Shareable:
    """Return what arrives of a Shareable at the other end."""
    return fobs.loads(fobs.dumps(shareable))


class Client:
    """A client with its filter, and the connection to a server."""

    def __init__(self, server: DecompressUpdates, compressor: Any, name: str = "a", **more) -> None:
        self.server, self.name = server, name
        self.filter = CompressUpdates(compressor, **more)

    def ask(self, model: Data) -> None:
        """Bring a task from the server to the client."""
        task = DXO(DataKind.WEIGHTS, data=model).to_shareable()
        ctx = context("server", self.name)
        ctx.set_prop(FLContextKey.TASK_DATA, task, private=True, sticky=False)
        self.server.handle_event(EventType.AFTER_TASK_DATA_FILTER, ctx)
        task = travelled(task)
        ctx = context(self.name, "server")
        ctx.set_prop(FLContextKey.TASK_DATA, task, private=True, sticky=False)
        self.filter.handle_event(EventType.BEFORE_TASK_DATA_FILTER, ctx)
        assert task.get_header(KEY) is None

    def result(self, data: Data, kind: str = DataKind.WEIGHT_DIFF) -> Shareable:
        """Return the result of a task as it arrives at the server."""
        shareable = DXO(kind, data=data, meta={"steps": 3}).to_shareable()
        return travelled(self.filter.process(shareable, context(self.name, "server")))

    def submit(self, shareable: Shareable, verdict: bool | None = None) -> DXO:
        """Return what the aggregator gets, and tell the server's filter what becomes of it."""
        ctx = context("server", self.name)
        dxo = from_shareable(self.server.process(shareable, ctx))
        if verdict is not None:
            ctx.set_prop(AppConstants.AGGREGATION_ACCEPTED, verdict, private=True, sticky=False)
            self.server.handle_event(AppEventType.AFTER_CONTRIBUTION_ACCEPT, ctx)
        return dxo

    def round(self, data: Data, verdict: bool | None = None) -> DXO:
        self.ask(data)
        return self.submit(self.result(data), verdict)

    def residual(self) -> Data:
        return {
            name: entry["state"]["residual"]
            for name, entry in self.filter._sender.state_dict()["tensors"].items()
        }


def drawn(seed: int = 0) -> Data:
    random = np.random.default_rng(seed)
    return {
        "layer.weight": random.standard_normal((32, 20)).astype(np.float32),
        "layer.bias": random.standard_normal(20).astype(np.float32),
    }


def size(shareable: Shareable) -> int:
    return from_shareable(shareable).data[KEY].nbytes


def assert_equal(found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert type(found[name]) is type(array), name
        if isinstance(array, (np.ndarray, torch.Tensor)):
            assert found[name].dtype == array.dtype, name
            assert tuple(found[name].shape) == tuple(array.shape), name
            np.testing.assert_array_equal(
                torch.as_tensor(found[name]).double(), torch.as_tensor(array).double()
            )
        else:
            assert found[name] == array


def test_arrays_come_back_as_they_were():
    data = {
        "half": np.arange(6, dtype=np.float16).reshape(2, 3),
        "single": np.arange(6, dtype=np.float32).reshape(3, 2).T,
        "double": np.linspace(0, 1, 5),
        "big-endian": np.arange(3, dtype=">f4").astype(">f4"),
        "scalar": np.array(2.5, dtype=np.float32),
        "empty": np.zeros((0, 4), dtype=np.float32),
        "torch": torch.arange(4.0),
        "bfloat16": torch.arange(4.0).to(torch.bfloat16).reshape(2, 2),
        "integers": np.arange(5),
        "torch integers": torch.arange(5),
        "excluded": np.ones(3, dtype=np.float32),
        "number": 7,
    }
    client = Client(DecompressUpdates(), Identity(), exclude=["exc*"])
    for _ in range(2):
        client.ask(data)
        shareable = client.result(data)
        sent = from_shareable(shareable)
        assert set(sent.data) == {KEY, "integers", "torch integers", "excluded", "number"}
        assert sent.data[KEY].dtype == np.uint8
        found = client.submit(shareable)
        expected = {**data, "big-endian": data["big-endian"].astype(np.float32)}
        assert_equal(found.data, expected)
        assert found.data_kind == DataKind.WEIGHT_DIFF
        assert found.get_meta_prop("steps") == 3


@pytest.mark.parametrize(
    "compressor",
    [TopK(0.1), LBGM(TopK(0.1)), ErrorFeedback(LookBackSubspace(2)), ErrorFeedback(Atomo(1))],
    ids=repr,
)
def test_server_decodes_what_the_client_encoded(compressor):
    server = DecompressUpdates()
    clients = [Client(server, compressor, name) for name in ("a", "b")]
    for number in range(5):
        for client in clients:
            data = drawn(number // 2)
            client.ask(data)
            shareable = client.result(data)
            sent = client.filter._last
            found = client.submit(shareable).data
            assert {name: array.shape for name, array in found.items()} == {
                name: array.shape for name, array in data.items()
            }
            if sent is not None:
                assert_equal(found, {name: one.dense().numpy() for name, one in sent[1].items()})
    stats = server.stats()
    assert (stats["updates"], stats["refused"]) == (10, 0)
    assert stats["dense_bytes"] == 10 * 4 * 660
    assert stats["ratio"] == stats["uplink_bytes"] / stats["dense_bytes"] < 1


def test_recycled_round_sends_neither_arrays_nor_their_layout():
    client = Client(DecompressUpdates(), LBGM())
    data = drawn()
    sizes = []
    for _ in range(3):
        client.ask(data)
        shareable = client.result(data)
        sizes.append(size(shareable))
        found = client.submit(shareable)
        np.testing.assert_allclose(found.data["layer.bias"], data["layer.bias"], rtol=1e-6)
        assert found.get_meta_prop(KEY)["uplink_bytes"] == sizes[-1]
    assert sizes[0] > 2640
    assert sizes[1] == sizes[2] < 70


def test_lost_result_costs_one_full_update():
    client = Client(DecompressUpdates(), LBGM())
    client.ask(drawn())
    client.result(drawn())
    client.ask(drawn())
    shareable = client.result(drawn())
    assert size(shareable) > 2640
    assert_equal(client.submit(shareable).data, drawn())
    client.ask(drawn())
    assert size(client.result(drawn())) < 70


@pytest.mark.parametrize("restarted", ["client", "server"])
def test_restart_costs_one_full_update(restarted):
    client = Client(DecompressUpdates(), LBGM())
    client.round(drawn())
    if restarted == "client":
        client.filter = CompressUpdates(LBGM())
    else:
        client.server = DecompressUpdates()
    for expected in (True, False):
        client.ask(drawn())
        shareable = client.result(drawn())
        assert (size(shareable) > 2640) == expected
        np.testing.assert_allclose(
            client.submit(shareable).data["layer.bias"], drawn()["layer.bias"], rtol=1e-6
        )


@pytest.mark.parametrize("fate", ["lost", "rejected", "dropped", "refused", "late"])
def test_what_did_not_go_into_the_model_comes_with_later_updates(fate):
    client = Client(DecompressUpdates(), ErrorFeedback(LBGM(TopK(0.1))))
    applied = {name: np.zeros_like(array) for name, array in drawn().items()}
    given = {name: np.zeros_like(array) for name, array in drawn().items()}
    for number in range(8):
        data = drawn(number)
        fails = number in (1, 4, 5)
        client.ask(data)
        shareable = client.result(data)
        if fails and fate == "lost":
            found: Data = {}
        elif fails and fate == "rejected":
            client.submit(shareable, verdict=False)
            found = {}
        elif fails and fate == "dropped":
            # The controller is seen to give verdicts, and gives none for this result.
            client.submit(shareable)
            found = {}
        elif fails and fate == "refused":
            from_shareable(shareable).data[KEY][-1] ^= 255
            from_shareable(shareable).data[KEY][30:] ^= 85
            found = client.submit(shareable).data
            assert found == {}
        elif fails:
            # The task is sent again, and answered again, before the first answer arrives.
            client.ask(data)
            again = client.result(data)
            given = {name: given[name] + data[name] for name in given}
            assert client.submit(shareable, verdict=True).data == {}
            found = client.submit(again, verdict=True).data
        else:
            found = client.submit(shareable, verdict=True).data
        for name, array in data.items():
            given[name] = given[name] + array
            applied[name] = applied[name] + found.get(name, 0)
    client.ask(drawn())
    client.filter._prepare(client.filter._request, context("a", "server"))
    for name, residual in client.residual().items():
        np.testing.assert_allclose(applied[name] + residual.numpy(), given[name], atol=1e-4)


def test_controller_without_verdicts_counts_as_one_that_accepts():
    client = Client(DecompressUpdates(), ErrorFeedback(TopK(0.1)))
    client.round(drawn())
    before = client.residual()
    client.ask(drawn())
    client.filter._prepare(client.filter._request, context("a", "server"))
    assert_equal(client.residual(), before)


def test_result_that_arrives_twice_is_decoded_once():
    client = Client(DecompressUpdates(), LBGM(TopK(0.1)))
    client.round(drawn())
    client.ask(drawn(1))
    shareable = client.result(drawn(1))
    held = client.server._clients["a"]
    assert client.submit(travelled(shareable), verdict=True).data != {}
    digest = bytes(held.receiver.digest(0).numpy())
    assert client.submit(travelled(shareable)).data == {}
    assert bytes(held.receiver.digest(0).numpy()) == digest
    client.ask(drawn(1))
    assert client.server._clients["a"].applied != 0
    assert size(client.result(drawn(1))) < 70


def test_a_second_training_begins_without_the_residual_of_the_first():
    client = Client(DecompressUpdates(), ErrorFeedback(TopK(0.01)))
    client.round(drawn())
    client.server = DecompressUpdates()
    found = client.round(drawn()).data
    fresh = Client(DecompressUpdates(), ErrorFeedback(TopK(0.01))).round(drawn()).data
    assert_equal(found, fresh)


def test_client_whose_process_began_anew_is_warned(caplog):
    client = Client(DecompressUpdates(), ErrorFeedback(TopK(0.1)))
    client.round(drawn())
    assert "has lost what" not in caplog.text
    client.filter = CompressUpdates(ErrorFeedback(TopK(0.1)))
    client.round(drawn())
    assert "has lost what" in caplog.text


def test_uncompressed_client_takes_part():
    server = DecompressUpdates()
    data = drawn()
    shareable = DXO(DataKind.WEIGHT_DIFF, data=data).to_shareable()
    found = from_shareable(server.process(shareable, context("server", "a")))
    assert_equal(found.data, data)


def test_results_that_are_no_updates_pass():
    client = Client(DecompressUpdates(), TopK(0.1))
    metrics = DXO(DataKind.METRICS, data={"accuracy": 0.5}).to_shareable()
    failed = make_reply(ReturnCode.EXECUTION_EXCEPTION)
    for shareable in (metrics, failed):
        ctx = context("a", "server")
        assert client.filter.process(shareable, ctx) is shareable
        assert client.server.process(shareable, context("server", "a")) is shareable
    integers = {"steps": np.arange(3)}
    assert_equal(client.submit(client.result(integers)).data, integers)


# --- bytes that are not to be trusted -------------------------------------------------------------


def changed(shareable: Shareable, **changes: Any) -> Shareable:
    """Return the result with other bytes, or with other fields of its update."""
    dxo = from_shareable(shareable)
    dxo.data[KEY] = Update.unpack(dxo.data[KEY])._replace(**changes).pack()
    return dxo.update_shareable(shareable)


def test_damaged_update_is_refused_and_nothing_else_changes(caplog):
    server = DecompressUpdates()
    client, other = Client(server, LBGM(TopK(0.1))), Client(server, LBGM(TopK(0.1)), "b")
    other.round(drawn(7))
    held = bytes(server._clients["b"].receiver.digest(0).numpy())
    random = np.random.default_rng(0)
    refused = 0
    for number in range(120):
        client.ask(drawn())
        shareable = client.result(drawn(number))
        dxo = from_shareable(shareable)
        array = dxo.data[KEY]
        if number % 3 == 0:
            array = array[: random.integers(len(array))]
        elif number % 3 == 1:
            array[random.integers(len(array), size=random.integers(1, 4))] ^= random.integers(
                1, 256, dtype=np.uint8
            )
        else:
            array[10:] = random.integers(0, 256, len(array) - 10)
        dxo.data[KEY] = array
        found = client.submit(dxo.update_shareable(shareable)).data
        refused += found == {}
        for name, restored in found.items():
            assert restored.shape == drawn()[name].shape
            assert np.isfinite(restored).all()
    assert refused == server.stats()["refused"] > 80
    assert "the update of a is refused" in caplog.text
    assert bytes(server._clients["b"].receiver.digest(0).numpy()) == held
    # The next update is not like those before: it is sent in full.
    expected = Client(DecompressUpdates(), TopK(0.1)).round(drawn(500)).data
    assert_equal(client.round(drawn(500)).data, expected)


FORM = Form("layer.bias", "numpy", "float32", (20,))


@pytest.mark.parametrize(
    ("layout", "error"),
    [
        (Layout("Identity()", (FORM._replace(shape=(10**12,)),)), "shape"),
        (Layout("Identity()", (FORM._replace(name="other"),)), "none of this name"),
        (Layout("Identity()", (FORM, FORM)), "twice"),
        (Layout("Identity()", ()), "cannot travel"),
        (Layout("Identity()", (FORM._replace(shape=(-20,)),)), "cannot travel"),
        (Layout("Identity()", (FORM._replace(dtype="int8"),)), "cannot travel"),
        (Layout("open('/etc/passwd')", (FORM,)), "compressor"),
        (Layout("SharedSubspace(4)", (FORM,)), "compressor"),
        (Layout("SignSGD(vote=True)", (FORM,)), "compressor"),
        (Layout("ErrorFeedback(" * 600 + "Identity()" + ")" * 600, (FORM,)), "compressor"),
        (bytes(16), "another layout"),
    ],
)
def test_wrong_layout_is_refused_with_the_reason(layout, error, caplog):
    client = Client(DecompressUpdates(), Identity())
    client.ask(drawn())
    assert client.submit(changed(client.result(drawn()), layout=layout)).data == {}
    assert error in caplog.text


@pytest.mark.parametrize(
    "expression",
    [
        "TopK(1.0)",
        "LookBackSubspace(1000000000)",
        "Atomo(1000000000)",
        "LBGM(TopK(1e-300))",
    ],
)
def test_client_s_compressor_takes_no_more_memory_than_the_model(expression):
    client = Client(DecompressUpdates(), expression)
    for _ in range(3):
        found = client.round(drawn()).data
        assert found["layer.weight"].shape == (32, 20)


@pytest.mark.parametrize("array", [None, "text", np.zeros((2, 9), np.uint8), np.zeros(99)])
def test_anything_else_than_bytes_is_refused(array):
    client = Client(DecompressUpdates(), Identity())
    client.ask(drawn())
    shareable = DXO(DataKind.WEIGHT_DIFF, data={KEY: array}).to_shareable()
    assert client.submit(shareable).data == {}


def test_layout_that_is_no_json_of_the_kind_is_refused():
    for data in (b"", b"[", b"{}", b"[" * 100_000, b'{"compressor":1,"arrays":[[1,2,3,4]]}'):
        with pytest.raises(PayloadError):
            Layout.unpack(data)


@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_update_with_inf_or_nan_is_refused(value, caplog):
    client = Client(DecompressUpdates(), LBGM())
    client.round(drawn())
    data = drawn()
    data["layer.bias"][3] = value
    assert client.round(data).data == {}
    assert "'layer.bias' inf or nan" in caplog.text
    assert client.round(drawn()).data != {}


def test_an_array_cannot_come_twice():
    client = Client(DecompressUpdates(), Identity())
    client.ask(drawn())
    shareable = client.result(drawn())
    dxo = from_shareable(shareable)
    dxo.data["layer.bias"] = drawn()["layer.bias"]
    assert client.submit(dxo.update_shareable(shareable)).data == {}


def test_client_cannot_answer_for_another():
    server = DecompressUpdates()
    one, other = Client(server, LBGM()), Client(server, LBGM(), "b")
    one.round(drawn())
    other.round(drawn())
    held = server._clients["a"].receiver.digest(0)
    one.ask(drawn())
    other.ask(drawn())
    shareable = other.result(drawn())
    # Its own ticket under the name of the first.
    assert one.submit(travelled(shareable)).data == {}
    # The ticket of the first, from a client that NVFlare has authenticated as another.
    stolen = changed(travelled(shareable), ticket=server._clients["a"].ticket)
    stolen.set_header(ServerCommandKey.FL_CLIENT, "b")
    assert one.submit(stolen).data == {}
    assert torch.equal(server._clients["a"].receiver.digest(0), held)
    np.testing.assert_allclose(
        other.submit(shareable).data["layer.bias"], drawn()["layer.bias"], rtol=1e-6
    )


def test_aggregator_skips_a_refused_update():
    ctx = context("server", "a")
    ctx.set_prop(AppConstants.CURRENT_ROUND, 0, private=True, sticky=True)
    aggregator = InTimeAccumulateWeightedAggregator(expected_data_kind=DataKind.WEIGHT_DIFF)
    aggregator.handle_event(EventType.START_RUN, ctx)
    server = DecompressUpdates()
    for name in ("a", "b"):
        client = Client(server, Identity(), name)
        client.ask(drawn())
        shareable = client.result(drawn())
        if name == "b":
            from_shareable(shareable).data[KEY][10:] = 0
        result = server.process(shareable, context("server", name))
        result.set_header(AppConstants.CONTRIBUTION_ROUND, 0)
        result.add_cookie(AppConstants.CONTRIBUTION_ROUND, 0)
        result.set_peer_props({"__identity_name__": name})
        aggregator.accept(result, ctx)
    assert_equal(from_shareable(aggregator.aggregate(ctx)).data, drawn())


# --- wrong uses -----------------------------------------------------------------------------------


def test_whole_weights_are_an_error_that_names_the_option():
    client = Client(DecompressUpdates(), TopK(0.1))
    client.ask(drawn())
    with pytest.raises(ValueError, match=r"TransferType\.DIFF"):
        client.result(drawn(), DataKind.WEIGHTS)


def test_server_without_its_filter_is_an_error_that_names_it():
    client = Client(DecompressUpdates(), TopK(0.1))
    with pytest.raises(ValueError, match=r"add_server_input_filter\(DecompressUpdates\(\)\)"):
        client.result(drawn())


def test_model_and_update_must_have_the_same_shapes(caplog):
    client = Client(DecompressUpdates(), TopK(0.1))
    client.ask({**drawn(), "layer.bias": np.zeros(21, np.float32)})
    assert client.submit(client.result(drawn())).data == {}
    assert "'layer.bias' has shape (20,), and the model of the task has (21,)" in caplog.text


class OwnTopK(TopK):
    """A compressor that no other site knows."""


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ((SharedSubspace(4),), TypeError, "makes no messages"),
        (("SharedSubspace(4)",), TypeError, "makes no messages"),
        (("SharedLBGM()",), TypeError, "makes no messages"),
        ((SignSGD(vote=True),), ValueError, "scaled=True"),
        ((OwnTopK(0.1),), ValueError, "use compressors of lbgm_compress"),
        (("TopK(",), ValueError, "check its brackets"),
        (("TopKK(0.1)",), ValueError, "did you mean TopK"),
        ((0.1,), TypeError, "compressor"),
        (("TopK(0.1)", "head.*"), TypeError, "list of patterns"),
    ],
)
def test_wrong_argument_is_an_error_when_the_filter_is_made(arguments, error, text):
    with pytest.raises(error, match=re.escape(text)):
        CompressUpdates(*arguments)


def test_job_holds_the_compressor_as_text_and_not_the_package(tmp_path):
    from nvflare.job_config.api import FedJob
    from nvflare.job_config.script_runner import ScriptRunner
    from nvflare.recipe.spec import Recipe

    job = FedJob(name="job")
    (tmp_path / "train.py").write_text("")
    job.to_clients(ScriptRunner(script=str(tmp_path / "train.py")))
    from nvflare.app_common.workflows.fedavg import FedAvg

    job.to_server(FedAvg(num_clients=1, num_rounds=1))
    recipe = Recipe(job)
    recipe.add_client_output_filter(
        CompressUpdates(LBGM(TopK(0.01)), exclude=["head.*"]), tasks=["train"]
    )
    recipe.add_server_input_filter(DecompressUpdates(), tasks=["train"])
    job.export_job(str(tmp_path))
    [path] = (tmp_path / "job").rglob("config_fed_client.json")
    [chain] = json.loads(path.read_text())["task_result_filters"]
    [one] = chain["filters"]
    assert one["args"] == {"compressor": "LBGM(TopK(0.01))", "exclude": ["head.*"]}
    assert not list((tmp_path / "job").rglob("lbgm_compress"))
    module, _, name = one["path"].rpartition(".")
    rebuilt = getattr(importlib.import_module(module), name)(**one["args"])
    assert (rebuilt.compressor, rebuilt.exclude) == ("LBGM(TopK(0.01))", ["head.*"])
