"""The model that all ranks of local training have in common, and its average steps."""

from __future__ import annotations

import hashlib
import io
import struct
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from lbgm_compress.collective.averager import Averager
from lbgm_compress.collective.local.warned import warn
from lbgm_compress.collective.saved import check_saved
from lbgm_compress.collective.transport import Transport
from lbgm_compress.decoded import Decoded

__all__ = ["CommonAverager", "CommonModel", "average_buffers", "digest_of", "share", "share_bytes"]

DIGEST_SIZE = 16
# Transports without sends of their own gather as many bytes from each rank.
PIECE = 1 << 24


class CommonModel:
    """Copies of a model's parameters at the last exchange, and the outer optimizer.

    Parameters
    ----------
    parameters
        The parameters of the model by name.
    optimizer
        The outer optimizer, of these parameters.

    Attributes
    ----------
    tensors : dict
        The copies by name.
    optimizer
        As given.
    """

    def __init__(self, parameters: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.tensors = {name: p.detach().clone() for name, p in parameters.items()}
        self._fetched: tuple[dict[str, Tensor], dict[str, Any]] | None = None

    def digest(self) -> bytes:
        """Return a hash of the copies and of the outer optimizer's state."""
        tensors: list[Any] = list(self.tensors.values())
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                state = self.optimizer.state.get(parameter, {})
                tensors += [state[key] for key in sorted(state)]
        return digest_of(tensors)

    def fetch(self, transport: Transport, source: int, device: torch.device, wanted: bool) -> None:
        """Get the copies and the outer optimizer's state of rank `source`, for `install`.

        All ranks call it together, also those for which they are not wanted.
        """
        own = transport.rank == source
        tensors = {n: t if own else torch.empty_like(t) for n, t in self.tensors.items()}
        share(transport, source, tensors.values())
        file = io.BytesIO()
        if own:
            torch.save(self.optimizer.state_dict(), file)
        data = share_bytes(transport, source, file.getvalue(), device)
        if wanted and not own:
            state = torch.load(io.BytesIO(data), map_location=device, weights_only=True)
            self._fetched = tensors, state

    def forget_fetched(self) -> None:
        """Leave out the next `install`."""
        self._fetched = None

    def install(self) -> bool:
        """Replace the copies and the state by those fetched; return whether there were any."""
        if self._fetched is None:
            return False
        tensors, state = self._fetched
        self._fetched = None
        self.optimizer.load_state_dict(state)
        for name, tensor in tensors.items():
            self.tensors[name].copy_(tensor)
        return True


class CommonAverager(Averager):
    """Averages the differences of the ranks' models from the common model.

    Two bytes of each rank go before the messages of an exchange. If a rank has loaded a state, is
    at another exchange or has called `finish`, all ranks are compared. Ranks whose common models
    differ get that of the rank with the most exchanges, and install it (`CommonModel.install`)
    before the next exchange. Parameters, attributes and errors are those of `Averager`, and
    `common` is the common model.

    Attributes
    ----------
    position : int
        Number of exchanges that have begun, skipped ones among them.
    """

    def __init__(self, *arguments: Any, common: CommonModel, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.common = common
        self.position = 0
        self._finishing = False
        # What the last comparison has found: whether all ranks have called `finish`, and whether
        # an exchange can follow.
        self._all_finish = self._agreed = False

    def start(self, tensors: Iterable[Tensor], parameters: Mapping[str, Tensor]) -> None:
        """Compare what the ranks were given, and have all begin as rank 0.

        Parameters
        ----------
        tensors
            Overwritten with those of rank 0.
        parameters
            Those of the tensors of which the common model has copies, by name.

        Raises
        ------
        ValueError
            On all ranks, if they were given different compressors, models or options.
        """
        super().verify_ranks_match()
        share(self.transport, 0, tensors)
        for name, parameter in parameters.items():
            self.common.tensors[name].copy_(parameter.detach())
        # An outer optimizer may have been used before.
        if len(set(self._gathered(self.common.digest()))) > 1:
            self.common.fetch(self.transport, 0, self._device, wanted=True)
            self.common.install()

    def exchange(
        self, differences: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], Mapping[str, Decoded]] | None:
        """Average differences over all ranks: one step.

        Returns
        -------
        averages, own
            The averages by name, and what this rank's message decodes to. None, on all ranks, if a
            rank has called `finish`, or if the ranks had different common models or positions.
        """
        self.check_usable()
        try:
            if self._to_compare():
                self.verify_ranks_match()
                if not self._agreed:
                    return None
            average = self.begin(differences)
            averages = average.finish()
        except BaseException as error:
            self.fail(error)
            raise
        self.end_step()
        return averages, average.own()

    def keep(self) -> None:
        """Keep the last step, which has been applied: what `undo` needs is freed."""
        self._commit()

    def finish(self) -> bool:
        """Wait until all ranks have called this, and compare them.

        Returns
        -------
        bool
            Whether another common model has been installed here.
        """
        self.check_usable()
        self._finishing, self._all_finish, replaced = True, False, False
        try:
            while not self._all_finish:
                self._to_compare()
                self.verify_ranks_match()
                replaced |= self.common.install()
        except BaseException as error:
            self.fail(error)
            raise
        finally:
            self._finishing = False
        return replaced

    def load(self, state: Mapping[str, Any]) -> bool:
        """Do `load_state_dict`, and return whether the state is that of another rank."""
        check_saved(state, type(self).__name__)
        rank, owner = self.transport.rank, state["rank"]
        if owner != rank:
            self._check_sender(state["sender"])
            state = {**state, "rank": rank, "sender": self._ends.of_another(state["sender"])}
        self.load_state_dict(state)
        if owner != rank:
            warn(
                f"the state is that of rank {owner} of {state['world_size']}, and this is rank "
                f"{rank} of {self.transport.size}, which goes on from the common model: have every "
                "rank save and load its own state, model and inner optimizer"
            )
        return bool(owner != rank)

    def _to_compare(self) -> bool:
        """Return whether a rank asks to be compared, or is at another exchange; on all ranks."""
        asks = self._differs or self._finishing
        rows = self._gathered(bytes([self.position % 256, asks]))
        return any(asked for _, asked in rows) or len({position for position, _ in rows}) > 1

    def _gathered(self, data: bytes) -> list[bytes]:
        """Return the bytes of all ranks, which are of one length, in rank order."""
        mine = torch.frombuffer(bytearray(data), dtype=torch.uint8).to(self._device)
        return [bytes(row) for row in self.transport.gather_equal(mine).tolist()]

    def verify_ranks_match(self) -> None:
        super().verify_ranks_match()
        mine = self.common.digest() + struct.pack("<q?", self.position, self._finishing)
        rows = self._gathered(mine)
        digests = [row[:DIGEST_SIZE] for row in rows]
        numbers = [struct.unpack("<q?", row[DIGEST_SIZE:]) for row in rows]
        positions = [position for position, _ in numbers]
        same = len(set(digests)) == 1
        self._all_finish = all(finishing for _, finishing in numbers)
        self._agreed = (
            same and len(set(positions)) == 1 and not any(finishing for _, finishing in numbers)
        )
        self.position = max(positions)
        if same:
            return
        # Of those with the most exchanges, a rank of the largest party.
        ranks = range(self.transport.size)
        source = max(ranks, key=lambda r: (positions[r], digests.count(digests[r]), -r))
        differing = [rank for rank, of in enumerate(digests) if of != digests[source]]
        wanted = self.transport.rank in differing
        self.common.fetch(self.transport, source, self._device, wanted)
        warn(
            f"ranks {differing} have other common models than rank {source}, as after loading "
            "states of different steps, or a rank has loaded no state: they go on from that of "
            f"rank {source}"
        )


def digest_of(values: Iterable[Any]) -> bytes:
    """Return a hash of tensors, bit for bit, and of other values."""
    hashed = hashlib.blake2b(digest_size=DIGEST_SIZE)
    for value in values:
        if isinstance(value, Tensor):
            flat = value.detach().contiguous().reshape(-1)
            hashed.update(flat.view(torch.uint8).cpu().numpy().data)
        else:
            hashed.update(repr(value).encode())
    return hashed.digest()


def average_buffers(transport: Transport, buffers: Iterable[Tensor], weight: float) -> None:
    """Replace buffers by their means over all ranks, of which this one has the share `weight`.

    Those that are not of floating point become those of rank 0. All ranks call it together.
    """
    for buffer in buffers:
        if not buffer.is_floating_point():
            share(transport, 0, [buffer])
        elif buffer.numel():
            # In float64, so that a constant is its own mean.
            flat = buffer.detach().reshape(-1).to(torch.float64) * weight
            # By sends, since a collective of gloo just before a program ends may abort it: see
            # ProcessGroupTransport._swap.
            buffer.detach().copy_(Transport.all_reduce(transport, flat).view(buffer.shape))


def share(transport: Transport, source: int, tensors: Iterable[Tensor]) -> None:
    """Overwrite tensors, on all ranks, with those of rank `source`; all ranks call it together."""
    for tensor in tensors:
        if not tensor.numel() or transport.size == 1:
            continue
        data = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        for piece in torch.split(data, PIECE):
            parts = [piece[:0]] * transport.size
            parts[source] = piece
            transport.gather_unequal(parts)
        if transport.rank != source:
            tensor.detach().copy_(data.view(tensor.dtype).view(tensor.shape))


def share_bytes(transport: Transport, source: int, data: bytes, device: torch.device) -> bytes:
    """Return the data of rank `source` on all ranks, which call it together."""
    length = torch.tensor([len(data)], device=device)
    share(transport, source, [length])
    shared = torch.zeros(int(length), dtype=torch.uint8, device=device)
    if transport.rank == source:
        shared.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
    share(transport, source, [shared])
    return shared.cpu().numpy().tobytes()
