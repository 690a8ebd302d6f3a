"""Hold the room behind the devices that run a model against every way to divide what is streamed."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

from hypothesis import given
from hypothesis import strategies as st

from lading.placement.homes import Homes, LeastRoom
from lading.placement.optimum import Solution


def homes_of(sizes: list[int], host: int, disk: int | None) -> Homes:
    return Homes(sizes=sizes, are_fetched=[True] * len(sizes), host_bytes=host, disk_bytes=disk)


def can_be_divided(sizes: list[int], host: int, disk: int) -> bool:
    """Try every way."""
    ways = product([True, False], repeat=len(sizes))
    in_host = (sum(size for size, near in zip(sizes, way, strict=True) if near) for way in ways)
    return any(near <= host and sum(sizes) - near <= disk for near in in_host)


sizes = st.lists(st.integers(0, 12), min_size=1, max_size=6)
rooms = st.integers(0, 40)


@given(sizes, rooms, rooms, st.lists(st.booleans(), min_size=6, max_size=6))
def test_homes_suffice_where_some_division_fits(sizes, host, disk, are_resident):
    streams = Solution(homes=tuple(0 if each else None for each in are_resident[: len(sizes)]), main=0, value=0)
    homes = homes_of(sizes, host, disk)
    streamed = [size for size, home in zip(sizes, streams.homes, strict=True) if home is None]

    assert homes.suffice(streams) == can_be_divided(streamed, host, disk)
    assert (homes.pack(streams) is not None) == homes.suffice(streams)


@given(sizes, rooms, rooms, st.lists(st.lists(st.booleans(), min_size=6, max_size=6), min_size=1, max_size=3))
def test_least_room_is_the_least_that_does_for_one_of_the_solutions(sizes, host, disk, offered):
    solutions = [
        Solution(homes=tuple(0 if each else None for each in one[: len(sizes)]), main=0, value=0) for one in offered
    ]
    homes = homes_of(sizes, host, disk)
    for of_disk in (False, True):
        room = LeastRoom(homes, of_disk=of_disk)
        assert not any(room.refuse(solution) for solution in solutions)
        size, name = (disk, "disk_bytes") if of_disk else (host, "host_bytes")
        does = (
            more
            for more in range(size, 200)
            if any(replace(homes, **{name: more}).suffice(solution) for solution in solutions)
        )
        assert room.least == next(does)


def test_homes_without_a_limit_of_the_disk_keep_nothing_back():
    homes = homes_of([5, 6], 0, None)
    assert homes.most_bytes is None
    assert homes.least_kept([5, 6]) == 0
    assert homes.suffice(Solution(homes=(None, None), main=0, value=0))


def test_homes_too_small_for_all_say_what_must_be_kept():
    assert homes_of([5, 6], 3, 4).least_kept([5, 6]) == 4
    assert homes_of([5, 6], 3, 4).least_kept([5, 4]) == 2  # 2 of the bytes are buffers, which stay in any case
