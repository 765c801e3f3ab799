"""Helpers of `Sender` and `Receiver`: names, digests and saved states."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "STATE_FORMAT",
    "check_entry",
    "check_state",
    "check_targets",
    "check_unchanged",
    "copied",
    "identifiers_of",
    "on_device",
    "packed_identifiers",
    "sorted_names",
    "tensor_bytes",
]

STATE_FORMAT = 1


def sorted_names(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the names in the order of a message; raise an error if there are none."""
    if not isinstance(tensors, Mapping):
        raise TypeError(
            f"expected a mapping from names to tensors, such as {{name: p.grad for name, p in "
            f"model.named_parameters()}}, not {type(tensors).__name__}"
        )
    if not tensors:
        raise ValueError("there are no tensors")
    for name in tensors:
        if not isinstance(name, str):
            raise TypeError(f"a tensor's name is a str, not {name!r}")
    return sorted(tensors)


def identifiers_of(digest: Tensor, count: int) -> tuple[int, ...]:
    """Return the identifiers in a receiver's digest for `count` tensors."""
    if digest.dtype != torch.uint8 or digest.numel() != 8 * count:
        raise ValueError(
            f"a digest for {count} tensors has {8 * count} bytes (uint8), not "
            f"{digest.numel()} of {digest.dtype}"
        )
    return struct.unpack(f"<{count}Q", digest.cpu().numpy().tobytes())


def packed_identifiers(identifiers: Iterable[int]) -> Tensor:
    """Return a digest: the identifiers as flat uint8 on the CPU, eight bytes each."""
    numbers = list(identifiers)
    data = bytearray(struct.pack(f"<{len(numbers)}Q", *numbers))
    return torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)


def check_state(state: Mapping[str, Any], compressor: str, keys: tuple[str, ...]) -> None:
    """Raise `ValueError` unless `state` has these keys, this format and this compressor."""
    if not isinstance(state, Mapping) or not {"format", "compressor", *keys} <= set(state):
        raise ValueError("this is not a state that state_dict() of this class returned")
    if state["format"] != STATE_FORMAT:
        raise ValueError(
            f"the state has format {state['format']}, this release reads {STATE_FORMAT}"
        )
    if state["compressor"] != compressor:
        raise ValueError(
            f"the state is that of {state['compressor']}, and this end uses {compressor}"
        )


def check_unchanged(name: str, grad: Tensor, entry: Mapping[str, Any]) -> None:
    """Raise `ValueError` unless a gradient has the shape and dtype that its entry has."""
    shape, dtype = grad.shape, str(grad.dtype)
    if shape != entry["shape"] or dtype != entry["dtype"]:
        found, expected = (tuple(shape), dtype), (entry["shape"], entry["dtype"])
        raise ValueError(
            f"the gradient {name!r} has shape and dtype {found}, before it had {expected}: "
            "use a new Sender for another model"
        )


def check_targets(into: Mapping[str, Tensor], likes: Mapping[str, Tensor]) -> None:
    """Raise `ValueError` unless `into` has a tensor of the right shape for each of `likes`."""
    for name, like in likes.items():
        if name not in into:
            raise ValueError(f"there is no tensor {name!r} to add to")
        if into[name].shape != like.shape:
            raise ValueError(
                f"the tensor {name!r} to add to has shape {tuple(into[name].shape)}, "
                f"expected {tuple(like.shape)}"
            )


def check_entry(name: str, entry: Any, keys: set[str], owner: str) -> None:
    """Raise `ValueError` unless what a state holds of a tensor has these keys."""
    if not isinstance(entry, Mapping) or set(entry) != keys:
        raise ValueError(f"the state of tensor {name!r} is not that of {owner}")


def copied(tensors: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return new dicts with the entries of each tensor; what they hold is shared."""
    return {name: dict(entry) for name, entry in tensors.items()}


def on_device(state: Any, device: torch.device) -> Any:
    """Return a nested mapping with all its tensors on `device`; what is there is shared."""
    if isinstance(state, Tensor):
        return state.to(device)
    if isinstance(state, Mapping):
        return {name: on_device(value, device) for name, value in state.items()}
    return state


def tensor_bytes(state: Any) -> int:
    """Return the size in bytes of all tensors in a nested mapping."""
    if isinstance(state, Tensor):
        return state.numel() * state.element_size()
    return sum(map(tensor_bytes, state.values())) if isinstance(state, Mapping) else 0
