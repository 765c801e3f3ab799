"""The laws of the contract of reducibles, checked on any run of gradients of several ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lbgm_compress.algorithm import Algorithm
from lbgm_compress.collective.lockstep import Lockstep
from lbgm_compress.reducible import PRECISIONS, Contribution, Term, Total
from tests.laws import assert_same_bits, check_repr, copied, saved_and_loaded

__all__ = ["Round", "check_reducible_laws", "drive"]

Run = Sequence[Sequence[Mapping[str, Tensor]]]
# float16 has 11 bits. A sum rounds the term of each rank, and itself once a rank.
HALF = 2.0**-10
# The largest sum of magnitudes of a float32 sum and a product of factors is rounded to this share.
SINGLE = 1e-5


class Round(NamedTuple):
    """The result of one round of one tensor, on several ranks."""

    terms: list[list[Term]]
    """The terms of each rank."""
    found: list[Contribution] | None
    """What the generator of each rank returned; None if a total was not finite."""


def drive(
    algorithm: Any, grads: Sequence[Tensor], states: Sequence[Any], shares: Sequence[float]
) -> Round:
    """Run the generators of one tensor of several ranks to their end, with sums in float64.

    Raises
    ------
    AssertionError
        If the ranks do not yield the same number of terms, of the same shapes, dtypes and
        precision.
    """
    generators = [algorithm.average(g, s) for g, s in zip(grads, states, strict=True)]
    terms: list[list[Term]] = [[] for _ in grads]
    totals: list[Total | None] = [None] * len(grads)
    while True:
        ends: list[Contribution] = []
        for generator, mine, total in zip(generators, terms, totals, strict=True):
            try:
                mine.append(next(generator) if total is None else generator.send(total))
            except StopIteration as end:
                ends.append(end.value)
        where = f"{algorithm!r}, term {len(terms[0])}"
        if ends:
            assert len(ends) == len(grads), f"{where}: ranks end their rounds together"
            return Round(terms, ends)
        kinds = [(mine[-1].tensor.shape, mine[-1].tensor.dtype, mine[-1].values) for mine in terms]
        assert kinds == kinds[:1] * len(kinds), f"{where}: all ranks yield the same sizes: {kinds}"
        assert kinds[0][1] in (torch.float32, torch.float64), f"{where}: found {kinds[0][1]}"
        assert kinds[0][2] in PRECISIONS, f"{where}: found precision {kinds[0][2]!r}"
        total = sum(
            share * mine[-1].tensor.double() for share, mine in zip(shares, terms, strict=True)
        )
        average = torch.as_tensor(total).to(kinds[0][1]).contiguous()
        if not average.isfinite().all():
            for generator in generators:
                generator.close()
            return Round(terms, None)
        top = float(average.abs().max()) if average.numel() else 0.0
        # A sum without rounding sends a term as it is.
        totals = [Total(average.clone(), lambda sent=mine[-1].tensor: sent, top) for mine in terms]


def check_reducible_laws(algorithm: Algorithm, run: Run) -> None:
    """Check all laws of an algorithm whose contributions add up.

    Parameters
    ----------
    algorithm
        A `Reducible`, or `ErrorFeedback` around one.
    run
        For each round, the gradients of each rank by name: the same names in all of them.
    """
    check_repr(algorithm)  # type: ignore[arg-type]
    assert algorithm.adds_up
    generator = torch.get_rng_state()
    check_generators(algorithm, run)
    check_first_terms(algorithm, run)
    check_terms_of_unlike_ranks(algorithm, run)
    check_workers(algorithm, run)
    law = f"{algorithm!r} leaves torch's global generator alone, and draws from its state's seed"
    assert_same_bits(torch.get_rng_state(), generator, law)


def shares_of(size: int) -> list[float]:
    """Return unequal shares."""
    return [2 * (rank + 1) / (size * (size + 1)) for rank in range(size)]


def dense(found: Contribution) -> tuple[Tensor, Tensor]:
    return found.average.dense().clone(), found.own.dense().clone()


def check_generators(algorithm: Any, run: Run) -> None:
    """Check laws 1, 2, 4, 5 and 7, tensor by tensor."""
    size = len(run[0])
    shares = shares_of(size)
    for name in run[0][0]:
        states = [algorithm.initial_state(0) for _ in range(size)]
        for number, of_ranks in enumerate(run):
            where = f"{algorithm!r}, tensor {name!r}, round {number}"
            if number == len(run) // 2:
                states = saved_and_loaded(states)
            grads = [grads[name] for grads in of_ranks]
            before = copied((grads, states))
            given = [copied(grad) for grad in grads]
            terms, found = drive(algorithm, given, states, shares)
            assert found is not None, f"{where}: the averages of finite gradients are finite"
            untouched = f"{where}: the gradient and the state that went in are not modified"
            assert_same_bits((given, states), before, untouched)
            check_averages(found, grads, shares, where)

            results = [dense(one) for one in found]
            kept = copied([one.state for one in found])
            again, twice = drive(algorithm, *copied((grads, states)), shares)
            assert twice is not None
            same = f"{where}: the same gradient and state give the same terms and results"
            assert_same_bits(again, terms, same)
            assert_same_bits([dense(one) for one in twice], results, same)
            assert_same_bits([one.state for one in twice], kept, same)
            # An engine writes the averages to the gradients.
            for grad in given:
                grad.fill_(7.0)
            owned = f"{where}: states and averages are in memory of their own, not the gradient's"
            assert_same_bits([one.state for one in found], kept, owned)
            assert_same_bits([dense(one)[0] for one in found], [a for a, _ in results], owned)
            states = [one.state for one in found]
            shared = [algorithm.shared_state(state) for state in states]
            for other in shared[1:]:
                assert_same_bits(other, shared[0], f"{where}: shared_state is the same on all")


def check_averages(
    found: Sequence[Contribution], grads: Sequence[Tensor], shares: Sequence[float], where: str
) -> None:
    """Check laws 1 and 5 of one round: the bits, the weighted mean, shapes and dtypes."""
    first, _ = dense(found[0])
    mean = torch.zeros(grads[0].shape, dtype=torch.float64)
    size = torch.zeros((), dtype=torch.float64)
    for one, grad, share in zip(found, grads, shares, strict=True):
        average, own = dense(one)
        assert_same_bits(average, first, f"{where}: the average has the same bits on all ranks")
        assert average.shape == own.shape == grad.shape, f"{where}: shapes come back as they went"
        mean += share * own.double()
        if grad.numel():
            size += share * own.abs().max()
        assert (one.recycled, one.phase_error) == (found[0].recycled, found[0].phase_error)
    # Low-rank products in half precision are rounded when they are made dense.
    rounding = max(SINGLE, 4 * torch.finfo(first.dtype).eps)
    missed = float((mean - first.double()).abs().max()) if first.numel() else 0.0
    law = f"{where}: the average is the weighted mean of what the ranks contributed"
    assert missed <= rounding * float(size) + torch.finfo(first.dtype).tiny, f"{law}: {missed}"


def check_first_terms(algorithm: Any, run: Run) -> None:
    """Check that the first term depends on the gradient's shape and the shared state alone."""
    shares = shares_of(len(run[0]))
    for name in run[0][0]:
        states: list[Any] = [algorithm.initial_state(0) for _ in run[0]]
        for of_ranks in run:
            grads = [grads[name] for grads in of_ranks]
            nothing = torch.zeros_like(grads[0])
            kinds = []
            for grad, state in zip([*grads, nothing, nothing], [*states, *states[:2]], strict=True):
                for known in (state, algorithm.shared_state(state)):
                    generator = algorithm.average(grad, known)
                    term = next(generator)
                    generator.close()
                    kinds.append((term.tensor.shape, term.tensor.dtype, term.values))
            law = f"{algorithm!r}, tensor {name!r}: all ranks yield the same first term"
            assert len(set(kinds)) == 1, f"{law}: found {set(kinds)}"
            found = drive(algorithm, grads, states, shares).found
            assert found is not None
            states = [one.state for one in found]


def check_terms_of_unlike_ranks(algorithm: Any, run: Run) -> None:
    """Check that terms do not depend on a rank's numbers, and what is said of zeros and inf."""
    shares = shares_of(len(run[0]))
    for name in run[0][0]:
        states = [algorithm.initial_state(0) for _ in run[0]]
        for number, of_ranks in enumerate(run):
            grads = [grads[name] for grads in of_ranks]
            where = f"{algorithm!r}, tensor {name!r}, round {number}"
            half = grads[0].dtype == torch.float16
            factors = [10.0 ** ((2 if half else 9) * (rank - 1)) for rank in range(len(grads))]
            drive(algorithm, [g * f for g, f in zip(grads, factors, strict=True)], states, shares)
            drive(algorithm, [torch.zeros_like(grads[0]), *grads[1:]], states, shares)

            nothing = [torch.zeros_like(grad) for grad in grads]
            found = drive(algorithm, nothing, states, shares).found
            assert found is not None
            for one, state in zip(found, states, strict=True):
                assert not one.average.dense().any(), f"{where}: zeros have the average zero"
                law = f"{where}: zeros on all ranks change no state"
                # An empty state of a wrapper may get the entry of what it wraps.
                assert_same_bits(without_empty(one.state), without_empty(state), law)

            last = tuple(length - 1 for length in grads[0].shape)
            for value in (float("inf"), float("-inf"), float("nan")) if grads[0].numel() else ():
                broken = copied(grads)
                broken[0][last] = value
                found = drive(algorithm, broken, states, shares).found
                assert found is None, f"{where}: {value} on one rank has no average"
            found = drive(algorithm, grads, states, shares).found
            assert found is not None
            states = [one.state for one in found]


def without_empty(state: Any) -> Any:
    """Return a nested state without empty mappings."""
    if not isinstance(state, Mapping):
        return state
    parts = {key: without_empty(value) for key, value in state.items()}
    return {key: part for key, part in parts.items() if not (part == {} and key == "inner")}


def check_workers(algorithm: Algorithm, run: Run) -> None:
    """Check the same of workers with sums in the precision of the terms, through their ends."""
    size = len(run[0])
    shares = shares_of(size)
    lockstep = Lockstep(algorithm, size)
    names = list(run[0][0])
    for number, of_ranks in enumerate(run):
        where = f"{algorithm!r}, round {number}"
        if number == len(run) // 2:
            saved = [saved_and_loaded(worker.state_dict()) for worker in lockstep.workers]
            lockstep = Lockstep(algorithm, size)
            for worker, state in zip(lockstep.workers, saved, strict=True):
                worker.load_state_dict(state)
                assert_same_bits(worker.state_dict(), state, f"{where}: a state is loaded as saved")
        twin = Lockstep(algorithm, size)
        for worker, other in zip(twin.workers, lockstep.workers, strict=True):
            worker.load_state_dict(saved_and_loaded(other.state_dict()))
        before = copied([worker.state_dict() for worker in lockstep.workers])
        for worker in lockstep.workers:
            worker.begin_step()
        lockstep.average([{n: g * -3 for n, g in grads.items()} for grads in of_ranks], shares)
        for worker in lockstep.workers:
            worker.undo()
        law = f"{where}: an undone round leaves all ends as they were"
        assert_same_bits([worker.state_dict() for worker in lockstep.workers], before, law)

        averages = lockstep.average(of_ranks, shares)
        assert_same_bits(twin.average(of_ranks, shares), averages, f"{where}: after a load")
        states = [worker.state_dict() for worker in lockstep.workers]
        for worker, state in zip(twin.workers, states, strict=True):
            assert_same_bits(worker.state_dict(), state, f"{where}: after a load")
        digests = [worker.digest(names) for worker in lockstep.workers]
        assert_same_bits(digests, digests[:1] * size, f"{where}: all ranks hold the same")
        for name in names:
            kinds = [(one.shape, one.dtype) for one in (averages[name], of_ranks[0][name])]
            assert kinds[0] == kinds[1], f"{where}, {name!r}: found {kinds}"
        reports = [worker.report() for worker in lockstep.workers]
        assert reports == reports[:1] * size
        total = sum(report.bytes for report in reports[0].values())
        assert total == lockstep.bytes, f"{where}: the bytes of the tensors are those of the sums"
        for average in averages.values():
            average.fill_(7.0)
        owned = f"{where}: averages are in memory of their own, not that of states"
        assert_same_bits([worker.state_dict() for worker in twin.workers], copied(states), owned)
