"""Run a training script unchanged, and report what looking back would have saved."""

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
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from lbgm_compress.compressors.lbgm import LBGM
from lbgm_compress.compressors.parse import import_known, parse_compressor
from lbgm_compress.probe.look_back_probe import DELTAS, LookBackProbe

# A script may create new models all the time, for example one for each fold.
MAX_PROBES = 4


class _SteppedProbe(LookBackProbe):
    """A probe whose `stepped` is called by `_Probes`.

    torch cannot take a new hook on optimizer steps in the middle of one.
    """

    def _listen(self) -> None:
        pass


class _Probes:
    """Attaches a probe to the parameters of each optimizer when it first steps."""

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        self.arguments = arguments
        self.probes: list[_SteppedProbe] = []
        self.not_observed: str | None = None
        """The reason why the parameters of an optimizer are not observed, if there is one."""
        self._known: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
        self._handles = [
            register_optimizer_step_pre_hook(self._before_step),
            register_optimizer_step_post_hook(self._after_step),
        ]

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _after_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for probe in self.probes:
            probe.stepped(optimizer)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _before_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if optimizer in self._known:
            return
        self._known.add(optimizer)
        observed = {id(p) for probe in self.probes for p in probe._parameters.values()}
        groups = optimizer.param_groups
        new = [p for group in groups for p in group["params"] if id(p) not in observed]
        if not new:
            return
        if len(self.probes) == MAX_PROBES:
            self.not_observed = f"only the first {MAX_PROBES} optimizers' parameters were watched"
            return
        try:
            self.probes.append(_SteppedProbe(_named(new), **self.arguments))
        except (TypeError, ValueError) as error:
            self.not_observed = str(error)

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()
        for probe in self.probes:
            probe.close()


def _named(parameters: Sequence[Tensor]) -> list[tuple[str, Tensor]]:
    """Return the parameters with their names in the module that holds most of them."""
    identities = {id(parameter) for parameter in parameters}
    best: dict[int, str] = {}
    # isinstance() would read attributes of some objects, which warn.
    for module in [m for m in gc.get_objects() if issubclass(type(m), nn.Module)]:
        names = {id(p): n for n, p in module.named_parameters() if id(p) in identities}
        # Among modules that hold as many, the innermost has the shortest names.
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
    add("--inner", default="Identity()", help="the compressor under LBGM (default: Identity())")
    add(
        "--known",
        action="append",
        default=[],
        metavar="MODULE:CLASS",
        help="a class of your own that --inner may name, repeatable; the module is looked for in "
        "the script's folder and the working directory",
    )
    add(
        "--cost",
        type=float,
        default=0.1,
        help="share of the time that the probe may take, see LookBackProbe (default: 0.1)",
    )
    add("--csv", metavar="FILE", help="CSV file for the rows of the report")
    add("-m", action="store_true", dest="module", help="the script is a module, as for python -m")
    add("script", help="the training script, which steps an optimizer of torch's")
    add("args", nargs=argparse.REMAINDER, help="its arguments")
    options = parser.parse_args(arguments)
    # The script may change the folder.
    script, table = Path(options.script).absolute(), None
    folder = str(Path.cwd() if options.module else script.parent)
    try:
        if not options.module and not script.is_file():
            raise ValueError(f"there is no script {options.script}")
        if options.csv is not None:
            table = Path(options.csv).absolute()
            if not table.parent.is_dir():
                raise ValueError(f"--csv {options.csv}: there is no folder {table.parent}")
        inner = parse_compressor(options.inner, _import_known(options.known, folder))
        for delta in options.deltas:
            LBGM(inner, delta)
        if not 0 < options.cost < math.inf:
            raise ValueError(f"--cost must be above 0, not {options.cost}")
    except ValueError as error:
        parser.error(str(error))
    probes = _Probes({"deltas": options.deltas, "inner": inner, "cost": options.cost})
    sys.argv = [options.script, *options.args]
    sys.path[0] = folder
    try:
        if options.module:
            runpy.run_module(options.script, run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(str(script), run_name="__main__")
    finally:
        # An exception of the script goes on from here, and no other takes its place.
        probes.close()
        with contextlib.suppress(BrokenPipeError):
            _print_reports(probes, table)
    return 0


def _import_known(specs: Sequence[str], folder: str) -> list[type]:
    """Import classes from modules in the script's folder or the working directory."""
    path = list(sys.path)
    sys.path[0:1] = [folder, str(Path.cwd())]
    try:
        return import_known(specs)
    finally:
        # The script finds its modules as it does without a probe.
        sys.path[:] = path


def _print_reports(probes: _Probes, table: Path | None) -> None:
    """Print the reports, and write them as CSV, on the first rank only."""
    names = ("RANK", "HOROVOD_RANK", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID")
    if next((os.environ[name] for name in names if name in os.environ), "0") != "0":
        return
    if not probes.probes:
        reason = probes.not_observed or (
            "no optimizer of torch's has stepped in this process, and so nothing was seen"
        )
        print(f"LookBackProbe: {reason}.")
    for number, probe in enumerate(probes.probes):
        report = probe.report()
        print(f"\n{report}", flush=True)
        if table is not None:
            path = table.with_stem(f"{table.stem}-{number + 1}") if number else table
            try:
                report.write_csv(path)
            except OSError as error:
                print(f"--csv {path}: {error.strerror}", file=sys.stderr)
    if probes.probes and probes.not_observed:
        print(f"LookBackProbe: {probes.not_observed}.")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
