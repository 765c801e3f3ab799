"""Python's search for reference cycles."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

__all__ = ["paused_collection"]


@contextlib.contextmanager
def paused_collection() -> Iterator[None]:
    """Pause the search for reference cycles, in the whole process.

    Python searches all objects when their number has grown by a quarter, which takes about 0.16 s
    in a process with torch. The new states of thousands of tensors, which are in no cycle, would
    cause that in nearly every step.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
