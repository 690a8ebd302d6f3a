"""Have one thread of its own do steps whenever it is woken, so that blocks are fetched while others compute.

Does not know what a step is. Guarantees that a wake is never lost while the thread runs, and that where there can be no
thread (after a fork, or where none starts) whoever wakes it is told so and can step instead.

Concurrency: guarded by the schedule's lock, but for `sleep` and `end`, which may be called without it.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from queue import SimpleQueue

_LOG = logging.getLogger(__name__)


class Worker:
    """Hold the thread, which starts with the first wake. Guarded by the schedule's lock, but for `sleep` and `end`."""

    def __init__(self, *, can_run: bool = True, is_ended: bool = False) -> None:
        self.can_run = can_run
        self.is_ended = is_ended
        self.thread: threading.Thread | None = None
        self._wakes: SimpleQueue[bool] = SimpleQueue()
        self._is_woken = False

    @property
    def is_running(self) -> bool:
        """Say whether there is a thread that will step."""
        return self.thread is not None and self.thread.is_alive()

    def wake(self, work: Callable[[], None]) -> bool:
        """Let the thread go on; say whether there can be one.

        Args:
            work: what the thread does from its start to its end, where it has to be started.
        """
        if not self.is_running and self.can_run and not self.is_ended:
            self.thread = threading.Thread(target=work, name="lading-residency", daemon=True)
            try:
                self.thread.start()
            except RuntimeError as error:  # the interpreter ends, or there are too many: whoever waits steps
                self.thread, self.can_run = None, False
                _LOG.warning("blocks are not fetched ahead: %s", error)
        if self.can_run and not self._is_woken:
            self._wakes.put(True)  # before it is noted, lest an interruption between lines loses it
            self._is_woken = True
        return self.can_run

    def sleep(self) -> bool:
        """Wait for the next wake, in the thread; False once it has to end."""
        return self._wakes.get()

    def rise(self) -> None:
        """Note, in the thread, that what comes from now on needs another wake."""
        self._is_woken = False

    def end(self) -> None:
        """Let the thread end after its step, without waiting for it. Safe in a finalizer; twice is fine."""
        self.is_ended = True
        self._wakes.put(False)
