"""Say where a block can be, what moves it, and what is counted of that.

Words alone: knows no schedule, no tensor and no module, and decides nothing. Guarantees that whoever schedules and
whoever moves mean the same by them; each `Mover` keeps what its methods promise here.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Protocol

_FADING = 0.9  # a few dozen blocks tell how fast the next ones come


class State(Enum):
    """Say where a block is between its home and the execution device."""

    ABSENT = "absent"
    FETCHING = "fetching"
    RESIDENT = "resident"
    EVICTING = "evicting"


@dataclass(frozen=True, slots=True)
class Move:
    """Name one thing to do: fetch a block, else evict it. Immutable."""

    block: int
    is_fetch: bool


@dataclass(slots=True)
class Pace:
    """Remember how fast blocks came in lately. One thread notes; any may ask."""

    _num_bytes: float = 0.0
    _seconds: float = 0.0

    def note(self, num_bytes: int, seconds: float) -> None:
        """Count a fetch; what was before counts less each time."""
        self._num_bytes = _FADING * self._num_bytes + num_bytes
        self._seconds = _FADING * self._seconds + seconds

    @property
    def bytes_per_s(self) -> float | None:
        """Give the rate; None before the first fetch."""
        return self._num_bytes / self._seconds if self._seconds else None


class Mover(Protocol):
    """Move blocks between their homes and the execution device."""

    pace: Pace
    """How fast fetches are."""
    makes_copies: bool
    """Whether what is fetched is a copy, which an edit of its home between two forwards makes stale."""

    def begin(self) -> None:
        """Prepare for forwards after a time in which nobody was inside; must not wait."""

    def fetch(self, block: int) -> None:
        """Bring a block to where it can be entered. Blocks; raises what went wrong."""

    def enter(self, block: int) -> None:
        """Make a fetched block usable: the first visitor enters. Must not wait."""

    def join(self, block: int) -> None:
        """Prepare the calling thread, which entered. Must not wait."""

    def part(self, block: int) -> None:
        """Note that the calling thread leaves. Must not wait."""

    def leave(self, block: int) -> None:
        """Undo `enter`: the last visitor left. Must not wait."""

    def evict(self, block: int) -> int:
        """Free a block's memory; gives the bytes that had to stay because they were edited."""


@dataclass(slots=True)
class Counts:
    """Count what happened; guarded by the schedule's lock."""

    fetches: int = 0
    fetched_bytes: int = 0
    evictions: int = 0
    hits: int = 0
    waits: int = 0
    wait_s: float = 0.0
    peak_bytes: int = 0
