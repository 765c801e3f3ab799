"""The adapter for GRACE in both directions, with its protocol and with a real checkout."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import sys
import types
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from lbgm_compress import (
    LBGM,
    Atomo,
    ErrorFeedback,
    Identity,
    LookBackSubspace,
    OutOfSyncError,
    PayloadError,
    Receiver,
    Sender,
    SignSGD,
    TopK,
    parse_compressor,
)
from lbgm_compress.adapters.grace import FromGrace, GraceCompressor
from lbgm_compress.adapters.grace.communicators import calling_communicator
from lbgm_compress.collective.averager import Averager
from lbgm_compress.collective.transport import ProcessGroupTransport
from tests import grace_protocol as protocol
from tests.gradients import awkward_shapes, training_run
from tests.horovod_ranks import horovodrun, needs_horovod
from tests.laws import assert_same_bits, check_laws
from tests.ranks import run_ranks
from tests.test_hostile import mutated

ROOT = Path(__file__).parent.parent
STAND_INS = [
    protocol.LargestK(0.1),
    protocol.Above(),
    protocol.Counted(0.2),
    protocol.MomentumSigns(momentum=0.5),
    protocol.Rounded(),
]
EXPRESSIONS = [
    "LargestK(0.1)",
    "Above()",
    "Counted(0.2)",
    "MomentumSigns(momentum=0.5)",
    "Rounded()",
]
WRAPPED = [FromGrace(stand_in) for stand_in in STAND_INS]
NAMES = {"FromGrace": FromGrace, **vars(protocol)}


@pytest.mark.parametrize(
    ("wrap", "dtype"),
    [
        *((lambda c: c, dtype) for dtype in (torch.float32, torch.bfloat16, torch.float64)),
        (LBGM, torch.float16),
        (LBGM, torch.float32),
        (ErrorFeedback, torch.float32),
    ],
)
@pytest.mark.parametrize("compressor", WRAPPED, ids=repr)
def test_every_law_holds_for_graces_compressors(compressor, wrap, dtype):
    base = awkward_shapes(dtype, seed=0)
    # One of them rounds to int8, and does not keep larger values.
    del base["wide range"]
    run = [base, *({n: g * (1 - 0.1 * i) for n, g in base.items()} for i in range(3))]
    check_laws(wrap(compressor), run, NAMES)


@pytest.mark.parametrize("compressor", WRAPPED, ids=repr)
def test_every_law_holds_on_gradients_of_a_training_run(compressor):
    check_laws(LBGM(compressor, delta=0.5), training_run(20), NAMES)


@pytest.mark.parametrize(("compressor", "expression"), list(zip(WRAPPED, EXPRESSIONS, strict=True)))
def test_repr_is_the_expression_that_builds_it(compressor, expression):
    assert repr(LBGM(compressor)) == f"LBGM(FromGrace({expression}))"


@pytest.mark.parametrize("compressor", WRAPPED, ids=repr)
def test_expression_is_read_back_where_its_classes_are_known(compressor):
    known = [FromGrace, type(compressor.compressor)]
    for made in (compressor, LBGM(ErrorFeedback(compressor))):
        assert parse_compressor(repr(made), known=known) == made
    with pytest.raises(ValueError, match="unknown compressor 'FromGrace'"):
        parse_compressor(repr(compressor))


def test_compressors_of_one_expression_and_two_origins_are_not_equal():
    class LargestK(protocol.LargestK):
        """A class of the same name, elsewhere."""

    ours, others = FromGrace(protocol.LargestK(0.1)), FromGrace(LargestK(0.1))
    assert repr(ours) == repr(others)
    assert ours != others
    assert parse_compressor(repr(ours), known=[FromGrace, LargestK]) == others


def test_graces_compressor_is_copied_and_global_randomness_left_alone():
    for stand_in in (protocol.Counted(0.5), protocol.MomentumSigns(), protocol.Rounded()):
        before = dict(vars(stand_in))
        compressor = FromGrace(stand_in)
        random_state = torch.get_rng_state()
        state = compressor.initial_state(0)
        for _ in range(3):
            _, _, state = compressor.compress(torch.randn(50), state)
            torch.set_rng_state(random_state)
        compressor.compress(torch.ones(50), state)
        assert torch.equal(torch.get_rng_state(), random_state)
        assert vars(stand_in) == before


def test_what_graces_compressor_remembers_differs_by_tensor_and_goes_on_by_round():
    grads = {"a": torch.ones(8), "b": -torch.ones(8)}
    compressor = FromGrace(protocol.MomentumSigns(momentum=0.9))
    sender, receiver = Sender(compressor), Receiver(compressor, grads)
    receiver.decompress(0, sender.compress(grads))
    flipped = {name: -0.5 * grad for name, grad in grads.items()}
    decoded = receiver.decompress(0, sender.compress(flipped))
    # 0.1 x -0.5 + 0.9 x 1
    assert torch.allclose(decoded["a"], torch.full((8,), 0.85))
    assert torch.allclose(decoded["b"], torch.full((8,), -0.85))
    assert torch.equal(compressor.finish(torch.tensor([0.1, -0.2])), torch.tensor([1.0, -1.0]))


def test_counted_draws_are_decoded_in_any_later_round():
    grad = torch.randn(100)
    compressor = LBGM(FromGrace(protocol.Counted(0.3)), delta=1.0)
    sender, receiver = Sender(compressor), Receiver(compressor, {"w": grad})
    first = receiver.decompress(0, sender.compress({"w": grad}))["w"]
    for _ in range(3):
        message = sender.compress({"w": grad})
        assert message.numel() == 21
        decoded = receiver.decompress(0, message)["w"]
        # The result is a multiple of the first draw. Later draws serve the angle alone.
        assert torch.equal(decoded != 0, first != 0)


class Distracted(protocol.Base):
    """A compressor that decompresses with its own context only."""

    def compress(self, tensor, name):
        return [tensor / tensor.abs().max()], tensor.abs().max()

    def decompress(self, tensors, ctx):
        return tensors[0] * ctx


class Forgetful(protocol.Base):
    def __init__(self, ratio):
        super().__init__()
        self.share = ratio

    def compress(self, tensor, name):
        return [tensor], None

    def decompress(self, tensors, ctx):
        return tensors[0]


class PowerSGDCompressor(Forgetful):
    """A class of a name that is refused."""


class EFSignSGDCompressor(Forgetful):
    """A class of a name that is refused."""


class DgcMemory(protocol.NoMemory):
    """A class of a name that is refused."""


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (PowerSGDCompressor(1), "PowerSGDCompressor cannot be used here: it communicates inside"),
        (EFSignSGDCompressor(1), "divided by a learning rate that only its own memory"),
        (DgcMemory(), "DgcMemory cannot be used here: it communicates inside compensate"),
        (protocol.Residual(), "is a memory of GRACE's, not a compressor: use ErrorFeedback"),
        (TopK(0.1), "FromGrace wraps a GRACE compressor"),
        ("topk", "FromGrace wraps a GRACE compressor, not 'topk'"),
        (Forgetful(0.1), "does not keep its argument ratio"),
    ],
)
def test_what_cannot_be_wrapped_is_refused_with_the_reason(wrong, message):
    with pytest.raises(TypeError, match=message):
        FromGrace(wrong)


def test_compressor_whose_context_no_receiver_can_have_is_told_at_the_first_gradient():
    with pytest.raises(TypeError, match="needs its own context"):
        FromGrace(Distracted()).compress(torch.randn(9), {})


@pytest.mark.timeout(200)
@pytest.mark.parametrize("compressor", WRAPPED, ids=repr)
def test_hostile_payloads_of_graces_compressors_do_no_harm(compressor):
    rng = random.Random(5)
    like = {"w": torch.empty(20, 30)}
    grads = [{"w": torch.randn(20, 30)} for _ in range(6)]
    wrapped = LBGM(compressor)
    messages = [bytes(Sender(wrapped).compress(g).tolist()) for g in grads]
    receiver = Receiver(wrapped, like)
    receiver.decompress("good", torch.tensor(list(messages[0]), dtype=torch.uint8))
    held = receiver.state_dict()
    decoded = 0
    for _ in range(600):
        data = mutated(rng, rng.choice(messages), messages, receiver.head_size())
        message = torch.tensor(list(data), dtype=torch.uint8)
        before = receiver.state_dict()
        try:
            tensors = receiver.decompress("bad", message)
            decoded += 1
        except PayloadError:
            assert_same_bits(receiver.state_dict(), before)
        else:
            assert tensors["w"].shape == (20, 30)
    assert decoded < 600
    assert_same_bits(receiver.state_dict()["senders"]["good"], held["senders"]["good"])


OURS = [
    Identity(),
    TopK(0.1),
    SignSGD(vote=True),
    LBGM(delta=0.4),
    LBGM(TopK(0.1), delta=0.6),
    LBGM(SignSGD(), delta=0.8),
    ErrorFeedback(LBGM(Atomo(rank=2))),
    LBGM(FromGrace(protocol.LargestK(0.1)), delta=0.6),
    LookBackSubspace(4, 0.9, values="int4"),
]


@pytest.mark.parametrize("memory", [protocol.NoMemory, protocol.Residual])
@pytest.mark.parametrize("compressor", OURS, ids=repr)
def test_ours_work_in_graces_rounds_and_every_rank_gets_the_same_average(compressor, memory):
    ranks = [(GraceCompressor(compressor, rank=rank), memory()) for rank in range(3)]
    history = training_run(30, batch=400)
    recycled = 0
    for number in range(25):
        for name in ("hidden.weight", "output.bias"):
            grads = [history[number + rank][name] for rank in range(3)]
            averages = protocol.gather_round(ranks, grads, name)
            assert torch.equal(averages[0], averages[1])
            assert torch.equal(averages[0], averages[2])
            if compressor == Identity():
                assert torch.allclose(averages[0], sum(grads) / 3, atol=1e-6)
            recycled += ranks[0][0].report()[name].recycled
    # With the errors of a sparsifier fed back, no gradient is like the one before.
    if memory is protocol.NoMemory and compressor != ErrorFeedback(LBGM(Atomo(rank=2))):
        assert bool(recycled) == compressor.receiver_has_state


def test_average_is_that_of_our_own_ends():
    compressor = LBGM(TopK(0.2), delta=0.5)
    ranks = [(GraceCompressor(compressor, rank=rank), protocol.NoMemory()) for rank in range(2)]
    senders = [Sender(compressor) for _ in range(2)]
    receiver = Receiver(compressor, {"w": torch.empty(32, 64)})
    history = training_run(12)
    for number in range(10):
        grads = [history[number + rank]["hidden.weight"] for rank in range(2)]
        expected = torch.zeros(32, 64)
        for rank, sender in enumerate(senders):
            receiver.accumulate(rank, sender.compress({"w": grads[rank]}), {"w": expected}, 0.5)
        assert torch.allclose(protocol.gather_round(ranks, grads, "w")[0], expected, atol=1e-7)


def test_own_payload_can_be_decoded_again_without_a_change_of_state():
    one = GraceCompressor(LBGM(delta=1.0), rank=0)
    other = GraceCompressor(LBGM(delta=1.0), rank=1)
    grad = torch.randn(40)
    for number in range(3):
        tensors, ctx = one.compress(grad * (number + 1), "w")
        sent = other.compress(grad, "w")
        state = one.sender.state_dict()
        for _ in range(3):
            decoded = one.decompress(tensors, ctx)
            assert torch.allclose(decoded, grad * (number + 1), atol=1e-5)
            decoded.zero_()
            assert torch.equal(one.decompress(sent[0], ctx), other.decompress(*sent))
        assert_same_bits(one.sender.state_dict(), state)


def test_sums_of_payloads_and_foreign_payloads_are_refused():
    one, other = (GraceCompressor(LBGM(), rank=rank) for rank in range(2))
    grad = torch.randn(40)
    [mine], ctx = one.compress(grad, "w")
    [theirs], _ = other.compress(grad, "w")
    with pytest.raises(PayloadError):
        one.decompress([mine + theirs], ctx)
    same_rank = GraceCompressor(LBGM(), rank=0).compress(-grad, "w")[0]
    with pytest.raises(PayloadError, match="bears the number of this rank"):
        one.decompress(same_rank, ctx)
    with pytest.raises(PayloadError, match="a rank's number and a message"):
        one.decompress([mine[:1]], ctx)
    # A rank that has restarted holds nothing that the others look back at.
    [recycled], _ = other.compress(grad, "w")
    with pytest.raises(OutOfSyncError):
        one.decompress([recycled], ctx)


def communicator(kind, module, compressor):
    """Return an object that calls a compressor as GRACE's communicator of that name does."""
    made = type(kind, (protocol.Communicator,), {})
    made.__module__ = module
    return made(compressor)


@pytest.mark.parametrize(
    ("kind", "module", "compressor", "message"),
    [
        ("Allreduce", "grace_dl.torch.communicator.allreduce", Identity(), "adds up what it moves"),
        ("Allreduce", "grace_dl.dist.communicator.allreduce", LBGM(), "use GRACE's Allgather"),
        ("AllToAll", "grace_dl.dist.communicator.all_to_all", LBGM(), "AllToAll adds up"),
        ("Broadcast", "grace_dl.torch.communicator.broadcast", LBGM(), "payloads of one size"),
        ("Broadcast", "grace_dl.torch.communicator.broadcast", Identity(), None),
        ("Allgather", "grace_dl.dist.communicator.allgather", TopK(0.1), r"calls \.cuda\(\)"),
        ("Allgather", "grace_dl.dist.communicator.allgather", Identity(), None),
        ("Allgather", "grace_dl.torch.communicator.allgather", LBGM(), None),
        ("Allreduce", "somewhere.else", LBGM(), None),
    ],
)
def test_communicators_that_cannot_carry_messages_are_refused_before_they_do(
    kind, module, compressor, message
):
    ours = GraceCompressor(compressor, rank=0)
    caller = communicator(kind, module, ours)
    if message is None:
        assert caller.step(torch.ones(5), "w")[0][0].dtype == torch.uint8
    else:
        with pytest.raises(TypeError, match=message):
            caller.step(torch.ones(5), "w")
        assert ours.sender.state_dict()["tensors"] == {}


def test_communicator_is_found_below_wrappers_and_above_its_own_subclasses():
    ours = GraceCompressor(LBGM(), rank=0)
    allreduce = communicator("Allreduce", "grace_dl.torch.communicator.allreduce", ours)

    class Timed(type(allreduce)):
        """A subclass of the user's, whose compressor is called through a decorator."""

        def step(self, tensor, name):
            return torch.no_grad()(super().step)(tensor, name)

    class Trainer:
        def __init__(self):
            self.communicator, self.compressor = Timed(ours), "LBGM"

        def train(self):
            return self.communicator.step(torch.ones(5), "w")

    with pytest.raises(TypeError, match="adds up what it moves"):
        Trainer().train()


def test_what_is_no_communicator_of_graces_is_let_through():
    class Hostile:
        @property
        def __dict__(self):
            raise RuntimeError("do not look")

        def step(self, compressor):
            return compressor.compress(torch.ones(5), "w")

    ours = GraceCompressor(LBGM(), rank=0)
    assert calling_communicator(ours) is None
    [payload], ctx = Hostile().step(ours)
    assert torch.equal(ours.decompress([payload], ctx), torch.ones(5))


def test_rank_comes_from_the_engine_that_runs(monkeypatch):
    engine = types.SimpleNamespace(is_initialized=lambda: True, rank=lambda: 700)
    monkeypatch.setitem(sys.modules, "horovod.torch", engine)
    _, ctx = GraceCompressor(Identity()).compress(torch.ones(3), "w")
    assert ctx.rank == 700
    monkeypatch.setitem(sys.modules, "horovod.torch", None)
    with pytest.raises(RuntimeError, match=r"neither Horovod nor torch\.distributed"):
        GraceCompressor(Identity()).compress(torch.ones(3), "w")
    with pytest.raises(TypeError, match="expected a compressor such as LBGM"):
        GraceCompressor(protocol.LargestK(0.1))


def checkout():
    """Return the folder of a checkout of GRACE, or None."""
    path = os.environ.get("GRACE_DL_PATH")
    if path:
        return path if (Path(path) / "grace_dl" / "torch").is_dir() else None
    found = importlib.util.find_spec("grace_dl")
    return None if found is None else str(Path(found.origin).parent.parent)


needs_checkout = pytest.mark.skipif(
    checkout() is None, reason="no checkout of sands-lab/grace: set GRACE_DL_PATH"
)


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """Return the results of tests/grace_job.py on two ranks."""
    folder = tmp_path_factory.mktemp("grace")
    command = [sys.executable, str(ROOT / "tests" / "grace_job.py"), str(folder / "found.json")]
    done = horovodrun(
        ["-np", "2", "--gloo", "--network-interfaces", "lo", *command],
        timeout=250,
        environment={"PYTHONPATH": os.pathsep.join([str(ROOT), checkout()])},
    )
    assert done.returncode == 0, done.stdout
    return json.loads((folder / "found.json").read_text())


COMPRESSORS = {
    **dict.fromkeys(("none", "fp16", "topk", "randomk", "threshold", "dgc"), "works"),
    **dict.fromkeys(("qsgd", "terngrad", "signsgd", "signum", "onebit"), "works"),
    "natural": "No module named 'cupy'",
    "powersgd": "it communicates inside compress()",
    "efsignsgd": "divided by a learning rate",
}


@pytest.mark.grace
@pytest.mark.horovod
@pytest.mark.xdist_group("grace")
@needs_horovod
@needs_checkout
@pytest.mark.timeout(300)
@pytest.mark.parametrize(("name", "expected"), list(COMPRESSORS.items()))
def test_compressor_of_a_real_checkout(real, name, expected):
    found = real["from grace"][name]
    if expected != "works":
        assert expected in found["refused"]
        return
    assert found["same"], "ranks differ"
    assert found["accuracy"] > 0.5
    assert found["bytes"] > 0
    assert found["bytes under LBGM"] > 0


@pytest.mark.grace
@pytest.mark.horovod
@pytest.mark.xdist_group("grace")
@needs_horovod
@needs_checkout
@pytest.mark.timeout(300)
def test_ours_train_with_the_communicators_and_memories_of_a_real_checkout(real):
    runs = real["grace compressor"]
    assert len(runs) >= 6
    for name, found in runs.items():
        assert found["same"], name
        assert found["accuracy"] > 0.5, name
    refusals = real["refusals"]
    assert "adds up what it moves" in refusals["Allreduce"]
    assert "one size on all ranks" in refusals["Broadcast"]
    assert "DgcMemory cannot be used here" in refusals["DgcMemory"]


def in_torch_distributed(rank, path):
    sys.path.insert(0, path)
    from grace_dl.dist.communicator.allgather import Allgather
    from grace_dl.dist.compressor.topk import TopKCompressor
    from grace_dl.dist.memory.residual import ResidualMemory

    grad = torch.arange(20.0).view(4, 5) * (rank + 1)
    mean = Allgather(GraceCompressor(Identity()), ResidualMemory(), 2).step(grad, "w")
    try:
        Allgather(GraceCompressor(LBGM()), ResidualMemory(), 2).step(grad, "w")
    except TypeError as error:
        refusal = str(error)
    averager = Averager(
        LBGM(FromGrace(TopKCompressor(0.5))), {"w": grad}, ProcessGroupTransport(dist.new_group())
    )
    sums = [averager.average({"w": grad})["w"] for _ in range(2)]
    return mean, refusal, sums, averager.stats()["recycled_share"]


@pytest.mark.grace
@needs_checkout
def test_torch_distributed_with_a_real_checkout():
    for mean, refusal, sums, recycled in run_ranks(in_torch_distributed, 2, checkout()):
        assert torch.equal(mean, torch.arange(20.0).view(4, 5) * 1.5)
        assert "on the CPU use lbgm_compress.adapters.ddp" in refusal
        assert torch.equal(sums[0].view(-1)[10:], torch.arange(10.0, 20.0) * 1.5)
        assert torch.allclose(sums[0], sums[1])
        assert recycled == 0.5
