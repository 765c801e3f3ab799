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

from benchmarks import flower_memory
from benchmarks.flower_wire import CountingProxy

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
