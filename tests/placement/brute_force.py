"""Try every placement of a few blocks. Slow and plain; nothing of the planner's own search stands here."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from itertools import groupby, product

from hypothesis import strategies as st

from lading.placement.blocks import Block
from lading.placement.optimum import Problem

Homes = tuple[int | None, ...]

MOST_PLACEMENTS = 800
"""How many placements a drawn problem may have, so that a thousand problems are tried in seconds."""


def runs_of(homes: Sequence[int | None]) -> list[int]:
    """List the accelerators along the model, one entry for each run, what is streamed between them left out."""
    return [home for home, _ in groupby(homes) if home is not None]


def is_contiguous(homes: Sequence[int | None], *, in_listed_order: bool) -> bool:
    """Say whether each accelerator holds one run of neighbours, and whether they follow their list if they must."""
    runs = runs_of(homes)
    return len(set(runs)) == len(runs) and (not in_listed_order or runs == sorted(runs))


def used_bytes(problem: Problem, homes: Sequence[int | None], main: int) -> list[int]:
    """Add up what each accelerator must hold at its fullest."""
    used, room = [0] * len(problem.capacities), 0
    for weight, fixed, each, home in zip(problem.weights, problem.fixed, problem.rooms, homes, strict=True):
        if home is None:
            used[main] += fixed
            room = max(room, each)
        else:
            used[home] += weight + fixed
    used[main] += problem.num_copies * room
    return used


def fits(problem: Problem, homes: Sequence[int | None], main: int) -> bool:
    """Say whether no accelerator holds more than it can."""
    return all(u <= c for u, c in zip(used_bytes(problem, homes, main), problem.capacities, strict=True) if u)


def mains_of(problem: Problem, homes: Sequence[int | None]) -> list[int]:
    """List the accelerators that may be the main one: each that keeps weights, or the first listed of those used."""
    keep = {home for home, weight in zip(homes, problem.weights, strict=True) if weight and home is not None}
    if problem.main_is_first_used:
        return sorted(keep & {min((home for home in homes if home is not None), default=-1)})
    return sorted(keep)


def is_valid(problem: Problem, homes: Sequence[int | None], main: int) -> bool:
    """Say whether a contiguous placement keeps within the budgets with this main device."""
    return (
        main in mains_of(problem, homes)
        and is_contiguous(homes, in_listed_order=problem.in_listed_order)
        and fits(problem, homes, main)
    )


def value_of(problem: Problem, homes: Sequence[int | None]) -> int:
    """Add up what the resident blocks are worth."""
    return sum(value for value, home in zip(problem.values, homes, strict=True) if home is not None)


def all_homes(problem: Problem) -> Iterator[Homes]:
    """Yield every way to give each block an accelerator or none."""
    yield from product([None, *range(len(problem.capacities))], repeat=len(problem.weights))


def best_contiguous(problem: Problem) -> tuple[int, int] | None:
    """Find the greatest value of a contiguous placement, and the earliest main device that reaches it."""
    found = [
        (-value_of(problem, homes), main)
        for homes in all_homes(problem)
        if is_contiguous(homes, in_listed_order=problem.in_listed_order)
        for main in mains_of(problem, homes)
        if fits(problem, homes, main)
    ]
    return (-min(found)[0], min(found)[1]) if found else None


def best_anywhere(problem: Problem) -> int | None:
    """Find the greatest value of any placement."""
    values = [
        value_of(problem, homes)
        for homes in all_homes(problem)
        if any(fits(problem, homes, main) for main in mains_of(problem, homes))
    ]
    return max(values, default=None)


def first_cover(totals: Sequence[int], capacities: Sequence[int], *, in_listed_order: bool) -> list[int] | None:
    """Find the first contiguous placement of everything, in lexicographic order."""
    for homes in product(range(len(capacities)), repeat=len(totals)):
        used = [sum(t for t, home in zip(totals, homes, strict=True) if home == i) for i in range(len(capacities))]
        if is_contiguous(homes, in_listed_order=in_listed_order) and all(
            each <= capacity or home not in homes
            for home, (each, capacity) in enumerate(zip(used, capacities, strict=True))
        ):
            return list(homes)
    return None


def with_capacities(problem: Problem, capacities: Sequence[int]) -> Problem:
    """Give the same blocks other accelerators."""
    return dataclasses.replace(problem, capacities=list(capacities))


@st.composite
def problems(draw: st.DrawFn, *, most_devices: int = 3, least_capacity: int = 0) -> Problem:
    """Draw a small problem: equal and unequal blocks, fixed bytes, tables that are looked up, tight budgets."""
    num_devices = draw(st.integers(1, most_devices))
    most_blocks = next(n for n in range(9, 0, -1) if (num_devices + 1) ** n <= MOST_PLACEMENTS)
    num_blocks = draw(st.integers(1, most_blocks))

    def numbers(low: int, high: int) -> list[int]:
        return draw(st.lists(st.integers(low, high), min_size=num_blocks, max_size=num_blocks))

    largest = draw(st.sampled_from([3, 6, 20]))
    weights = numbers(0, largest) if draw(st.booleans()) else numbers(1, largest)
    fixed = numbers(0, 3) if draw(st.booleans()) else [0] * num_blocks
    is_lookup = numbers(0, 4)
    rooms = [weight if flag else 0 for weight, flag in zip(weights, is_lookup, strict=True)]
    rooms = rooms if draw(st.booleans()) else list(weights)
    values = rooms if draw(st.booleans()) else list(weights)
    total = sum(weights) + sum(fixed)
    highest = max(least_capacity, 1, total * 13 // (10 * num_devices) + 2)
    capacity = st.integers(least_capacity, highest)
    are_equal = draw(st.booleans())
    capacities = [draw(capacity)] * num_devices if are_equal else [draw(capacity) for _ in range(num_devices)]
    return Problem(
        weights=weights,
        fixed=fixed,
        rooms=rooms,
        values=values,
        capacities=capacities,
        num_copies=draw(st.integers(1, 2)),
        in_listed_order=draw(st.booleans()),
        main_is_first_used=draw(st.booleans()),
    )


def block(name: str, weight: int, *, buffers: int = 0, pinned: int = 0, is_lookup: bool = False) -> Block:
    """Write a block by hand."""
    return Block(
        name=name,
        keys=(name,),
        weight_bytes=weight,
        buffer_bytes=buffers,
        pinned_bytes=pinned,
        is_lookup=is_lookup,
        class_name="Layer",
    )
