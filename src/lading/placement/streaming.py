"""Keep the most resident where not everything fits, exactly; the rest is streamed through a main device.

The main device is one of the accelerators that keep something. There, room is kept free for fetching, and whatever of
the streamed blocks never leaves the device rests there.

Why runs as long as possible are enough. Lengthen a run: what it newly covers was streamed, or began the next run, which
may start later and stays within its budget. Nothing is lost. So the last block of a run follows from the first, and a
state is a position and the set of accelerators left; accelerators of equal budgets are counted, not named. There are
two exceptions. The main device's run may have to be shorter, because what comes to it from streamed blocks depends on
all other runs. So a state has two numbers to make large: the value, and the main device's balance, which is what other
accelerators keep of fixed bytes less the weights in the main run. And a run before the main device's may have to leave
it a block, if it could keep no other.

How that is fast. If the main device's weights are merely held to a limit, one number per state is left, and `relaxed`
finds it for all positions at once. With the most that the limit can be, that bounds everything from above: most sizes
of the largest streamed block, most main devices and most states are seen to be of no use. With the least that it can
be, a placement is found that nearly always reaches the bound. Only between the two is there a search with both numbers,
in execution order, and states whose bound is not above what is found already are left out. Everything is integers.
`tests/placement` holds all of it against enumeration.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from lading.placement import packing
from lading.placement.optimum import Left, Order, Problem, Solution, prefix_sums
from lading.placement.relaxed import MainSuffixes, Suffixes, Sums

_Label = tuple[int, int, Any]
"""What a prefix is worth: value, the main device's balance, and the runs as a linked list, the last first."""
_State = tuple[Left, bool]
"""The accelerators left, and whether the main device's run has come."""
_Run = tuple[int, int, int]
"""The kind of an accelerator, the first block of its run, and the end."""
_Layer = dict[_State, list[_Label]]
_MOST_ASKED = 32


def keep_most(
    problem: Problem, accept: Callable[[Solution], bool] | None = None, *, above: int = -1
) -> Solution | None:
    """Keep the most value resident where blocks may be streamed; None when no accelerator can keep anything.

    Of equal values the first that is met: with the smallest room for fetching, and runs that begin early.

    Args:
        problem: what to place.
        accept: whether what a solution streams finds a home. Where that is a question, the most valuable runs of a
            single accelerator are asked about, for each size of the largest streamed block; of several accelerators
            those that are worth most.
        above: a value; what is worth no more is not of interest, and None is given where there is nothing else.
    """
    search = _Search(problem, accept, above)
    for room in search.rooms():
        search.try_room(room)
    return search.best


def fill_main(problem: Problem, solution: Solution) -> Solution:
    """Fill what is left of the main device with streamed blocks: they run there anyway, so no change is added."""
    homes, main = list(solution.homes), solution.main
    while not problem.in_listed_order:
        streamed = [home is None for home in homes]
        away = [weight if each else 0 for weight, each in zip(problem.weights, streamed, strict=True)]
        room = max((room for room, each in zip(problem.rooms, streamed, strict=True) if each), default=0)
        here = [home in (None, main) for home in homes]
        taken = sum(total for total, each in zip(problem.totals, here, strict=True) if each) - sum(away)
        left = problem.capacities[main] - taken - problem.num_copies * room
        worth = [value if each else 0 for value, each in zip(problem.values, streamed, strict=True)]
        chosen = packing.choose_by_worth(worth, away, left)
        if not any(size and each for size, each in zip(away, chosen, strict=True)):
            return replace(solution, homes=tuple(homes))
        homes = [main if size and each else home for home, size, each in zip(homes, away, chosen, strict=True)]
    return solution


class _Search:
    """Look for the best solution, one size of the largest streamed block after the other. One thread."""

    def __init__(self, problem: Problem, accept: Callable[[Solution], bool] | None, above: int) -> None:
        self.problem = problem
        self._accept = accept
        self.order = Order(problem.capacities, in_listed_order=problem.in_listed_order)
        self.weights = prefix_sums(problem.weights)
        self.fixed = prefix_sums(problem.fixed)
        self.values = prefix_sums(problem.values)
        self.num_blocks = len(problem.weights)
        self.sums = Sums(problem, self.order)
        self.ends: list[list[int]] = [ends.tolist() for ends in self.sums.ends]
        self.best: Solution | None = None
        self.best_value = above
        """The value found so far, or that is known already."""

    def rooms(self) -> Iterator[int]:
        """Yield each size that the largest streamed block may have, while it can still lead to something better."""
        problem = self.problem
        sizes = sorted(set(problem.rooms))
        total_of, largest_of = dict.fromkeys(sizes, 0), dict.fromkeys(sizes, 0)
        for room, total in zip(problem.rooms, problem.totals, strict=True):
            total_of[room] += total
            largest_of[room] = max(largest_of[room], total)
        musts, largest = {}, {}  # of the blocks that must be resident, because they are larger: all, and the largest
        above = most = 0
        for room in reversed(sizes):
            musts[room], largest[room] = above, most
            above, most = above + total_of[room], max(most, largest_of[room])
        limit, most = sum(problem.capacities), max(problem.capacities, default=0)
        for room in sizes:
            free = limit - problem.num_copies * room
            if free - self.fixed[-1] <= self.best_value:
                return
            if musts[room] <= free and largest[room] <= most:
                yield room

    def try_room(self, room: int) -> None:
        """Search with room for streamed blocks up to this size; larger ones must be resident."""
        problem = self.problem
        fits = self.sums.rooms <= room
        self.may_stream: list[bool] = fits.tolist()
        self.suffixes = Suffixes(self.sums, self.order, fits)
        self.usable = sum(problem.capacities) - problem.num_copies * room
        tried = []
        for main, left in self.order.mains(first_used=problem.main_is_first_used):
            spare = problem.capacities[main] - problem.num_copies * room - self.fixed[-1]
            run = _MainRun(self, main, spare, left)
            if run.most_weights >= self._least_weight and run.bound > self.best_value:
                run.try_least()
                tried.append(run)
        for cuts in (False, True) if len(problem.capacities) > 1 else (False,):
            for run in tried:
                if run.bound > self.best_value:
                    self._try_labels(run, run.labels(cuts=cuts))

    @property
    def _least_weight(self) -> int:
        """Give the least that a main device must keep."""
        return min((weight for weight in self.problem.weights if weight), default=1)

    def _try_labels(self, run: _MainRun, labels: list[_Label]) -> None:
        for value, _, runs in labels:
            is_refused = value > self.best_value and not self.offer(value, runs, run.main)
            if is_refused and len(self.problem.capacities) == 1:
                self._try_every_run(run.spare)

    def offer(self, value: int, runs: Any, main: int) -> bool:
        """Take a solution that is worth more than what is known, if what it streams finds a home."""
        found = self._solution(value, runs, main)
        if self._accept is None or self._accept(found):
            self.best, self.best_value = found, value
            return True
        return False

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
            if value <= self.best_value or self.offer(value, (True, 0, -start, end, None), 0):
                return

    def _solution(self, value: int, runs: Any, main: int) -> Solution:
        kinds: list[int] = []
        spans: list[tuple[int, int]] = []
        main_run = 0
        while runs is not None:
            is_main, kind, start, end, runs = runs
            main_run = len(kinds) if is_main else main_run
            kinds.append(kind)
            spans.append((start, end))
        main_run = len(kinds) - 1 - main_run
        homes: list[int | None] = [None] * self.num_blocks
        names = self.order.name(kinds[::-1], main_run, main if self.problem.main_is_first_used else None)
        for device, (start, end) in zip(names, reversed(spans), strict=True):
            homes[start:end] = [device] * (end - start)
        return Solution(homes=tuple(homes), main=names[main_run], value=value)


class _MainRun:
    """Place one main device's run among the others. One thread."""

    def __init__(self, search: _Search, main: int, spare: int, left: Left) -> None:
        self._search = search
        self.main = main
        self.spare = spare
        """What its weights may take when all fixed bytes rest on it; may be below zero."""
        self._left = left
        self._kind = search.order.kind_of(main)
        fixed = search.fixed[-1]
        self._beside = search.order.capacity(left, beside=main)
        self.most_weights = spare + min(fixed, self._beside) if spare + fixed >= 0 else -1
        """What its weights may take when the others keep as many fixed bytes as they could."""
        self._above: MainSuffixes | None = None
        self._layers: dict[int, _Layer] = {}

    @property
    def bound(self) -> int:
        """Bound the value that can be reached; negative where that is nothing."""
        if self._above is None:
            self._above = self._suffixes(self.most_weights)
        return int(self._above.table(self._left)[0])

    def _suffixes(self, limit: int) -> MainSuffixes:
        search = self._search
        return MainSuffixes(search.suffixes, search.sums, search.order, self.main, limit)

    def try_least(self) -> None:
        """Offer the best solution that holds wherever fixed bytes rest."""
        search = self._search
        if self.spare <= 0:
            return
        below = self._above if self.spare == self.most_weights else self._suffixes(self.spare)
        assert below is not None, "the bound is asked for first"
        value = int(below.table(self._left)[0])
        if value > search.best_value:
            runs, is_main_used = self._walk(below)
            if is_main_used:
                search.offer(value, runs, self.main)

    def _walk(self, tables: MainSuffixes) -> tuple[Any, bool]:
        """Follow the numbers from the start; of what is as good, the main run first, the listed order, a run now."""
        search, order, main = self._search, self._search.order, self.main
        values, weights = search.values, search.weights
        main_ends = tables.ends.tolist()
        position, left, has_come = 0, self._left, False
        runs: Any = None
        table = tables.table_list(left)
        while position < search.num_blocks:
            wanted = table[position]
            options = []
            if not has_come:
                end = main_ends[position]
                if weights[end] > weights[position]:
                    after = order.after(left, main)
                    options.append((True, self._kind, end, after, search.suffixes.plain_list(after)))
            for kind, rest in order.next(left) if has_come else order.before(left, main):
                end = search.ends[kind][position]
                if end > position:
                    behind = search.suffixes.plain_list(rest) if has_come else tables.table_list(rest)
                    options.append((False, kind, end, rest, behind))
            for is_main, kind, end, rest, behind in options:
                if values[end] - values[position] + behind[end] == wanted:
                    runs = (is_main, kind, position, end, runs)
                    position, left, has_come, table = end, rest, has_come or is_main, behind
                    break
            else:
                if not search.may_stream[position] or table[position + 1] != wanted:
                    return runs, False
                position += 1
        return runs, has_come

    def labels(self, *, cuts: bool) -> list[_Label]:
        """List what whole placements are worth that could be better than the best known, the most valuable first.

        Args:
            cuts: whether runs are tried too that could be longer: last, as few of them can beat what is known then.
        """
        self._layers = {0: {(self._left, False): [(0, 0, None)]}}
        search = self._search
        for position in range(search.num_blocks):
            for (left, has_come), found in self._layers.pop(position, {}).items():
                front = _front(found)
                if has_come:
                    self._extend_after(position, left, front)
                else:
                    self._extend_before(position, left, front, cuts=cuts)
        ends = self._layers.get(search.num_blocks, {})
        return _front([label for (_, has_come), found in ends.items() if has_come for label in found])

    def _extend_after(self, start: int, left: Left, front: list[_Label]) -> None:
        """Go on from a position where the main device's run has come."""
        search = self._search
        for kind, rest in search.order.next(left):
            end = search.ends[kind][start]
            if end > start:
                self._add_run((rest, True), search.suffixes.plain_list(rest), (kind, start, end), front)
        if search.may_stream[start]:
            self._add(start + 1, (left, True), search.suffixes.plain_list(left), front)

    def _extend_before(self, start: int, left: Left, front: list[_Label], *, cuts: bool) -> None:
        """Go on from a position where the main device's run has not come yet."""
        search, main, above = self._search, self.main, self._above
        assert above is not None, "the bound is asked for first"
        after = search.order.after(left, main)
        self._add_main_runs(start, after, front)
        for kind, rest in search.order.before(left, main):
            end = search.ends[kind][start]
            if end > start:
                self._add_run((rest, False), above.table_list(rest), (kind, start, end), front)
                if cuts:
                    self._cut_short((kind, start, end), search.order.after(rest, main), front)
        if search.may_stream[start]:
            self._add(start + 1, (left, False), above.table_list(left), front)

    def _add_main_runs(self, start: int, after: Left, front: list[_Label]) -> None:
        """Add the main device's run from here, the longest first."""
        search, weights, values = self._search, self._search.weights, self._search.values
        rest, most = search.suffixes.plain_list(after), search.order.capacity(after)
        for value, kept, runs in front:
            room = self.spare + kept  # for its weights, if nothing else is kept elsewhere
            later = min(search.fixed[-1] - search.fixed[start], most)
            for end in range(bisect_right(weights, weights[start] + room + later) - 1, start, -1):
                taken = weights[end] - weights[start]
                if not taken or value + values[end] - values[start] + rest[end] <= search.best_value:
                    break  # a shorter run leaves no less behind
                run = (True, self._kind, start, end, runs)
                label = (value + values[end] - values[start], kept - taken, run)
                self._add(end, (after, True), rest, [label])
                if taken <= room:
                    break  # it holds whatever follows: a shorter one is worth no more

    def _cut_short(self, run: _Run, after: Left, front: list[_Label]) -> None:
        """Add runs that could be longer but leave the main device one block, which may be all that it can hold."""
        search, (kind, start, end) = self._search, run
        weights, values, fixed = search.weights, search.values, search.fixed
        rest, most = search.suffixes.plain_list(after), search.order.capacity(after)
        for value, kept, runs in front:
            for cut in range(end - 1, start, -1):
                more = value + values[cut + 1] - values[start]
                if more + rest[cut + 1] <= search.best_value:
                    break  # nor is an earlier cut worth enough
                taken = weights[cut + 1] - weights[cut]
                balance = kept + fixed[cut] - fixed[start] - taken
                if taken and balance + min(fixed[-1] - fixed[cut + 1], most) >= -self.spare:
                    both = (True, self._kind, cut, cut + 1, (False, kind, start, cut, runs))
                    self._add(cut + 1, (after, True), rest, [(more, balance, both)])

    def _add_run(self, state: _State, bound: list[int], run: _Run, front: list[_Label]) -> None:
        search, (kind, start, end) = self._search, run
        more, kept = search.values[end] - search.values[start], search.fixed[end] - search.fixed[start]
        longer = [(value + more, balance + kept, (False, kind, start, end, runs)) for value, balance, runs in front]
        self._add(end, state, bound, longer)

    def _add(self, position: int, state: _State, bound: list[int], labels: list[_Label]) -> None:
        """Add labels to a state, but for those that cannot lead to anything better than what is known."""
        search, (left, has_come) = self._search, state
        enough, least = search.best_value - bound[position], -self.spare
        if bound[position] < 0:
            return
        if has_come:
            least -= min(search.fixed[-1] - search.fixed[position], search.order.capacity(left))
            kept = [(v, min(b, -self.spare), runs) for v, b, runs in labels if v > enough and b >= least]
        else:
            kept = [label for label in labels if label[0] > enough]
        if kept:
            self._layers.setdefault(position, {}).setdefault(state, []).extend(kept)


def _front(labels: list[_Label]) -> list[_Label]:
    """Keep what no other matches in both numbers, the most valuable first; of equal ones the first that was met."""
    if len(labels) == 1:
        return labels
    front: list[_Label] = []
    for label in sorted(labels, key=lambda each: (-each[0], -each[1])):
        if not front or label[1] > front[-1][1]:
            front.append(label)
    return front
