"""The adapter for Flower with real processes: the simulation, and SuperLink with SuperNodes."""

from __future__ import annotations

import json
import re
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("flwr", reason="Flower is not installed: it needs Python 3.11")

from flwr.app import MessageType, RecordDict
from flwr.serverapp.strategy import FedAvg

from benchmarks.common.engines.flower_processes import federation
from lbgm_compress import LBGM, Receiver, Sender
from lbgm_compress.probe import LookBackProbe
from tests.flower_loopback import LoopbackGrid, Receding, arrays_of, make_app
from tests.soak import length

ROOT = Path(__file__).parent.parent
JOB = ROOT / "tests" / "flower_job"
SUBSPACES = "LookBackSubspace(4, values='int4')"
pytestmark = [pytest.mark.flower, pytest.mark.timeout(400), pytest.mark.xdist_group("flower")]


@pytest.fixture(scope="module")
def simulation(tmp_path_factory):
    with federation(tmp_path_factory.mktemp("simulation"), simulation=True) as started:
        yield started


@pytest.fixture(scope="module")
def deployment(tmp_path_factory):
    """Start a SuperLink and three SuperNodes, `nodes` by partition."""
    with federation(tmp_path_factory.mktemp("deployment")) as started:
        started.nodes = [started.supernode(partition, 3) for partition in range(3)]
        yield started


def node_id(deployment, name):
    """Return the id of a SuperNode, as soon as it is connected."""
    deadline = time.monotonic() + 60
    while not (found := re.search(r"SuperNode ID: (\d+)", deployment.log(name))):
        assert time.monotonic() < deadline, deployment.logs()
        time.sleep(0.05)
    return int(found[1])


def results_of(out):
    with np.load(out / "arrays.npz") as saved:
        arrays = dict(saved.items())
    lines = [json.loads(line) for line in (out / "rounds.jsonl").read_text().splitlines()]
    return arrays, json.loads((out / "partitions.json").read_text()), lines


class Replayed(FedAvg):
    """FedAvg with the clients of a run that is over, by round."""

    def __init__(self, partitions):
        super().__init__(fraction_evaluate=0.0)
        self.partitions = partitions

    def configure_train(self, server_round, arrays, config, grid):
        config["server-round"] = server_round
        content = RecordDict({"arrays": arrays, "config": config})
        nodes = [100 + partition for partition in self.partitions[server_round - 1]]
        return self._construct_messages(content, nodes, MessageType.TRAIN)


def plain_fedavg(partitions):
    """Return the parameters of Flower's FedAvg without compression, for these clients by round."""
    grid = LoopbackGrid(make_app([], noise=0.0, rate=0.3), 10)
    initial = arrays_of(counter=np.array(3))
    result = Replayed(partitions).start(grid, initial, num_rounds=len(partitions))
    return {name: array.numpy() for name, array in result.arrays.items()}


def assert_close(ours, expected):
    assert ours.keys() == expected.keys()
    for name, array in expected.items():
        assert ours[name].dtype == array.dtype
        assert np.allclose(ours[name], array, rtol=1e-5, atol=1e-5), name


@pytest.mark.parametrize(
    ("engine", "rounds"),
    [
        ("simulation", 5),
        ("deployment", 2),
        pytest.param("deployment", length(10, 5), marks=pytest.mark.soak),
    ],
)
def test_without_compression_parameters_equal_those_of_plain_fedavg(
    engine, rounds, request, tmp_path
):
    running = request.getfixturevalue(engine)
    config = {"out": str(tmp_path), "compressor": "Identity()", "rounds": rounds}
    options = []
    if engine == "simulation":
        config.update(fraction=0.5, clients=10)
        options = ["--federation-config", "num-supernodes=10 client-resources-num-cpus=1"]
    running.run(JOB, config, *options, timeout=350)
    arrays, partitions, lines = results_of(tmp_path)
    clients = 5 if engine == "simulation" else 3
    assert [len(chosen) for chosen in partitions] == rounds * [clients]
    assert_close(arrays, plain_fedavg(partitions))
    assert all(line["rejected-replies"] == 0 for line in lines)


@pytest.mark.parametrize(
    ("compressor", "engine", "rounds"),
    [
        ("Identity()", "simulation", 5),
        (SUBSPACES, "simulation", 5),
        # Starting the clients' processes takes most of the time.
        (SUBSPACES, "deployment", 2),
        pytest.param("Identity()", "deployment", 5, marks=pytest.mark.soak),
        pytest.param(SUBSPACES, "deployment", 5, marks=pytest.mark.soak),
    ],
)
@pytest.mark.timeout(700)
def test_every_client_holds_the_server_s_model_in_every_round(
    compressor, engine, rounds, request, tmp_path
):
    """Without compression both ways, the parameters are those of plain FedAvg."""
    running = request.getfixturevalue(engine)
    uplink = compressor if compressor == "Identity()" else f"ErrorFeedback({compressor})"
    config = {"out": str(tmp_path), "compressor": uplink, "downlink": compressor}
    config |= {"rounds": rounds, "evaluate": 1.0, "timeout": 200.0}
    options = []
    if engine == "simulation":
        config.update(fraction=0.5, clients=6)
        options = ["--federation-config", "num-supernodes=6 client-resources-num-cpus=1"]
    running.run(JOB, config, *options, timeout=650)
    arrays, partitions, lines = results_of(tmp_path)
    everyone = range(6 if engine == "simulation" else 3)
    assert [len(chosen) for chosen in partitions] == rounds * [3]
    for number, chosen in enumerate(partitions, start=1):
        for kind, clients in (("train", chosen), ("evaluate", everyone)):
            model = (tmp_path / f"model-{kind}-{number}").read_text()
            for client in clients:
                assert (tmp_path / f"seen-{kind}-{number}-{client}").read_text() == model
    assert len(list(tmp_path.glob("seen-*"))) == rounds * (3 + len(everyone))
    assert all(line["failed-replies"] == line["rejected-replies"] == 0 for line in lines)
    if compressor == "Identity()":
        assert_close(arrays, plain_fedavg(partitions))
    else:
        sent = [line["downlink-bytes"] / line["downlink-dense-bytes"] for line in lines]
        # Each client is sent the whole model once, in the first round or evaluation.
        assert sent[0] > 1
        assert max(sent[1:]) < 0.2


@pytest.mark.parametrize("downlink", ["", "Identity()"], ids=["up", "both"])
@pytest.mark.timeout(700)
def test_personal_arrays_stay_at_each_client_from_process_to_process(
    downlink, simulation, tmp_path
):
    """Clients are processes that end with each message; their heads go on from what they had."""
    config = {"out": str(tmp_path), "compressor": "Identity()", "downlink": downlink}
    config |= {"rounds": 3, "evaluate": 1.0, "fraction": 0.5, "clients": 4, "timeout": 200.0}
    config["personal"] = "head.*"
    options = ["--federation-config", "num-supernodes=4 client-resources-num-cpus=1"]
    simulation.run(JOB, config, *options, timeout=650)
    arrays, partitions, lines = results_of(tmp_path)
    assert all(line["failed-replies"] == line["rejected-replies"] == 0 for line in lines)
    initial = np.linspace(-1, 1, 20, dtype=np.float32)
    assert np.array_equal(arrays.pop("head.weight"), initial)
    assert_close(arrays, plain_fedavg(partitions))
    receding, heads = Receding(noise=0.0, rate=0.3), dict.fromkeys(range(4), initial)
    for number, chosen in enumerate(partitions, start=1):
        for partition in chosen:
            found = np.load(tmp_path / f"head-train-{number}-{partition}.npy")
            assert np.array_equal(found, heads[partition])
            # The target of a training depends on the array's place, which is the fourth.
            model = {**dict.fromkeys("abc", initial), "head.weight": heads[partition]}
            heads[partition] = receding(model, partition)["head.weight"]
        for partition, head in heads.items():
            found = np.load(tmp_path / f"head-evaluate-{number}-{partition}.npy")
            assert np.array_equal(found, head)


def test_example_runs_in_simulation_and_leaves_its_results(simulation, tmp_path):
    config = {"out": str(tmp_path), "num-server-rounds": 6}
    log = simulation.run(
        ROOT / "examples" / "flower_app",
        config,
        *("--federation-config", "num-supernodes=10 client-resources-num-cpus=1"),
        timeout=150,
    )
    assert "├── Compressor: LBGM(TopK(0.1))" in log
    assert re.search(r"Recycled: \d+\.\d % of the tensors", log)
    lines = [json.loads(line) for line in (tmp_path / "rounds.jsonl").read_text().splitlines()]
    assert [line["replies"] for line in lines] == 6 * [5]
    assert sum(line["uplink-bytes"] for line in lines) < 0.1 * sum(
        line["dense-bytes"] for line in lines
    )
    assert lines[-1]["evaluate-server"]["accuracy"] > lines[0]["evaluate-server"]["accuracy"]
    assert (tmp_path / "flower.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "held.safetensors").exists()


def test_probe_in_a_client_goes_on_from_round_to_round(simulation, tmp_path):
    app, kept = tmp_path / "app", tmp_path / "kept"
    shutil.copytree(ROOT / "examples" / "flower_app", app)
    kept.mkdir()
    client = app / "flower_app" / "client_app.py"
    text = client.read_text()
    call = "    loss = train(model, images, labels, steps, lr)\n"
    assert text.count(call) == 1
    file = f"""f"{kept}/{{context.node_config['partition-id']}}.pt\""""
    watched = f"    with LookBackProbe(model, (0.0, 0.2), updates=True, file={file}):\n    {call}"
    text = text.replace(call, watched)
    client.write_text(f"from lbgm_compress.probe import LookBackProbe\n{text}")
    config = {"out": str(tmp_path), "num-server-rounds": 4, "fraction-train": 1.0}
    # It loses nothing and always sends in full, so that the probe sees the same updates.
    config["compressor"] = "LBGM(delta=0)"
    options = ("--federation-config", "num-supernodes=3 client-resources-num-cpus=1")
    simulation.run(app, config, *options, timeout=150)
    lines = [json.loads(line) for line in (tmp_path / "rounds.jsonl").read_text().splitlines()]
    predicted = 0
    for partition in range(3):
        model = [(name, weight.requires_grad_()) for name, weight in build_like().items()]
        probe = LookBackProbe(model, (0.0, 0.2), updates=True, file=kept / f"{partition}.pt")
        report = probe.report()
        assert report.rounds == 4
        predicted += 4 * report.all_tensors()[0].bytes_per_step
    # The replies of the adapter have two more bytes.
    assert sum(line["uplink-bytes"] for line in lines) == pytest.approx(predicted, rel=0.001)


def build_like():
    """Return parameters of the shapes of the example's model."""
    shapes = {"0.weight": (128, 64), "0.bias": (128,), "2.weight": (10, 128), "2.bias": (10,)}
    return {name: torch.zeros(shape) for name, shape in shapes.items()}


def reference(compressor, partitions, full):
    """Train as the job does, with these clients by round; those in `full` send in full.

    Returns the parameters, and the share of tensors recycled in each round.
    """
    weights = {name: array.numpy() for name, array in arrays_of().items()}
    like = {name: torch.from_numpy(array) for name, array in weights.items()}
    train, receiver = Receding(noise=0.0, rate=0.3), Receiver(compressor, like)
    senders = {partition: Sender(compressor) for chosen in partitions for partition in chosen}
    shares = []
    for number, chosen in enumerate(partitions, start=1):
        total = sum(10 + partition for partition in chosen)
        mean = {name: np.zeros(array.shape) for name, array in weights.items()}
        recycled = []
        for partition in chosen:
            sender = senders[partition]
            if (number, partition) in full:
                sender.reset()
            new = train(weights, partition)
            update = {name: torch.from_numpy(new[name] - weights[name]) for name in weights}
            message = sender.compress(update)
            for name, change in receiver.decompress(partition, message).items():
                mean[name] += (weights[name] + change.numpy()) * ((10 + partition) / total)
            recycled += [tensor.recycled for tensor in sender.report().values()]
        weights = {name: array.astype(np.float32) for name, array in mean.items()}
        shares.append(sum(recycled) / len(recycled))
    return weights, shares


@pytest.mark.parametrize(
    ("killed_in", "rounds", "resumed_rounds", "prompt"),
    [
        (2, 3, 1, True),
        # With Flower's own grid, which waits for those that do not reply until the time-out.
        pytest.param(3, 4, 2, False, marks=pytest.mark.soak),
    ],
)
def test_killed_late_and_restarted_ends_cost_one_full_update_each(
    killed_in, rounds, resumed_rounds, prompt, deployment, tmp_path
):
    """Round 1 loses the reply of client 0, and client 1 is killed later; then the server ends.

    A second run continues from the state that the server saved, and the clients from their files.
    """
    ids = [node_id(deployment, name) for name in deployment.nodes]
    config = {
        "out": str(tmp_path),
        "compressor": "LBGM(delta=0.95)",
        "rounds": rounds,
        "timeout": 200.0 if prompt else 25.0,
        "prompt": prompt,
        "late": f"1:{ids[0]}",
        "hang": f"{killed_in}:{ids[1]}",
    }
    process = deployment.start_run(JOB, config)
    deadline = time.monotonic() + 200
    while not (tmp_path / "hanging").exists():
        assert time.monotonic() < deadline, deployment.logs()
        assert process.poll() is None, deployment.logs()
        time.sleep(0.05)
    deployment.kill(deployment.nodes[1])
    (tmp_path / f"gone-{ids[1]}").touch()
    deployment.nodes[1] = deployment.supernode(1, 3)
    process.wait(200)
    assert process.returncode == 0, deployment.logs()
    _, partitions, lines = results_of(tmp_path)
    first = [sorted(chosen) for chosen in partitions[:killed_in]]
    assert first == [[1, 2], *((killed_in - 2) * [[0, 1, 2]]), [0, 2]]
    node_id(deployment, deployment.nodes[1])
    config.update(rounds=resumed_rounds, resume=True, hang="", late="")
    deployment.run(JOB, config, timeout=150)
    arrays, resumed, lines = results_of(tmp_path)
    partitions += resumed
    assert sorted(partitions[-1]) == [0, 1, 2]
    back = next(
        number
        for number, chosen in enumerate(partitions, start=1)
        if number > killed_in and 1 in chosen
    )
    compressor = LBGM(delta=0.95)
    weights, shares = reference(compressor, partitions, full={(2, 0), (back, 1)})
    assert [line["recycled-share"] for line in lines] == pytest.approx(shares)
    # In round 2 client 0 sends in full, since the server has missed its last update.
    assert shares[1] == pytest.approx(1 - 1 / len(partitions[1]))
    # After the restart of the server all recycle, apart from a client that returns only then.
    for number in range(rounds + 1, len(partitions) + 1):
        expected = 1 - (back == number) / len(partitions[number - 1])
        assert shares[number - 1] == pytest.approx(expected)
    assert_close({name: arrays[name] for name in weights}, weights)
    # Without full updates the parameters would be different ones.
    others, _ = reference(compressor, partitions, full=set())
    assert any(not np.allclose(others[name], weights[name], atol=1e-4) for name in weights)
