"""Say whether accelerators could keep anything while the rest streams, and with how little of one of them, exactly.

Nothing is asked about how much is kept. So one number is left for every position: the main device's balance, which is
what the others keep of fixed bytes less the weights in the main device's run. The greater it can be, the smaller the
main device may be. Runs of others before the main device's may end anywhere within their budgets, as it must keep a
weight; those after it are as long as possible. All positions, and all sizes of the largest streamed block, are reckoned
at once, as arrays. Knows bytes and positions; no names.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from lading.placement.optimum import Left, Order, Problem
from lading.placement.relaxed import Suffixes, Sums

_MOST_NUMBERS = 2**17
"""How many numbers an array may have: enough to be quick."""


def can_keep_some(problem: Problem) -> bool:
    """Say whether `keep_most` would keep anything."""
    return _any_within(problem, range(len(problem.capacities)))


def least_as_main(problem: Problem, device: int) -> int | None:
    """Give the least budget with which a device streams the rest beside the others as they are; None for none.

    A larger one will do too, and so may a smaller one, if it helps another device to do so.
    """
    needs = [need for tables in _tables(problem) for need in [tables.least(device)] if need is not None]
    return min(needs, default=None)


def _any_within(problem: Problem, devices: Any) -> bool:
    for tables in _tables(problem):
        for device in devices:
            need = tables.least(device)
            if need is not None and need <= problem.capacities[device]:
                return True
    return False


def _tables(problem: Problem) -> Any:
    """Yield tables for all sizes that the largest streamed block may have, the small ones first."""
    if not any(problem.weights):
        return
    order = Order(problem.capacities, in_listed_order=problem.in_listed_order)
    sums = Sums(replace(problem, values=problem.fixed), order)
    sizes = sorted(set(problem.rooms))
    step = max(1, _MOST_NUMBERS // len(problem.rooms))
    for start in range(0, len(sizes), step):
        yield _Tables(problem, order, sums, sizes[start : start + step])


class _Tables:
    """Reckon the greatest balance, a row for each size of the largest streamed block. One thread."""

    def __init__(self, problem: Problem, order: Order, sums: Sums, sizes: list[int]) -> None:
        self._problem = problem
        self._order = order
        self._sums = sums
        self._sizes = np.array(sizes, dtype=sums.rooms.dtype)
        self._suffixes = Suffixes(sums, order, sums.rooms <= self._sizes[:, None])
        self._next = np.searchsorted(sums.weights, sums.weights, side="right")
        """The first end at which a run from here has a weight; one beyond all for none."""
        self._main_runs: dict[Left, Any] = {}
        self._balances: dict[tuple[Left, int], Any] = {}

    def least(self, device: int) -> int | None:
        """Give the least budget of a main device; None where some other block could never be placed."""
        problem, order = self._problem, self._order
        others = list(problem.capacities[device + 1 :] if problem.main_is_first_used else problem.capacities)
        if problem.in_listed_order:
            left: Left = (device if problem.main_is_first_used else 0,)
        else:
            if not problem.main_is_first_used:
                del others[device]
            left = tuple(others.count(kind) for kind in order.kinds)
        balances = self._balance(left, device)[:, 0]
        is_possible = balances > -self._sums.bar
        needs = problem.num_copies * self._sizes[is_possible] - balances[is_possible]
        return int(needs.min()) + sum(problem.fixed) if len(needs) else None

    def _balance(self, left: Left, main: int) -> Any:
        """Give the greatest balance of each suffix in which the main device's run stands; -3 bars for none."""
        key = (left, main if self._problem.in_listed_order else -1)
        if key not in self._balances:
            sums, order = self._sums, self._order
            best = self._main_run(order.after(left, main))
            for kind, rest in order.before(left, main):
                within = _Windows(sums.values + self._balance(rest, main)).most(sums.ends[kind])
                best = np.maximum(best, within - sums.values)
            self._balances[key] = self._marked(self._suffixes.streamed(best), 1 - sums.bar)
        return self._balances[key]

    def _main_run(self, after: Left) -> Any:
        """Give the greatest balance of each suffix that begins with the main device's run."""
        if after not in self._main_runs:
            weights = self._sums.weights
            behind = self._marked(self._suffixes.plain(after), 0) - weights
            most = np.full((len(self._sizes), behind.shape[1] + 1), -3 * self._sums.bar, dtype=weights.dtype)
            most[:, :-1] = np.maximum.accumulate(behind[:, ::-1], axis=1)[:, ::-1]
            self._main_runs[after] = most[:, self._next] + weights
        return self._main_runs[after]

    def _marked(self, numbers: Any, least: int) -> Any:
        """Put what is impossible so far down that nothing lifts it up again."""
        return np.where(numbers < least, -3 * self._sums.bar, numbers)


class _Windows:
    """Find the greatest number between each position and an end, both included. One thread."""

    def __init__(self, numbers: Any) -> None:
        self._levels = [numbers]
        """Each holds the greatest of twice as many neighbours as the one before."""

    def most(self, ends: Any) -> Any:
        lengths = ends - np.arange(len(ends)) + 1
        powers = np.frexp(lengths)[1] - 1  # the greatest power of two that is no longer
        while len(self._levels) <= powers.max():
            last, span = self._levels[-1], 2 ** (len(self._levels) - 1)
            longer = last.copy()
            longer[:, :-span] = np.maximum(last[:, :-span], last[:, span:])
            self._levels.append(longer)
        found = self._levels[0].copy()
        for power in range(int(powers.max()) + 1):
            at = np.flatnonzero(powers == power)
            level = self._levels[power]
            found[:, at] = np.maximum(level[:, at], level[:, ends[at] - 2**power + 1])
        return found
