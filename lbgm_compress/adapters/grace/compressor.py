"""Compressors of this package for GRACE, and GRACE's for this package.

GRACE (sands-lab/grace, packages ``grace_dl.torch`` for Horovod and ``grace_dl.dist`` for
torch.distributed) is on no package index; its users have a checkout. Nothing of it is imported
here: both directions keep to its protocol.

- `GraceCompressor` makes a compressor of ours one of GRACE's, for its Allgather.
- `FromGrace` makes one of GRACE's a compressor of ours, so that LBGM can stand over it.

A payload of `FromGrace`, byte by byte: eight bytes (signed, lowest first) for each attribute of the
GRACE compressor that counts its calls, in the order of their names; one byte with the number of
tensors; for each of them one byte for the dtype (its place in `DTYPES`), one for the number of
dimensions, and each dimension as unsigned LEB128; then the elements of all tensors.
"""

from __future__ import annotations

import copy
import inspect
import struct
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lbgm_compress.compressor import Compressor, Encoding, PayloadError, State, owned, raw
from lbgm_compress.decoded import Decoded, Dense
from lbgm_compress.endpoints import Receiver, Sender, TensorReport
from lbgm_compress.wire.bits import read_varints, varint
from lbgm_compress.wire.message import Kind
from lbgm_compress.wire.values import as_bytes, from_bytes

__all__ = ["FromGrace", "GraceCompressor"]

DTYPES = (
    *(torch.float32, torch.float16, torch.bfloat16, torch.float64),
    *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool),
)
# GRACE's compressors keep what they remember by tensor under its name; here each has its own.
NAME = "tensor"
REFUSED = {
    "PowerSGDCompressor": "it communicates inside compress(): use PyTorch's PowerSGD hook, or "
    "Atomo(rank)",
    "EFSignSGDCompressor": "its average is divided by a learning rate that only its own memory "
    "multiplies in: use ErrorFeedback(SignSGD(scaled=True))",
    "DgcMemory": "it communicates inside compensate(), and is a memory: use "
    "ErrorFeedback(FromGrace(DgcCompressor(ratio)))",
}
RANKS = 1 << 16


class Context(NamedTuple):
    """What `GraceCompressor.compress` leaves for `GraceCompressor.decompress`."""

    name: str
    rank: int
    payload: Tensor
    decoded: Tensor


class GraceCompressor:
    """A compressor of ours with the methods of GRACE's.

    ``Allgather(GraceCompressor(LBGM(TopK(0.01))), NoneMemory(), world_size)`` works as with any
    compressor of GRACE's, and so does ``ResidualMemory``. A payload is this rank's number (two
    bytes, lowest first) and a message, since GRACE hands the payloads of all ranks to the same
    `decompress`. What decodes its own payload again, as memories do, changes no state.

    Parameters
    ----------
    compressor
        What all ranks use.
    rank
        This rank; Horovod or torch.distributed is asked for it at the first tensor unless given.

    Attributes
    ----------
    average : bool
        False: `aggregate` averages.
    tensors_size_are_same : bool
        Whether payloads have one size on all ranks, as Broadcast and ``grace_dl.dist`` on the CPU
        need: only for compressors of `fixed_size`.

    Raises
    ------
    TypeError
        If `compressor` is none.
    """

    average = False

    def __init__(self, compressor: Compressor, rank: int | None = None) -> None:
        self.sender = Sender(compressor, seed=0 if rank is None else rank)
        self.compressor = compressor
        self.tensors_size_are_same = compressor.fixed_size
        self._rank = rank
        self._receivers: dict[str, Receiver] = {}

    def compress(self, tensor: Tensor, name: str) -> tuple[list[Tensor], Context]:
        """Compress a gradient.

        Returns
        -------
        tensors
            A list of one flat uint8 tensor.
        ctx
            For `decompress`.

        Raises
        ------
        TypeError, ValueError
            If a communicator calls whose collectives cannot carry messages, the tensor is no
            gradient, or its shape has changed. The state is as it was.
        """
        self._check_communicator(sys._getframe(1).f_locals.get("self"), tensor)
        if self._rank is None:
            self._rank = _rank()
            self.sender.seed = self._rank
        message, decoded = self.sender.encode({name: tensor})
        if name not in self._receivers:
            self._receivers[name] = Receiver(self.compressor, {name: tensor})
        front = torch.tensor(list(struct.pack("<H", self._rank)), dtype=torch.uint8)
        payload = torch.cat([front.to(message.device), message])
        return [payload], Context(name, self._rank, payload, owned(decoded[name], tensor))

    def decompress(self, tensors: Sequence[Tensor], ctx: Context) -> Tensor:
        """Decompress the payload of any rank; `ctx` is this rank's own for the same name.

        Raises
        ------
        PayloadError
            If the bytes are not what a rank sent, for example a sum of payloads. The state is as
            it was.
        OutOfSyncError
            If they recycle a look-back gradient that this rank does not hold of that one.
        """
        [payload] = tensors
        if payload.dtype != torch.uint8 or payload.dim() != 1 or payload.numel() < 2:
            raise PayloadError("a payload is a flat uint8 tensor of a rank's number and a message")
        [rank] = struct.unpack("<H", payload[:2].cpu().numpy().tobytes())
        if rank == ctx.rank:
            if not torch.equal(payload, ctx.payload):
                raise PayloadError(
                    f"the payload bears the number of this rank, {rank}, and is not its own: "
                    "payloads can be gathered, not added up"
                )
            return ctx.decoded.clone()
        receiver = self._receivers[ctx.name]
        return receiver.decompress(rank, payload[2:], names=[ctx.name])[ctx.name]

    def aggregate(self, tensors: Sequence[Tensor]) -> Tensor:
        """Average the ranks' tensors, and finish as the compressor does."""
        tensors = list(tensors)
        mean = torch.stack(tensors).sum(0) / len(tensors)
        return self.compressor.finish(mean)

    def report(self) -> dict[str, TensorReport]:
        """Return what became of the last tensor."""
        return self.sender.report()

    def _check_communicator(self, caller: object, tensor: Tensor) -> None:
        # GRACE tells a compressor nothing of who will move its tensors, and by the time that a
        # collective fails some ranks hang in it: look at who calls.
        kind, module = type(caller).__name__, type(caller).__module__
        if not module.startswith("grace_dl."):
            return
        if kind in ("Allreduce", "AllToAll"):
            raise TypeError(
                f"GRACE's {kind} adds up what it moves, and messages do not add up to a message: "
                "use GRACE's Allgather"
            )
        if self.tensors_size_are_same:
            return
        if kind == "Broadcast":
            raise TypeError(
                f"GRACE's Broadcast needs payloads of one size on all ranks, and those of "
                f"{self.compressor!r} differ: use GRACE's Allgather"
            )
        if module.startswith("grace_dl.dist.") and tensor.device.type == "cpu":
            raise TypeError(
                "grace_dl.dist gathers tensors of unequal size on GPUs only (it calls .cuda()): on "
                "the CPU use lbgm_compress.adapters.ddp, or grace_dl.torch with Horovod"
            )


def _rank() -> int:
    """Ask the engine that is running for this rank."""
    horovod = sys.modules.get("horovod.torch")
    if horovod is not None and horovod.is_initialized():
        rank = int(horovod.rank())
    elif torch.distributed.is_available() and torch.distributed.is_initialized():
        rank = torch.distributed.get_rank()
    else:
        raise RuntimeError(
            "neither Horovod nor torch.distributed is initialised: do so first, or give "
            "GraceCompressor its rank"
        )
    if rank >= RANKS:
        raise RuntimeError(f"rank {rank} does not fit into two bytes")
    return rank


class Template(NamedTuple):
    """What a GRACE compressor makes of a tensor of one shape, whatever it holds."""

    tensors: list[Tensor]
    ctx: Any


@dataclass(frozen=True, repr=False)
class FromGrace(Compressor):
    """A compressor of GRACE's as one of ours: ``LBGM(FromGrace(TopKCompressor(0.01)))``.

    What the GRACE compressor changes in itself (a momentum, a count of calls) is taken out of it
    and becomes state; what it draws comes from a generator of its own. The context that it leaves
    for `decompress` does not travel: a receiver makes it anew, from the shape and from the counts.

    Parameters
    ----------
    compressor
        Any compressor of ``grace_dl.torch`` or ``grace_dl.dist`` that does not communicate. It is
        copied.

    Raises
    ------
    TypeError
        If it is no compressor, or one that cannot be used so; the message says why.
    """

    compressor: Any = field(compare=False)
    expression: str = field(init=False)
    """What builds the GRACE compressor."""
    origin: str = field(init=False)
    """The module and name of its class."""
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
        # As in Sender, rounds and tensors must not share their randomness.
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
        """Let only the first dimension differ from the template, if sizes differ at all."""
        found, wanted = tuple(sizes), tuple(expected.shape)
        if found == wanted:
            return
        free = not self.compressor.tensors_size_are_same
        if not free or not found or found[1:] != wanted[1:] or found[0] > like.numel():
            raise PayloadError(f"a tensor has shape {found}, expected {wanted}")

    def _run(
        self, tensor: Tensor, attributes: Mapping[str, Any], seed: int
    ) -> tuple[list[Tensor], Any, dict[str, Any]]:
        """Compress with the GRACE compressor as it is with these attributes.

        Returns the tensors, the context, and the attributes that now differ from the first ones.
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
        # One element stands for all, so that nothing of the tensor's size is kept.
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
    """Write down what builds a GRACE compressor, from its attributes.

    GRACE's constructors keep each argument in an attribute, if not always of the same name.

    Raises
    ------
    TypeError
        If that cannot be found out.
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
