"""Parameters and groups of DistributedDataParallel: frozen and unfrozen, found late, ignored."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from lbgm_compress import LBGM, ErrorFeedback, LookBackSubspace, SignSGD, TopK
from lbgm_compress.adapters.ddp import CompressionState, compress, compression_hook
from tests.laws import assert_same_bits, saved_and_loaded
from tests.ranks import Failed, run_ranks
from tests.training import Net, assert_replicas_agree, data, parameters

BUCKETS = 0.01
COMPRESSORS = [
    ErrorFeedback(TopK(0.05)),
    ErrorFeedback(SignSGD(scaled=True)),
    ErrorFeedback(LBGM(TopK(0.1))),
    ErrorFeedback(LookBackSubspace(2, values="int4")),
    LBGM(ErrorFeedback(TopK(0.1))),
]


def build(**options):
    torch.manual_seed(0)
    return DistributedDataParallel(Net(), bucket_cap_mb=BUCKETS, **options)


def train(model, rank, steps, optimizer=None, start=0):
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for step in range(start, start + steps):
        x, y = data(rank, step)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return optimizer


def freeze(model, layer, frozen=True):
    for p in model.module.layers[layer].parameters():
        p.requires_grad_(not frozen)


def freezing(rank, compressor):
    """Freeze before the state is built, in mid-training, and unfreeze both."""
    results = []
    for before_the_state in (True, False):
        model = build(find_unused_parameters=True)
        if before_the_state:
            freeze(model, 4)
        compress(model, compressor)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        train(model, rank, 4, optimizer)
        if not before_the_state:
            freeze(model, 4)
        start = parameters(model)
        train(model, rank, 4, optimizer, start=4)
        frozen = parameters(model)
        for name in frozen:
            # It must not move by one bit, and the others must.
            assert torch.equal(frozen[name], start[name]) == name.startswith("module.layers.4.")
        freeze(model, 4, False)
        train(model, rank, 4, optimizer, start=8)
        thawed = parameters(model)
        assert not torch.equal(thawed["module.layers.4.weight"], frozen["module.layers.4.weight"])
        results.append(thawed)
    return results


@pytest.mark.timeout(120)
@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("compressor", COMPRESSORS, ids=repr)
def test_layers_may_be_frozen_and_unfrozen(compressor, world):
    assert_replicas_agree(run_ranks(freezing, world, compressor))


def unfrozen_where_the_model_holds_nothing(rank, when):
    torch.manual_seed(0)
    module = Net()
    module.layers[2].requires_grad_(False)
    model = DistributedDataParallel(module, bucket_cap_mb=BUCKETS)
    if when == "before compress":
        module.layers[2].requires_grad_(True)
    compress(model, LBGM())
    if when == "after a step":
        train(model, rank, 2)
        module.layers[2].requires_grad_(True)
    before = parameters(model)
    try:
        train(model, rank, 1)
    except RuntimeError as error:
        assert_same_bits(parameters(model), before)
        return str(error)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("when", ["before compress", "after a step"])
def test_parameter_that_is_not_averaged_and_has_a_gradient_is_named(when):
    for message in run_ranks(unfrozen_where_the_model_holds_nothing, 2, when):
        assert "parameter 'module.layers.2.weight' was frozen when the model was wrapped" in message


def ignored(rank):
    torch.manual_seed(0)
    module = Net()
    names = ["layers.2.weight", "layers.2.bias"]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, names)
    found = []
    for late in (False, True):
        model = DistributedDataParallel(module, bucket_cap_mb=BUCKETS)
        if late:
            state = CompressionState(TopK(0.1), model.named_parameters())
            model.register_comm_hook(state, compression_hook)
        else:
            state = compress(model, TopK(0.1))
        train(model, rank, 2)
        found.append(state.stats()["parameters"].get("module.layers.2.weight", {"steps": 0}))
        del model
    return found


@pytest.mark.timeout(120)
def test_parameters_that_the_model_is_told_to_ignore_are_left_alone():
    for found in run_ranks(ignored, 2):
        assert all(not entry.get("message_bytes") for entry in found)


# --- a state that finds its model ----------------------------------------------------------------


def late(rank):
    """Train with a state that finds its model, and with that of compress, and resume both."""
    compressor = ErrorFeedback(LBGM(TopK(0.1)))
    results = []
    saved = None
    for _ in range(2):
        state = CompressionState(compressor, start_step=1)
        if saved is not None:
            state.load_state_dict(saved)
        model = build()
        model.register_comm_hook(state, compression_hook)
        train(model, rank, 4)
        other = build()
        usual = compress(other, compressor, start_step=1)
        if saved is not None:
            usual.load_state_dict(saved)
        train(other, rank, 4)
        assert_same_bits(parameters(model), parameters(other))
        assert_same_bits(
            [entry["state"] for entry in state.state_dict()["sender"]["tensors"].values()],
            [entry["state"] for entry in usual.state_dict()["sender"]["tensors"].values()],
        )
        assert state.stats() == usual.stats()
        saved = saved_and_loaded(state.state_dict())
        results.append(parameters(model))
    return results


@pytest.mark.timeout(120)
def test_state_without_names_is_that_of_compress():
    assert_replicas_agree(run_ranks(late, 2))


def subgroups(rank, how):
    # Ranks 0 and 1 train one model, ranks 2 and 3 another.
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    group = groups[rank // 2]
    torch.manual_seed(rank // 2)
    model = DistributedDataParallel(torch.nn.Linear(4, 1, bias=False), process_group=group)
    if how == "compress":
        compress(model, LBGM())
    elif how == "late":
        model.register_comm_hook(CompressionState(LBGM()), compression_hook)
    else:
        chosen = group if how == "group" else None
        state = CompressionState(LBGM(), model.named_parameters(), chosen)
        model.register_comm_hook(state, compression_hook)
    model(torch.full((1, 4), float(rank))).backward()
    return model.module.weight.grad.tolist()[0]


@pytest.mark.timeout(120)
@pytest.mark.parametrize("how", ["compress", "late", "group"])
def test_model_on_a_subgroup_is_averaged_over_it(how):
    assert run_ranks(subgroups, 4, how) == [[0.5] * 4] * 2 + [[2.5] * 4] * 2


@pytest.mark.timeout(120)
def test_state_of_another_group_than_the_model_s_is_an_error():
    for rank, failed in enumerate(run_ranks(subgroups, 4, "none", failures=True)):
        assert isinstance(failed, Failed)
        theirs = [0, 1] if rank < 2 else [2, 3]
        expected = f"averages over ranks {theirs}, and its CompressionState over [0, 1, 2, 3]"
        assert expected in failed.message


def two_models_in_one_process(rank):
    """A model that was wrapped twice, and one of two states for one of two models."""
    torch.manual_seed(0)
    module = Net()
    DistributedDataParallel(module)
    first = DistributedDataParallel(module, bucket_cap_mb=BUCKETS)
    stale = DistributedDataParallel(module)
    state = CompressionState(TopK(0.1))
    first.register_comm_hook(state, compression_hook)
    train(first, rank, 2)
    assert stale.module is first.module
    return state.stats()["ratio"]


@pytest.mark.timeout(120)
def test_of_several_wrappers_the_one_with_the_hook_is_found():
    assert all(0 < ratio < 0.3 for ratio in run_ranks(two_models_in_one_process, 2))


def test_state_without_names_needs_no_process_group_yet():
    assert not dist.is_initialized()
    state = CompressionState(LBGM())
    with pytest.raises(AttributeError, match="the first backward pass binds it to the model"):
        state.stats()
