"""Map files into memory, and ask the kernel about the pages: bring them in, drop them, tell which were written to.

The only file that calls ``mmap`` and ``madvise`` and reads ``/proc/self/pagemap``. Knows addresses, no tensors. Nothing
here keeps the interpreter's lock while the kernel works, and nothing reads a page itself, so a shortened file is
answered with an error number where a reader would be killed by SIGBUS.

Thread rule: functions without state but for `Pagemap`, which any thread may use.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import logging
import mmap
import os
import weakref
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple, TypeAlias

import numpy as np

from lading import compat

_LOG = logging.getLogger(__name__)
_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_LIBC.mmap.argtypes = (
    *(ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long),
)  # fmt: skip
_LIBC.mmap.restype = ctypes.c_void_p
_LIBC.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_MAP_FAILED = ctypes.c_void_p(-1).value

Mapping: TypeAlias = "ctypes.Array[ctypes.c_char]"
"""The bytes of a mapped file: a buffer that can be written to. Whoever holds it, such as a tensor over it, keeps it."""


def map_private(descriptor: int, num_bytes: int) -> Mapping:
    """Map an open file from its beginning: privately, writable, without swap reserved for it.

    ``mmap.mmap`` would keep a duplicate of the descriptor for as long as the mapping lives, so that a checkpoint of
    hundreds of shards could use up what a process may open. This keeps none. The bytes are unmapped when the last
    holder lets go of them, and not when the interpreter ends, since tensors may live longer.

    Raises:
        OSError: the kernel does not map it: no room for it among the addresses, or a file that cannot be mapped.
    """
    address = _LIBC.mmap(
        None,
        num_bytes,
        mmap.PROT_READ | mmap.PROT_WRITE,
        mmap.MAP_PRIVATE | compat.MAP_NORESERVE,
        descriptor,
        0,
    )
    if address == _MAP_FAILED:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    mapping = (ctypes.c_char * num_bytes).from_address(address)
    weakref.finalize(mapping, _LIBC.munmap, address, num_bytes).atexit = False
    return mapping


class Span(NamedTuple):
    """Name bytes of this process's memory: from ``begin`` up to ``end``, exclusive. Immutable."""

    begin: int
    end: int

    @classmethod
    def of(cls, mapping: Mapping) -> Span:
        """Name all bytes of a mapping."""
        begin = ctypes.addressof(mapping)
        return cls(begin, begin + len(mapping))

    @property
    def num_bytes(self) -> int:
        """Count the bytes."""
        return self.end - self.begin

    def outward(self, grain: int = mmap.PAGESIZE) -> Span:
        """Round to whole pages, or to another grain, so that every byte of it is inside."""
        return Span(self.begin - self.begin % grain, self.end + -self.end % grain)


def merged(spans: list[Span]) -> tuple[Span, ...]:
    """Round spans to pages and join those that touch, in the order of addresses."""
    joined: list[Span] = []
    for span in sorted(span.outward() for span in spans):
        if joined and span.begin <= joined[-1].end:
            joined[-1] = Span(joined[-1].begin, max(joined[-1].end, span.end))
        else:
            joined.append(span)
    return tuple(joined)


def populate(span: Span) -> int:
    """Fault every page in, read from the file where it is not in memory; 0, or an error number.

    ``EFAULT``: the file ends before the span, or cannot be read. ``EINVAL``: this kernel (before 5.14) cannot do it.
    """
    return _advise(span, compat.MADV_POPULATE_READ)


def will_need(span: Span) -> int:
    """Have the kernel begin reading a span's pages into its cache; 0, or an error number."""
    return _advise(span, mmap.MADV_WILLNEED)


def expect_rows(span: Span) -> int:
    """Have the kernel read single pages of a span, not whatever follows them; 0, or an error number."""
    return _advise(span, mmap.MADV_RANDOM)


def expect_anything(span: Span) -> int:
    """Undo `expect_rows`; 0, or an error number."""
    return _advise(span, mmap.MADV_NORMAL)


def drop(span: Span) -> int:
    """Take the pages of a span out of this process at once, edits to them too; 0, or an error number."""
    return _advise(span, mmap.MADV_DONTNEED)


def _advise(span: Span, advice: int) -> int:
    begin, end = span.outward()
    return ctypes.get_errno() if _LIBC.madvise(begin, end - begin, advice) else 0


class _ScanRequest(ctypes.Structure):
    """``struct pm_scan_arg`` of linux/fs.h (6.7)."""

    _fields_ = tuple(
        (name, ctypes.c_uint64)
        for name in (
            "size",
            "flags",
            "start",
            "end",
            "walk_end",
            "vec",
            "vec_len",
            "max_pages",
            "category_inverted",
            "category_mask",
            "category_anyof_mask",
            "return_mask",
        )
    )


class _ScanRegion(ctypes.Structure):
    """``struct page_region`` of linux/fs.h (6.7)."""

    _fields_ = (("start", ctypes.c_uint64), ("end", ctypes.c_uint64), ("categories", ctypes.c_uint64))


def open_pagemap() -> Pagemap | None:
    """Open this process's pagemap; None, with a warning, where it is closed: what was read then stays in memory."""
    try:
        return Pagemap()
    except OSError as error:
        _LOG.warning("weights stay in memory once they were used: /proc/self/pagemap cannot be read (%s)", error)
        return None


_PAGEMAP_SCAN = 3 << 30 | ctypes.sizeof(_ScanRequest) << 16 | ord("f") << 8 | 16
_IS_FILE, _IS_PRESENT, _IS_SWAPPED = 1 << 2, 1 << 3, 1 << 4
_NUM_REGIONS = 512


class Pagemap:
    """Tell which pages of private file mappings are in this process, and which of them were written to.

    Asks ``ioctl(PAGEMAP_SCAN)`` (Linux 6.7), which walks page tables, and before that reads eight bytes a page. A page
    that was written to is the process's own: present and not of the file, or swapped.

    Raises:
        OSError: the kernel does not show it to this process.
    """

    def __init__(self) -> None:
        self._can_scan = True
        self._reopen()

    def _reopen(self) -> None:
        self._pid = os.getpid()
        self._descriptor = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)

    def held(self, span: Span) -> Iterator[tuple[Span, bool]]:
        """Yield the stretches of a span whose pages are here, each with whether they were written to."""
        if os.getpid() != self._pid:  # what a child inherits shows its parent's pages
            os.close(self._descriptor)
            self._reopen()
        span = span.outward()
        if self._can_scan:
            try:
                yield from self._scan(span)
            except OSError as error:
                if error.errno not in (errno.ENOTTY, errno.EINVAL, errno.ENOSYS):
                    raise
                self._can_scan = False
            else:
                return
        yield from self._read(span)

    def edited(self, span: Span) -> tuple[Span, ...]:
        """Give the stretches that were written to."""
        return tuple(stretch for stretch, is_edited in self.held(span) if is_edited)

    def _scan(self, span: Span) -> Iterator[tuple[Span, bool]]:
        regions = (_ScanRegion * _NUM_REGIONS)()
        begin = span.begin
        while begin < span.end:
            request = _ScanRequest(
                size=ctypes.sizeof(_ScanRequest),
                start=begin,
                end=span.end,
                vec=ctypes.addressof(regions),
                vec_len=_NUM_REGIONS,
                category_anyof_mask=_IS_PRESENT | _IS_SWAPPED,
                return_mask=_IS_FILE | _IS_SWAPPED,
            )
            count = fcntl.ioctl(self._descriptor, _PAGEMAP_SCAN, request)
            for region in regions[:count]:
                yield Span(region.start, region.end), not region.categories & _IS_FILE
            begin = request.walk_end

    def _read(self, span: Span) -> Iterator[tuple[Span, bool]]:
        entries = np.empty(span.num_bytes // mmap.PAGESIZE, dtype=np.uint64)
        view = memoryview(entries.data).cast("B")
        done = 0
        while done < entries.nbytes:
            done += os.preadv(self._descriptor, [view[done:]], span.begin // mmap.PAGESIZE * 8 + done)
        is_swapped = entries >> np.uint64(62) & np.uint64(1)
        is_present = entries >> np.uint64(63)
        is_file = entries >> np.uint64(61) & np.uint64(1)
        kinds = np.where(is_present | is_swapped, 1 + (is_swapped | (is_file ^ np.uint64(1))), 0)
        borders = [0, *(np.flatnonzero(np.diff(kinds)) + 1).tolist(), len(kinds)]
        for first, last in pairwise(borders):
            if first < last and kinds[first]:
                yield (
                    Span(span.begin + first * mmap.PAGESIZE, span.begin + last * mmap.PAGESIZE),
                    bool(kinds[first] == 2),
                )
