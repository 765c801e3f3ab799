"""Sender and Receiver: sizes, reports, states, digests, and errors."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from lbgm_compress import (
    LBGM,
    Atomo,
    ErrorFeedback,
    Identity,
    NormBudget,
    OutOfSyncError,
    PayloadError,
    Receiver,
    Sender,
    SignSGD,
    TopK,
)
from tests.gradients import training_run
from tests.laws import assert_same_bits, saved_and_loaded


def gradients(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        "b": torch.randn(30, generator=generator),
        "a": torch.randn(20, 30, generator=generator),
        "c": torch.randn((), generator=generator),
    }


@pytest.mark.parametrize("inner", [Identity(), TopK(0.1), SignSGD(), Atomo(2)], ids=repr)
def test_recycled_message_is_5_bytes_a_tensor_and_16_more(inner):
    sender = Sender(LBGM(inner))
    sender.compress(gradients())
    assert sender.compress(gradients()).numel() == 16 + 3 * 5


@pytest.mark.parametrize("n", [1, 7, 8, 9, 1000, 65_537])
@pytest.mark.parametrize("compressor", [SignSGD(), SignSGD(scaled=True)], ids=repr)
def test_signs_take_at_most_an_eighth_of_a_byte_and_16_a_tensor(n, compressor):
    assert Sender(compressor).compress({"x": torch.ones(n)}).numel() - 16 <= n / 8 + 16


def test_report_has_the_decision_the_phase_error_and_the_bytes_of_each_tensor():
    sender = Sender(LBGM(delta=0.2))
    assert sender.report() == {}
    first, second = gradients(0), gradients(1)
    message = sender.compress(first)
    assert all(r.phase_error is None and not r.recycled for r in sender.report().values())
    mixed = {"a": 3 * first["a"], "b": second["b"], "c": -first["c"]}
    message = sender.compress(mixed)
    report = sender.report()
    assert [report[name].recycled for name in "abc"] == [True, False, True]
    assert report["a"].phase_error == pytest.approx(0, abs=1e-6)
    cosine = torch.nn.functional.cosine_similarity(first["b"], second["b"], dim=0).item()
    assert report["b"].phase_error == pytest.approx(1 - cosine**2, abs=1e-5)
    # The 16 bytes of the header and the 8 of the identifier belong to no tensor.
    assert sum(r.bytes for r in report.values()) == message.numel() - 24


def test_order_of_the_names_does_not_matter():
    grads = gradients()
    receiver = Receiver(LBGM(), dict(sorted(grads.items())))
    decoded = receiver.decompress(0, Sender(LBGM()).compress(grads))
    assert_same_bits(decoded, dict(sorted(grads.items())))


def test_reset_sends_the_next_message_in_full_and_keeps_residuals():
    sender = Sender(LBGM(ErrorFeedback(TopK(0.1))))
    sender.compress(gradients())
    residuals = {
        name: entry["state"]["inner"]["residual"].clone()
        for name, entry in sender.state_dict()["tensors"].items()
    }
    sender.reset()
    # As good as nothing beside the residuals; a zero gradient would leave them where they are.
    sender.compress({name: torch.full_like(g, 1e-30) for name, g in gradients().items()})
    assert not any(r.recycled for r in sender.report().values())
    kept = sender.state_dict()["tensors"]["a"]["state"]["look_back"]
    expected = TopK(0.1).compress(residuals["a"], {})[1]
    assert_same_bits(kept, expected)


def test_senders_are_told_apart_and_dropped():
    receiver = Receiver(LBGM(), gradients())
    senders = {name: Sender(LBGM()) for name in ("x", 7)}
    for seed, (name, sender) in enumerate(senders.items()):
        receiver.decompress(name, sender.compress(gradients(seed)))
    for seed, (name, sender) in enumerate(senders.items()):
        decoded = receiver.decompress(name, sender.compress(gradients(seed)))
        assert torch.allclose(decoded["a"], gradients(seed)["a"], rtol=1e-5)
    receiver.drop("x")
    receiver.drop("never seen")
    with pytest.raises(OutOfSyncError, match=r"'x'.*holds none"):
        receiver.decompress("x", senders["x"].compress(gradients(0)))
    receiver.decompress(7, senders[7].compress(gradients(1)))


def test_message_of_one_sender_is_not_accepted_from_another():
    receiver = Receiver(LBGM(), gradients())
    one, other = Sender(LBGM()), Sender(LBGM())
    receiver.decompress("one", one.compress(gradients(0)))
    receiver.decompress("other", other.compress(gradients(1)))
    before = copy.deepcopy(receiver.state_dict())
    with pytest.raises(OutOfSyncError, match="other than"):
        receiver.decompress("other", one.compress(gradients(0)))
    assert_same_bits(receiver.state_dict(), before)


def test_digest_makes_a_sender_send_in_full_just_where_the_receiver_needs_it():
    sender, receiver = Sender(LBGM()), Receiver(LBGM(), gradients())
    receiver.decompress(0, sender.compress(gradients()))
    changed = {**gradients(), "b": gradients(1)["b"]}
    sender.compress(changed)  # lost
    message = sender.compress(changed, peer=receiver.digest(0))
    assert [sender.report()[name].recycled for name in "abc"] == [True, False, True]
    assert_same_bits(receiver.decompress(0, message)["b"], changed["b"])
    message = sender.compress(changed, peer=receiver.digest(0))
    assert message.numel() == 31


def test_digest_of_an_unknown_sender_is_zeros_and_of_a_subset_is_its_part():
    sender, receiver = Sender(LBGM()), Receiver(LBGM(), gradients())
    assert_same_bits(receiver.digest("nobody"), torch.zeros(24, dtype=torch.uint8))
    receiver.decompress(0, sender.compress(gradients()))
    assert_same_bits(receiver.digest(0, ["b"]), receiver.digest(0)[8:16])


def test_subsets_of_the_tensors_travel_in_messages_of_their_own():
    grads = gradients()
    sender, receiver = Sender(LBGM()), Receiver(LBGM(), grads)
    for _ in range(2):
        for names in (["a"], ["c", "b"]):
            message = sender.compress({name: grads[name] for name in names})
            decoded = receiver.decompress(0, message, names=names)
            assert list(decoded) == sorted(names)
            for name in names:
                assert torch.allclose(decoded[name], grads[name])
    assert sender.compress(grads).numel() == 31


def test_messages_of_other_tensors_or_compressors_are_refused():
    grads = gradients()
    receiver = Receiver(LBGM(), grads)
    others = {
        "name": {**grads, "d": grads["c"]},
        "shape": {**grads, "a": grads["a"].reshape(30, 20)},
        "dtype": {**grads, "a": grads["a"].double()},
    }
    for other in others.values():
        with pytest.raises(PayloadError, match="other tensors or by another compressor"):
            receiver.decompress(0, Sender(LBGM()).compress(other))
    with pytest.raises(PayloadError, match="other tensors or by another compressor"):
        receiver.decompress(0, Sender(LBGM(delta=0.3)).compress(grads))


def test_failed_accumulate_changes_nothing():
    compressor = LBGM(TopK(0.5))
    sender, receiver = Sender(compressor), Receiver(compressor, gradients())
    receiver.decompress(0, sender.compress(gradients()))
    into = {name: torch.zeros_like(g) for name, g in gradients().items()}
    message = sender.compress(gradients(1))
    # The indices of the last tensor but one are damaged: only "a" could be added.
    message[-8:] = 255
    held = copy.deepcopy(receiver.state_dict())
    with pytest.raises(PayloadError, match=r"tensor '[bc]'"):
        receiver.accumulate(0, message, into, 1.0)
    assert_same_bits(into, {name: torch.zeros_like(g) for name, g in gradients().items()})
    assert_same_bits(receiver.state_dict(), held)
    with pytest.raises(ValueError, match="no tensor 'c' to add to"):
        receiver.accumulate(0, message, {"a": into["a"], "b": into["b"]}, 1.0)
    with pytest.raises(ValueError, match=r"'a' to add to has shape \(30, 20\)"):
        receiver.accumulate(0, message, {**into, "a": into["a"].T}, 1.0)


def test_accumulate_into_float64_sums_in_float64():
    grads = {"x": torch.full((3,), 1 / 3)}
    receiver = Receiver(Identity(), grads)
    into = {"x": torch.zeros(3, dtype=torch.float64)}
    receiver.accumulate(0, Sender(Identity()).compress(grads), into, 1 / 3)
    assert_same_bits(into["x"], grads["x"].double() * (1 / 3))


def test_vote_is_taken_over_all_senders():
    receiver = Receiver(LBGM(SignSGD(vote=True)), {"x": torch.empty(2)})
    mean = {"x": torch.zeros(2)}
    for number, values in enumerate(([5.0, -1.0], [1.0, -1.0], [-9.0, 8.0])):
        message = Sender(LBGM(SignSGD(vote=True))).compress({"x": torch.tensor(values)})
        receiver.accumulate(number, message, mean, 1 / 3)
    assert receiver.finish(mean)["x"].tolist() == [1, -1]


@pytest.mark.parametrize(
    "compressor",
    [LBGM(ErrorFeedback(TopK(0.1))), ErrorFeedback(LBGM(Atomo(2, unbiased=True)))],
    ids=repr,
)
def test_states_go_on_bit_exactly_after_a_restart(compressor):
    run = training_run(40)
    ends = Sender(compressor, seed=3), Receiver(compressor, run[0])
    for grads in run[:20]:
        ends[1].decompress("w", ends[0].compress(grads))
    states = saved_and_loaded([end.state_dict() for end in ends])
    others = Sender(compressor), Receiver(compressor, run[0])
    for other, state in zip(others, states, strict=True):
        other.load_state_dict(state)
    for grads in run[20:]:
        decoded = [r.decompress("w", s.compress(grads)) for s, r in (ends, others)]
        assert_same_bits(*decoded)


def test_state_of_something_else_is_refused_and_changes_nothing():
    sender, receiver = Sender(LBGM()), Receiver(LBGM(), gradients())
    receiver.decompress(0, sender.compress(gradients()))
    for end, other in ((sender, Sender(TopK(0.5))), (receiver, Receiver(TopK(0.5), gradients()))):
        before = copy.deepcopy(end.state_dict())
        for wrong, message in (
            (other.state_dict(), r"that of TopK\(0.5\)"),
            ({**before, "format": 9}, "format 9, this release reads 1"),
            ({}, "not a state"),
            (None, "not a state"),
        ):
            with pytest.raises(ValueError, match=message):
                end.load_state_dict(wrong)
            assert_same_bits(end.state_dict(), before)
    with pytest.raises(ValueError, match="does not know"):
        Receiver(LBGM(), {"z": torch.empty(2)}).load_state_dict(receiver.state_dict())


@pytest.mark.parametrize(
    ("grads", "error", "message"),
    [
        ({}, ValueError, "there are no tensors"),
        ({3: torch.ones(2)}, TypeError, "name is a str"),
        ({"a": [1.0]}, TypeError, "'a' must be a torch.Tensor"),
        ({"a": torch.ones(2, dtype=torch.int64)}, TypeError, "'a' must be one of float32"),
        ({"a": torch.ones(2).to_sparse()}, TypeError, "'a' must be dense"),
        ({"a": torch.ones(5)}, ValueError, r"'a' has shape and dtype \(\(5,\)"),
        ({"a": torch.ones(2, device="meta"), "b": torch.ones(2)}, ValueError, "share a device"),
    ],
)
def test_bad_gradients_are_refused_and_change_nothing(grads, error, message):
    sender = Sender(LBGM())
    sender.compress({"a": torch.ones(2), "b": torch.ones(2)})
    before = copy.deepcopy(sender.state_dict())
    with pytest.raises(error, match=message):
        sender.compress(grads)
    assert_same_bits(sender.state_dict(), before)


@pytest.mark.parametrize("peer", [torch.zeros(23, dtype=torch.uint8), torch.zeros(24)])
def test_what_is_no_digest_is_refused(peer):
    with pytest.raises(ValueError, match="24 bytes"):
        Sender(LBGM()).compress(gradients(), peer=peer)


def test_what_is_no_message_is_refused():
    receiver = Receiver(LBGM(), gradients())
    for wrong in (b"abc", torch.zeros(40), torch.zeros(2, 20, dtype=torch.uint8)):
        with pytest.raises(TypeError, match="flat uint8"):
            receiver.decompress(0, wrong)
    with pytest.raises(TypeError, match="id is an int or a str"):
        receiver.decompress(None, Sender(LBGM()).compress(gradients()))
    with pytest.raises(ValueError, match="knows no tensor 'z'"):
        receiver.digest(0, ["z"])
    for end in (lambda: Sender("LBGM"), lambda: Receiver(LBGM, gradients())):
        with pytest.raises(TypeError, match="expected a compressor"):
            end()


def test_inf_on_one_tensor_leaves_the_others_compressed():
    sender, receiver = Sender(LBGM()), Receiver(LBGM(), gradients())
    receiver.decompress(0, sender.compress(gradients()))
    broken = gradients()
    broken["a"][3, 4] = math.inf
    decoded = receiver.decompress(0, sender.compress(broken))
    assert_same_bits(decoded["a"], broken["a"])
    assert [sender.report()[name].recycled for name in "abc"] == [False, True, True]
    assert sender.compress(gradients()).numel() == 31


def test_compact_sender_keeps_look_back_gradients_as_compressed_as_its_receiver():
    grads = {"weight": torch.randn(300, 100), "bias": torch.randn(100)}
    compressor = LBGM(TopK(0.01))
    sender, receiver = Sender(compressor, compact=True), Receiver(compressor, like=grads)
    for scale in (1.0, 0.5, -2.0):
        message = sender.compress({name: scale * g for name, g in grads.items()})
        receiver.decompress("worker", message)
    assert message.numel() == 26
    held = receiver.held_bytes("worker")
    assert 0 < held < 0.02 * 4 * 30_100
    tensors = sender.state_dict()["tensors"]
    kept = sum(e["held"]["look_back"].numel() for e in tensors.values())
    assert kept == held
    assert not any(torch.is_tensor(v) for e in tensors.values() for v in e["own"].values())


@pytest.mark.parametrize("how", ["reset", "peer"])
def test_compact_sender_forgets_what_its_receiver_does_not_hold(how):
    grads = {"weight": torch.randn(30, 10)}
    sender, receiver = Sender(LBGM(), compact=True), Receiver(LBGM(), like=grads)
    sender.compress(grads)
    if how == "reset":
        sender.reset()
    message = sender.compress(grads, receiver.digest("worker") if how == "peer" else None)
    assert message.numel() > 4 * 300
    receiver.decompress("worker", message)
    # An uncompressed round does not bring back a look-back gradient that was dropped.
    sender.reset()
    receiver.decompress("worker", sender.compress({"weight": torch.full((30, 10), torch.inf)}))
    receiver.decompress("worker", sender.compress(grads))


def test_state_of_a_compact_sender_is_refused_by_another():
    grads = {"weight": torch.randn(30, 10)}
    compact, plain = Sender(LBGM(), compact=True), Sender(LBGM())
    compact.compress(grads)
    plain.compress(grads)
    with pytest.raises(ValueError, match="compact=False"):
        plain.load_state_dict(compact.state_dict())
    with pytest.raises(ValueError, match="compact=True"):
        compact.load_state_dict(plain.state_dict())


def test_receiver_reports_a_message_only_if_it_is_one():
    grads = {"weight": torch.randn(30, 10)}
    sender, receiver = Sender(LBGM()), Receiver(LBGM(), like=grads)
    message = sender.compress(grads)
    assert not receiver.report(message)["weight"].recycled
    assert receiver.report(sender.compress(grads))["weight"].recycled
    with pytest.raises(PayloadError):
        receiver.report(message[:-1])
    assert receiver.held_bytes("worker") == 0


# --- steps that are not applied ------------------------------------------------------------------


def test_undo_without_a_step_does_nothing():
    sender, receiver = Sender(LBGM()), Receiver(LBGM(), like=gradients())
    receiver.decompress(0, sender.compress(gradients()))
    before = copy.deepcopy((sender.state_dict(), receiver.state_dict()))
    sender.undo()
    receiver.undo()
    assert_same_bits((sender.state_dict(), receiver.state_dict()), before)
    sender.begin_step()
    sender.compress(gradients(1))
    sender.commit()
    after = sender.state_dict()
    sender.undo()
    assert_same_bits(sender.state_dict(), after)


def test_undone_first_message_leaves_no_sender_at_the_receiver():
    sender, receiver = Sender(LBGM()), Receiver(LBGM(), like=gradients())
    receiver.begin_step()
    receiver.decompress("worker", sender.compress(gradients()))
    assert receiver.senders() == ["worker"]
    receiver.undo()
    assert receiver.senders() == []


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize(
    "compressor",
    [ErrorFeedback(TopK(0.1)), ErrorFeedback(LBGM(TopK(0.1))), LBGM(ErrorFeedback(SignSGD()))],
    ids=repr,
)
def test_message_that_is_given_back_is_in_the_residual_again(compressor, compact):
    sender = Sender(compressor, compact=compact)
    receiver = Receiver(compressor, like=gradients())
    receiver.decompress(0, sender.compress(gradients(0)))
    before = copy.deepcopy(residual_of(sender))
    decoded = receiver.decompress(0, sender.compress(gradients(1)))
    sender.give_back(decoded)
    for name, grad in gradients(1).items():
        assert torch.allclose(residual_of(sender)[name], before[name] + grad, atol=1e-5)


def residual_of(sender):
    found = {}
    for name, entry in sender.state_dict()["tensors"].items():
        state = entry["own" if sender.compact else "state"]
        found[name] = state["residual"] if "residual" in state else state["inner"]["residual"]
    return found


def test_tensors_are_given_back_to_a_sender_that_has_lost_its_state():
    sender = Sender(ErrorFeedback(TopK(0.1)))
    sender.give_back(gradients())
    assert_same_bits(residual_of(sender), gradients())
    before = sender.state_dict()
    with pytest.raises(ValueError, match="has shape and dtype"):
        sender.give_back({"b": torch.ones(30), "a": torch.ones(2)})
    assert_same_bits(sender.state_dict(), before)


def test_giving_back_to_a_compressor_without_a_residual_does_nothing():
    sender = Sender(LBGM(TopK(0.1)))
    sender.give_back(gradients())
    assert sender.state_dict()["tensors"] == {}


@pytest.mark.parametrize("scales", [(1.0, 1.0, 1.0), (4.0, 4.0, 4.0), (1024.0, 4.0, 0.5)])
@pytest.mark.parametrize(
    "compressor",
    [
        ErrorFeedback(TopK(0.1)),
        LBGM(delta=NormBudget(4.0)),
        LBGM(delta=NormBudget(4.0), compare="raw"),
        ErrorFeedback(LBGM(TopK(0.2), NormBudget(3.0))),
        LBGM(ErrorFeedback(TopK(0.2)), NormBudget(3.0)),
    ],
    ids=repr,
)
def test_loss_scale_changes_neither_residuals_nor_decisions(compressor, scales):
    plain, scaled = Sender(compressor), Sender(compressor)
    for round_, scale in enumerate(scales * 2):
        if round_ == 3:
            scaled.load_state_dict(saved_and_loaded(scaled.state_dict()))
            scaled.reset()
            plain.reset()
        grads = {name: grad + round_ / 10 for name, grad in gradients().items()}
        expected = plain.encode(grads)[1]
        given = {name: grad * scale for name, grad in grads.items()}
        found = scaled.encode(given, loss_scale=scale)[1]
        assert [r.recycled for r in scaled.report().values()] == [
            r.recycled for r in plain.report().values()
        ]
        for name in grads:
            assert torch.allclose(found[name].dense() / scale, expected[name].dense(), atol=1e-6)
    if compressor.has_residual:
        kept = residual_of(plain)
        for name, residual in residual_of(scaled).items():
            assert torch.allclose(residual / scales[-1], kept[name], atol=1e-5)


def test_state_from_before_loss_scales_is_one_without_a_scale():
    sender = Sender(ErrorFeedback(TopK(0.1)))
    sender.compress(gradients())
    state = saved_and_loaded(sender.state_dict())
    for entry in state["tensors"].values():
        assert entry.pop("scale") == 1.0
    other = Sender(ErrorFeedback(TopK(0.1)))
    other.load_state_dict(state)
    assert_same_bits(other.state_dict(), sender.state_dict())


def test_digest_of_a_sender_is_that_of_its_receiver():
    sender, receiver = Sender(LBGM()), Receiver(LBGM(), like=gradients())
    receiver.decompress(0, sender.compress(gradients()))
    assert torch.equal(sender.digest(), receiver.digest(0))
    sender.reset(["a"])
    receiver.drop(0, ["a"])
    assert torch.equal(sender.digest(receiver.names()), receiver.digest(0))
    assert not sender.digest(["a"]).any()
    assert sender.digest(["b"]).any()
