"""Capture from many threads at once, each with inputs of its own, alone and beside compilations; count what is wrong.

Knows no contender: it is given what to call. Wrong is what differs from what a single thread got, in number or bits.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import nn

from capture_contenders import Elsewhere

NUM_THREADS = 8
SWITCH_S = 1e-6
SCENARIOS = {
    "alone": "alone",
    "unrelated": "beside an unrelated compilation",
    "same": "beside the model's first compilation",
    "worker": "every second layer in a worker thread",
}


def alternate(number: int, layer: nn.Module) -> nn.Module:
    """Have every second layer run elsewhere."""
    return Elsewhere(layer) if number % 2 else layer


@contextmanager
def beside(scenario: str, model: Any, inputs: Any) -> Iterator[None]:
    """Compile in a thread of its own, again and again, while the context lasts."""
    unrelated = nn.Sequential(*[nn.Linear(4, 4) for _ in range(60)])
    acts: dict[str, Callable[[], object]] = {
        "unrelated": lambda: torch.compile(unrelated, backend="eager")(torch.zeros(1, 4)),
        "same": lambda: torch.compile(model, backend="eager")(**inputs),
    }
    if scenario not in acts:
        yield
        return
    act, is_over, has_begun = acts[scenario], threading.Event(), threading.Event()

    def work() -> None:
        with torch.no_grad():
            while not is_over.is_set():
                torch.compiler.reset()
                has_begun.set()
                with suppress(Exception):  # some cannot be compiled; what is asked is what it does to the others
                    act()

    torch.compile(nn.Linear(4, 4), backend="eager")(torch.zeros(1, 4))  # the compiler's imports are no compilation
    thread = threading.Thread(target=work)
    thread.start()
    has_begun.wait()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


def call_from_threads(
    capture: Callable[[int], Sequence[torch.Tensor]],
    expected: Sequence[Sequence[torch.Tensor]],
    num_turns: int,
    company: Any,
) -> dict[str, Any]:
    """Capture in every thread so many times; count what differs and what raises.

    Args:
        capture: of the number of a thread.
        expected: what each thread ought to get.
        num_turns: per thread.
        company: a context in which it happens.
    """
    found: dict[str, list[str]] = {"wrong": [], "raised": []}
    barrier = threading.Barrier(NUM_THREADS)

    def work(number: int) -> None:
        barrier.wait()
        for _ in range(num_turns):
            try:
                with torch.no_grad():
                    given = capture(number)
                if len(given) != len(expected[number]) or not all(map(torch.equal, given, expected[number])):
                    found["wrong"].append(f"{len(given)} of {len(expected[number])} tensors")
            except Exception as error:  # noqa: BLE001 - counted
                found["raised"].append(f"{type(error).__name__}: {error}"[:160])

    interval = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_S)
    threads = [threading.Thread(target=work, args=(number,)) for number in range(NUM_THREADS)]
    try:
        with company:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    finally:
        sys.setswitchinterval(interval)
    return {
        "wrong": len(found["wrong"]),
        "raised": len(found["raised"]),
        "examples": [*found["wrong"][:1], *found["raised"][:1]],
        "of": NUM_THREADS * num_turns,
    }
