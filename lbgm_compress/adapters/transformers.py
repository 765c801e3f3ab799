"""Callbacks for the `Trainer` of Hugging Face transformers.

>>> from lbgm_compress import ErrorFeedback, SharedSubspace
>>> def make_trainer(model, arguments, data):
...     from transformers import Trainer
...     from lbgm_compress.adapters.transformers import CompressionCallback
...     callback = CompressionCallback(ErrorFeedback(SharedSubspace(8)))
...     return Trainer(model=model, args=arguments, train_dataset=data, callbacks=[callback])

The callback works where the Trainer wraps its model in DistributedDataParallel, which it does when
`torchrun` or `accelerate launch` starts several processes.
"""

from __future__ import annotations

import io
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

try:
    from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState
    from transformers.training_args import TrainingArguments
except ModuleNotFoundError as error:
    if (error.name or "").split(".")[0] != "transformers":
        raise
    raise ImportError(
        "lbgm_compress.adapters.transformers needs transformers: "
        "pip install 'lbgm_compress[transformers]'"
    ) from error

from lbgm_compress._util.files import atomic_write
from lbgm_compress.adapters.attached import AttachedCompression, AttachedProbe
from lbgm_compress.adapters.ddp import CompressionState
from lbgm_compress.algorithm import Algorithm
from lbgm_compress.probe.report import Report

__all__ = ["CompressionCallback", "ProbeCallback"]


class CompressionCallback(TrainerCallback):
    """Compresses the gradients of a `Trainer`, in its ``callbacks``.

    Each rank saves its state as ``compression-rank<rank>.pt`` in every checkpoint of the Trainer,
    and loads it where the Trainer resumes. What this rank has sent is in the Trainer's logs under
    ``compression/message_bytes``, ``compression/ratio`` and ``compression/recycled_share``, since
    the program was started.

    Parameters
    ----------
    compressor
        Compresses the gradients: any compressor or `Reducible`, the same on all ranks.
    start_step, weight, node_group
        As in `lbgm_compress.adapters.ddp.compress`.
    loss_scale
        As there; that of the Trainer, with ``fp16=True``, unless given.

    Raises
    ------
    TypeError, ValueError
        If an argument is of the wrong type or out of range. When a training begins, if its model
        is not in `DistributedDataParallel`, or a checkpoint has the state of another compressor.
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

    @property
    def state(self) -> CompressionState | None:
        """The state of this rank, from the beginning of the first training on."""
        return self._attached.state

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Register the compressor on the model, with the state of the checkpoint if there is one.

        All ranks call it together.
        """
        trainer, checkpoint = _running_trainer()
        if checkpoint is not None:
            self._resume(Path(checkpoint), args.process_index)
        model = trainer.model_wrapped
        scaler = trainer.accelerator.scaler
        try:
            self._attached.register(
                getattr(model, "_orig_mod", model),
                _advice(trainer),
                1.0 if scaler is None else scaler.get_scale,
            )
        except ValueError as error:
            if checkpoint is None:
                raise
            raise ValueError(
                f"{error}: to go on without the states in {checkpoint}, delete its files "
                f"{_name('*')}"
            ) from None
        # The Trainer puts callbacks for TensorBoard and others before those that it is given, and
        # `on_log` has to change the logs before these read them.
        callbacks = trainer.callback_handler.callbacks
        callbacks.remove(self)
        callbacks.insert(0, self)

    def _resume(self, checkpoint: Path, rank: int) -> None:
        file = checkpoint / _name(rank)
        if not file.exists():
            warnings.warn(
                f"{checkpoint} has no {file.name}: the compression of rank {rank} begins anew, "
                "with a full message and without a residual",
                stacklevel=3,
            )
            return
        self._attached.load(torch.load(file, map_location="cpu", weights_only=True))

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Warn if nothing was compressed in the first step."""
        self._attached.stepped()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Add what this rank has sent to the logs of the training, and not to evaluations."""
        if logs is not None and ("loss" in logs or "train_loss" in logs):
            metrics = self._attached.metrics()
            logs.update(metrics)
            # The Trainer has copied the logs to its history already.
            state.log_history[-1].update(metrics)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Write this rank's state to the checkpoint that the Trainer has just written."""
        # The Trainer cannot resume a model alone, and keeps the trials of a search elsewhere.
        if self.state is None or args.save_only_model or state.is_hyper_param_search:
            return
        folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        folder.mkdir(parents=True, exist_ok=True)
        data = io.BytesIO()
        torch.save(self.state.state_dict(), data)
        atomic_write(folder / _name(args.process_index), data.getvalue())


class ProbeCallback(TrainerCallback):
    """Reports what compression would send in a `Trainer`, without changing the training.

    The report is printed when the training ends, on the main process, and is of the gradients of
    that process. Training may be distributed or not.

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
        """The report of the last training that has ended."""
        return self._attached.report

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        **_: Any,
    ) -> None:
        """Begin to observe the model."""
        self._attached.start(model)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """End the observation, and print the report on the main process."""
        report = self._attached.stop()
        if report is not None and state.is_world_process_zero:
            # The line of the progress bar has no end yet.
            print(f"\n{report}", flush=True)


def _name(rank: int | str) -> str:
    return f"compression-rank{rank}.pt"


def _running_trainer() -> tuple[Trainer, str | None]:
    """Return the Trainer that calls a callback, and the folder from which it resumes, if it does.

    A Trainer gives neither to its callbacks, and keeps the folder nowhere but in an argument.
    """
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        trainer = frame.f_locals.get("self")
        if isinstance(trainer, Trainer) and "resume_from_checkpoint" in frame.f_locals:
            return trainer, frame.f_locals["resume_from_checkpoint"]
        frame = frame.f_back
    raise RuntimeError(
        "CompressionCallback is for transformers.Trainer, which calls it in train(): write "
        "Trainer(..., callbacks=[CompressionCallback(compressor)])"
    )


def _advice(trainer: Trainer) -> str:
    """Return what to write so that a Trainer uses DistributedDataParallel."""
    if trainer.is_fsdp_enabled:
        return (
            "leave fsdp out of the TrainingArguments, or compress between replicas with "
            "lbgm_compress.adapters.fsdp in a loop of your own"
        )
    if trainer.is_deepspeed_enabled:
        return "leave deepspeed out of the TrainingArguments"
    return (
        "start a process for each device, as with torchrun --nproc-per-node=2 train.py, and for "
        "processes on CPUs give use_cpu=True to the TrainingArguments"
    )
