"""Place blocks over accelerators without keeping neighbours together, by HiGHS, within a time limit.

A mixed-integer programme over classes of equal blocks: how many of each class rest on each accelerator, whether any of
a class is streamed, and the room that the largest streamed one needs. One programme for each accelerator that could be
the main one. HiGHS computes in floating point; what it finds is counted again in integers, and its bound is rounded up.

Needs ``lading[solver]``; the only file that imports highspy. Knows bytes; no names, no tensors.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from lading.errors import MissingExtraError
from lading.placement.bound import most_resident_bytes
from lading.placement.optimum import Problem, Solution

TIME_LIMIT_S = 0.2
_GAP = 1e-4
"""HiGHS may stop when nothing can be better by more than this share."""


def keep_most_anywhere(problem: Problem, start: Solution | None) -> tuple[Solution, int] | None:
    """Keep the most value resident, any block on any accelerator.

    Args:
        problem: what to place.
        start: a solution known already, returned where nothing better is found in time.

    Returns:
        The solution, whose blocks may all be resident, and a proven bound on resident weights; None for no solution.

    Raises:
        MissingExtraError: highspy is not installed.
    """
    bound = most_resident_bytes(problem)
    if start is not None and start.value >= bound:
        return start, bound
    best, proven = start, 0
    mains = [problem.capacities.index(capacity) for capacity in dict.fromkeys(problem.capacities)]
    if problem.main_is_first_used:  # one that is no larger than one listed before it could change places with that
        mains = [main for main in mains if problem.capacities[main] > max(problem.capacities[:main], default=-1)]
    deadline = time.monotonic() + TIME_LIMIT_S
    for position, main in enumerate(mains):
        seconds = max(0.01, (deadline - time.monotonic()) / (len(mains) - position))
        found, limit = _Programme(problem, main).solve(seconds, best)
        proven = max(proven, limit)
        if found is not None and (best is None or found.value > best.value):
            best = found
    weights_are_valued = list(problem.values) == list(problem.weights)
    return None if best is None else (best, min(bound, proven) if weights_are_valued else bound)


class _Programme:
    """The programme of one main device. One thread."""

    def __init__(self, problem: Problem, main: int) -> None:
        self._problem = problem
        self._main = main
        kinds = list(zip(problem.weights, problem.fixed, problem.rooms, problem.values, strict=True))
        self._members: dict[tuple[int, int, int, int], list[int]] = {}
        for block, kind in enumerate(kinds):
            self._members.setdefault(kind, []).append(block)
        self._unit = max(1.0, sum(problem.totals) / 1e6)  # sizes near one: HiGHS's tolerances are absolute

    def solve(self, seconds: float, known: Solution | None) -> tuple[Solution | None, int]:
        """Give the best placement found, if it holds in integers, and a bound on its value.

        Args:
            seconds: when to stop.
            known: a placement to begin from, where it has the same main device.
        """
        highs = self._build(seconds)
        if known is not None and known.main == self._main:
            self._begin(highs, known)
        highs.run()
        info = highs.getInfo()
        found = None
        if info.primal_solution_status == 2:  # feasible
            found = self._read(np.asarray(highs.getSolution().col_value))
        status = str(highs.getModelStatus())
        if "Infeasible" in status:
            return None, 0
        dual = -info.mip_dual_bound  # HiGHS minimises
        proven = math.ceil(dual * self._unit * (1 + 1e-9)) if math.isfinite(dual) else sum(self._problem.weights)
        return found, proven

    def _build(self, seconds: float) -> Any:
        """Write the rows. Columns: a count for each class and accelerator, "any streamed" for each class, the room."""
        try:
            import highspy
        except ImportError as error:
            raise MissingExtraError(
                "strategy='any' needs the HiGHS solver: pip install 'lading[solver]', or use strategy='contiguous'"
            ) from error
        problem, unit = self._problem, self._unit
        classes, num_devices = list(self._members.items()), len(problem.capacities)
        highs = highspy.Highs()  # type: ignore[no-untyped-call]
        highs.setOptionValue("output_flag", False)
        highs.setOptionValue("threads", 1)
        highs.setOptionValue("time_limit", seconds)
        highs.setOptionValue("mip_rel_gap", _GAP)
        barred = self._main if problem.main_is_first_used else 0  # those listed before the main device stay empty
        for (_, _, _, value), members in classes:
            for device in range(num_devices):
                highs.addCol(-value / unit, 0.0, 0 if device < barred else len(members), 0, [], [])
        first_flag = len(classes) * num_devices
        for _ in classes:
            highs.addCol(0.0, 0.0, 1.0, 0, [], [])
        room_column = first_flag + len(classes)
        highs.addCol(0.0, 0.0, highspy.kHighsInf, 0, [], [])
        for column in range(room_column):
            highs.changeColIntegrality(column, highspy.HighsVarType.kInteger)

        def row(low: float, high: float, entries: Sequence[tuple[int, float]]) -> None:
            highs.addRow(low, high, len(entries), [c for c, _ in entries], [v for _, v in entries])

        infinity, main = highspy.kHighsInf, self._main
        for position, ((_, _, room, _), members) in enumerate(classes):
            counts = [(position * num_devices + device, 1.0) for device in range(num_devices)]
            row(-infinity, len(members), counts)
            row(len(members), infinity, [*counts, (first_flag + position, float(len(members)))])
            if room:
                row(0.0, infinity, [(room_column, 1.0), (first_flag + position, -room / unit)])
        for device, capacity in enumerate(problem.capacities):
            if device == main:
                entries = [(room_column, float(problem.num_copies))]
                for position, ((weight, fixed, _, _), _) in enumerate(classes):
                    entries += [
                        (position * num_devices + other, (weight if other == main else -fixed) / unit)
                        for other in range(num_devices)
                    ]
                row(-infinity, (capacity - sum(problem.fixed)) / unit, entries)
            else:
                sizes = [
                    (position * num_devices + device, (kind[0] + kind[1]) / unit)
                    for position, (kind, _) in enumerate(classes)
                ]
                row(-infinity, capacity / unit, sizes)
        on_main = [(at * num_devices + main, 1.0) for at, (kind, _) in enumerate(classes) if kind[0]]
        row(1.0, infinity, on_main)
        return highs

    def _begin(self, highs: Any, known: Solution) -> None:
        """Hand a placement to HiGHS, which need not look for a first one."""
        import highspy

        num_devices, problem = len(self._problem.capacities), self._problem
        columns = [0.0] * (len(self._members) * (num_devices + 1) + 1)
        room = 0
        for position, members in enumerate(self._members.values()):
            for block in members:
                home = known.homes[block]
                if home is None:
                    columns[len(self._members) * num_devices + position] = 1.0
                    room = max(room, problem.rooms[block])
                else:
                    columns[position * num_devices + home] += 1
        columns[-1] = room / self._unit
        start = highspy.HighsSolution()
        start.col_value = columns
        highs.setSolution(start)

    def _read(self, columns: Any) -> Solution | None:
        """Hand out accelerators to the members of each class in their order; None where integers do not fit."""
        num_devices = len(self._problem.capacities)
        homes: list[int | None] = [None] * len(self._problem.weights)
        for position, members in enumerate(self._members.values()):
            given = 0
            for device in range(num_devices):
                count = min(round(columns[position * num_devices + device]), len(members) - given)
                for block in members[given : given + count]:
                    homes[block] = device
                given += count
        value = sum(value for value, home in zip(self._problem.values, homes, strict=True) if home is not None)
        return Solution(homes=tuple(homes), main=self._main, value=value) if self._fits(homes) else None

    def _fits(self, homes: Sequence[int | None]) -> bool:
        problem, main = self._problem, self._main
        used, room = [0] * len(problem.capacities), 0
        for weight, fixed, each_room, home in zip(problem.weights, problem.fixed, problem.rooms, homes, strict=True):
            if home is None:
                used[main] += fixed
                room = max(room, each_room)
            else:
                used[home] += weight + fixed
        used[main] += problem.num_copies * room
        return all(each <= capacity for each, capacity in zip(used, problem.capacities, strict=True))
