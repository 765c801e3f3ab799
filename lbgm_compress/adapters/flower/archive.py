"""States as bytes, without pickle."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

__all__ = ["pack_state", "unpack_state"]

TREE = "tree"


def pack_state(state: Any) -> bytes:
    """Return a nested state of dicts, lists, tensors, numbers and strings as bytes.

    They are a file of safetensors, which holds the tensors (any dtype and shape) and the structure
    around them as JSON.
    """
    tensors: dict[str, Tensor] = {}
    tree = json.dumps(_described(state, tensors)).encode()
    tensors[TREE] = torch.frombuffer(bytearray(tree), dtype=torch.uint8)
    return safetensors.torch.save(tensors)


def unpack_state(data: bytes) -> Any:
    """Return the state that `pack_state` was given; lists come back as tuples.

    Raises
    ------
    ValueError
        If the bytes are not those of a state.
    """
    try:
        tensors = safetensors.torch.load(data)
        tree = json.loads(tensors[TREE].numpy().tobytes())
        return _restored(tree, tensors)
    except (safetensors.SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"these bytes are not a saved state: {error}") from None


def _described(state: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(state, Tensor):
        name = str(len(tensors))
        tensors[name] = state.detach().cpu().clone(memory_format=torch.contiguous_format)
        return {"tensor": name}
    if isinstance(state, Mapping):
        return {"dict": [[key, _described(value, tensors)] for key, value in state.items()]}
    if isinstance(state, (list, tuple)):
        return {"list": [_described(value, tensors) for value in state]}
    if state is None or isinstance(state, (bool, int, float, str)):
        return state
    raise TypeError(f"a state holds tensors, numbers and strings, not {type(state).__name__}")


def _restored(tree: Any, tensors: dict[str, Tensor]) -> Any:
    if not isinstance(tree, dict):
        return tree
    [(kind, value)] = tree.items()
    if kind == "tensor":
        return tensors[value]
    if kind == "dict":
        return {key: _restored(item, tensors) for key, item in value}
    if kind == "list":
        return tuple(_restored(item, tensors) for item in value)
    raise ValueError(f"unknown structure {kind!r}")
