"""Measure the bytes that Flower sends: payloads, and all on the network.

A SuperLink and SuperNodes run on this machine. The SuperNodes reach the SuperLink through a proxy
that counts bytes. Each method trains `examples/flower_app`, or, with ``--both-ways``, the
federation of `federated.py`, in which clients also evaluate.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__" and __spec__ is None:  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from rich.table import Table
from safetensors.torch import save_file

from benchmarks.common.command_line import (
    Parser,
    check_folder,
    number_in,
    positive,
    read_methods,
    start,
)
from benchmarks.common.data import Dataset, DatasetMissing, load
from benchmarks.common.engines.counting_proxy import CountingProxy, Traffic
from benchmarks.common.engines.flower_processes import Federation, federation
from benchmarks.common.partition import partition
from benchmarks.common.processes import ROOT
from benchmarks.common.tables import console, make_table, write_csv
from lbgm_compress import ErrorFeedback, LookBackSubspace

APP = ROOT / "examples" / "flower_app"
FEDERATION = ROOT / "benchmarks" / "common" / "engines" / "flower_federation"
METHODS = "Identity(), LBGM(), TopK(0.01), LBGM(TopK(0.01))"
# Requests that carry a message to a client, or its reply.
MESSAGES = (
    *("pull-messages", "pull-object", "confirm-message-received"),
    *("push-messages", "push-object"),
)


def lines_of(running: Federation, process: Any, log: Path, count: int) -> Iterator[dict[str, Any]]:
    """Yield the lines of a run's log as they are written.

    Raises
    ------
    RuntimeError
        If the run fails, or ends before its log has `count` lines.
    """
    found, ended = 0, False
    while not ended:
        ended = process.poll() is not None
        lines = log.read_text().split("\n")[found:-1] if log.exists() else []
        found += len(lines)
        yield from map(json.loads, lines)
        time.sleep(0.02)
    if process.returncode or found < count:
        raise RuntimeError(f"the run did not finish:\n{running.logs()}")


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
        log, clients, rounds = Path(out) / "rounds.jsonl", options.clients, []
        before = proxy.counts()
        for line in lines_of(running, process, log, options.rounds):
            now = proxy.counts()
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


# --- both directions -----------------------------------------------------------------------------


class Way(NamedTuple):
    """Expressions of the compressors of both directions; empty for arrays as they are."""

    uplink: str
    downlink: str


SUBSPACE = LookBackSubspace(4, values="int4")
WAYS = {
    "FedAvg": Way("", ""),
    "uplink": Way(repr(ErrorFeedback(SUBSPACE)), ""),
    "both directions": Way(repr(ErrorFeedback(SUBSPACE)), repr(SUBSPACE)),
}


class Cost(NamedTuple):
    """A row of flower_both_ways.csv: the bytes of one round, of all clients together."""

    method: str
    round: int
    accuracy: float
    """Accuracy of the server's model on the test images."""
    up: int
    """The count of the strategy; for FedAvg alone, the size of the arrays."""
    down: int
    messages_up: int
    """Bytes on the wire of the requests that carry messages."""
    messages_down: int
    wire_up: int
    """All bytes on the wire."""
    wire_down: int


class Requests(NamedTuple):
    """A row of flower_both_ways_requests.csv: the requests of one name, in all rounds."""

    method: str
    name: str
    requests: int
    up: int
    down: int


def write_parts(data: Dataset, clients: int, folder: Path) -> None:
    """Write the images of each client, and those to test with, to files of safetensors."""
    for number, rows in enumerate(partition(data.train_labels, clients, "classes:3", 0)):
        part = {"images": data.train_images[rows], "labels": data.train_labels[rows]}
        save_file(part, folder / f"{number}.safetensors")
    test = {"images": data.test_images, "labels": data.test_labels}
    save_file(test, folder / "test.safetensors")


def both_ways(
    running: Federation, proxy: CountingProxy, method: str, data: Path, options: Any
) -> tuple[list[Cost], list[Requests]]:
    """Train with one of `WAYS`, and return the bytes of each round, and of each request."""
    costs: list[Cost] = []
    with tempfile.TemporaryDirectory() as out:
        config = {
            "data": str(data),
            "out": out,
            **WAYS[method]._asdict(),
            "num-server-rounds": options.rounds,
            "participation": options.participation,
            "clients": options.clients,
        }
        process = running.start_run(FEDERATION, config)
        first = proxy.traffic()
        before, counted = first, (0, 0)
        lines = lines_of(running, process, Path(out) / "rounds.jsonl", options.rounds + 1)
        next(lines)  # before the first round
        for line in lines:
            if line["failed"] or line["replies"] < line["round"] * options.sampled:
                raise RuntimeError(f"{method}: a client failed:\n{running.logs()}")
            now = proxy.traffic()
            messages = spent(before, now, MESSAGES)
            everything = spent(before, now, now)
            costs.append(
                Cost(
                    *(method, line["round"], round(line["accuracy"], 4)),
                    *(line["up"] - counted[0], line["down"] - counted[1]),
                    *(messages.up, messages.down, everything.up, everything.down),
                )
            )
            before, counted = now, (line["up"], line["down"])
    by_name = {name: spent(first, before, [name]) for name in sorted(before)}
    requests = [Requests(method, n, t.requests, t.up, t.down) for n, t in by_name.items()]
    return costs, [row for row in requests if row.requests]


def spent(before: dict[str, Traffic], now: dict[str, Traffic], names: Iterable[str]) -> Traffic:
    """Return the traffic of some requests between two times."""
    found = Traffic()
    for name in names:
        found.add(now.get(name, Traffic()))
        found.add(before.get(name, Traffic()), -1)
    return found


def both_ways_table(costs: Sequence[Cost], first: int) -> Table:
    """Return a table of the methods' sums over the rounds from `first` on."""
    sums = {}
    for method in dict.fromkeys(cost.method for cost in costs):
        rows = [cost[3:] for cost in costs if cost.method == method and cost.round >= first]
        sums[method] = [sum(column) for column in zip(*rows, strict=True)]
    dense = next(iter(sums.values()))
    cells = []
    for method, (up, down, *wire) in sums.items():
        sizes = *(up, wire[0], wire[2]), *(down, wire[1], wire[3])
        totals = [(0, 1), (2, 3), (4, 5)]
        ratios = [
            sum(dense[i] for i in pair) / sum(sums[method][i] for i in pair) for pair in totals
        ]
        last = [cost.accuracy for cost in costs if cost.method == method][-1]
        cells.append(
            (
                method,
                *(f"{size / 1e6:.4g}" for size in sizes),
                *(f"1/{ratio:.3g}" for ratio in ratios),
                f"{last:.1%}",
            )
        )
    headings = [
        f"{way} {what}"
        for way in ("up", "down", "both")
        for what in ("counted", "messages", "wire")
    ]
    return make_table(
        f"MB of all clients in rounds {first} to {costs[-1].round}; both: of FedAvg",
        ("method", *headings, "accuracy"),
        cells,
        whole="method",
    )


def measure_both_ways(dataset: Dataset, options: Any, home: Path) -> None:
    """Train with each of `WAYS`, and write and print the bytes."""
    costs: list[Cost] = []
    requests: list[Requests] = []
    printer = console(160)
    data = home / "data"
    data.mkdir()
    write_parts(dataset, options.clients, data)
    with federation(home) as running, CountingProxy(running.port) as proxy:
        # Clients keep models in a folder for temporary files.
        running.environment["TMPDIR"] = str(home)
        for number in range(options.clients):
            running.supernode(number, options.clients, through=proxy.port)
        while spent({}, proxy.traffic(), ["activate-node"]).requests < options.clients:
            time.sleep(0.1)
        for method in WAYS:
            with printer.status(method):
                found = both_ways(running, proxy, method, data, options)
            costs += found[0]
            requests += found[1]
            write_csv(options.out / "flower_both_ways.csv", Cost._fields, costs)
            file = options.out / "flower_both_ways_requests.csv"
            write_csv(file, Requests._fields, requests)
    for first in dict.fromkeys((1, options.rounds // 2 + 1)):
        printer.print(both_ways_table(costs, first))


# --- the command line ----------------------------------------------------------------------------


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
    add(
        "--both-ways",
        action="store_true",
        help="measure FedAvg, a compressed uplink and both directions compressed, with messages to "
        "train and to evaluate, in the place of --methods",
    )
    add(
        "--participation",
        type=number_in(0, 1, open_low=True),
        default=0.2,
        metavar="SHARE",
        help="share of the clients that train in a round of --both-ways; as many evaluate "
        "(default: 0.2)",
    )
    add(
        "--dataset",
        choices=("mnist", "fashion-mnist"),
        default="fashion-mnist",
        help="data set of --both-ways (default: fashion-mnist)",
    )
    add("--data-dir", metavar="DIR", help="folder of Fashion-MNIST's IDX files (default: where "
        "Debian's package dataset-fashion-mnist puts them)")  # fmt: skip
    add("--clients", type=positive, default=3, metavar="K", help="SuperNodes (default: 3)")
    add("--rounds", type=positive, default=8, metavar="N", help="rounds, at least 2 (default: 8)")
    add(
        "--hidden",
        type=positive,
        default=4096,
        metavar="N",
        help="hidden units of the model of --methods (default: 4096, a model of 1.23 MB)",
    )
    add(
        "--out",
        type=Path,
        default=Path("flower-wire-results"),
        metavar="DIR",
        help="folder of the results (default: flower-wire-results)",
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
        dataset = None
        if options.both_ways:
            options.sampled = int(options.participation * options.clients)
            if not options.sampled:
                raise ValueError("--participation: no client of --clients would train")
            dataset = load(options.dataset, options.data_dir, seed=0)
    except (ValueError, DatasetMissing) as error:
        parser.error(str(error))
    if dataset is not None:
        with tempfile.TemporaryDirectory() as home:
            measure_both_ways(dataset, options, Path(home))
        return 0
    printer = console()
    rows: list[dict[str, Any]] = []
    with (
        tempfile.TemporaryDirectory() as home,
        federation(Path(home)) as running,
        CountingProxy(running.port) as proxy,
    ):
        for number in range(options.clients):
            running.supernode(number, options.clients, through=proxy.port)
        for method in methods:
            with printer.status(method):
                rows += rounds_of(running, proxy, method, options)
    write_csv(options.out / "flower_wire.csv", list(rows[0]), [row.values() for row in rows])
    printer.print(table_of(rows, options.rounds))
    return 0


if __name__ == "__main__":
    start(main)
