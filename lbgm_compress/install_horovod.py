"""Build Horovod for the torch of this environment, install it, and try it.

``python -m lbgm_compress.install_horovod``; needs a C++ compiler, make, and the package index.

Horovod 0.28.1, its latest release, asks for C++14, and the headers of torch 2.1 and later need
C++17 (horovod/horovod issue 3996). This fetches the released source, changes that number in the
two files that have it, builds with gloo alone, and tries the result: two processes gather tensors
of unequal size. The build tools (CMake, an older setuptools) go to a temporary folder, not into the
environment. Wheels are kept by torch, Python and platform in the user's cache folder, so that the
next environment installs in seconds.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

__all__ = ["InstallError", "change_standard", "main", "wheel_folder"]

VERSION = "0.28.1"
SHA256 = "92a43f5a94c43907a56805bad15f19700c62ffc83b7ca483f9e104e229f67ef0"
FILES = ("CMakeLists.txt", "horovod/torch/CMakeLists.txt")
BEFORE, AFTER = "set(CMAKE_CXX_STANDARD 14)", "set(CMAKE_CXX_STANDARD 17)"
# CMake 4 refuses some of the bundled projects as too old; setuptools 80 lacks what setup.py calls.
BUILD_TOOLS = ("cmake==3.31.6", "setuptools==79.0.1", "wheel", "packaging", "cffi", "cloudpickle")
SETTINGS = {
    "HOROVOD_WITH_PYTORCH": "1",
    "HOROVOD_WITH_GLOO": "1",
    "HOROVOD_WITHOUT_MPI": "1",
    "HOROVOD_WITHOUT_TENSORFLOW": "1",
    "HOROVOD_WITHOUT_MXNET": "1",
}
CHECK = """
import torch
import horovod.torch as hvd

hvd.init()
rank = hvd.rank()
gathered = hvd.allgather(torch.full((rank + 1,), rank, dtype=torch.uint8))
assert gathered.tolist() == [0, 1, 1], gathered
"""


class InstallError(RuntimeError):
    """Raised if Horovod cannot be built or does not work; the message says why."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m lbgm_compress.install_horovod", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument(
        "--cache",
        type=Path,
        default=_default_cache(),
        help="folder that keeps the wheels (default: %(default)s)",
    )
    parser.add_argument("--rebuild", action="store_true", help="build even if a wheel is kept")
    parser.add_argument(
        "--constraint", type=Path, help="constraints file for what Horovod needs beside torch"
    )
    options = parser.parse_args(arguments)
    try:
        folder = wheel_folder(options.cache)
        wheels = [] if options.rebuild else sorted(folder.glob("horovod-*.whl"))
        wheel = wheels[-1] if wheels else build(folder)
        constraint = ["--constraint", str(options.constraint)] if options.constraint else []
        _run(_pip("install", *constraint, str(wheel)), "could not install the wheel")
        check()
    except InstallError as error:
        print(f"install_horovod: error: {error}", file=sys.stderr)
        return 1
    print(f"Horovod {VERSION} works: two processes gathered tensors of unequal size over gloo.")
    return 0


def wheel_folder(cache: Path) -> Path:
    """Return the folder of wheels for this torch, Python and platform.

    Raises
    ------
    InstallError
        If torch is not installed.
    """
    try:
        torch = metadata.version("torch")
    except metadata.PackageNotFoundError:
        raise InstallError("torch is not installed: Horovod is built against it") from None
    python = sys.implementation.cache_tag
    return cache / f"torch-{torch}-{python}-{sysconfig.get_platform()}"


def build(folder: Path) -> Path:
    """Build a wheel, which takes a few minutes, and keep it in `folder`.

    Raises
    ------
    InstallError
        If a tool is missing, the source cannot be fetched or has another hash, or the build fails.
    """
    if not any(map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++"))):
        raise InstallError("there is no C++ compiler: install g++ (or set CXX) first")
    if not shutil.which("make"):
        raise InstallError("there is no make: install it first")
    with tempfile.TemporaryDirectory(prefix="horovod-") as temporary:
        place = Path(temporary)
        print(f"Fetching the source of Horovod {VERSION} and its build tools ...", flush=True)
        tools = place / "tools"
        _run(
            _pip("install", "--target", str(tools), *BUILD_TOOLS),
            "could not install the tools that build Horovod",
        )
        environment = {
            **{name: value for name, value in os.environ.items() if name != "MAKEFLAGS"},
            **SETTINGS,
            "PYTHONPATH": str(tools),
            "HOROVOD_CMAKE": str(tools / "bin" / "cmake"),
            "MAKEFLAGS": f"-j{os.cpu_count() or 1}",
        }
        source = _fetch(place, environment)
        change_standard(source)
        print("Building it; this takes a few minutes ...", flush=True)
        command = _pip("wheel", "--no-build-isolation", "--no-deps", "--wheel-dir")
        _run([*command, str(place), str(source)], "the build failed", environment)
        [wheel] = place.glob("horovod-*.whl")
        folder.mkdir(parents=True, exist_ok=True)
        # In two steps, so that no other run finds half a wheel.
        partial = folder / f".{wheel.name}.{os.getpid()}"
        shutil.copyfile(wheel, partial)
        return partial.replace(folder / wheel.name)


def change_standard(source: Path) -> None:
    """Replace C++14 by C++17 in the released source.

    Raises
    ------
    InstallError
        If a file does not have the expected line once; all files are then unchanged.
    """
    texts = {}
    for name in FILES:
        path = source / name
        text = path.read_text() if path.exists() else ""
        if text.count(BEFORE) != 1:
            raise InstallError(f"{name} does not have the line {BEFORE!r}: not the known source")
        texts[path] = text.replace(BEFORE, AFTER)
    for path, text in texts.items():
        path.write_text(text)


def check() -> None:
    """Gather tensors of unequal size between two processes.

    Raises
    ------
    InstallError
        If that fails.
    """
    # Not in the working directory, where a folder may bear a package's name.
    with tempfile.TemporaryDirectory(prefix="horovod-") as temporary:
        script = Path(temporary) / "check.py"
        script.write_text(CHECK)
        horovodrun = Path(sys.executable).with_name("horovodrun")
        command = [str(horovodrun), "-np", "2", "--gloo", sys.executable, str(script)]
        path = f"{horovodrun.parent}{os.pathsep}{os.environ.get('PATH', '')}"
        environment = {**os.environ, "PATH": path}
        _run(command, "Horovod was installed but does not work", environment, limit=120)


def _fetch(place: Path, environment: dict[str, str]) -> Path:
    # pip fetches from the index that it is configured for, and compares the hash.
    pinned = place / "horovod.txt"
    pinned.write_text(f"horovod=={VERSION} --hash=sha256:{SHA256}\n")
    command = _pip("download", "--no-deps", "--no-binary", ":all:", "--no-build-isolation")
    command += ["--require-hashes", "--dest", str(place), "--requirement", str(pinned)]
    _run(command, f"could not fetch the source of Horovod {VERSION}", environment)
    [archive] = place.glob("horovod-*.tar.gz")
    with tarfile.open(archive) as file:
        # The hash has been compared, so that the members are known to be harmless.
        file.extractall(place)
    return place / f"horovod-{VERSION}"


def _default_cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "lbgm_compress"


def _pip(*arguments: str) -> list[str]:
    if importlib.util.find_spec("pip") is None:
        raise InstallError("this Python has no pip: run `python -m ensurepip` first")
    return [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]


def _run(
    command: list[str],
    failure: str,
    environment: dict[str, str] | None = None,
    limit: float | None = None,
) -> None:
    """Run a command, and raise an error with what it printed if it fails."""
    try:
        done = subprocess.run(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=limit,
        )
    except subprocess.TimeoutExpired as error:
        printed = error.stdout or ""
        tail = printed.decode(errors="replace") if isinstance(printed, bytes) else printed
        raise InstallError(f"{failure}: no end after {limit} s\n{tail[-4000:]}") from None
    except OSError as error:
        raise InstallError(f"{failure}: {command[0]}: {error.strerror}") from None
    if done.returncode:
        raise InstallError(f"{failure} (exit status {done.returncode}):\n{done.stdout[-4000:]}")


if __name__ == "__main__":
    sys.exit(main())
