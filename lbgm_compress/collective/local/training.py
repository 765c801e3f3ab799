"""Local training: workers take steps of their own, and exchange only what came of them.

With w the common model and x the model of a worker, a round is (DiLoCo, arXiv 2311.08105,
algorithm 1): some steps of the worker's inner optimizer on x; then w - x, the pseudo-gradient, is
compressed, averaged over all workers and given to an outer optimizer of w; the worker goes on from
the new w. The part of w - x that a message leaves out stays in the worker's model,
x = w_new - (w - x - decoded), or in the compressor's residual.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

import torch
from torch import Tensor, nn

from lbgm_compress._util.contents import all_finite, nonzero
from lbgm_compress.algorithm import Algorithm
from lbgm_compress.collective.averager import Averager
from lbgm_compress.collective.background import Worker, ready_event, stream_after
from lbgm_compress.collective.local.common_model import (
    CommonAverager,
    CommonModel,
    average_buffers,
)
from lbgm_compress.collective.local.node import News, Node
from lbgm_compress.collective.local.options import (
    check_optimizers,
    check_options,
    check_same,
    described_buffers,
    described_options,
    divided,
    parameters_of,
)
from lbgm_compress.collective.local.pending import Exchanged, Pending
from lbgm_compress.collective.local.saved import SavedRounds
from lbgm_compress.collective.local.warned import warn
from lbgm_compress.collective.transport import Transport
from lbgm_compress.compressors.error_feedback import ErrorFeedback
from lbgm_compress.compressors.identity import Identity

__all__ = ["LocalTraining"]

Accept = Callable[[dict[str, Tensor]], bool]


class LocalTraining(SavedRounds):
    """Local training of one worker, on any transport.

    All ranks build it together, for models with the same parameters, and call `step` after each
    step of their inner optimizers. They begin with the parameters and buffers of rank 0. Ranks may
    take different numbers of steps: a rank that calls `finish` early does not hold up the others,
    which then go on without exchanges until they call it, too.

    An exchange whose averages have inf or nan is not applied, and nothing of it is lost. A worker
    whose own parameters have inf or nan goes on from the common model.

    Parameters
    ----------
    model
        The worker's model. Buffers stay the worker's own until `finish`.
    inner_optimizer
        Optimizer of the parameters, whose state stays the worker's own.
    compressor
        Compresses the pseudo-gradients: any compressor, the same on all ranks.
    transport
        Connects the ranks.
    sync_every
        Number of inner steps from one exchange to the next, H.
    outer_optimizer
        Optimizer of the same parameters, which applies averages: `torch.optim.SGD` with learning
        rate 0.7 and Nesterov momentum 0.9 unless given.
    residual
        Where the part of a pseudo-gradient is kept that a message leaves out: "model", in the
        worker's model, or "memory", in the residual of `ErrorFeedback`, which is put around a
        compressor without one.
    fragments
        Number of parts of the model that are exchanged one after the other, each every
        `sync_every` steps (Streaming DiLoCo, arXiv 2501.18512).
    delay
        Number of inner steps from an exchange to its application, during which it goes on in the
        background; below ``sync_every / fragments``.
    final
        Compresses the differences of `finish`; `Identity` unless given.
    accept
        Called with the averages of each exchange, which are the same on all ranks. If it returns
        False, the exchange is not applied, and nothing of it is lost.
    weight
        This rank's weight in the average; positive.
    node
        The ranks that train this worker's model with this one, which is their leader; this rank
        alone unless given.

    Attributes
    ----------
    local_step : int
        Number of inner steps so far.
    exchanges : int
        Number of exchanges so far.

    Raises
    ------
    TypeError, ValueError
        If an argument is of the wrong type or out of range; on all ranks, if the ranks were given
        different compressors, models or options.
    """

    def __init__(
        self,
        model: nn.Module,
        inner_optimizer: torch.optim.Optimizer,
        compressor: Algorithm,
        transport: Transport,
        *,
        sync_every: int = 30,
        outer_optimizer: torch.optim.Optimizer | None = None,
        residual: str = "model",
        fragments: int = 1,
        delay: int = 0,
        final: Algorithm | None = None,
        accept: Accept | None = None,
        weight: float = 1.0,
        node: Node | None = None,
    ) -> None:
        check_options(compressor, sync_every, residual, fragments, delay, final, accept, weight)
        super().__init__(sync_every, fragments, delay)
        parameters = parameters_of(model)
        check_optimizers(inner_optimizer, outer_optimizer, parameters)
        if residual == "memory" and not compressor.has_residual:
            compressor = ErrorFeedback(compressor)
        self.model = model
        self.residual = residual
        self._parameters = parameters
        self._inner = inner_optimizer
        self._accept = accept
        self._final = final or Identity()
        self._weight = weight
        self._fragments = divided(parameters, fragments)
        self._pending: Pending | None = None
        if outer_optimizer is None:
            outer_optimizer = torch.optim.SGD(
                parameters.values(), lr=0.7, momentum=0.9, nesterov=True
            )
        self._device = next(iter(parameters.values())).device
        self._common = CommonModel(parameters, outer_optimizer)
        options = described_options(
            outer_optimizer,
            sync_every=sync_every,
            residual=residual,
            fragments=fragments,
            delay=delay,
            final=self._final,
        )
        self._averager = CommonAverager(
            compressor,
            self._common.tensors,
            transport,
            weight=weight,
            must_match=[*options, *described_buffers(model)],
            common=self._common,
        )
        # Bytes of the exchanges of `finish`: of messages, and of dense ones.
        self._final_bytes = [0, 0]
        self._node = node
        # What the node is told next.
        self._changed: set[str] = set()
        self._shows_common = False
        self._loaded_steps = self._loaded_exchanges = 0
        self._forgotten: set[str] = set()
        everything = [*model.parameters(), *model.buffers()]
        with torch.no_grad(), self._telling():
            check_same(transport, options, self._device)
            self._averager.start(everything, parameters)
        if node is not None:
            node.share_all(everything)
        self._worker = Worker(self) if delay else None

    # --- rounds -------------------------------------------------------------------------------

    def step(self) -> None:
        self._check_own()
        super().step()

    def _check_own(self) -> None:
        if self._shows_common:
            raise RuntimeError("no training and no state within common_model(): leave the block")

    @torch.no_grad()
    def _begin(self) -> None:
        """Begin to exchange the pseudo-gradients of the next fragment."""
        names = self._fragments[self.exchanges % len(self._fragments)]
        super()._begin()
        self._averager.position = self.exchanges
        pending = self._pending = Pending({}, Future())
        try:
            differences = self._differences(names)
            if self.delay:
                # Copies, since the parameters go on.
                pending.base.update({n: self._parameters[n].detach().clone() for n in names})
            ready = ready_event(self._device)
        except BaseException as error:
            self._averager.fail(error)
            pending.result.set_exception(error)
            return

        def exchange() -> None:
            try:
                with stream_after(ready, self._device):
                    result = self._exchange(differences)
                    if ready is not None:
                        torch.cuda.current_stream(self._device).synchronize()
            except BaseException as error:
                pending.result.set_exception(error)
            else:
                pending.result.set_result(result)

        if self._worker is None:
            exchange()
        else:
            self._worker.submit(exchange)

    def _differences(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Return the pseudo-gradients of some parameters."""
        return {n: self._common.tensors[n] - self._parameters[n].detach() for n in names}

    @torch.no_grad()
    def _exchange(self, differences: Mapping[str, Tensor]) -> Exchanged | None:
        """Return the averages and what this rank's message left out, or None."""
        found = self._averager.exchange(differences)
        if found is None:
            return None
        averages, own = found
        accepted = False
        try:
            finite = all(all_finite(list(averages.values())))
            accepted = finite and (self._accept is None or bool(self._accept(averages)))
        finally:
            if not accepted:
                # The next exchange compares the ranks, should others have accepted this one.
                self._averager.undo()
        if not accepted:
            return None
        self._averager.keep()
        if self.residual == "memory":
            return averages, {}
        return averages, {n: own[n].missing_from(of) for n, of in differences.items()}

    @torch.no_grad()
    def _apply(self) -> None:
        """Wait for the exchange under way, and go on from the new common model."""
        with self._telling():
            pending, self._pending, self._due = self._pending, None, None
            assert pending is not None
            result = pending.result.result()
            try:
                self._catch_up()
                if result is None:
                    self._return_to_common(self._not_finite(), forget=True)
                else:
                    self._go_on(pending.base, *result)
            except BaseException as error:
                self._averager.fail(error)
                raise

    def _go_on(
        self,
        base: Mapping[str, Tensor],
        averages: Mapping[str, Tensor],
        missing: Mapping[str, Tensor],
    ) -> None:
        """Apply averages, and add what the worker has beyond the common model."""
        own = {name: self._parameters[name].detach() - of for name, of in base.items()}
        self._outer_step(averages)
        for name in averages:
            parameter = self._parameters[name].detach()
            if name in missing:
                parameter.sub_(missing[name])
            if name in own:
                parameter.add_(own[name])
        self._changed.update(averages)

    def _catch_up(self, replaced: bool = False) -> None:
        """Follow the ranks that are further, after a comparison that has found them."""
        # The steps since the last exchange stay.
        since = self._clock - self._time_of(self.exchanges)
        self.exchanges = self._averager.position
        self._clock = self._time_of(self.exchanges) + since
        if self._common.install() or replaced:
            self._return_to_common(list(self._parameters))

    def _outer_step(self, averages: Mapping[str, Tensor]) -> None:
        """Have the outer optimizer apply averages; the parameters are then the new common ones.

        A parameter whose average is zero, such as a frozen one, is left alone.
        """
        optimizer = self._common.optimizer
        held = [p for group in optimizer.param_groups for p in group["params"]]
        grads = [p.grad for p in held]
        known = {id(p) for p in held}
        for p in held:
            p.grad = None
        try:
            used = nonzero(list(averages.values()))
            for (name, average), is_used in zip(averages.items(), used, strict=True):
                parameter = self._parameters[name]
                parameter.detach().copy_(self._common.tensors[name])
                if not is_used:
                    continue
                if id(parameter) not in known:
                    raise ValueError(
                        f"outer_optimizer does not have the parameter {name!r}, which is trained: "
                        "build it from model.parameters()"
                    )
                parameter.grad = average.to(parameter.dtype)
            optimizer.step()
        finally:
            for p, grad in zip(held, grads, strict=True):
                p.grad = grad
        for name in averages:
            self._common.tensors[name].copy_(self._parameters[name].detach())

    def _not_finite(self) -> list[str]:
        """Return the names of parameters that have inf or nan."""
        finite = all_finite([p.detach() for p in self._parameters.values()])
        return [
            name for name, is_finite in zip(self._parameters, finite, strict=True) if not is_finite
        ]

    def _return_to_common(self, names: Sequence[str], forget: bool = False) -> None:
        """Put parameters back to the common model; `forget` drops their inner optimizer's state."""
        for name in names:
            parameter = self._parameters[name]
            parameter.detach().copy_(self._common.tensors[name])
            if forget:
                self._inner.state.pop(parameter, None)
        self._changed.update(names)
        if names and forget:
            self._forgotten.update(names)
            warn(
                f"{len(names)} of this worker's parameters have inf or nan, and go on from the "
                "common model, without their inner optimizer's state"
            )

    @torch.no_grad()
    def _start_over(self) -> None:
        with self._telling():
            self._starts_over = False
            self._return_to_common(list(self._parameters))

    def _wait(self) -> Exchanged | None:
        """Wait for the exchange under way, and return its result."""
        return None if self._pending is None else self._pending.result.result()

    @contextlib.contextmanager
    def _telling(self) -> Iterator[None]:
        """Tell the node of the counters and changes that are made within a ``with`` block."""
        try:
            yield
        except BaseException:
            if self._node is not None:
                self._node.fail()
            raise
        if self._node is not None:
            self._node.tell(
                News(
                    self.local_step,
                    self.exchanges,
                    self._clock,
                    self._due,
                    self._starts_over,
                    self._changed,
                    self._forgotten,
                )
            )
        self._changed, self._forgotten = set(), set()

    # --- the end ------------------------------------------------------------------------------

    @torch.no_grad()
    def finish(self) -> None:
        """Replace the models of all workers by their mean, in one last exchange.

        All ranks call it, after any number of steps. Differences from the common model are
        compressed by `final`. Floating-point buffers are averaged without compression; others are
        those of rank 0. Training may go on afterwards.

        Raises
        ------
        RuntimeError
            If another rank failed or cannot be reached.
        """
        if self._starts_over:
            self._start_over()
        self._check_own()
        if self._pending is not None:
            self._apply()
        with self._telling():
            replaced = self._averager.finish()
            self._catch_up(replaced)
            self._return_to_common(self._not_finite(), forget=True)
            averages = self._final_average()
            finite = all(all_finite(list(averages.values())))
            if not finite:
                warn(
                    "the mean of the workers' models is out of range: all workers end with the "
                    "common model of the last exchange"
                )
            for name, average in averages.items():
                common = self._common.tensors[name]
                if finite:
                    common.sub_(average)
                self._parameters[name].detach().copy_(common)
            self._changed.update(averages)
            average_buffers(self._averager.transport, self.model.buffers(), self._averager.share)
        if self._node is not None:
            self._node.share_all(self.model.buffers())

    def _final_average(self) -> dict[str, Tensor]:
        """Average what the workers have beyond the common model."""
        # A new one each time, which the ranks compare, and which no earlier failure stops.
        averager = Averager(
            self._final, self._common.tensors, self._averager.transport, weight=self._weight
        )
        averages = averager.average(self._differences(list(self._parameters)))
        found = averager.stats()
        self._final_bytes[0] += found["message_bytes"]
        self._final_bytes[1] += found["dense_bytes"]
        return averages

    @contextlib.contextmanager
    def common_model(self) -> Iterator[nn.Module]:
        """Let the model have the common parameters within a ``with`` block, such as to evaluate it.

        They are the same on all ranks. The worker's own come back afterwards. There is no training
        within the block.
        """
        self._check_own()
        own = {name: p.detach().clone() for name, p in self._parameters.items()}
        try:
            self._shows_common = True
            for name, parameter in self._parameters.items():
                parameter.detach().copy_(self._common.tensors[name])
            yield self.model
        finally:
            for name, parameter in self._parameters.items():
                parameter.detach().copy_(own[name])
            self._shows_common = False

    def stats(self) -> dict[str, Any]:
        """Return what this rank has sent since it was built, the exchanges of `finish` included.

        Returns
        -------
        dict
            ``message_bytes`` and ``dense_bytes`` of all exchanges, their ``ratio``,
            ``final_bytes`` (the message bytes of `finish` alone), ``recycled_share`` (the share of
            tensors sent as a coefficient alone), ``exchanges``, ``local_steps``, and
            ``bits_per_step``: bits for each parameter and inner step.
        """
        self._wait()
        found = self._averager.stats()
        message = found["message_bytes"] + self._final_bytes[0]
        dense = found["dense_bytes"] + self._final_bytes[1]
        size = sum(p.numel() for p in self._parameters.values())
        steps = self.local_step - self._loaded_steps
        return {
            **{"message_bytes": message, "dense_bytes": dense},
            "ratio": message / dense if dense else 0.0,
            "final_bytes": self._final_bytes[0],
            "recycled_share": found["recycled_share"],
            "exchanges": self.exchanges - self._loaded_exchanges,
            "local_steps": steps,
            "bits_per_step": 8 * message / size / steps if steps else 0.0,
        }
