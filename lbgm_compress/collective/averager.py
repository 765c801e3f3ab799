"""The average of the gradients of all ranks, on any transport.

Each rank encodes its gradients, all ranks gather the messages, and each adds up the same decoded
tensors in rank order. So the averages have the same bits on all ranks, and replicas do not drift
apart.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import math
import struct
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lbgm_compress._util.checks import check_number, check_whole
from lbgm_compress._util.ends import on_device
from lbgm_compress.algorithm import Algorithm, check_algorithm
from lbgm_compress.collective.applied import Parameters
from lbgm_compress.collective.average import (
    Average,
    DenseAverage,
    RanksDiffer,
    sum_dtype,
)
from lbgm_compress.collective.ends import Ends
from lbgm_compress.collective.gathered import Gathered
from lbgm_compress.collective.loss_scale import check_loss_scale, current_scale
from lbgm_compress.collective.nodes import InNode, Nodes
from lbgm_compress.collective.saved import (
    check_saved,
    gather_states,
    part_of_rank,
    place_of,
    save_rank,
)
from lbgm_compress.collective.summed import Summed
from lbgm_compress.collective.traffic import Traffic
from lbgm_compress.collective.transport import Transport, gather_texts
from lbgm_compress.compressor import Compressor
from lbgm_compress.endpoints import Receiver, Sender
from lbgm_compress.endpoints.contributor import Contributor

__all__ = ["Averager"]

DIGEST_SIZE = 16


class Averager:
    """Averages gradients over the ranks of a transport. It is one rank's part.

    It holds the rank's sender, and a receiver for the messages of the other ranks.

    A step is a transaction: a step whose averages have inf or nan is taken back when it ends, since
    training loops skip it, and `undo` takes back one that a loop skips for reasons of its own.
    Residuals and look-back gradients are then those from before the step, on all ranks.

    All ranks call `average` for each step, or `begin` for each part of the gradients of a step and
    `end_step` after the last part: in the same order, and with the same names.

    Parameters
    ----------
    compressor
        Compresses the gradients: any compressor, the same on all ranks.
    parameters
        Tensors with the names, shapes, dtypes and device of the gradients, the same on all ranks.
    transport
        Connects the ranks.
    start_step
        Number of steps of plain all-reduce at the beginning. Gradients change fastest there.
    weight
        This rank's weight in the average, for example its number of samples; positive. Its share
        is the weight divided by the sum of the weights of all ranks.
    must_match
        Further lines, each a name and a value, that must be the same on all ranks.
    loss_scale
        The factor by which the loss is multiplied: a number, or a callable that returns it, such as
        the method ``get_scale`` of a `torch.amp.GradScaler`. It is asked for at the beginning of
        each step. Residuals and `NormBudget` follow it.
    nodes
        Nodes with a fast link inside each, whose first ranks alone exchange compressed gradients.

    Attributes
    ----------
    compressor, start_step
        As given.
    description : str
        Lines that are the same on all ranks.
    step : int
        Number of steps so far.

    Raises
    ------
    TypeError, ValueError
        If an argument is of the wrong type or out of range.

    Examples
    --------
    >>> import torch
    >>> from lbgm_compress import LBGM
    >>> from lbgm_compress.collective import Averager, Transport
    >>> class Alone(Transport):
    ...     rank, size = 0, 1
    ...     def gather_equal(self, data):
    ...         return data.view(1, -1).clone()
    >>> averager = Averager(LBGM(), {"w": torch.empty(2)}, Alone())
    >>> averager.average({"w": torch.ones(2)})
    {'w': tensor([1., 1.])}
    """

    def __init__(
        self,
        compressor: Algorithm,
        parameters: Mapping[str, Tensor],
        transport: Transport,
        start_step: int = 0,
        weight: float = 1.0,
        must_match: Sequence[str] = (),
        *,
        loss_scale: float | Callable[[], float] = 1.0,
        nodes: Nodes | None = None,
    ) -> None:
        self.check_options(compressor, start_step, weight, loss_scale)
        if not parameters:
            raise ValueError("named_parameters has no parameter that requires a gradient")
        self.compressor = compressor
        self.start_step = start_step
        self.loss_scale = loss_scale
        self.step = 0
        self._likes = {name: (tuple(p.shape), str(p.dtype)) for name, p in parameters.items()}
        self._weight = float(weight)
        self._shares: list[float] = []
        self._device = next(iter(parameters.values())).device
        lines = [f"compressor {compressor!r}", f"start_step {start_step}"]
        lines += [
            f"parameter {name!r} of shape {tuple(p.shape)} and {p.dtype}"
            for name, p in parameters.items()
        ]
        self.description = "\n".join([*lines, *must_match])
        self._members: tuple[int, int] | None = None
        self._scale = 1.0
        self._watched = Parameters(parameters.values(), self._applied)
        # Whether a step has begun, and whether its averages have inf or nan.
        self._in_step = self._spoiled = False
        # The versions of the parameters at the end of a step that can be taken back.
        self._versions: list[int] | None = None
        # Whether this rank asks the others to compare states, and the step until they do.
        self._differs = False
        self._common_step: int | None = None
        self._failure: BaseException | None = None
        self._traffic = Traffic(parameters)
        link = transport if nodes is None else nodes.between
        self._exchange = _ends(compressor, parameters, link, self._device, self._traffic)
        self._ends: Ends = self._exchange
        if nodes is not None:
            others = self._exchange, parameters, transport, self._device, self._traffic
            self._ends = InNode(nodes, *others)

    @staticmethod
    def check_options(compressor: Any, start_step: Any, weight: Any, loss_scale: Any) -> None:
        """Raise `TypeError` or `ValueError` unless these arguments are of their types and range."""
        check_algorithm(compressor)
        check_whole("start_step", start_step, 0)
        check_loss_scale(loss_scale)
        check_number("weight", weight, error=TypeError)
        if not 0 < weight < math.inf:
            raise ValueError(f"weight must be above 0 and finite, not {weight}")

    @property
    def transport(self) -> Transport:
        """The connection of the ranks. It may be replaced between two steps."""
        return self._ends.transport

    @transport.setter
    def transport(self, transport: Transport) -> None:
        self._ends.transport = transport

    @property
    def sender(self) -> Sender | Contributor:
        """The end that encodes this rank's gradients."""
        return self._exchange.sender

    @property
    def receiver(self) -> Receiver:
        """The end that decodes the messages of others. Where ranks take sums, there is none."""
        if isinstance(self._exchange, Summed):
            raise AttributeError(f"{self.compressor!r} averages by sums, and has no receiver")
        return self._exchange.receiver

    @property
    def warming_up(self) -> bool:
        """True if this step is one of plain all-reduce."""
        # All ranks have to come to the same conclusion, also where one has loaded another step.
        step = self.step if self._common_step is None else self._common_step
        return step < self.start_step

    @property
    def share(self) -> float:
        """This rank's share of the average, known after `verify_ranks_match`."""
        return self._shares[self.transport.rank]

    @property
    def ranks_match(self) -> bool:
        """True if these ranks have been compared, so that `verify_ranks_match` is not needed."""
        return self._members == (self.transport.rank, self.transport.size)

    def average(self, grads: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Average gradients over all ranks: one step.

        Parameters
        ----------
        grads
            This rank's gradients by name: all parameters or some, the same on all ranks. They are
            not modified.

        Returns
        -------
        dict
            The averages by name, with the shapes, dtypes and device of `grads`, and the same bits
            on all ranks.

        Raises
        ------
        TypeError, ValueError
            If a gradient is not dense, not of floating point, or not as the parameter that it is
            named after. In the first step, on every rank, if the ranks were given different
            compressors or models.
        RuntimeError
            If another rank could not encode its gradients, or cannot be reached, or if an earlier
            step failed.
        """
        try:
            averages = self.begin(grads).finish()
        except RanksDiffer:
            self._compare_again()
            averages = self.begin(grads).finish()
        self.end_step()
        return averages

    def begin(self, grads: Mapping[str, Tensor]) -> Average:
        """Encode some or all gradients of a step, and begin to exchange them.

        Several averages can be under way at one time. They are finished in the order in which they
        began, and `grads` must not change until then. Parameters and errors are those of `average`.
        Besides, this or `Average.finish` raises `RanksDiffer` on all ranks if one of them has
        loaded a state or undone a step: `BackgroundAverager` then begins the whole step again.
        """
        self.check_usable()
        if not self.ranks_match:
            self.verify_ranks_match()
        self.open_step()
        try:
            return self._begin_dense(grads) if self.warming_up else self._begin_compressed(grads)
        except RanksDiffer:
            raise
        except BaseException as error:
            self.fail(error)
            raise

    def open_step(self) -> None:
        """Note the state to return to and the loss scale, unless a step has begun already.

        Raises
        ------
        ValueError
            If the loss scale is not a finite number above 0.
        """
        if self._in_step:
            return
        self._scale = current_scale(self.loss_scale)
        self._in_step, self._spoiled, self._versions = True, False, None
        self._ends.begin_step()

    def end_step(self) -> None:
        """Count a step whose averages have all been finished.

        If an average has inf or nan, the step is taken back, on all ranks.
        """
        self.step += 1
        if self._common_step is not None:
            self._common_step += 1
        self._in_step = False
        if self._spoiled:
            self._take_back()
        else:
            self._versions = self._watched.versions()

    def undo(self) -> None:
        """Take the last step back: its gradients were not applied, and are not to be.

        Residuals and look-back gradients are then those from before the step, bit for bit. Call it
        on every rank, after the backward pass and in the place of ``optimizer.step()``. A step with
        inf or nan needs no call. Nothing is done if the parameters have changed since, as the step
        was then applied, or if no step was made.

        Raises
        ------
        RuntimeError
            Within a step.
        """
        if self._in_step:
            raise RuntimeError("undo() within a step: call it after the backward pass")
        if self._versions is not None and self._versions == self._watched.versions():
            self._take_back()
            # Should other ranks have applied the step, they do not hold what this one does.
            self._ask_to_compare()

    def _take_back(self) -> None:
        self._ends.undo()
        self._in_step, self._spoiled, self._versions = False, False, None

    def _spoil(self) -> None:
        self._spoiled = True

    def _applied(self) -> None:
        """Free what would be needed to take back the last step, which has been applied."""
        if self._versions is not None:
            self._commit()

    def _commit(self) -> None:
        self._ends.commit()
        self._versions = None

    def _ask_to_compare(self) -> None:
        """Have the next step compare the states of all ranks first."""
        if self._members is not None and not self._differs:
            self._differs, self._common_step = True, self.step

    def _compare_again(self) -> None:
        """Take back what was done of a step, and compare the states of all ranks."""
        self._take_back()
        self.verify_ranks_match()

    def _begin_dense(self, grads: Mapping[str, Tensor]) -> Average:
        dtype = functools.reduce(torch.promote_types, (sum_dtype(g.dtype) for g in grads.values()))
        flat = torch.cat([grad.reshape(-1).to(dtype) for grad in grads.values()]).mul_(self.share)
        pending = self.transport.begin_all_reduce(flat, f"dense.{min(grads)}")
        return DenseAverage(pending, grads, self.fail)

    def _begin_compressed(self, grads: Mapping[str, Tensor]) -> Average:
        return self._ends.begin(
            grads, self._shares, self._scale, self._differs, self.fail, self._spoil
        )

    def verify_ranks_match(self) -> None:
        """Compare what the ranks were given, and exchange their weights and steps.

        All ranks do so together. `begin` calls this before the first step, after an elastic engine
        has changed the ranks, and after a rank has loaded a state or undone a step. Look-back
        gradients that not all ranks hold are dropped on all of them, with a warning, and the next
        step has them in full. A rank that joins goes on at the step of the others.

        Raises
        ------
        ValueError
            On every rank, if the ranks were given different compressors or models.
        """
        self._members = None
        digest = hashlib.blake2b(self.description.encode(), digest_size=DIGEST_SIZE).digest()
        mine = digest + struct.pack("<qd", self.step, self._weight)
        data = torch.frombuffer(bytearray(mine), dtype=torch.uint8).to(self._device)
        gathered = self.transport.gather_equal(data)
        expected = self.transport.size, len(mine)
        if gathered.dtype != torch.uint8 or gathered.shape != expected:
            raise TypeError(
                f"{type(self.transport).__name__}.gather_equal returned {gathered.dtype} of shape "
                f"{tuple(gathered.shape)}, expected torch.uint8 of shape {expected}: one row a rank"
            )
        rows = [bytes(row) for row in gathered.tolist()]
        if any(row[:DIGEST_SIZE] != digest for row in rows):
            self._raise_difference()
        numbers = [struct.unpack("<qd", row[DIGEST_SIZE:]) for row in rows]
        self.step = max(step for step, _ in numbers)
        total = sum(weight for _, weight in numbers)
        self._shares = [weight / total for _, weight in numbers]
        self._members = self.transport.rank, self.transport.size
        self._differs, self._common_step = False, None
        dropped = self._ends.drop_unshared()
        if dropped:
            warnings.warn(
                f"the ranks do not hold the same look-back gradients of {dropped}, as after "
                "loading states of different steps or ranks: they are dropped on all ranks, "
                "and the next step has them in full",
                stacklevel=2,
            )

    def _raise_difference(self) -> None:
        """Raise `ValueError` that names the first difference between two ranks."""
        theirs = gather_texts(self.transport, self.description, self._device)
        first = theirs[0].split("\n")
        for rank, other in enumerate(theirs):
            for a, b in itertools.zip_longest(first, other.split("\n"), fillvalue="nothing"):
                if a != b:
                    raise ValueError(
                        f"the ranks were given different compressors or models: rank 0 has {a} "
                        f"where rank {rank} has {b}"
                    )

    def stats(self, by_parameter: bool = False) -> dict[str, Any]:
        """Return what this rank has sent since it was built, without the all-reduced steps.

        Parameters
        ----------
        by_parameter
            Add ``parameters``: the same by parameter, without the messages' own bytes.

        Returns
        -------
        dict
            ``message_bytes`` (whole messages) and ``dense_bytes`` (the gradients) of all steps,
            their ``ratio``, and ``recycled_share`` (the share of tensors sent as a coefficient
            alone).
        """
        return self._traffic.stats(by_parameter)

    def reset(self) -> None:
        """Forget all look-back gradients: the next step is sent in full. Residuals stay."""
        self._forget()
        self._ask_to_compare()

    def _forget(self) -> None:
        self._ends.reset()
        self._versions = None

    def rejoin(self) -> None:
        """Prepare for a step among ranks that may be others, and in other states.

        `verify_ranks_match` is needed. A step that failed is forgotten.
        """
        self._members = None
        self._failure = None

    def fail(self, error: BaseException) -> None:
        """Record the error of a step, after which the states of the ranks do not match."""
        self._failure = error

    def check_usable(self) -> None:
        """Raise `RuntimeError` if an earlier step failed."""
        if self._failure is not None:
            raise RuntimeError(
                "an earlier step failed, and the ranks are no longer in step: load a checkpoint"
            ) from self._failure

    def state_dict(self) -> dict[str, Any]:
        """Return this rank's state as a nested dict of tensors and numbers.

        Every rank has a state of its own, and must save it, or `gather_state_dict`. `torch.load`
        reads it with ``weights_only=True``.
        """
        rank, size = self._members or (self.transport.rank, self.transport.size)
        return save_rank(rank, size, self.step, self._ends)

    def gather_state_dict(self) -> dict[str, Any]:
        """Return the states of all ranks on rank 0, and an empty dict on the others.

        For jobs in which rank 0 alone saves. All ranks call it together. `load_state_dict` takes
        the dict on every rank, and gives it its own part, bit for bit. It is in the memory of the
        host, and about as large as the states of all ranks together: for each rank a residual for
        each `ErrorFeedback` and the look-back gradients.
        """
        if not self.ranks_match:
            self.verify_ranks_match()
        return gather_states(self.transport, self.step, self._ends, self._device)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` or `gather_state_dict` was called.

        Any ranks may call it, between two steps. The next step compares the states of all ranks
        first, and drops, on all of them, look-back gradients that not all hold (see
        `verify_ranks_match`). A rank keeps its own seed. Of the state of another rank it takes no
        residual, with a warning.

        Raises
        ------
        ValueError
            If it is the state of another compressor or model, or no such state. This averager is
            then unchanged.
        """
        check_saved(state, type(self).__name__)
        rank = self.transport.rank
        state = part_of_rank(state, rank, self._ends)
        nodes = state.get("nodes", ())
        if state["rank"] != rank or nodes != self._ends.nodes:
            # The state is checked as a whole, though not all of it is of use here.
            self._check_sender(state["sender"])
            warnings.warn(
                f"the state is that of {place_of(state['rank'], state['world_size'], nodes)}, and "
                f"this is {place_of(rank, self.transport.size, self._ends.nodes)}: its residual "
                "and its seed are not taken; save the state of every rank, or gather_state_dict()",
                stacklevel=2,
            )
            state = {**state, "sender": self._ends.of_another(state["sender"])}
        self.restore(state)

    def restore(self, state: Mapping[str, Any]) -> None:
        """Do `load_state_dict` without comparing ranks, which an elastic engine may not know yet.

        `rejoin` has to follow, or a check that the ranks are those of the state.
        """
        check_saved(state, type(self).__name__)
        state = on_device(state, self._device)
        self._check_sender(state["sender"])
        self._ends.load_state_dict(state)
        self._ask_to_compare()
        self._in_step, self._spoiled, self._versions = False, False, None
        self.step = state["step"]
        self._failure = None

    def _check_sender(self, state: Mapping[str, Any]) -> None:
        """Raise `ValueError` unless a state is one of a sender for these parameters."""
        self._ends.check_sender(state)
        self._check_tensors(state["tensors"])

    def _check_tensors(self, tensors: Mapping[str, Any]) -> None:
        """Raise `ValueError` unless the tensors of a sender's state are those of the parameters."""
        for name, entry in tensors.items():
            found = tuple(entry["shape"]), entry["dtype"]
            if name not in self._likes:
                raise ValueError(f"the state has a tensor {name!r}, which is not a parameter here")
            if found != self._likes[name]:
                raise ValueError(
                    f"the state is that of another model: its tensor {name!r} has shape and dtype "
                    f"{found}, and the parameter has {self._likes[name]}"
                )


def _ends(
    compressor: Algorithm,
    parameters: Mapping[str, Tensor],
    transport: Transport,
    device: torch.device,
    traffic: Traffic,
) -> Gathered | Summed:
    """Return the ends of a rank: sums where contributions add up, messages elsewhere."""
    if compressor.adds_up:
        return Summed(compressor, parameters, transport, device, traffic)
    assert isinstance(compressor, Compressor)
    return Gathered(compressor, parameters, transport, device, traffic)
