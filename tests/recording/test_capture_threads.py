"""Many threads, tasks and executors capture one model at once, alone and beside compilations: each gets its own.

The sampled sizes run always; 8 × 10,000 calls each run with the long suites.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

import lading

NUM_THREADS = 8
SIZES = [40, pytest.param(10_000, marks=pytest.mark.full)]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


@pytest.fixture
def net():
    torch.manual_seed(0)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield Net().eval().requires_grad_(requires_grad=False)
    sys.setswitchinterval(interval)
    torch._dynamo.reset()


def x_of(seed: int) -> torch.Tensor:
    return torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(seed))


def expected_of(net: Net, x: torch.Tensor) -> list[torch.Tensor]:
    kept = []
    for layer in net.layers:
        kept.append(layer(x))
        x = torch.tanh(kept[-1])
    return kept


def is_right(seen: lading.Capture, expected: list[torch.Tensor]) -> bool:
    return all(torch.equal(seen[f"layers.{n}"], tensor) for n, tensor in enumerate(expected))


def count_wrong(net: Net, num_calls: int, beside: Callable[[], object] | None = None) -> list[object]:
    """Capture in eight threads at once; repeat ``beside`` in a ninth until they end, and at least once."""
    expected = [expected_of(net, x_of(number)) for number in range(NUM_THREADS)]
    wrong: list[object] = []
    barrier = threading.Barrier(NUM_THREADS + 1)
    ended = threading.Event()

    def work(number: int) -> None:
        x = x_of(number)
        barrier.wait()
        try:
            for _ in range(num_calls):
                with lading.capture(net, "layers.*") as seen:
                    net(x)
                if not is_right(seen, expected[number]):
                    wrong.append(number)
        except BaseException as error:  # noqa: BLE001 - reported by the assertion
            wrong.append(error)

    def disturb() -> None:
        barrier.wait()
        try:
            while beside is not None:
                beside()
                if ended.is_set():
                    return
        except BaseException as error:  # noqa: BLE001 - reported by the assertion
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(NUM_THREADS)]
    other = threading.Thread(target=disturb)
    for thread in (*threads, other):
        thread.start()
    for thread in threads:
        thread.join()
    ended.set()
    other.join()
    return wrong


@pytest.mark.parametrize("num_calls", SIZES)
def test_eight_threads_alone(net, num_calls):
    assert count_wrong(net, num_calls) == []


@pytest.mark.parametrize("num_calls", SIZES)
def test_eight_threads_beside_an_unrelated_compilation(net, num_calls):
    other = Net()

    def compile_other() -> None:
        torch._dynamo.reset()
        torch.compile(other, backend="eager")(x_of(0))

    assert count_wrong(net, num_calls, compile_other) == []


@pytest.mark.parametrize("num_calls", SIZES)
def test_eight_threads_beside_the_first_compilation_of_the_same_model(net, num_calls):
    expected = net(x_of(99))

    def compile_it() -> None:
        torch._dynamo.reset()  # so that each is a first one
        compiled = torch.compile(net, backend="eager", fullgraph=True)
        assert torch.equal(compiled(x_of(99)), expected)
        assert torch.equal(compiled(x_of(99)), expected)

    def try_to_compile_it() -> None:
        with contextlib.suppress(IndexError):  # torch numbers the hooks that it guards, and may find fewer afterwards
            try:
                compile_it()
            except AssertionError as error:
                if not str(error).startswith("Guard failed on the same frame"):  # or another number of them
                    raise

    assert count_wrong(net, num_calls, try_to_compile_it) == []
    compile_it()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())


@pytest.mark.parametrize("num_calls", SIZES)
def test_eight_tasks_that_take_turns(net, num_calls):
    expected = [expected_of(net, x_of(number)) for number in range(NUM_THREADS)]

    async def work(number: int) -> int:
        wrong = 0
        for _ in range(num_calls):
            with lading.capture(net, "layers.*") as seen:
                await asyncio.sleep(0)
                net(x_of(number)) if number % 2 else await asyncio.to_thread(net, x_of(number))
                await asyncio.sleep(0)
            wrong += not is_right(seen, expected[number])
        return wrong

    async def every() -> list[int]:
        return await asyncio.gather(*[work(number) for number in range(NUM_THREADS)])

    assert asyncio.run(every()) == [0] * NUM_THREADS


@pytest.mark.parametrize("num_calls", SIZES)
def test_an_executor_whose_threads_serve_captures_in_turn(net, num_calls):
    expected = [expected_of(net, x_of(number)) for number in range(NUM_THREADS)]

    def opened_inside(number: int) -> bool:
        with lading.capture(net, "layers.*") as seen:
            net(x_of(number))
        return is_right(seen, expected[number])

    wrong: list[object] = []
    with ThreadPoolExecutor(4) as pool, ThreadPoolExecutor(NUM_THREADS) as callers:

        def bound(number: int) -> None:
            for _ in range(num_calls):
                with lading.capture(net, "layers.*") as seen:
                    inside = pool.submit(opened_inside, number)
                    pool.submit(seen.bind(net), x_of(number)).result()
                    is_other_right = inside.result()
                if not (is_other_right and is_right(seen, expected[number])):
                    wrong.append(number)

        list(callers.map(bound, range(NUM_THREADS)))
    assert not wrong
