"""Hold the exact programme against every placement there is, on problems small enough to try them all."""

from __future__ import annotations

import dataclasses
from itertools import pairwise

import pytest
from brute_force import (
    all_homes,
    best_contiguous,
    first_cover,
    is_valid,
    problems,
    used_bytes,
    value_of,
    with_capacities,
)
from hypothesis import assume, example, given
from hypothesis import strategies as st

from lading.placement.feasible import can_keep_some, least_as_main
from lading.placement.optimum import Problem, Solution, cover, prefix_sums
from lading.placement.streaming import keep_most


def problem_of(weights: list[int], capacities: list[int], **others: object) -> Problem:
    """Write a problem in which what is not said is plain: nothing fixed, every block fetched whole."""
    plain = {"fixed": [0] * len(weights), "rooms": weights, "values": weights}
    return Problem(weights=weights, capacities=capacities, **{**plain, **others})


def do_not_fit(problem: Problem) -> bool:
    """Say whether something must be streamed: the planner asks `keep_most` only then."""
    return cover(problem.totals, problem.capacities, in_listed_order=problem.in_listed_order) is None


@given(problems())
def test_cover_small_problems_is_the_first_in_lexicographic_order(problem):
    ours = cover(problem.totals, problem.capacities, in_listed_order=problem.in_listed_order)

    assert ours == first_cover(problem.totals, problem.capacities, in_listed_order=problem.in_listed_order)


@given(problems())
@example(problem_of([5, 5, 5], [5, 9], in_listed_order=True))
@example(problem_of([1, 3], [3], rooms=[0, 3]))
def test_keep_most_small_problems_keeps_what_the_best_placement_keeps(problem):
    assume(do_not_fit(problem))
    ours, best = keep_most(problem), best_contiguous(problem)

    assert (ours is None) == (best is None)
    if ours is not None and best is not None:
        assert is_valid(problem, ours.homes, ours.main), used_bytes(problem, ours.homes, ours.main)
        assert ours.value == value_of(problem, ours.homes) == best[0]


@given(problems(), st.integers(-1, 60))
def test_keep_most_above_a_value_is_what_is_worth_more_or_nothing(problem, above):
    assume(do_not_fit(problem))
    best, found = best_contiguous(problem), keep_most(problem, above=above)

    assert (found is not None) == (best is not None and best[0] > above)
    assert found is None or best is None or found.value == best[0]


@given(problems())
def test_can_keep_some_small_problems_says_whether_there_is_any_placement(problem):
    assume(do_not_fit(problem))

    assert can_keep_some(problem) == (best_contiguous(problem) is not None)


@given(problems(), st.lists(st.integers(0, 9), min_size=8, max_size=8), st.integers(0, 40))
def test_can_keep_some_many_fixed_bytes_says_whether_there_is_any_placement(problem, fixed, more):
    fixed = [*fixed, *[0] * len(problem.weights)][: len(problem.weights)]
    capacities = [capacity + more for capacity in problem.capacities]
    problem = dataclasses.replace(problem, fixed=fixed, capacities=capacities)
    assume(do_not_fit(problem))

    assert can_keep_some(problem) == (best_contiguous(problem) is not None)


@given(problems(), st.integers(0, 2))
def test_least_as_main_is_the_least_that_a_placement_takes_of_it(problem, main):
    """Where all is resident, room for the smallest block is kept as if it were streamed."""
    main = min(main, len(problem.capacities) - 1)
    roomy = with_capacities(
        problem, [sum(problem.totals) * 4 if at == main else c for at, c in enumerate(problem.capacities)]
    )
    needs = [
        used_bytes(problem, homes, main)[main] + (None not in homes) * problem.num_copies * min(problem.rooms)
        for homes in all_homes(problem)
        if is_valid(roomy, homes, main)
    ]

    assert least_as_main(problem, main) == min(needs, default=None)


@given(problems(), st.lists(st.integers(0, 9), min_size=8, max_size=8), st.integers(0, 40))
def test_keep_most_many_fixed_bytes_keeps_what_the_best_placement_keeps(problem, fixed, more):
    """Where other accelerators can take fixed bytes off the main one, its run may be longer: bounds leave a gap."""
    fixed = [*fixed, *[0] * len(problem.weights)][: len(problem.weights)]
    capacities = [capacity + more for capacity in problem.capacities]
    problem = dataclasses.replace(problem, fixed=fixed, capacities=capacities)
    assume(do_not_fit(problem))
    ours, best = keep_most(problem), best_contiguous(problem)

    assert (ours is None) == (best is None)
    if ours is not None and best is not None:
        assert is_valid(problem, ours.homes, ours.main)
        assert ours.value == best[0]


@given(problems(), st.integers(0, 2), st.integers(1, 5))
def test_keep_most_more_memory_never_keeps_less(problem, device, more):
    device = min(device, len(problem.capacities) - 1)
    capacities = list(problem.capacities)
    capacities[device] += more
    assume(do_not_fit(with_capacities(problem, capacities)))
    before, after = keep_most(problem), keep_most(with_capacities(problem, capacities))

    assert before is None or (after is not None and after.value >= before.value)


@given(problems())
def test_keep_most_second_copy_never_keeps_more(problem):
    assume(do_not_fit(problem))
    one, two = (keep_most(dataclasses.replace(problem, num_copies=copies)) for copies in (1, 2))

    assert two is None or (one is not None and one.value >= two.value)


@given(problems(most_devices=2), st.permutations([0, 1]))
def test_keep_most_devices_listed_otherwise_keeps_as_much(problem, permutation):
    assume(not problem.in_listed_order and not problem.main_is_first_used)
    assume(len(problem.capacities) == 2 and do_not_fit(problem))
    swapped = keep_most(with_capacities(problem, [problem.capacities[at] for at in permutation]))
    ours = keep_most(problem)

    assert (swapped is None) == (ours is None)
    assert swapped is None or ours is None or swapped.value == ours.value


@given(problems(), st.integers(1, 30))
def test_keep_most_a_device_below_zero_is_as_good_as_none(problem, debt):
    """A budget smaller than its overhead leaves less than nothing; it must not eat into the others."""
    assert keep_most(with_capacities(problem, [*problem.capacities, -debt])) == keep_most(
        with_capacities(problem, [*problem.capacities, 0])
    )


@given(problems(), st.integers(1, 30))
def test_cover_a_device_below_zero_is_as_good_as_none(problem, debt):
    in_order = problem.in_listed_order
    without = cover(problem.totals, problem.capacities, in_listed_order=in_order)

    assert cover(problem.totals, [*problem.capacities, -debt], in_listed_order=in_order) == without


@pytest.mark.parametrize(
    ("weights", "capacities", "expected"),
    [
        ([2, 1, 3], [4, 10], [0, 0, 1]),
        ([5, 1, 3], [4, 10], [1, 0, 0]),
        ([2, 1, 3], [6, 10], [0, 0, 0]),
        ([2, 1, 3], [3, 3], [0, 0, 1]),
        ([2, 1, 3], [2, 4], [0, 1, 1]),
        ([2, 1, 3], [3, 2], None),
        ([3, 3], [5, 5], [0, 1]),
        ([4, 4], [7], None),
        ([1, 9, 9], [1, 20], [0, 1, 1]),
        ([9, 9, 1], [1, 18], [1, 1, 0]),
        ([], [4], []),
        ([0, 0], [0], [0, 0]),
    ],
)
def test_cover_examples_give_the_known_answer(weights, capacities, expected):
    assert cover(weights, capacities) == expected


@pytest.mark.parametrize(
    ("weights", "capacities", "in_order", "expected"),
    [
        ([5, 1, 3], [4, 10], True, [1, 1, 1]),
        ([5, 1, 3], [4, 8], True, None),
        ([5, 1, 3], [4, 8], False, [1, 0, 0]),
        ([1, 5, 3], [4, 8], True, [0, 1, 1]),
    ],
)
def test_cover_listed_order_follows_the_list(weights, capacities, in_order, expected):
    assert cover(weights, capacities, in_listed_order=in_order) == expected


def test_keep_most_four_bytes_under_one_copy_keeps_only_b():
    """Blocks of 2, 1 and 3 in 4: C must fit beside what is kept, so B alone is the only useful plan."""
    assert keep_most(problem_of([2, 1, 3], [4])) == Solution(homes=(None, 0, None), main=0, value=1)


def test_keep_most_four_bytes_with_two_copies_keeps_nothing():
    assert keep_most(problem_of([2, 1, 3], [4], num_copies=2)) is None


def test_keep_most_large_block_resident_lowers_the_room():
    """Keeping the largest block makes the room for fetching small: 10 resident and 1 free beats 1 and 10."""
    assert keep_most(problem_of([1, 10, 1], [12])) == Solution(homes=(0, 0, None), main=0, value=11)


def test_keep_most_lookup_needs_no_room():
    tabled = problem_of([9, 2, 2, 2], [4], rooms=[0, 2, 2, 2])
    assert keep_most(tabled) == Solution(homes=(None, 0, None, None), main=0, value=2)

    assert keep_most(dataclasses.replace(tabled, rooms=tabled.weights)) is None


def test_keep_most_fixed_bytes_of_streamed_blocks_stay_on_the_main_device():
    problem = problem_of([4, 4], [9], fixed=[0, 1])
    assert keep_most(problem) == Solution(homes=(0, None), main=0, value=4)

    assert keep_most(with_capacities(problem, [8])) is None


def test_keep_most_several_devices_reserve_on_the_main_one_only():
    """Two devices of 6 and five blocks of 3: the main one keeps 3 and a room of 3, the other keeps 6."""
    found = keep_most(problem_of([3] * 5, [6, 6]))

    assert found is not None
    assert found.value == 9
    assert found.main == found.homes[next(i for i, home in enumerate(found.homes) if home is not None)]


@given(st.lists(st.integers(0, 100)))
def test_prefix_sums_differences_are_the_sizes(sizes):
    sums = prefix_sums(sizes)

    assert sums[0] == 0
    assert [after - before for before, after in pairwise(sums)] == sizes


def test_keep_most_large_numbers_stay_integers():
    """Above 2**53 a float would round: a byte too many is refused, the exact fit is found."""
    size = 2**60 + 1

    assert keep_most(problem_of([size, size, size], [2 * size])) is not None
    assert keep_most(problem_of([size, size, size], [2 * size - 1])) is None
    assert cover([size, size, size], [3 * size - 1]) is None
    assert cover([size, size, size], [3 * size]) == [0, 0, 0]
