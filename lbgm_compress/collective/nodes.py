"""Ranks in nodes: dense averages in a node, and compressed gradients between the nodes.

For each bucket, all ranks of a node do the same two exchanges in the same order: a sum of their
gradients, and a broadcast of the average from the first rank. Between the two, the first rank
exchanges the node's gradient with the first ranks of the other nodes. A bucket is done with when
`InNode.begin` returns. So all ranks go through the exchanges in one order, and none waits for
another that waits for it.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lbgm_compress._util.ends import check_unchanged
from lbgm_compress._util.groups import part_like
from lbgm_compress.collective.average import Average, DenseAverage, RanksDiffer, sum_dtype
from lbgm_compress.collective.ends import Ends
from lbgm_compress.collective.parameters import zeros_of
from lbgm_compress.collective.transport import (
    ProcessGroupTransport,
    Transport,
    done,
    gather_texts,
)
from lbgm_compress.compressor import check_gradient
from lbgm_compress.decoded import Decoded, Zero

__all__ = ["InNode", "Nodes", "check_node_group", "nodes_of"]

# How a step went between the nodes.
GOOD, SPOILED, DIFFERS, FAILED = range(4)
# The front of a node's sum: how many ranks failed, the sum of their ranks, and how many ask to
# compare states.
NOTICE = 3
# The front of a node's broadcast: how the step went, and the rank that failed, as int64.
HEAD = 16


@dataclass(frozen=True)
class Nodes:
    """The nodes of a job, as one rank sees them."""

    ranks: list[list[int]]
    """The ranks of each node in ascending order. The first one leads the node."""
    inside: Transport
    """Connects the ranks of this rank's node."""
    between: Transport
    """Connects the leaders. Each other rank has one of its own, which connects nothing."""


class InNode(Ends):
    """The ends of a rank in a node, whose leader exchanges the gradients of the node.

    Residuals and look-back gradients are the leaders' alone.

    Parameters
    ----------
    nodes
        The nodes.
    leading
        The ends with which leaders exchange gradients. Other ranks have them, too, without a state.
    likes
        Tensors with the names, shapes and dtypes of the gradients.
    others
        As those of `Ends`. The transport connects all ranks.
    """

    def __init__(
        self, nodes: Nodes, leading: Ends, likes: Mapping[str, Tensor], *others: Any
    ) -> None:
        super().__init__(*others)
        self.nodes = nodes.ranks
        # Held by a rank of another node than the first.
        self.witness = nodes.ranks[1][0] if len(nodes.ranks) > 1 else 0
        self._inside = nodes.inside
        self._leading = leading
        rank = self.transport.rank
        self._node = next(i for i, ranks in enumerate(self.nodes) if rank in ranks)
        self._leads = rank == self.nodes[self._node][0]
        self._likes = {name: zeros_of(like) for name, like in likes.items()}

    def begin(
        self,
        grads: Mapping[str, Tensor],
        shares: Sequence[float],
        loss_scale: float,
        differs: bool,
        fail: Callable[[BaseException], None],
        spoil: Callable[[], None],
    ) -> Average:
        grads = dict(sorted(grads.items()))
        of_nodes = [sum(shares[rank] for rank in ranks) for ranks in self.nodes]
        rank, error = self.transport.rank, None
        part = self._nothing(grads)
        try:
            if differs:
                part[2] = 1
            else:
                self._fill(part, grads, shares[rank] / of_nodes[self._node])
        except Exception as caught:
            # The other ranks wait for a sum.
            part = self._nothing(grads)
            part[0], part[1] = 1, rank
            error = caught
        answer = Answer([self._likes[name] for name in grads], self.device)
        average: Average | None = None
        if not self._leads:
            self._inside.all_reduce(part)
        else:
            spoiled: list[bool] = []
            try:
                node = self._sum(part, grads)
                average = self._leading.begin(
                    *(node[0], of_nodes, loss_scale, node[1], fail, lambda: spoiled.append(True))
                )
                answer.fill(average.finish())
                answer.head[0] = SPOILED if spoiled else GOOD
            except RanksDiffer:
                answer.head[0] = DIFFERS
            except Exception as caught:
                # The other ranks of the node wait for an average.
                error = error or self._explained(caught)
                answer.head[0] = FAILED
                answer.head[1] = caught.rank if isinstance(caught, RankFailed) else rank
        with contextlib.nullcontext() if error is None else contextlib.suppress(Exception):
            self._inside.broadcast(answer.data)
        if error is not None:
            raise error
        how, of_rank = answer.head.tolist()
        if how == FAILED:
            raise RankFailed(of_rank)
        if how == DIFFERS:
            raise RanksDiffer("a rank asks to compare states")
        if how == SPOILED:
            spoil()
        return NodeAverage(answer.average, grads, fail, average)

    def _nothing(self, grads: Mapping[str, Tensor]) -> Tensor:
        """Return zeros for a sum: a notice, and the gradients end to end."""
        likes = [self._likes[name] for name in grads]
        size = NOTICE + sum(like.numel() for like in likes)
        return torch.zeros(size, dtype=sum_dtype(widest(likes)), device=self.device)

    def _fill(self, part: Tensor, grads: Mapping[str, Tensor], share: float) -> None:
        """Write weighted gradients behind the notice."""
        for name, grad in grads.items():
            check_gradient(grad, name)
            like = self._likes[name]
            check_unchanged(name, grad, {"shape": like.shape, "dtype": str(like.dtype)})
        for place, grad in zip(self._split(part, grads), grads.values(), strict=True):
            place.copy_(grad.detach())
        part[NOTICE:].mul_(share)

    def _split(self, part: Tensor, grads: Mapping[str, Tensor]) -> list[Tensor]:
        likes = [self._likes[name] for name in grads]
        places = torch.split(part[NOTICE:], [like.numel() for like in likes])
        return [place.view(like.shape) for place, like in zip(places, likes, strict=True)]

    def _sum(self, part: Tensor, grads: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], bool]:
        """Return the average of a node, and whether one of its ranks asks to compare states."""
        try:
            total = self._inside.all_reduce(part)
            failed, ranks, differ = total[:NOTICE].tolist()
            if failed:
                # Of several, the sum alone is known.
                raise RankFailed(int(ranks) if failed == 1 else self.transport.rank, int(failed))
            pairs = zip(grads.items(), self._split(total, grads), strict=True)
            return {name: mean.to(grad.dtype) for (name, grad), mean in pairs}, bool(differ)
        except Exception:
            # The other leaders wait for this one.
            self._leading.announce_failure(grads)
            raise

    def _explained(self, error: Exception) -> Exception:
        """Return an error of the exchange between leaders, which count the nodes and not ranks."""
        if not isinstance(error, RuntimeError) or isinstance(error, RankFailed):
            return error
        explained = RuntimeError(
            f"between the nodes {self.nodes}, whose numbers stand for ranks here: {error}"
        )
        explained.__cause__ = error
        return explained

    def announce_failure(self, grads: Mapping[str, Tensor]) -> None:
        self._leading.announce_failure(grads)

    def begin_step(self) -> None:
        self._leading.begin_step()

    def undo(self) -> None:
        self._leading.undo()

    def commit(self) -> None:
        self._leading.commit()

    def reset(self) -> None:
        self._leading.reset()

    def drop_unshared(self) -> str:
        dropped = self._leading.drop_unshared() if self._leads else ""
        return f"{dropped} (nodes are counted as ranks)" if dropped else ""

    def state_dict(self) -> dict[str, Any]:
        return {**self._leading.state_dict(), "nodes": self.nodes}

    def held_of(self, rank: int) -> Mapping[Any, Any]:
        # What leaders hold is numbered by nodes.
        leaders = [ranks[0] for ranks in self.nodes]
        leads = self._leads and rank in leaders
        return self._leading.held_of(leaders.index(rank)) if leads else {}

    def part(self, sender: Any, held: Mapping[Any, Any], rank: int) -> dict[str, Any]:
        return self._leading.part(sender, held, self._node)

    def of_another(self, sender: Mapping[str, Any]) -> dict[str, Any]:
        return self._leading.of_another(sender)

    def check_sender(self, state: Mapping[str, Any]) -> None:
        self._leading.check_sender(state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if self._leads:
            self._leading.load_state_dict(state)


class RankFailed(RuntimeError):
    """Raised where another rank of the node failed before it could send."""

    def __init__(self, rank: int, count: int = 1) -> None:
        which = f"rank {rank}" if count == 1 else f"{count} ranks of the node of rank {rank}"
        super().__init__(f"{which} failed before it could send: see the error there")
        self.rank = rank


class Answer:
    """What a leader sends to the ranks of its node: a head, and averages end to end."""

    def __init__(self, likes: Sequence[Tensor], device: torch.device) -> None:
        # No average is rounded.
        dtype = widest(likes)
        size = sum(like.numel() for like in likes)
        self.data = torch.zeros(HEAD + size * dtype.itemsize, dtype=torch.uint8, device=device)
        self.head = self.data[:HEAD].view(torch.int64)
        self.average = self.data[HEAD:].view(dtype)

    def fill(self, averages: Mapping[str, Tensor]) -> None:
        """Write averages, in sorted order of their names."""
        start = 0
        for name in sorted(averages):
            flat = averages[name].reshape(-1)
            self.average[start : start + flat.numel()] = flat
            start += flat.numel()


def widest(tensors: Sequence[Tensor]) -> torch.dtype:
    """Return a dtype that holds the numbers of all tensors."""
    return functools.reduce(torch.promote_types, (tensor.dtype for tensor in tensors))


class NodeAverage(DenseAverage):
    """An average that a node's leader has sent to all ranks of the node."""

    def __init__(
        self,
        data: Tensor,
        grads: Mapping[str, Tensor],
        fail: Callable[[BaseException], None],
        of_leaders: Average | None,
    ) -> None:
        super().__init__(done(data), grads, fail)
        self._of_leaders = of_leaders

    def own(self) -> Mapping[str, Decoded]:
        """Return what other nodes decode of this node's gradients; zeros on other ranks."""
        if self._of_leaders is None:
            return {name: Zero(grad) for name, grad in self._grads.items()}
        return self._of_leaders.own()


def check_node_group(node_group: Any) -> None:
    """Raise `TypeError` unless this is None or what `torch.distributed` returns as a group."""
    outside = node_group == dist.GroupMember.NON_GROUP_MEMBER
    if node_group is not None and not outside and not isinstance(node_group, dist.ProcessGroup):
        raise TypeError(
            f"node_group must be a torch.distributed.ProcessGroup, not {node_group!r}: give the "
            "first result of torch.distributed.new_subgroups(ranks_of_a_node)"
        )


def nodes_of(
    transport: Transport,
    process_group: dist.ProcessGroup,
    node_group: Any,
    device: torch.device,
) -> Nodes | None:
    """Return the nodes of a job, or None if no rank has a group of its node.

    All ranks call it together.

    Parameters
    ----------
    transport
        Connects the ranks of `process_group`.
    process_group
        The group of all ranks.
    node_group
        The group of the ranks of this rank's node, or None.
    device
        A device whose tensors the transport takes.

    Raises
    ------
    ValueError
        On every rank, unless each rank of `process_group` is in the group of exactly one node.
    """
    members = dist.get_process_group_ranks(process_group)
    if node_group is None:
        text = "nothing"
    elif node_group == dist.GroupMember.NON_GROUP_MEMBER:
        text = "outside"
    else:
        text = repr(sorted(dist.get_process_group_ranks(node_group)))
    texts = dict(zip(members, gather_texts(transport, text, device), strict=True))
    if set(texts.values()) == {"nothing"}:
        return None
    mistake = _mistake(texts)
    if mistake:
        raise ValueError(
            f"{mistake}: give every rank the group of the ranks of its own node, such as the first "
            "result of torch.distributed.new_subgroups(ranks_of_a_node)"
        )
    numbers = {rank: number for number, rank in enumerate(members)}
    ranks = sorted({tuple(numbers[rank] for rank in _listed(text)) for text in texts.values()})
    global_ranks = [[members[rank] for rank in one] for one in ranks]
    leaders = [one[0] for one in global_ranks]
    # As all ranks are in as many groups, later ones of some ranks get the same names on them.
    alone = [[rank] for one in global_ranks for rank in one[1:]]
    # The ranks of a node wait while their leader does.
    inside = part_like(process_group, global_ranks, node_group, patience=2)
    between = part_like(process_group, [leaders, *alone], process_group)
    return Nodes(
        [list(one) for one in ranks], ProcessGroupTransport(inside), ProcessGroupTransport(between)
    )


def _listed(text: str) -> list[int]:
    return [int(number) for number in text.strip("[]").split(",")]


def _mistake(texts: Mapping[int, str]) -> str:
    """Return the first mistake in the groups of nodes, each as a text by rank, or nothing."""
    for rank, text in texts.items():
        if text == "nothing":
            return f"rank {rank} was given no node_group, and others were"
        if text == "outside":
            return f"rank {rank} is not in the node_group that it was given"
    for rank, text in texts.items():
        listed = _listed(text)
        outside = sorted(set(listed) - set(texts))
        if outside:
            return f"node_group of rank {rank} has ranks {outside}, which are not in process_group"
        for other in listed:
            if texts[other] != text:
                return (
                    f"node_group of rank {rank} has ranks {text}, and that of rank {other} has "
                    f"{texts[other]}"
                )
    return ""
