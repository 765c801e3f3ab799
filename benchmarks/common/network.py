"""Processes in network namespaces that are connected by links of a given rate."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from benchmarks.common.processes import environment

__all__ = ["launch", "missing", "network"]

PORT = 29500


def run_command(*words: str) -> None:
    """Run a command, with its output in the error that is raised if it fails."""
    subprocess.run(words, check=True, capture_output=True, text=True)


def missing() -> str | None:
    """Return the reason why this machine cannot make shaped namespaces, or None if it can."""
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
    """Return the arguments of `tc` that limit the rate at which an interface sends."""
    burst = max(32_000, int(mbit * 1e6 / 8 / 250))
    return [
        *("qdisc", "replace", "dev", interface, "root", "tbf"),
        *("rate", f"{mbit}mbit", "burst", str(burst), "latency", "100ms"),
    ]


@contextlib.contextmanager
def namespace(name: str) -> Iterator[None]:
    """Make a network namespace, and remove it at the end."""
    try:
        # Within the try: an interrupted command may have made the namespace or not.
        run_command("ip", "netns", "add", name)
        yield
    finally:
        subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


@contextlib.contextmanager
def network(ranks: int, mbit: float) -> Iterator[list[str]]:
    """Connect a namespace for each rank to a switch, by links of `mbit` Mbit/s; yield their names.

    No latency is added. Needs root, and the programs `ip` and `tc`.
    """
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


def launch(module: str, names: Sequence[str], task: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Run ``python -m module TASK`` in every namespace, with torch's variables of a rank.

    `task` is passed as JSON. Yields the lines that rank 0 prints, read as JSON.

    Raises
    ------
    RuntimeError
        If a rank fails.
    """
    variables = environment(
        GLOO_SOCKET_IFNAME="eth0",
        MASTER_ADDR="10.77.0.1",
        MASTER_PORT=str(PORT),
        WORLD_SIZE=str(len(names)),
        OMP_NUM_THREADS="1",
    )
    command = [sys.executable, "-m", module, json.dumps(task)]
    processes = []
    with tempfile.TemporaryFile("w+") as errors:
        try:
            for rank, name in enumerate(names):
                processes.append(
                    subprocess.Popen(
                        ["ip", "netns", "exec", name, *command],
                        env={**variables, "RANK": str(rank)},
                        stdout=subprocess.PIPE if rank == 0 else subprocess.DEVNULL,
                        stderr=errors,
                        text=True,
                        # A keyboard interrupt reaches this process only, which ends the ranks.
                        start_new_session=True,
                    )
                )
            assert processes[0].stdout is not None
            for line in processes[0].stdout:
                yield json.loads(line)
            if any(process.wait(timeout=60) for process in processes):
                errors.seek(0)
                lines = [line for line in errors.read().splitlines() if line.strip()]
                raise RuntimeError(f"a rank failed: {lines[-1] if lines else 'without a message'}")
        finally:
            for process in processes:
                process.kill()
                process.wait()
