"""Say where streamed blocks rest: host memory first, fetched ones before all, and the disk behind it.

Knows bytes and positions; no names, no tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from lading.placement import packing
from lading.placement.minimum import least
from lading.placement.optimum import Solution


@dataclass(frozen=True, slots=True, kw_only=True)
class Homes:
    """Hold the room behind the devices that run a model, and what each block takes of it. Immutable."""

    sizes: Sequence[int]
    """What each block takes at home, if it is streamed; 0 for those that never are."""
    are_fetched: Sequence[bool]
    """Whether a block is fetched as a whole, so that being near gains most."""
    host_bytes: int
    disk_bytes: int | None
    """None: no limit."""

    def streamed(self, solution: Solution) -> list[int]:
        """Give what each block takes at home; 0 for those that are resident."""
        return [size if home is None else 0 for size, home in zip(self.sizes, solution.homes, strict=True)]

    def suffice(self, solution: Solution) -> bool:
        """Say whether everything that a solution streams finds a home."""
        streamed, disk_bytes = self.streamed(solution), self.disk_bytes
        if disk_bytes is None or packing.fit_simply(streamed, self.host_bytes, disk_bytes):
            return True
        return sum(streamed) <= self.host_bytes + disk_bytes and self.pack(solution) is not None

    def pack(self, solution: Solution) -> list[bool] | None:
        """Choose for each block whether it rests in host memory if it is streamed; None where there is no room."""
        streamed = self.streamed(solution)
        least_in_host = 0 if self.disk_bytes is None else max(0, sum(streamed) - self.disk_bytes)
        if least_in_host > self.host_bytes:
            return None
        near = packing.choose_by_worth(self.are_fetched, streamed, self.host_bytes)
        if sum(size for size, chosen in zip(streamed, near, strict=True) if chosen) >= least_in_host:
            return near
        return packing.choose(streamed, self.host_bytes, least_in_host)

    @property
    def most_bytes(self) -> int | None:
        """Give the most that could be streamed; None for no limit."""
        return None if self.disk_bytes is None else self.host_bytes + self.disk_bytes

    def least_kept(self, weights: Sequence[int]) -> int:
        """Give a number of weight bytes that must be resident, because there is no room behind; 0 for none."""
        if self.most_bytes is None:
            return 0
        beside = sum(size - weight for size, weight in zip(self.sizes, weights, strict=True) if weight)
        return max(0, sum(self.sizes) - self.most_bytes - beside)


class LeastRoom:
    """Find how large host memory or the disk must be for one of several solutions, as they are offered. One thread."""

    def __init__(self, homes: Homes, *, of_disk: bool) -> None:
        self._homes = homes
        self._of_disk = of_disk
        self.least: int | None = None
        """The least that is known to do."""

    def refuse(self, solution: Solution) -> bool:
        """Look at a solution, and ask for the next one."""
        homes = self._homes
        size, other = homes.host_bytes, homes.disk_bytes or 0
        if self._of_disk:
            size, other = other, size
        streamed = homes.streamed(solution)
        total = sum(streamed)
        low, high = max(size, total - other), max(size, total) if self.least is None else self.least - 1
        if low <= high and self._suffices(high, solution):
            full = packing.choose(streamed, other) or []  # the other one, filled as well as can be
            beside = total - sum(size for size, chosen in zip(streamed, full, strict=False) if chosen)
            self.least = least(lambda room: self._suffices(room, solution), low, high, [low, max(low, beside)])
        return False

    def _suffices(self, room: int, solution: Solution) -> bool:
        changed = {"disk_bytes" if self._of_disk else "host_bytes": room}
        return replace(self._homes, **changed).suffice(solution)  # type: ignore[arg-type] # one of two integers
