"""Choose which of several sizes to keep in a limited room: sums of subsets, exactly where that is affordable.

Blocks come in few sizes, so their sums do too; beyond `MOST_SUMS` different ones a greedy choice answers, which leaves
less room unused than the smallest block left out. Pure functions over integers.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence

MOST_SUMS = 4_000


def subset_sums(sizes: Sequence[int], limit: int) -> list[int] | None:
    """List every sum up to a limit that some of the sizes have, ascending; None when there are too many."""
    sums = {0}
    for size, count in Counter(size for size in sizes if size).items():
        reached = sums
        for _ in range(count):  # only from sums that are new: those known need fewer of this size
            reached = {total + size for total in reached if total + size <= limit} - sums
            sums = sums | reached
            if len(sums) > MOST_SUMS:
                return None
            if not reached:
                break
    return sorted(sums)


def choose(sizes: Sequence[int], limit: int, least: int = 0) -> list[bool] | None:
    """Choose sizes with the largest sum up to a limit; the earlier of two equal sizes first.

    Args:
        sizes: bytes of each block.
        limit: the room.
        least: the least sum that is of use.

    Returns:
        For each size whether it is chosen; None when no choice was found whose sum lies between least and limit.
    """
    if sum(sizes) < least or limit < 0:
        return None
    if sum(sizes) <= limit:
        return [True] * len(sizes)
    sums = subset_sums(sizes, limit)
    target = sums[bisect_right(sums, limit) - 1] if sums else None
    wanted = _largest_first(sizes, limit) if target is None else _with_sum(sizes, target)
    left, chosen = Counter(wanted), []
    for size in sizes:
        chosen.append(size == 0 or left[size] > 0)
        left[size] -= 1
    return chosen if sum(wanted) >= least else None


def fit_simply(sizes: Sequence[int], one: int, other: int) -> bool:
    """Say whether sizes fit in two rooms if the first is filled with the largest first; if not, they may fit yet."""
    return sum(sizes) - sum(_largest_first(sizes, one)) <= other


def choose_by_worth(worths: Sequence[int], sizes: Sequence[int], limit: int) -> list[bool]:
    """Choose sizes for a limited room: first of those that are worth something, then of the others."""
    preferred = [size if worth else 0 for worth, size in zip(worths, sizes, strict=True)]
    one = choose(preferred, limit) or [False] * len(sizes)
    left = limit - sum(size for size, chosen in zip(preferred, one, strict=True) if chosen)
    others = [size - each for size, each in zip(sizes, preferred, strict=True)]
    two = choose(others, left) or [False] * len(sizes)
    return [a and b for a, b in zip(one, two, strict=True)]


def _largest_first(sizes: Sequence[int], limit: int) -> list[int]:
    chosen = []
    for size in sorted(sizes, reverse=True):
        if size <= limit:
            chosen.append(size)
            limit -= size
    return chosen


def _with_sum(sizes: Sequence[int], target: int) -> list[int]:
    """Find sizes with this sum, which some have: one kind of size after the other."""
    kinds = sorted(Counter(size for size in sizes if size).items())
    before = [
        subset_sums([size for size, count in kinds[:known] for _ in range(count)], target) or []
        for known in range(len(kinds))
    ]
    chosen: list[int] = []
    for (size, count), reachable in zip(reversed(kinds), reversed(before), strict=True):
        known = set(reachable)
        times = next(n for n in range(count, -1, -1) if target - n * size in known)
        chosen += [size] * times
        target -= times * size
    return chosen
