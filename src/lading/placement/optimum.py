"""Say what is to be placed over accelerators, and keep everything resident where that can be.

Each accelerator holds one run of neighbours in execution order. `cover` gives every block an accelerator, exactly: a
run may always be as long as possible, so the positions from which a set of accelerators can hold the rest are known
from the end backwards. `streaming` keeps the most where not everything fits. Knows bytes and positions; no names, no
tensors. Pure functions.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate

Left = tuple[int, ...]
"""The accelerators not used yet: how many of each budget, or the first one that may still be used, in a tuple."""


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
    main_is_first_used: bool = False
    """Whether blocks are streamed through the earliest-listed accelerator that keeps something, not through any."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "capacities", [max(0, capacity) for capacity in self.capacities])

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


class Order:
    """Say which accelerators may come next: any that is left, or only those listed later.

    Without an order, accelerators of one budget are one kind with several members; what is left is a count for each
    kind. With it, each is a kind of its own; what is left begins at an index.
    """

    def __init__(self, capacities: Sequence[int], *, in_listed_order: bool) -> None:
        self._in_listed_order = in_listed_order
        self._capacities = capacities
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

    def capacity(self, left: Left, beside: int = -1) -> int:
        """Add up what the accelerators left can hold, beside one that is set apart."""
        if self._in_listed_order:
            return sum(capacity for kind, capacity in enumerate(self.kinds) if kind >= left[0] and kind != beside)
        return sum(capacity * count for capacity, count in zip(self.kinds, left, strict=True))

    def mains(self, *, first_used: bool) -> Iterator[tuple[int, Left]]:
        """Yield accelerators that could be the main one, and what is left beside each; those as good as another not."""
        for device, capacity in enumerate(self._capacities):
            if self._in_listed_order:
                yield device, (device if first_used else 0,)
            elif capacity not in self._capacities[:device]:
                others = list(self._capacities[device + 1 :] if first_used else self._capacities)
                if not first_used:
                    others.remove(capacity)
                yield device, tuple(others.count(kind) for kind in self.kinds)

    def kind_of(self, device: int) -> int:
        """Give the kind of an accelerator."""
        return device if self._in_listed_order else self.kinds.index(self._capacities[device])

    def before(self, left: Left, main: int) -> list[tuple[int, Left]]:
        """List the kinds whose run may come next where the main device's comes later."""
        return [each for each in self.next(left) if not self._in_listed_order or each[0] < main]

    def after(self, left: Left, main: int) -> Left:
        """Say what is left once the main device's run has come."""
        return (main + 1,) if self._in_listed_order else left

    def name(self, kinds: Sequence[int], main_run: int, first: int | None) -> list[int]:
        """Give an accelerator to each run by its kind, in listed order; the first of all to the main run, if named."""
        if self._in_listed_order:
            return list(kinds)
        allowed = -1 if first is None else first
        members = [iter([device for device in group if device > allowed]) for group in self._members]
        return [
            first if first is not None and run == main_run else next(members[kind]) for run, kind in enumerate(kinds)
        ]


def prefix_sums(sizes: Iterable[int]) -> list[int]:
    """Sum from the start: entry ``i`` is the sum of the first ``i`` sizes."""
    return list(accumulate(sizes, initial=0))


def cover(totals: Sequence[int], capacities: Sequence[int], *, in_listed_order: bool = False) -> list[int] | None:
    """Give every block an accelerator; None when that is impossible.

    Of all ways the first in the order of accelerators along the model: the first block on the earliest-listed
    accelerator that leaves the rest possible, then the second block, and so on.
    """
    order = Order([max(0, capacity) for capacity in capacities], in_listed_order=in_listed_order)
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
