"""Hold what a residency did so far: a frozen snapshot."""

from __future__ import annotations

from dataclasses import dataclass

from lading.residency.moving import Counts
from lading.residency.readers import Reader
from lading.units import format_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class ResidencyStats:
    """Say what was fetched, how long threads waited, and what is held, since `lading.offload`. Immutable.

    Example:
        >>> import lading, torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64))
        >>> with lading.offload(net, {"": "disk"}) as residency:
        ...     _ = net(torch.ones(1, 64))
        ...     residency.stats().fetches, residency.stats().disk_bytes
        (2, 0)
    """

    fetched_bytes: int
    """Brought to the execution device, whether from the page cache, host memory or the disk."""
    disk_bytes: int
    """Of these, read from a disk: what was not in the page cache."""
    fetches: int
    evictions: int
    hits: int
    """Entries into a block that was there already."""
    waits: int
    wait_s: float
    """Seconds that threads waited for blocks, added up."""
    resident_bytes: int
    """Fetched now."""
    peak_bytes: int
    """The most that was fetched at once."""
    capacity_bytes: int
    """The most that may be."""
    edited_bytes: int
    """Of streamed weights, edited since the file was mapped, as last counted; they stay in memory."""
    spilled_bytes: int
    """Written to a file because they were in none."""
    reader: str
    """How bytes are read: ``populate``, ``pread`` or ``willneed+pread``, chosen by measuring."""
    read_bytes_per_s: float | None
    """The rate of reading from the disk; None before there was any."""

    def __str__(self) -> str:
        rate = "" if self.read_bytes_per_s is None else f" at {format_bytes(int(self.read_bytes_per_s))}/s"
        return (
            f"fetched {format_bytes(self.fetched_bytes)} in {self.fetches} blocks, {format_bytes(self.disk_bytes)} of "
            f"it from disk{rate} (reader: {self.reader}); waited {self.wait_s:.2f} s in {self.waits} of "
            f"{self.hits + self.waits} entries; at most {format_bytes(self.peak_bytes)} of "
            f"{format_bytes(self.capacity_bytes)} at once; {self.evictions} evictions"
        )


def stats_of(  # noqa: PLR0913 - a record in parts
    counts: Counts,
    reader: Reader,
    *,
    resident_bytes: int,
    capacity_bytes: int,
    edited_bytes: int,
    spilled_bytes: int,
) -> ResidencyStats:
    """Put a snapshot together."""
    return ResidencyStats(
        fetched_bytes=counts.fetched_bytes,
        disk_bytes=reader.cold_bytes,
        fetches=counts.fetches,
        evictions=counts.evictions,
        hits=counts.hits,
        waits=counts.waits,
        wait_s=counts.wait_s,
        resident_bytes=resident_bytes,
        peak_bytes=counts.peak_bytes,
        capacity_bytes=capacity_bytes,
        edited_bytes=edited_bytes,
        spilled_bytes=spilled_bytes,
        reader=reader.name,
        read_bytes_per_s=reader.cold_bytes / reader.cold_s if reader.cold_s else None,
    )
