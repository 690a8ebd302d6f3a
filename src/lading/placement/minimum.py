"""Find the least memory with which something works, exact to the byte. Pure functions over integers."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from lading.placement.optimum import Problem, cover, prefix_sums
from lading.placement.streaming import keep_most


def least_for_all(problem: Problem, num_devices: int) -> int:
    """Give the least budget with which several equal devices together keep everything resident."""
    totals = problem.totals
    sums = prefix_sums(totals)

    def runs_suffice(budget: int) -> bool:
        start = 0
        for _ in range(num_devices):
            start = bisect_right(sums, sums[start] + budget) - 1
        return start == len(totals)

    by_runs = least(runs_suffice, max(totals, default=0), sums[-1])
    if num_devices == 1 or all(problem.weights):
        return by_runs
    # what has no weight may also rest on the main device, away from its neighbours
    never = sums[-1] * num_devices + 1
    rooms = [never if weight else 0 for weight in problem.weights]

    def suffices(budget: int) -> bool:
        return keep_most(replace(problem, rooms=rooms, capacities=[budget] * num_devices)) is not None

    return least(lambda budget: runs_suffice(budget) or suffices(budget), -(-sums[-1] // num_devices), by_runs)


def least_useful(problem: Problem) -> int:
    """Give the least budget of a single accelerator with which it keeps at least one block and the rest can stream.

    For each size of the largest streamed block: what is larger must be resident, and so must all between; if nothing is
    larger, the smallest block will do.
    """
    fixed = sum(problem.fixed)
    return min([sum(problem.weights) + fixed, *(kept + fixed + room for kept, _, room in _by_room(problem))])


def likely_needs(problem: Problem) -> list[int]:
    """List budgets one of which is often the least with which an accelerator is of use beside others.

    For each size of the largest streamed block: as the main device, or with what is larger while another fetches.
    """
    fixed = sum(problem.fixed)
    return sorted({need for kept, total, room in _by_room(problem) for need in (kept + fixed + room, total)})


def likely_needs_before(problem: Problem, at_home: Sequence[int], most_streamed: int, device: int) -> list[int]:
    """List budgets one of which is often the least for one accelerator, where few bytes can be streamed.

    For each size of the largest streamed block: the lightest run that leaves no more than that, alone; and what is left
    for this accelerator if the others are full.

    Args:
        problem: with any budget for this accelerator.
        at_home: what each block takes where it is streamed from.
        most_streamed: how much of that there is room for.
        device: which accelerator.
    """
    weights, sizes, fixed = prefix_sums(problem.weights), prefix_sums(at_home), sum(problem.fixed)
    others = sum(problem.capacities) - problem.capacities[device]
    needs = set()
    for first, last, room in _musts(problem):
        found = [
            weights[end] - weights[start]
            for start in range(min(first, len(problem.weights) - 1) + 1)
            for end in [max(last, start + 1, bisect_left(sizes, sizes[-1] - most_streamed + sizes[start]))]
            if end < len(sizes)
        ]
        for lightest in [min(filter(None, found), default=0)]:
            needs |= {lightest + fixed + room, max(0, sizes[-1] - most_streamed + fixed + room - others)}
    return sorted(needs)


def _by_room(problem: Problem) -> Iterator[tuple[int, int, int]]:
    """Yield for each size of the largest streamed block: weights kept, their run's total bytes, room for fetching."""
    weights, totals = prefix_sums(problem.weights), prefix_sums(problem.totals)
    smallest = min((weight for weight in problem.weights if weight), default=0)
    for first, last, room in _musts(problem):
        kept = (weights[last] - weights[first], totals[last] - totals[first]) if last else (smallest, smallest)
        yield *kept, room


def _musts(problem: Problem) -> Iterator[tuple[int, int, int]]:
    """Yield for each size of the largest streamed block: where what is larger begins and ends, room for fetching."""
    by_room = sorted(range(len(problem.rooms)), key=lambda block: -problem.rooms[block])
    first, last, position = len(by_room), 0, 0
    for room in sorted(set(problem.rooms), reverse=True):
        while position < len(by_room) and problem.rooms[by_room[position]] > room:
            first, last = min(first, by_room[position]), max(last, by_room[position] + 1)
            position += 1
        yield first, last, problem.num_copies * room


def least(suffices: Callable[[int], bool], low: int, high: int, guesses: Sequence[int] = ()) -> int:
    """Give the least number from low to high for which a condition holds that holds from there on, and for high.

    Args:
        suffices: the condition.
        low: where to begin.
        high: a number for which it holds.
        guesses: numbers one of which is likely to be the least, ascending: they are tried first.
    """
    while inside := [guess for guess in guesses if low <= guess < high]:
        middle = inside[len(inside) // 2]
        if suffices(middle):
            high = middle
        else:
            low = middle + 1
    if guesses and low < high and not suffices(high - 1):
        return high
    while low < high:
        middle = (low + high) // 2
        if suffices(middle):
            high = middle
        else:
            low = middle + 1
    return high


def leveled(problem: Problem) -> list[int]:
    """Lower the budgets as far as they still hold everything; as they are, if they never do."""
    totals, capacities = problem.totals, list(problem.capacities)

    def clipped(level: int) -> list[int]:
        return [min(level, capacity) for capacity in capacities]

    if cover(totals, capacities) is None:
        return capacities
    low = max(max(totals, default=0), -(-sum(totals) // len(capacities)))
    return clipped(least(lambda level: cover(totals, clipped(level)) is not None, low, max(*capacities, low)))
