"""Bound what any placement could keep resident, contiguous or not, without the search that found ours.

Whatever is streamed, some block is the largest of it. For each size that this block may have: the accelerators together
hold their budgets less the room for fetching it and less what never leaves them; one block of this size is not
resident; and on each accelerator the weights add up to some sum of block sizes within its budget. The largest of the
smallest of these is an upper bound. It holds for every choice of the main device.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

from lading.placement.optimum import Problem
from lading.placement.packing import subset_sums


def most_resident_bytes(problem: Problem) -> int:
    """Give a number of weight bytes that no valid placement of these blocks can exceed."""
    total, fixed = sum(problem.weights), sum(problem.fixed)
    sums = subset_sums(problem.weights, max(problem.capacities, default=0))
    if _held(problem.capacities, sums) >= total and sum(problem.capacities) >= total + fixed:
        return total
    return max((_with_largest(problem, room, total, fixed, sums) for room in set(problem.rooms)), default=0)


def _with_largest(problem: Problem, room: int, total: int, fixed: int, sums: list[int] | None) -> int:
    """Bound what can be resident when the largest streamed block takes this much room."""
    reserve = problem.num_copies * room
    by_volume = sum(problem.capacities) - reserve - fixed
    sizes = list(zip(problem.weights, problem.rooms, strict=True))
    if sum(weight for weight, each in sizes if each > room) > by_volume:
        return 0  # what is larger must be resident
    left_out = min(weight for weight, each in sizes if each == room)  # one of this size is streamed
    alone = fixed if len(problem.capacities) == 1 else 0  # with several, what is fixed may lie on any of them
    by_sums = max(
        _held([*problem.capacities[:main], capacity - reserve - alone, *problem.capacities[main + 1 :]], sums)
        for main, capacity in enumerate(problem.capacities)
    )
    return max(0, min(by_volume, by_sums, total - left_out))


def _held(capacities: Sequence[int], sums: list[int] | None) -> int:
    """Bound what several budgets hold; a sum of sizes each, where these are known."""
    if sums is None:
        return sum(max(0, capacity) for capacity in capacities)
    return sum(sums[bisect_right(sums, capacity) - 1] for capacity in capacities if capacity >= 0)
