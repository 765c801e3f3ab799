"""Training loops as people write them, for any engine with ranks.

Gradients are given numbers and the learning rate is 1: what was applied is the way that a parameter
has gone, and the invariant of `tests.invariant` is checked at the end of every loop.
"""

from __future__ import annotations

import abc
import math
import warnings

import torch
from torch import nn

from lbgm_compress import LBGM, ErrorFeedback, LookBackSubspace, SignSGD, TopK
from tests.invariant import check_invariant, keeps_invariant, residuals
from tests.laws import assert_same_bits, saved_and_loaded

__all__ = ["COMPRESSORS", "LOOPS", "SHAPES", "Given", "Loop", "check_loops", "reload"]

SHAPES = {"matrix": (12, 16), "vector": (40,), "expert": (8, 10)}
COMPRESSORS = [
    ErrorFeedback(TopK(0.05)),
    ErrorFeedback(SignSGD(scaled=True)),
    ErrorFeedback(LBGM(TopK(0.1), delta=0.5)),
    ErrorFeedback(LookBackSubspace(2, values="int4")),
    LBGM(ErrorFeedback(TopK(0.1)), delta=0),
    LBGM(ErrorFeedback(TopK(0.1)), delta=0.5),
]


class Given(nn.Module):
    """Parameters whose gradients are the given tensors; a parameter without one is not used."""

    def __init__(self):
        super().__init__()
        for name, shape in SHAPES.items():
            setattr(self, name, nn.Parameter(torch.zeros(shape)))

    def forward(self, grads):
        return sum((getattr(self, name) * grad).sum() for name, grad in grads.items())


class Loop(abc.ABC):
    """A training on one rank, and the sum of its gradients in the steps that were applied.

    An engine writes the abstract methods.
    """

    def __init__(self, rank, compressor, unused=True, passes=1, **options):
        self.rank = rank
        self.compressor = compressor
        self.options = options
        self.passes = passes
        self.unused = unused
        self.build()
        self.true = {name: torch.zeros(shape) for name, shape in SHAPES.items()}

    @abc.abstractmethod
    def build(self):
        """Make `module`, `model`, `optimizer` and `state`, as a new process does.

        `unused` says that not all parameters are used in all steps, and `passes` is the number of
        backward passes of a step. The learning rate is 1.
        """

    @abc.abstractmethod
    def accumulate(self, grads, last, scaler=None):
        """Do a forward and a backward pass; the last one of a step communicates."""

    @abc.abstractmethod
    def step(self, scaler=None):
        """Apply the averages, by way of a GradScaler if there is one."""

    @abc.abstractmethod
    def share(self, value):
        """Return the first rank's value, on all ranks."""

    def gradients(self, step, names=tuple(SHAPES)):
        numbers = torch.Generator().manual_seed(100 * step + self.rank)
        slow = torch.Generator().manual_seed(100 * (step // 4))
        made = {}
        for name, shape in SHAPES.items():
            made[name] = torch.randn(shape, generator=slow)
            made[name] += 0.5 * torch.randn(shape, generator=numbers)
        return {name: made[name] for name in names}

    def backward(self, grads, scaler=None):
        self.optimizer.zero_grad()
        self.accumulate(grads, True, scaler)

    def loss(self, grads, scaler):
        return self.model(grads) if scaler is None else scaler.scale(self.model(grads))

    def finite(self):
        grads = [p.grad for p in self.module.parameters() if p.grad is not None]
        return all(bool(grad.isfinite().all()) for grad in grads)

    def apply(self, grads):
        self.step()
        self.count(grads)

    def count(self, grads):
        for name, grad in grads.items():
            self.true[name] += grad

    def residuals(self):
        kept = residuals(self.state.state_dict())
        return {name.removeprefix("module."): residual for name, residual in kept.items()}

    def result(self):
        """Return what was applied, the true sum and the residuals."""
        applied = {name: -p.detach() for name, p in self.module.named_parameters()}
        return applied, self.true, self.residuals()


# --- the loops -----------------------------------------------------------------------------------


def branch_in_every_other_step(make):
    """A branch is used in every other step; DistributedDataParallel leaves it alone in the rest."""
    loop = make()
    for step in range(40):
        names = tuple(SHAPES) if step % 2 else ("matrix", "vector")
        grads = loop.gradients(step, names)
        loop.backward(grads)
        loop.apply(grads)
    return loop.result()


def branch_on_some_ranks(make):
    """Each rank uses the branch in other steps."""
    loop = make()
    for step in range(12):
        names = tuple(SHAPES) if (step + loop.rank) % 3 else ("matrix", "vector")
        grads = loop.gradients(step, names)
        loop.backward(grads)
        loop.apply(grads)
    return loop.result()


def expert_unused_for_long(make):
    """An expert rests for 50 steps, and its residual waits."""
    loop = make()
    for step in range(60):
        names = tuple(SHAPES) if step < 5 or step >= 55 else ("matrix", "vector")
        grads = loop.gradients(step, names)
        loop.backward(grads)
        loop.apply(grads)
    return loop.result()


def skipping_steps_with_inf(make):
    """A loop of one's own that skips a step if anything is inf: every other one, on one rank."""
    loop = make(unused=False)
    for step in range(20):
        grads = loop.gradients(step)
        if step % 2 and loop.rank == step // 2 % 2:
            grads["vector"][3] = math.inf
        loop.backward(grads)
        if loop.finite():
            loop.apply(grads)
        else:
            assert step % 2
    return loop.result()


def gradient_scaler(make, scale=65536.0, interval=2000, constant=True):
    """A GradScaler meets inf in its first three steps, and goes on at an eighth of its scale."""
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=interval)
    loop = make(unused=False, loss_scale=scaler.get_scale)
    for step in range(20):
        grads = loop.gradients(0 if constant else step)
        given = {name: grad.clone() for name, grad in grads.items()}
        if step < 3 and loop.rank == 1:
            given["matrix"][0, 0] = math.inf
        loop.backward(given, scaler)
        loop.step(scaler)
        before = scaler.get_scale()
        scaler.update()
        if scaler.get_scale() >= before:
            loop.count(grads)
    assert scaler.get_scale() == before if interval > 20 else scaler.get_scale() > before / 8
    return loop.result()


def scaler_that_grows(make):
    """The scale doubles every third step."""
    return gradient_scaler(make, scale=4.0, interval=3, constant=False)


def accumulation_with_inf_in_the_middle(make):
    """Three micro-batches a step, two of them without communication, and an inf in one of them."""
    loop = make(unused=False, passes=3)
    for step in range(9):
        loop.optimizer.zero_grad()
        total = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
        for part in range(3):
            grads = loop.gradients(3 * step + part)
            if step % 3 == 1 and part == 1 and loop.rank == 0:
                grads["expert"][0, 0] = -math.inf
            for name, grad in grads.items():
                total[name] += grad
            loop.accumulate(grads, last=part == 2)
        if loop.finite():
            loop.apply(total)
        else:
            assert step % 3 == 1
    return loop.result()


def skipping_spikes(make):
    """A loop that skips a step whose gradient is far too large, and undoes it."""
    loop = make(unused=False)
    skipped = []
    for step in range(16):
        grads = loop.gradients(step)
        if step in (4, 5, 9):
            grads = {name: 1000 * grad for name, grad in grads.items()}
        loop.backward(grads)
        norm = nn.utils.clip_grad_norm_(loop.module.parameters(), math.inf)
        if norm > 1000:
            loop.state.undo()
            skipped.append(step)
            continue
        loop.apply(grads)
    # The steps after a spike are as if there had been none.
    assert skipped == [4, 5, 9]
    return loop.result()


def undoing_where_there_is_nothing_to_undo(make):
    """A loop that calls undo() for a loss that is nan, before any backward pass of that step."""
    loop = make(unused=False)
    for step in range(8):
        grads = loop.gradients(step)
        if step in (0, 3):
            loop.state.undo()
            continue
        loop.backward(grads)
        loop.apply(grads)
    return loop.result()


def frozen_saved_loaded_unfrozen(make):
    """A layer is frozen, all is saved and loaded by a new process, and the layer unfrozen."""
    loop = make()
    for step in range(20):
        if step == 5:
            loop.module.expert.requires_grad_(False)
        if step == 10:
            reload(loop, loop.state.state_dict())
        if step == 15:
            loop.module.expert.requires_grad_(True)
        names = tuple(SHAPES) if not 5 <= step < 15 else ("matrix", "vector")
        before = loop.module.expert.detach().clone()
        grads = loop.gradients(step, names)
        loop.backward(grads)
        loop.apply(grads)
        if 5 <= step < 15:
            assert_same_bits(loop.module.expert.detach(), before)
    return loop.result()


def undone_after_a_resume(make):
    """The first step after a resume is undone, and the next one too."""
    loop = make(unused=False)
    for step in range(12):
        if step == 6:
            reload(loop, loop.state.state_dict())
        grads = loop.gradients(step)
        loop.backward(grads)
        if step in (6, 7):
            loop.state.undo()
            continue
        loop.apply(grads)
    return loop.result()


def saved_by_the_first_rank_alone(make):
    """Rank 0 saves the states of all ranks, and every rank gets its own back."""
    loop = make(unused=False)
    for step in range(12):
        if step == 6:
            gathered = loop.share(saved_and_loaded(loop.state.gather_state_dict()))
            before = loop.state.state_dict()
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                reload(loop, gathered)
                assert_same_bits(loop.state.state_dict(), before)
                grads = loop.gradients(step)
                loop.backward(grads)
        else:
            grads = loop.gradients(step)
            loop.backward(grads)
        loop.apply(grads)
    return loop.result()


def loaded_and_reset_on_one_rank(make):
    """One rank alone loads states in mid-training, then one alone resets: the others join in."""
    loop = make(unused=False)
    saved = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for step in range(14):
            saved.append(saved_and_loaded(loop.state.state_dict()))
            lost = loop.residuals()
            if step in (5, 8) and loop.rank == 1:
                loop.state.load_state_dict(saved[step - 2])
            elif step == 11 and loop.rank == 0:
                loop.state.reset()
            # What the residuals of the older state have less is lost with them.
            for name, now in loop.residuals().items():
                loop.true[name] += (now - lost[name]).to(loop.true[name].dtype)
            grads = loop.gradients(step)
            loop.backward(grads)
            loop.apply(grads)
    return loop.result()


def reload(loop, state):
    """Go on in a new model, optimizer and state, as a new process does."""
    saved = saved_and_loaded({"model": loop.module.state_dict(), "state": state})
    frozen = [name for name, p in loop.module.named_parameters() if not p.requires_grad]
    loop.build()
    loop.module.load_state_dict(saved["model"])
    loop.state.load_state_dict(saved["state"])
    for name in frozen:
        getattr(loop.module, name).requires_grad_(False)


LOOPS = [
    branch_in_every_other_step,
    branch_on_some_ranks,
    expert_unused_for_long,
    skipping_steps_with_inf,
    gradient_scaler,
    scaler_that_grows,
    accumulation_with_inf_in_the_middle,
    skipping_spikes,
    undoing_where_there_is_nothing_to_undo,
    frozen_saved_loaded_unfrozen,
    undone_after_a_resume,
    saved_by_the_first_rank_alone,
    loaded_and_reset_on_one_rank,
]


def check_loops(results, compressor):
    """Check what the loops of all ranks returned, each by its name."""
    for loop in results[0]:
        applied, true, kept = zip(*(result[loop] for result in results), strict=True)
        for other in applied[1:]:
            assert_same_bits(other, applied[0], f"{loop}: the replicas are equal")
        if keeps_invariant(compressor):
            try:
                check_invariant(applied[0], true, kept, tolerance=1e-4)
            except AssertionError as error:
                raise AssertionError(f"{loop}: {error}") from None
