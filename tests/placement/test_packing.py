"""Choose sizes for a limited room: against every subset there is, and within its promise where there are too many."""

from __future__ import annotations

from itertools import product

from hypothesis import given
from hypothesis import strategies as st

from lading.placement import packing
from lading.placement.packing import choose, fit_simply, subset_sums

SIZES = st.lists(st.integers(0, 12), max_size=8)


def all_sums(sizes: list[int]) -> set[int]:
    """Add up every subset."""
    return {
        sum(size for size, flag in zip(sizes, flags, strict=True) if flag)
        for flags in product([0, 1], repeat=len(sizes))
    }


@given(SIZES, st.integers(0, 60))
def test_subset_sums_small_lists_are_all_sums_up_to_the_limit(sizes, limit):
    assert subset_sums(sizes, limit) == sorted(each for each in all_sums(sizes) if each <= limit)


def test_subset_sums_too_many_different_ones_are_given_up():
    assert subset_sums([2**i for i in range(20)], 2**20) is None


def test_subset_sums_many_equal_sizes_are_few_sums():
    assert subset_sums([7] * 3_000, 21_000) == list(range(0, 21_001, 7))


@given(SIZES, st.integers(-3, 60), st.integers(0, 60))
def test_choose_small_lists_takes_the_largest_sum_there_is(sizes, limit, least):
    useful = [each for each in all_sums(sizes) if least <= each <= limit]
    chosen = choose(sizes, limit, least)

    if not useful:
        assert chosen is None
    else:
        assert chosen is not None
        assert sum(size for size, flag in zip(sizes, chosen, strict=True) if flag) == max(useful)


@given(SIZES, st.integers(0, 60), st.integers(0, 60))
def test_fit_simply_says_only_what_is_true(sizes, one, other):
    if fit_simply(sizes, one, other):
        assert any(sum(sizes) - each <= other for each in all_sums(sizes) if each <= one)


@given(SIZES, st.integers(0, 60))
def test_choose_equal_sizes_takes_the_earlier_first(sizes, limit):
    chosen = choose(sizes, limit)

    assert chosen is not None
    for size in set(sizes):
        flags = [flag for each, flag in zip(sizes, chosen, strict=True) if each == size]
        assert flags == sorted(flags, reverse=True)


@given(SIZES, st.integers(0, 60))
def test_choose_what_takes_no_room_is_always_chosen(sizes, limit):
    chosen = choose(sizes, limit)

    assert chosen is not None
    assert all(flag for size, flag in zip(sizes, chosen, strict=True) if size == 0)


@given(st.lists(st.integers(1, 10**9), min_size=1, max_size=40), st.floats(0, 1))
def test_choose_too_many_sums_leaves_less_room_than_the_smallest_left_out(sizes, share):
    limit, before = int(share * sum(sizes)), packing.MOST_SUMS
    packing.MOST_SUMS = 50
    try:
        chosen = choose(sizes, limit)
    finally:
        packing.MOST_SUMS = before

    assert chosen is not None
    left = limit - sum(size for size, flag in zip(sizes, chosen, strict=True) if flag)
    out = [size for size, flag in zip(sizes, chosen, strict=True) if not flag]
    assert left >= 0
    assert not out or left < min(out)


def test_choose_sizes_beyond_the_floats_are_exact():
    size = 2**60 + 1

    assert choose([size, size, 1], 2 * size) == [True, True, False]
    assert choose([size, size, 1], 2 * size - 1) == [True, False, True]
