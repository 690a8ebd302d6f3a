"""Hold bounds above the best of all placements, and minima against every budget there is; both also through plans."""

from __future__ import annotations

import dataclasses
import warnings
from itertools import combinations, pairwise

import pytest
import torch
from brute_force import all_homes, best_anywhere, block, fits, is_valid, problems, used_bytes, with_capacities
from hypothesis import assume, example, given
from hypothesis import strategies as st
from torch import nn

import lading
from lading.errors import PlanError
from lading.placement.bound import most_resident_bytes
from lading.placement.budget import budget_of
from lading.placement.minimum import least, least_for_all, least_useful
from lading.placement.optimum import Problem, cover
from lading.placement.plan import Plan, PlanWarning
from lading.placement.planner import Request, make_plan
from lading.placement.streaming import keep_most


def in_weights(problem: Problem) -> Problem:
    """Value every block by its weight, which is what the bound is about."""
    return dataclasses.replace(problem, values=problem.weights)


def uniform(num_blocks: int, size: int, capacities: list[int], num_copies: int = 1) -> Problem:
    """Write a problem of equal layers."""
    sizes = [size] * num_blocks
    return Problem(
        weights=sizes,
        fixed=[0] * num_blocks,
        rooms=sizes,
        values=sizes,
        capacities=capacities,
        num_copies=num_copies,
    )


# The bound


@given(problems())
def test_bound_any_problem_is_above_the_best_placement(problem):
    problem = in_weights(problem)
    best = best_anywhere(problem)

    assert best is None or best <= most_resident_bytes(problem) <= sum(problem.weights)


@given(problems(most_devices=2), st.integers(1, 30))
def test_bound_a_device_below_zero_does_not_lower_it(problem, debt):
    """A budget smaller than its overhead leaves less than nothing; the other devices can hold what they could."""
    problem = in_weights(problem)
    best = best_anywhere(problem)

    assert best is None or best <= most_resident_bytes(with_capacities(problem, [*problem.capacities, -debt]))


@given(problems())
def test_bound_everything_fits_is_everything(problem):
    assume(any(fits(problem, homes, 0) for homes in all_homes(problem) if None not in homes))

    assert most_resident_bytes(problem) == sum(problem.weights)


@given(problems(), st.integers(0, 2), st.integers(1, 9))
def test_bound_more_memory_is_never_lower(problem, device, more):
    capacities = list(problem.capacities)
    capacities[min(device, len(capacities) - 1)] += more

    assert most_resident_bytes(problem) <= most_resident_bytes(with_capacities(problem, capacities))


@pytest.mark.parametrize("num_copies", [1, 2])
@pytest.mark.parametrize("num_blocks", [1, 2, 7, 32])
def test_bound_equal_layers_on_one_device_is_reached(num_blocks, num_copies):
    """Nothing is lost to the bound where layers are equal: the plan's gap is exactly 0."""
    size = 7
    for capacity in range((num_blocks + num_copies + 2) * size):
        problem = uniform(num_blocks, size, [capacity], num_copies)
        if cover(problem.weights, problem.capacities) is None:
            found = keep_most(problem)
            assert most_resident_bytes(problem) == (found.value if found else 0), capacity


@pytest.mark.parametrize("share", [0.95, 0.75, 0.5, 0.25, 0.1])
def test_bound_language_model_on_one_device_is_less_than_a_layer_away(share):
    """A small table, equal layers, a norm, a head: what contiguity costs on a single device is part of one layer."""
    layers = [block(f"layers.{i}", 1000) for i in range(32)]
    blocks = (block("embed", 600), *layers, block("norm", 1), block("head", 600))
    total = sum(each.weight_bytes for each in blocks)
    memory = budget_of({0: int(share * total), "cpu": total})
    plan = make_plan(Request(blocks=blocks, budget=memory, runtime="accelerate"))

    assert 0 <= plan.bound - plan.resident_bytes < 1000


def test_bound_no_device_is_nothing():
    assert most_resident_bytes(uniform(3, 5, [])) == 0


# The least memory for everything


def least_for_all_tried(totals: list[int], num_devices: int) -> int:
    """Try every way to cut the blocks into runs."""
    cuts = range(1, len(totals))
    best = sum(totals)
    for number in range(min(num_devices, len(totals))):
        for chosen in combinations(cuts, number):
            ends = [0, *chosen, len(totals)]
            best = min(best, max(sum(totals[a:b]) for a, b in pairwise(ends)))
    return best


@given(st.lists(st.integers(0, 30), max_size=8), st.integers(1, 5))
def test_least_for_all_any_sizes_is_the_least(totals, num_devices):
    zeros = [0] * len(totals)
    found = least_for_all(Problem(weights=totals, fixed=zeros, rooms=totals, values=totals, capacities=[]), num_devices)

    assert found == least_for_all_tried(totals, num_devices)
    assert cover(totals, [found] * num_devices) is not None
    assert not found or cover(totals, [found - 1] * num_devices) is None


# The least memory for a first useful plan


@given(problems(most_devices=1))
def test_least_useful_any_problem_is_the_least(problem):
    """With one byte less no placement keeps a block."""
    assume(any(problem.weights))
    found = least_useful(problem)
    valid = [
        used_bytes(problem, homes, 0)[0]
        for homes in all_homes(problem)
        if is_valid(with_capacities(problem, [10**6]), homes, 0)
    ]

    assert found == min(valid)
    for capacity, is_enough in ((found, True), (found - 1, False)):
        tried = with_capacities(problem, [capacity])
        works = cover(tried.totals, tried.capacities) is not None or keep_most(tried) is not None
        assert works is is_enough, capacity


@given(st.integers(0, 100), st.integers(0, 100), st.integers(0, 200))
def test_least_any_threshold_is_found(low, more, threshold):
    high = low + more
    assume(threshold <= high)

    assert least(lambda number: number >= threshold, low, high) == max(low, threshold)


@given(st.integers(0, 100), st.integers(0, 100), st.integers(0, 200), st.lists(st.integers(0, 250)))
def test_least_any_guesses_change_nothing(low, more, threshold, guesses):
    high = low + more
    assume(threshold <= high)

    assert least(lambda number: number >= threshold, low, high, sorted(guesses)) == max(low, threshold)


# Both, through plans


@st.composite
def requests(draw: st.DrawFn) -> Request:
    """Draw a request whose blocks have buffers and pinned tensors, with a margin."""
    blocks = [
        block(f"b{i}", draw(st.integers(1, 20)), buffers=draw(st.integers(0, 3)), is_lookup=draw(st.booleans()))
        for i in range(draw(st.integers(1, 6)))
    ]
    pinned = draw(st.integers(0, 5))
    if pinned:
        blocks.insert(0, block("token", 0, pinned=pinned))
    return Request(
        blocks=tuple(blocks),
        budget=budget_of({"cpu": 10_000}),
        runtime=draw(st.sampled_from(["lading", "accelerate"])),
        overhead={"margin": draw(st.integers(0, 50))},
    )


def planned(request: Request, memory: dict) -> Plan:
    """Plan the request's blocks with another memory."""
    return make_plan(dataclasses.replace(request, budget=budget_of(memory)))


@given(requests(), st.sampled_from([1, 2, 4]))
def test_minimum_all_resident_works_and_one_byte_less_does_not(request_, num_devices):
    least_bytes = planned(request_, {"cpu": 10_000}).minimum.all_resident[num_devices]

    def is_kept(size: int, strategy: str = "contiguous") -> bool:
        asked = dataclasses.replace(request_, strategy=strategy)
        plan = planned(asked, {**dict.fromkeys(range(num_devices), size), "cpu": 10_000})
        return all(placement.home not in ("cpu", "disk") for placement in plan.placements)

    assert is_kept(least_bytes)
    assert not is_kept(least_bytes - 1, "sequential")  # runs alone, which are never filled up with other blocks


def request_of(weights: list[int]) -> Request:
    """Write a request in which blocks have weights only."""
    blocks = tuple(block(f"b{i}", weight) for i, weight in enumerate(weights))
    return Request(blocks=blocks, budget=budget_of({"cpu": 10_000}), overhead={"margin": 0})


@given(requests(), st.integers(0, 400))
@example(request_of([1, 1, 1, 1]), 3)
def test_minimum_on_the_plan_is_exact_whatever_the_plan_was_made_for(request_, size):
    """Also from a plan that had room for two copies, or none at all: the least is a fact about the model."""
    minimum = planned(request_, {0: size, "cpu": 10_000}).minimum

    def uses_device(budget: int) -> bool:
        plan = planned(request_, {0: budget, "cpu": 10_000})
        return any(placement.home == 0 for placement in plan.placements)

    assert uses_device(minimum.useful)
    assert not uses_device(minimum.useful - 1)
    for number in (1, 2):
        memory = dict.fromkeys(range(number), minimum.all_resident[number])
        plan = planned(request_, memory)
        assert plan.resident_bytes == plan.total_bytes
        with pytest.raises(PlanError):
            planned(request_, {**{device: budget - 1 for device, budget in memory.items()}, "disk": 0})


class Pinned(nn.Module):
    """A tensor of its own beside two layers, one of them with a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.empty(5, dtype=torch.uint8), requires_grad=False)
        self.first = nn.Linear(10, 10, bias=False)
        self.norm = nn.BatchNorm1d(10)
        self.last = nn.Linear(20, 10, bias=False)


@pytest.mark.parametrize("runtime", ["lading", "accelerate"])
@pytest.mark.parametrize("margin", [0, 1000])
def test_minimum_through_the_public_door_is_exact(runtime, margin):
    """By hand: 400 + 80 + 800 of weights, 88 of buffers, 5 pinned. Useful: norm kept beside the room for ``last``, or
    ``last`` kept beside the room for ``first``.
    """
    net, workload = Pinned(), lading.Workload(margin_bytes=margin)
    fixed = 88 + 5

    def plan(memory: dict) -> Plan:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PlanWarning)
            return lading.plan(net, memory, runtime=runtime, workload=workload)

    minimum = plan({"cpu": "1MiB"}).minimum
    assert minimum.useful == 80 + 800 + fixed + margin
    assert minimum.all_resident[1] == 400 + 80 + 800 + fixed + margin
    assert minimum.all_resident[2] == 800 + margin
    assert plan({0: minimum.useful, "cpu": "1MiB"}).main_device == 0
    assert plan({0: minimum.useful - 1, "cpu": "1MiB"}).main_device == "cpu"
    assert plan({0: minimum.all_resident[1]}).resident_bytes == 1280 + fixed
    with pytest.raises(PlanError):
        plan({0: minimum.all_resident[1] - 1, "disk": 0})
