"""Parameters of Horovod's optimizer that are frozen and unfrozen."""

from __future__ import annotations

import pytest
import torch

from lbgm_compress import LBGM, ErrorFeedback, TopK
from lbgm_compress.adapters.horovod import DistributedOptimizer
from tests.horovod_ranks import jobs_end, needs_horovod, run_horovod  # noqa: F401
from tests.invariant import residuals
from tests.laws import assert_same_bits
from tests.loops import COMPRESSORS
from tests.training import Net, assert_replicas_agree, data, parameters

pytestmark = [
    pytest.mark.horovod,
    pytest.mark.xdist_group("horovod"),
    pytest.mark.timeout(200),
    pytest.mark.usefixtures("jobs_end"),
    needs_horovod,
]


def wrapped(model, compressor, **options):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    named = model.named_parameters()
    return DistributedOptimizer(optimizer, compressor, named, bucket_cap_mb=0.01, **options)


def backward(model, rank, step):
    x, y = data(rank, step)
    torch.nn.functional.cross_entropy(model(x), y).backward()


def train(model, optimizer, rank, steps, clear=True):
    for step in steps:
        if clear:
            optimizer.zero_grad()
        backward(model, rank, step)
        optimizer.step()


def freeze(model, frozen=True):
    for p in model.layers[4].parameters():
        p.requires_grad_(not frozen)


def moved(model, before):
    """Return whether the frozen layer has moved, by one bit, and whether another one has."""
    now = parameters(model)
    return tuple(not torch.equal(now[n], before[n]) for n in ("layers.4.weight", "out.weight"))


def freezing(rank, compressor):
    """Freeze in mid-training, and unfreeze; freeze before the optimizer is built, and unfreeze."""
    torch.manual_seed(0)
    found = []
    for built_frozen in (False, True):
        model = Net()
        freeze(model, built_frozen)
        optimizer = wrapped(model, compressor)
        train(model, optimizer, rank, range(4))
        freeze(model)
        before = parameters(model)
        train(model, optimizer, rank, range(4, 8))
        found.append(moved(model, before))
        freeze(model, False)
        before = parameters(model)
        train(model, optimizer, rank, range(8, 12))
        found.append((*moved(model, before), parameters(model)))
    return found


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("compressor", COMPRESSORS, ids=repr)
def test_layers_may_be_frozen_and_unfrozen(compressor, world):
    results = run_horovod(freezing, world, compressor)
    assert_replicas_agree([(one[-1], other[-1]) for _, one, _, other in results])
    for frozen, thawed, built_frozen, unfrozen in results:
        assert frozen == (False, True)
        assert thawed[:2] == (True, True)
        assert built_frozen == (False, True)
        assert unfrozen[:2] == (True, True)


def stale_gradients(rank, compressor):
    """A gradient that a frozen layer still has is neither sent nor changed."""
    torch.manual_seed(0)
    model = Net()
    optimizer = wrapped(model, compressor)
    train(model, optimizer, rank, range(3))
    freeze(model)
    for name, p in model.named_parameters():
        if "layers.4" not in name:
            p.grad = None
    stale = model.layers[4].weight.grad.clone()
    kept = residuals(optimizer.compression.state_dict())["layers.4.weight"]
    backward(model, rank, 3)
    optimizer.synchronize()
    assert_same_bits(model.layers[4].weight.grad, stale)
    assert_same_bits(residuals(optimizer.compression.state_dict())["layers.4.weight"], kept)
    fresh = Net()
    freeze(fresh)
    optimizer = wrapped(fresh, compressor)
    train(fresh, optimizer, rank, range(2))
    return fresh.layers[4].weight.grad


def test_gradient_of_a_frozen_layer_is_neither_sent_nor_made():
    assert run_horovod(stale_gradients, 2, COMPRESSORS[0]) == [None, None]


def between_passes(rank, compressor):
    """Freeze a layer between two passes of a step, and unfreeze it between two of the next."""
    torch.manual_seed(0)
    model = Net()
    optimizer = wrapped(model, compressor, backward_passes_per_step=2)
    backward(model, rank, 0)
    freeze(model)
    backward(model, rank, 1)
    optimizer.step()
    first = parameters(model)
    optimizer.zero_grad()
    backward(model, rank, 2)
    freeze(model, False)
    message = None
    try:
        backward(model, rank, 3)
    except AssertionError as error:
        message = str(error)
    optimizer.synchronize()
    return first, message


def test_layer_that_is_frozen_between_two_passes_is_averaged():
    results = run_horovod(between_passes, 2, COMPRESSORS[0])
    assert_replicas_agree([first for first, _ in results])
    # The other way round, its bucket may be under way already.
    for _, message in results:
        assert "was unfrozen between two backward passes of one step" in message


def undo_after_a_step(rank, compressor):
    torch.manual_seed(0)
    model = Net()
    optimizer = wrapped(model, compressor)
    train(model, optimizer, rank, range(3))
    before = residuals(optimizer.compression.state_dict())
    # Nothing is undone: the step was applied.
    optimizer.compression.undo()
    assert_same_bits(residuals(optimizer.compression.state_dict()), before)
    optimizer.zero_grad()
    backward(model, rank, 3)
    with pytest.raises(RuntimeError, match=r"call optimizer.synchronize\(\) after the backward"):
        optimizer.compression.undo()
    optimizer.synchronize()
    optimizer.compression.undo()
    assert_same_bits(residuals(optimizer.compression.state_dict()), before)
    train(model, optimizer, rank, range(4, 6))
    return parameters(model)


@pytest.mark.parametrize("compressor", COMPRESSORS[:3], ids=repr)
def test_step_is_undone_unless_it_was_applied(compressor):
    assert_replicas_agree(run_horovod(undo_after_a_step, 2, compressor))


def buckets_in_other_orders(rank):
    """Each rank uses other layers, and sends the rest last; one of them asks to compare states."""
    torch.manual_seed(0)
    model = Net(skip=True)
    model.calls = rank
    optimizer = wrapped(model, LBGM(ErrorFeedback(TopK(0.1))))
    for step in range(9):
        if rank == 1 and step in (3, 4, 5):
            optimizer.compression.reset()
        train(model, optimizer, rank, [step])
    return parameters(model)


def test_step_begins_again_where_ranks_send_their_buckets_in_other_orders():
    assert_replicas_agree(run_horovod(buckets_in_other_orders, 2))
