"""Run functions in threads that change places as often as the interpreter can, and say who failed or never ended."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Sequence

PATIENCE_S = 120  # a watchdog: thousands of forwards on a busy core take a while


def run_together(functions: Sequence[Callable[[], object]]) -> list[BaseException]:
    """Start all at once and wait for all; give what they raised. A thread that never ends fails the test."""
    barrier = threading.Barrier(len(functions))
    raised: list[BaseException] = []

    def run(function: Callable[[], object]) -> None:
        try:
            barrier.wait(PATIENCE_S)
            function()
        except BaseException as error:  # noqa: BLE001 - given to the test
            raised.append(error)

    threads = [threading.Thread(target=run, args=(function,), daemon=True) for function in functions]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE_S)
    finally:
        sys.setswitchinterval(interval)
    stuck = [thread for thread in threads if thread.is_alive()]
    assert not stuck, f"{len(stuck)} of {len(threads)} threads wait for ever"
    return raised
