"""The laws of the contract, checked for any compressor on any run of gradients."""

from __future__ import annotations

import copy
import io
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

import lbgm_compress
from lbgm_compress import Compressor, PayloadError, Receiver, Sender
from lbgm_compress.wire.values import as_bytes

__all__ = ["assert_same_bits", "check_laws", "check_repr"]


def assert_same_bits(a: Any, b: Any) -> None:
    """Compare nested states or tensors bit for bit, shape and dtype included."""
    if isinstance(a, Tensor):
        assert isinstance(b, Tensor)
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        a, b = (as_bytes(t.contiguous()) for t in (a, b))
        assert torch.equal(a, b), f"{int((a != b).sum())} bytes of {a.numel()} differ"
    elif isinstance(a, Mapping):
        assert a.keys() == b.keys()
        for key in a:
            assert_same_bits(a[key], b[key])
    else:
        assert type(a) is type(b)
        assert a == b


def saved_and_loaded(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def check_repr(compressor: Compressor, names: Mapping[str, Any] | None = None) -> None:
    namespace = {name: getattr(lbgm_compress, name) for name in lbgm_compress.__all__}
    namespace.update(names or {})
    assert eval(repr(compressor), namespace) == compressor


def check_laws(
    compressor: Compressor,
    run: Sequence[Mapping[str, Tensor]],
    names_in_repr: Mapping[str, Any] | None = None,
) -> None:
    """Check all laws on a run: one mapping of gradients a round, with the same names."""
    check_repr(compressor, names_in_repr)
    names = list(run[0])
    senders = {n: compressor.initial_state(seed) for seed, n in enumerate(names)}
    receivers: dict[str, Any] = {n: {} for n in names}
    adders: dict[str, Any] = {n: {} for n in names}
    for number, grads in enumerate(run):
        if number == len(run) // 2:
            senders, receivers = saved_and_loaded(senders), saved_and_loaded(receivers)
        batch = compressor.compress_batch([grads[n] for n in names], [senders[n] for n in names])
        for name, from_batch in zip(names, batch, strict=True):
            grad = grads[name]
            before = copy.deepcopy((grad, senders[name], receivers[name]))
            result = compressor.compress(grad, senders[name])
            payload, decoded, new = result
            again = compressor.compress(grad, senders[name])
            for one, other, third in zip(result, again, from_batch, strict=True):
                assert_same_bits(one, other)
                assert_same_bits(one, third)
            assert payload.dtype == torch.uint8
            assert payload.dim() == 1
            assert (decoded.shape, decoded.dtype) == (grad.shape, grad.dtype)
            check_truncations(compressor, payload, receivers[name], grad)

            tensor, held = compressor.decompress(payload, receivers[name], grad)
            assert_same_bits(tensor, decoded)
            assert_same_bits(compressor.sender_state(compressor.own_state(new), held, grad), new)
            out = torch.full_like(grad, 0.5, memory_format=torch.contiguous_format)
            expected = out + decoded * 0.3
            adders[name] = compressor.accumulate(payload, adders[name], out, 0.3)
            assert_same_bits(out, expected)
            assert_same_bits(held, adders[name])
            assert_same_bits((grad, senders[name], receivers[name])[0], before[0])
            assert_same_bits(senders[name], before[1])
            assert_same_bits(receivers[name], before[2])
            # What comes back must not change when the gradient or the payload does.
            kept = copy.deepcopy((decoded, new, tensor, held))
            changed = grad.clone()
            p2, d2, s2 = compressor.compress(changed, senders[name])
            t2, h2 = compressor.decompress(p2, receivers[name], grad)
            changed.fill_(7.0)
            p2.fill_(255)
            for one, other in zip((d2, s2, t2, h2), kept, strict=True):
                assert_same_bits(one, other)
            senders[name], receivers[name] = new, held
    check_ends(compressor, run)


def check_truncations(compressor: Compressor, payload: Tensor, state: Any, like: Tensor) -> None:
    """A payload that is cut off, or goes on, never decodes to another shape."""
    before = copy.deepcopy(state)
    for wrong in (payload[:0], payload[:1], payload[:-1], torch.cat([payload, payload[:1]])):
        try:
            tensor, _ = compressor.decompress(wrong, state, like)
        except PayloadError:
            pass
        else:
            assert (tensor.shape, tensor.dtype) == (like.shape, like.dtype)
        assert_same_bits(state, before)


def check_ends(compressor: Compressor, run: Sequence[Mapping[str, Tensor]]) -> None:
    """Sender and Receiver give the same, and go on after being saved and loaded."""
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
        twin = copy.deepcopy(receiver)
        message = sender.compress(grads)
        compact.compress(grads)
        assert compact.report() == sender.report()
        from_message = receiver.report(message)
        assert {n: r.recycled for n, r in from_message.items()} == {
            n: r.recycled for n, r in sender.report().items()
        }
        assert {n: r.bytes for n, r in from_message.items()} == {
            n: r.bytes for n, r in sender.report().items()
        }
        into = {
            n: torch.zeros_like(g, memory_format=torch.contiguous_format) for n, g in grads.items()
        }
        decoded = receiver.decompress("worker", message)
        twin.accumulate("worker", message, into, 0.25)
        for name in grads:
            assert_same_bits(into[name], 0.0 + decoded[name] * 0.25)
        report = sender.report()
        assert message.numel() - sum(r.bytes for r in report.values()) in (16, 24)
