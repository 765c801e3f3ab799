"""The contract of a gradient compressor: its rules and its laws.

A compressor is a frozen dataclass of hyper-parameters. It keeps no state, draws from no global
random generator, does not communicate and knows no engine. A state is a nested dict of tensors and
numbers that is passed in and returned. Sender and receiver have separate states, and share only
what the payloads carry.

To write a compressor, implement `encode` and `decode`. The public methods are made of them. A
payload is a head of `head_size` bytes, whose first byte is its kind (flags of
`lbgm_compress.wire.message.Kind`), and a body if the kind has ``BODY``.

Rules for `encode` and `decode`:

- A sender's state may be ``{}`` as well as what `initial_state` returned.
- A state and the tensors in it are never modified in place: a new round has a new state.
- `decode` computes the tensor from the payload, the receiver's state and `like` alone. `like`
  gives shape, dtype and device, which both ends know by the tensor's name; they do not travel.
- A receiver keeps a new state only from a payload whose kind has ``SETS``. From any other payload
  `decode` must return the very state object that it was given; `read` raises `RuntimeError` if it
  does not, since the receiver would drop that state and decode the next payload wrongly.
- A payload that needs the receiver's state has ``USES``: only then does the receiver make sure that
  it holds what the sender means. A compressor with such payloads has `receiver_has_state`, and its
  `forget`, `own_state` and `sender_state` tell apart what both ends hold.
- A payload depends on its own tensor and state, and never on another tensor of the message.
- `head_size` depends on `like` alone, and not on the values of a gradient.
- Randomness comes from a generator that is seeded from the sender's state. What a receiver needs of
  it is sent, or follows from what is sent.
- A gradient with inf or nan (as loss scaling produces) is sent as it is, uncompressed, and changes
  no state, so that every rank sees the same inf or nan and skips the same step. `encode_batch` does
  that before it calls `encode`.
- A gradient that is zero in all elements is sent as a head of zeros alone, decodes to zeros, and
  changes no state: a layer that is not in use loses nothing, and nothing is written to it.
  `encode_batch` does that, too, unless payloads have a `fixed_size`.

The laws, for every compressor and every composition (`tests.laws.check_laws` checks them):

1. A receiver decodes `decoded`, bit for bit on one device, in every round of a run; also through
   `Sender.encode` and `Receiver`.
2. `compress` and `decompress` are pure: same input, same state, same output; neither the gradient
   nor the state that went in is modified.
3. ``eval(repr(c)) == c``.
4. A state survives `torch.save` and ``torch.load(weights_only=True)`` and the run goes on
   bit-exactly.
5. Shapes and dtypes come back as they went: float32, float16, bfloat16 and float64; 0-d, empty,
   one-element, non-contiguous and channels-last tensors.
6. Any byte string given to a receiver gives a tensor of the right shape or raises `PayloadError`:
   it never reads past the end, allocates no more than in proportion to the tensor that it
   decodes, and leaves the receiver's state untouched when it raises.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from lbgm_compress._util.batches import by_batch, is_small
from lbgm_compress._util.contents import Content, all_finite, contents, square_sum
from lbgm_compress.algorithm import Algorithm, State, check_algorithm
from lbgm_compress.decoded import Decoded, Dense, Zero
from lbgm_compress.wire.errors import OutOfSyncError, PayloadError
from lbgm_compress.wire.message import Kind
from lbgm_compress.wire.values import as_bytes, from_bytes

__all__ = [
    "BODY_HEAD",
    "DTYPES",
    "Compressor",
    "Encoding",
    "OutOfSyncError",
    "PayloadError",
    "Content",
    "State",
    "all_finite",
    "check_compressor",
    "check_gradient",
    "contents",
    "raw",
    "returning",
    "square_sum",
    "zero",
]

BODY_HEAD = bytes([Kind.BODY])
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


class Encoding(NamedTuple):
    """One compressed tensor; its body and decoded form are made when they are asked for."""

    head: bytes
    """The fixed-size part of the payload; its first byte is the `Kind`."""
    body: Callable[[], Tensor] | None
    """Returns the rest of the payload (flat uint8); call it while the gradient is unchanged."""
    decoded: Decoded
    """The tensor that a receiver reconstructs; it may share memory with the gradient."""
    state: State
    """The sender's state after this round."""
    phase_error: float | None = None
    """sin^2 of the angle to the look-back gradient; None without one."""

    def payload(self, device: torch.device) -> Tensor:
        """Return head and body as one flat uint8 tensor."""
        head = torch.frombuffer(bytearray(self.head), dtype=torch.uint8).to(device)
        return head if self.body is None else torch.cat([head, self.body()])


@dataclasses.dataclass(frozen=True, repr=False)
class Compressor(Algorithm, abc.ABC):
    """Turns gradients into payloads of bytes, and back.

    Of a state, receivers hold the part that payloads set (`forget`), and a payload may carry what
    earlier ones lost (`has_residual`).
    """

    kinds: ClassVar[frozenset[int]] = frozenset({Kind.BODY})
    """The kinds of payload that `encode` makes and `decode` reads, besides uncompressed ones."""

    @property
    def receiver_has_state(self) -> bool:
        """True if a receiver of this compressor keeps state, which its payloads use and set."""
        return False

    @property
    def fixed_size(self) -> bool:
        """True if all payloads for a tensor have one size, also with inf or nan in it."""
        return False

    def compress(self, grad: Tensor, state: State) -> tuple[Tensor, Tensor, State]:
        """Compress one gradient.

        Parameters
        ----------
        grad
            The gradient, of any shape; float32, float16, bfloat16 or float64. Not modified.
        state
            The state that the last round returned, or `initial_state` in the first.

        Returns
        -------
        payload
            Flat uint8 tensor on the gradient's device.
        decoded
            The dense tensor that a receiver reconstructs from exactly those bytes.
        state
            The state for the next round; it takes effect only if the caller keeps it.

        Raises
        ------
        TypeError
            If the gradient is not a dense floating-point tensor.
        """
        return self.compress_batch([grad], [state])[0]

    def compress_batch(
        self, grads: Sequence[Tensor], states: Sequence[State]
    ) -> list[tuple[Tensor, Tensor, State]]:
        """Compress several gradients, with as few device synchronisations as for one.

        Parameters, results and errors are those of `compress`, one a gradient.
        """
        for grad in grads:
            check_gradient(grad)
        results = []
        for grad, encoding in zip(grads, self.encode_batch(grads, states), strict=True):
            decoded = owned(encoding.decoded, grad)
            results.append((encoding.payload(grad.device), decoded, encoding.state))
        return results

    def decompress(self, payload: Tensor, state: State, like: Tensor) -> tuple[Tensor, State]:
        """Decode one payload.

        Parameters
        ----------
        payload
            Flat uint8 tensor, as `compress` returned it.
        state
            The receiver's state that the last round returned, or ``{}`` in the first.
        like
            A tensor with the shape, dtype and device of the result; its values do not matter.

        Returns
        -------
        tensor
            The decoded tensor, dense.
        state
            The receiver's state for the next round.

        Raises
        ------
        PayloadError
            If the bytes are not a payload of this compressor for such a tensor.
        OutOfSyncError
            If they need a look-back gradient and `state` holds none.
        RuntimeError
            If `decode` returns a new state from a payload without ``Kind.SETS``: an error of the
            compressor.
        """
        decoded, state = self.read(*self.split(payload, like), state, like)
        return owned(decoded, payload), state

    def accumulate(self, payload: Tensor, state: State, out: Tensor, weight: float) -> State:
        """Add `weight` times the decoded tensor to `out`, and return the receiver's new state.

        `out` has the shape, dtype and device of the gradient. The result has the bits of
        ``out + decoded * weight``, rounded after the product and after the sum; where `out` holds
        -0.0 and `decoded` 0.0, a sparse compressor may leave the -0.0. Errors are those of
        `decompress`; `out` is unchanged when they are raised.
        """
        decoded, state = self.read(*self.split(payload, out), state, out)
        decoded.add_to(out, weight)
        return state

    def finish(self, mean: Tensor) -> Tensor:
        """Return the result of a step, given the weighted average of all decoded tensors.

        A compressor that overrides this has `finishes_average`.
        """
        return mean

    def own_state(self, state: State) -> State:
        """Return the part of a sender's `state` that its receiver does not hold."""
        return state

    def sender_state(self, own: State, held: State, like: Tensor) -> State:
        """Return a sender's state, made of its own part and of what its receiver holds.

        The bits are those of the state from which `own` was taken, on the same device. `like` gives
        shape, dtype and device of the gradient.
        """
        return own

    def head_size(self, like: Tensor) -> int:
        """Return the size in bytes of the fixed part of a payload, its kind included."""
        return 1

    @abc.abstractmethod
    def encode(self, grad: Tensor, state: State) -> Encoding:
        """Compress a finite gradient, not zero: the core of `compress`, under the rules above.

        `grad` must not be modified, and is valid until the next round: what the new state keeps of
        it is copied.
        """

    def encode_batch(self, grads: Sequence[Tensor], states: Sequence[State]) -> list[Encoding]:
        """Compress several gradients of any content and shape."""
        return by_batch(self.encode_together, grads, states)

    def encode_together(self, grads: Sequence[Tensor], states: Sequence[State]) -> list[Encoding]:
        """Compress gradients of any content that are one batch (see `_util.batches`)."""
        found = contents(grads)
        usual = [c is Content.NUMBERS or (c is Content.ZERO and self.fixed_size) for c in found]
        chosen = [i for i, is_usual in enumerate(usual) if is_usual]
        of_these = [grads[i] for i in chosen], [states[i] for i in chosen]
        if is_small(grads[0]) and chosen and self._overridden_together("encode", "encode_small"):
            encoded = iter(self.encode_small(*of_these))
        else:
            encoded = map(self.encode, *of_these)
        results = []
        for grad, state, content, is_usual in zip(grads, states, found, usual, strict=True):
            if is_usual:
                results.append(next(encoded))
            else:
                other = raw if content is Content.NOT_FINITE else zero
                results.append(other(self, grad, state))
        return results

    def encode_small(self, grads: Sequence[Tensor], states: Sequence[State]) -> list[Encoding]:
        """Compress gradients of few elements on the CPU, all of one shape and dtype.

        They are finite, and not zero. A compressor overrides this to stack them, as calls of torch
        for each take longer than the elements. The encodings are those of `encode`, bit for bit.
        """
        return list(map(self.encode, grads, states))

    def _overridden_together(self, one: str, *several: str) -> bool:
        """Return whether the last class that overrides one of these overrides one of `several`.

        A subclass that overrides `one` alone is then called for each tensor.
        """
        methods = {one, *several}
        owner = next(cls for cls in type(self).__mro__ if methods & vars(cls).keys())
        return any(method in vars(owner) for method in several)

    @abc.abstractmethod
    def decode(
        self, head: bytes, body: Tensor, state: State, like: Tensor
    ) -> tuple[Decoded, State]:
        """Decode a payload of one of `kinds`, under the rules above: the core of `decompress`.

        `body` is flat uint8, empty if the payload has none. All checks of the bytes are made here:
        the decoded tensor that is returned can be used without an error.
        """

    def split(self, payload: Tensor, like: Tensor) -> tuple[bytes, Tensor | None]:
        """Return head and body of a payload; the body is None if its kind has none."""
        size = self.head_size(like)
        if payload.dtype != torch.uint8 or payload.dim() != 1:
            raise PayloadError(
                f"a payload is a flat uint8 tensor, not {payload.dtype} of shape "
                f"{tuple(payload.shape)}"
            )
        if payload.numel() < size:
            raise PayloadError(f"the payload has {payload.numel()} bytes, its head alone {size}")
        head = payload[:size].cpu().numpy().tobytes()
        if not head[0] & Kind.BODY and payload.numel() > size:
            raise PayloadError(f"{payload.numel() - size} bytes follow a payload without a body")
        return head, payload[size:] if head[0] & Kind.BODY else None

    def read(
        self, head: bytes, body: Tensor | None, state: State, like: Tensor
    ) -> tuple[Decoded, State]:
        """Decode a payload of any kind, given as head and body.

        Raises
        ------
        PayloadError, OutOfSyncError, RuntimeError
            As `decompress`.
        """
        kind = head[0]
        if body is None:
            body = torch.empty(0, dtype=torch.uint8, device=like.device)
        if body.device != like.device:
            body = body.to(like.device)
        if kind == Kind.RAW | Kind.BODY:
            if any(head[1:]):
                raise PayloadError("the head of an uncompressed tensor is not zero")
            return dense_from_bytes(body, like), state
        if kind == 0:
            if any(head):
                raise PayloadError("the head of a zero tensor is not zero")
            return Zero(like), state
        if kind not in self.kinds:
            raise PayloadError(f"unknown kind of payload {kind} for {self!r}")
        decoded, new = self.decode(head, body, state, like)
        if new is not state and not kind & Kind.SETS:
            raise RuntimeError(
                f"{self!r} returned a new state from a payload of kind {kind}, which has no "
                "Kind.SETS: a receiver keeps a state only from a payload that sets one. Return "
                "the state that decode was given, or add Kind.SETS to the head and to `kinds`"
            )
        return decoded, new

    def read_batch(
        self,
        heads: Sequence[bytes],
        bodies: Sequence[Tensor | None],
        states: Sequence[State],
        likes: Sequence[Tensor],
    ) -> list[tuple[Decoded, State]]:
        """Decode payloads for several tensors: results and errors of `read`, one a payload."""

        def read(
            likes: Sequence[Tensor],
            heads: Sequence[bytes],
            bodies: Sequence[Tensor | None],
            states: Sequence[State],
        ) -> list[tuple[Decoded, State]]:
            if is_small(likes[0]) and self._overridden_together(
                "decode", "read_small", "decode_small"
            ):
                return self.read_small(heads, bodies, states, likes)
            return list(map(self.read, heads, bodies, states, likes))

        return by_batch(read, likes, heads, bodies, states)

    def read_small(
        self,
        heads: Sequence[bytes],
        bodies: Sequence[Tensor | None],
        states: Sequence[State],
        likes: Sequence[Tensor],
    ) -> list[tuple[Decoded, State]]:
        """Decode payloads of any kind for tensors as those of `encode_small`.

        Results and errors are those of `read`, one a payload. By default, payloads of the kind
        ``BODY`` alone and of one size go to `decode_small`, and the others to `read`.
        """
        found: list[Any] = [None] * len(heads)
        alike: dict[tuple[bytes, int], list[int]] = {}
        for i, (head, body) in enumerate(zip(heads, bodies, strict=True)):
            alike.setdefault((head, -1 if body is None else body.numel()), []).append(i)
        for (head, size), positions in alike.items():
            decoded = None
            if head == BODY_HEAD and size >= 0:
                chosen = [body for i in positions if (body := bodies[i]) is not None]
                decoded = self.decode_small(torch.stack(chosen).to(likes[0].device), likes[0])
            for k, i in enumerate(positions):
                if decoded is None:
                    found[i] = self.read(heads[i], bodies[i], states[i], likes[i])
                else:
                    found[i] = decoded[k], states[i]
        return found

    def decode_small(self, bodies: Tensor, like: Tensor) -> Sequence[Decoded] | None:
        """Decode payloads of the kind ``BODY`` alone for tensors as those of `encode_small`.

        A compressor that overrides `encode_small` overrides this, too.

        Parameters
        ----------
        bodies
            The bodies, of one size, stacked (k x size, uint8).
        like
            Shape, dtype and device of all the tensors.

        Returns
        -------
        list
            The decoded tensors; or None if a body is unusual or wrong. They are then decoded one by
            one.
        """
        return None


def check_compressor(compressor: Any) -> None:
    """Raise `TypeError` unless `compressor` is one, and makes messages."""
    check_algorithm(compressor)
    if compressor.adds_up:
        raise TypeError(
            f"{compressor!r} averages over ranks by sums and makes no messages: use it where ranks "
            "average, as in CompressionState or DistributedOptimizer, and here a compressor such "
            "as LookBackSubspace(8)"
        )


def check_gradient(grad: Tensor, name: str | None = None) -> None:
    """Raise `TypeError` unless `grad` is a dense floating-point tensor."""
    which = "a gradient" if name is None else f"the gradient {name!r}"
    if grad is None:
        raise TypeError(f"{which} is None: run the backward pass first, or leave it out")
    if not isinstance(grad, Tensor):
        raise TypeError(f"{which} must be a torch.Tensor, not {type(grad).__name__}")
    if grad.layout != torch.strided:
        raise TypeError(f"{which} must be dense, not {grad.layout}: call .to_dense() first")
    if grad.dtype not in DTYPES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise TypeError(f"{which} must be one of {names}, not {grad.dtype}")


def returning(body: Tensor) -> Callable[[], Tensor]:
    """Return a function that returns `body`, for `Encoding.body`."""
    return lambda: body


def raw(compressor: Compressor, grad: Tensor, state: State) -> Encoding:
    """Return the encoding of an uncompressed gradient, which leaves the state as it was."""
    head = bytes([Kind.RAW | Kind.BODY]) + bytes(compressor.head_size(grad) - 1)
    return Encoding(head, lambda: as_bytes(grad.contiguous()), Dense(grad), state)


def zero(compressor: Compressor, grad: Tensor, state: State) -> Encoding:
    """Return the encoding of a zero gradient, which leaves the state as it was."""
    return Encoding(bytes(compressor.head_size(grad)), None, Zero(grad), state)


def dense_from_bytes(body: Tensor, like: Tensor) -> Dense:
    """Return a tensor whose elements are in `body` as they are in memory, row by row."""
    expected = like.numel() * like.dtype.itemsize
    if body.numel() != expected:
        raise PayloadError(
            f"{body.numel()} bytes for a dense tensor of shape {tuple(like.shape)}, "
            f"expected {expected}"
        )
    return Dense(from_bytes(body, like.dtype).view(like.shape))


def dense_from_stack(bodies: Tensor, like: Tensor) -> list[Dense] | None:
    """Return what `dense_from_bytes` returns for stacked bodies; None if their size is wrong."""
    if bodies.shape[1] != like.numel() * like.dtype.itemsize:
        return None
    tensors = from_bytes(bodies.reshape(-1), like.dtype).view(len(bodies), *like.shape)
    return [Dense(tensor) for tensor in tensors.unbind()]


def owned(decoded: Decoded, source: Tensor) -> Tensor:
    """Return the dense tensor, in memory of its own if it would share that of `source`."""
    dense = decoded.dense()
    if dense.untyped_storage().data_ptr() == source.untyped_storage().data_ptr():
        return dense.clone(memory_format=torch.contiguous_format)
    return dense.contiguous()
