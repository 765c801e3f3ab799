"""A random walk over everything that may happen to a step: the invariant holds all the way."""

from __future__ import annotations

import copy
import random

import pytest
import torch

from lbgm_compress import LBGM, ErrorFeedback, LookBackSubspace, SignSGD, TopK
from lbgm_compress.collective import Averager, BackgroundAverager
from tests.compressors import COMPRESSORS
from tests.invariant import check_invariant, keeps_invariant, residuals
from tests.laws import assert_same_bits, saved_and_loaded
from tests.rank_threads import Ranks
from tests.soak import length

SHAPES = {"matrix": (6, 9), "wide": (3, 30), "vector": (7,), "expert": (5, 4), "scalar": ()}
FROZEN = "expert"
WEIGHTS = (1.0, 2.0, 0.5)
RANKS = len(WEIGHTS)
WALKED = [
    *COMPRESSORS,
    LBGM(ErrorFeedback(TopK(0.1)), delta=0),
    LBGM(ErrorFeedback(SignSGD(scaled=True)), delta=0),
    ErrorFeedback(LBGM(ErrorFeedback(TopK(0.1)), delta=0.5)),
]
IN_BUCKETS = [
    LBGM(),
    ErrorFeedback(TopK(0.1)),
    ErrorFeedback(LBGM(SignSGD(scaled=True), delta=0.8)),
    ErrorFeedback(LookBackSubspace(2, values="int4")),
]
# How often each event is drawn.
EVENTS = {
    "normal": 12,
    "inf": 3,
    "nan on two ranks": 1,
    "unused": 3,
    "unused on some ranks": 2,
    "freeze or unfreeze": 2,
    "undo": 3,
    "undo on one rank": 1,
    "save": 2,
    "gather": 1,
    "load own": 1,
    "load own without the model": 1,
    "load that of the first rank": 1,
    "load on one rank": 1,
    "load another's on one rank": 1,
    "load the gathered": 1,
    "reset one rank": 1,
    "scale up": 1,
    "scale down": 1,
}
pytestmark = pytest.mark.filterwarnings("ignore:the ranks do not hold|the state is that of rank")


class Bucketed(BackgroundAverager):
    """Averages a step in two buckets, as engines do."""

    def average(self, grads):
        self.begin_step()
        found = {}
        names = sorted(grads)
        for bucket in (names[:2], names[2:]):

            def deliver(average):
                if average is not None:
                    found.update(average.finish())

            self.submit({name: grads[name] for name in bucket}, deliver)
        self.end_step()
        return found


class Walk:
    """Three ranks, and the sums that say whether anything is lost."""

    def __init__(self, compressor, seed, kind):
        self.compressor = compressor
        self.random = random.Random(seed)
        self.numbers = torch.Generator().manual_seed(seed)
        self.ranks = Ranks(RANKS)
        self.shares = [weight / sum(WEIGHTS) for weight in WEIGHTS]
        self.scale, self.frozen = 1.0, False
        self.models = [self.zeros() for _ in range(RANKS)]
        self.true = [self.zeros() for _ in range(RANKS)]
        self.averagers = [
            kind(
                compressor,
                self.models[rank],
                self.ranks.transports[rank],
                weight=WEIGHTS[rank],
                loss_scale=lambda: self.scale,
            )
            for rank in range(RANKS)
        ]
        self.saved = []
        self.gathered = []
        # The same direction for a while, so that there is something to look back at.
        self.drift = self.gradient()

    @staticmethod
    def zeros():
        return {name: torch.zeros(shape, dtype=torch.float64) for name, shape in SHAPES.items()}

    def gradient(self):
        return {
            name: torch.randn(shape, generator=self.numbers, dtype=torch.float64)
            for name, shape in SHAPES.items()
        }

    def gradients(self):
        """Return the gradients of all ranks, without the loss scale."""
        if self.random.random() < 0.1:
            self.drift = self.gradient()
        noise = 10.0 ** self.random.randint(-3, 1)
        made = []
        for _ in range(RANKS):
            rest = self.gradient()
            grads = {name: drift + noise * rest[name] for name, drift in self.drift.items()}
            if self.frozen:
                grads[FROZEN] = torch.zeros_like(grads[FROZEN])
            made.append(grads)
        return made

    def average(self, gradients):
        """Average, and check that all ranks have the same bits, and zero where nothing was sent."""
        scaled = [{n: g * self.scale for n, g in grads.items()} for grads in gradients]
        averages = self.ranks.run(lambda rank, grads: self.averagers[rank].average(grads), scaled)
        for other in averages[1:]:
            assert_same_bits(other, averages[0])
        for name, average in averages[0].items():
            if not any(grads[name].any() for grads in gradients):
                assert not average.any(), f"something was written to {name}, which nobody used"
        return averages[0]

    def apply(self, gradients):
        averages = self.average(gradients)
        for model in self.models:
            for name, average in averages.items():
                if not (self.frozen and name == FROZEN):
                    model[name] += average / self.scale
        for true, grads in zip(self.true, gradients, strict=True):
            for name, grad in grads.items():
                true[name] += grad

    # --- events ----------------------------------------------------------------------------------

    def step(self):
        [event] = self.random.choices(list(EVENTS), EVENTS.values())
        self.event = event
        getattr(self, "_" + event.replace(" ", "_").replace("'", ""))()

    def _normal(self):
        self.apply(self.gradients())

    def _inf(self, ranks=1, value=float("inf")):
        gradients = self.gradients()
        name = self.random.choice(list(SHAPES))
        for rank in self.random.sample(range(RANKS), ranks):
            grad = gradients[rank][name]
            grad.view(-1)[self.random.randrange(grad.numel())] = value
        before = self.residuals()
        averages = self.average(gradients)
        assert not averages[name].isfinite().all()
        assert_same_bits(self.residuals(), before)

    def _nan_on_two_ranks(self):
        self._inf(2, float("nan"))

    def _unused(self):
        gradients = self.gradients()
        for name in self.random.sample(list(SHAPES), self.random.randint(1, 3)):
            for grads in gradients:
                grads[name] = torch.zeros_like(grads[name])
        self.apply(gradients)

    def _unused_on_some_ranks(self):
        gradients = self.gradients()
        name = self.random.choice(list(SHAPES))
        for rank in self.random.sample(range(RANKS), self.random.randint(1, RANKS - 1)):
            gradients[rank][name] = torch.zeros_like(gradients[rank][name])
        self.apply(gradients)

    def _freeze_or_unfreeze(self):
        self.frozen = not self.frozen
        self.apply(self.gradients())

    def _undo(self):
        before = self.residuals()
        self.average(self.gradients())
        for averager in self.averagers:
            averager.undo()
        assert_same_bits(self.residuals(), before)
        # Nothing is left to undo.
        self.averagers[0].undo()
        assert_same_bits(self.residuals(), before)

    def _undo_on_one_rank(self):
        """A mistake, which costs the exactness of the sums and no more."""
        self.average(self.gradients())
        self.averagers[self.random.randrange(RANKS)].undo()
        self.forgive(self.true)

    def _save(self):
        states = self.ranks.run(lambda rank: self.averagers[rank].state_dict())
        self.saved.append(
            {
                "states": [saved_and_loaded(state) for state in states],
                "model": copy.deepcopy(self.models[0]),
                "true": copy.deepcopy(self.true),
            }
        )
        del self.saved[:-4]

    def _gather(self):
        self._save()
        [state, *nothing] = self.ranks.run(lambda rank: self.averagers[rank].gather_state_dict())
        assert nothing == [{}] * (RANKS - 1)
        self.gathered.append({**self.saved[-1], "gathered": saved_and_loaded(state)})
        del self.gathered[:-2]

    def _load_own(self):
        self.load(self.saved, lambda save, rank: save["states"][rank])

    def _load_own_without_the_model(self):
        self.load(self.saved, lambda save, rank: save["states"][rank], model=False)

    def _load_that_of_the_first_rank(self):
        self.load(self.saved, lambda save, rank: save["states"][0])

    def _load_on_one_rank(self):
        one = self.random.randrange(RANKS)
        self.load(self.saved, lambda save, rank: save["states"][one] if rank == one else None)

    def _load_anothers_on_one_rank(self):
        one, other = self.random.sample(range(RANKS), 2)
        self.load(self.saved, lambda save, rank: save["states"][other] if rank == one else None)

    def _load_the_gathered(self):
        self.load(self.gathered, lambda save, rank: save["gathered"])

    def load(self, saved, state_of, model=True):
        """Load states, with the model or without it, and take note of residuals that are lost."""
        if not saved:
            return
        save = self.random.choice(saved)
        if model:
            for mine in self.models:
                for name, value in save["model"].items():
                    mine[name].copy_(value)
            self.true = copy.deepcopy(save["true"])
        whole = []
        for rank, averager in enumerate(self.averagers):
            state = state_of(save, rank)
            if state is None:
                continue
            seed = averager.sender.seed
            averager.load_state_dict(state)
            assert averager.sender.seed == seed
            own = save["states"][rank]
            expected = own if state.get("rank", rank) == rank else {"tensors": {}}
            assert_same_bits(residuals(averager.state_dict()), residuals(expected))
            whole.append(model and expected is own)
        if len(whole) < RANKS or not all(whole):
            self.forgive(self.true)
        self._normal()

    def _reset_one_rank(self):
        self.averagers[self.random.randrange(RANKS)].reset()
        self.apply(self.gradients())

    def _scale_up(self):
        self.scale = min(self.scale * self.random.choice([2.0, 3.0, 1024.0]), 2.0**20)

    def _scale_down(self):
        self.scale = max(self.scale / self.random.choice([2.0, 3.0, 1024.0]), 2.0**-20)

    # --- checks ----------------------------------------------------------------------------------

    def residuals(self):
        return [residuals(averager.state_dict()) for averager in self.averagers]

    def forgive(self, true):
        """Take the sums as right from here on, since residuals were lost with a state."""
        for rank, kept in enumerate(self.residuals()):
            for name in SHAPES:
                own = kept.get(name, torch.zeros(SHAPES[name], dtype=torch.float64))
                true[rank][name] = self.models[0][name] + own

    def check(self):
        for model in self.models[1:]:
            assert_same_bits(model, self.models[0])
        if keeps_invariant(self.compressor):
            # A look-back coefficient is rounded to float32.
            tolerance = 1e-5 if isinstance(self.compressor, LBGM) else 1e-8
            check_invariant(
                self.models[0], self.true, self.residuals(), self.shares, tolerance=tolerance
            )


def walk(compressor, steps, kind=Averager, seed=0):
    course = Walk(compressor, seed, kind)
    try:
        for step in range(steps):
            course.step()
            if step % 5 == 0 or step == steps - 1:
                course.check()
    except BaseException:
        print(f"at step {step}, in {course.event!r}")
        raise
    finally:
        course.ranks.close()


@pytest.mark.timeout(120)
@pytest.mark.parametrize("compressor", WALKED, ids=repr)
def test_nothing_is_lost_or_doubled_on_a_random_walk(compressor):
    walk(compressor, 60)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("compressor", IN_BUCKETS, ids=repr)
def test_nothing_is_lost_or_doubled_in_buckets(compressor):
    walk(compressor, 80, Bucketed, seed=1)


@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("compressor", WALKED, ids=repr)
def test_nothing_is_lost_or_doubled_on_a_long_random_walk(compressor):
    walk(compressor, length(10_000, 150), seed=2)


@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("compressor", IN_BUCKETS, ids=repr)
def test_nothing_is_lost_or_doubled_in_buckets_on_a_long_walk(compressor):
    walk(compressor, length(10_000, 150), Bucketed, seed=3)
