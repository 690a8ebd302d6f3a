"""Keep schedules consistent while this process forks.

Knows that each has a lock and can start again in a child; not what it schedules. Guarantees that no lock is held in the
child by a thread that the child lacks, and that nothing was half done when the child was made.
"""

from __future__ import annotations

import os
import threading
import weakref
from typing import Protocol


class Forking(Protocol):
    """Stand still while the process forks. There is one: a `Schedule`, which this file must not import in turn."""

    def stop_for_fork(self) -> None:
        """Acquire the lock."""

    def go_on_in_parent(self) -> None:
        """Release it again."""

    def restart_in_child(self) -> None:
        """Go on without the other threads, with a new lock."""


class Forks:
    """Stop every live schedule before a fork, and set it going afterwards. Guarded by `_lock` during a fork."""

    def __init__(self) -> None:
        self._live: weakref.WeakSet[Forking] = weakref.WeakSet()
        self._stopped: list[Forking] = []
        self._is_watching = False
        self._lock = threading.Lock()  # two threads may fork at once

    def watch(self, schedule: Forking) -> None:
        """Take care of a schedule for as long as it lives."""
        self._live.add(schedule)
        if not self._is_watching:
            self._is_watching = True
            os.register_at_fork(before=self._before, after_in_parent=self._in_parent, after_in_child=self._in_child)

    def _before(self) -> None:
        self._lock.acquire()
        self._stopped = list(self._live)
        for schedule in self._stopped:
            schedule.stop_for_fork()

    def _in_parent(self) -> None:
        while self._stopped:
            self._stopped.pop().go_on_in_parent()
        self._lock.release()

    def _in_child(self) -> None:
        while self._stopped:
            self._stopped.pop().restart_in_child()
        self._lock = threading.Lock()


FORKS = Forks()
"""Those of this process."""
