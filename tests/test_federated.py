"""The benchmark of federations in both directions."""

from __future__ import annotations

import csv
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from benchmarks import federated
from benchmarks.common.federation import Downlink, Method, federate
from lbgm_compress import ErrorFeedback, Identity, LookBackSubspace, TopK
from tests.idx import write_idx

SUBSPACE = LookBackSubspace(4, values="int4")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Return a folder of IDX files."""
    folder = tmp_path_factory.mktemp("idx")
    write_idx(folder, train=2000, test=200)
    return folder


def training(images, rounds=4, participation=0.2):
    return federated.training_of(("iid", participation, 10, "dense", 0), rounds, str(images))


def test_without_compression_both_directions_cost_what_dense_models_do(images):
    dense = Method(Identity(), None, "float32", "memory")
    lossless = Method(Identity(), Identity(), "float32", "memory")
    found = {m: list(federate(training(images, 10), m)) for m in (dense, lossless)}
    size = 4 * sum(p.numel() for p in training(images).initial_model().parameters())
    for one, other in zip(*found.values(), strict=True):
        assert one.downlink_bytes == 20 * size
        assert one.dense_bytes == 30 * size
        assert one.uplink_bytes < 10.01 * size
        # A client that missed rounds is sent what it lacks.
        assert other.downlink_bytes > 0
    assert found[dense][-1].accuracy == pytest.approx(found[lossless][-1].accuracy, abs=0.02)
    last = found[lossless][-1]
    assert last.held_accuracy == pytest.approx(last.accuracy, abs=0.02)


def test_model_that_clients_hold_follows_that_of_the_server(images):
    weights = {n: p.detach() for n, p in training(images).initial_model().named_parameters()}
    downlink = Downlink(Method(Identity(), SUBSPACE, "float16", "memory"), 1000)
    whole = downlink.deliver(weights, [0, 1, 1])
    assert downlink.deliver(weights, [0, 1]) < 100
    later = {name: weight + 0.01 * torch.randn_like(weight) for name, weight in weights.items()}
    first, second = downlink.deliver(later, [0]), downlink.deliver(later, [1])
    assert 0 < first == second < whole / 10
    moved = sum(float((downlink.held(later)[n] - weights[n]).abs().sum()) for n in weights)
    assert moved > 0


def test_clients_that_keep_the_rest_in_their_model_train_from_other_models(images):
    both = []
    for residual in ("memory", "model"):
        method = Method(ErrorFeedback(TopK(0.01)), TopK(0.01), "float32", residual)
        both.append(list(federate(training(images, 10, 1.0), method)))
    memory, model = both
    # In the first round there is no rest.
    assert memory[0].uplink_bytes == model[0].uplink_bytes
    assert memory[-1].uplink_bytes != model[-1].uplink_bytes


def test_command_keeps_its_runs_and_writes_the_same_file_again(
    images, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(federated, "make_pool", ThreadPoolExecutor)
    arguments = ["--partitions", "classes:3", "--participations", "0.1", "--rounds", "40"]
    arguments += ["--tables", "40", "--seeds", "0", "--methods", "dense,subspace-model"]
    arguments += ["--data-dir", str(images), "--jobs", "1"]
    assert federated.main([*arguments, "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "classes:3, 10% of 50 clients a round, 40 rounds of 10 steps" in printed
    assert "subspace-model" in printed
    kept = (tmp_path / "federated.csv").read_text()
    with (tmp_path / "federated.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["round"]) for row in rows] == [1, 10, 20, 30, 40] * 2
    assert (tmp_path / "federated.png").read_bytes().startswith(b"\x89PNG")

    def fail(*_):
        raise AssertionError("a finished run is not done again")

    monkeypatch.setattr(federated, "perform", fail)
    assert federated.main([*arguments, "--out", str(tmp_path)]) == 0
    assert (tmp_path / "federated.csv").read_text() == kept


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "sparse"], "--methods: 'sparse' is none of dense"),
        (["--partitions", "classes:2"], "none of iid, classes:3"),
        (["--participations", "0"], "from above 0 to 1"),
        (["--local-steps", "0"], "--local-steps starts at 1"),
        (["--rounds", "10"], "--rounds starts at 40"),
        (["--data-dir", "nowhere"], "nowhere"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_input_gives_one_line_and_exit_code_2(
    arguments, message, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        federated.main(arguments)
    assert stopped.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("federated.py: error: ")
    assert message in line
