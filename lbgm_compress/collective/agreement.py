"""Agreement of the ranks on the look-back gradients that their messages may use."""

from __future__ import annotations

import torch

from lbgm_compress.collective.transport import Transport
from lbgm_compress.endpoints import Receiver, Sender

__all__ = ["drop_unshared"]


def drop_unshared(
    transport: Transport, sender: Sender, receiver: Receiver, device: torch.device
) -> dict[int, int]:
    """Drop, on all ranks alike, look-back gradients that not all ranks hold.

    All ranks call it together. Afterwards, what the sender of each rank looks back at is what the
    receivers of all others hold of it.

    Parameters
    ----------
    transport
        Connects the ranks.
    sender, receiver
        The ends of this rank. The receiver knows a sender by its rank.
    device
        The device of what is exchanged.

    Returns
    -------
    dict
        For each rank of which something was dropped, the number of its tensors.
    """
    rank, size = transport.rank, transport.size
    names = receiver.names()
    for other in receiver.senders():
        if other == rank or other not in range(size):
            receiver.drop(other)
    used = transport.gather_equal(sender.digest(names).to(device)).cpu().view(size, -1, 8)
    differs = torch.zeros(size, len(names), dtype=torch.uint8)
    for other in range(size):
        if other != rank:
            held = receiver.digest(other).view(-1, 8)
            differs[other] = (held != used[other]).any(dim=1)
    found = transport.gather_equal(differs.view(-1).to(device)).cpu()
    unshared = found.view(size, size, len(names)).any(dim=0)
    dropped = {}
    for other in range(size):
        which = [name for name, drop in zip(names, unshared[other].tolist(), strict=True) if drop]
        if which:
            dropped[other] = len(which)
            if other == rank:
                sender.reset(which)
            else:
                receiver.drop(other, which)
    return dropped
