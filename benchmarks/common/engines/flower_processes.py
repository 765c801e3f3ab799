"""A SuperLink and SuperNodes on the loopback, all of which end together."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.common.processes import environment

__all__ = ["Federation", "federation", "free_port"]


def free_port() -> int:
    """Return a free port of the loopback."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


class Federation:
    """A SuperLink, its SuperNodes and its runs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.started: list[subprocess.Popen[bytes]] = []
        self.home = folder / "home"
        self.home.mkdir()
        self.environment = environment(
            FLWR_HOME=str(self.home),
            FLOWER_JOB_STATE=str(folder / "state"),
            OMP_NUM_THREADS="1",
        )
        self.port = free_port()
        (self.home / "config.toml").write_text(
            '[superlink]\ndefault = "loopback"\n\n[superlink.loopback]\n'
            f'address = "127.0.0.1:{self.port}"\ninsecure = true\n'
        )

    def start(self, simulation: bool) -> None:
        """Start the SuperLink, and wait until it is healthy."""
        link = ["flower-superlink", "--insecure", "--host", "127.0.0.1", "--port", str(self.port)]
        link += ["--disable-runtime-dependency-installation"]
        superlink = self.spawn([*link, *(["--simulation"] if simulation else [])], "superlink")
        deadline = time.monotonic() + 60
        while not self._healthy():
            assert time.monotonic() < deadline, self.log("superlink")
            assert superlink.poll() is None, self.log("superlink")
            time.sleep(0.2)

    def _healthy(self) -> bool:
        with contextlib.suppress(OSError):
            url = f"http://127.0.0.1:{self.port}/health"
            with urllib.request.urlopen(url, timeout=1) as answer:
                return answer.status == 200
        return False

    def spawn(self, command: list[str], name: str) -> subprocess.Popen[bytes]:
        scripts = Path(sys.executable).parent
        with (self.folder / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                [str(scripts / command[0]), *command[1:]],
                env={**self.environment, "FLOWER_PROCESS": f"{self.folder}/{name}"},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self.folder,
                start_new_session=True,
            )
        self.started.append(process)
        return process

    def supernode(self, partition: int, of: int, through: int | None = None) -> str:
        """Start a SuperNode, and return its name."""
        name = f"supernode-{partition}-{time.monotonic_ns()}"
        command = ["flower-supernode", "--insecure", "--port", str(free_port())]
        command += ["--superlink", f"127.0.0.1:{through or self.port}"]
        command += ["--node-config", f"partition-id={partition} num-partitions={of}"]
        self.spawn(command, name)
        return name

    def start_run(self, app: Path, config: Mapping[str, Any], *options: str) -> Any:
        """Submit an app, and return the process that follows its run until the end."""
        path = self.folder / "run.toml"
        lines = []
        for key, value in config.items():
            text = f'"{value}"' if isinstance(value, str) else str(value).lower()
            lines.append(f"{key} = {text}\n")
        path.write_text("".join(lines))
        command = ["flwr", "run", str(app), "--stream", "--run-config", str(path), *options]
        return self.spawn(command, "run")

    def run(self, app: Path, config: Mapping[str, Any], *options: str, timeout: float) -> str:
        """Run an app to its end, and return its log."""
        process = self.start_run(app, config, *options)
        try:
            process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"no end after {timeout} s:\n{self.logs()}") from None
        assert process.returncode == 0, self.logs()
        return self.log("run")

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def logs(self) -> str:
        names = [path.stem for path in self.folder.glob("*.log")]
        return "\n".join(f"--- {name}\n{self.log(name)[-3000:]}" for name in names)

    def processes(self, name: str = "") -> list[int]:
        """Return the ids of the processes that have this name, and of all their children."""
        mark = f"FLOWER_PROCESS={self.folder}/{name}".encode()
        found = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                if any(v.startswith(mark) for v in path.read_bytes().split(b"\0")):
                    status = (path.parent / "stat").read_text().rpartition(")")[2].split()[0]
                    if status != "Z":
                        found.append(int(path.parent.name))
        return found

    def kill(self, name: str = "") -> None:
        """End the processes of `processes` by SIGKILL, until none is left."""
        deadline = time.monotonic() + 20
        while processes := self.processes(name):
            assert time.monotonic() < deadline, f"{processes} do not end"
            for process in processes:
                with contextlib.suppress(OSError):
                    os.kill(process, signal.SIGKILL)
            for child in self.started:
                child.poll()
            time.sleep(0.05)


@contextlib.contextmanager
def federation(folder: Path, simulation: bool = False) -> Iterator[Federation]:
    """Yield a running SuperLink; at the end, kill it and all processes that belong to it."""
    made = Federation(folder)
    try:
        made.start(simulation)
        yield made
    finally:
        made.kill()
        assert not made.processes()
