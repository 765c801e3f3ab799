"""Python's collection of reference cycles, while many objects are made that are in none."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

__all__ = ["paused_collection"]


@contextlib.contextmanager
def paused_collection() -> Iterator[None]:
    """Let Python not look for reference cycles meanwhile.

    It would look at all objects of the process whenever their number has grown by a quarter, for
    about 0.2 s beside torch. The states of thousands of tensors, all new in each step, would let it
    do so in each step.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
