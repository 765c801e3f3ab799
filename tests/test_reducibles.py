"""Algorithms whose contributions add up: their laws, and ranks that run in one process."""

from __future__ import annotations

import math
import warnings

import pytest
import torch

from lbgm_compress import (
    LBGM,
    ErrorFeedback,
    PowerSGD,
    Receiver,
    Sender,
    SharedLBGM,
    SharedSubspace,
    TopK,
)
from lbgm_compress.adapters.grace import GraceCompressor
from lbgm_compress.collective import Averager
from lbgm_compress.collective.lockstep import Lockstep
from tests import test_random_walk
from tests.compressors import REDUCIBLES
from tests.gradients import awkward_shapes, training_run
from tests.invariant import check_invariant, keeps_invariant, residuals
from tests.laws import assert_same_bits, copied, saved_and_loaded
from tests.rank_threads import Ranks
from tests.reducible_laws import check_reducible_laws
from tests.test_random_walk import Bucketed, Walk

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
RANKS = 3


def of_ranks(base, noise, seed):
    """Return gradients of several ranks around one."""
    numbers = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(RANKS):
        made.append(
            {
                name: grad + noise * grad.abs().mean() * normal_like(grad, numbers)
                if grad.numel()
                else grad.clone()
                for name, grad in base.items()
            }
        )
    return made


def normal(size):
    return torch.randn(size, generator=torch.Generator().manual_seed(size))


def normal_like(like, numbers):
    return torch.empty_like(like).copy_(torch.randn(like.shape, generator=numbers))


@pytest.mark.parametrize("algorithm", REDUCIBLES, ids=repr)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_laws_hold_on_random_gradients_of_every_shape(algorithm, dtype):
    base = awkward_shapes(dtype, seed=0)
    run = [of_ranks(base, 0.3, seed) for seed in range(3)]
    run.append([{name: -0.5 * grad for name, grad in grads.items()} for grads in run[-1]])
    check_reducible_laws(algorithm, run)


@pytest.mark.parametrize("algorithm", REDUCIBLES, ids=repr)
def test_laws_hold_on_gradients_of_a_training_run(algorithm):
    run = [of_ranks(base, 0.5, seed) for seed, base in enumerate(training_run(8))]
    check_reducible_laws(algorithm, run)


# --- ranks of one process ------------------------------------------------------------------------

SHAPES = {"matrix": (24, 40), "tall": (60, 6), "conv": (8, 4, 3, 3), "vector": (30,)}
LIKES = {name: torch.empty(shape) for name, shape in SHAPES.items()}
FED_BACK = [a for a in REDUCIBLES if isinstance(a, ErrorFeedback) and a.decay == 1]
SOME = [
    ErrorFeedback(SharedSubspace(2, refresh_every=2)),
    ErrorFeedback(PowerSGD(2)),
    ErrorFeedback(SharedLBGM(0.5)),
    SharedSubspace(2, refresh_every=2, values="float32"),
    ErrorFeedback(SharedSubspace(2, refresh_every=2, values="int8")),
]


def tolerance(algorithm):
    """Return the relative error of a sum of averages, by the precision of an algorithm's sums."""
    inner = algorithm.inner if isinstance(algorithm, ErrorFeedback) else algorithm
    return 1e-5 if inner.values == "float32" else 5e-3


def gradients(rank, step, shapes=SHAPES):
    """Return gradients with a part that all ranks and a few steps have in common."""
    common = torch.Generator().manual_seed(step // 3)
    own = torch.Generator().manual_seed(1000 + 50 * step + rank)
    return {
        name: torch.randn(shape, generator=common) + 0.3 * torch.randn(shape, generator=own)
        for name, shape in shapes.items()
    }


class Group:
    """Averagers of ranks that are threads."""

    def __init__(self, algorithm, size=RANKS, likes=LIKES, kind=Averager, **options):
        self.ranks = Ranks(size)
        self.averagers = []
        for rank, transport in enumerate(self.ranks.transports):
            mine = {key: of[rank] for key, of in options.items()}
            self.averagers.append(kind(algorithm, likes, transport, **mine))

    def average(self, given):
        """Return the averages, of which all ranks have the same bits, of the gradients of each."""
        found = self.ranks.run(lambda rank, grads: self.averagers[rank].average(grads), given)
        for other in found[1:]:
            assert_same_bits(other, found[0])
        return found[0]

    def step(self, number):
        return self.average([gradients(rank, number) for rank in range(self.ranks.size)])

    def states(self):
        return copied([averager.state_dict() for averager in self.averagers])

    def saved(self):
        return saved_and_loaded([averager.state_dict() for averager in self.averagers])

    def load(self, states):
        for averager, state in zip(self.averagers, states, strict=True):
            averager.load_state_dict(state)


@pytest.fixture
def group():
    """Build groups, whose threads end with the test."""
    groups = []

    def build(*arguments, **options):
        groups.append(Group(*arguments, **options))
        return groups[-1]

    yield build
    for one in groups:
        one.ranks.close()


@pytest.mark.parametrize("algorithm", FED_BACK, ids=repr)
def test_applied_averages_and_residuals_are_the_sum_of_the_true_averages(algorithm):
    lockstep = Lockstep(algorithm, RANKS)
    applied = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    true = [copied(applied) for _ in range(RANKS)]
    shares = [0.2, 0.3, 0.5]
    for step in range(20):
        given = [gradients(rank, step) for rank in range(RANKS)]
        for name, average in lockstep.average(given, shares).items():
            applied[name] += average
            for mine, grads in zip(true, given, strict=True):
                mine[name] += grads[name]
    kept = [residuals(worker.state_dict()) for worker in lockstep.workers]
    check_invariant(applied, true, kept, shares, tolerance=tolerance(algorithm))


@pytest.mark.parametrize("algorithm", SOME, ids=repr)
@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_inf_on_one_rank_is_nan_on_all_and_the_step_is_taken_back(algorithm, value, group):
    ranks, twin = group(algorithm), group(algorithm)
    for name in ["matrix", "vector", "conv"]:
        for step in range(2):
            assert_same_bits(ranks.step(step), twin.step(step))
        before = ranks.states()
        given = [gradients(rank, 7) for rank in range(RANKS)]
        given[1][name].view(-1)[4] = value
        averages = ranks.average(given)
        assert averages[name].isnan().all()
        assert all(a.isfinite().all() for other, a in averages.items() if other != name)
        after = ranks.states()
        for state, old in zip(after, before, strict=True):
            assert state["step"] == old["step"] + 1
            assert_same_bits(state["sender"], old["sender"])
    assert_same_bits(ranks.step(3), twin.step(3))


@pytest.mark.parametrize("algorithm", SOME, ids=repr)
def test_parameter_that_no_rank_uses_gets_zero_and_keeps_its_state(algorithm, group):
    ranks = group(algorithm)
    for step in range(3):
        ranks.step(step)
    before = ranks.states()
    given = [gradients(rank, 3) for rank in range(RANKS)]
    for grads in given:
        for name in ("matrix", "vector"):
            grads[name].zero_()
    averages = ranks.average(given)
    for name, average in averages.items():
        assert bool(average.any()) == (name in ("tall", "conv"))
    for state, old in zip(ranks.states(), before, strict=True):
        tensors, held = state["sender"]["tensors"], old["sender"]["tensors"]
        for name in ("matrix", "vector"):
            assert_same_bits(tensors[name], held[name])


@pytest.mark.parametrize("algorithm", SOME[:3], ids=repr)
def test_parameter_that_one_rank_does_not_use_keeps_its_residual_there(algorithm, group):
    ranks = group(algorithm)
    for step in range(3):
        ranks.step(step)
    before = [residuals(state) for state in ranks.states()]
    given = [gradients(rank, 3) for rank in range(RANKS)]
    given[2]["matrix"].zero_()
    averages = ranks.average(given)
    after = [residuals(state) for state in ranks.states()]
    assert averages["matrix"].any()
    assert_same_bits(after[2]["matrix"], before[2]["matrix"])
    found, true = averages["matrix"].double(), torch.zeros(24, 40, dtype=torch.float64)
    for rank in range(RANKS):
        true += (given[rank]["matrix"] + before[rank]["matrix"]) / RANKS
        found += after[rank]["matrix"] / RANKS
    assert torch.allclose(found, true, atol=0.02)


@pytest.mark.parametrize("algorithm", SOME, ids=repr)
def test_step_that_all_ranks_undo_leaves_no_trace(algorithm, group):
    ranks, twin = group(algorithm), group(algorithm)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(5):
            before = ranks.states()
            ranks.average([{n: 50 * g for n, g in gradients(r, 20).items()} for r in range(RANKS)])
            for averager in ranks.averagers:
                averager.undo()
            for state, old in zip(ranks.states(), before, strict=True):
                assert_same_bits(state["sender"], old["sender"])
            assert_same_bits(ranks.step(step), twin.step(step))


class Counted(Averager):
    """Counts the sums of a rank."""

    def __init__(self, algorithm, likes, transport, **options):
        super().__init__(algorithm, likes, transport, **options)
        self.sums = []
        all_reduce = transport.all_reduce

        def counted(data):
            self.sums.append(data.dtype)
            return all_reduce(data)

        transport.all_reduce = counted


@pytest.mark.parametrize(
    ("first", "factor"), [(0.1, 1e4), (1e-8, 1.0), (0.1, 1e-5), (1e-3, 1e30), (1e-8, 1e-7)]
)
def test_gradient_out_of_the_range_of_float16_costs_a_sum_and_loses_nothing(first, factor, group):
    ranks = group(SharedLBGM(0), kind=Counted, likes={"w": torch.empty(40)})
    true = torch.linspace(-1, 1, 40)
    counts = []
    for size in (first, first, first * factor, first * factor):
        for averager in ranks.averagers:
            averager.sums.clear()
        average = ranks.average([{"w": size * true * (rank + 1)} for rank in range(RANKS)])["w"]
        counts.append(list(ranks.averagers[0].sums))
        assert all(averager.sums == counts[-1] for averager in ranks.averagers)
        again = len(counts[-1]) == 2
        error = (average / size - 2 * true).abs().max()
        assert error < (1e-6 if again else 2e-3), f"{size}: {error}"
    half, again = [torch.float16], [torch.float16, torch.float32]
    assert counts[:2] == [half if first > 1e-6 else again, half]
    assert counts[2:] == [again if factor != 1 else half, half]


@pytest.mark.parametrize("algorithm", FED_BACK, ids=repr)
def test_gradients_that_grow_and_shrink_lose_nothing(algorithm, group):
    ranks = group(algorithm)
    applied = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in SHAPES.items()}
    true = [copied(applied) for _ in range(RANKS)]
    for step, size in enumerate([1e-8, 1e-8, 1e-4, 1.0, 1e4, 1.0, 1e-8, 1e-3]):
        given = [
            {name: size * grad for name, grad in gradients(rank, step).items()}
            for rank in range(RANKS)
        ]
        for name, average in ranks.average(given).items():
            applied[name] += average
            for mine, grads in zip(true, given, strict=True):
                mine[name] += grads[name]
    kept = [residuals(state) for state in ranks.states()]
    check_invariant(applied, true, kept, tolerance=tolerance(algorithm))


@pytest.mark.parametrize("algorithm", SOME, ids=repr)
def test_loss_scale_makes_no_difference(algorithm, group):
    scale = [1.0]
    scaled = group(algorithm, loss_scale=[lambda: scale[0]] * RANKS)
    plain = group(algorithm)
    for step, scale[0] in enumerate([1.0, 4.0, 65536.0, 65536.0, 0.5]):
        given = [gradients(rank, step) for rank in range(RANKS)]
        expected = plain.average(given)
        found = scaled.average([{n: g * scale[0] for n, g in grads.items()} for grads in given])
        for name, average in found.items():
            error = (average / scale[0] - expected[name]).norm() / expected[name].norm()
            assert error < 10 * tolerance(algorithm), f"{name} in step {step}: {error}"


def test_ranks_count_by_their_weights(group):
    ranks = group(SharedLBGM(0), likes={"w": torch.empty(3)}, weight=[1.0, 2.0, 5.0])
    average = ranks.average([{"w": torch.full((3,), 8.0 * rank)} for rank in range(RANKS)])["w"]
    assert torch.allclose(average, torch.full((3,), 2.0 + 10.0), rtol=1e-3)


def test_tensors_of_several_dtypes_are_averaged_together(group):
    dtypes = {"a": torch.float32, "b": torch.float64, "c": torch.bfloat16, "d": torch.float16}
    for values in ("float16", "float32"):
        for algorithm in (PowerSGD(2, values), ErrorFeedback(SharedSubspace(2, values=values))):
            likes = {n: torch.empty(20, 30, dtype=d) for n, d in dtypes.items()}
            likes["empty"] = torch.empty(0, 3, dtype=torch.float64)
            ranks = group(algorithm, likes=likes)
            for step in range(3):
                given = [
                    {
                        name: grad.to(likes[name].dtype)
                        for name, grad in gradients(
                            rank, step, {n: like.shape for n, like in likes.items()}
                        ).items()
                    }
                    for rank in range(RANKS)
                ]
                averages = ranks.average(given)
                assert {n: a.dtype for n, a in averages.items()} == {
                    n: like.dtype for n, like in likes.items()
                }


def test_averages_are_in_memory_of_their_own(group):
    for algorithm in (SharedLBGM(0.5), ErrorFeedback(SharedLBGM(0, "float32")), PowerSGD(2)):
        ranks = group(algorithm)
        averages = ranks.step(0)
        before = ranks.states()
        for average in averages.values():
            average.fill_(9.0)
        assert_same_bits(ranks.states(), before)


# --- ranks that fail, or that are not alike ------------------------------------------------------


@pytest.mark.parametrize("algorithm", SOME, ids=repr)
@pytest.mark.parametrize("kind", [Averager, Bucketed])
def test_rank_that_fails_before_it_could_send_is_named_on_the_others(algorithm, kind, group):
    ranks = group(algorithm, kind=kind)
    ranks.step(0)

    def average(rank):
        grads = gradients(rank, 1)
        if rank == 1:
            grads["conv"] = torch.zeros(3)
        try:
            ranks.averagers[rank].average(grads)
        except Exception as error:
            return str(error)
        return None

    first, second, third = ranks.ranks.run(average)
    assert "the gradient 'conv' has shape and dtype" in second
    assert first == third == "rank 1 failed before it could send: see the error there"
    with pytest.raises(RuntimeError, match="load a checkpoint"):
        ranks.step(2)


# The first terms of `SharedLBGM(0)` have other sizes in an older state.
@pytest.mark.parametrize("algorithm", [*SOME, SharedLBGM(0)], ids=repr)
@pytest.mark.parametrize("kind", [Averager, Bucketed])
@pytest.mark.parametrize("event", ["an older state", "undo", "reset"])
def test_rank_that_differs_is_noticed_and_all_ranks_go_on_alike(algorithm, kind, event, group):
    ranks = group(algorithm, kind=kind)
    for step in range(4):
        ranks.step(step)
        if step == 0:
            saved = ranks.saved()
    if event == "undo":
        ranks.averagers[1].undo()
    elif event == "reset":
        ranks.averagers[1].reset()
    else:
        ranks.averagers[1].load_state_dict(saved[1])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(4, 8):
            ranks.step(step)
    messages = [str(warning.message) for warning in caught]
    assert len(messages) == RANKS, messages
    for message in messages:
        # A vector, of which sums alone are taken, is the same in an older state.
        count = 4 if event == "reset" else 3
        assert f"the ranks do not hold the same look-back gradients of {count} tensors" in message
    assert {averager.step for averager in ranks.averagers} == {8}


@pytest.mark.parametrize("algorithm", SOME, ids=repr)
def test_states_that_are_saved_and_loaded_go_on_bit_for_bit(algorithm, group):
    before, after = group(algorithm), group(algorithm)
    for step in range(3):
        before.step(step)
    after.load(before.saved())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # One rank alone finds its own state of this step.
        before.averagers[2].load_state_dict(before.saved()[2])
        for step in range(3, 6):
            assert_same_bits(after.step(step), before.step(step))
    assert_same_bits(after.states(), before.states())


@pytest.mark.parametrize("algorithm", SOME, ids=repr)
@pytest.mark.parametrize("later", [2, 3, 4])
def test_gathered_state_gives_every_rank_its_own_part(algorithm, later, group):
    before, after = group(algorithm), group(algorithm, later)
    for step in range(3):
        before.step(step)
    gathered, *nothing = before.ranks.run(lambda r: before.averagers[r].gather_state_dict())
    assert nothing == [{}, {}]
    gathered = saved_and_loaded(gathered)
    names = list(SHAPES)
    for rank, averager in enumerate(after.averagers):
        if rank < RANKS:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                averager.load_state_dict(gathered)
            own = before.averagers[rank].sender.state_dict()
            assert_same_bits(averager.sender.state_dict(), own)
        else:
            with pytest.warns(UserWarning, match="this is rank 3 of 4: its residual"):
                averager.load_state_dict(gathered)
            assert residuals(averager.state_dict()) == {}
        # What is shared is taken on all ranks.
        assert_same_bits(averager.sender.digest(names), before.averagers[0].sender.digest(names))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = after.step(3)
    if later == RANKS:
        assert_same_bits(found, before.step(3))


@pytest.mark.parametrize("algorithm", SOME, ids=repr)
def test_rank_that_joins_goes_on_with_the_others_and_one_that_leaves_costs_nothing(algorithm):
    averagers = []

    def steps(size, first):
        ranks = Ranks(size)
        for rank in range(len(averagers), size):
            averagers.append(Averager(algorithm, LIKES, ranks.transports[rank]))
        del averagers[size:]
        for averager, transport in zip(averagers, ranks.transports, strict=True):
            averager.transport = transport
        try:
            for step in range(first, first + 3):
                found = ranks.run(lambda r, s=step: averagers[r].average(gradients(r, s)))
                assert_same_bits(found, found[:1] * size)
        finally:
            ranks.close()
        assert {averager.step for averager in averagers} == {first + 3}

    steps(2, 0)
    with pytest.warns(UserWarning, match="look-back gradients of 4 tensors, as after"):
        steps(3, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        steps(2, 6)


# --- a random walk over all of this --------------------------------------------------------------


class SummedWalk(Walk):
    """A walk with the rounding of sums in float16."""

    def check(self):
        for model in self.models[1:]:
            assert_same_bits(model, self.models[0])
        if keeps_invariant(self.compressor):
            exact = tolerance(self.compressor) < 1e-3
            check_invariant(
                self.models[0],
                self.true,
                self.residuals(),
                self.shares,
                tolerance=1e-8 if exact else 2e-2,
            )


@pytest.mark.timeout(120)
@pytest.mark.parametrize("kind", [Averager, Bucketed])
@pytest.mark.parametrize(
    "algorithm",
    [
        *SOME,
        ErrorFeedback(SharedSubspace(2, refresh_every=2, values="float32")),
        ErrorFeedback(PowerSGD(1, "float32")),
        ErrorFeedback(SharedLBGM(0.5, "float32")),
    ],
    ids=repr,
)
@pytest.mark.filterwarnings("ignore:the ranks do not hold|the state is that of rank")
def test_nothing_is_lost_or_doubled_on_a_random_walk(algorithm, kind, monkeypatch):
    shapes = {"matrix": (18, 20), "wide": (3, 30), "vector": (7,), "expert": (15, 20), "scalar": ()}
    monkeypatch.setattr(test_random_walk, "SHAPES", shapes)
    monkeypatch.setattr(test_random_walk, "Walk", SummedWalk)
    test_random_walk.walk(algorithm, 40, kind, seed=4)


# --- wrong uses ----------------------------------------------------------------------------------


def strategy():
    pytest.importorskip("flwr", reason="Flower is not installed: it needs Python 3.11")
    from flwr.serverapp.strategy import FedAvg

    from lbgm_compress.adapters.flower import CompressedStrategy

    CompressedStrategy(FedAvg(), SharedSubspace())


WITHOUT_MESSAGES = "averages over ranks by sums and makes no messages"
WRONG = {
    "sender": (lambda: Sender(SharedSubspace()), TypeError, WITHOUT_MESSAGES),
    "sender with error feedback": (
        lambda: Sender(ErrorFeedback(PowerSGD(2))),
        TypeError,
        rf"ErrorFeedback\(PowerSGD\(rank=2\)\) {WITHOUT_MESSAGES}",
    ),
    "receiver": (lambda: Receiver(SharedLBGM(), LIKES), TypeError, WITHOUT_MESSAGES),
    "grace": (lambda: GraceCompressor(SharedSubspace(), 0), TypeError, WITHOUT_MESSAGES),
    "flower": (strategy, TypeError, WITHOUT_MESSAGES),
    "lbgm around a reducible": (
        lambda: LBGM(SharedSubspace()),
        ValueError,
        r"LBGM wraps a compressor, not SharedSubspace\(\)",
    ),
    "lbgm around error feedback": (
        lambda: LBGM(ErrorFeedback(SharedSubspace())),
        ValueError,
        r"cannot wrap ErrorFeedback\(SharedSubspace\(\)\)|averages over ranks by sums",
    ),
    "error feedback twice": (
        lambda: ErrorFeedback(ErrorFeedback(SharedSubspace())),
        ValueError,
        "averages over ranks by sums and makes no messages: only ErrorFeedback",
    ),
    "class in error feedback": (
        lambda: ErrorFeedback(SharedSubspace),
        ValueError,
        r"not the class SharedSubspace: write SharedSubspace\(\.\.\.\), with brackets",
    ),
    "class": (
        lambda: Averager(PowerSGD, LIKES, None),
        TypeError,
        r"not the class PowerSGD: write PowerSGD\(\.\.\.\), with brackets",
    ),
    "class in lockstep": (lambda: Lockstep(SharedLBGM, 2), TypeError, "not the class SharedLBGM"),
    "compressor in lockstep": (
        lambda: Lockstep(TopK(0.1), 2),
        TypeError,
        r"TopK\(0.1\) makes messages: give each worker a Sender of its own",
    ),
    "rank 0": (lambda: SharedSubspace(0), ValueError, "rank must be"),
    "rank of powersgd": (lambda: PowerSGD(0), ValueError, "rank must be"),
    "fraction": (lambda: SharedSubspace(2.5), ValueError, "rank must be"),
    "refresh_every": (
        lambda: SharedSubspace(refresh_every=0),
        ValueError,
        "refresh_every must be",
    ),
    "values": (
        lambda: SharedSubspace(values="int4"),
        ValueError,
        "values must be 'float16' or 'float32' or 'int8', not 'int4'",
    ),
    "values of lbgm": (
        lambda: SharedLBGM(values="bfloat16"),
        ValueError,
        "values must be 'float16' or 'float32' or 'int8', not 'bfloat16'",
    ),
    "delta": (lambda: SharedLBGM(1.5), ValueError, "delta must be from 0 to 1, not 1.5"),
    "text": (lambda: SharedLBGM("0.2"), (TypeError, ValueError), "delta must be"),
}


@pytest.mark.parametrize(("call", "kind", "message"), WRONG.values(), ids=WRONG)
def test_wrong_use_names_the_mistake(call, kind, message):
    with pytest.raises(kind, match=message):
        call()


def test_averager_of_sums_has_no_receiver(group):
    with pytest.raises(AttributeError, match="averages by sums, and has no receiver"):
        _ = group(PowerSGD(2)).averagers[0].receiver


def test_state_of_messages_is_refused(group):
    ranks, other = group(ErrorFeedback(PowerSGD(2))), group(ErrorFeedback(PowerSGD(3)))
    other.step(0)
    for averager, state in zip(ranks.averagers, other.saved(), strict=True):
        with pytest.raises(ValueError, match="the state is that of ErrorFeedback"):
            averager.load_state_dict(state)
    ranks.step(0)


@pytest.mark.parametrize("algorithm", [PowerSGD(2), SharedSubspace(2), SharedLBGM()], ids=repr)
def test_gradient_that_is_rounded_to_zero_is_found_in_later_rounds(algorithm):
    workers = Lockstep(algorithm, 2)
    grad = torch.outer(normal(20), normal(30)).mul_(1e-13)
    rounds = [workers.average([{"w": grad}, {"w": grad}])["w"] for _ in range(5)]
    assert not rounds[0].any()
    torch.testing.assert_close(rounds[-1], grad, rtol=0, atol=1e-2 * float(grad.abs().max()))


def test_workers_of_one_process_take_a_round_with_nan_back():
    workers = Lockstep(ErrorFeedback(SharedSubspace(2)), 2)
    grads = {"w": torch.outer(normal(20), normal(30)), "v": normal(300).view(15, 20)}
    workers.average([grads, grads])
    before = [copied(worker.state_dict()) for worker in workers.workers]
    spoiled = {**grads, "w": torch.full((20, 30), math.inf)}
    found = workers.average([grads, spoiled])
    assert found["w"].isnan().all()
    assert found["v"].isfinite().all()
    assert_same_bits([worker.state_dict() for worker in workers.workers], before)


def test_shared_look_back_takes_no_sketch_while_averages_are_not_parallel():
    workers = Lockstep(SharedLBGM(0.2), 2)
    generator = torch.Generator().manual_seed(0)
    noise = [0.1 * torch.randn(50, 20, generator=generator) for _ in range(7)]
    sizes = []
    for grad in (*noise[:5], noise[4], noise[4], 2 * noise[4], noise[5], noise[6], noise[6]):
        average = workers.average([{"w": grad}] * 2)["w"]
        assert torch.allclose(average, grad, rtol=2e-3, atol=2e-3)
        sizes.append(workers.bytes)
    # Two bytes for each of 1000 numbers, or for a coefficient and 256 numbers.
    full, sketch = 2000, 514
    tried = full + sketch
    assert sizes == [full, tried, full, full, full, full, sketch, sketch, tried, tried, full]


@pytest.mark.parametrize(("size", "expected"), [(3, 50), (16, 50), (17, 96)])
def test_sums_in_int8_take_a_byte_a_number_up_to_16_ranks(size, expected):
    workers = Lockstep(ErrorFeedback(SharedSubspace(2, refresh_every=100, values="int8")), size)
    sizes = []
    for step in range(6):
        common = torch.Generator().manual_seed(0)
        own = torch.Generator().manual_seed(step)
        grad = 0.1 * torch.randn(24, 40, generator=common)
        noise = 0.1 * torch.randn(size, 24, 40, generator=own)
        workers.average([{"w": grad + part} for part in noise])
        sizes.append(workers.bytes)
    # Two coefficients for each of 24 rows; in int8 two further numbers for the tensor.
    assert sizes[2:] == [expected] * 4


def test_number_out_of_the_range_of_int8_costs_a_sum_and_what_is_cut_off_comes_later():
    algorithm = ErrorFeedback(SharedSubspace(2, refresh_every=100, values="int8"))
    workers = Lockstep(algorithm, 2)
    grad = torch.ones(24, 1) @ torch.ones(1, 40)
    sums = {"applied": torch.zeros(24, 40), "given": torch.zeros(24, 40)}
    sizes = []
    for factor in (1.0, 1.0, 3.0, 1.0, 1.0, 1000.0, 1.0, 1e-3, 0.0, 1.0):
        # One rank alone has the large gradient.
        given = [{"w": grad}, {"w": factor * grad}] if factor else [{"w": 0 * grad}] * 2
        sums["applied"] += workers.average(given)["w"]
        sums["given"] += sum(one["w"] for one in given) / 2
        sizes.append(workers.bytes)
    rest = sum(
        worker.state_dict()["tensors"]["w"]["state"]["residual"] for worker in workers.workers
    )
    missing = sums["given"] - sums["applied"] - rest / 2
    assert float(missing.abs().max()) < 1e-3 * 500
    # The factor of 1000, and the fall after it, take a sum in float32 beside that in int8.
    assert [size > 50 for size in sizes[1:]] == [False] * 4 + [True, True] + [False] * 3


def test_first_rounds_of_a_subspace_that_warms_up_are_those_of_power_sgd():
    warm = Lockstep(ErrorFeedback(SharedSubspace(2, 2, "float32", warm_up=4)), 2)
    power = Lockstep(ErrorFeedback(PowerSGD(2, "float32")), 2)
    averages, sizes = [], []
    for step in range(8):
        given = [{"w": gradients(rank, step)["matrix"]} for rank in range(2)]
        averages.append([workers.average(given)["w"] for workers in (warm, power)])
        sizes.append(warm.bytes)
    for step, (own, other) in enumerate(averages):
        assert torch.allclose(own, other, rtol=1e-3, atol=1e-4) == (step < 4)
    # Float32 for both factors of a matrix of 24 x 40, then one factor, and each second time a row.
    assert sizes == [512] * 4 + [4 * (48 + 40), 4 * 48] * 2
