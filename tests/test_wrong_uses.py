"""Wrong uses, each with the sentence that names the mistake and the right call."""

from __future__ import annotations

import collections

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lbgm_compress import (
    LBGM,
    Atomo,
    ErrorFeedback,
    Identity,
    LookBackSubspace,
    Receiver,
    Sender,
    SignSGD,
    TopK,
    parse_compressor,
)
from lbgm_compress.adapters.ddp import CompressionState, compress, compression_hook
from lbgm_compress.adapters.diloco import DiLoCo
from lbgm_compress.adapters.horovod import DistributedOptimizer


@pytest.fixture(scope="module", autouse=True)
def group():
    """Be the only rank of a process group."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Model(nn.Module):
    def __init__(self, sparse: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 4, sparse=sparse)
        self.linear = nn.Linear(4, 2)

    def forward(self, x):
        return self.linear(self.embedding(x)).sum()


def wrapped(**options) -> DistributedDataParallel:
    return DistributedDataParallel(Model(**options))


def pairs():
    return Model().named_parameters()


def used_up():
    parameters = pairs()
    collections.deque(parameters, maxlen=0)
    return parameters


def backward(state, hook=compression_hook, **options):
    model = wrapped(**options)
    model.register_comm_hook(state(model) if callable(state) else state, hook)
    model(torch.arange(5)).backward()


def state_of(model):
    return CompressionState(LBGM(), model.named_parameters())


def backward_in_half_precision():
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_wrapper

    backward(state_of, hook=fp16_compress_wrapper(compression_hook))


def distributed_tensor():
    from torch.distributed.device_mesh import init_device_mesh

    try:
        from torch.distributed.tensor import distribute_tensor
    except ImportError:  # torch 2.4
        from torch.distributed._tensor import distribute_tensor

    mesh = init_device_mesh("cpu", (1,))
    parameter = nn.Parameter(distribute_tensor(torch.ones(4), mesh))
    return [("w", parameter)]


def compress_twice():
    model = wrapped()
    compress(model, LBGM())
    compress(model, LBGM())


def load_state_of(name, size):
    other = CompressionState(LBGM(), [(name, nn.Parameter(torch.ones(size)))])
    other.average({name: torch.ones(size)})
    mine = CompressionState(LBGM(), [("w", nn.Parameter(torch.ones(4)))])
    mine.load_state_dict(other.state_dict())


def one_state_for_two_models():
    state = CompressionState(LBGM())
    backward(state)
    backward(state)


def unfrozen_after_wrapping():
    model = Model()
    model.linear.weight.requires_grad_(False)
    model = DistributedDataParallel(model)
    compress(model, LBGM())
    model(torch.arange(5)).backward()
    model.module.linear.weight.requires_grad_(True)
    model(torch.arange(5)).backward()


def tied():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    return model


def sgd():
    return torch.optim.SGD(Model().parameters(), lr=0.1)


def app_with(mods):
    """Make a ClientApp with mods, and give it a message."""
    flower = pytest.importorskip("lbgm_compress.adapters.flower", exc_type=ImportError)
    from flwr.clientapp import ClientApp

    app = ClientApp(mods=mods(flower))
    app.train()(lambda message, context: message)
    # As Flower calls what is in its list of mods.
    [mod] = mods(flower)
    mod(None, None, None)


def nested_strategies():
    flower = pytest.importorskip("lbgm_compress.adapters.flower", exc_type=ImportError)
    from flwr.serverapp.strategy import FedAvg

    flower.CompressedStrategy(flower.CompressedStrategy(FedAvg(), LBGM()), LBGM())


def diloco(compressor=None, model=None, **options):
    model = model or Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return DiLoCo(model, optimizer, compressor or LBGM(), **options)


def diloco_of_one_optimizer():
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    DiLoCo(model, optimizer, LBGM(), outer_optimizer=optimizer)


def diloco_twice():
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    DiLoCo(model, optimizer, LBGM())
    DiLoCo(model, optimizer, LBGM())


def diloco_with_a_part_of_the_outer_parameters():
    model = Model()
    outer = torch.optim.SGD(model.linear.parameters(), lr=0.7)
    diloco(model=model, outer_optimizer=outer)


def diloco_unfrozen():
    model = Model()
    model.embedding.requires_grad_(False)
    outer = torch.optim.SGD(model.linear.parameters(), lr=0.7)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    DiLoCo(model, optimizer, LBGM(), 1, outer)
    model.embedding.requires_grad_(True)
    model(torch.arange(5)).backward()
    optimizer.step()


def sharded():
    model = Model()
    [(_, model.w)] = distributed_tensor()
    return model


GRADS = {"w": torch.ones(4)}
WRONG = [
    # The hook's state
    (lambda: backward(LBGM()), "the state of compression_hook is a CompressionState, not LBGM()"),
    (lambda: backward(None), "is a CompressionState, not None: write compress(model, compressor)"),
    (lambda: compression_hook(state_of(Model()), ()), 'optimize_ddp = "python_reducer"'),
    (backward_in_half_precision, "without fp16_compress_wrapper"),
    (
        lambda: backward(state_of, sparse=True),
        "'module.embedding.weight' is sparse, .* build the embedding with sparse=False",
    ),
    (lambda: backward(lambda _: state_of(Model())), "every model needs a state of its own"),
    # The arguments of CompressionState
    (lambda: CompressionState(LBGM(), Model().parameters()), "tensors without names, as model.par"),
    (lambda: CompressionState(LBGM(), Model().state_dict()), "a mapping, such as state_dict()"),
    (lambda: CompressionState(LBGM(), Model()), "the model itself, a Model: give model.named_par"),
    (lambda: CompressionState(pairs(), LBGM()), "swapped: write CompressionState(compressor, mod"),
    (lambda: CompressionState(LBGM, pairs()), "not the class LBGM: write LBGM(...), with brackets"),
    (
        lambda: CompressionState("LBGM()", pairs()),
        "expected a compressor such as LBGM(TopK(0.01)),",
    ),
    (
        lambda: CompressionState(LBGM(), used_up()),
        "if it is an iterator that was used before, call",
    ),
    (
        lambda: CompressionState(LBGM(), [*pairs(), *pairs()]),
        "two parameters of the name 'embedding.weight': give those of one model",
    ),
    (lambda: CompressionState(LBGM(), 3), "named_parameters is of type int: give model.named_par"),
    (lambda: CompressionState(LBGM(), ["w"]), "has 'w' in the place of a pair: give model.named_p"),
    (lambda: CompressionState(LBGM(), [("w", 1.0)]), "a pair of str and float in the place of a n"),
    (lambda: CompressionState(LBGM(), distributed_tensor()), "parameter 'w' is a DTensor, as full"),
    (
        lambda: CompressionState(LBGM(), [("w", torch.ones(4))]),
        "named_parameters has no parameter that requires a gradient: give model.named_parameters()",
    ),
    (
        lambda: CompressionState(LBGM(), Model().named_modules()),
        "a pair of str and Model in the place of a name and a parameter: give model.named_param",
    ),
    (
        lambda: CompressionState(LBGM(), tied().named_parameters(remove_duplicate=False)),
        "one parameter under two names, '0.weight' and '1.weight': give model.named_parameters()",
    ),
    (
        lambda: CompressionState(LBGM(), pairs(), 10),
        "must be a torch.distributed.ProcessGroup, not 1",
    ),
    (
        lambda: CompressionState(LBGM(), pairs(), dist.GroupMember.NON_GROUP_MEMBER),
        "this rank is not in process_group: build the state on its ranks alone",
    ),
    (lambda: CompressionState(LBGM(), pairs(), start_step=-1), "start_step must be a whole number"),
    (
        lambda: CompressionState(LBGM(), pairs(), weight=0),
        "weight must be above 0 and finite, not 0",
    ),
    (
        lambda: CompressionState(LBGM(), pairs(), loss_scale=torch.amp.GradScaler("cpu")),
        "loss_scale is a gradient scaler: give its method, scaler.get_scale",
    ),
    (
        lambda: CompressionState(LBGM(), pairs(), loss_scale="dynamic"),
        "loss_scale must be a number or a callable, not 'dynamic'",
    ),
    (
        lambda: CompressionState(LBGM(), loss_scale=-2.0),
        "loss_scale must be above 0 and finite, no",
    ),
    (
        lambda: CompressionState(LBGM(), loss_scale=True),
        "loss_scale must be a number or a callable",
    ),
    (lambda: CompressionState(LBGM(), loss_scale=0), "loss_scale must be above 0 and finite, not"),
    (
        lambda: backward(lambda m: CompressionState(LBGM(), loss_scale=lambda: float("nan"))),
        "loss_scale must be above 0 and finite, not nan",
    ),
    # A state without a model yet
    (
        lambda: CompressionState(LBGM(), process_group=dist.group.WORLD),
        "process_group is given without named_parameters: leave out both",
    ),
    (lambda: CompressionState(LBGM()).stats(), "has no model yet: the first backward pass binds"),
    (lambda: CompressionState(LBGM()).state_dict(), "has no model yet: the first backward pass"),
    (
        lambda: CompressionState(LBGM()).load_state_dict({}),
        "this is not a state that CompressionState.state_dict() returned: load the one that gather",
    ),
    (
        lambda: CompressionState(LBGM()).load_state_dict(state_of(Model()).state_dict()["sender"]),
        "this is not a state that CompressionState.state_dict() returned",
    ),
    (
        lambda: CompressionState(TopK(0.1)).load_state_dict(state_of(Model()).state_dict()),
        "the state is that of LBGM(), and this end uses TopK(0.1)",
    ),
    (lambda: CompressionState(LBGM()).sender, "has no model yet: the first backward pass binds"),
    (
        lambda: compression_hook(CompressionState, ()),
        "the state of compression_hook is a CompressionState, no",
    ),
    (one_state_for_two_models, "every model needs a state of its own"),
    (unfrozen_after_wrapping, "'module.linear.weight' was frozen when the model was wrapped, and"),
    (lambda: load_state_of("w", 3), "is that of another model: its tensor 'w' has shape and dtype"),
    (lambda: load_state_of("v", 4), "has a tensor 'v', which is not a parameter here"),
    # compress()
    (lambda: compress(Model(), LBGM()), "wrap the model first, as DistributedDataParallel(model)"),
    (lambda: compress(LBGM(), wrapped()), "swapped: write compress(model, compressor)"),
    (lambda: compress(torch.compile(wrapped()), LBGM()), "before torch.compile takes it"),
    (lambda: compress(wrapped(), TopK), "not the class TopK: write TopK(...), with brackets"),
    (compress_twice, "the model takes no hook: it has one already"),
    # Horovod's optimizer, before Horovod is asked for
    (lambda: DistributedOptimizer(sgd(), compression=LBGM()), "second argument, not compression="),
    (
        lambda: DistributedOptimizer(sgd(), named_parameters=pairs()),
        "there is no compressor: write",
    ),
    (
        lambda: DistributedOptimizer(sgd(), pairs(), LBGM()),
        "swapped: write DistributedOptimizer(op",
    ),
    (lambda: DistributedOptimizer(sgd(), LBGM(), pairs(), op="Sum"), "has no argument 'op', which"),
    (
        lambda: DistributedOptimizer(sgd(), pairs()),
        "those of Horovod's own DistributedOptimizer: write DistributedOptimizer(optimizer, comp",
    ),
    (
        lambda: DistributedOptimizer(torch.optim.SGD, LBGM()),
        "optimizer must be a torch.optim.Optimizer, not the class SGD: write DistributedOptim",
    ),
    (
        lambda: DistributedOptimizer(Model(), LBGM()),
        "must be a torch.optim.Optimizer, not Model: wr",
    ),
    (
        lambda: DistributedOptimizer(sgd(), LBGM(), Model()),
        "is the model itself, a Model: give mode",
    ),
    (
        lambda: DistributedOptimizer(sgd(), LBGM(), Model().parameters()),
        "tensors without names, as model.parameters() has",
    ),
    (
        lambda: DistributedOptimizer(sgd(), LBGM(), pairs()),
        "were not named: give model.named_parameters() of the",
    ),
    (
        lambda: DistributedOptimizer(
            torch.optim.SGD(distributed_tensor(), lr=0.1), LBGM(), distributed_tensor()
        ),
        "parameter 'w' is a DTensor, as fully_shard makes them: compression needs whole parameters",
    ),
    (
        lambda: DistributedOptimizer(sgd(), LBGM),
        "not the class LBGM: write LBGM(...), with brackets",
    ),
    # DiLoCo
    (lambda: DiLoCo(Model(), LBGM(), sgd()), "swapped: write DiLoCo(model, optimizer, compressor)"),
    (lambda: DiLoCo(LBGM(), sgd(), Model()), "swapped: write DiLoCo(model, optimizer, compressor)"),
    (lambda: DiLoCo(Model(), sgd()), "missing 1 required positional argument: 'compressor'"),
    (
        lambda: DiLoCo([Model()], sgd(), LBGM()),
        "model must be a torch.nn.Module, not list: write DiLoCo(model, optimizer, compressor)",
    ),
    (lambda: DiLoCo(Model(), None, LBGM()), "inner_optimizer must be a torch.optim.Optimizer, not"),
    (lambda: DiLoCo(Model(), sgd(), LBGM()), "inner_optimizer has none of the model's parameters"),
    (lambda: diloco("int4"), "not str: parse_compressor reads text"),
    (lambda: diloco(TopK), "not the class TopK: write TopK(...), with brackets"),
    (
        lambda: diloco(LBGM(ErrorFeedback(TopK(0.1)))),
        'leave out ErrorFeedback, or give residual="memory"',
    ),
    (lambda: diloco(residual="buffer"), "residual must be one of model, memory, not 'buffer'"),
    (lambda: diloco(sync_every=0), "sync_every must be a whole number of at least 1, not 0"),
    (lambda: diloco(delay=30), "delay must be below 30 (sync_every / fragments), not 30"),
    (lambda: diloco(fragments=3, delay=10), "delay must be below 10 (sync_every / fragments), not"),
    (lambda: diloco(fragments=4), "at most the number of parameter tensors, 3, not 4"),
    (lambda: diloco(fragments=4, sync_every=3), "fragments must be at most sync_every, 3, not 4"),
    (
        lambda: diloco(outer_optimizer=0.7),
        "outer_optimizer must be a torch.optim.Optimizer, not fl",
    ),
    (lambda: diloco(outer_optimizer=sgd()), "outer_optimizer has none of the model's parameters"),
    (diloco_of_one_optimizer, "are the same object: each needs its own state"),
    (diloco_with_a_part_of_the_outer_parameters, "does not have the parameter 'embedding.weight'"),
    (diloco_unfrozen, "does not have the parameter 'embedding.weight', which is trained: build it"),
    (
        lambda: diloco(final="int4"),
        "final: expected a compressor such as LBGM(TopK(0.01)), not s",
    ),
    (lambda: diloco(accept=True), "accept must be a function of the averages, not True"),
    (lambda: diloco(weight=0), "weight must be above 0 and finite, not 0"),
    (lambda: diloco(process_group=3), "must be a torch.distributed.ProcessGroup, not 3"),
    (lambda: diloco(model=sharded()), "parameter 'w' is a DTensor, as fully_shard makes them"),
    (
        diloco_twice,
        "another DiLoCo counts the steps of this inner optimizer: call its close() first",
    ),
    (lambda: diloco().step(), "counted by themselves: call optimizer.step() alone, without diloco"),
    (
        lambda: diloco().load_state_dict({}),
        "is not a state of local training, as DiLoCo.state_dict() returns it",
    ),
    (
        lambda: diloco(TopK(0.1)).load_state_dict(diloco().state_dict()),
        "the state is that of LBGM(), and this end uses TopK(0.1)",
    ),
    (
        lambda: diloco(residual="memory").load_state_dict(diloco().state_dict()),
        'the state was saved with residual="model", and residual is "memory" here',
    ),
    (
        lambda: diloco(model=nn.Linear(2, 2)).load_state_dict(diloco().state_dict()),
        "the state is that of another model: names or shapes differ",
    ),
    # Flower
    (
        lambda: app_with(lambda flower: [flower.CompressionMod]),
        "has the class: write CompressionMod(), with brackets",
    ),
    (
        lambda: app_with(lambda flower: flower.compression_mod),
        "a list of mods: write ClientApp(mods=[compression_mod])",
    ),
    (nested_strategies, "is a CompressedStrategy already: wrap the strategy inside it once"),
    # The ends
    (lambda: Sender(LBGM), "not the class LBGM: write LBGM(...), with brackets"),
    (lambda: Sender(LBGM()).compress(torch.ones(4)), "a mapping from names to tensors, .* not Ten"),
    (lambda: Sender(LBGM()).compress({}), "there are no tensors"),
    (lambda: Sender(LBGM()).compress({"w": None}), "'w' is None: run the backward pass first"),
    (lambda: Sender(LBGM()).compress({"w": torch.ones(4).to_sparse()}), "call .to_dense() first"),
    (
        lambda: Sender(LBGM()).compress({"w": torch.arange(4)}),
        "must be one of float32, .* not torch",
    ),
    (lambda: Receiver(LBGM(), like=torch.ones(4)), "a mapping from names to tensors"),
    (
        lambda: Receiver(LBGM(), like=GRADS).decompress("0", b"bytes"),
        "a message is a flat uint8 te",
    ),
    (lambda: Receiver(LBGM(), like=GRADS).decompress(0.5, torch.ones(4)), "an int or a str"),
    # Compressors and expressions
    (lambda: LBGM(LBGM()), "looks back itself"),
    (lambda: LBGM(0.2), "LBGM wraps a compressor, not 0.2"),
    (lambda: ErrorFeedback(TopK), "not the class TopK: write TopK(...), with brackets"),
    (lambda: TopK(10), "ratio must be above 0 and at most 1, not 10"),
    (lambda: Atomo(0.5), "rank must be a whole number of at least 1, not 0.5"),
    (lambda: SignSGD(scaled=True, vote=True), "a majority vote discards the scales"),
    (lambda: LookBackSubspace(values="fp16"), "values must be one of"),
    (lambda: parse_compressor("TopK"), "write TopK(...)"),
    (lambda: parse_compressor("topk(0.1)"), "unknown compressor 'topk'; known are"),
    (lambda: parse_compressor("Topk(0.1)"), "(did you mean TopK?)"),
    (lambda: parse_compressor("TopK(0.1"), "check its brackets, commas and quotes"),
    (lambda: parse_compressor("TopK()"), "TopK() missing 1 required positional argument: 'ratio'"),
    (lambda: parse_compressor("TopK(0.1, values=int4)"), "write 'int4', in quotes, if it is text"),
    (lambda: parse_compressor("SignSGD(scaled=true)"), "write True"),
    (lambda: parse_compressor(TopK(0.1)), "expected an expression as text, .* not TopK(0.1)"),
    (lambda: parse_compressor("Mine()", known=Identity), "write known=[Identity]"),
]


@pytest.mark.parametrize(("use", "sentence"), WRONG)
def test_wrong_use_is_one_sentence_that_says_what_to_do(use, sentence):
    with pytest.raises((TypeError, ValueError, RuntimeError, AttributeError)) as caught:
        use()
    text = str(caught.value)
    for part in sentence.split(" .* "):
        assert part in text, text
