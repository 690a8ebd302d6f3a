"""Find the least memory with which something works, exact to the byte. Pure functions over integers."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import replace

from lading.placement.optimum import Problem, prefix_sums
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
    weights, fixed = prefix_sums(problem.weights), sum(problem.fixed)
    candidates = [weights[-1] + fixed]
    by_room = sorted(range(len(problem.rooms)), key=lambda block: -problem.rooms[block])
    first, last, position = len(by_room), 0, 0
    smallest = min((weight for weight in problem.weights if weight), default=0)
    for room in sorted(set(problem.rooms), reverse=True):
        while position < len(by_room) and problem.rooms[by_room[position]] > room:
            first, last = min(first, by_room[position]), max(last, by_room[position] + 1)
            position += 1
        resident = weights[last] - weights[first] if position else smallest
        candidates.append(resident + fixed + problem.num_copies * room)
    return min(candidates)


def least(suffices: Callable[[int], bool], low: int, high: int) -> int:
    """Give the least number from low to high for which a condition holds that holds from there on, and for high."""
    while low < high:
        middle = (low + high) // 2
        if suffices(middle):
            high = middle
        else:
            low = middle + 1
    return high
