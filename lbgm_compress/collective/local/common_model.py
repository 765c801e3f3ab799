"""The model that all ranks of local training have in common, and its average steps."""

from __future__ import annotations

import hashlib
import io
import struct
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from lbgm_compress.collective.averager import Averager
from lbgm_compress.collective.transport import Transport
from lbgm_compress.decoded import Decoded

__all__ = ["CommonAverager", "CommonModel", "share", "share_bytes"]

DIGEST_SIZE = 16


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

    def digest(self) -> bytes:
        """Return a hash of the copies and of the outer optimizer's state."""
        hashed = hashlib.blake2b(digest_size=DIGEST_SIZE)
        tensors: list[Any] = list(self.tensors.values())
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                state = self.optimizer.state.get(parameter, {})
                tensors += [state[key] for key in sorted(state)]
        for tensor in tensors:
            if isinstance(tensor, Tensor):
                flat = tensor.detach().contiguous().reshape(-1)
                hashed.update(flat.view(torch.uint8).cpu().numpy().data)
            else:
                hashed.update(repr(tensor).encode())
        return hashed.digest()

    def take(self, transport: Transport, source: int, device: torch.device) -> None:
        """Replace the copies and the outer optimizer's state by those of rank `source`."""
        share(transport, source, self.tensors.values())
        file = io.BytesIO()
        if transport.rank == source:
            torch.save(self.optimizer.state_dict(), file)
        data = share_bytes(transport, source, file.getvalue(), device)
        if transport.rank != source:
            found = torch.load(io.BytesIO(data), map_location=device, weights_only=True)
            self.optimizer.load_state_dict(found)


class CommonAverager(Averager):
    """Averages the differences of the ranks' models from the common model.

    Two bytes of each rank go before the messages of an exchange. If a rank has loaded a state, is
    at another exchange or has called `finish`, all ranks are compared. Ranks whose common models
    differ all take that of the rank with the most exchanges. Parameters, attributes and errors are
    those of `Averager`, and `common` is the common model.

    Attributes
    ----------
    position : int
        Number of exchanges that have begun, skipped ones among them.
    replaced : bool
        Whether this rank's common model has been replaced since this was last set to False.
    """

    def __init__(self, *arguments: Any, common: CommonModel, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.common = common
        self.position = 0
        self.replaced = False
        self._finishing = False
        # What the last comparison has found: whether all ranks have called `finish`, and whether
        # an exchange can follow.
        self._all_finish = self._agreed = False

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
        if self._to_compare():
            self.verify_ranks_match()
            if not self._agreed:
                return None
        average = self.begin(differences)
        averages = average.finish()
        self.end_step()
        return averages, average.own()

    def keep(self) -> None:
        """Keep the last step, which has been applied: what `undo` needs is freed."""
        self._commit()

    def finish(self) -> None:
        """Wait until all ranks have called this, and compare them."""
        self.check_usable()
        self._finishing, self._all_finish = True, False
        try:
            while not self._all_finish:
                self._to_compare()
                self.verify_ranks_match()
        finally:
            self._finishing = False

    def _to_compare(self) -> bool:
        """Return whether a rank asks to be compared, or is at another exchange; on all ranks."""
        asks = self._differs or self._finishing or not self.ranks_match
        mine = torch.tensor([self.position % 256, asks], dtype=torch.uint8, device=self._device)
        try:
            rows = self.transport.gather_equal(mine).tolist()
        except BaseException as error:
            self.fail(error)
            raise
        return any(asked for _, asked in rows) or len({position for position, _ in rows}) > 1

    def verify_ranks_match(self) -> None:
        super().verify_ranks_match()
        device = self._device
        mine = self.common.digest() + struct.pack("<q?", self.position, self._finishing)
        data = torch.frombuffer(bytearray(mine), dtype=torch.uint8).to(device)
        rows = [bytes(row) for row in self.transport.gather_equal(data).tolist()]
        numbers = [struct.unpack("<q?", row[DIGEST_SIZE:]) for row in rows]
        positions = [position for position, _ in numbers]
        digests = [row[:DIGEST_SIZE] for row in rows]
        same = len(set(digests)) == 1
        self._all_finish = all(finishing for _, finishing in numbers)
        self._agreed = (
            same and len(set(positions)) == 1 and not any(finishing for _, finishing in numbers)
        )
        self.position = max(positions)
        if not same:
            source = positions.index(max(positions))
            self.common.take(self.transport, source, device)
            self.replaced |= digests[self.transport.rank] != digests[source]
            differing = [rank for rank, of in enumerate(digests) if of != digests[source]]
            warnings.warn(
                f"ranks {differing} have other common models than rank {source}, as after loading "
                f"states of different steps: they go on from that of rank {source}",
                stacklevel=2,
            )


def share(transport: Transport, source: int, tensors: Iterable[Tensor]) -> None:
    """Overwrite tensors, on all ranks, with those of rank `source`; all ranks call it together."""
    for tensor in tensors:
        if not tensor.numel():
            continue
        data = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        parts = [data[:0]] * transport.size
        parts[source] = data
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
