"""Callbacks for Lightning's Trainer: compression under DDP, and the probe.

>>> from lightning.pytorch import Trainer
>>> from lbgm_compress import LBGM, TopK
>>> from lbgm_compress.adapters.lightning import CompressionCallback
>>> def compressed_trainer():
...     return Trainer(strategy="ddp", callbacks=[CompressionCallback(LBGM(TopK(0.01)))])

Lightning wraps the model in `DistributedDataParallel` when ``trainer.fit`` begins. The callback
then registers the communication hook of `lbgm_compress.adapters.ddp`. Lightning's own argument for
hooks, ``DDPStrategy(ddp_comm_hook=...)``, has no effect on the CPU.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ModuleNotFoundError as error:
    if (error.name or "").split(".")[0] != "lightning":
        raise
    raise ImportError(
        "lbgm_compress.adapters.lightning needs Lightning 2.4 or later: "
        "pip install 'lbgm_compress[lightning]'"
    ) from error

from lbgm_compress.adapters.attached import AttachedCompression, AttachedProbe
from lbgm_compress.adapters.ddp import CompressionState
from lbgm_compress.algorithm import Algorithm
from lbgm_compress.probe.report import Report

__all__ = ["CompressionCallback", "ProbeCallback"]


class CompressionCallback(Callback):
    """Has the gradients of a training averaged in compressed form.

    It needs a strategy that wraps the model in `DistributedDataParallel`, such as
    ``Trainer(strategy="ddp")``.

    The states of all ranks go into Lightning's checkpoints, except into those that are written
    because of an exception, and come back with ``trainer.fit(model, ckpt_path=...)``. A further
    ``fit`` of the same model goes on from the one before.

    After each batch, the totals of rank 0 are logged as ``compression/message_bytes``,
    ``compression/ratio`` and ``compression/recycled_share``.

    Parameters
    ----------
    compressor
        Compresses the gradients: any compressor or `Reducible`, the same on all ranks.
    start_step, weight, node_group
        As in `lbgm_compress.adapters.ddp.CompressionState`.
    loss_scale
        As in `CompressionState`; that of the Trainer's precision unless given.

    Raises
    ------
    TypeError, ValueError
        If an argument is of the wrong type or out of range. In ``trainer.fit``, if the strategy
        does not wrap the model in `DistributedDataParallel`, or if a checkpoint has the state of
        another compressor.
    """

    def __init__(
        self,
        compressor: Algorithm,
        *,
        start_step: int = 0,
        weight: float = 1.0,
        loss_scale: float | Callable[[], float] | None = None,
        node_group: dist.ProcessGroup | None = None,
    ) -> None:
        self._attached = AttachedCompression(
            compressor,
            start_step=start_step,
            weight=weight,
            loss_scale=loss_scale,
            node_group=node_group,
        )
        self._stage = ""
        self._steps = 0
        self._failed = False

    @property
    def state(self) -> CompressionState | None:
        """The state of this rank, from the beginning of the first training on."""
        return self._attached.state

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._stage, self._failed = stage, False

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if self._stage == "fit" and self.state_key not in checkpoint.get("callbacks", {}):
            warnings.warn(
                "the checkpoint has no state of CompressionCallback: compression begins anew, with "
                "full messages and without residuals",
                stacklevel=2,
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        try:
            self._attached.register(
                trainer.strategy.model,
                f'write Trainer(strategy="ddp", devices=2), with your number of devices, in the '
                f"place of {type(trainer.strategy).__name__}",
                1.0 if scaler is None else scaler.get_scale,
            )
        except ValueError as error:
            raise ValueError(
                f"{error}: to go on without the state in a checkpoint, remove "
                f"checkpoint['callbacks'][{self.state_key!r}] from its file"
            ) from None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._steps = trainer.global_step

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if trainer.global_step > self._steps:
            self._attached.stepped()
        pl_module.log_dict(self._attached.metrics(), on_step=True, on_epoch=False)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._failed = True

    def state_dict(self) -> dict[str, Any]:
        # Lightning calls it on all ranks, but after an exception not all of them may be there.
        return {} if self._failed else self._attached.gather()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self._stage == "fit":
            self._attached.load(state_dict)


class ProbeCallback(Callback):
    """Observes the gradients of a training, and prints on rank 0 what looking back would save.

    It does not change the training. The strategy must leave parameters whole, such as DDP or a
    single device.

    Parameters
    ----------
    **options
        Keyword arguments of `lbgm_compress.probe.LookBackProbe`, without `updates`.

    Raises
    ------
    TypeError
        If `LookBackProbe` has no such argument.
    """

    def __init__(self, **options: Any) -> None:
        self._attached = AttachedProbe(**options)

    @property
    def report(self) -> Report | None:
        """The report of the last training that has ended, on each rank its own."""
        return self._attached.report

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._attached.start(pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop(trainer)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._stop(trainer)

    def _stop(self, trainer: Trainer) -> None:
        report = self._attached.stop()
        if report is not None and trainer.is_global_zero:
            print(f"\n{report}", flush=True)
