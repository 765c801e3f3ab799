"""The arrays of an update, and the compressor of their message, as both ends know them."""

from __future__ import annotations

import fnmatch
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lbgm_compress.compressor import Compressor, check_compressor
from lbgm_compress.compressors.parse import parse_compressor
from lbgm_compress.wire.errors import PayloadError

__all__ = ["Form", "Layout", "checked_compressor", "nbytes", "shape_of", "split"]

DTYPES = {
    "float16": torch.float16,
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
NUMPY, TORCH = "numpy", "torch"


class Form(NamedTuple):
    """The form in which one array came, and in which the server restores it."""

    name: str
    library: str
    """``"numpy"`` or ``"torch"``."""
    dtype: str
    shape: tuple[int, ...]

    def restored(self, tensor: Tensor) -> Any:
        """Return a decoded tensor as the array that it stands for."""
        return tensor.numpy() if self.library == NUMPY else tensor


@dataclass(frozen=True)
class Layout:
    """The compressor of a message, and the forms of its arrays by sorted name."""

    compressor: str
    """The expression that builds it."""
    forms: tuple[Form, ...]

    def pack(self) -> bytes:
        """Return the layout as JSON, the form in which it travels."""
        head = {"compressor": self.compressor, "arrays": self.forms}
        return json.dumps(head, separators=(",", ":")).encode()

    @staticmethod
    def unpack(data: bytes) -> Layout:
        """Return the layout that `pack` made bytes of; the bytes may be anything.

        Raises
        ------
        PayloadError
            If they are not a layout.
        """
        try:
            head = json.loads(data)
            forms = tuple(
                Form(name, library, dtype, tuple(shape))
                for name, library, dtype, shape in head["arrays"]
            )
            layout = Layout(head["compressor"], forms)
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise PayloadError(f"the layout cannot be read: {error!r}") from None
        names = [form.name for form in forms]
        if not isinstance(layout.compressor, str) or not all(map(_is_valid, forms)) or not names:
            raise PayloadError("the layout names no compressor, or an array that cannot travel")
        if names != sorted(set(names)):
            raise PayloadError("the names of the layout are not sorted, or one is there twice")
        return layout

    def identifier(self) -> bytes:
        """Return a hash of the layout, 16 bytes."""
        return hashlib.blake2b(self.pack(), digest_size=16).digest()

    def likes(self) -> dict[str, Tensor]:
        """Return placeholders for the arrays, which take no memory, by name."""
        return {
            form.name: torch.empty((), dtype=DTYPES[form.dtype]).expand(form.shape)
            for form in self.forms
        }


def split(
    data: Mapping[str, Any], exclude: Sequence[str]
) -> tuple[dict[str, Tensor], tuple[Form, ...], dict[str, Any]]:
    """Return copies of the arrays to compress, their forms, and all other values.

    Compressed are dense arrays of numpy or torch of a floating-point dtype, whose names match no
    pattern of `exclude` (`fnmatch.fnmatchcase`).
    """
    tensors: dict[str, Tensor] = {}
    forms, rest = [], {}
    for name, value in sorted(data.items()):
        tensor = None
        if not any(fnmatch.fnmatchcase(name, pattern) for pattern in exclude):
            tensor = _copied(value)
        if tensor is None:
            rest[name] = value
            continue
        tensors[name] = tensor
        library = TORCH if isinstance(value, Tensor) else NUMPY
        forms.append(Form(name, library, NAMES[tensor.dtype], tuple(tensor.shape)))
    return tensors, tuple(forms), rest


def checked_compressor(compressor: Compressor | str) -> Compressor:
    """Return a compressor, or the one that an expression describes.

    Raises
    ------
    TypeError, ValueError
        If it is none, does more to an average than an aggregator would, or cannot be sent as text.
    """
    built = parse_compressor(compressor) if isinstance(compressor, str) else compressor
    check_compressor(built)
    if built.finishes_average:
        raise ValueError(
            f"{built!r} does more to an average than NVFlare's aggregators would: use "
            "SignSGD(scaled=True) in the place of a majority vote"
        )
    try:
        known = isinstance(compressor, str) or parse_compressor(repr(built)) == built
    except ValueError:
        known = False
    if not known:
        raise ValueError(
            f"{built!r} cannot be built from its text, which is what a job's configuration holds: "
            "use compressors of lbgm_compress"
        )
    assert isinstance(built, Compressor)
    return built


def shape_of(value: Any) -> tuple[int, ...] | None:
    """Return the shape of an array of numpy or torch; None for anything else."""
    return tuple(value.shape) if isinstance(value, (np.ndarray, Tensor)) else None


def nbytes(values: Mapping[str, Any]) -> int:
    """Return the size in bytes of the elements of all arrays among some values."""
    arrays = (value for value in values.values() if isinstance(value, (np.ndarray, Tensor)))
    return sum(int(array.nbytes) for array in arrays)


def _copied(value: Any) -> Tensor | None:
    """Return a copy of an array as a tensor on the CPU; None if it is not to be compressed."""
    if isinstance(value, Tensor):
        if value.dtype not in NAMES or value.layout is not torch.strided:
            return None
        return value.detach().to("cpu", copy=True)
    if type(value) is not np.ndarray or value.dtype.kind != "f" or value.dtype.name not in DTYPES:
        return None
    return torch.from_numpy(np.array(value, dtype=value.dtype.newbyteorder("="), order="C"))


def _is_valid(form: Form) -> bool:
    return (
        isinstance(form.name, str)
        and form.library in (NUMPY, TORCH)
        and isinstance(form.dtype, str)
        and form.dtype in DTYPES
        and not (form.library == NUMPY and form.dtype == "bfloat16")
        and all(type(size) is int and 0 <= size < 2**62 for size in form.shape)
    )
