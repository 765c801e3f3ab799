"""The process group for torchft: with a real Lighthouse and replicas that die and come back."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import os
import pickle
import runpy
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn

from lbgm_compress import LBGM, ErrorFeedback, Identity, SignSGD, TopK
from tests.compressors import COMPRESSORS
from tests.laws import assert_same_bits
from tests.ranks import CONTEXT, Failed
from tests.test_docs import blocks, changed, guide, side
from tests.training import assert_replicas_agree, data, parameters

needs_torchft = pytest.mark.skipif(
    importlib.util.find_spec("torchft") is None,
    reason="torchft is not installed: pip install torchft",
)
pytestmark = [
    pytest.mark.torchft,
    pytest.mark.xdist_group("torchft"),
    pytest.mark.timeout(100),
]
T = 0
SECONDS = timedelta(seconds=10)


def test_without_torchft_its_adapter_says_what_to_install():
    code = (
        "import sys; sys.modules['torchft'] = None\n"
        "try:\n    import lbgm_compress.adapters.torchft\n"
        "except ImportError as error:\n    print(error)\n"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert "pip install 'lbgm_compress[torchft]'" in found.stdout


# --- replicas -------------------------------------------------------------------------------------


@contextlib.contextmanager
def lighthouse(least: int) -> Iterator[str]:
    """Run a Lighthouse that waits for `least` replicas, and yield its address."""
    from torchft.coordination import LighthouseServer

    server = LighthouseServer(
        bind="[::]:0",
        min_replicas=least,
        join_timeout_ms=100,
        quorum_tick_ms=10,
        heartbeat_timeout_ms=1000,
    )
    try:
        yield server.address()
    finally:
        server.shutdown()


def environment(address: str) -> dict[str, str]:
    return {
        "TORCHFT_LIGHTHOUSE": address,
        "GLOO_SOCKET_IFNAME": "lo",
        "no_proxy": "*",
        "RUST_LOG": "off",
    }


class Replicas:
    """Replicas, each a process that runs a function once."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._running: dict[int, tuple[Any, Any]] = {}

    def start(self, replica: int, function: Callable[..., Any], *arguments: Any) -> None:
        reader, writer = CONTEXT.Pipe(duplex=False)
        process = CONTEXT.Process(
            target=_main, args=(replica, self._address, writer, function, arguments), daemon=True
        )
        process.start()
        writer.close()
        self._running[replica] = process, reader

    def result(self, replica: int, timeout: float = 60) -> Any:
        """Return the result of a replica, or None if it was killed."""
        process, reader = self._running.pop(replica)
        try:
            assert reader.poll(timeout), f"replica {replica} took more than {timeout} s"
            return pickle.loads(reader.recv_bytes())
        except EOFError:
            return None
        finally:
            process.kill()
            process.join()

    def end(self) -> None:
        for process, _ in self._running.values():
            process.kill()
            process.join()


def _main(
    replica: int, address: str, pipe: Any, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    os.environ |= {"TORCHFT_LIGHTHOUSE": address, "GLOO_SOCKET_IFNAME": "lo", "no_proxy": "*"}
    try:
        result = function(replica, *arguments)
    except Exception as error:
        result = Failed(type(error).__name__, str(error), traceback.format_exc())
    pipe.send_bytes(pickle.dumps(result))
    # Without the end of the interpreter, which waits for threads of torchft's servers.
    pipe.close()
    os._exit(0)


def run_replicas(
    function: Callable[..., Any], *arguments: Any, failures: bool = False, world: int = 2
) -> list[Any]:
    """Run a function on replicas that begin together, and return the results."""
    with lighthouse(world) as address:
        replicas = Replicas(address)
        try:
            for replica in range(world):
                replicas.start(replica, function, *arguments)
            results = [replicas.result(replica) for replica in range(world)]
        finally:
            replicas.end()
    for replica, result in enumerate(results):
        assert result is not None
        assert failures or not isinstance(result, Failed), f"replica {replica}: {result!r}"
    return results


class Training:
    """A model, its optimizer and torchft's manager."""

    def __init__(self, replica: int, compressor: Any, asynchronous: bool, **options: Any) -> None:
        from torchft import Manager
        from torchft.process_group import ProcessGroupGloo

        from lbgm_compress.adapters.torchft import CompressedProcessGroup

        torch.manual_seed(replica)  # torchft gives all replicas the first one's parameters
        self.model = nn.Sequential(*(nn.Linear(32, 32) for _ in range(4)), nn.Linear(32, 4))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        self.group: Any
        if compressor is None:
            self.group = ProcessGroupGloo(timeout=SECONDS)
        else:
            self.group = CompressedProcessGroup(compressor, timeout=SECONDS, **options)
        # Kept, as the manager is a client of it.
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.manager = Manager(
            pg=self.group,
            load_state_dict=self._load,
            state_dict=lambda: {
                "model": {name: t.clone() for name, t in self.model.state_dict().items()},
                "optimizer": self.optimizer.state_dict(),
            },
            min_replica_size=1,
            use_async_quorum=asynchronous,
            timeout=SECONDS,
            quorum_timeout=timedelta(seconds=30),
            connect_timeout=SECONDS,
            rank=0,
            world_size=1,
            store_addr="127.0.0.1",
            store_port=self.store.port,
            replica_id=f"replica_{replica}",
        )
        if compressor is not None:
            self.group.attach(self.manager)

    def _load(self, state: Any) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])

    def backward(self, model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        return float(loss)


def data_parallel(replica: int, compressor: Any, steps: int, fixed: bool, loop: bool) -> Any:
    """Train with torchft's wrappers, or average each gradient in the loop."""
    from torchft import DistributedDataParallel, Optimizer

    training = Training(replica, compressor, asynchronous=True)
    manager, model = training.manager, training.model
    wrapped = model if loop else DistributedDataParallel(manager, model, bucket_cap_mb=0.01)
    optimizer = Optimizer(manager, training.optimizer)
    history, losses = [], []
    while manager.current_step() < steps:
        step = manager.current_step()
        optimizer.zero_grad()
        x, y = data(replica, 0 if fixed else step, batch=64)
        losses.append(training.backward(wrapped, x, y))
        if loop:
            for work in [manager.allreduce(p.grad) for p in model.parameters()]:
                work.wait()
        optimizer.step()
        history.append(parameters(model))
    stats = None if compressor is None else training.group.stats()
    return history, losses, stats


@needs_torchft
def test_without_compression_training_equals_torchft_s_own():
    plain = run_replicas(data_parallel, None, 8, False, False)
    compressed = run_replicas(data_parallel, Identity(), 8, False, False)
    for (theirs, losses, _), (ours, same, stats) in zip(plain, compressed, strict=True):
        assert len(ours) == len(theirs) == 8
        assert losses == pytest.approx(same, rel=1e-4)
        for name, expected in theirs[-1].items():
            assert torch.allclose(ours[-1][name], expected, rtol=1e-4, atol=1e-6)
        assert 1 < stats["ratio"] < 1.05


@needs_torchft
@pytest.mark.parametrize(
    ("compressor", "loop", "most"),
    [
        (ErrorFeedback(TopK(0.1)), True, 0.15),
        (ErrorFeedback(TopK(0.1)), False, 0.15),
        (LBGM(delta=0.5), True, 0.4),
    ],
    ids=repr,
)
def test_replicas_are_bit_equal_after_each_step(compressor, loop, most):
    results = run_replicas(data_parallel, compressor, 20, True, loop)
    histories = [history for history, _, _ in results]
    for both in zip(*histories, strict=True):
        assert_replicas_agree(both)
    for _, losses, stats in results:
        assert losses[-1] < losses[1]
        assert stats["ratio"] < most
    assert (results[0][2]["recycled_share"] > 0.5) == isinstance(compressor, LBGM)


def diloco(replica: int, compressor: Any, syncs: int, options: dict[str, Any]) -> Any:
    """Train with torchft's DiLoCo, two fragments of equal shapes, and return the common model."""
    from torchft.local_sgd import DiLoCo

    training = Training(replica, compressor, asynchronous=False, **options)
    manager, model = training.manager, training.model
    fragments = [model[0:2], model[2:4]]
    outer = [
        torch.optim.SGD(part.parameters(), lr=0.7, momentum=0.9, nesterov=True)
        for part in fragments
    ]
    history, losses = [], []
    with DiLoCo(
        manager, fragments, training.optimizer, outer, sync_every=6, fragment_sync_delay=1
    ) as averaged:
        step = 0
        while manager.current_step() < syncs:
            before = manager.current_step()
            training.optimizer.zero_grad()
            losses.append(training.backward(model, *data(replica, step, batch=64)))
            training.optimizer.step()
            step += 1
            if manager.current_step() != before:
                history.append(parameters(fragments[before % 2]))
    # As the guide says.
    averaged._restore_parameters()
    history.append(parameters(model[:4]))
    return history, losses, None if compressor is None else training.group.stats()


@needs_torchft
@pytest.mark.parametrize("compressor", [ErrorFeedback(TopK(0.1)), LBGM(delta=0.5)], ids=repr)
def test_replicas_of_diloco_are_bit_equal_after_each_exchange(compressor):
    results = run_replicas(diloco, compressor, 12, {"fragments": 2})
    for both in zip(*(history for history, _, _ in results), strict=True):
        assert_replicas_agree(both)
    for _, losses, stats in results:
        assert sum(losses[-6:]) < sum(losses[:6])
        assert stats["ratio"] < (0.15 if isinstance(compressor, ErrorFeedback) else 0.9)


@needs_torchft
def test_diloco_without_compression_equals_torchft_s_own():
    plain = run_replicas(diloco, None, 4, {})
    compressed = run_replicas(diloco, Identity(), 4, {"fragments": 2})
    for (theirs, _, _), (ours, _, _) in zip(plain, compressed, strict=True):
        for one, other in zip(theirs, ours, strict=True):
            for name, expected in one.items():
                assert torch.allclose(other[name], expected, rtol=1e-4, atol=1e-6)


@needs_torchft
def test_a_wrong_number_of_fragments_ends_the_training():
    for result in run_replicas(diloco, TopK(0.1), 4, {}, failures=True):
        assert isinstance(result, Failed)
        assert "give fragments=2" in result.message


def with_another_compressor(replica: int, loop: bool) -> Any:
    return data_parallel(replica, TopK(0.1 if replica else 0.2), 4, True, loop)


@needs_torchft
@pytest.mark.parametrize("loop", [True, False], ids=["loop", "wrapper"])
def test_replicas_with_different_compressors_end_with_an_error(loop):
    for result in run_replicas(with_another_compressor, loop, failures=True):
        assert isinstance(result, Failed)
        assert result.kind == "ValueError"
        assert "replica 0 has compressor TopK(0.2) where replica 1 has compressor TopK(0.1)" in (
            result.message
        )


def without_attach(replica: int) -> Any:
    from lbgm_compress.adapters.torchft import CompressedProcessGroup

    with mock.patch.object(CompressedProcessGroup, "attach"):
        return data_parallel(replica, TopK(0.1), 4, True, False)


@needs_torchft
def test_a_missing_attach_ends_the_wrapper_with_an_error_that_names_it():
    [result] = run_replicas(without_attach, failures=True, world=1)
    assert isinstance(result, Failed)
    assert "call group.attach(manager)" in result.message


# --- a replica that dies and comes back -----------------------------------------------------------

TOGETHER = 10


def go_on(replica: int, compressor: Any, die: int | None, local: int, wrapper: bool = False) -> Any:
    """Train until two replicas have made some steps together; kill this one after `die` steps."""
    from torchft import DistributedDataParallel
    from torchft.local_sgd import DiLoCo

    training = Training(replica, compressor, asynchronous=local == 0)
    manager, model = training.manager, training.model
    outer = torch.optim.SGD(model.parameters(), lr=0.7, momentum=0.9, nesterov=True)
    wrapped = DistributedDataParallel(manager, model, bucket_cap_mb=0.01) if wrapper else model
    ranks: list[int] = []
    with contextlib.ExitStack() as stack:
        if local:
            stack.enter_context(
                DiLoCo(manager, [model], training.optimizer, outer, sync_every=local)
            )
        step = 0
        while ranks[-TOGETHER:].count(2) < TOGETHER:
            before = manager.current_step()
            if not local:
                manager.start_quorum()
            training.optimizer.zero_grad()
            if wrapper and die is not None and step + 1 >= die:
                # In a step of both, before the averages.
                manager.wait_quorum()
                if manager.num_participants() == 2:
                    os.kill(os.getpid(), signal.SIGKILL)
            training.backward(wrapped, *data(replica, step, batch=64))
            step += 1
            if not local and not wrapper:
                for work in [manager.allreduce(p.grad) for p in model.parameters()]:
                    work.wait()
            if step == die and not wrapper:
                # In the middle of a step.
                os.kill(os.getpid(), signal.SIGKILL)
            if local or manager.should_commit():
                training.optimizer.step()
            if not local or manager.current_step() != before:
                ranks.append(manager.num_participants())
    return parameters(model), manager.current_step(), ranks, training.group.stats()


@needs_torchft
@pytest.mark.parametrize(
    ("compressor", "local", "wrapper"),
    [
        (ErrorFeedback(TopK(0.1)), 0, False),
        (LBGM(delta=0.5), 0, False),
        (ErrorFeedback(TopK(0.1)), 3, False),
        (ErrorFeedback(TopK(0.1)), 0, True),
    ],
    ids=repr,
)
def test_a_replica_that_was_killed_comes_back_and_catches_up(compressor, local, wrapper):
    with lighthouse(1) as address:
        replicas = Replicas(address)
        try:
            replicas.start(0, go_on, compressor, None, local, wrapper)
            replicas.start(1, go_on, compressor, 5 * max(1, local), local, wrapper)
            assert replicas.result(1) is None
            replicas.start(1, go_on, compressor, None, local, wrapper)
            back, stayed = replicas.result(1), replicas.result(0)
        finally:
            replicas.end()
    assert not isinstance(stayed, Failed), stayed
    assert not isinstance(back, Failed), back
    assert stayed[1] == back[1]
    assert 1 in stayed[2], "the replica that stayed made no step alone"
    assert_same_bits(stayed[0], back[0])


# --- the group by itself --------------------------------------------------------------------------


class Steps:
    """The part of a manager that the group asks."""

    def __init__(self) -> None:
        self.step, self.participates = 0, True

    def current_step(self) -> int:
        return self.step

    def is_participating(self) -> bool:
        return self.participates


class Groups:
    """The groups of some replicas, each used by a thread of its own."""

    def __init__(self, *compressors: Any, **options: Any) -> None:
        from lbgm_compress.adapters.torchft import CompressedProcessGroup

        self.store = dist.HashStore()
        self.quorum = 0
        options = {"timeout": SECONDS, **options}
        self.groups = [CompressedProcessGroup(c, **options) for c in compressors]
        self.managers = [Steps() for _ in compressors]
        for group, manager in zip(self.groups, self.managers, strict=True):
            group.attach(manager)
        self.new_quorum()

    def new_quorum(self, members: list[int] | None = None) -> None:
        """Make a new quorum of some replicas, or of all."""
        self.quorum += 1
        self.members = list(range(len(self.groups))) if members is None else members
        # In the place of torch's server, whose clients may wait for a name server.
        store = dist.PrefixStore(str(self.quorum), self.store)

        def configure(rank: int, replica: int) -> None:
            self.groups[replica].configure(
                "", f"replica_{replica}", rank, len(self.members), self.quorum
            )

        with mock.patch("torchft.process_group.create_store_client", return_value=store):
            self._run(configure)

    def _run(self, function: Callable[[int, int], Any]) -> list[Any]:
        with ThreadPoolExecutor(len(self.members)) as pool:
            return list(pool.map(function, range(len(self.members)), self.members))

    def sums(self, *tensors: Any, operation: Any = dist.ReduceOp.SUM) -> list[Any]:
        """Sum up a list of tensors of each member at once, and return the sums or the errors."""

        def add_up(rank: int, replica: int) -> Any:
            options = dist.AllreduceOptions()
            options.reduceOp = operation
            own = [tensor.clone() for tensor in tensors[rank]]
            try:
                group = self.groups[replica]
                works = [group.allreduce([tensor], options) for tensor in own]
                done = [work.wait() for work in works]
                if not all(done):
                    error = group.errored()
                    assert error is not None
                    return error
            except Exception as error:
                return error
            return own

        return self._run(add_up)

    def step(self, *tensors: Any, committed: list[int] | None = None) -> list[Any]:
        """Do a step of one batch, which all replicas commit or some."""
        sums = self.sums(*tensors)
        for replica in self.members:
            assert self.groups[replica].errored() is None
        for replica in self.members if committed is None else committed:
            self.managers[replica].step += 1
        return sums


@pytest.fixture(autouse=True)
def _on_the_loopback(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")


def pair(*values: float) -> list[torch.Tensor]:
    return [torch.tensor(values)]


HALF = ErrorFeedback(TopK(0.5))  # of two elements it sends the larger one


@needs_torchft
@pytest.mark.parametrize("compressor", COMPRESSORS, ids=repr)
def test_sums_have_the_same_bits_on_three_replicas(compressor):
    groups = Groups(*[compressor] * 3)
    generator = torch.Generator().manual_seed(0)
    base = [torch.randn(shape, generator=generator) for shape in [(6, 5), (9,), (2, 3, 4)]]
    for step in range(4):
        own = [
            [
                tensor * (1 + step) + 0.1 * torch.randn(tensor.shape, generator=generator)
                for tensor in base
            ]
            for _ in range(3)
        ]
        first, *others = groups.step(*own)
        for other in others:
            assert_same_bits(other, first)
        if compressor == Identity():
            for tensors, total in zip(zip(*own, strict=True), first, strict=True):
                assert torch.allclose(sum(tensors), total, rtol=1e-5)
        if step == 1:
            groups.new_quorum()


@needs_torchft
def test_tensors_of_a_batch_go_in_one_message():
    groups = Groups(LBGM(), LBGM())
    gradients = [torch.ones(10, 10) for _ in range(20)]
    groups.step(gradients, gradients)
    groups.step(gradients, gradients)
    stats = groups.groups[0].stats()
    assert stats["recycled_share"] == 0.5
    assert stats["dense_bytes"] == 2 * 20 * 400
    # Two messages: at most six bytes for each tensor, and of the message, beside the numbers.
    assert 20 * 400 < stats["message_bytes"] < 20 * 400 + 2 * (20 * 6 + 40)


@needs_torchft
def test_a_failed_step_comes_back_into_the_residual():
    first, second = (pair(4.0, 1.0), pair(8.0, 3.0)), (pair(0.0, 0.5), pair(0.0, 0.25))
    groups = Groups(HALF, HALF)
    assert_same_bits(groups.step(*first)[0], pair(12.0, 0.0))
    # Neither commits the step, and the manager makes a new quorum.
    assert_same_bits(groups.step(*second, committed=[])[0], pair(0.0, 5.75 - 1.0))
    groups.new_quorum()
    assert_same_bits(groups.step(*second)[0], pair(0.0, 4.75))
    assert_same_bits(groups.step(pair(1.0, 0.0), pair(1.0, 0.0))[0], pair(2.0, 0.0))


@needs_torchft
def test_a_step_that_another_replica_has_committed_does_not_come_back():
    groups = Groups(HALF, HALF)
    groups.step(pair(4.0, 1.0), pair(8.0, 3.0), committed=[0])
    groups.new_quorum()
    # Replica 1 is healed.
    groups.managers[1].step = groups.managers[0].step
    assert_same_bits(groups.step(pair(0.0, 0.0), pair(0.0, 0.5))[0], pair(0.0, 3.5))


@needs_torchft
def test_a_step_that_the_others_did_without_a_replica_comes_back():
    groups = Groups(HALF, HALF)
    groups.step(pair(4.0, 1.0), pair(8.0, 3.0), committed=[])
    groups.new_quorum([0])
    assert_same_bits(groups.step(pair(4.0, 1.0))[0], pair(4.0, 0.0))
    groups.new_quorum()
    groups.managers[1].step = groups.managers[0].step
    # The residual of replica 1 is empty, as before its first step.
    assert_same_bits(groups.step(pair(0.0, 0.0), pair(0.0, 0.5))[0], pair(0.0, 0.5))


@needs_torchft
@pytest.mark.parametrize("how", ["inf", "undo"])
def test_a_step_that_is_not_applied_is_taken_back(how):
    groups = Groups(HALF, HALF)
    groups.step(pair(4.0, 1.0), pair(8.0, 3.0))
    if how == "inf":
        # One of the two tensors is finite; the step ends for both.
        sums = groups.step([*pair(7.0, 1.0)], pair(torch.inf, 1.0))
        assert not sums[0][0].isfinite().all()
    else:
        groups.step(pair(7.0, 1.0), pair(7.0, 1.0))
        for group in groups.groups:
            group.undo()
    assert_same_bits(groups.step(pair(0.0, 0.5), pair(0.0, 0.5))[0], pair(0.0, 5.0))


@needs_torchft
def test_fragments_of_equal_shapes_have_residuals_of_their_own():
    groups = Groups(HALF, HALF, fragments=2)
    groups.step(pair(4.0, 1.0), pair(4.0, 1.0))
    groups.step(pair(0.0, 0.5), pair(0.0, 0.5))
    assert_same_bits(groups.step(pair(0.0, 0.5), pair(0.0, 0.5))[0], pair(0.0, 3.0))


@needs_torchft
def test_a_replica_that_does_not_take_part_sends_nothing():
    groups = Groups(*[SignSGD(vote=True)] * 3)
    groups.managers[2].participates = False
    own = pair(1.0, -1.0)
    for (total,) in groups.step(own, own, pair(0.0, 0.0)):
        # torchft divides by two.
        assert_same_bits(total, torch.tensor([2.0, -2.0]))
    assert groups.groups[2].stats()["message_bytes"] == 0


@needs_torchft
def test_steps_of_a_replica_alone_are_not_counted():
    groups = Groups(HALF, HALF)
    groups.new_quorum([0])
    groups.step(pair(4.0, 1.0))
    assert groups.groups[0].stats()["dense_bytes"] == 0
    groups.new_quorum()
    groups.managers[1].step = 1
    groups.step(pair(4.0, 1.0), pair(4.0, 1.0))
    assert groups.groups[0].stats()["dense_bytes"] == 8


@needs_torchft
def test_after_a_failure_the_other_sums_of_the_step_are_left_out():
    groups = Groups(HALF, HALF)
    group = groups.groups[0]
    group._note_failure(RuntimeError("gone"))
    for tensor in (torch.ones(2), torch.tensor(1.0)):
        work = group.allreduce([tensor], dist.ReduceOp.SUM)
        assert not work.wait()
        assert work.get_future().wait()[0] is tensor
    assert str(group.errored()) == "gone"
    assert group.errored() is None
    groups.step(pair(4.0, 1.0), pair(8.0, 3.0))


@needs_torchft
def test_other_sums_are_exact():
    groups = Groups(TopK(0.1), TopK(0.1))
    losses = groups.sums([torch.tensor(0.125)], [torch.tensor([0.5]).squeeze()])
    assert [sums[0].item() for sums in losses] == [0.625, 0.625]
    counts = groups.sums([torch.arange(5)], [torch.arange(5)])
    assert counts[0][0].tolist() == [0, 2, 4, 6, 8]
    largest = groups.sums(pair(1.0, 5.0), pair(3.0, 2.0), operation=dist.ReduceOp.MAX)
    assert largest[1][0].tolist() == [3.0, 5.0]
    assert groups.groups[0].stats()["message_bytes"] == 0


@needs_torchft
def test_a_sum_that_nobody_waits_for_is_done_at_the_end_of_the_step():
    groups = Groups(Identity(), Identity())
    own = [torch.ones(3), torch.ones(3)]
    works = [
        group.allreduce([t], dist.ReduceOp.SUM) for group, t in zip(groups.groups, own, strict=True)
    ]
    groups._run(lambda rank, replica: groups.groups[replica].errored())
    assert own[0].tolist() == own[1].tolist() == [2.0, 2.0, 2.0]
    assert works[0].get_future().wait()[0] is own[0]


@needs_torchft
def test_another_order_is_an_error_and_no_sum():
    groups = Groups(TopK(0.5), TopK(0.5))
    a, b = torch.ones(4, 2), torch.ones(3)
    for error in groups.sums([a, b], [b, a]):
        assert isinstance(error, ValueError)
        assert "replica 0 has tensor of shape (4, 2) and torch.float32" in str(error)
        assert "where replica 1 has tensor of shape (3,) and torch.float32" in str(error)
    for group in groups.groups:
        with pytest.raises(ValueError, match="in the same order"):
            group.errored()


@needs_torchft
def test_a_new_replica_with_another_compressor_does_not_end_the_others():
    groups = Groups(TopK(0.5), TopK(0.5), TopK(0.25))
    own = [torch.ones(8)]
    groups.new_quorum([0, 1])
    groups.step(own, own)
    groups.new_quorum()
    groups.managers[2].step = 1
    *stay, leaves = groups.sums(own, own, own)
    assert all(type(error).__name__ == "StepFailed" for error in stay)
    assert isinstance(leaves, ValueError)
    assert "replica 2 has compressor TopK(0.25)" in str(leaves)
    with pytest.raises(ValueError, match="compressor"):
        groups.groups[2].errored()
    groups.new_quorum([0, 1])
    assert groups.step(own, own)[0][0].sum() == 8


@needs_torchft
def test_a_replica_that_cannot_encode_ends_and_the_others_do_not():
    groups = Groups(Broken(), Broken())
    bad = [torch.full((4,), 13.0)]
    error, other = groups.sums(bad, [torch.ones(4)])
    assert str(error) == "unlucky"
    assert "replica 0 could not encode" in str(other)
    with pytest.raises(ArithmeticError, match="unlucky"):
        groups.groups[0].errored()
    assert groups.groups[1].errored() is None


@dataclasses.dataclass(frozen=True, repr=False)
class Broken(TopK):
    """Fails on the number 13."""

    ratio: float = 0.5

    def encode(self, grad: torch.Tensor, state: Any) -> Any:
        if grad.flatten()[0] == 13:
            raise ArithmeticError("unlucky")
        return super().encode(grad, state)


@needs_torchft
def test_a_replica_that_is_gone_fails_the_step_of_the_others_alone():
    groups = Groups(HALF, HALF, timeout=timedelta(seconds=1))
    groups.step(pair(4.0, 1.0), pair(8.0, 3.0))
    groups.groups[1].abort()
    groups.members = [0]
    [error] = groups.sums(pair(1.0, 2.0))
    assert "a replica is gone or cannot be reached" in str(error)
    assert groups.groups[0].errored() is None
    groups.new_quorum([0])
    assert_same_bits(groups.step(pair(0.0, 2.0))[0], pair(0.0, 3.0))


@needs_torchft
def test_wrong_uses_say_what_is_right():
    from lbgm_compress.adapters.torchft import CompressedProcessGroup

    with pytest.raises(TypeError, match="compressor"):
        CompressedProcessGroup(0.1)
    with pytest.raises(ValueError, match="fragments must be a whole number of at least 1"):
        CompressedProcessGroup(TopK(0.1), fragments=0)
    group = CompressedProcessGroup(TopK(0.1))
    with pytest.raises(TypeError, match=r"attach\(\) takes a torchft Manager, not str"):
        group.attach("manager")
    assert not group.allreduce([torch.ones(2)], dist.ReduceOp.SUM).wait()
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"call group.attach\(manager\)"):
            group.errored()


# --- the guide ------------------------------------------------------------------------------------


def run_program(replica: int, path: str) -> bool:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "REPLICA_GROUP_ID": str(replica)}
    runpy.run_path(path, run_name="__main__")
    return True


@needs_torchft
@pytest.mark.parametrize("sign", ["-", "+"], ids=["before", "after"])
def test_programs_of_the_guide_run_before_and_after_the_change(sign, tmp_path):
    for number, diff in enumerate(blocks(guide("torchft"), "diff")):
        assert 3 <= len(changed(diff.code)) <= 6
        path = tmp_path / f"train{number}.py"
        path.write_text(side(diff.code, sign))
        run_replicas(run_program, str(path))
