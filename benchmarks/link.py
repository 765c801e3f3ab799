"""Train with DistributedDataParallel over links of known rate, with LBGM and with its alternatives.

Every rank is a process in a network namespace of its own, whose one interface sends and receives at
the given rate (token buckets; no added latency). Needs root, `ip` and `tc`; everything is made for
the run and removed after it. Times are those of the training loop, without evaluation.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import itertools
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

if not __package__:  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

from benchmarks.common.command_line import INTERRUPTED, Parser, check_folder, listed
from benchmarks.common.data import Dataset, DatasetMissing, load
from benchmarks.common.models import build
from lbgm_compress.adapters.ddp import CompressionState, compression_hook
from lbgm_compress.collective.transport import ProcessGroupTransport
from lbgm_compress.compressors.parse import parse_compressor

PEERS = ("dense", "fp16", "PowerSGD(1)", "PowerSGD(2)", "PowerSGD(4)")
METHODS = (
    *PEERS,
    "ErrorFeedback(TopK(0.01))",
    "ErrorFeedback(SignSGD(scaled=True))",
    "ErrorFeedback(Atomo(4))",
    "LBGM(delta=0.2)",
    "LBGM(delta=0.5)",
    "LBGM(TopK(0.01), delta=0.2)",
    "LBGM(TopK(0.01), delta=0.5)",
    "LBGM(ErrorFeedback(TopK(0.01)), delta=0.2)",
    "LBGM(ErrorFeedback(TopK(0.01)), delta=0.5)",
    "LBGM(Atomo(4), delta=0.2)",
    "LBGM(ErrorFeedback(Atomo(4)), delta=0.2)",
    "LBGM(ErrorFeedback(Atomo(4)), delta=0.5)",
    "ErrorFeedback(LookBackSubspace(4, 0.5, refresh=4, values='int4'))",
    "ErrorFeedback(LookBackSubspace(8, 0.5, refresh=8, values='int4'))",
)
# Images a step of all ranks together.
CASES = {"large": 1024, "small": 64}
PORT = 29500
PROBE_BYTES = 4_000_000


@dataclass(frozen=True)
class Epoch:
    """What one epoch of one run gave; bytes are a step's and a rank's, sent."""

    case: str
    ranks: int
    mbit: float
    method: str
    epoch: int
    steps: int
    """Steps so far."""
    seconds: float
    """Training time so far."""
    step_ms: float
    """Mean time of a step in this epoch."""
    interface_bytes: float
    message_bytes: float
    recycled_share: float
    accuracy: float


# --- the network ---------------------------------------------------------------------------------


def run_command(*words: str) -> None:
    """Run a command; its own words are the error."""
    subprocess.run(words, check=True, capture_output=True, text=True)


def missing() -> str | None:
    """Say what keeps this machine from making namespaces, or None."""
    for tool in ("ip", "tc"):
        if shutil.which(tool) is None:
            return f"there is no {tool!r}: install Debian's package iproute2"
    if os.geteuid() != 0:
        return "network namespaces need root"
    try:
        with network(2, 100):
            pass
    except subprocess.CalledProcessError as error:
        words = f"{' '.join(error.cmd)}: {error.stderr.strip()}"
        return f"this machine allows no shaped links in network namespaces: {words}"
    return None


def shape(interface: str, mbit: float) -> list[str]:
    """Return the words of `tc` that let an interface send at a rate."""
    burst = max(32_000, int(mbit * 1e6 / 8 / 250))
    return [
        *("qdisc", "replace", "dev", interface, "root", "tbf"),
        *("rate", f"{mbit}mbit", "burst", str(burst), "latency", "100ms"),
    ]


@contextlib.contextmanager
def namespace(name: str) -> Iterator[None]:
    """Make a network namespace, and remove it with everything in it."""
    try:
        # Within the try: who interrupts the command does not say whether it was done.
        run_command("ip", "netns", "add", name)
        yield
    finally:
        subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


@contextlib.contextmanager
def network(ranks: int, mbit: float) -> Iterator[list[str]]:
    """Connect ranks by a switch, each by a link of the given rate; yield their namespaces."""
    prefix = f"lbgm-{os.getpid()}"
    switch, names = f"{prefix}-switch", [f"{prefix}-{rank}" for rank in range(ranks)]
    with contextlib.ExitStack() as stack:
        for name in (switch, *names):
            stack.enter_context(namespace(name))
        run_command("ip", "-n", switch, "link", "add", "bridge", "type", "bridge")
        run_command("ip", "-n", switch, "link", "set", "bridge", "up")
        for rank, name in enumerate(names):
            port = f"port{rank}"
            ends = ("type", "veth", "peer", "name", port, "netns", switch)
            run_command("ip", "-n", name, "link", "add", "eth0", *ends)
            run_command("ip", "-n", switch, "link", "set", port, "master", "bridge")
            run_command("ip", "-n", switch, "link", "set", port, "up")
            address = f"10.77.0.{rank + 1}/24"
            run_command("ip", "-n", name, "addr", "add", address, "dev", "eth0")
            run_command("ip", "-n", name, "link", "set", "lo", "up")
            run_command("ip", "-n", name, "link", "set", "eth0", "up")
            reno = "net.ipv4.tcp_congestion_control=reno"
            run_command("ip", "netns", "exec", name, "sysctl", "-qw", reno)
            run_command("tc", "-n", name, *shape("eth0", mbit))
            run_command("tc", "-n", switch, *shape(port, mbit))
        yield names


def launch(names: Sequence[str], task: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Run a task on every rank, and yield what rank 0 says.

    Raises
    ------
    RuntimeError
        If a rank fails.
    """
    environment = {
        **os.environ,
        "GLOO_SOCKET_IFNAME": "eth0",
        "MASTER_ADDR": "10.77.0.1",
        "MASTER_PORT": str(PORT),
        "WORLD_SIZE": str(len(names)),
        "OMP_NUM_THREADS": "1",
        "LBGM_LINK_TASK": json.dumps(task),
    }
    processes = []
    with tempfile.TemporaryFile("w+") as errors:
        try:
            for rank, name in enumerate(names):
                processes.append(
                    subprocess.Popen(
                        ["ip", "netns", "exec", name, sys.executable, __file__],
                        env={**environment, "RANK": str(rank)},
                        stdout=subprocess.PIPE if rank == 0 else subprocess.DEVNULL,
                        stderr=errors,
                        text=True,
                        # Ctrl-C is for the process that cleans up.
                        start_new_session=True,
                    )
                )
            assert processes[0].stdout is not None
            for line in processes[0].stdout:
                yield json.loads(line)
            if any(process.wait(timeout=60) for process in processes):
                errors.seek(0)
                lines = [line for line in errors.read().splitlines() if line.strip()]
                raise RuntimeError(f"a rank failed: {lines[-1] if lines else 'without a word'}")
        finally:
            for process in processes:
                process.kill()
                process.wait()


# --- a rank --------------------------------------------------------------------------------------


def sent_bytes() -> int:
    """Return what has left this rank's interface."""
    return int(Path("/sys/class/net/eth0/statistics/tx_bytes").read_text())


def say(**what: Any) -> None:
    """Report to the process that started the ranks."""
    if dist.get_rank() == 0:
        print(json.dumps(what), flush=True)


def mean_over_ranks(number: float) -> float:
    """Average a number."""
    tensor = torch.tensor([number], dtype=torch.float64)
    dist.all_reduce(tensor)
    return tensor.item() / dist.get_world_size()


def install(model: DistributedDataParallel, method: str) -> Callable[[int], tuple[float, float]]:
    """Register a method's hook.

    Returns a function from the number of steps so far to this rank's message bytes so far, and the
    share of tensors recycled so far.
    """
    size = sum(p.numel() for p in model.parameters())
    if method == "dense":
        return lambda steps: (4.0 * size * steps, 0.0)
    if method == "fp16":
        model.register_comm_hook(None, default_hooks.fp16_compress_hook)
        return lambda steps: (2.0 * size * steps, 0.0)
    if method.startswith("PowerSGD("):
        power = powerSGD_hook.PowerSGDState(
            None, matrix_approximation_rank=int(method[9:-1]), start_powerSGD_iter=2
        )
        model.register_comm_hook(power, powerSGD_hook.powerSGD_hook)

        def power_sent(steps: int) -> tuple[float, float]:
            first = min(steps, 2)
            return 4.0 * (size * first + power.total_numel_after_compression), 0.0

        return power_sent
    state = CompressionState(parse_compressor(method), model.named_parameters())
    model.register_comm_hook(state, compression_hook)

    def sent(steps: int) -> tuple[float, float]:
        stats = state.stats()
        return stats["message_bytes"], stats["recycled_share"]

    return sent


def train(dataset: Dataset, task: dict[str, Any], method: str) -> None:
    """Train with one method, and report every epoch."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    # One bucket: torch's PowerSGD hook hangs on gloo with more.
    model = DistributedDataParallel(
        build("cnn", (1, 28, 28), dataset.classes, task["seed"]), bucket_cap_mb=1000
    )
    sent = install(model, method)
    optimizer = torch.optim.SGD(model.parameters(), lr=task["lr"], momentum=0.9)
    generator = torch.Generator().manual_seed(task["seed"])
    batch, count = task["batch"], min(task["images"], len(dataset.train_labels))
    steps_an_epoch = count // batch
    seconds, messages_before = 0.0, 0.0
    for epoch in range(1, task["epochs"] + 1):
        order = torch.randperm(count, generator=generator)
        dist.barrier()
        start, interface = time.perf_counter(), sent_bytes()
        for step in range(steps_an_epoch):
            mine = order[step * batch : (step + 1) * batch][rank::ranks]
            optimizer.zero_grad()
            logits = model(dataset.train_images[mine])
            nn.functional.cross_entropy(logits, dataset.train_labels[mine]).backward()
            optimizer.step()
        dist.barrier()
        took = time.perf_counter() - start
        interface = sent_bytes() - interface
        seconds += took
        messages, recycled = sent(epoch * steps_an_epoch)
        interface_mean = mean_over_ranks(interface / steps_an_epoch)
        message_mean = mean_over_ranks((messages - messages_before) / steps_an_epoch)
        messages_before = messages
        say(
            method=method,
            epoch=epoch,
            steps=epoch * steps_an_epoch,
            seconds=seconds,
            step_ms=1e3 * took / steps_an_epoch,
            interface_bytes=interface_mean,
            message_bytes=message_mean,
            recycled_share=mean_over_ranks(recycled),
            # Every rank evaluates a part of the test images, while the clock stands.
            accuracy=mean_over_ranks(accuracy(model.module, dataset, rank, ranks)),
        )


@torch.no_grad()
def accuracy(model: nn.Module, dataset: Dataset, rank: int, ranks: int) -> float:
    """Return this rank's part of the test accuracy, times the number of ranks."""
    images, labels = dataset.test_images[rank::ranks], dataset.test_labels[rank::ranks]
    right = sum(
        int((model(part).argmax(1) == truth).sum())
        for part, truth in zip(images.split(1000), labels.split(1000), strict=True)
    )
    return right * ranks / len(dataset.test_labels)


def probe(mbit: float) -> None:
    """Measure the exchange by itself: one rank sends 4 MB, and none sends more than a head."""
    ranks = dist.get_world_size()
    group = dist.new_group(list(range(ranks)))
    transport = ProcessGroupTransport(group)
    sizes = [PROBE_BYTES if other == 1 else 0 for other in range(ranks)]
    parts = [torch.zeros(size, dtype=torch.uint8) for size in sizes]
    eight, head = torch.zeros(8, dtype=torch.uint8), torch.zeros(16 + 8 * 5, dtype=torch.uint8)
    rows = [torch.empty_like(eight) for _ in range(ranks)]
    steps: dict[str, tuple[int, Callable[[], object]]] = {
        "body_ms": (5, lambda: transport.gather_unequal(parts)),
        "head_ms": (200, lambda: transport.gather_equal(head)),
        "eight_bytes_ms": (200, lambda: dist.all_gather(rows, eight, group=group)),
    }
    found = {}
    for name, (repeats, step) in steps.items():
        step()
        times = []
        for _ in range(repeats):
            dist.barrier()
            start = time.perf_counter()
            step()
            times.append(1e3 * (time.perf_counter() - start))
        # The exchange is over when the last rank has everything.
        everyone: list[Any] = [None] * ranks
        dist.all_gather_object(everyone, times)
        found[name] = statistics.median(max(taken) for taken in zip(*everyone, strict=True))
    # What the link itself takes for one hop.
    found["link_ms"] = PROBE_BYTES * 8 / (mbit * 1e6) * 1e3
    say(probe=found)


def rank_main(task: dict[str, Any]) -> None:
    """Be one rank."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    if task["probe"]:
        probe(task["mbit"])
    if task["methods"]:
        dataset = load("fashion-mnist", task["data_dir"], task["seed"])
        for method in task["methods"]:
            train(dataset, task, method)
    dist.barrier()
    dist.destroy_process_group()


# --- the results ---------------------------------------------------------------------------------


def write_csv(file: Path, epochs: Sequence[Epoch]) -> None:
    """Write a row for each epoch."""
    with file.open("w", newline="") as out:
        writer = csv.DictWriter(out, [f.name for f in fields(Epoch)], lineterminator="\n")
        writer.writeheader()
        for epoch in epochs:
            row = asdict(epoch)
            for name in ("seconds", "step_ms", "interface_bytes", "message_bytes"):
                row[name] = f"{row[name]:.3f}"
            row["recycled_share"] = f"{epoch.recycled_share:.6f}"
            row["accuracy"] = f"{epoch.accuracy:.6f}"
            writer.writerow(row)


def groups(epochs: Sequence[Epoch]) -> dict[tuple[str, int, float], dict[str, list[Epoch]]]:
    """Return the epochs by case, ranks and rate, and then by method."""
    found: dict[tuple[str, int, float], dict[str, list[Epoch]]] = {}
    for epoch in epochs:
        by_method = found.setdefault((epoch.case, epoch.ranks, epoch.mbit), {})
        by_method.setdefault(epoch.method, []).append(epoch)
    return found


def seconds_to(epochs: Sequence[Epoch], target: float) -> float | None:
    """Return the training time after which an epoch first ended at this accuracy, or None."""
    return next((epoch.seconds for epoch in epochs if epoch.accuracy >= target), None)


def tables(epochs: Sequence[Epoch]) -> Iterator[Table]:
    """Lay out a table for each case, number of ranks and rate."""
    for (case, ranks, mbit), by_method in groups(epochs).items():
        target = by_method["dense"][-1].accuracy - 0.005 if "dense" in by_method else None
        title = f"{case} batches ({CASES[case]} images a step), {ranks} ranks, {mbit:g} Mbit/s"
        table = Table(title=title)
        table.add_column("method", no_wrap=True)
        until = "s to target" if target is None else f"s to {target:.1%}"
        heads = ("ms a step", "kB on the wire", "kB message", "recycled", "accuracy", until)
        for head in heads:
            table.add_column(head, justify="right")
        for method, run in by_method.items():
            reached = None if target is None else seconds_to(run, target)
            last, count = run[-1], len(run)
            table.add_row(
                method,
                f"{1e3 * last.seconds / last.steps:.0f}",
                f"{sum(e.interface_bytes for e in run) / count / 1e3:.1f}",
                f"{sum(e.message_bytes for e in run) / count / 1e3:.1f}",
                f"{last.recycled_share:.0%}",
                f"{last.accuracy:.2%}",
                "-" if reached is None else f"{reached:.0f}",
            )
        yield table


def draw(folder: Path, epochs: Sequence[Epoch]) -> list[Path]:
    """Draw accuracy against seconds for each setting, and the time of a step against the rate."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import colormaps, pyplot
    from matplotlib.ticker import PercentFormatter, ScalarFormatter

    files = []
    methods = dict.fromkeys(epoch.method for epoch in epochs)
    palette = colormaps["tab20"].colors
    colours = {method: palette[i % len(palette)] for i, method in enumerate(methods)}
    lines = {method: "--" if "LBGM" in method else "-" for method in colours}

    def save(name: str, figure: Any, axes: Any, title: str) -> None:
        axes.set_title(title, fontsize=10, loc="left")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        figure.legend(loc="outside right upper", frameon=False, fontsize=8, handlelength=3)
        figure.savefig(folder / name, dpi=130)
        pyplot.close(figure)
        files.append(folder / name)

    for (case, ranks, mbit), by_method in groups(epochs).items():
        figure, axes = pyplot.subplots(figsize=(10, 4.8), layout="constrained")
        for method, run in by_method.items():
            style = {"color": colours[method], "linestyle": lines[method], "marker": "o"}
            times = [epoch.seconds for epoch in run]
            axes.plot(times, [e.accuracy for e in run], markersize=3, label=method, **style)
        axes.set_xscale("log")
        axes.set_xlabel("training time in s (log scale)")
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.set_ylabel("test accuracy")
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        title = f"{case} batches, {ranks} ranks, {mbit:g} Mbit/s"
        save(f"accuracy-{case}-{ranks}-{mbit:g}.png", figure, axes, title)
    for (case, ranks), some in itertools.groupby(
        sorted(epochs, key=lambda e: (e.case, e.ranks)), key=lambda e: (e.case, e.ranks)
    ):
        by_method: dict[str, dict[float, float]] = {}
        for epoch in some:
            by_method.setdefault(epoch.method, {})[epoch.mbit] = epoch.seconds / epoch.steps
        figure, axes = pyplot.subplots(figsize=(10, 4.8), layout="constrained")
        for method, times in by_method.items():
            style = {"color": colours[method], "linestyle": lines[method], "marker": "o"}
            rates = sorted(times)
            axes.plot(rates, [times[rate] for rate in rates], label=method, **style)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("rate of a link in Mbit/s (log scale)")
        axes.set_ylabel("seconds a step (log scale)")
        save(f"step-{case}-{ranks}.png", figure, axes, f"{case} batches, {ranks} ranks")
    return files


# --- the command line ----------------------------------------------------------------------------


def build_parser() -> Parser:
    """Build the command line."""
    parser = Parser("link.py", __doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--rates", type=listed(float), default=[10.0, 100.0, 1000.0], metavar="LIST",
        help="rates of the links in Mbit/s (default: 10,100,1000)")  # fmt: skip
    add("--ranks", type=listed(int), default=[2, 4], metavar="LIST",
        help="numbers of ranks (default: 2,4)")  # fmt: skip
    add("--cases", type=listed(str), default=list(CASES), metavar="LIST",
        help=f"batches: {', '.join(f'{c} ({n} images a step)' for c, n in CASES.items())} "
        "(default: all)")  # fmt: skip
    add("--methods", metavar="LIST",
        help=f"methods, separated by semicolons: {', '.join(PEERS)} and compressors "
        "(default: those of the README)")  # fmt: skip
    add("--epochs", type=int, default=3, help="epochs of each run (default: 3)")
    add("--images", type=int, default=60_000, help="training images to use (default: 60000)")
    add("--lr", type=float, default=0.02, help="learning rate, momentum is 0.9 (default: 0.02)")
    add("--seed", type=int, default=0, help="seed of model and data order (default: 0)")
    add("--data-dir", metavar="DIR", help="folder of Fashion-MNIST's IDX files "
        "(default: where Debian's package dataset-fashion-mnist puts them)")  # fmt: skip
    add("--probe-only", action="store_true", help="measure the exchange alone, and train nothing")
    add("--out", type=Path, default=Path("link-results"), metavar="DIR",
        help="folder for the results (default: link-results)")  # fmt: skip
    return parser


def methods_of(options: argparse.Namespace) -> list[str]:
    """Return the methods to compare.

    Raises
    ------
    ValueError
        If there is no such method.
    """
    if options.methods is None:
        return list(METHODS)
    methods = [text.strip() for text in options.methods.split(";")]
    return [m if m in PEERS else repr(parse_compressor(m)) for m in methods]


def check(options: argparse.Namespace) -> list[str]:
    """Check everything that can be wrong before anything is made, and return the methods.

    Raises
    ------
    ValueError
        Whose message is one line.
    """
    methods = methods_of(options)
    for case in options.cases:
        if case not in CASES:
            raise ValueError(f"--cases: {case!r} is none of {', '.join(CASES)}")
    if not all(2 <= ranks <= 16 for ranks in options.ranks):
        raise ValueError("--ranks: from 2 to 16 can be connected")
    if not all(0.1 <= rate <= 10_000 for rate in options.rates):
        raise ValueError("--rates: from 0.1 to 10000 Mbit/s can be made")
    if options.epochs < 1 or options.images < max(CASES.values()):
        raise ValueError(f"--epochs starts at 1, --images at {max(CASES.values())}")
    if not options.probe_only:
        try:
            load("fashion-mnist", options.data_dir, options.seed)
        except DatasetMissing as error:
            raise ValueError(str(error)) from None
    reason = missing()
    if reason is not None:
        raise ValueError(reason)
    check_folder(options.out)
    return methods


def main(arguments: list[str]) -> int:
    """Run the command line and return the exit status."""
    # So that namespaces are removed when somebody stops the run in another way than by Ctrl-C.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    parser = build_parser()
    options = parser.parse_args(arguments)
    try:
        methods = check(options)
    except ValueError as error:
        parser.error(str(error))
    console = Console(width=None if sys.stdout.isatty() else 140)
    epochs: list[Epoch] = []
    probes: list[dict[str, Any]] = []
    interrupted = False
    trained = [] if options.probe_only else methods
    cases = options.cases[:1] if options.probe_only else options.cases
    total = len(cases) * len(options.ranks) * len(options.rates) * len(trained) * options.epochs
    progress = Progress(console=console, disable=not console.is_terminal, transient=True)
    try:
        with progress:
            bar = progress.add_task("training", total=max(total, 1))
            for case, ranks, mbit in itertools.product(cases, options.ranks, options.rates):
                task = {
                    "methods": trained,
                    "probe": case == cases[0],
                    "mbit": mbit,
                    "batch": CASES[case],
                    "epochs": options.epochs,
                    "images": options.images,
                    "lr": options.lr,
                    "seed": options.seed,
                    "data_dir": options.data_dir,
                }
                with network(ranks, mbit) as names:
                    for said in launch(names, task):
                        if "probe" in said:
                            probes.append({"ranks": ranks, "mbit": mbit, **said["probe"]})
                            continue
                        epoch = Epoch(case=case, ranks=ranks, mbit=mbit, **said)
                        epochs.append(epoch)
                        write_csv(options.out / "link.csv", epochs)
                        what = f"{case}, {ranks} ranks, {mbit:g} Mbit/s: {epoch.method}"
                        progress.update(bar, advance=1, description=what)
                        if not console.is_terminal and epoch.epoch == options.epochs:
                            console.print(f"{what}: {epoch.accuracy:.2%} in {epoch.seconds:.0f} s")
    except KeyboardInterrupt:
        interrupted = True
    except RuntimeError as error:
        console.print(f"link.py: error: {error}", style="red", soft_wrap=True)
        return 1
    for table in tables(epochs):
        console.print(table)
    if probes:
        console.print(probe_table(probes))
        console.print(where_the_link_stops(probes), soft_wrap=True)
        (options.out / "exchange.json").write_text(json.dumps(probes, indent=1) + "\n")
    if epochs:
        draw(options.out, epochs)
    console.print(f"Results are in {options.out}.", soft_wrap=True)
    return INTERRUPTED if interrupted else 0


def probe_table(probes: Sequence[dict[str, Any]]) -> Table:
    """Lay out the times of the exchange."""
    table = Table(title="The exchange by itself, ms")
    heads = ("ranks", "Mbit/s", "one rank sends 4 MB", "its time on one link", "ratio")
    for head in (*heads, "heads alone", "8-byte all-gather", "ratio"):
        table.add_column(head, justify="right")
    for p in probes:
        table.add_row(
            str(p["ranks"]),
            f"{p['mbit']:g}",
            f"{p['body_ms']:.0f}",
            f"{p['link_ms']:.0f}",
            f"{p['body_ms'] / p['link_ms']:.2f}",
            f"{p['head_ms']:.2f}",
            f"{p['eight_bytes_ms']:.2f}",
            f"{p['head_ms'] / p['eight_bytes_ms']:.2f}",
        )
    return table


def where_the_link_stops(probes: Sequence[dict[str, Any]]) -> str:
    """Say up to which rate the link, not this machine, bounds a transfer."""
    bound = [p["mbit"] for p in probes if p["body_ms"] <= 1.25 * p["link_ms"]]
    free = [p for p in probes if p["body_ms"] > 1.25 * p["link_ms"]]
    text = (
        f"The link bounds a transfer up to {max(bound):g} Mbit/s here"
        if bound
        else ("No link of this run bounds a transfer here")
    )
    if free:
        slowest = min(free, key=lambda p: p["mbit"])
        reached = slowest["mbit"] * slowest["link_ms"] / slowest["body_ms"]
        text += f"; at {slowest['mbit']:g} Mbit/s this machine reaches {reached:.0f} Mbit/s"
    return text + "."


if __name__ == "__main__":
    if "LBGM_LINK_TASK" in os.environ:
        rank_main(json.loads(os.environ["LBGM_LINK_TASK"]))
        sys.exit(0)
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
