"""Bound what the rest of a model can be worth, when the main device may hold a fixed number of weight bytes.

The search in `streaming` has two numbers to make large. Here the second is given away: with a limit to the weights in
the main device's run, the best value of every suffix is a number, and the numbers of a whole model are one array. With
the most that the limit could be, these bound every solution from above; with the least, they are reached. Exact
integers: int64 where nothing can overflow, Python's own beyond. Knows sums and kinds of accelerators; no names.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from lading.placement.optimum import Left, Order, Problem, prefix_sums

_LARGEST = 2**62


class Sums:
    """Hold a problem's prefix sums as arrays, and where the longest run of each kind of accelerator ends. Immutable."""

    def __init__(self, problem: Problem, order: Order) -> None:
        totals, num_blocks = problem.totals, len(problem.weights)
        self.bar = sum(totals) + 1
        """Above every value; below nothing, negated."""
        self._dtype: Any = np.int64 if 2 * (num_blocks + 2) * self.bar < _LARGEST else object
        self.values = np.array(prefix_sums(problem.values), dtype=self._dtype)
        self.weights = np.array(prefix_sums(problem.weights), dtype=self._dtype)
        sums = np.array(prefix_sums(totals), dtype=self._dtype)
        self.rooms = np.array(problem.rooms, dtype=self._dtype)
        self.ends = [self._ends(sums, capacity) for capacity in order.kinds]
        self.gains = [self.values[ends] - self.values for ends in self.ends]

    def ends_within(self, limit: int) -> Any:
        """Find for each start the end of the longest run whose weights stay within a limit."""
        return self._ends(self.weights, limit)

    def lift(self, may_stream: Any) -> Any:
        """Give numbers that grow, towards the start, at each block that must be resident."""
        must = np.zeros((*may_stream.shape[:-1], may_stream.shape[-1] + 1), dtype=np.int64)
        must[..., :-1] = np.cumsum(~may_stream[..., ::-1], axis=-1)[..., ::-1]
        return must.astype(self._dtype) * (2 * self.bar)

    def _ends(self, sums: Any, limit: int) -> Any:
        return np.searchsorted(sums, sums + min(limit, self.bar), side="right") - 1


class Suffixes:
    """Bound every suffix, for one size of the largest streamed block, or for several in rows. One thread."""

    def __init__(self, sums: Sums, order: Order, may_stream: Any) -> None:
        self._sums = sums
        self._order = order
        self._lift = sums.lift(may_stream)
        self._plain: dict[Left, Any] = {}
        self._lists: dict[Left, list[int]] = {}

    def plain(self, left: Left) -> Any:
        """Give the most value of each suffix with these accelerators, none of them the main one; negative: none."""
        if left not in self._plain:
            sums = self._sums
            best = np.full(self._lift.shape, -sums.bar, dtype=sums.values.dtype)
            best[..., -1] = 0
            for kind, rest in self._order.next(left):
                best = np.maximum(best, sums.gains[kind] + self.plain(rest)[..., sums.ends[kind]])
            self._plain[left] = self.streamed(best)
        return self._plain[left]

    def plain_list(self, left: Left) -> list[int]:
        """Give the same as a list, which is quicker to read one by one."""
        if left not in self._lists:
            self._lists[left] = self.plain(left).tolist()
        return self._lists[left]

    def streamed(self, best: Any) -> Any:
        """Let each suffix also begin with blocks that are streamed, up to one that must not be."""
        lifted = np.maximum(best, -self._sums.bar) + self._lift
        return np.maximum.accumulate(lifted[..., ::-1], axis=-1)[..., ::-1] - self._lift


class MainSuffixes:
    """Bound every suffix in which the main device's run stands, if only its weights stay within a limit. One thread."""

    def __init__(self, suffixes: Suffixes, sums: Sums, order: Order, main: int, limit: int) -> None:
        self._suffixes = suffixes
        self._sums = sums
        self._order = order
        self._main = main
        self.ends = sums.ends_within(limit)
        self._gains = sums.values[self.ends] - sums.values
        self._tables: dict[Left, Any] = {}
        self._lists: dict[Left, list[int]] = {}

    def table(self, left: Left) -> Any:
        """Give the most value of each suffix with these others; the main device's run may be empty."""
        if left not in self._tables:
            sums, order = self._sums, self._order
            best = self._gains + self._suffixes.plain(order.after(left, self._main))[self.ends]
            for kind, rest in order.before(left, self._main):
                best = np.maximum(best, sums.gains[kind] + self.table(rest)[sums.ends[kind]])
            self._tables[left] = self._suffixes.streamed(best)
        return self._tables[left]

    def table_list(self, left: Left) -> list[int]:
        """Give the same as a list."""
        if left not in self._lists:
            self._lists[left] = self.table(left).tolist()
        return self._lists[left]
