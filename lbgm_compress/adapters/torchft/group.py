"""The process group that torchft's manager is given."""

from __future__ import annotations

import hashlib
import itertools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torchft.process_group import ProcessGroupGloo

from lbgm_compress._util.checks import check_whole
from lbgm_compress.adapters.torchft.ends import BatchEnds
from lbgm_compress.adapters.torchft.transport import ReplicaTransport, StepFailed
from lbgm_compress.adapters.torchft.work import Batch, SumWork
from lbgm_compress.collective.loss_scale import check_loss_scale, current_scale
from lbgm_compress.collective.transport import gather_texts
from lbgm_compress.compressor import Compressor, check_compressor
from lbgm_compress.endpoints import Sender
from lbgm_compress.wire.errors import OutOfSyncError
from lbgm_compress.wire.message import recycles

__all__ = ["CompressedProcessGroup"]

logger = logging.getLogger(__name__)

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
CPU = torch.device("cpu")
# In the place of the size of a message: the replica could not encode its tensors.
FAILED = -1
# Quorums of which a replica remembers the last step that it committed.
REMEMBERED = 64
# The beginning of the names under which torchft's DiLoCo registers its fragments.
FRAGMENT = "StreamingDiLoCoFragment_"


class CompressedProcessGroup(ProcessGroupGloo):
    """A `torchft.process_group.ProcessGroupGloo` that compresses the sums of gradients.

    Sums of dense floating-point tensors with more than one element are compressed. All other
    collectives, operations and tensors are torchft's own: a loss or a count that is summed up is
    exact.

    Give it to the `torchft.manager.Manager` of each replica, and the manager to `attach`.

    Parameters
    ----------
    compressor
        Compresses the gradients: any compressor, the same on all replicas.
    fragments
        The number of fragments of torchft's `DiLoCo`, which are averaged in turn: a step averages
        one of them.
    loss_scale
        The factor by which the loss is multiplied: a number, or a callable that returns it, such as
        ``scaler.get_scale``. Residuals and `NormBudget` follow it.
    timeout
        A `datetime.timedelta`: as of `ProcessGroupGloo`, 60 seconds unless given.

    Raises
    ------
    TypeError, ValueError
        If an argument is of the wrong type or out of range.

    Notes
    -----
    A sum that fails raises nothing: it is logged, and the other sums of the step are left out. Then
    ``manager.should_commit()``, which asks `errored`, skips the step, and torchft tries again. An
    error that would come back each time, as of replicas with different compressors, is raised by
    ``manager.should_commit()``, where it ends the training.
    """

    def __init__(
        self,
        compressor: Compressor,
        *,
        fragments: int = 1,
        loss_scale: float | Callable[[], float] = 1.0,
        **options: Any,
    ) -> None:
        check_compressor(compressor)
        check_whole("fragments", fragments, 1)
        check_loss_scale(loss_scale)
        super().__init__(**options)
        self.compressor = compressor
        self.fragments = fragments
        self.loss_scale = loss_scale
        self._manager: Any = None
        self._transport = ReplicaTransport(None, 0, 1)
        self._quorum = -1
        # Whether the replicas of this quorum have told each other what they have committed.
        self._met = False
        # Whether this replica has ever exchanged a batch.
        self._proven = False
        self._batches: dict[bytes, BatchEnds] = {}
        self._waiting: Batch | None = None
        # The quorum and step whose messages may still have to be taken back, and their ends.
        self._attempt: tuple[int, int] | None = None
        self._sent: list[BatchEnds] = []
        self._spoiled = False
        # The number of batches of each layout since the last step.
        self._counts: dict[bytes, int] = {}
        self._committed: dict[int, int] = {}
        self._wrong: Exception | None = None
        # The error of this step, which `errored` has yet to return.
        self._failure: Exception | None = None
        self._totals = {"message_bytes": 0, "dense_bytes": 0, "recycled": 0, "tensors": 0}

    def attach(self, manager: Any) -> None:
        """Learn from the manager which steps were committed. Call it once, before training.

        Parameters
        ----------
        manager
            The `torchft.manager.Manager` that was built with this group.

        Raises
        ------
        TypeError
            If it is not a manager.
        """
        for name in ("current_step", "is_participating"):
            if not callable(getattr(manager, name, None)):
                raise TypeError(f"attach() takes a torchft Manager, not {type(manager).__name__}")
        self._manager = manager

    def stats(self) -> dict[str, float]:
        """Return the number of bytes that this replica has sent to each other replica.

        They are counted from when the group was built. Steps of a replica that is alone in its
        quorum are left out.

        Returns
        -------
        dict
            ``message_bytes`` (whole messages), ``dense_bytes`` (the tensors), their ``ratio``, and
            ``recycled_share``, the share of tensors sent as a coefficient alone.
        """
        total = self._totals
        return {
            "message_bytes": total["message_bytes"],
            "dense_bytes": total["dense_bytes"],
            "ratio": total["message_bytes"] / max(1, total["dense_bytes"]),
            "recycled_share": total["recycled"] / max(1, total["tensors"]),
        }

    def undo(self) -> None:
        """Take the last step back, which torchft has committed and the loop has not applied.

        Call it on all replicas, before the next step. A step with inf or nan needs no call.
        """
        self._spoiled = True

    # --- what torchft calls -------------------------------------------------------------------

    def configure(
        self,
        store_addr: str,
        replica_id: str,
        rank: int,
        world_size: int,
        quorum_id: int | None = None,
        *more: Any,
        **options: Any,
    ) -> None:
        """Connect the replicas of a new quorum, and drop what was left of a step."""
        # The manager's step is still this replica's own: it is healed after this.
        if self._met:
            self._note_commit()
        if self._waiting is not None:
            self._waiting.cancel()
        self._waiting, self._counts, self._met, self._failure = None, {}, False, None
        super().configure(store_addr, replica_id, rank, world_size, quorum_id, *more, **options)
        self._quorum = -1 if quorum_id is None else quorum_id
        self._transport = ReplicaTransport(self.parent, rank, world_size)

    def allreduce(self, tensors: list[Tensor], opts: Any) -> Any:
        """Begin a sum over the replicas, in place: compressed if it is one of gradients.

        Returns
        -------
        torch.distributed.Work
            Its ``wait()`` returns False if a compressed sum failed; `errored` returns the error.
        """
        if self._failure is not None:
            return SumWork(Batch.failed(self._failure, self._note_failure), tensors)
        operation = getattr(opts, "reduceOp", opts)
        if operation != dist.ReduceOp.SUM or not all(map(_is_compressed, tensors)):
            return super().allreduce(tensors, opts)
        try:
            self._check_usable()
        except Exception as error:
            logger.error("a compressed sum failed: %s", error)
            self._note_failure(error)
            return SumWork(Batch.failed(error, self._note_failure), tensors)
        if self._waiting is None:
            self._waiting = Batch(self._exchange, self._note_failure)
        self._waiting.tensors.extend(tensors)
        return SumWork(self._waiting, tensors)

    def errored(self) -> Exception | None:
        """End a step, and return the error of its sums or None.

        Raises
        ------
        Exception
            The error that would come back in each step.
        """
        if self._waiting is not None:
            self._waiting.run()
        failure, self._failure, self._counts = self._failure, None, {}
        self._check_usable()
        return failure or super().errored()

    def _note_failure(self, error: Exception) -> None:
        if self._failure is None:
            self._failure = error

    def _check_usable(self) -> None:
        if self._wrong is None:
            self._wrong = self._wrong_use()
        if self._wrong is not None:
            raise self._wrong

    def _wrong_use(self) -> Exception | None:
        if self._manager is None:
            return RuntimeError(
                "the CompressedProcessGroup has no manager: call group.attach(manager) after "
                "manager = Manager(pg=group, ...)"
            )
        # Fragments of equal shapes would share their residuals. torchft does not tell their number
        # in public; without this name, the argument is believed.
        names = getattr(self._manager, "_user_state_dicts", {})
        found = sum(name.startswith(FRAGMENT) for name in names)
        if found and found != self.fragments:
            return ValueError(
                f"DiLoCo has {found} fragments, and the CompressedProcessGroup was built for "
                f"{self.fragments}: give fragments={found}"
            )
        return None

    # --- a batch ------------------------------------------------------------------------------

    def _exchange(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors by their sums over the replicas."""
        self._waiting = None
        try:
            if not self._met:
                self._meet()
            self._begin_step()
            ends, description = self._ends(tensors)
            messages = self._gather(ends, description, tensors)
            sums, finite = ends.add_up(messages, self._transport.rank)
        except OutOfSyncError as error:
            raise StepFailed(
                f"the replicas do not hold the same look-back gradients ({error}): the next quorum "
                "drops them"
            ) from error
        except StepFailed:
            raise
        except Exception as error:
            self._wrong = error
            raise
        self._proven = True
        if not finite:
            self._spoiled = True
        with torch.no_grad():
            for tensor, total in zip(tensors, sums, strict=True):
                tensor.copy_(total)

    def _ends(self, tensors: Sequence[Tensor]) -> tuple[BatchEnds, str]:
        """Return the sender and the receiver of a batch, and the batch in words."""
        lines = [f"tensor of shape {tuple(t.shape)} and {t.dtype}" for t in tensors]
        layout = _digest("\n".join(lines))
        count = self._counts[layout] = self._counts.get(layout, 0) + 1
        fragment = self._manager.current_step() % self.fragments
        description = "\n".join(
            [
                f"compressor {self.compressor!r}",
                f"fragments {self.fragments}",
                f"fragment {fragment}",
                *lines,
                f"batch {count} of these tensors",
            ]
        )
        key = _digest(description)
        if key not in self._batches:
            seed = f"{self._replica_id} {self._transport.rank} {key.hex()}"
            number = int.from_bytes(_digest(seed)[:7], "little")
            self._batches[key] = BatchEnds(self.compressor, tensors, number)
        ends = self._batches[key]
        if ends not in self._sent:
            ends.begin_step()
            self._sent.append(ends)
        return ends, description

    def _gather(
        self, ends: BatchEnds, description: str, tensors: Sequence[Tensor]
    ) -> list[Tensor | None]:
        """Return the message of each replica, or None for one that does not take part."""
        own: Tensor | None = None
        failure: Exception | None = None
        if self._manager.is_participating():
            try:
                own = ends.encode(tensors, current_scale(self.loss_scale))
            except Exception as error:
                # The others wait for this replica.
                failure = error
        size = FAILED if failure else 0 if own is None else own.numel()
        digest = torch.frombuffer(bytearray(_digest(description)), dtype=torch.int64)
        heads = self._swap([*digest.tolist(), self._proven, size])
        if failure:
            raise failure
        for replica, head in enumerate(heads):
            if head[3] == FAILED:
                raise StepFailed(f"replica {replica} could not encode: see the error there")
        if any(head[:2] != heads[0][:2] for head in heads):
            self._raise_difference(description, [bool(head[2]) for head in heads])
        parts = [torch.empty(head[3], dtype=torch.uint8) for head in heads]
        if own is not None:
            parts[self._transport.rank] = own.cpu()
            self._count(own, ends.sender, tensors)
        self._transport.gather_unequal(parts)
        return [part.to(tensors[0].device) if part.numel() else None for part in parts]

    def _raise_difference(self, description: str, proven: Sequence[bool]) -> None:
        """Raise an error that names the first difference between two replicas.

        A replica that has exchanged before goes on where only others, which have not, differ.
        """
        texts = gather_texts(self._transport, description, CPU)
        older = [replica for replica, is_proven in enumerate(proven) if is_proven]
        first = older[0] if older else 0
        other = next(replica for replica, text in enumerate(texts) if text != texts[first])
        lines = itertools.zip_longest(
            texts[first].split("\n"), texts[other].split("\n"), fillvalue="nothing"
        )
        here, there = next((a, b) for a, b in lines if a != b)
        message = (
            "the replicas do not add up the same tensors in the same order with the same "
            f"compressor: replica {first} has {here} where replica {other} has {there}"
        )
        if self._proven and len({texts[replica] for replica in older}) == 1:
            raise StepFailed(f"{message}, which is new")
        raise ValueError(message)

    def _swap(self, numbers: Sequence[int]) -> list[list[int]]:
        """Return the numbers of each replica."""
        rows = self._transport.gather_equal(
            torch.tensor(numbers, dtype=torch.int64).view(torch.uint8)
        )
        found: list[list[int]] = rows.view(torch.int64).tolist()
        return found

    def _count(self, message: Tensor, sender: Sender, tensors: Sequence[Tensor]) -> None:
        if self._transport.size == 1:
            return
        total = self._totals
        total["message_bytes"] += message.numel()
        total["dense_bytes"] += sum(t.numel() * t.element_size() for t in tensors)
        total["recycled"] += sum(map(recycles, sender.sent.kinds))
        total["tensors"] += len(tensors)

    # --- steps that are not applied -------------------------------------------------------------

    def _note_commit(self) -> None:
        """Remember the attempted step if this replica has committed it."""
        if self._attempt is not None and self._manager is not None:
            quorum, step = self._attempt
            if self._manager.current_step() != step and self._committed.get(quorum, -1) < step:
                self._committed[quorum] = step
                for old in list(self._committed)[:-REMEMBERED]:
                    del self._committed[old]

    def _has_committed(self, attempt: Sequence[int]) -> bool:
        return self._committed.get(attempt[0], -1) >= attempt[1]

    def _meet(self) -> None:
        """Settle the last step with the replicas of a new quorum, and drop look-back gradients."""
        rank, size = self._transport.rank, self._transport.size
        asked = self._swap(self._attempt or (-1, 0))
        answers = self._swap([self._has_committed(attempt) for attempt in asked])
        self._settle(any(answers[replica][rank] for replica in range(size)))
        for ends in self._batches.values():
            ends.forget()
        self._met = True

    def _begin_step(self) -> None:
        step = self._quorum, self._manager.current_step()
        if self._attempt == step:
            return
        if self._attempt is not None:
            # Without a new quorum, the step before was committed by all.
            self._note_commit()
            self._settle(self._has_committed(self._attempt))
        self._attempt = step

    def _settle(self, applied: bool) -> None:
        """Keep or take back what was sent in the last step."""
        for ends in self._sent:
            if applied and not self._spoiled:
                ends.commit()
            else:
                ends.undo()
        self._sent, self._attempt, self._spoiled = [], None, False


def _is_compressed(tensor: Tensor) -> bool:
    """Return whether the sum of a tensor is compressed."""
    return tensor.dtype in FLOATS and tensor.layout == torch.strided and tensor.numel() > 1


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()
