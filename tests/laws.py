"""The laws of the contract of compressors, checked on any run of gradients."""

from __future__ import annotations

import copy
import dataclasses
import io
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lbgm_compress import Compressor, PayloadError, Receiver, Sender, parse_compressor
from lbgm_compress.wire.message import Kind
from lbgm_compress.wire.values import as_bytes

__all__ = ["assert_same_bits", "check_laws", "check_repr", "without_ids"]


def assert_same_bits(a: Any, b: Any, law: str = "two values are the same") -> None:
    """Check that nested states or tensors have the same bits, shapes and dtypes.

    `law` says in the error what should be the same.
    """
    if isinstance(a, Tensor):
        assert isinstance(b, Tensor), f"{law}: found a tensor and {b!r}"
        kinds = [(tuple(tensor.shape), tensor.dtype) for tensor in (a, b)]
        assert kinds[0] == kinds[1], f"{law}: found shapes and dtypes {kinds}"
        a, b = (as_bytes(t.contiguous()) for t in (a, b))
        assert torch.equal(a, b), f"{law}: {int((a != b).sum())} bytes of {a.numel()} differ"
    elif isinstance(a, Mapping):
        assert a.keys() == b.keys(), f"{law}: found keys {list(a)} and {list(b)}"
        for key in a:
            assert_same_bits(a[key], b[key], f"{law} ({key})")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), f"{law}: found {len(a)} and {len(b)} items"
        for one, other in zip(a, b, strict=True):
            assert_same_bits(one, other, law)
    else:
        assert type(a) is type(b), f"{law}: found {a!r} and {b!r}"
        assert a == b, f"{law}: found {a!r} and {b!r}"


def saved_and_loaded(state: Any) -> Any:
    """Return a state after `torch.save` and `torch.load`."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def classes_of(compressor: Any) -> set[type]:
    """Return the classes of a dataclass and of the dataclasses that are its fields."""
    values = [getattr(compressor, field.name) for field in dataclasses.fields(compressor)]
    inner = [classes_of(value) for value in values if dataclasses.is_dataclass(value)]
    return {type(compressor)}.union(*inner)


def check_repr(compressor: Compressor, names: Mapping[str, Any] | None = None) -> None:
    """Check that the repr of a compressor builds it, also with `parse_compressor`."""
    classes = classes_of(compressor)
    namespace = {one.__name__: one for one in classes} | dict(names or {})
    assert eval(repr(compressor), namespace) == compressor
    if not names:
        assert parse_compressor(repr(compressor), known=classes) == compressor


def without_ids(state):
    """Return a copy of a state without the names of look-back gradients, which are random."""
    if isinstance(state, dict):
        return {key: without_ids(value) for key, value in state.items() if key != "id"}
    return state.clone() if isinstance(state, Tensor) else state


def copied(state: Any) -> Any:
    """Return nested dicts, lists and tuples with copies of their tensors."""
    if isinstance(state, Tensor):
        return state.clone(memory_format=torch.preserve_format)
    if isinstance(state, Mapping):
        return {key: copied(value) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)([copied(value) for value in state])
    return copy.copy(state)


def check_laws(
    compressor: Compressor,
    run: Sequence[Mapping[str, Tensor]],
    names_in_repr: Mapping[str, Any] | None = None,
) -> None:
    """Check all laws of a compressor on a run of gradients.

    Parameters
    ----------
    compressor
        The compressor.
    run
        One mapping from names to gradients for each round, with the same names in all of them.
    names_in_repr
        Names in the compressor's repr that are not classes of the compressor and of its fields.
    """
    check_repr(compressor, names_in_repr)
    check_properties(compressor)
    generator = torch.get_rng_state()
    check_tensors(compressor, run)
    check_empty_states(compressor, run)
    check_ends(compressor, run)
    check_steps(compressor, run)
    check_fixed_size(compressor, run[0])
    law = f"{compressor!r} leaves torch's global generator alone, and draws from its state's seed"
    assert_same_bits(torch.get_rng_state(), generator, law)


def check_properties(compressor: Compressor) -> None:
    """Check that the properties agree with the kinds of payload and with `finish`."""
    with_state = any(kind & (Kind.USES | Kind.SETS) for kind in compressor.kinds)
    assert compressor.receiver_has_state == with_state, "receiver_has_state does not fit `kinds`"
    mean = torch.tensor([0.25, -3.0, 0.0])
    finished = compressor.finish(mean.clone())
    assert (finished.shape, finished.dtype) == (mean.shape, mean.dtype)
    assert compressor.finishes_average or torch.equal(finished, mean), "finishes_average is False"


def check_fixed_size(compressor: Compressor, grads: Mapping[str, Tensor]) -> None:
    """Check that payloads of a compressor of fixed size have one size, with inf in them, too."""
    if not compressor.fixed_size:
        return
    for name, grad in grads.items():
        values = [grad, torch.zeros_like(grad), torch.full_like(grad, float("inf"))]
        sizes = {compressor.compress(value, {})[0].numel() for value in values}
        assert len(sizes) == 1, (
            f"fixed_size is True, and the payloads of {name!r}, of zeros and of inf have sizes "
            f"{sorted(sizes)}"
        )


def check_tensors(compressor: Compressor, run: Sequence[Mapping[str, Tensor]]) -> None:
    """Check the laws of `compress`, `decompress` and `accumulate`, tensor by tensor."""
    names = list(run[0])
    senders = {n: compressor.initial_state(seed) for seed, n in enumerate(names)}
    receivers: dict[str, Any] = {n: {} for n in names}
    cut: set[tuple[str, int, int]] = set()
    for number, grads in enumerate(run):
        if number == len(run) // 2:
            senders, receivers = saved_and_loaded(senders), saved_and_loaded(receivers)
        batch = compressor.compress_batch([grads[n] for n in names], [senders[n] for n in names])
        for name, from_batch in zip(names, batch, strict=True):
            grad, sender, receiver = grads[name], senders[name], receivers[name]
            before = copied((grad, sender, receiver))
            where = f"{compressor!r}, tensor {name!r}, round {number}"
            given = grad.clone()
            payload, decoded, new = compressor.compress(given, sender)
            assert payload.dtype == torch.uint8
            assert payload.dim() == 1
            assert (decoded.shape, decoded.dtype) == (grad.shape, grad.dtype)
            # The results are the same alone and in a batch, a second time, and on other memory.
            expected = copied((payload, decoded, new))
            again = f"{where}: compress gives the same for the same gradient and state"
            assert_same_bits(from_batch, expected, again)
            size = payload.numel()
            if (name, int(payload[0]), size) not in cut:
                cut.add((name, int(payload[0]), size))
                check_truncations(compressor, payload, receiver, grad)

            received = payload.clone()
            tensor, held = compressor.decompress(received, receiver, grad)
            assert_same_bits(tensor, decoded, f"{where}: decode returns Encoding.decoded")
            whole = compressor.sender_state(compressor.own_state(new), held, grad)
            parts = f"{where}: own_state and the receiver's state give sender_state"
            assert_same_bits(whole, new, parts)
            out = torch.full_like(grad, 0.5, memory_format=torch.contiguous_format)
            total = out + decoded * 0.3
            added = compressor.accumulate(payload, receiver, out, 0.3)
            sums = f"{where}: accumulate adds what decompress returns"
            assert_same_bits(out, total, sums)
            assert_same_bits(held, added, f"{where}: accumulate returns decompress's state")
            untouched = f"{where}: the gradient and the states that went in are not modified"
            assert_same_bits((grad, sender, receiver), before, untouched)
            # A result must not change when the gradient or the payload does.
            given.fill_(7.0)
            received.fill_(255)
            owned = f"{where}: results are in memory of their own, not the gradient's or payload's"
            assert_same_bits((payload, decoded, new), expected, owned)
            assert_same_bits((tensor, held), (decoded, added), owned)
            senders[name], receivers[name] = new, held


def check_empty_states(compressor: Compressor, run: Sequence[Mapping[str, Tensor]]) -> None:
    """Check that a sender may begin with an empty state."""
    senders: dict[str, Any] = {name: {} for name in run[0]}
    receivers: dict[str, Any] = {name: {} for name in run[0]}
    for grads in run[:3]:
        for name, grad in grads.items():
            payload, decoded, senders[name] = compressor.compress(grad, senders[name])
            tensor, receivers[name] = compressor.decompress(payload, receivers[name], grad)
            law = f"{compressor!r}, tensor {name!r}: a sender may begin with the state {{}}"
            assert_same_bits(tensor, decoded, law)


def check_truncations(compressor: Compressor, payload: Tensor, state: Any, like: Tensor) -> None:
    """Check that a payload that is cut off or extended does not decode to another shape."""
    before = copied(state)
    for wrong in (payload[:0], payload[:1], payload[:-1], torch.cat([payload, payload[:1]])):
        try:
            tensor, _ = compressor.decompress(wrong, state, like)
        except PayloadError:
            pass
        else:
            assert (tensor.shape, tensor.dtype) == (like.shape, like.dtype)
    assert_same_bits(state, before, f"{compressor!r}: a refused payload leaves the state alone")


def check_steps(compressor: Compressor, run: Sequence[Mapping[str, Tensor]]) -> None:
    """Check that an undone step leaves no trace, and that zero gradients change nothing."""
    sender, receiver = Sender(compressor, seed=1), Receiver(compressor, like=run[0])
    for grads in run:
        before = copied((sender.state_dict(), receiver.state_dict()))
        sender.begin_step()
        receiver.begin_step()
        # In two messages, and the second one twice.
        names = list(grads)
        for part in (names[: len(names) // 2], names[len(names) // 2 :], names[-1:]):
            if part:
                undone = {name: grads[name] * -3 for name in part}
                receiver.decompress("worker", sender.compress(undone), part)
        sender.undo()
        receiver.undo()
        law = f"{compressor!r}: an undone step leaves both ends as they were"
        assert_same_bits((sender.state_dict(), receiver.state_dict()), before, law)
        receiver.decompress("worker", sender.compress(grads))
    before = copied((sender.state_dict(), receiver.state_dict()))
    zeros = {name: torch.zeros_like(grad) for name, grad in run[0].items()}
    for name, decoded in receiver.decompress("worker", sender.compress(zeros)).items():
        assert not decoded.any(), f"{compressor!r}: the zero gradient {name!r} decodes to zeros"
    law = f"{compressor!r}: zero gradients change no state"
    assert_same_bits((sender.state_dict(), receiver.state_dict()), before, law)


def check_ends(compressor: Compressor, run: Sequence[Mapping[str, Tensor]]) -> None:
    """Check that `Sender` and `Receiver` agree, also after they were saved and loaded."""
    sender, receiver = Sender(compressor, seed=1), Receiver(compressor, like=run[0])
    compact = Sender(compressor, seed=1, compact=True)
    for number, grads in enumerate(run):
        if number == len(run) // 2:
            states = [saved_and_loaded(end.state_dict()) for end in (sender, receiver, compact)]
            sender, receiver = Sender(compressor), Receiver(compressor, like=run[0])
            compact = Sender(compressor, compact=True)
            sender.load_state_dict(states[0])
            receiver.load_state_dict(states[1])
            compact.load_state_dict(states[2])
        twin = Receiver(compressor, like=run[0])
        twin.load_state_dict(receiver.state_dict())
        message, encoded = sender.encode(grads)
        compact.compress(grads)
        assert compact.report() == sender.report()
        from_message = receiver.report(message)
        assert {n: (r.recycled, r.bytes) for n, r in from_message.items()} == {
            n: (r.recycled, r.bytes) for n, r in sender.report().items()
        }
        decoded = receiver.decompress("worker", message)
        into = {
            n: torch.zeros_like(g, memory_format=torch.contiguous_format) for n, g in grads.items()
        }
        twin.accumulate("worker", message, into, 0.25)
        for name in grads:
            where = f"{compressor!r}, tensor {name!r}, round {number}"
            dense = encoded[name].dense().contiguous()
            assert_same_bits(dense, decoded[name], f"{where}: Sender.encode and Receiver agree")
            sums = f"{where}: Receiver.accumulate adds what Receiver.decompress returns"
            assert_same_bits(into[name], 0.0 + decoded[name] * 0.25, sums)
        assert_same_bits(twin.state_dict(), receiver.state_dict())
        report = sender.report()
        assert message.numel() - sum(r.bytes for r in report.values()) in (16, 24)
