"""The laws of transports, checked on the ranks of any engine."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from lbgm_compress import LBGM, ErrorFeedback, Identity, TopK
from lbgm_compress.collective import Averager, Transport
from tests.laws import assert_same_bits

__all__ = ["check_transport"]

KB = 1024
# Around the sizes at which the transport for process groups cuts parts into chunks.
SIZES = [0, 1, 7, 256 * KB - 1, 256 * KB, 256 * KB + 1, 768 * KB + 5]
HEAD = 24


def check_transport(run_ranks: Callable[[Callable[[Transport], Any]], Sequence[Any]]) -> None:
    """Check that a transport keeps the rules of `Transport`.

    Parameters
    ----------
    run_ranks
        Calls a function (of this module, so that it can be pickled) with a transport on each rank
        of one job, all at the same time. It returns what they return, in rank order, and raises
        what one of them raises.
    """
    results = run_ranks(keep_laws)
    places = [result["place"] for result in results]
    expected = [(rank, len(results)) for rank in range(len(results))]
    assert places == expected, f"rank and size are {places}, expected {expected}"
    for rank, result in enumerate(results[1:], start=1):
        for what in ("sums", "averages"):
            for name, found in result[what].items():
                try:
                    assert_same_bits(found, results[0][what][name])
                except AssertionError as error:
                    raise AssertionError(
                        f"{what} differ between rank 0 and rank {rank} in {name}: {error}"
                    ) from None


def keep_laws(transport: Transport) -> dict[str, Any]:
    """Check on one rank what it can see, and return what all ranks must have alike."""
    place = transport.rank, transport.size
    gather_data_of_one_size(transport)
    gather_data_of_many_sizes(transport)
    gather_messages(transport)
    refuse_a_message(transport)
    sums = add_up(transport)
    averages = average(transport)
    fail_on_one_rank(transport)
    return {"place": place, "sums": sums, "averages": averages}


@contextlib.contextmanager
def raises(kind: type[Exception], text: str) -> Iterator[None]:
    """Fail unless an error of a kind, with a text in its message, is raised within.

    The failure is an AssertionError, which ranks can pickle; that of `pytest.raises` is not.
    """
    try:
        yield
    except kind as error:
        message = str(error)
    else:
        raise AssertionError(f"expected {kind.__name__} with {text!r} in its message")
    assert text in message, f"expected {text!r} in the message, found {message!r}"


def content(rank: int, size: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * seed + rank)
    return torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator)


def gather_data_of_one_size(transport: Transport) -> None:
    size = transport.size
    for seed, numel in enumerate([*SIZES[1:], 4 * KB * KB]):
        data = content(transport.rank, numel, seed)
        rows = transport.gather_equal(data)
        what = f"gather_equal of {numel} bytes on rank {transport.rank} of {size}"
        assert isinstance(rows, Tensor), f"{what} returned {type(rows).__name__}"
        found = tuple(rows.shape), rows.dtype
        assert found == ((size, numel), torch.uint8), f"{what} returned shape and dtype {found}"
        assert rows.is_contiguous(), f"{what} returned rows that are not contiguous"
        assert torch.equal(data, content(transport.rank, numel, seed)), f"{what} changed its data"
        for rank, row in enumerate(rows):
            same = torch.equal(row, content(rank, numel, seed))
            assert same, (
                f"{what}: row {rank} is not what rank {rank} gave (are rows in rank order?)"
            )
        # No other rank sees what becomes of the data and of the rows.
        data.fill_(255)
        transport.gather_equal(torch.zeros(1, dtype=torch.uint8))
        shared = "is not in memory of its own"
        for rank, row in enumerate(rows):
            same = torch.equal(row, content(rank, numel, seed))
            assert same, f"{what}: row {rank} {shared}, it changed after the exchange"
        rows.fill_(transport.rank)
        transport.gather_equal(torch.zeros(1, dtype=torch.uint8))
        assert bool((rows == transport.rank).all()), f"{what}: the result {shared}"


def gather_data_of_many_sizes(transport: Transport) -> None:
    world, mine = transport.size, transport.rank
    for seed in range(60):
        draw = torch.Generator().manual_seed(seed)
        sizes = [SIZES[int(i)] for i in torch.randint(len(SIZES), (world,), generator=draw)]
        if seed == 30:
            sizes = [0] * world
        parts = [torch.zeros(size, dtype=torch.uint8) for size in sizes]
        parts[mine] = content(mine, sizes[mine], seed)
        transport.gather_unequal(parts)
        for rank, part in enumerate(parts):
            same = torch.equal(part, content(rank, sizes[rank], seed))
            assert same, f"gather_unequal of sizes {sizes}: rank {mine} has part {rank} wrong"


def length(head: bytes, rank: int) -> int:
    """Read the size of a body from the first bytes of a head of these tests."""
    assert len(head) == HEAD, f"body_length was given {len(head)} bytes, the head has {HEAD}"
    assert head[-1] == rank, f"body_length was given the head of rank {head[-1]} for rank {rank}"
    return int.from_bytes(head[:4], "little")


def message(rank: int, size: int, seed: int) -> Tensor:
    head = bytearray(size.to_bytes(4, "little") + bytes([seed] * (HEAD - 5)) + bytes([rank]))
    return torch.cat([torch.frombuffer(head, dtype=torch.uint8), content(rank, size, seed)])


def gather_messages(transport: Transport) -> None:
    world, mine = transport.size, transport.rank
    for start in range(0, 20, 4):
        pending = []
        for seed in range(start, start + 4):
            # Bodies of all ranks, of none, of the first alone, and of all but one.
            sizes = [(rank + seed) * 1001 for rank in range(world)]
            if seed % 4 == 1:
                sizes = [0] * world
            elif seed % 4 == 2:
                sizes = [300 * KB] + [0] * (world - 1)
            elif seed % 4 == 3:
                sizes[seed % world] = 0
            own = message(mine, sizes[mine], seed)
            pending.append(
                (seed, sizes, transport.begin_gather(own, HEAD, length, f"messages.{seed}"))
            )
        for seed, sizes, exchange in pending:
            wait_until(exchange.ready)
            messages = exchange.result()
            what = f"begin_gather of bodies of {sizes} bytes, on rank {mine}"
            assert len(messages) == world, f"{what}, returned {len(messages)} messages"
            for rank, found in enumerate(messages):
                same = torch.equal(found, message(rank, sizes[rank], seed))
                assert same, f"{what}: message {rank} is not that of rank {rank}"


def wait_until(ready: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not ready():
        assert time.monotonic() < deadline, "an exchange is not ready after 60 s"
        threading.Event().wait(0.001)


def refuse_a_message(transport: Transport) -> None:
    def refuse(head: bytes, rank: int) -> int:
        if rank == 0:
            raise RuntimeError("the message of rank 0 is refused")
        return length(head, rank)

    for seed in range(3):
        own = message(transport.rank, 50, seed)
        with raises(RuntimeError, "rank 0 is refused"):
            transport.begin_gather(own, HEAD, refuse, "refused").result()
    gather_messages(transport)


def numbers(rank: int, numel: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(rank)
    if dtype == torch.int64:
        return torch.randint(-(2**40), 2**40, (numel,), generator=generator)
    return torch.randn(numel, generator=generator).to(dtype)


def add_up(transport: Transport) -> dict[str, Tensor]:
    sums = {}
    for dtype in (torch.float16, torch.float32, torch.float64, torch.int64):
        pending = {
            numel: transport.begin_all_reduce(
                numbers(transport.rank, numel, dtype), f"sum.{dtype}.{numel}"
            )
            for numel in (1, 3, 1000, 1_000_000)
        }
        for numel, exchange in pending.items():
            wait_until(exchange.ready)
            parts = [numbers(rank, numel, dtype) for rank in range(transport.size)]
            # An engine may add up in another order when several sums are under way.
            alone = transport.all_reduce(numbers(transport.rank, numel, dtype))
            for way, found in (("together", exchange.result()), ("not together", alone)):
                what = f"the sum of {numel} numbers of {dtype} ({way} with others)"
                shape = tuple(found.shape), found.dtype
                assert shape == ((numel,), dtype), f"{what} has shape and dtype {shape}"
                if dtype == torch.int64:
                    assert torch.equal(found, torch.stack(parts).sum(0)), f"{what} is wrong"
                else:
                    exact = torch.stack(parts).double().sum(0)
                    rounding = transport.size**2 * 4 * torch.finfo(dtype).eps
                    near = torch.allclose(found.double(), exact, rtol=0, atol=rounding)
                    assert near, f"{what} is wrong"
                sums[f"{way} {dtype} {numel}"] = found.clone()
    return sums


def gradients(rank: int, step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(100 * step + rank)
    return {
        "w": torch.randn(40, 30, generator=generator),
        "half": torch.randn(50, generator=generator).half(),
    }


def average(transport: Transport) -> dict[str, Tensor]:
    likes = {name: torch.empty_like(grad) for name, grad in gradients(0, 0).items()}
    shares = [
        2 * (1 + rank) / (transport.size * (transport.size + 1)) for rank in range(transport.size)
    ]
    found = {}
    for compressor in (Identity(), LBGM(TopK(0.2), delta=0.9), ErrorFeedback(TopK(0.1))):
        averager = Averager(compressor, likes, transport, start_step=2, weight=1 + transport.rank)
        for step in range(6):
            averages = averager.average(gradients(transport.rank, step // 2))
            exact = {
                name: sum(
                    share * gradients(rank, step // 2)[name].double()
                    for rank, share in enumerate(shares)
                )
                for name in likes
            }
            for name, mean in averages.items():
                assert (mean.shape, mean.dtype) == (likes[name].shape, likes[name].dtype)
                if compressor == Identity() or step < 2:
                    atol = 4 * torch.finfo(mean.dtype).eps
                    assert torch.allclose(mean.double(), exact[name], atol=atol)
                found[f"{compressor!r} {step} {name}"] = mean.clone()
        assert averager.step == 6
    return found


def fail_on_one_rank(transport: Transport) -> None:
    last = transport.size - 1
    averager = Averager(LBGM(), {"w": torch.empty(4)}, transport)
    averager.average({"w": torch.ones(4)})
    if transport.rank == last:
        with raises(ValueError, "'w' has shape"):
            averager.average({"w": torch.ones(5)})
    else:
        with raises(RuntimeError, f"rank {last} failed before it could send"):
            averager.average({"w": torch.ones(4)})
    with raises(RuntimeError, "load a checkpoint"):
        averager.average({"w": torch.ones(4)})
    # The transport itself is still of use.
    again = Averager(LBGM(), {"w": torch.empty(4)}, transport)
    assert_same_bits(again.average({"w": torch.ones(4)})["w"], torch.ones(4))
