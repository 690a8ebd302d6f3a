"""Bring a file's bytes into memory in the way that is fastest on this machine, found out while reading.

Three ways: fault the pages in and let the kernel read (``populate``); copy them into a small buffer, whose only use is
to fill the page cache (``pread``); the same with the kernel told in advance what comes next (``willneed+pread``). The
first steps of a cold file take turns; after that the fastest stays. No byte is read for the sake of the measurement.

Thread rule: guarded by the schedule: one thread reads at a time.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from statistics import median

from lading.checkpoint.pages import Span, populate
from lading.residency.backing import Region

STEP_BYTES = 8 << 20
_TURNS = 4
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
        is_cold = descriptor is not None and not _is_cached(descriptor, offset)
        way = self._choose() if is_cold else "populate"
        began = time.perf_counter()
        if descriptor is not None and (way != "populate" or (is_cold and not self._can_populate)):
            if way == "willneed+pread":
                ahead = min(_AHEAD_BYTES, end - span.end)
                os.posix_fadvise(descriptor, offset + span.num_bytes, max(1, ahead), os.POSIX_FADV_WILLNEED)
            self._copy(region, span, descriptor, offset)
        self._fault_in(region, span)
        if is_cold:
            self._note(way, span.num_bytes, time.perf_counter() - began)

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
        self.cold_bytes += num_bytes
        self.cold_s += seconds
        rates = self._rates[way]
        if len(rates) < _TURNS and num_bytes >= STEP_BYTES // 2:
            rates.append(num_bytes / seconds)
            if all(len(each) == _TURNS for each in self._rates.values()):
                self.name = max(self._rates, key=lambda each: median(self._rates[each]))
        if not self._can_populate:
            self.name = "willneed+pread"

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
            self._can_populate = False
        elif failure:
            raise region.file.failure(region.offset_of(span.begin), span.num_bytes, os.strerror(failure))


def _is_cached(descriptor: int, offset: int) -> bool:
    try:
        return os.preadv(descriptor, [bytearray(1)], offset, os.RWF_NOWAIT) > 0
    except OSError:  # the read would wait; or the file system cannot tell
        return False
