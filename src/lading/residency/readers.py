"""Bring a file's bytes into memory in the way that is fastest on this machine, found out while reading.

Three ways: fault the pages in and let the kernel read (``populate``); copy them into a small buffer, whose only use is
to fill the page cache (``pread``); the same with the kernel told in advance what comes next (``willneed+pread``). While
a file is cold they take turns, some steps each, for the kernel reads ahead of what is asked for; after that the fastest
stays. No byte is read for the sake of the measurement. What the disk delivered is what the kernel accounts to
the reading thread; where it does not, what was not in the page cache when a step began.

Thread rule: guarded by the schedule: one thread reads at a time.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable
from statistics import median

from lading.checkpoint.pages import Span, populate
from lading.residency.backing import Region

STEP_BYTES = 8 << 20
_TURNS = 2
_TURN_STEPS = 6
_CARRIED_STEPS = 2  # at the beginning of a turn, which may find what the way before it had the kernel read ahead
_MUCH_FASTER = 1.25
"""Than populate, which leaves large folios in the page cache: these are mapped and dropped twice as fast later."""
_AHEAD_BYTES = 2 * STEP_BYTES


class Reader:
    """Read steps of files into memory, and map their pages. See the head of this file.

    Args:
        populate: faults the pages of a span in; 0 or an error number. Others than the kernel's are for tests.
    """

    def __init__(self, populate: Callable[[Span], int] = populate) -> None:
        self._populate = populate
        self._can_populate = True
        self._buffer = bytearray()
        self._rates: dict[str, list[float]] = {"populate": [], "pread": [], "willneed+pread": []}
        self._turn: list[tuple[int, float]] = []
        self._was_cold = False
        self._delivered = _Delivered()
        self.name = "not chosen yet"
        self.cold_bytes = 0
        self.cold_s = 0.0

    def read(self, region: Region, span: Span, end: int) -> None:
        """Have the pages of a span in memory and in this process's tables.

        Args:
            region: where the span stands in its file.
            span: at most a step.
            end: up to which address more will be asked for after it.

        Raises:
            CorruptShardError: the file ends before, or cannot be read.
        """
        descriptor, offset = region.file.descriptor, region.offset_of(span.begin)
        is_cold = descriptor is not None and (self._was_cold or not _is_cached(descriptor, offset))
        way = self._choose() if is_cold else "populate"
        began = time.perf_counter()
        if descriptor is not None and (way != "populate" or (is_cold and not self._can_populate)):
            if way == "willneed+pread":
                ahead = min(_AHEAD_BYTES, end - span.end)
                os.posix_fadvise(descriptor, offset + span.num_bytes, max(1, ahead), os.POSIX_FADV_WILLNEED)
            self._copy(region, span, descriptor, offset)
        self._fault_in(region, span)
        num_bytes = self._delivered.since_last()
        if num_bytes is None:
            num_bytes = span.num_bytes if is_cold and not self._was_cold else 0
            self._was_cold = False
        else:
            self._was_cold = num_bytes > 0
        if num_bytes:
            seconds = time.perf_counter() - began
            self.cold_bytes += num_bytes
            self.cold_s += seconds
            self._note(way, span.num_bytes, seconds)

    def close(self) -> None:
        """Give back what it keeps open."""
        self._delivered.close()

    def _choose(self) -> str:
        if not self._can_populate:
            return "willneed+pread"
        for way, rates in self._rates.items():
            if len(rates) < _TURNS:
                fewest = min(map(len, self._rates.values()))
                if len(rates) == fewest:
                    return way
        return self.name

    def _note(self, way: str, num_bytes: int, seconds: float) -> None:
        rates = self._rates[way]
        if len(rates) < _TURNS and num_bytes >= STEP_BYTES // 2:
            self._turn.append((num_bytes, seconds))
            if len(self._turn) == _TURN_STEPS:
                counted = self._turn[_CARRIED_STEPS:]
                rates.append(sum(size for size, _ in counted) / sum(each for _, each in counted))
                self._turn.clear()
            if all(len(each) == _TURNS for each in self._rates.values()):
                found = {each: median(rates) for each, rates in self._rates.items()}
                best = max(found, key=lambda each: found[each])
                self.name = best if found[best] > _MUCH_FASTER * found["populate"] else "populate"

    def _copy(self, region: Region, span: Span, descriptor: int, offset: int) -> None:
        if not self._buffer:
            self._buffer = bytearray(STEP_BYTES)
        view = memoryview(self._buffer)[: span.num_bytes]
        while view:
            try:
                count = os.preadv(descriptor, [view], offset + span.num_bytes - len(view))
            except OSError as error:
                raise region.file.failure(offset, span.num_bytes, str(error)) from error
            if not count:
                break  # a mapping shows zeros up to the end of the last page
            view = view[count:]

    def _fault_in(self, region: Region, span: Span) -> None:
        if not self._can_populate:
            return
        failure = self._populate(span)
        while failure in (errno.EAGAIN, errno.EINTR):
            failure = self._populate(span)
        if failure == errno.EINVAL:
            self._can_populate, self.name = False, "willneed+pread"
        elif failure:
            raise region.file.failure(region.offset_of(span.begin), span.num_bytes, os.strerror(failure))


class _Delivered:
    """Ask the kernel how many bytes the disk delivered for the calling thread. Guarded as the reader is."""

    def __init__(self) -> None:
        self._asker: tuple[int, int] | None = None
        self._descriptor = -1
        self._last = 0

    def since_last(self) -> int | None:
        """Count since the last call by the same thread, 0 at its first; None where the kernel does not count."""
        asker = os.getpid(), threading.get_ident()
        if asker != self._asker:
            self.close()
            try:
                self._descriptor = os.open("/proc/thread-self/io", os.O_RDONLY | os.O_CLOEXEC)
            except OSError:
                self._descriptor = -1
            self._asker = asker
            self._last = self._count() or 0
            return None if self._descriptor < 0 else 0
        count = self._count()
        if count is None:
            return None
        last, self._last = self._last, count
        return count - last

    def _count(self) -> int | None:
        if self._descriptor < 0:
            return None
        try:
            fields = os.pread(self._descriptor, 512, 0).split()
        except OSError:  # the thread is gone, another has its number
            return None
        return int(fields[fields.index(b"read_bytes:") + 1])

    def close(self) -> None:
        """Give the descriptor back."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor, self._asker = -1, None

    def __del__(self) -> None:
        self.close()


def _is_cached(descriptor: int, offset: int) -> bool:
    try:
        return os.preadv(descriptor, [bytearray(1)], offset, os.RWF_NOWAIT) > 0
    except OSError:  # the read would wait; or the file system cannot tell
        return False
