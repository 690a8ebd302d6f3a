"""A mover that moves nothing and notices everything: over capacity, entered while absent, evicted while inside."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Sequence

from lading.residency.room import ByteRoom
from lading.residency.schedule import Schedule


class FakeMover:
    """Keep account of blocks; any thread. `on_fetch` and `on_evict` are called without a lock and may raise or wait."""

    def __init__(self, sizes: Sequence[int], capacity: int, *, makes_copies: bool = False) -> None:
        self.sizes = sizes
        self.capacity = capacity
        self.makes_copies = makes_copies
        self.present: set[int] = set()
        self.inside: set[int] = set()
        self.fetching: set[int] = set()
        self.visitors: Counter[int] = Counter()
        self.kept: Counter[int] = Counter()
        self.fetched: Counter[int] = Counter()
        self.log: list[tuple[str, int]] = []
        self.wrong: list[str] = []
        self.lock = threading.RLock()
        self.moving = 0
        self.on_fetch: Callable[[int], object] = lambda block: None
        self.on_evict: Callable[[int], object] = lambda block: None
        self.on_begin: Callable[[], object] = lambda: None

    def _check(self, is_right: bool, what: str) -> None:
        if not is_right:
            self.wrong.append(what)

    def _note(self, what: str, block: int) -> None:
        self.log.append((what, block))
        used = sum(self.sizes[each] for each in self.present)
        self._check(used <= self.capacity, f"{used} of {self.capacity} bytes after {what} {block}")

    def _move(self, step: int) -> None:
        with self.lock:
            self.moving += step
            self._check(self.moving <= 1, "two moves at once")

    def begin(self) -> None:
        if self.makes_copies:  # what was fetched is forgotten, but for what is under way
            with self.lock:
                self.present &= self.fetching
        self.on_begin()

    def fetch(self, block: int) -> None:
        self._move(1)
        try:
            with self.lock:
                self._check(self.makes_copies or block not in self.present, f"{block} fetched twice")
                self.present.add(block)
                self.fetching.add(block)
                self._note("fetch", block)
            try:
                self.on_fetch(block)
            except BaseException:
                with self.lock:
                    self.present.discard(block)
                raise
            self.fetched[block] += 1
        finally:
            self.fetching.discard(block)
            self._move(-1)

    def enter(self, block: int) -> None:
        with self.lock:
            self._check(block in self.present and block not in self.inside, f"entered {block} that is not there")
            self.inside.add(block)

    def join(self, block: int) -> None:
        with self.lock:
            self._check(block in self.inside, f"joined {block} that nobody entered")
            self.visitors[block] += 1

    def part(self, block: int) -> None:
        with self.lock:
            self.visitors[block] -= 1

    def leave(self, block: int) -> None:
        with self.lock:
            self._check(block in self.inside, f"left {block} that nobody entered")
            self.inside.discard(block)

    def evict(self, block: int) -> int:
        self._move(1)
        try:
            with self.lock:
                self._check(block in self.present and block not in self.inside, f"evicted {block} with somebody inside")
                self._note("evict", block)
            self.on_evict(block)
            with self.lock:
                self.present.discard(block)
                return self.kept[block]
        finally:
            self._move(-1)


def make_schedule(
    sizes: Sequence[int], capacity: int, planned: Sequence[int] | None = None, *, makes_copies: bool = False
) -> tuple[Schedule, FakeMover, ByteRoom]:
    """Put a schedule over a fake mover; blocks are planned in the order of their numbers."""
    mover = FakeMover(sizes, capacity, makes_copies=makes_copies)
    room = ByteRoom(sizes, capacity)
    return Schedule(sizes, room, mover, range(len(sizes)) if planned is None else planned), mover, room
