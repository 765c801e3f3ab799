"""Run a training script unchanged, and say what LBGM would have saved."""

from __future__ import annotations

import argparse
import contextlib
import gc
import math
import os
import runpy
import sys
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from lbgm_compress.compressors.lbgm import LBGM
from lbgm_compress.compressors.parse import parse_compressor
from lbgm_compress.probe.look_back_probe import DELTAS, LookBackProbe

# Of a script that makes ever new models, such as one for each fold, the first are watched.
MOST = 4


class _Watched(LookBackProbe):
    """A probe that is told of steps: torch cannot take a new hook in the middle of one."""

    def _listen(self) -> None:
        pass


class _Watch:
    """Makes a probe for the parameters of each optimizer that steps."""

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        self.arguments = arguments
        self.probes: list[_Watched] = []
        self.unwatched: str | None = None
        self._known: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
        self._handle = register_optimizer_step_pre_hook(self._stepped)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _stepped(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for probe in self.probes:
            probe.stepped(optimizer)
        if optimizer in self._known:
            return
        self._known.add(optimizer)
        watched = {id(p) for probe in self.probes for p in probe._parameters.values()}
        groups = optimizer.param_groups
        new = [p for group in groups for p in group["params"] if id(p) not in watched]
        if not new:
            return
        if len(self.probes) == MOST:
            self.unwatched = f"only the first {MOST} optimizers' parameters were watched"
            return
        try:
            self.probes.append(_Watched(_named(new), **self.arguments))
        except (TypeError, ValueError) as error:
            self.unwatched = str(error)

    def close(self) -> None:
        self._handle.remove()
        for probe in self.probes:
            probe.close()


def _named(parameters: Sequence[Tensor]) -> list[tuple[str, Tensor]]:
    """Find the parameters' names: those in the module that holds most of them."""
    identities = {id(parameter) for parameter in parameters}
    best: dict[int, str] = {}
    # Of some objects isinstance asks more than their type, and warns.
    for module in [m for m in gc.get_objects() if issubclass(type(m), nn.Module)]:
        names = {id(p): n for n, p in module.named_parameters() if id(p) in identities}
        # Of two that hold as many, the inner one has the shorter names.
        if (len(names), -sum(map(len, names.values()))) > (
            len(best),
            -sum(map(len, best.values())),
        ):
            best = names
    return [(best.get(id(p), f"parameter {i}"), p) for i, p in enumerate(parameters)]


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} are not numbers: write them as 0.05,0.2"
        ) from None


def main(arguments: Sequence[str]) -> int:
    """Run a script under a probe, print the report, and return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m lbgm_compress.probe",
        usage="%(prog)s [options] (script.py | -m module) [arguments of the script]",
        description=__doc__,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--deltas", type=_numbers, default=DELTAS, help="thresholds, as 0.05,0.2 (default: five)")
    add("--inner", default="Identity()", help="what LBGM is over (default: Identity())")
    add(
        "--cost",
        type=float,
        default=0.1,
        help="share of the time that watching may take, see LookBackProbe (default: 0.1)",
    )
    add("--csv", metavar="FILE", help="where to write the report's rows as CSV")
    add("-m", action="store_true", dest="module", help="the script is a module, as for python -m")
    add("script", help="the training script, which steps an optimizer of torch's")
    add("args", nargs=argparse.REMAINDER, help="its arguments")
    options = parser.parse_args(arguments)
    # The script may change the folder.
    script, table = Path(options.script).absolute(), None
    try:
        if not options.module and not script.is_file():
            raise ValueError(f"there is no script {options.script}")
        if options.csv is not None:
            table = Path(options.csv).absolute()
            if not table.parent.is_dir():
                raise ValueError(f"--csv {options.csv}: there is no folder {table.parent}")
        inner = parse_compressor(options.inner)
        for delta in options.deltas:
            LBGM(inner, delta)
        if not 0 < options.cost < math.inf:
            raise ValueError(f"--cost must be above 0, not {options.cost}")
    except ValueError as error:
        parser.error(str(error))
    watch = _Watch({"deltas": options.deltas, "inner": inner, "cost": options.cost})
    sys.argv = [options.script, *options.args]
    sys.path[0] = str(Path.cwd() if options.module else script.parent)
    try:
        if options.module:
            runpy.run_module(options.script, run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(str(script), run_name="__main__")
    finally:
        # Whatever the script ended with stays what it ends with.
        watch.close()
        with contextlib.suppress(BrokenPipeError):
            _tell(watch, table)
    return 0


def _tell(watch: _Watch, table: Path | None) -> None:
    names = ("RANK", "HOROVOD_RANK", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID")
    if next((os.environ[name] for name in names if name in os.environ), "0") != "0":
        return
    if not watch.probes:
        why = watch.unwatched or (
            "no optimizer of torch's has stepped in this process, and so nothing was seen"
        )
        print(f"LookBackProbe: {why}.")
    for number, probe in enumerate(watch.probes):
        report = probe.report()
        print(f"\n{report}", flush=True)
        if table is not None:
            path = table.with_stem(f"{table.stem}-{number + 1}") if number else table
            try:
                report.write_csv(path)
            except OSError as error:
                print(f"--csv {path}: {error.strerror}", file=sys.stderr)
    if watch.probes and watch.unwatched:
        print(f"LookBackProbe: {watch.unwatched}.")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
