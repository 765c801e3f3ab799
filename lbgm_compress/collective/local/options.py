"""Options of local training: their checks, and the parts of a model."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lbgm_compress._util.checks import check_choice, check_whole
from lbgm_compress.algorithm import check_algorithm
from lbgm_compress.collective.averager import Averager
from lbgm_compress.collective.parameters import may_have_gradient, named_pairs
from lbgm_compress.collective.transport import Transport, gather_texts

__all__ = [
    "check_optimizers",
    "check_options",
    "check_same",
    "described_buffers",
    "described_options",
    "divided",
    "parameters_of",
]

RESIDUALS = ("model", "memory")


def check_options(
    compressor: Any,
    sync_every: Any,
    residual: Any,
    fragments: Any,
    delay: Any,
    final: Any,
    accept: Any,
    weight: Any,
) -> None:
    """Raise `TypeError` or `ValueError` unless options are of their types and in their ranges."""
    for name, of in {"compressor": compressor, "final": final}.items():
        if of is None and name == "final":
            continue
        try:
            check_algorithm(of)
        except TypeError as error:
            raise TypeError(f"{name}: {error}") from None
    Averager.check_options(compressor, 0, weight, 1.0)
    check_whole("sync_every", sync_every, 1)
    check_choice("residual", residual, RESIDUALS)
    check_whole("fragments", fragments, 1)
    check_whole("delay", delay, 0)
    if fragments > sync_every:
        raise ValueError(
            f"fragments must be at most sync_every, {sync_every}, not {fragments}: at most one "
            "fragment is exchanged after each step"
        )
    if delay >= sync_every // fragments:
        raise ValueError(
            f"delay must be below {sync_every // fragments} (sync_every / fragments), not {delay}: "
            "an exchange is over before the next begins"
        )
    if accept is not None and not callable(accept):
        raise TypeError(f"accept must be a function of the averages, not {accept!r}")
    if residual == "model" and compressor.has_residual:
        raise ValueError(
            f'{compressor!r} keeps a residual, and residual="model" keeps what is not sent in the '
            'model: leave out ErrorFeedback, or give residual="memory"'
        )


def parameters_of(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters of a model that can be trained, now or unfrozen later, by name.

    Raises
    ------
    TypeError
        If the model is sharded.
    """
    for module in model.modules():
        if type(module).__name__ == "FullyShardedDataParallel":
            raise TypeError(
                "the model is sharded by FullyShardedDataParallel: local training needs whole "
                "parameters, as a plain model or DistributedDataParallel has them"
            )
    pairs = named_pairs(model.named_parameters(), "model")
    return {name: p for name, p in pairs if may_have_gradient(p)}


def check_optimizers(inner: Any, outer: Any, parameters: Mapping[str, Tensor]) -> None:
    """Raise `TypeError` or `ValueError` unless these are optimizers of the parameters.

    `outer` may be None.
    """
    known = {id(p) for p in parameters.values()}
    for name, optimizer in {"inner_optimizer": inner, "outer_optimizer": outer}.items():
        if optimizer is None and name == "outer_optimizer":
            continue
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(
                f"{name} must be a torch.optim.Optimizer, not {type(optimizer).__name__}"
            )
        if not any(id(p) in known for p in _held(optimizer)):
            raise ValueError(
                f"{name} has none of the model's parameters: build it from model.parameters()"
            )
    if inner is outer:
        raise ValueError(
            "inner_optimizer and outer_optimizer are the same object: each needs its own state"
        )
    if outer is not None:
        held = {id(p) for p in _held(outer)}
        for name, p in parameters.items():
            if p.requires_grad and id(p) not in held:
                raise ValueError(
                    f"outer_optimizer does not have the parameter {name!r}: build it from "
                    "model.parameters()"
                )


def _held(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def described_options(outer: torch.optim.Optimizer, **options: Any) -> list[str]:
    """Return a line for each option, those of the outer optimizer's groups among them."""
    lines = [f"{name} {value}" for name, value in options.items()]
    lines.append(f"outer_optimizer {type(outer).__name__}")
    for number, group in enumerate(outer.param_groups):
        place = f"group {number} " if len(outer.param_groups) > 1 else ""
        settings = {name: of for name, of in group.items() if name not in ("params", "param_names")}
        lines += [f"outer_optimizer {place}{name} {of}" for name, of in settings.items()]
    return lines


def described_buffers(model: nn.Module) -> list[str]:
    """Return a line for each tensor of the model that is shared, and is not averaged by steps."""
    lines = []
    others = {n: p for n, p in model.named_parameters() if not may_have_gradient(p)}
    for name, buffer in {**others, **dict(model.named_buffers())}.items():
        lines.append(f"buffer {name!r} of shape {tuple(buffer.shape)} and {buffer.dtype}")
    return lines


def check_same(transport: Transport, lines: Sequence[str], device: torch.device) -> None:
    """Raise `ValueError` on all ranks, which call it together, unless their lines are the same."""
    theirs = [text.split("\n") for text in gather_texts(transport, "\n".join(lines), device)]
    for rank, other in enumerate(theirs):
        for mine, line in itertools.zip_longest(theirs[0], other, fillvalue="nothing"):
            if mine != line:
                raise ValueError(
                    f"the ranks were given different options: rank 0 has {mine} where rank {rank} "
                    f"has {line}"
                )


def divided(parameters: Mapping[str, Tensor], count: int) -> list[list[str]]:
    """Divide the names of parameters, in their order, into parts of about equal size.

    Raises
    ------
    ValueError
        If there are more parts than parameters.
    """
    if count > len(parameters):
        raise ValueError(
            f"fragments must be at most the number of parameter tensors, {len(parameters)}, not "
            f"{count}"
        )
    rest = sum(p.numel() for p in parameters.values())
    names = list(parameters)
    parts: list[list[str]] = []
    for left in range(count, 0, -1):
        part = [names.pop(0)]
        size = parameters[part[0]].numel()
        while len(names) >= left:
            following = parameters[names[0]].numel()
            if left > 1 and size + following / 2 >= rest / left:
                break
            size += following
            part.append(names.pop(0))
        rest -= size
        parts.append(part)
    return parts
