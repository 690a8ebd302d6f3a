"""Place blocks over accelerators exactly: each accelerator holds one run of neighbours in execution order.

Two problems. `cover` gives every block an accelerator, if that can be done at all. `keep_most` keeps the most where not
everything fits, and leaves the rest to be streamed through the main device, which is the accelerator of the first run:
it keeps free the room for fetching, and whatever of the streamed blocks never leaves the device.

Why runs as long as possible are enough. Lengthen a run: what it newly covers was streamed, or began the next run, which
may start later and stays within its budget. Nothing is lost. So the last block of a run follows from the first, and a
state is a position and the set of accelerators left; accelerators of equal budgets are counted, not named. Only on the
main device may a longer run break the budget of that device for a given rest, because the rest decides how many fixed
bytes come to it; there every shorter run is tried until none can be better. Everything is integers.

Knows bytes and positions; no names, no tensors. Pure functions.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from typing import Any

Left = tuple[int, ...]
"""The accelerators not used yet: how many of each budget, or the first one that may still be used, in a tuple."""
_Label = tuple[int, int, Any]
"""What a suffix can be worth: value, fixed bytes kept off the main device, and its runs as a linked list."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """Blocks in execution order and the accelerators that may keep them. All in bytes. Immutable."""

    weights: Sequence[int]
    """What leaves the execution device while a block is streamed."""
    fixed: Sequence[int]
    """What stays on a block's execution device in any case."""
    rooms: Sequence[int]
    """What one fetched copy of the block takes; 0 for what is never fetched."""
    values: Sequence[int]
    """What it is worth to keep the block resident; at most its weight."""
    capacities: Sequence[int]
    """What each accelerator can hold, in the user's order of preference."""
    num_copies: int = 1
    """For how many fetched copies of the largest streamed block the main device keeps room."""
    in_listed_order: bool = False
    """Whether accelerators follow each other along the model as they are listed."""

    @property
    def totals(self) -> list[int]:
        """Give what each block takes where it is resident."""
        return [weight + fixed for weight, fixed in zip(self.weights, self.fixed, strict=True)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Solution:
    """The accelerator of each block, None where it is streamed through ``main``. Immutable."""

    homes: tuple[int | None, ...]
    main: int
    value: int


class _Order:
    """Say which accelerators may come next: any that is left, or only those listed later.

    Without an order, accelerators of one budget are one kind with several members; what is left is a count for each
    kind. With it, each is a kind of its own; what is left begins at an index.
    """

    def __init__(self, capacities: Sequence[int], *, in_listed_order: bool) -> None:
        self._in_listed_order = in_listed_order
        self.kinds: list[int] = list(capacities) if in_listed_order else list(dict.fromkeys(capacities))
        self._members = [[i for i, each in enumerate(capacities) if each == capacity] for capacity in self.kinds]
        self.start: Left = (0,) if in_listed_order else tuple(map(len, self._members))

    def next(self, left: Left) -> list[tuple[int, Left]]:
        """List each kind that may be used next, in listed order, and what is left then."""
        if self._in_listed_order:
            return [(kind, (kind + 1,)) for kind in range(left[0], len(self.kinds))]
        return [(kind, (*left[:kind], n - 1, *left[kind + 1 :])) for kind, n in enumerate(left) if n]

    def next_member(self, kind: int, left: Left) -> int:
        """Name the accelerator of a kind that is used next: the earliest-listed one left."""
        return kind if self._in_listed_order else self._members[kind][-left[kind]]


def prefix_sums(sizes: Iterable[int]) -> list[int]:
    """Sum from the start: entry ``i`` is the sum of the first ``i`` sizes."""
    return list(accumulate(sizes, initial=0))


def cover(totals: Sequence[int], capacities: Sequence[int], *, in_listed_order: bool = False) -> list[int] | None:
    """Give every block an accelerator; None when that is impossible.

    Of all ways the first in the order of accelerators along the model: the first block on the earliest-listed
    accelerator that leaves the rest possible, then the second block, and so on.
    """
    order = _Order(capacities, in_listed_order=in_listed_order)
    sums, num_blocks = prefix_sums(totals), len(totals)

    @cache
    def reach(left: Left) -> int:
        """Find the first position from which the accelerators left can hold everything."""
        starts = [bisect_left(sums, sums[reach(rest)] - order.kinds[kind]) for kind, rest in order.next(left)]
        return min(starts, default=num_blocks)

    if reach(order.start) > 0:
        return None
    homes: list[int] = []
    left, current, end = order.start, len(capacities), 0
    while len(homes) < num_blocks:
        position = len(homes)
        options = []
        for kind, rest in order.next(left):
            reached = bisect_right(sums, sums[position] + order.kinds[kind]) - 1
            if reached > position and reached >= reach(rest):
                options.append((order.next_member(kind, left), rest, reached))
        first = min(options, default=None)
        if first is not None and (first[0] < current or position == end):
            current, left, end = first
        is_settled = all(order.next_member(kind, left) > current for kind, _ in order.next(left))
        homes.extend([current] * ((end if is_settled else position + 1) - position))
    return homes


def keep_most(problem: Problem, accept: Callable[[Solution], bool] | None = None) -> Solution | None:
    """Keep the most value resident where blocks may be streamed; None when no accelerator can keep anything.

    Of equal values the one whose main device is listed first, with the earliest run.

    Args:
        problem: what to place.
        accept: whether what a solution streams finds a home. Where that is a question, every run of the main device is
            asked about, and of the other accelerators' runs those worth most.
    """
    search = _Search(problem, accept)
    for room in search.rooms():
        search.try_room(room)
    return search.best


class _Search:
    """Look for the best solution, one size of the largest streamed block after the other. One thread."""

    def __init__(self, problem: Problem, accept: Callable[[Solution], bool] | None) -> None:
        self._problem = problem
        self._accept = accept
        self._order = _Order(problem.capacities, in_listed_order=problem.in_listed_order)
        self._weights = prefix_sums(problem.weights)
        self._fixed = prefix_sums(problem.fixed)
        self._values = prefix_sums(problem.values)
        self._num_blocks = len(problem.weights)
        totals = prefix_sums(problem.totals)
        self._ends = [
            [bisect_right(totals, start + capacity) - 1 for start in totals[:-1]] for capacity in self._order.kinds
        ]
        self.best: Solution | None = None

    @property
    def best_value(self) -> int:
        """Give the value found so far, below any that can be found."""
        return self.best.value if self.best is not None else -1

    def rooms(self) -> Iterator[int]:
        """Yield each size that the largest streamed block may have, while it can still lead to something better."""
        problem = self._problem
        by_room = sorted(zip(problem.rooms, problem.totals, strict=True))
        above = sum(total for _, total in by_room)  # what must be resident, because it is larger
        limit, position = sum(problem.capacities), 0
        for room in sorted(set(problem.rooms)):
            while position < len(by_room) and by_room[position][0] <= room:
                above -= by_room[position][1]
                position += 1
            free = limit - problem.num_copies * room
            if free - self._fixed[-1] <= self.best_value:
                return
            if above <= free:
                yield room

    def try_room(self, room: int) -> None:
        """Search with room for streamed blocks up to this size; larger ones must be resident."""
        may_stream = [each <= room for each in self._problem.rooms]
        first_forced = next((i for i, may in enumerate(may_stream) if not may), self._num_blocks)
        tables: dict[Left, list[list[_Label]]] = {}
        for kind, left in self._order.next(self._order.start):
            rest = self._suffixes(left, may_stream, tables)
            spare = self._order.kinds[kind] - self._problem.num_copies * room - self._fixed[-1]
            for start in range(min(first_forced + 1, self._num_blocks)):
                if self._values[-1] - self._values[start] <= self.best_value:
                    break
                self._try_main_run(kind, start, spare, rest)

    def _try_main_run(self, kind: int, start: int, spare: int, rest: list[list[_Label]]) -> None:
        """Try the runs of the main device that begin here, the longest first."""
        weights, values = self._weights, self._values
        most = weights[start] + spare + self._fixed[-1] - self._fixed[start]
        longest = min(bisect_right(weights, most) - 1, self._num_blocks)
        for end in range(longest, start, -1):
            if not rest[end] or weights[end] == weights[start]:
                return  # a shorter run leaves no less behind
            gained = values[end] - values[start]
            if gained + rest[end][0][0] <= self.best_value:
                return
            for value, fixed_elsewhere, runs in rest[end]:
                if weights[end] - weights[start] <= spare + fixed_elsewhere:
                    if gained + value > self.best_value:
                        found = self._solution(gained + value, (kind, start, end, runs))
                        if self._accept is not None and not self._accept(found):
                            continue
                        self.best = found
                    break

    def _suffixes(
        self, left: Left, may_stream: list[bool], tables: dict[Left, list[list[_Label]]]
    ) -> list[list[_Label]]:
        """For each position list what the rest can be worth with these accelerators, the most valuable first."""
        if left in tables:
            return tables[left]
        options = [
            (kind, self._ends[kind], self._suffixes(rest, may_stream, tables)) for kind, rest in self._order.next(left)
        ]
        values, fixed = self._values, self._fixed
        table: list[list[_Label]] = [[]] * self._num_blocks + [[(0, 0, None)]]
        for start in range(self._num_blocks - 1, -1, -1):
            front: list[_Label] = []
            for kind, ends, after in options:
                end = ends[start]
                if end > start:
                    value, kept = values[end] - values[start], fixed[end] - fixed[start]
                    for label in after[end]:
                        front = _with_label(front, (label[0] + value, label[1] + kept, (kind, start, end, label[2])))
            if may_stream[start]:  # last, so that of equal labels the one that begins its run here stays
                for label in table[start + 1]:
                    front = _with_label(front, label)
            table[start] = front
        tables[left] = table
        return table

    def _solution(self, value: int, runs: Any) -> Solution:
        homes: list[int | None] = [None] * self._num_blocks
        left, main = self._order.start, None
        while runs is not None:
            kind, start, end, runs = runs
            device = self._order.next_member(kind, left)
            left = next(rest for each, rest in self._order.next(left) if each == kind)
            homes[start:end] = [device] * (end - start)
            main = device if main is None else main
        assert main is not None
        return Solution(homes=tuple(homes), main=main, value=value)


def _with_label(front: list[_Label], label: _Label) -> list[_Label]:
    """Add a label to those that no other matches in both numbers, the most valuable first; a new list."""
    if not front:
        return [label]
    if len(front) == 1:  # nearly always: what is worth more also keeps more fixed bytes away
        (other,) = front
        if other[0] >= label[0]:
            return front if other[1] >= label[1] else [other, label]
        return [label] if label[1] >= other[1] else [label, other]
    if any(other[0] >= label[0] and other[1] >= label[1] for other in front):
        return front
    kept = [other for other in front if other[0] > label[0] or other[1] > label[1]]
    return sorted([*kept, label], key=lambda each: -each[0]) if kept else [label]
