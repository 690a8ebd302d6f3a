"""Follow each thread's way through the model, and remember the way for the next visit through the same door.

Knows numbers of blocks; not where they are, whether there is room, nor how anybody waits. Guarantees that what is
expected is only a guess: a visit that enters something else goes on as well, and its order is learned instead.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field


class Visit:
    """Follow one thread's outermost call into the model. Used by that thread; read under the schedule's lock."""

    __slots__ = (
        "door",
        "expected",
        "held",
        "is_over",
        "is_repeated",
        "leased",
        "lent_bytes",
        "position",
        "seen",
        "thread_id",
    )

    def __init__(self, door: object, expected: tuple[int, ...], *, is_repeated: bool = False) -> None:
        self.door = door
        self.expected = expected
        self.is_repeated = is_repeated
        """Whether it repeats an earlier one, so that it is likely to be repeated itself."""
        self.position = 0
        """How many of ``expected`` are behind us."""
        self.seen: list[int] = []
        self.held: list[int] = []
        """Blocks entered and not left; only the last is leased."""
        self.leased: int | None = None
        """The block that is kept for this visit; None between blocks, and where fetching the last again failed."""
        self.lent_bytes = 0
        self.thread_id = threading.get_ident()
        self.is_over = False

    def advance(self, block: int) -> None:
        """Note that the visit enters a block, and find where in the expected order it is now."""
        self.seen.append(block)
        try:
            self.position = self.expected.index(block, self.position) + 1
        except ValueError:
            if block in self.expected:
                self.position = self.expected.index(block) + 1

    def forget(self, block: int) -> None:
        """Expect a block no more, nor what is behind us."""
        self.expected = tuple(each for each in self.expected[self.position :] if each != block)
        self.position = 0


@dataclass(slots=True, eq=False)
class Ticket:
    """Hold one thread's wish for a block, or for bytes alone (``block`` is None). Guarded by the schedule's lock."""

    visit: Visit
    block: int | None
    num_bytes: int
    is_granted: bool = False
    error: BaseException | None = None


@dataclass(slots=True)
class Orders:
    """Remember in which order each door's visits entered blocks. Guarded by the schedule's lock."""

    planned: tuple[int, ...]
    learned: dict[object, tuple[int, ...]] = field(default_factory=dict)

    def of(self, door: object, reachable: frozenset[int]) -> tuple[int, ...]:
        """Say what a visit through a door will enter: what the last one did, else what the plan says."""
        known = self.learned.get(door)
        return known if known is not None else tuple(block for block in self.planned if block in reachable)


def upcoming(visits: Sequence[Visit]) -> Iterator[int]:
    """Yield the blocks that visits will enter, the nearest of each visit first.

    After the last of a repeated visit comes the first again, for the next forward: else what it begins with would make
    way, and a cycle through more blocks than there is room for would find none of them. The first visit of all reads
    nothing for one that may never come.
    """
    ahead = [
        visit.expected[visit.position :] + (visit.expected[: visit.position] if visit.is_repeated else ())
        for visit in visits
    ]
    for depth in range(max(map(len, ahead), default=0)):
        for blocks in ahead:
            if depth < len(blocks):
                yield blocks[depth]
