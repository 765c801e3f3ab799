"""Nodes whose first ranks alone exchange compressed gradients, in real processes on gloo."""

from __future__ import annotations

import copy
import os
import warnings

import pytest
import torch
import torch.distributed as dist

from lbgm_compress import (
    LBGM,
    ErrorFeedback,
    Identity,
    LookBackSubspace,
    SharedLBGM,
    SharedSubspace,
    TopK,
)
from lbgm_compress.adapters.ddp import CompressionState, compress, compression_hook
from tests.invariant import check_invariant, keeps_invariant
from tests.laws import assert_same_bits, saved_and_loaded
from tests.loops import LOOPS, check_loops
from tests.ranks import Failed, run_ranks
from tests.test_ddp import build, train
from tests.test_loops import DataParallel
from tests.training import Net, assert_replicas_agree, parameters

EQUAL = [[0, 1], [2, 3]]
UNEQUAL = [[0], [1, 2], [3, 4, 5]]
LAYOUTS = pytest.mark.parametrize("nodes", [EQUAL, UNEQUAL], ids=["2 x 2", "1 + 2 + 3"])
COMPRESSORS = [
    ErrorFeedback(SharedSubspace(4)),
    SharedLBGM(),
    LBGM(TopK(0.1)),
    ErrorFeedback(LookBackSubspace(4, values="int4")),
]
# Sums in float16 lose what their additions round away.
EXACT = [ErrorFeedback(SharedSubspace(4, values="float32")), *COMPRESSORS[1:]]


def world_of(nodes):
    return sum(map(len, nodes))


def node_of(nodes, rank):
    return next(ranks for ranks in nodes if rank in ranks)


def group_of(nodes):
    """Return the process group of this rank's node."""
    return dist.new_subgroups_by_enumeration(nodes)[0]


# --- averages ------------------------------------------------------------------------------------


def against_plain_ddp(rank, nodes):
    group, results = group_of(nodes), []
    for dtype, options in (
        (torch.float32, {}),
        (torch.float32, {"skip": True, "find_unused_parameters": True}),
        (torch.bfloat16, {}),
    ):
        plain = build(dtype, **options)
        train(plain, rank, 10, dtype=dtype)
        model = build(dtype, **options)
        state = compress(model, Identity(), node_group=group, start_step=2)
        train(model, rank, 10, dtype=dtype)
        results.append((parameters(plain), parameters(model), state.stats()))
    return results


@pytest.mark.timeout(120)
@LAYOUTS
def test_without_loss_training_equals_plain_ddp(nodes):
    results = run_ranks(against_plain_ddp, world_of(nodes), nodes, timeout=100)
    for i in range(len(results[0])):
        assert_replicas_agree([result[i][1] for result in results])
    for rank, of_rank in enumerate(results):
        for plain, compressed, stats in of_rank:
            for name, expected in plain.items():
                half = expected.dtype == torch.bfloat16
                close = {"rtol": 0.05, "atol": 0.02} if half else {"rtol": 1e-4, "atol": 1e-6}
                assert torch.allclose(compressed[name], expected, **close)
            if rank == node_of(nodes, rank)[0]:
                assert 1 < stats["ratio"] < 1.1
            else:
                assert stats["message_bytes"] == 0


def with_and_without_nodes(rank):
    group, results = group_of([[0], [1], [2]]), []
    for compressor in (LBGM(ErrorFeedback(TopK(0.1)), delta=0.5), ErrorFeedback(SharedSubspace(2))):
        for node_group in (None, group):
            model = build()
            state = compress(model, compressor, weight=1.0 + rank, node_group=node_group)
            train(model, rank, 8)
            results.append((parameters(model), state.stats()["message_bytes"]))
    return results


@pytest.mark.timeout(120)
def test_nodes_of_one_rank_each_give_the_bits_of_no_nodes():
    for first, second, third, fourth in run_ranks(with_and_without_nodes, 3):
        assert_same_bits(second[0], first[0])
        assert_same_bits(fourth[0], third[0])
        assert (second[1], fourth[1]) == (first[1], third[1])


def many_buckets(rank, nodes, compressors):
    """Train for 30 steps, and do the last ones once more as a new process does."""
    # With other buckets after the first step, sums of three ranks would be rounded in other orders.
    fixed = {"find_unused_parameters": True}
    group, results = group_of(nodes), []
    for compressor in compressors:
        model = build(**fixed)
        options = {"weight": 1.0 + rank, "node_group": group}
        state = compress(model, compressor, **options)
        optimizer = train(model, rank, 25)
        saved = saved_and_loaded(
            {
                "model": model.module.state_dict(),
                "optimizer": optimizer.state_dict(),
                "compression": copy.deepcopy(state.state_dict()),
            }
        )
        train(model, rank, 5, optimizer, start=25)
        other = build(**fixed)
        other.module.load_state_dict(saved["model"])
        again = torch.optim.SGD(other.parameters(), lr=0.05, momentum=0.9)
        again.load_state_dict(saved["optimizer"])
        resumed = compress(other, compressor, **options)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            resumed.load_state_dict(saved["compression"])
            train(other, rank, 5, again, start=25)
        assert_same_bits(parameters(other), parameters(model))
        held = saved["compression"]
        results.append((parameters(model), state.stats()["ratio"], len(held["sender"]["tensors"])))
    return results


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("nodes", "compressors"),
    [(EQUAL, COMPRESSORS), (UNEQUAL, COMPRESSORS[::2])],
    ids=["2 x 2", "1 + 2 + 3"],
)
def test_replicas_are_bit_identical_and_resume_bit_for_bit_with_many_buckets(nodes, compressors):
    results = run_ranks(many_buckets, world_of(nodes), nodes, compressors, timeout=100)
    for i, compressor in enumerate(compressors):
        assert_replicas_agree([result[i][0] for result in results])
        for rank, result in enumerate(results):
            _, ratio, tensors = result[i]
            if rank == node_of(nodes, rank)[0]:
                assert 0 < ratio < 1.01, compressor
                assert tensors == 20
            else:
                # The memory of compression is the first rank's.
                assert (ratio, tensors) == (0, 0)


# --- loops ---------------------------------------------------------------------------------------


class InNodes(DataParallel):
    def __init__(self, rank, compressor, nodes, **options):
        self.ranks = node_of(nodes, rank)
        super().__init__(rank, compressor, **options)

    def residuals(self):
        # In a check with the shares of ranks, since those of a node belong to all its ranks.
        share = self.options.get("weight", 1.0)
        of_node = sum(map(weight, self.ranks)) if "weight" in self.options else len(self.ranks)
        return {name: kept * (of_node / share) for name, kept in super().residuals().items()}


def weight(rank):
    return 1.0 + rank % 3


def all_loops(rank, compressor, nodes, loops):
    group = group_of(nodes)

    def make(**options):
        return InNodes(rank, compressor, nodes, node_group=group, **options)

    return {loop.__name__: loop(make) for loop in loops}


@pytest.mark.timeout(180)
@pytest.mark.parametrize(
    ("compressor", "nodes", "loops"),
    [(EXACT[0], EQUAL, LOOPS), (EXACT[3], EQUAL, LOOPS), (EXACT[3], UNEQUAL, LOOPS[-4:])],
    ids=["sums, 2 x 2", "messages, 2 x 2", "messages, 1 + 2 + 3"],
)
def test_loop_loses_and_doubles_nothing(compressor, nodes, loops):
    """With inf, undone steps, states that one rank alone loads, frozen and unused parameters."""
    arguments = compressor, nodes, loops
    check_loops(run_ranks(all_loops, world_of(nodes), *arguments, timeout=150), compressor)


def weighted_loop(rank, nodes):
    group, results = group_of(nodes), []
    for compressor in EXACT:
        loop = InNodes(rank, compressor, nodes, node_group=group, weight=weight(rank))
        skipped = []
        for step in range(30):
            grads = loop.gradients(step)
            if step == 12 and rank == nodes[-1][-1]:
                grads["vector"][3] = float("inf")
            loop.backward(grads)
            if not loop.finite():
                skipped.append(step)
            elif step in (7, 20):
                loop.state.undo()
            else:
                loop.apply(grads)
        results.append((*loop.result(), skipped))
    return results


@pytest.mark.timeout(120)
@LAYOUTS
def test_unequal_weights_lose_and_double_nothing(nodes):
    world = world_of(nodes)
    results = run_ranks(weighted_loop, world, nodes, timeout=100)
    total = sum(map(weight, range(world)))
    shares = [weight(rank) / total for rank in range(world)]
    for i, compressor in enumerate(EXACT):
        applied, true, kept, skipped = zip(*(result[i] for result in results), strict=True)
        assert set(map(tuple, skipped)) == {(12,)}
        for other in applied[1:]:
            assert_same_bits(other, applied[0])
        if keeps_invariant(compressor):
            assert any(kept)
            check_invariant(applied[0], true, kept, shares, tolerance=1e-4)


# --- states --------------------------------------------------------------------------------------


def loaded_into_other_nodes(rank, compressor):
    groups = {"2 x 2": group_of(EQUAL), "1 + 3": group_of([[0], [1, 2, 3]]), "none": None}
    model = build()
    state = compress(model, compressor, node_group=groups["2 x 2"])
    train(model, rank, 4)
    own, everybody = state.state_dict(), [state.gather_state_dict()]
    dist.broadcast_object_list(everybody)
    results = []
    for saved in (own, everybody[0]):
        for group in groups.values():
            other = build()
            resumed = compress(other, compressor, node_group=group)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                resumed.load_state_dict(saved)
            messages = [str(w.message) for w in caught]
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                train(other, rank, 3)
            results.append((messages, parameters(other)))
    return results


@pytest.mark.timeout(120)
@pytest.mark.parametrize("compressor", [COMPRESSORS[0], LBGM(ErrorFeedback(TopK(0.1)))], ids=repr)
def test_states_of_other_nodes_are_loaded_without_their_residuals(compressor):
    results = run_ranks(loaded_into_other_nodes, 4, compressor)
    for i in range(6):
        assert_replicas_agree([result[i][1] for result in results])
        for rank, result in enumerate(results):
            if i % 3 == 0:
                assert result[i][0] == []
            else:
                assert f"rank {rank} of 4 in nodes [[0, 1], [2, 3]], and" in result[i][0][0]


def bound_late(rank):
    model = build()
    state = CompressionState(LBGM(TopK(0.1)), node_group=group_of(EQUAL))
    model.register_comm_hook(state, compression_hook)
    train(model, rank, 3)
    return parameters(model), state.stats()["message_bytes"] > 0


def test_first_backward_pass_binds_a_state_with_nodes():
    results = run_ranks(bound_late, 4)
    assert_replicas_agree([result[0] for result in results])
    assert [result[1] for result in results] == [True, False, True, False]


# --- failures ------------------------------------------------------------------------------------


class BrokenMessages(Identity):
    """Fails at the second gradient of rank 2."""

    def encode(self, grad, state):
        if int(state.get("count", 0)) == 1 and dist.get_rank() == 2:
            raise ArithmeticError("the second gradient cannot be encoded")
        return super().encode(grad, {"count": int(state.get("count", 0)) + 1})


def failing(rank, compressor, on_rank):
    model = build()
    state = compress(model, compressor, node_group=group_of(EQUAL))
    optimizer = train(model, rank, 1)
    begin = state.begin
    if rank == on_rank:
        state.begin = lambda grads: begin({name: torch.zeros(7) for name in grads})
    errors = []
    for again in (lambda: train(model, rank, 1, optimizer, start=1), lambda: state._hook(None)):
        try:
            again()
        except Exception as error:
            errors.append(str(error))
    return errors


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("compressor", "on_rank"),
    [(BrokenMessages(), None), (COMPRESSORS[0], 3), (COMPRESSORS[2], 3), (COMPRESSORS[2], 2)],
    ids=repr,
)
def test_error_on_one_rank_reaches_all_ranks_of_all_nodes(compressor, on_rank):
    failed = 2 if on_rank is None else on_rank
    told = "rank {} failed before it could send: see the error there"
    between = f"between the nodes {EQUAL}, whose numbers stand for ranks here: "
    reason = "the second gradient" if on_rank is None else "the gradient 'module.layers."
    results = run_ranks(failing, 4, compressor, on_rank)
    assert [len(errors) for errors in results] == [2] * 4
    for rank, (error, later) in enumerate(results):
        if rank == failed:
            assert error.startswith(reason)
        elif rank == 0:
            assert error == between + told.format(1)
        else:
            assert error == told.format(0 if rank == 1 else failed)
        assert "load a checkpoint" in later


def dying(rank, victim):
    model = build()
    compress(model, COMPRESSORS[0], node_group=group_of(EQUAL))
    optimizer = train(model, rank, 2)
    if rank == victim:
        os._exit(1)
    train(model, rank, 1, optimizer, start=2)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("victim", [2, 3])
def test_when_a_rank_dies_the_others_fail_within_the_time_out(victim):
    results = run_ranks(dying, 4, victim, failures=True, timeout=40, group_timeout=5)
    for rank, failed in enumerate(results):
        if rank == victim:
            assert failed is None
        else:
            assert isinstance(failed, Failed)
            assert failed.kind in ("RuntimeError", "RankFailed")


def wrong_groups(rank):
    wide, pairs = dist.new_group([0, 1, 2, 3]), group_of(EQUAL)
    part, first = group_of([[0, 1, 2], [3]]), dist.new_group([0, 1])
    halves = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    model = Net()
    found = []
    for node_group, process_group in (
        (None if rank == 3 else pairs, None),
        (first, None),
        (part if rank in (0, 2) else wide, None),
        (wide, halves[rank // 2]),
        (4, None),
    ):
        try:
            CompressionState(
                COMPRESSORS[0], model.named_parameters(), process_group, node_group=node_group
            )
        except (TypeError, ValueError) as error:
            found.append(str(error))
    return found


def test_wrong_groups_of_nodes_are_errors_on_every_rank():
    for rank, found in enumerate(run_ranks(wrong_groups, 4)):
        expected = [
            "rank 3 was given no node_group, and others were",
            "rank 2 is not in the node_group that it was given",
            "node_group of rank 0 has ranks [0, 1, 2], and that of rank 1 has [0, 1, 2, 3]",
            f"node_group of rank {rank // 2 * 2} has ranks {[[2, 3], [0, 1]][rank // 2]}, which",
            "must be a torch.distributed.ProcessGroup, not 4",
        ]
        assert len(found) == len(expected)
        for message, part in zip(found, expected, strict=True):
            assert part in message
            assert "torch.distributed.new_subgroups(ranks_of_a_node)" in message
