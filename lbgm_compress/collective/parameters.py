"""The parameters of a model by name, as users give them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from lbgm_compress.compressor import DTYPES

__all__ = ["NamedParameters", "may_have_gradient", "named_pairs", "zeros_of"]

NamedParameters = Iterable[tuple[str, Tensor]]


def may_have_gradient(parameter: Tensor) -> bool:
    """Return whether a parameter can have a gradient that is compressed, now or unfrozen later."""
    return parameter.requires_grad or parameter.dtype in DTYPES


def named_pairs(
    named_parameters: Any, argument: str = "named_parameters"
) -> list[tuple[str, Tensor]]:
    """Return pairs of names and parameters.

    Raises
    ------
    TypeError, ValueError
        If something else is given: the error names the mistake, the `argument` and the right call.
    """
    give = "give model.named_parameters()"
    if isinstance(named_parameters, torch.nn.Module):
        found = type(named_parameters).__name__
        raise TypeError(f"{argument} is the model itself, a {found}: {give}")
    if isinstance(named_parameters, Mapping):
        raise TypeError(
            f"{argument} is a mapping, such as state_dict() returns, whose tensors need not be the "
            f"parameters: {give}"
        )
    if not isinstance(named_parameters, Iterable):
        raise TypeError(f"{argument} is of type {type(named_parameters).__name__}: {give}")
    pairs = list(named_parameters)
    if not pairs:
        raise ValueError(
            f"{argument} is empty, and so has no parameter that requires a gradient: if it is an "
            "iterator that was used before, call model.named_parameters() again"
        )
    names: dict[str, Tensor] = {}
    first: dict[int, str] = {}
    for pair in pairs:
        if isinstance(pair, Tensor):
            raise TypeError(
                f"{argument} has tensors without names, as model.parameters() has: {give}"
            )
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise TypeError(f"{argument} has {pair!r} in the place of a pair: {give}")
        name, parameter = pair
        if not isinstance(name, str) or not isinstance(parameter, Tensor):
            raise TypeError(
                f"{argument} has a pair of {type(name).__name__} and {type(parameter).__name__} in "
                f"the place of a name and a parameter: {give}"
            )
        if name in names:
            raise ValueError(
                f"{argument} has two parameters of the name {name!r}: give those of one model"
            )
        if id(parameter) in first:
            raise ValueError(
                f"{argument} has one parameter under two names, {first[id(parameter)]!r} and "
                f"{name!r}: {give}, which has each once"
            )
        if hasattr(parameter, "device_mesh"):
            raise TypeError(
                f"parameter {name!r} is a DTensor, as fully_shard makes them: compression needs "
                "whole parameters, as DistributedDataParallel has them; for models of fully_shard "
                "take lbgm_compress.adapters.fsdp"
            )
        names[name], first[id(parameter)] = parameter, name
    return list(names.items())


def zeros_of(parameter: Tensor) -> Tensor:
    """Return zeros in the shape of a parameter, which take the memory of one element."""
    return parameter.detach().new_zeros(()).expand(parameter.shape)
