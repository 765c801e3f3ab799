"""Notice of the moment in which an optimizer applies a step."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

__all__ = ["Parameters"]

# Replaced and never changed, since another thread, or the garbage collector, may add or remove one
# while a step of an optimizer goes through them.
_watching: tuple[weakref.ref[Parameters], ...] = ()
_lock = threading.Lock()


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
        self._ids = {id(ref()) for ref in self._references}
        self._on_step = weakref.WeakMethod(on_step)
        global _watching
        with _lock:
            _watching = (*(ref for ref in _watching if ref() is not None), weakref.ref(self))

    def stepped(self, optimizer: Any) -> None:
        """Call `on_step` if an optimizer that has made a step has one of the parameters."""
        call = self._on_step()
        groups = optimizer.param_groups if call is not None else []
        if call is not None and any(id(p) in self._ids for of in groups for p in of["params"]):
            call()

    def versions(self) -> list[int]:
        """Return the version of each parameter."""
        return [-1 if (p := ref()) is None else p._version for ref in self._references]


def _after_step(optimizer: Any, *arguments: Any) -> None:
    for reference in _watching:
        watching = reference()
        if watching is not None:
            watching.stepped(optimizer)


# Once, since torch's own registry must not change while it is gone through.
register_optimizer_step_post_hook(_after_step)
