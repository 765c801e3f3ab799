"""A compressor of GRACE's as one of this package.

A payload consists of:

- for each attribute of the GRACE compressor that counts its calls, in the order of their names:
  eight bytes (signed, lowest first);
- one byte: the number of tensors;
- for each tensor: one byte for the dtype (its index in `DTYPES`), one byte for the number of
  dimensions, and each dimension as unsigned LEB128;
- the elements of all tensors.
"""

from __future__ import annotations

import copy
import inspect
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lbgm_compress.compressor import Compressor, Encoding, PayloadError, State, raw
from lbgm_compress.decoded import Decoded, Dense
from lbgm_compress.wire.bits import read_varints, varint
from lbgm_compress.wire.message import Kind
from lbgm_compress.wire.values import as_bytes, from_bytes

__all__ = ["FromGrace"]

DTYPES = (
    *(torch.float32, torch.float16, torch.bfloat16, torch.float64),
    *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool),
)
# GRACE's compressors keep their own state of a tensor under its name. Here every tensor has a state
# of its own, and all have the same name.
NAME = "tensor"
REFUSED = {
    "PowerSGDCompressor": "it communicates inside compress(): use PyTorch's PowerSGD hook, or "
    "Atomo(rank)",
    "EFSignSGDCompressor": "its average is divided by a learning rate that only its own memory "
    "multiplies in: use ErrorFeedback(SignSGD(scaled=True))",
    "DgcMemory": "it communicates inside compensate(), and is a memory: use "
    "ErrorFeedback(FromGrace(DgcCompressor(ratio)))",
}


class Template(NamedTuple):
    """The part of a GRACE compressor's result that depends on the shape alone."""

    tensors: list[Tensor]
    ctx: Any


@dataclass(frozen=True, repr=False)
class FromGrace(Compressor):
    """A compressor of GRACE's as one of this package: ``LBGM(FromGrace(TopKCompressor(0.01)))``.

    Attributes that the GRACE compressor changes (a momentum, a count of calls) are taken out of it
    and become state. Its random numbers come from a generator that is seeded by the state. The
    context that it makes for `decompress` does not travel: a receiver makes it again, from the
    shape and the counts.

    Two are equal if their GRACE compressors are of one class and were built with equal arguments.

    Parameters
    ----------
    compressor
        Any compressor of ``grace_dl.torch`` or ``grace_dl.dist`` that does not communicate. It is
        copied.

    Raises
    ------
    TypeError
        If it is not a compressor of GRACE's, or one that cannot be used here.

    Notes
    -----
    `lbgm_compress.parse_compressor` reads the repr back where it is given the classes:
    ``known=[FromGrace, TopKCompressor]``.
    """

    compressor: Any = field(compare=False)
    expression: str = field(init=False)
    """The expression that builds the GRACE compressor."""
    origin: str = field(init=False)
    """The module and the name of its class."""
    _counts: tuple[str, ...] = field(init=False, compare=False)
    _templates: dict[Any, Template] = field(init=False, compare=False)

    def __post_init__(self) -> None:
        kind = type(self.compressor)
        if kind.__name__ in REFUSED:
            raise TypeError(f"{kind.__name__} cannot be used here: {REFUSED[kind.__name__]}")
        if hasattr(self.compressor, "compensate"):
            raise TypeError(
                f"{kind.__name__} is a memory of GRACE's, not a compressor: use ErrorFeedback("
                "FromGrace(compressor)) for one that feeds errors back"
            )
        methods = ("compress", "decompress", "aggregate")
        callables = all(callable(getattr(self.compressor, name, None)) for name in methods)
        if not callables or not hasattr(self.compressor, "average"):
            raise TypeError(f"FromGrace wraps a GRACE compressor, not {self.compressor!r}")
        put = object.__setattr__
        put(self, "compressor", copy.deepcopy(self.compressor))
        put(self, "expression", _expression(self.compressor))
        put(self, "origin", f"{kind.__module__}.{kind.__qualname__}")
        put(self, "_templates", {})
        put(self, "_counts", ())
        changed = self._run(torch.ones(4), {}, 0)[2]
        counts = [name for name, value in changed.items() if type(value) is int]
        put(self, "_counts", tuple(sorted(counts)))

    def __repr__(self) -> str:
        return f"FromGrace({self.expression})"

    def initial_state(self, seed: int) -> State:
        return {"seed": seed, "round": 0}

    @property
    def finishes_average(self) -> bool:
        return not self.compressor.average

    def finish(self, mean: Tensor) -> Tensor:
        if self.compressor.average:
            return mean
        finished: Tensor = self.compressor.aggregate([mean])
        return finished.to(mean.dtype)

    def encode(self, grad: Tensor, state: State) -> Encoding:
        if grad.numel() == 0:
            return raw(self, grad, state)
        attributes = state.get("attributes", {})
        seed, number = state.get("seed", 0), state.get("round", 0)
        # Rounds must not share their randomness, as tensors do not (see Sender).
        tensors, ctx, changed = self._run(_wide(grad), attributes, hash((seed, number)) % 2**62)
        counts = [self._count(attributes, name) for name in self._counts]
        known = self._template(counts, grad).ctx
        decoded = self._decompress(tensors, known, grad)
        if not _same(ctx, known) and not torch.equal(decoded, self._decompress(tensors, ctx, grad)):
            raise TypeError(
                f"{self.expression} needs its own context to decompress, and no receiver has it"
            )
        front = struct.pack(f"<{len(counts)}qB", *counts, len(tensors))
        for tensor in tensors:
            front += bytes([DTYPES.index(tensor.dtype), tensor.dim()])
            front += b"".join(varint(size) for size in tensor.shape)
        new = {"seed": seed, "round": number + 1}
        if changed:
            new["attributes"] = changed

        def body() -> Tensor:
            head = torch.frombuffer(bytearray(front), dtype=torch.uint8).to(grad.device)
            return torch.cat([head, *(as_bytes(t.contiguous()).to(grad.device) for t in tensors)])

        return Encoding(bytes([Kind.BODY]), body, Dense(decoded), new)

    def decode(
        self, head: bytes, body: Tensor, state: State, like: Tensor
    ) -> tuple[Decoded, State]:
        fixed = 8 * len(self._counts) + 1
        front = body[: fixed + 1024].cpu().numpy().tobytes()
        if len(front) < fixed:
            raise PayloadError(f"the payload has {len(front)} bytes, its front alone {fixed}")
        *counts, number = struct.unpack_from(f"<{len(self._counts)}qB", front)
        try:
            template = self._template(counts, like)
        except (RuntimeError, ValueError, OverflowError) as error:
            raise PayloadError(f"{self.expression} refuses the counts {counts}: {error}") from None
        if number != len(template.tensors):
            raise PayloadError(
                f"{number} tensors where {self.expression} makes {len(template.tensors)}"
            )
        shapes, position = [], fixed
        for expected in template.tensors:
            if front[position : position + 2] != bytes(
                [DTYPES.index(expected.dtype), expected.dim()]
            ):
                raise PayloadError(f"a tensor is not of {expected.dtype}, {expected.dim()}-d")
            sizes, used = read_varints(front[position + 2 :], expected.dim())
            position += 2 + used
            self._check_shape(sizes, expected, like)
            shapes.append(sizes)
        tensors = []
        for shape, expected in zip(shapes, template.tensors, strict=True):
            count = expected.dtype.itemsize
            for size in shape:
                count *= size
            part = body[position : position + count]
            if part.numel() != count:
                raise PayloadError(f"a tensor of shape {shape} is cut off")
            if expected.dtype == torch.bool:
                part = (part != 0).to(torch.uint8)
            tensors.append(from_bytes(part, expected.dtype).view(shape))
            position += count
        if position != body.numel():
            raise PayloadError(f"{body.numel() - position} bytes follow the last tensor")
        try:
            return Dense(self._decompress(tensors, template.ctx, like)), state
        except PayloadError:
            raise
        except Exception as error:
            raise PayloadError(f"{self.expression} cannot decompress: {error}") from None

    def _check_shape(self, sizes: Sequence[int], expected: Tensor, like: Tensor) -> None:
        """Raise unless a shape fits the template, whose first dimension may vary."""
        found, wanted = tuple(sizes), tuple(expected.shape)
        if found == wanted:
            return
        free = not self.compressor.tensors_size_are_same
        if not free or not found or found[1:] != wanted[1:] or found[0] > like.numel():
            raise PayloadError(f"a tensor has shape {found}, expected {wanted}")

    def _run(
        self, tensor: Tensor, attributes: Mapping[str, Any], seed: int
    ) -> tuple[list[Tensor], Any, dict[str, Any]]:
        """Compress with a copy of the GRACE compressor that has these attributes.

        Returns the tensors, the context, and the attributes that differ from the original's.
        """
        machine = copy.deepcopy(self.compressor)
        vars(machine).update(copy.deepcopy(dict(attributes)))
        devices = [tensor.device] if tensor.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            tensors, ctx = machine.compress(tensor, NAME)
        first = vars(self.compressor)
        changed = {k: v for k, v in vars(machine).items() if not _same(v, first.get(k))}
        for name, value in changed.items():
            if not _plain(value):
                raise TypeError(f"{self.expression} keeps {name}, which is more than tensors")
        tensors = [tensor.detach() for tensor in tensors]
        for tensor in tensors:
            if tensor.dtype not in DTYPES or tensor.dim() > 8:
                raise TypeError(f"{self.expression} makes a tensor of {tensor.dtype}")
        return tensors, ctx, changed

    def _template(self, counts: Sequence[int], like: Tensor) -> Template:
        key = (tuple(like.shape), like.dtype, str(like.device))
        if key in self._templates:
            return self._templates[key]
        shape = like.shape or (1,)
        ones = _wide(torch.ones(shape, dtype=like.dtype, device=like.device))
        tensors, ctx, _ = self._run(ones, dict(zip(self._counts, counts, strict=True)), 0)
        # One element stands for all, which saves the memory of the tensors.
        tensors = [torch.empty((), dtype=t.dtype).expand(t.shape) for t in tensors]
        template = Template(tensors, ctx)
        if not self._counts and not _holds_tensors(ctx):
            self._templates[key] = template
        return template

    def _decompress(self, tensors: Sequence[Tensor], ctx: Any, like: Tensor) -> Tensor:
        # Only on the CPU is an index out of range an error that can be caught.
        indices = any(tensor.dtype in (torch.int32, torch.int64) for tensor in tensors)
        if indices and not _holds_tensors(ctx):
            tensors = [tensor.cpu() for tensor in tensors]
        result = copy.copy(self.compressor).decompress([t.clone() for t in tensors], ctx)
        if result.numel() != like.numel():
            raise PayloadError(f"{result.numel()} elements for a tensor of {like.numel()}")
        wide: Tensor = result.detach()
        return wide.reshape(like.shape).to(device=like.device, dtype=like.dtype)

    def _count(self, attributes: Mapping[str, Any], name: str) -> int:
        return int(attributes.get(name, getattr(self.compressor, name)))


def _wide(grad: Tensor) -> Tensor:
    """Return a copy in float32 at least, of one dimension at least."""
    wide = grad.float() if grad.dtype.itemsize < 4 else grad.clone()
    return wide.contiguous().view(grad.shape or (1,))


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        alike = isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape
        return alike and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        return len(a) == len(b) and all(map(_same, a, b))
    return type(a) is type(b) and bool(a == b)


def _plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(isinstance(key, (str, int)) and _plain(item) for key, item in value.items())
    return value is None or isinstance(value, (bool, int, float, str, Tensor))


def _holds_tensors(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return any(map(_holds_tensors, value))
    return isinstance(value, Tensor)


def _expression(compressor: Any) -> str:
    """Return the expression that builds a GRACE compressor, from its attributes.

    Raises
    ------
    TypeError
        If an argument of its constructor is not kept in an attribute of the same name.
    """
    kind, attributes = type(compressor), vars(compressor)
    if kind.__init__ is object.__init__:
        return f"{kind.__name__}()"
    texts = []
    for parameter in inspect.signature(kind).parameters.values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if parameter.name not in attributes:
            raise TypeError(
                f"{kind.__name__} does not keep its argument {parameter.name} in an attribute of "
                "that name, so that nothing says how to build it"
            )
        value = attributes[parameter.name]
        bare = parameter.default is parameter.empty
        if bare or value != parameter.default:
            texts.append(repr(value) if bare else f"{parameter.name}={value!r}")
    return f"{kind.__name__}({', '.join(texts)})"
