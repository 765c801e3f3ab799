"""Averages by sums over ranks: the driver of `Reducible.average`.

The generators of all gradients run side by side. What they yield at one time is laid end to end,
weighted with the rank's share, and summed by one all-reduce.

Scales of sums in few bits follow the averages (`lbgm_compress.collective.sums`). An average that is
out of range, or smaller by far than the last one, is summed again in float32, by all ranks alike.
One that is zero everywhere counts as that of a parameter which is not in use. Before a first
average that is not, each round multiplies by 2^16 more, so that very small numbers are found.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lbgm_compress.algorithm import Algorithm
from lbgm_compress.collective.average import Average, RanksDiffer, sum_dtype
from lbgm_compress.collective.ends import Ends
from lbgm_compress.collective.parameters import zeros_of
from lbgm_compress.collective.sums import MOST_RANKS, SUMS, TARGET, Sum
from lbgm_compress.collective.transport import Pending, Transport
from lbgm_compress.decoded import Decoded, Zero
from lbgm_compress.endpoints.contributor import Contributor
from lbgm_compress.reducible import PRECISIONS, Contribution, Sums, Term, Total

__all__ = ["Summed"]

# Exponent of the scale of a first sum in float16: numbers from 1e-9 to 1 are in its range.
START = 16
# Exponent by which a scale grows where the average was zero.
STEP = 16
# Added to an exponent before the first average that is not zero.
SEARCH = 1000
LIMIT = 100


class Summed(Ends):
    """The end of a rank whose contributions are added up."""

    def __init__(self, algorithm: Algorithm, likes: Mapping[str, Tensor], *others: Any) -> None:
        super().__init__(*others)
        self.algorithm = algorithm
        self.sender = Contributor(algorithm)
        self._likes = {name: zeros_of(like) for name, like in likes.items()}
        # The end that all ranks had before this one changed its own; see `_change`.
        self._common: Contributor | None = None

    def begin(
        self,
        grads: Mapping[str, Tensor],
        shares: Sequence[float],
        loss_scale: float,
        differs: bool,
        fail: Callable[[BaseException], None],
        spoil: Callable[[], None],
    ) -> Average:
        # At the front of the first sum: how many ranks failed, the sum of their ranks, and how many
        # ask to compare states.
        def begin(end: Contributor, generators: Mapping[str, Sums], notice: list[float]) -> Average:
            share = shares[self.transport.rank]
            sums = Rounds(self.transport, end, generators, share, notice, loss_scale)
            return SummedAverage(sums, self, grads, loss_scale, fail, spoil)

        if differs:
            return begin(*self._nothing(grads), [0.0, 0.0, 1.0])
        self._common = None
        try:
            return begin(self.sender, self.sender.begin(grads, loss_scale), [0.0, 0.0, 0.0])
        except Exception:
            # The other ranks wait for a sum.
            self.announce_failure(grads)
            raise

    def announce_failure(self, grads: Mapping[str, Tensor]) -> None:
        failed = [1.0, float(self.transport.rank), 0.0]
        with contextlib.suppress(Exception):
            Rounds(self.transport, *self._nothing(grads), 1.0, failed).finish()

    def _nothing(self, grads: Mapping[str, Tensor]) -> tuple[Contributor, dict[str, Sums]]:
        """Return generators of zeros, whose first terms have the sizes of those of other ranks."""
        zeros = {name: self._likes[name] for name in grads}
        end = self._common or self.sender.copy()
        return end, end.begin(zeros)

    def _change(self) -> None:
        """Keep what all ranks have, before this one changes what it has.

        Until the states are compared, the terms of the other ranks have the sizes that follow from
        it.
        """
        if self._common is None:
            self._common = self.sender.copy()

    def begin_step(self) -> None:
        self.sender.begin_step()

    def undo(self) -> None:
        self._change()
        self.sender.undo()

    def commit(self) -> None:
        self.sender.commit()

    def reset(self) -> None:
        self._change()
        self.sender.reset()

    def drop_unshared(self) -> str:
        names = sorted(self._likes)
        digest = self.sender.digest(names).to(self.device)
        rows = self.transport.gather_equal(digest).cpu().view(self.transport.size, -1, 8)
        differs = (rows != rows[:1]).any(dim=2).any(dim=0).tolist()
        dropped = [name for name, differ in zip(names, differs, strict=True) if differ]
        self.sender.reset(dropped)
        self._common = None
        count = len(dropped)
        return f"{count} tensor{'s' * (count > 1)}" if dropped else ""

    def state_dict(self) -> dict[str, Any]:
        return {"sender": self.sender.state_dict(), "receiver": {}}

    def held_of(self, rank: int) -> Mapping[Any, Any]:
        return {}

    def part(self, sender: Any, held: Mapping[Any, Any], rank: int) -> dict[str, Any]:
        return {"sender": sender, "receiver": {}}

    def of_another(self, sender: Mapping[str, Any]) -> dict[str, Any]:
        return self.sender.shared_alone(sender)

    def check_sender(self, state: Mapping[str, Any]) -> None:
        Contributor(self.algorithm).load_state_dict(state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._change()
        self.sender.load_state_dict(state["sender"])


class Rounds:
    """Generators that run side by side, and the sums that they wait for."""

    def __init__(
        self,
        transport: Transport,
        contributor: Contributor,
        generators: Mapping[str, Sums],
        share: float,
        notice: Sequence[float] = (),
        loss_scale: float = 1.0,
    ) -> None:
        self._transport = transport
        self._generators = dict(generators)
        self._key = min(generators)
        self._share = share
        self._notice = notice
        self._phase = 0
        self._again = False
        self.exponents = {
            name: _shifted(contributor.exponents(name), contributor.rescaling(name, loss_scale))
            for name in generators
        }
        self._sums: list[Sum] = []
        self.bytes = 0
        self.sizes = dict.fromkeys(generators, 0)
        self.found: dict[str, Contribution] = {}
        self.not_finite: list[str] = []
        self._totals: dict[str, Total] = {}
        self._error: BaseException | None = None
        self._post(self._advance(dict.fromkeys(generators)))

    @property
    def running(self) -> bool:
        """True while a sum is under way."""
        return bool(self._sums)

    def ready(self) -> bool:
        """Return whether `finish` would not wait, after all that can be done without waiting."""
        try:
            while self._sums and all(one.pending.ready() for one in self._sums):
                self.step()
        except BaseException as error:
            self._error = error
        return not self._sums

    def finish(self) -> None:
        """Make all sums that are missing.

        Raises
        ------
        RanksDiffer, RuntimeError
            As another rank asks for, or if one cannot be reached; also if `ready` met the error.
        """
        if self._error is not None:
            raise self._error
        while self.running:
            self.step()

    def step(self) -> None:
        """Wait for the sums that are under way, and go on to the next."""
        sums, self._sums = self._sums, []
        for one in sums:
            one.wait()
        again: dict[str, Term] = {}
        for one in sums:
            again.update(one.collect(self._totals, self._read_notice))
        if again and not self._again:
            self._again = True
            exact = {name: Term(term.tensor) for name, term in again.items()}
            self._post(exact)
            return
        self._again = False
        for name in again:
            self._generators.pop(name).close()
            self.not_finite.append(name)
        totals, self._totals = self._totals, {}
        for name, total in totals.items():
            exponents = self.exponents[name]
            if len(exponents) == self._phase:
                exponents.append(SEARCH + START)
            if total.largest:
                exponent = TARGET - math.frexp(total.largest)[1]
                exponents[self._phase] = max(-LIMIT, min(LIMIT, exponent))
            elif exponents[self._phase] > LIMIT:
                exponents[self._phase] = min(SEARCH + LIMIT, exponents[self._phase] + STEP)
        self._phase += 1
        self._post(self._advance(totals))

    def average(self, name: str, into: Tensor) -> Tensor:
        """Return `into`, to which an average is written; all sums are made.

        An average in memory of its own does not change the states, which may hold it, too.
        """
        if name in self.found:
            self.found[name].average.write_to(into)
        else:
            # All ranks see that the step is to be skipped.
            into.fill_(math.nan)
        return into

    def _advance(self, totals: Mapping[str, Total | None]) -> dict[str, Term]:
        """Send totals to generators, in one order on all ranks; return what they yield next."""
        terms = {}
        for name in sorted(totals):
            generator, total = self._generators[name], totals[name]
            try:
                terms[name] = next(generator) if total is None else generator.send(total)
            except StopIteration as end:
                self.found[name] = end.value
        return terms

    def _post(self, terms: Mapping[str, Term]) -> None:
        groups: dict[torch.dtype, dict[str, Term]] = {}
        for name, term in terms.items():
            groups.setdefault(self._dtype(name, term), {})[name] = term
        notice, self._notice = self._notice, ()
        # In one order on all ranks.
        for dtype in sorted(groups, key=str):
            group = groups[dtype]
            exponents = [self._exponent(name) for name in group]
            kind = SUMS.get(dtype, Sum)
            one = kind(group, dtype, exponents, self._share, self._transport.size, notice)
            notice = ()
            suffix = f"{self._phase}{'again' * self._again}.{dtype!s}"
            one.begin(self._transport, f"sum.{self._key}.{suffix}")
            self._sums.append(one)
            self.bytes += one.bytes
            for name, term in group.items():
                self.sizes[name] += (term.tensor.numel() + one.FLAGS) * dtype.itemsize

    def _dtype(self, name: str, term: Term) -> torch.dtype:
        """Return the dtype in which a term is added up, which all ranks know."""
        dtype = PRECISIONS[term.values]
        if dtype == torch.int8:
            # Without a scale that fits, all would be rounded to zero.
            known = self.exponents[name][self._phase : self._phase + 1]
            fits = bool(known) and known[0] <= LIMIT
            if not (fits and self._transport.adds_int8 and self._transport.size <= MOST_RANKS):
                return torch.float16
        return term.tensor.dtype if dtype == torch.float32 else dtype

    def _exponent(self, name: str) -> int:
        known = self.exponents[name]
        if self._phase == len(known):
            return START
        exponent = known[self._phase]
        return exponent - SEARCH if exponent > LIMIT else exponent

    def _read_notice(self, failed: float, rank: float, differ: float) -> None:
        """Raise the error that another rank asks for; all ranks read the same."""
        if failed:
            which = f"rank {rank:.0f}" if failed == 1 else f"{failed:.0f} ranks"
            raise RuntimeError(f"{which} failed before it could send: see the error there")
        if differ:
            raise RanksDiffer("a rank asks to compare states")


class SummedAverage(Average):
    """An average by sums."""

    adds = False

    def __init__(
        self,
        rounds: Rounds,
        ends: Summed,
        grads: Mapping[str, Tensor],
        loss_scale: float,
        fail: Callable[[BaseException], None],
        spoil: Callable[[], None],
    ) -> None:
        super().__init__(Pending(rounds.ready, lambda: None), grads, fail)
        self._rounds = rounds
        self._ends = ends
        self._loss_scale = loss_scale
        self._spoil = spoil

    def own(self) -> Mapping[str, Decoded]:
        found = self._rounds.found
        return {
            name: found[name].own if name in found else Zero(grad)
            for name, grad in self._grads.items()
        }

    def _finish(self, into: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        rounds, ends = self._rounds, self._ends
        rounds.finish()
        ends.sender.keep(
            self._grads, rounds.found, rounds.exponents, rounds.sizes, self._loss_scale
        )
        ends.traffic.count(rounds.bytes, self._grads, ends.sender.sent)
        targets = _empty(self._grads) if into is None else into
        averages = {name: rounds.average(name, targets[name]) for name in self._grads}
        if rounds.not_finite:
            self._spoil()
        return averages


def _shifted(exponents: Sequence[int], factor: float) -> list[int]:
    """Return exponents for numbers that are `factor` times as large."""
    if factor == 1:
        return list(exponents)
    shift = round(math.log2(factor))
    return [e if e > LIMIT else max(-LIMIT, min(LIMIT, e - shift)) for e in exponents]


def _empty(grads: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors for averages, in the dtype of the sums."""
    return {
        name: torch.empty(grad.shape, dtype=sum_dtype(grad.dtype), device=grad.device)
        for name, grad in grads.items()
    }
