"""Notice of the moment in which an optimizer applies a step."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

__all__ = ["Parameters"]


class Parameters:
    """Parameters of a model, which are not kept alive, and whether they have been changed.

    A change is noticed by the call of an optimizer of torch, since fused ones leave no trace in the
    parameters, and by the version of a parameter, which counts changes in place of other code.

    Parameters
    ----------
    parameters
        The parameters.
    on_step
        A method, called after each step of an optimizer that has one of the parameters. Its object
        is not kept alive.
    """

    def __init__(self, parameters: Iterable[Tensor], on_step: Callable[[], None]) -> None:
        self._references = [weakref.ref(p) for p in parameters]
        ids = {id(ref()) for ref in self._references}
        method = weakref.WeakMethod(on_step)

        def after_step(optimizer: Any, *arguments: Any) -> None:
            call = method()
            groups = optimizer.param_groups if call is not None else []
            if call is not None and any(id(p) in ids for group in groups for p in group["params"]):
                call()

        handle = register_optimizer_step_post_hook(after_step)
        weakref.finalize(self, handle.remove)

    def versions(self) -> list[int]:
        """Return the version of each parameter."""
        return [-1 if (p := ref()) is None else p._version for ref in self._references]
