"""Models that are wrapped in DistributedDataParallel: their parameters, and how one is found."""

from __future__ import annotations

import gc

from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

__all__ = ["averaged_parameters", "ignored_parameters", "wrappers_of"]


def averaged_parameters(model: DistributedDataParallel) -> list[tuple[str, Tensor]]:
    """Return the parameters of a model by name, without those that it was told to ignore."""
    ignored = {id(p) for p in ignored_parameters(model)}
    return [(name, p) for name, p in model.named_parameters() if id(p) not in ignored]


def ignored_parameters(model: DistributedDataParallel) -> list[Tensor]:
    """Return the parameters that a model was told to ignore."""
    # Of a parameter of the outermost module, DistributedDataParallel asks for the name ".weight".
    return [
        parameter
        for name, parameter in model.module.named_parameters()
        if (name if "." in name else f".{name}") in model.parameters_to_ignore
    ]


def wrappers_of(parameter: Tensor, state: object) -> list[DistributedDataParallel]:
    """Return the models that have a parameter, of which a module that was wrapped twice has two.

    If the hook of some of them has `state`, the others are left out.
    """
    # The type of an object is asked for, since isinstance would call code of proxies.
    models = [one for one in gc.get_objects() if issubclass(type(one), DistributedDataParallel)]
    found = [m for m in models if any(p is parameter for p in m.parameters())]
    hooked = [m for m in found if any(s is state for _, s in getattr(m, "_comm_hooks", ()))]
    return hooked or found
