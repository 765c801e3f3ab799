"""Transports and averages, between real processes."""

from __future__ import annotations

import gc
import threading
import warnings
import weakref

import pytest
import torch
import torch.distributed as dist

from lbgm_compress import LBGM, ErrorFeedback, Identity, LookBackSubspace, Sender, TopK
from lbgm_compress.collective import (
    Averager,
    BackgroundAverager,
    ProcessGroupTransport,
    Transport,
    saved,
)
from lbgm_compress.collective.applied import Parameters
from lbgm_compress.collective.background import Worker
from lbgm_compress.collective.heads import body_length
from lbgm_compress.collective.transport import gather_texts
from tests.laws import assert_same_bits, saved_and_loaded
from tests.rank_threads import Ranks
from tests.ranks import run_ranks
from tests.transport_laws import check_transport


def transport_of(ranks):
    return ProcessGroupTransport(dist.new_group(list(range(ranks))))


class Counting(ProcessGroupTransport):
    """Counts collectives."""

    def __init__(self, group):
        super().__init__(group)
        self.equal = self.unequal = 0

    def gather_equal(self, data):
        self.equal += 1
        return super().gather_equal(data)

    def gather_unequal(self, parts):
        self.unequal += 1
        super().gather_unequal(parts)


def on_process_group(rank, world, function):
    return function(transport_of(world))


@pytest.mark.timeout(120)
@pytest.mark.parametrize("world", [1, 2, 3, 4, 6])
def test_process_groups_keep_the_laws_of_transports(world):
    check_transport(lambda law: run_ranks(on_process_group, world, world, law, timeout=100))


class Plain(Transport):
    """Ranks of a process group by what a new engine must write alone."""

    def __init__(self, transport):
        self.inner = transport
        self.rank, self.size = transport.rank, transport.size

    def gather_equal(self, data):
        return self.inner.gather_equal(data)


def on_plain_transport(rank, world, function):
    return function(Plain(transport_of(world)))


@pytest.mark.timeout(120)
def test_transport_that_gathers_equal_sizes_alone_keeps_the_laws():
    check_transport(lambda law: run_ranks(on_plain_transport, 3, 3, law, timeout=100))


def exchange_rounds(rank, world):
    transport = Counting(dist.new_group(list(range(world))))
    grads = {
        "w": torch.randn(300, generator=torch.Generator().manual_seed(rank)),
        "b": torch.ones(3),
    }
    sender = Sender(LBGM())
    counts = []
    for number in range(4):
        if number == 2 and rank == 1:
            grads["w"] = grads["w"].flip(0)
        messages = transport.begin_gather(sender.compress(grads), 26, body_length, "").result()
        counts.append((transport.equal, transport.unequal, [len(m) for m in messages]))
    return counts


def test_second_phase_comes_only_when_somebody_refreshes():
    header = 26
    for counts in run_ranks(exchange_rounds, 3, 3):
        assert [(equal, unequal) for equal, unequal, _ in counts] == [
            (1, 1),
            (2, 1),
            (3, 2),
            (4, 2),
        ]
        assert counts[1][2] == [header] * 3
        first, second, third = counts[2][2]
        assert (first, third) == (header, header)
        assert second > 1200


def average_rounds(rank, world, compressor):
    run = {}
    likes = {"w": torch.empty(40, 30), "h": torch.empty(50, dtype=torch.float16)}
    averager = Averager(compressor, likes, transport_of(world))
    generator = torch.Generator().manual_seed(rank)
    for number in range(6):
        grads = {
            name: torch.randn(like.shape, generator=generator).to(like.dtype)
            for name, like in likes.items()
        }
        into = {name: torch.zeros(like.shape) for name, like in likes.items()}
        averages = averager.begin(grads).finish(into)
        run[number] = grads, {name: average.clone() for name, average in averages.items()}
    return run


@pytest.mark.parametrize(
    "compressor",
    [Identity(), LBGM(delta=0.9), LBGM(TopK(0.1)), ErrorFeedback(LookBackSubspace(2))],
    ids=repr,
)
def test_averages_are_the_same_bits_on_every_rank(compressor):
    results = run_ranks(average_rounds, 4, 4, compressor)
    for number in range(6):
        for name in ("w", "h"):
            averages = [result[number][1][name] for result in results]
            assert all(torch.equal(average, averages[0]) for average in averages)
            if compressor == Identity():
                exact = torch.stack([result[number][0][name].double() for result in results])
                assert torch.allclose(averages[0].double(), exact.mean(0), atol=1e-6)


def fail_to_encode(rank):
    averager = Averager(LBGM(), {"w": torch.empty(4)}, transport_of(3))
    grads = {"w": torch.ones(5 if rank == 1 else 4)}
    averager.sender.compress({"w": torch.ones(4)})
    averager.average(grads)


def test_rank_that_cannot_encode_tells_the_others():
    first, second, third = run_ranks(fail_to_encode, 3, failures=True)
    assert "'w' has shape" in second.message
    assert (
        first.message == third.message == "rank 1 failed before it could send: see the error there"
    )


def texts(rank, world):
    return gather_texts(transport_of(world), "ü" * (rank * 300), torch.device("cpu"))


def test_texts_of_any_length_arrive_at_every_rank():
    assert run_ranks(texts, 3, 3) == [["", "ü" * 300, "ü" * 600]] * 3


def weighted(rank):
    averager = Averager(Identity(), {"w": torch.empty(3)}, transport_of(3), weight=1 + rank)
    return averager.average({"w": torch.full((3,), 6.0 * rank)})["w"]


def test_ranks_count_by_their_weights():
    for average in run_ranks(weighted, 3):
        assert torch.allclose(average, torch.full((3,), (0 * 1 + 6 * 2 + 12 * 3) / 6))


def refuse(*_, **__):
    raise AssertionError("gloo's threads hold the tensors of a collective after it is over")


def average_without_collectives(rank):
    averager = Averager(LBGM(TopK(0.1)), {"w": torch.empty(50)}, transport_of(3))
    for name in ("all_gather", "all_gather_into_tensor", "all_reduce", "all_to_all", "broadcast"):
        setattr(dist, name, refuse)
    for _ in range(3):
        averager.average({"w": torch.full((50,), 6.0)})
    return True


def test_ranks_on_the_cpu_leave_nothing_with_the_threads_of_the_engine():
    assert run_ranks(average_without_collectives, 3) == [True] * 3


class Mirror(Transport):
    """Ranks that all send what the first one sends."""

    def __init__(self, size=2):
        self.rank, self.size = 0, size
        self.sent = []

    def gather_equal(self, data):
        self.sent.append(data.numel())
        return data.expand(self.size, -1).clone()


def ones(like=4):
    return {"w": torch.ones(like)}


def test_average_has_the_dtypes_and_shapes_of_the_gradients():
    likes = {"w": torch.empty(3, 2), "half": torch.empty(4, dtype=torch.bfloat16)}
    averager = Averager(Identity(), likes, Mirror(), start_step=1)
    grads = {name: torch.full_like(like, 1.5) for name, like in likes.items()}
    for _ in range(2):
        assert_same_bits(averager.average(grads), grads)
    assert averager.step == 2
    assert averager.stats()["message_bytes"] > 0


def test_rank_that_joins_is_sent_everything_and_one_that_leaves_costs_nothing():
    averagers = []

    def steps(ranks):
        """Let all ranks make three steps, and return whether each of these was full."""
        for rank in range(len(averagers), ranks.size):
            averagers.append(Averager(LBGM(), {"w": torch.empty(400)}, ranks.transports[rank]))
        del averagers[ranks.size :]
        for averager, transport in zip(averagers, ranks.transports, strict=True):
            averager.transport = transport
        full = []
        for _ in range(3):
            before = averagers[0].stats()["message_bytes"]
            found = ranks.run(lambda rank: averagers[rank].average(ones(400)))
            assert_same_bits(found, [ones(400)] * ranks.size)
            full.append(averagers[0].stats()["message_bytes"] - before > 1600)
        assert all(averager.ranks_match for averager in averagers)
        assert averagers[0].share == 1 / ranks.size
        ranks.close()
        return full

    assert steps(Ranks(2)) == [True, False, False]
    with pytest.warns(UserWarning, match="1 tensor of rank 0, 1 tensor of rank 1, as after"):
        assert steps(Ranks(3)) == [True, False, False]
    assert steps(Ranks(2)) == [False, False, False]


def test_lines_that_must_match_are_compared():
    class Other(Mirror):
        """The second rank has another colour, and so another digest at the start of its row."""

        def gather_equal(self, data):
            rows = super().gather_equal(data)
            text = bytes(rows[1]).replace(b"colour 1", b"colour 2")
            rows[1] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
            rows[1][0] ^= len(self.sent) == 1
            return rows

    averager = Averager(LBGM(), {"w": torch.empty(4)}, Other(), must_match=["colour 1"])
    with pytest.raises(ValueError, match="rank 0 has colour 1 where rank 1 has colour 2"):
        averager.average(ones())


class Fails(Identity):
    """Cannot encode ones."""

    def encode(self, grad, state):
        if bool((grad == 1).all()):
            raise ArithmeticError("ones cannot be encoded")
        return super().encode(grad, state)


def background(compressor):
    averager = BackgroundAverager(compressor, {"w": torch.empty(4)}, Mirror())
    found = []

    def deliver(average):
        found.append(average if average is None else average.finish()["w"].tolist())

    def submit(value):
        averager.begin_step()
        averager.submit({"w": torch.full((4,), value)}, deliver)

    return averager, submit, found


def test_averages_of_a_step_are_delivered_in_order_before_its_end():
    averager, submit, found = background(Identity())
    for value in (1.0, 2.0, 3.0):
        submit(value)
    averager.end_step()
    assert found == [[1.0] * 4, [2.0] * 4, [3.0] * 4]
    assert averager.step == 1


def test_error_of_a_bucket_is_raised_at_the_end_of_the_step_and_the_rest_gets_none():
    averager, submit, found = background(Fails())
    for value in (0.0, 1.0, 2.0):
        submit(value)
    with pytest.raises(ArithmeticError, match="ones cannot be encoded"):
        averager.end_step()
    assert found == [[0.0] * 4, None, None]
    assert averager.step == 0
    with pytest.raises(RuntimeError, match="load a checkpoint"):
        submit(0.0)
    averager.load_state_dict(averager.state_dict())
    submit(0.0)
    averager.end_step()
    assert averager.step == 1


def test_abandoned_step_is_neither_counted_nor_an_error():
    averager, submit, found = background(Fails())
    submit(1.0)
    averager.abandon_step()
    assert found == [None]
    submit(0.0)
    averager.end_step()
    assert averager.step == 1


def test_error_while_delivering_is_the_step_s():
    averager, _, _ = background(Identity())

    def deliver(average):
        if average is not None:
            raise ArithmeticError("no place for it")

    averager.begin_step()
    averager.submit(ones(), deliver)
    with pytest.raises(ArithmeticError, match="no place for it"):
        averager.end_step()


def test_thread_is_over_when_its_owner_is_gone():
    class Owner:
        pass

    before, owner = set(threading.enumerate()), Owner()
    worker = Worker(owner)
    [thread] = set(threading.enumerate()) - before
    worker.run(lambda: None)
    del owner
    assert not thread.is_alive()


@pytest.mark.parametrize("later", [2, 3, 4])
@pytest.mark.parametrize(
    "compressor", [ErrorFeedback(LBGM(TopK(0.2))), LookBackSubspace(2), TopK(0.3)], ids=repr
)
def test_gathered_state_gives_every_rank_its_own_part(compressor, later, monkeypatch):
    monkeypatch.setattr(saved, "PIECE", 1000)

    def build(ranks):
        likes = {"w": torch.empty(20, 30), "b": torch.empty(30)}
        return [Averager(compressor, likes, transport) for transport in ranks.transports]

    def gradients(rank, step):
        numbers = torch.Generator().manual_seed(10 * step + rank)
        return {"w": torch.randn(20, 30, generator=numbers), "b": torch.ones(30)}

    first, second = Ranks(3), Ranks(later)
    before = build(first)
    for step in range(3):
        first.run(lambda rank, step=step: before[rank].average(gradients(rank, step)))
    gathered, *nothing = first.run(lambda rank: before[rank].gather_state_dict())
    assert nothing == [{}, {}]
    gathered = saved_and_loaded(gathered)

    after = build(second)
    for rank, averager in enumerate(after):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            averager.load_state_dict(gathered)
        if rank < 3:
            assert caught == []
            assert_same_bits(averager.sender.state_dict(), before[rank].sender.state_dict())
            held = before[rank].receiver.state_dict()["senders"]
            assert_same_bits(averager.receiver.state_dict()["senders"], held)
        else:
            assert "this is rank 3 of 4: its residual and its seed are not taken" in str(
                caught[0].message
            )
        assert averager.step == 3
    with warnings.catch_warnings():
        # A new rank holds nothing of the others.
        warnings.simplefilter("error" if later <= 3 else "ignore")
        results = second.run(lambda rank: after[rank].average(gradients(rank, 3)))
    for other in results[1:]:
        assert_same_bits(other, results[0])
    if later == 3:
        expected = first.run(lambda rank: before[rank].average(gradients(rank, 3)))
        assert_same_bits(results, expected)


def test_state_that_is_none_is_refused_and_changes_nothing():
    averager = with_residual()[0]
    before = averager.state_dict()
    for wrong in ({}, {"format": 1}, None, {**before, "format": 9}):
        with pytest.raises(ValueError, match=r"this is not a state|has format 9"):
            averager.load_state_dict(wrong)
    other = {**before, "rank": 1, "sender": {**before["sender"], "compressor": "LBGM()"}}
    with pytest.raises(ValueError, match=r"the state is that of LBGM\(\)"):
        averager.load_state_dict(other)
    assert_same_bits(averager.state_dict(), before)


class Alone(Transport):
    rank, size = 0, 1

    def gather_equal(self, data):
        return data.view(1, -1).clone()


def with_residual(steps=3):
    """Return an averager, a parameter, and the residual from before its last step."""
    parameter = torch.nn.Parameter(torch.zeros(8))
    averager = Averager(ErrorFeedback(TopK(0.2)), {"w": parameter}, Alone())
    for step in range(steps):
        before = residual_of(averager)
        parameter.grad = averager.average({"w": torch.arange(8.0) + step})["w"]
    return averager, parameter, before


def residual_of(averager):
    tensors = averager.sender.state_dict()["tensors"]
    return tensors["w"]["state"]["residual"] if tensors else None


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD([p], lr=0.1, foreach=False),
        lambda p: torch.optim.SGD([p], lr=0.1, fused=True),
        lambda p: torch.optim.AdamW([p], lr=0.1, fused=True),
        lambda p: torch.optim.AdamW([p], lr=0.1, foreach=True),
    ],
)
def test_step_that_an_optimizer_has_applied_is_not_undone(make):
    averager, parameter, before = with_residual()
    other = torch.nn.Parameter(torch.zeros(8))
    other.grad = torch.ones(8)
    make(other).step()
    after = residual_of(averager)
    make(parameter).step()
    averager.undo()
    assert_same_bits(residual_of(averager), after)
    assert not torch.equal(after, before)


def test_step_that_other_code_has_applied_is_not_undone():
    averager, parameter, _ = with_residual()
    after = residual_of(averager)
    with torch.no_grad():
        parameter -= parameter.grad
    averager.undo()
    assert_same_bits(residual_of(averager), after)


def test_step_that_another_optimizer_has_made_is_undone():
    averager, _, before = with_residual()
    other = torch.nn.Parameter(torch.zeros(8))
    other.grad = torch.ones(8)
    torch.optim.SGD([other], lr=0.1).step()
    averager.undo()
    assert_same_bits(residual_of(averager), before)
    averager.undo()
    assert_same_bits(residual_of(averager), before)


def test_applied_step_frees_what_undoing_it_would_need():
    kept, parameter, before = with_residual()
    old = weakref.ref(before)
    del before
    gc.collect()
    assert old() is not None
    torch.optim.SGD([parameter], lr=0.1).step()
    assert old() is None
    del kept


def test_averager_goes_with_its_last_reference():
    averager, parameter, _ = with_residual()
    gone = weakref.ref(averager)
    del averager
    gc.collect()
    assert gone() is None
    torch.optim.SGD([parameter], lr=0.1).step()


def test_undo_within_a_step_is_an_error():
    averager = background(ErrorFeedback(TopK(0.5)))[0]
    averager.begin_step()
    with pytest.raises(RuntimeError, match="within a step: call it after the backward pass"):
        averager.undo()
    averager.end_step()


def test_averagers_come_and_go_while_an_optimizer_of_another_thread_steps():
    class Watcher:
        def note(self):
            pass

    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    ended = threading.Event()

    def come_and_go():
        kept = []
        while not ended.is_set():
            watcher = Watcher()
            kept = [*kept[-5:], (watcher, Parameters(model.parameters(), watcher.note))]

    thread = threading.Thread(target=come_and_go)
    thread.start()
    try:
        for _ in range(1000):
            optimizer.step()
    finally:
        ended.set()
        thread.join()
