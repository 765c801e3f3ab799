"""Parameters and groups of DistributedDataParallel: frozen and unfrozen, found late, ignored."""

from __future__ import annotations

import pickle

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from lbgm_compress import LBGM, ErrorFeedback, LookBackSubspace, SignSGD, TopK
from lbgm_compress.adapters.ddp import CompressionState, compress, compression_hook
from tests import loops
from tests.invariant import residuals
from tests.laws import assert_same_bits, saved_and_loaded
from tests.loops import Given
from tests.ranks import Failed, run_ranks
from tests.test_loops import DataParallel
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


def stale_gradients(rank, compressor):
    """Freeze and unfreeze in turn, as for an adversary, and leave the gradients where they are."""
    model = build(find_unused_parameters=True)
    state = compress(model, compressor)
    train(model, rank, 2)
    rest = [p for name, p in model.named_parameters() if "layers.4." not in name]
    optimizer = torch.optim.SGD(rest, lr=0.05)
    for turn in range(3):
        freeze(model, 4)
        before = residuals(state.state_dict())["module.layers.4.weight"]
        gradient = model.module.layers[4].weight.grad.clone()
        train(model, rank, 2, optimizer, start=3 * turn)
        assert_same_bits(residuals(state.state_dict())["module.layers.4.weight"], before)
        assert_same_bits(model.module.layers[4].weight.grad, gradient)
        freeze(model, 4, False)
        train(model, rank, 1, start=3 * turn + 2)
    return parameters(model)


def every_stale_gradient(rank):
    return [stale_gradients(rank, compressor) for compressor in COMPRESSORS]


@pytest.mark.timeout(120)
def test_gradient_that_a_frozen_layer_still_has_is_not_sent():
    assert_replicas_agree(run_ranks(every_stale_gradient, 2))


def quantised(dtype):
    return torch.nn.Parameter(torch.ones(4, 4).to(dtype), requires_grad=False)


def frozen_quantised_weights(rank):
    """Parameters that hold integers, as quantised layers have them, are no concern of the hook."""
    torch.manual_seed(0)
    module = Net()
    module.codes, module.scales = quantised(torch.int8), quantised(torch.uint8)
    model = DistributedDataParallel(module, bucket_cap_mb=BUCKETS)
    state = compress(model, ErrorFeedback(TopK(0.05)))
    train(model, rank, 2, torch.optim.SGD([p for p in model.parameters() if p.requires_grad]))
    # gloo has no float8, of which DistributedDataParallel would make a copy.
    float8 = ("float8", quantised(torch.float8_e4m3fn))
    CompressionState(ErrorFeedback(TopK(0.05)), [float8, *model.named_parameters()])
    return sorted(
        set(dict(model.named_parameters())) - set(state.stats(by_parameter=True)["parameters"])
    )


@pytest.mark.timeout(120)
def test_frozen_parameters_of_other_dtypes_do_not_disturb():
    assert run_ranks(frozen_quantised_weights, 2) == [["module.codes", "module.scales"]] * 2


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


def unfrozen_and_wrapped_again(rank, late):
    """The same state goes on with the module's new wrapper, as when a framework wraps twice."""
    torch.manual_seed(0)
    module = Net()
    module.layers[2].requires_grad_(False)
    state = CompressionState(ErrorFeedback(TopK(0.1)))
    for refused in (True, False):
        model = DistributedDataParallel(module, bucket_cap_mb=BUCKETS)
        if not late and refused:
            state = compress(model, ErrorFeedback(TopK(0.1)))
        else:
            model.register_comm_hook(state, compression_hook)
        train(model, rank, 2)
        module.layers[2].requires_grad_(True)
        before = state.state_dict() if refused else None
        try:
            train(model, rank, 1)
        except RuntimeError:
            # Nothing of it is kept.
            assert_same_bits(state.state_dict(), before)
            assert refused
        else:
            assert not refused
    return parameters(module)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("late", [False, True])
def test_model_that_is_wrapped_again_after_unfreezing_goes_on(late):
    assert_replicas_agree(run_ranks(unfrozen_and_wrapped_again, 2, late))


def ignored(rank):
    found = []
    for how in ("compress", "late", "by hand"):
        torch.manual_seed(0)
        module = Net()
        module.gain = torch.nn.Parameter(torch.ones(()))
        module.out.register_forward_hook(lambda _, __, out, m=module: out * m.gain)
        names = ["layers.2.weight", "layers.2.bias", "gain"]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, names)
        model = DistributedDataParallel(module, bucket_cap_mb=BUCKETS)
        if how == "compress":
            state = compress(model, TopK(0.1))
        else:
            given = [model.named_parameters()] if how == "by hand" else []
            state = CompressionState(TopK(0.1), *given)
            model.register_comm_hook(state, compression_hook)
        train(model, rank, 2)
        sent = state.stats(by_parameter=True)["parameters"]
        # DistributedDataParallel ignores no parameter of the outermost module, whatever it is told.
        assert sent["module.gain"]["message_bytes"] > 0
        found.append(sent.get("module.layers.2.weight", {"message_bytes": 0})["message_bytes"])
        del model
    return found


@pytest.mark.timeout(120)
def test_parameters_that_the_model_is_told_to_ignore_are_left_alone():
    assert run_ranks(ignored, 2) == [[0, 0, 0]] * 2


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


class Late(DataParallel):
    """A training whose state is there before the model."""

    def build(self):
        self.state = CompressionState(self.compressor, **self.options)
        self.module = Given()
        self.model = DistributedDataParallel(
            self.module, bucket_cap_mb=0.0005, find_unused_parameters=self.unused
        )
        self.model.register_comm_hook(self.state, compression_hook)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1.0)


def late_loops(rank, compressor):
    def make(**options):
        return Late(rank, compressor, **options)

    return {loop.__name__: loop(make) for loop in LATE_LOOPS}


LATE_LOOPS = [
    loops.gradient_scaler,
    loops.undoing_where_there_is_nothing_to_undo,
    loops.frozen_saved_loaded_unfrozen,
    loops.undone_after_a_resume,
]


@pytest.mark.timeout(120)
@pytest.mark.parametrize("compressor", COMPRESSORS[::2], ids=repr)
def test_state_that_finds_its_model_loses_and_doubles_nothing(compressor):
    loops.check_loops(run_ranks(late_loops, 2, compressor), compressor)


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


def wrapped_more_than_once(rank, hooks):
    """One module has three wrappers, of which some have the hook with the same state."""
    torch.manual_seed(0)
    module = Net()
    state = CompressionState(TopK(0.1))
    wrappers = [DistributedDataParallel(module, bucket_cap_mb=BUCKETS) for _ in range(3)]
    for model in wrappers[:hooks]:
        model.register_comm_hook(state, compression_hook)
    train(wrappers[0], rank, 2)
    return state.stats()["ratio"]


@pytest.mark.timeout(120)
@pytest.mark.parametrize("hooks", [1, 2])
def test_of_several_wrappers_one_with_the_hook_is_taken(hooks):
    assert all(0 < ratio < 0.3 for ratio in run_ranks(wrapped_more_than_once, 2, hooks))


def test_state_without_a_model_can_be_sent_to_another_process():
    """A framework that starts its ranks by spawning them pickles its hook's state."""
    state = pickle.loads(pickle.dumps(CompressionState(LBGM(), start_step=3)))
    # There is nothing to undo, as in a loop that skips its very first step.
    state.undo()
    assert not hasattr(state, "step")


def test_state_of_another_compressor_is_refused_before_there_is_a_model():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with pytest.warns(UserWarning, match="the process group has one rank: .* sent to nobody"):
            other = CompressionState(LBGM(), Net().named_parameters())
        for state in (other.state_dict(), other.gather_state_dict()):
            with pytest.raises(ValueError, match=r"is that of LBGM\(\), and this end uses TopK"):
                CompressionState(TopK(0.1)).load_state_dict(state)
    finally:
        dist.destroy_process_group()
