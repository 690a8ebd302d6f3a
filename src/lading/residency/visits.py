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
        "awaited",
        "door",
        "expected",
        "held",
        "is_boarding",
        "is_over",
        "is_party",
        "is_repeated",
        "leased",
        "lent_bytes",
        "party",
        "position",
        "seen",
        "thread_id",
        "turn",
    )

    def __init__(
        self, door: object, expected: tuple[int, ...], *, party: Visit | None = None, is_party: bool = False
    ) -> None:
        self.door = door
        self.expected = expected
        self.is_repeated = False
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
        self.party = party
        """The visit of the convoy that this one goes with."""
        self.is_party = is_party
        """Whether it is a convoy's: it enters no block, and no thread's forward stands for it."""
        self.is_boarding = is_party
        """Of a convoy: whether micro-batches may still come that have not met their first block."""
        self.turn = 0
        """How many visits of the same micro-batch came before, in a convoy."""
        self.awaited: int | None = None
        """The block that it waits to enter, in a convoy."""

    @property
    def place(self) -> tuple[int, int, bool]:
        """Say how far it has come in its convoy: visits, blocks in this one, and whether it got into the last."""
        found = self.position if self.awaited is None else self.find(self.awaited)
        return self.turn, max(self.position, found), found <= self.position

    @property
    def sure(self) -> tuple[int, ...]:
        """List what is left to enter, what it waits for first; nothing before a micro-batch's first block."""
        if self.awaited is not None:
            return (self.awaited, *self.expected[self.place[1] :])
        return () if self.party is not None and not self.seen else self.expected[self.position :]

    @property
    def ahead(self) -> tuple[int, ...]:
        """List what is left to enter, and then again what a repeated visit began with."""
        return (*self.sure, *(self.expected[: self.place[1]] if self.is_repeated else ()))

    def find(self, block: int) -> int:
        """Say where in the expected order the visit is when it enters a block; where it is now, if nobody knows."""
        try:
            return self.expected.index(block, self.position) + 1
        except ValueError:
            return self.expected.index(block) + 1 if block in self.expected else self.position

    def advance(self, block: int) -> None:
        """Note that the visit enters a block."""
        self.awaited = None
        self.seen.append(block)
        self.position = self.find(block)

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


def leaders(visits: Sequence[Visit]) -> list[Visit]:
    """List visits, of each convoy only the one that is furthest behind: the others come to the same blocks later."""
    behind: dict[int, Visit] = {}
    for visit in visits:
        if not visit.is_party:
            known = behind.setdefault(id(visit.party or visit), visit)
            if visit.place < known.place:
                behind[id(visit.party)] = visit
    return list(behind.values())


def upcoming(visits: Sequence[Visit]) -> Iterator[int]:
    """Yield the blocks that visits will enter, the nearest of each visit first.

    After the last of a repeated visit comes the first again, for the next forward: else what it begins with would make
    way, and a cycle through more blocks than there is room for would find none of them. The first visit of all reads
    nothing for one that may never come.
    """
    ahead = [visit.ahead for visit in visits]
    for depth in range(max(map(len, ahead), default=0)):
        for blocks in ahead:
            if depth < len(blocks):
                yield blocks[depth]
