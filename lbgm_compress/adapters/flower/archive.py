"""States as bytes in the format of safetensors, without pickle."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from lbgm_compress._util.files import atomic_write
from lbgm_compress.wire.values import as_bytes

__all__ = ["pack_state", "unpack_state", "write_state"]

TREE, CHECK = "tree", "check"


def pack_state(state: Any) -> bytes:
    """Return a nested state of dicts, lists, tensors, numbers and strings as bytes.

    The bytes are a file of safetensors with the tensors (of any dtype and shape), the structure
    around them as JSON, and a BLAKE2b hash of everything.
    """
    tensors: dict[str, Tensor] = {}
    tree = json.dumps(_to_tree(state, tensors)).encode()
    tensors[TREE] = torch.frombuffer(bytearray(tree), dtype=torch.uint8)
    tensors[CHECK] = _check(tensors)
    return safetensors.torch.save(tensors)


def unpack_state(data: bytes) -> Any:
    """Return the state that `pack_state` made bytes of; lists come back as tuples.

    Raises
    ------
    ValueError
        If the bytes are not those of a state, or have changed.
    """
    try:
        tensors = safetensors.torch.load(data)
        if not torch.equal(tensors.pop(CHECK), _check(tensors)):
            raise ValueError("they have changed since they were written")
        return _from_tree(json.loads(tensors[TREE].numpy().tobytes()), tensors)
    except (
        *(safetensors.SafetensorError, KeyError, TypeError, ValueError, RecursionError),
        RuntimeError,
    ) as error:
        raise ValueError(f"these bytes are not a saved state: {error}") from None


def write_state(path: Path, state: Any) -> None:
    """Write a state to a file that only its owner may read."""
    atomic_write(path, pack_state(state), mode=0o600)


def _check(tensors: Mapping[str, Tensor]) -> Tensor:
    """Return a hash of names, dtypes, shapes and elements."""
    hashed = hashlib.blake2b(digest_size=16)
    for name in sorted(tensors):
        tensor = tensors[name]
        hashed.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        hashed.update(as_bytes(tensor).numpy().tobytes())
    return torch.frombuffer(bytearray(hashed.digest()), dtype=torch.uint8)


def _to_tree(state: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(state, Tensor):
        name = str(len(tensors))
        tensors[name] = state.detach().cpu().clone(memory_format=torch.contiguous_format)
        return {"tensor": name}
    if isinstance(state, Mapping):
        return {
            "dict": [
                [_to_tree(key, tensors), _to_tree(value, tensors)] for key, value in state.items()
            ]
        }
    if isinstance(state, (list, tuple)):
        return {"list": [_to_tree(value, tensors) for value in state]}
    if isinstance(state, int) and abs(state) >= 2**32:
        # Random identifiers all take the same space.
        return {"hex": format(state, "016x")}
    if state is None or isinstance(state, (bool, int, float, str)):
        return state
    raise TypeError(f"a state holds tensors, numbers and strings, not {type(state).__name__}")


def _from_tree(tree: Any, tensors: dict[str, Tensor]) -> Any:
    if not isinstance(tree, dict):
        return tree
    [(kind, value)] = tree.items()
    if kind == "tensor":
        return tensors[value]
    if kind == "dict":
        return {_from_tree(key, tensors): _from_tree(item, tensors) for key, item in value}
    if kind == "hex":
        return int(value, 16)
    if kind == "list":
        return tuple(_from_tree(item, tensors) for item in value)
    raise ValueError(f"unknown structure {kind!r}")
