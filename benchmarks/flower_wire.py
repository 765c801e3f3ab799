"""Measure the bytes that Flower sends: payloads, and all on the network.

A SuperLink and SuperNodes run on this machine. The SuperNodes reach the SuperLink through a proxy
that counts bytes. Each method trains `examples/flower_app`.
"""

from __future__ import annotations

import json
import socket
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

if __name__ == "__main__" and __spec__ is None:  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from rich.table import Table

from benchmarks.common.command_line import Parser, check_folder, positive, read_methods, start
from benchmarks.common.engines.flower_processes import Federation, federation, free_port
from benchmarks.common.processes import ROOT
from benchmarks.common.tables import console, make_table, write_csv

APP = ROOT / "examples" / "flower_app"
METHODS = "Identity(), LBGM(), TopK(0.01), LBGM(TopK(0.01))"
BLOCK = 1 << 16


class CountingProxy:
    """A context that passes TCP connections on to a port, and counts their bytes."""

    def __init__(self, port: int) -> None:
        self.target = port
        self.up = self.down = 0
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", free_port()))
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> CountingProxy:
        return self

    def __exit__(self, *error: object) -> None:
        self._listener.close()

    def counts(self) -> tuple[int, int]:
        """Return the bytes so far from the clients, and to them."""
        with self._lock:
            return self.up, self.down

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
                far = socket.create_connection(("127.0.0.1", self.target))
            except OSError:
                return
            for source, sink, up in ((near, far, True), (far, near, False)):
                threading.Thread(target=self._pass, args=(source, sink, up), daemon=True).start()

    def _pass(self, source: socket.socket, sink: socket.socket, up: bool) -> None:
        try:
            while data := source.recv(BLOCK):
                with self._lock:
                    self.up += len(data) if up else 0
                    self.down += 0 if up else len(data)
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            source.close()
            sink.close()


def rounds_of(
    running: Federation, proxy: CountingProxy, method: str, options: Any
) -> list[dict[str, Any]]:
    """Train with one compressor, and return the bytes of each round for one client."""
    with tempfile.TemporaryDirectory() as out:
        config = {
            "out": out,
            "compressor": method,
            "hidden": options.hidden,
            "num-server-rounds": options.rounds,
            "fraction-train": 1.0,
        }
        process = running.start_run(APP, config)
        log, rounds = Path(out) / "rounds.jsonl", []
        before = proxy.counts()
        while process.poll() is None:
            time.sleep(0.02)
            lines = log.read_text().splitlines() if log.exists() else []
            if len(lines) > len(rounds):
                now, line = proxy.counts(), json.loads(lines[len(rounds)])
                clients = options.clients
                rounds.append(
                    {
                        "method": method,
                        "round": line["round"],
                        "payload": line["uplink-bytes"] / clients,
                        "dense": line["dense-bytes"] / clients,
                        "recycled_share": line["recycled-share"],
                        "wire_up": (now[0] - before[0]) / clients,
                        "wire_down": (now[1] - before[1]) / clients,
                        "accuracy": line["evaluate-server"]["accuracy"],
                    }
                )
                before = now
        if process.returncode or len(rounds) < options.rounds:
            raise RuntimeError(f"{method} did not finish:\n{running.logs()}")
        return rounds


def table_of(rows: list[dict[str, Any]], rounds: int) -> Table:
    """Return a table of the methods' means."""
    cells = []
    for method in dict.fromkeys(row["method"] for row in rows):
        # The first round also carries the app to the clients.
        later = [row for row in rows if row["method"] == method and row["round"] > 1]
        mean = {k: statistics.fmean(row[k] for row in later) for k in later[0] if k != "method"}
        cells.append(
            (
                method,
                *(f"{mean[name] / 1000:.4g}" for name in ("payload", "wire_up", "wire_down")),
                f"{mean['recycled_share']:.0%}",
                f"{later[-1]['accuracy']:.1%}",
            )
        )
    return make_table(
        f"kB a round and client, mean of rounds 2 to {rounds}",
        ("method", "payload", "uplink on the wire", "downlink", "recycled", "accuracy"),
        cells,
        whole="method",
    )


def build_parser() -> Parser:
    """Return the parser of the command line."""
    parser = Parser("flower_wire.py", __doc__)
    add = parser.add_argument
    add(
        "--methods",
        metavar="LIST",
        default=METHODS,
        help=f"compressors to compare, comma-separated, as in Python (default: {METHODS})",
    )
    add("--clients", type=positive, default=3, metavar="K", help="SuperNodes (default: 3)")
    add("--rounds", type=positive, default=8, metavar="N", help="rounds, at least 2 (default: 8)")
    add(
        "--hidden",
        type=positive,
        default=4096,
        metavar="N",
        help="hidden units of the model (default: 4096, a model of 1.23 MB)",
    )
    add(
        "--out",
        type=Path,
        default=Path("flower-wire-results"),
        metavar="DIR",
        help="folder of flower_wire.csv (default: flower-wire-results)",
    )
    return parser


def main(arguments: list[str]) -> int:
    """Run the command line and return the exit status."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    try:
        methods = [repr(method) for method in read_methods(options.methods, ranks=False)]
        if options.rounds < 2:
            raise ValueError("--rounds starts at 2: the first round also carries the app")
        check_folder(options.out)
    except ValueError as error:
        parser.error(str(error))
    printer = console()
    rows: list[dict[str, Any]] = []
    with (
        tempfile.TemporaryDirectory() as home,
        federation(Path(home)) as running,
        CountingProxy(running.port) as proxy,
    ):
        for partition in range(options.clients):
            running.supernode(partition, options.clients, through=proxy.port)
        for method in methods:
            with printer.status(method):
                rows += rounds_of(running, proxy, method, options)
    write_csv(options.out / "flower_wire.csv", list(rows[0]), [row.values() for row in rows])
    printer.print(table_of(rows, options.rounds))
    return 0


if __name__ == "__main__":
    start(main)
