"""Keep the most resident where not everything fits, exactly; the rest is streamed through a main device.

The main device is one of the accelerators that keep something. There, room is kept free for fetching, and whatever of
the streamed blocks never leaves the device rests there.

Why runs as long as possible are enough. Lengthen a run: what it newly covers was streamed, or began the next run, which
may start later and stays within its budget. Nothing is lost. So the last block of a run follows from the first, and a
state is a position and the set of accelerators left; accelerators of equal budgets are counted, not named. There are
two exceptions. The main device's run may have to be shorter, because what comes to it from streamed blocks depends on
all other runs. So a state has two numbers to make large: the value, and the main device's balance, which is what other
accelerators keep of fixed bytes less the weights in the main run. The balance matters only up to the point where the
main device's budget holds; from there on value alone decides, and nearly always one pair of numbers is left for a
state. And a run before the main device's may have to leave it a block, if it could keep no other. Everything is
integers. `tests/placement` holds all of it against enumeration.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator
from typing import Any

from lading.placement.optimum import Left, Order, Problem, Solution, prefix_sums

_Label = tuple[int, int, Any]
"""What a suffix can be worth: value, the main device's balance, and the runs as a linked list."""
_MOST_ASKED = 32
_Table = list[list[_Label]]
"""For each position the labels of the suffix that begins there, none matched by another in both numbers."""


def keep_most(problem: Problem, accept: Callable[[Solution], bool] | None = None) -> Solution | None:
    """Keep the most value resident where blocks may be streamed; None when no accelerator can keep anything.

    Of equal values the first that is met: with the smallest room for fetching, and runs that begin early.

    Args:
        problem: what to place.
        accept: whether what a solution streams finds a home. Where that is a question, the most valuable runs of a
            single accelerator are asked about, for each size of the largest streamed block; of several accelerators
            those that are worth most.
    """
    search = _Search(problem, accept)
    for room in search.rooms():
        search.try_room(room)
    return search.best


class _Search:
    """Look for the best solution, one size of the largest streamed block after the other. One thread."""

    def __init__(self, problem: Problem, accept: Callable[[Solution], bool] | None) -> None:
        self.problem = problem
        self._accept = accept
        self.order = Order(problem.capacities, in_listed_order=problem.in_listed_order)
        self.weights = prefix_sums(problem.weights)
        self.fixed = prefix_sums(problem.fixed)
        self.values = prefix_sums(problem.values)
        self.num_blocks = len(problem.weights)
        totals = prefix_sums(problem.totals)
        self.ends = [
            [bisect_right(totals, start + capacity) - 1 for start in totals[:-1]] for capacity in self.order.kinds
        ]
        self.best: Solution | None = None

    @property
    def best_value(self) -> int:
        """Give the value found so far, below any that can be found."""
        return self.best.value if self.best is not None else -1

    def rooms(self) -> Iterator[int]:
        """Yield each size that the largest streamed block may have, while it can still lead to something better."""
        problem = self.problem
        by_room = sorted(zip(problem.rooms, problem.totals, strict=True))
        above = sum(total for _, total in by_room)  # what must be resident, because it is larger
        limit, position = sum(problem.capacities), 0
        for room in sorted(set(problem.rooms)):
            while position < len(by_room) and by_room[position][0] <= room:
                above -= by_room[position][1]
                position += 1
            free = limit - problem.num_copies * room
            if free - self.fixed[-1] <= self.best_value:
                return
            if above <= free:
                yield room

    def try_room(self, room: int) -> None:
        """Search with room for streamed blocks up to this size; larger ones must be resident."""
        problem = self.problem
        self.may_stream = [each <= room for each in problem.rooms]
        self.usable = sum(problem.capacities) - problem.num_copies * room
        self._plain: dict[Left, _Table] = {}
        for cuts in (False, True) if len(problem.capacities) > 1 else (False,):
            for main, left in self.order.mains(first_used=problem.main_is_first_used):
                spare = problem.capacities[main] - problem.num_copies * room - self.fixed[-1]
                if spare + self.fixed[-1] >= 0:
                    self._try_main(_MainRun(self, main, spare, cuts=cuts), left)

    def _try_main(self, run: _MainRun, left: Left) -> None:
        for value, _, runs in run.suffixes(left)[0]:
            if value > self.best_value:
                found = self._solution(value, runs, run.main)
                if self._accept is None or self._accept(found):
                    self.best = found
                elif len(self.problem.capacities) == 1:
                    self._try_every_run(run.spare)

    def _try_every_run(self, spare: int) -> None:
        """Ask about runs of the only accelerator, the most valuable first."""
        blocked = [position for position, may in enumerate(self.may_stream) if not may]
        first, last = (blocked[0], blocked[-1] + 1) if blocked else (self.num_blocks - 1, 1)
        weights, values = self.weights, self.values
        runs = [
            (values[end] - values[start], -start, end)
            for start in range(first + 1)
            for end in range(max(last, start + 1), self.num_blocks + 1)
            if 0 < weights[end] - weights[start] <= spare
        ]
        for value, start, end in sorted(runs, reverse=True)[:_MOST_ASKED]:
            if value <= self.best_value:
                return
            found = self._solution(value, (True, 0, -start, end, None), 0)
            if self._accept is None or self._accept(found):
                self.best = found
                return

    def plain(self, left: Left) -> _Table:
        """List what each suffix can be worth with these accelerators, none of them the main one."""
        if left in self._plain:
            return self._plain[left]
        options = [(kind, self.ends[kind], self.plain(rest)) for kind, rest in self.order.next(left)]
        values, fixed = self.values, self.fixed
        behind = self.order.capacity(left)
        table: _Table = [[]] * self.num_blocks + [[(0, 0, None)]]
        for start in range(self.num_blocks - 1, -1, -1):
            enough = self.best_value - min(values[start], self.usable - behind)  # what goes before adds no more
            if min(values[-1] - values[start], behind) <= enough:
                continue
            front: list[_Label] = []
            for kind, ends, after in options:
                end = ends[start]
                if end > start:
                    more, kept = values[end] - values[start], fixed[end] - fixed[start]
                    for value, balance, runs in after[end]:
                        if value + more > enough:
                            run = (False, kind, start, end, runs)
                            front = _with_label(front, (value + more, balance + kept, run))
            if self.may_stream[start]:  # last, so that of equal labels the one that begins its run here stays
                for label in table[start + 1]:
                    if label[0] > enough:
                        front = _with_label(front, label)
            table[start] = front
        self._plain[left] = table
        return table

    def _solution(self, value: int, runs: Any, main: int) -> Solution:
        kinds: list[int] = []
        spans: list[tuple[int, int]] = []
        main_run = 0
        while runs is not None:
            is_main, kind, start, end, runs = runs
            main_run = len(kinds) if is_main else main_run
            kinds.append(kind)
            spans.append((start, end))
        homes: list[int | None] = [None] * self.num_blocks
        names = self.order.name(kinds, main_run, main if self.problem.main_is_first_used else None)
        for device, (start, end) in zip(names, spans, strict=True):
            homes[start:end] = [device] * (end - start)
        return Solution(homes=tuple(homes), main=names[main_run], value=value)


class _MainRun:
    """Place the main device's run among the others. One thread."""

    def __init__(self, search: _Search, main: int, spare: int, *, cuts: bool) -> None:
        self._search = search
        self.main = main
        self.spare = spare
        """What its weights may take when all fixed bytes rest on it; may be below zero."""
        self._kind = search.order.kind_of(main)
        self._cuts = cuts
        """Whether runs are tried that could be longer: last, when a solution is known that few of them can beat."""
        self._tables: dict[Left, _Table] = {}

    def suffixes(self, left: Left) -> _Table:
        """List what each suffix can be worth in which the main device's run stands, with these others.

        The main device holds its weights if in the end its balance is at least ``-spare``.
        """
        if left in self._tables:
            return self._tables[left]
        search, spare = self._search, self.spare
        order, main = search.order, self.main
        options = [
            (
                kind,
                search.ends[kind],
                self.suffixes(rest),
                search.plain(order.after(rest, main)),
            )
            for kind, rest in order.before(left, main)
        ]
        rest = search.plain(order.after(left, main))
        values, fixed = search.values, search.fixed
        behind = order.capacity(left, beside=main) + spare + fixed[-1]
        table: _Table = [[]] * (search.num_blocks + 1)
        for start in range(search.num_blocks - 1, -1, -1):
            enough = search.best_value - min(values[start], search.usable - behind)  # what goes before adds no more
            if min(values[-1] - values[start], behind) <= enough:
                continue
            least = -spare - min(fixed[start], search.usable - behind)  # nor more fixed bytes
            found = self._runs(start, rest)
            for kind, ends, after, alone in options:
                end = ends[start]
                if end > start:
                    more, kept = values[end] - values[start], fixed[end] - fixed[start]
                    found += [
                        (value + more, balance + kept, (False, kind, start, end, runs))
                        for value, balance, runs in after[end]
                    ]
                    if self._cuts:
                        found += self._cut_short(kind, start, end, alone, enough)
            if search.may_stream[start]:
                found += table[start + 1]
            front: list[_Label] = []
            for value, balance, runs in found:
                if value > enough and balance >= least:
                    front = _with_label(front, (value, min(balance, -spare), runs))
            table[start] = front
        self._tables[left] = table
        return table

    def _runs(self, start: int, rest: _Table) -> list[_Label]:
        """List what the main device's run from here is worth with what follows, the longest first."""
        weights, values = self._search.weights, self._search.values
        found: list[_Label] = []
        fixed = self._search.fixed[-1]
        most = weights[start] + self.spare + min(fixed, self._search.usable - self.spare - fixed)
        longest = min(bisect_right(weights, most) - 1, self._search.num_blocks)
        for end in range(longest, start, -1):
            gained, taken = values[end] - values[start], weights[end] - weights[start]
            if not taken or not rest[end]:
                break  # a shorter run leaves no less behind
            for value, kept, runs in rest[end]:
                found.append((gained + value, kept - taken, (True, self._kind, start, end, runs)))
            if rest[end][0][1] - taken >= -self.spare:
                break  # it holds with the most valuable rest: a shorter one is worth no more
        return found

    def _cut_short(self, kind: int, start: int, end: int, rest: _Table, enough: int) -> Iterator[_Label]:
        """Yield runs that could be longer but leave the main device one block, which may be all that it can hold."""
        weights, values, fixed = self._search.weights, self._search.values, self._search.fixed
        for cut in range(end - 1, start, -1):
            more = values[cut + 1] - values[start]
            if not rest[cut + 1] or more + rest[cut + 1][0][0] <= enough:
                return  # nor is an earlier cut worth enough
            taken = weights[cut + 1] - weights[cut]
            if taken:
                kept = fixed[cut] - fixed[start] - taken
                for value, elsewhere, runs in rest[cut + 1]:
                    after = (True, self._kind, cut, cut + 1, runs)
                    yield value + more, elsewhere + kept, (False, kind, start, cut, after)


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
