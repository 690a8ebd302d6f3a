"""Say what fits beside what on the execution device: bytes that add up, or slots with one block each.

Pure bookkeeping, called under the schedule's lock. A room answers which blocks have to make way for another.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from lading.errors import refusal
from lading.units import format_bytes


class Room(Protocol):
    """Keep account of what is on the execution device."""

    used_bytes: int
    lent_bytes: int

    @property
    def lendable_bytes(self) -> int:
        """Give the most that can ever be lent at once, as things stand."""

    def make_way(self, block: int | None, num_bytes: int, idle: Sequence[int]) -> tuple[int, ...] | None:
        """Name the idle blocks to evict first, none if it fits; None if that is not enough."""

    def obstacles(self, block: int | None, leased: Sequence[int]) -> list[int]:
        """Name the blocks with somebody inside that are in the way."""

    def enter(self, block: int) -> None:
        """Count a block in."""

    def cancel(self, block: int) -> None:
        """Undo `enter`: the block did not come."""

    def leave(self, block: int, kept_bytes: int) -> None:
        """Count a block out, but for what had to stay."""

    def take(self, num_bytes: int) -> None:
        """Count lent bytes in."""

    def release(self, num_bytes: int) -> None:
        """Count lent bytes out."""

    def refusal(self, num_bytes: int) -> str:
        """Say why there will never be room."""


class ByteRoom:
    """Let blocks in while their bytes fit a capacity.

    Args:
        sizes: bytes of each block.
        capacity: bytes that may be fetched at once.
    """

    def __init__(self, sizes: Sequence[int], capacity: int) -> None:
        self._sizes = tuple(sizes)
        self.capacity = capacity
        self._kept = [0] * len(self._sizes)
        self._kept_before: dict[int, int] = {}
        """Of the blocks that are in: what was kept of them before."""
        self.used_bytes = 0
        self.lent_bytes = 0

    def make_way(self, block: int | None, num_bytes: int, idle: Sequence[int]) -> tuple[int, ...] | None:
        """Choose from the front of ``idle`` until there is room."""
        own = 0 if block is None else self._kept[block]
        missing = self.used_bytes - own + num_bytes - self.capacity
        way: list[int] = []
        for other in idle:
            if missing <= 0:
                break
            way.append(other)
            missing -= self._sizes[other] - self._kept[other]
        return tuple(way) if missing <= 0 else None

    def obstacles(self, block: int | None, leased: Sequence[int]) -> list[int]:
        """Name all of them: bytes are bytes."""
        return list(leased)

    def enter(self, block: int) -> None:
        """Count a block in; what was edited of it has been there all the time."""
        self.used_bytes += self._sizes[block] - self._kept[block]
        self._kept_before[block], self._kept[block] = self._kept[block], 0

    def cancel(self, block: int) -> None:
        """Undo `enter`: what was edited of it is still there."""
        self.leave(block, self._kept_before[block])

    def leave(self, block: int, kept_bytes: int) -> None:
        """Count a block out, but for what had to stay."""
        del self._kept_before[block]
        self._kept[block] = min(kept_bytes, self._sizes[block])
        self.used_bytes -= self._sizes[block] - self._kept[block]

    def keep(self, block: int, kept_bytes: int) -> None:
        """Correct what is known of an absent block's edited bytes; one that is in counts whole."""
        if block in self._kept_before:
            return
        kept_bytes = min(kept_bytes, self._sizes[block])
        self.used_bytes += kept_bytes - self._kept[block]
        self._kept[block] = kept_bytes

    @property
    def lendable_bytes(self) -> int:
        """Give what edits leave of the capacity."""
        return max(0, self.capacity - self.kept_bytes)

    @property
    def kept_bytes(self) -> int:
        """Count the bytes of absent blocks that stay because they were edited."""
        return sum(self._kept)

    def take(self, num_bytes: int) -> None:
        """Count lent bytes in."""
        self.used_bytes += num_bytes
        self.lent_bytes += num_bytes

    def release(self, num_bytes: int) -> None:
        """Count lent bytes out."""
        self.used_bytes -= num_bytes
        self.lent_bytes -= num_bytes

    def refusal(self, num_bytes: int) -> str:
        """Give the numbers."""
        return refusal(
            "room for fetched weights",
            found=f"{format_bytes(self.capacity)} of which edited weights hold {format_bytes(self.kept_bytes)}, "
            f"{format_bytes(num_bytes)} needed at once",
            expected="room beside the edits, which are in no file",
            way_out="give the execution device more max_memory, or save the model and load it again",
        )


class SlotRoom:
    """Give each block one of a few slots, always the same.

    Args:
        sizes: bytes of each block.
        slots: the slot of each block.
    """

    def __init__(self, sizes: Sequence[int], slots: Sequence[int]) -> None:
        self._sizes = tuple(sizes)
        self._slots = tuple(slots)
        self._occupants: dict[int, int] = {}
        self.used_bytes = 0
        self.lent_bytes = 0

    @property
    def lendable_bytes(self) -> int:
        """Set no limit."""
        return 1 << 62

    def make_way(self, block: int | None, num_bytes: int, idle: Sequence[int]) -> tuple[int, ...] | None:
        """Ask the slot's occupant to go."""
        if block is None:
            return ()
        occupant = self._occupants.get(self._slots[block])
        if occupant is None:
            return ()
        return (occupant,) if occupant in idle else None

    def obstacles(self, block: int | None, leased: Sequence[int]) -> list[int]:
        """Name the occupant of the slot."""
        return [other for other in leased if block is not None and self._slots[other] == self._slots[block]]

    def enter(self, block: int) -> None:
        """Take the slot."""
        self._occupants[self._slots[block]] = block
        self.used_bytes += self._sizes[block]

    def cancel(self, block: int) -> None:
        """Free the slot again."""
        self.leave(block, 0)

    def leave(self, block: int, kept_bytes: int) -> None:
        """Free the slot."""
        del self._occupants[self._slots[block]]
        self.used_bytes -= self._sizes[block]

    def take(self, num_bytes: int) -> None:
        """Lend without a limit: what comes in by use comes into the home, not into a slot."""
        self.lent_bytes += num_bytes

    def release(self, num_bytes: int) -> None:
        """Take back what was lent."""
        self.lent_bytes -= num_bytes

    def refusal(self, num_bytes: int) -> str:
        """Say what cannot happen: a slot's occupant is either idle or has somebody inside."""
        return refusal("a slot", found="nobody in the way", expected="a way", way_out="report this as a bug")
