"""Read what the kernel knows about a process and a file: memory, bytes read, faults, pages in the page cache.

Knows no model and no loader; standard library only, so that every measured process can import it at no cost. All sizes
in bytes, all times in seconds of ``time.monotonic``, which processes of one machine share. Linux.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import resource
import threading
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
_MAX_RESIDENT_SHARE = 0.01
MiB = 2**20


class EvictionError(OSError):
    """Say that a file stays in the page cache, so that nothing cold can be measured on it."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Hold a process's resident memory at one moment. Immutable."""

    anonymous_bytes: int
    file_bytes: int
    """Mapped pages of files, shared memory too."""
    peak_bytes: int
    """The largest sum of both since the process began, or since `reset_peak`."""

    @property
    def total_bytes(self) -> int:
        """Add both kinds."""
        return self.anonymous_bytes + self.file_bytes


def memory_of(pid: int | str = "self") -> Memory:
    """Read a process's resident memory; takes no lock of the process that is looked at."""
    fields = _fields(f"/proc/{pid}/status")
    return Memory(
        anonymous_bytes=fields["RssAnon"],
        file_bytes=fields["RssFile"] + fields["RssShmem"],
        peak_bytes=fields["VmHWM"],
    )


def proportional_bytes_of(pid: int | str = "self") -> int:
    """Read a process's Pss: each page divided by the number of processes that map it."""
    return _fields(f"/proc/{pid}/smaps_rollup")["Pss"]


def _fields(path: str) -> dict[str, int]:
    """Read the lines ``Name:  123 kB`` of a file of /proc, in bytes."""
    lines = Path(path).read_text(encoding="ascii").splitlines()
    named = (line.split(":", 1) for line in lines if line.endswith(" kB"))
    return {name: int(value.split()[0]) * 1024 for name, value in named}


def reset_peak() -> None:
    """Begin a new peak of this process's resident memory."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def read_bytes() -> int:
    """Count the bytes this process had the disk read, read-ahead included; 0 where the kernel does not count."""
    try:
        lines = Path("/proc/self/io").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return int(dict(line.split(": ") for line in lines)["read_bytes"])


def major_faults() -> int:
    """Count this process's waits for a page to come from disk."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_majflt


class PeakSampler:
    """Watch another process's memory from outside, every millisecond, so that the watched one is not slowed.

    Use as a context manager around the time of interest; samples are kept with their times, because only the watched
    process knows when its phases began. The thread is the only writer; read after the context was left.

    Args:
        pid: whom to watch.
        cores: where the watching thread may run; empty means anywhere.
        interval_s: time between two samples.
    """

    def __init__(self, pid: int, cores: Collection[int] = (), interval_s: float = 0.001) -> None:
        self._pid = pid
        self._cores = cores
        self._interval_s = interval_s
        self._done = threading.Event()
        self._samples: list[tuple[float, Memory]] = []
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakSampler:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        if self._cores:
            os.sched_setaffinity(0, self._cores)  # of this thread alone
        while not self._done.wait(self._interval_s):
            try:
                self._samples.append((time.monotonic(), memory_of(self._pid)))
            except (OSError, KeyError):  # it ended, or is ending: no memory any more
                return

    def peaks(self, begin_s: float, end_s: float) -> tuple[int, int]:
        """Give the largest anonymous and the largest file memory seen in a span of time; 0 where none was seen."""
        seen = [memory for moment, memory in self._samples if begin_s <= moment <= end_s]
        return max((m.anonymous_bytes for m in seen), default=0), max((m.file_bytes for m in seen), default=0)


def resident_share(path: Path) -> float:
    """Give the share of a file's pages that are in the page cache, without touching any (mincore)."""
    num_bytes = path.stat().st_size
    if num_bytes == 0:
        return 0.0
    with path.open("rb") as file:
        mapping = mmap.mmap(file.fileno(), num_bytes, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    pages = (ctypes.c_ubyte * -(-num_bytes // mmap.PAGESIZE))()
    first = ctypes.c_char.from_buffer(mapping)
    failed = _LIBC.mincore(ctypes.addressof(first), num_bytes, ctypes.addressof(pages))
    del first
    mapping.close()
    if failed:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(path))
    return sum(page & 1 for page in bytes(pages)) / len(pages)


def evict(paths: list[Path], patience_s: float = 5) -> None:
    """Drop files from the page cache and prove it; tries again while reads of a process that ended are under way.

    Raises:
        EvictionError: pages stay, because the file system lives in memory or another process maps the file.
    """
    for path in paths:
        end_s = time.monotonic() + patience_s
        while (share := _drop(path)) > _MAX_RESIDENT_SHARE:
            if time.monotonic() > end_s:
                raise EvictionError(f"{path.name}: {share:.0%} of its pages stay in the page cache after eviction")
            time.sleep(0.05)


def _drop(path: Path) -> float:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fdatasync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)
    return resident_share(path)


def warm_up(paths: list[Path]) -> None:
    """Read files once, so that their pages are in the page cache, and prove it.

    Raises:
        EvictionError: they did not stay, because memory has no room for them.
    """
    copy_out(paths)
    for path in paths:
        share = resident_share(path)
        if path.stat().st_size and share < 1 - _MAX_RESIDENT_SHARE:
            raise EvictionError(f"{path.name}: only {share:.0%} of its pages stay in the page cache after reading it")


def fill_page_cache(paths: list[Path], step_bytes: int = 128 * MiB) -> None:
    """Bring files into the page cache as fast as the kernel can, copying nothing to anywhere.

    Asks for everything, then waits by reading one byte of each 64 KiB. No slower than the other readers compared here:
    `os.preadv` by 1, 2 and 4 threads, with and without O_DIRECT, and populating a mapping.
    """
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        num_bytes = os.fstat(descriptor).st_size
        try:
            for offset in range(0, num_bytes, step_bytes):
                os.posix_fadvise(descriptor, offset, step_bytes, os.POSIX_FADV_WILLNEED)
            for offset in range(0, num_bytes, 1 << 16):
                os.pread(descriptor, 1, offset)
        finally:
            os.close(descriptor)


def copy_out(paths: list[Path], window_bytes: int = 8 * MiB) -> None:
    """Copy files out of the page cache into one buffer that is used again and again."""
    buffer = mmap.mmap(-1, window_bytes)
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
