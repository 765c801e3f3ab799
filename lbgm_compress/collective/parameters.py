"""The parameters of a model by name, as users give them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from lbgm_compress.compressor import DTYPES

__all__ = ["NamedParameters", "may_have_gradient", "named_pairs", "zeros_of"]

NamedParameters = Iterable[tuple[str, Tensor]]
GIVE = "give model.named_parameters()"


def may_have_gradient(parameter: Tensor) -> bool:
    """Return whether a parameter can have a gradient that is compressed, now or unfrozen later."""
    return parameter.requires_grad or parameter.dtype in DTYPES


def named_pairs(named_parameters: Any) -> list[tuple[str, Tensor]]:
    """Return pairs of names and parameters.

    Raises
    ------
    TypeError, ValueError
        If something else is given: the error names the mistake and the right call.
    """
    if isinstance(named_parameters, torch.nn.Module):
        found = type(named_parameters).__name__
        raise TypeError(f"named_parameters is the model itself, a {found}: {GIVE}")
    if isinstance(named_parameters, Mapping):
        raise TypeError(
            "named_parameters is a mapping, such as state_dict() returns, whose tensors need not "
            f"be the parameters: {GIVE}"
        )
    if not isinstance(named_parameters, Iterable):
        raise TypeError(f"named_parameters is a {type(named_parameters).__name__}: {GIVE}")
    pairs = list(named_parameters)
    if not pairs:
        raise ValueError(
            "named_parameters has no parameter that requires a gradient, for it is empty: if it is "
            "an iterator that was used before, call model.named_parameters() again"
        )
    names = set()
    for pair in pairs:
        if isinstance(pair, Tensor):
            raise TypeError(
                f"named_parameters has tensors without names, as model.parameters() has: {GIVE}"
            )
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise TypeError(f"named_parameters has {pair!r} in the place of a pair: {GIVE}")
        name, parameter = pair
        if not isinstance(name, str) or not isinstance(parameter, Tensor):
            raise TypeError(
                f"named_parameters has a pair of {type(name).__name__} and "
                f"{type(parameter).__name__} in the place of a name and a parameter: {GIVE}"
            )
        if name in names:
            raise ValueError(
                f"named_parameters has two parameters of the name {name!r}: give those of one model"
            )
        if hasattr(parameter, "device_mesh"):
            raise TypeError(
                f"parameter {name!r} is a DTensor, as fully_shard makes them: compression needs "
                "whole parameters, as DistributedDataParallel has them"
            )
        names.add(name)
    return [(name, parameter) for name, parameter in pairs]


def zeros_of(parameter: Tensor) -> Tensor:
    """Return zeros in the shape of a parameter, which take the memory of one element."""
    return parameter.detach().new_zeros(()).expand(parameter.shape)
