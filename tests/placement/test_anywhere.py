"""Hold the solver's placements against every placement there is, and its bounds against its placements."""

from __future__ import annotations

import random
import sys
from contextlib import suppress

import pytest
from brute_force import best_anywhere, block, first_cover, fits, problems, value_of, with_capacities
from hypothesis import assume, example, given
from hypothesis import strategies as st

from lading.errors import MissingExtraError, PlanError
from lading.placement import anywhere
from lading.placement.anywhere import keep_most_anywhere
from lading.placement.budget import budget_of
from lading.placement.optimum import Problem, Solution, cover
from lading.placement.plan import Plan
from lading.placement.planner import Request, make_plan
from lading.placement.streaming import keep_most

needs_solver = pytest.mark.needs("highspy")


def problem_of(weights: list[int], capacities: list[int], num_copies: int = 1) -> Problem:
    """Write a problem in which nothing is fixed and every block fetched whole."""
    return Problem(
        weights=weights,
        fixed=[0] * len(weights),
        rooms=weights,
        values=weights,
        capacities=capacities,
        num_copies=num_copies,
    )


def solved(problem: Problem) -> tuple[Solution, int] | None:
    """Ask as the planner does."""
    return keep_most_anywhere(problem, keep_most(problem))


def plan_of(sizes: list[int], memory: dict, runtime: str = "accelerate") -> Plan:
    """Plan blocks of these weights with the strategy in question."""
    blocks = tuple(block(f"b{i}", size) for i, size in enumerate(sizes))
    return make_plan(Request(blocks=blocks, budget=budget_of(memory), strategy="any", runtime=runtime))


@needs_solver
@given(problems())
@example(problem_of([2, 3, 2, 3], [5, 4]))
@example(problem_of([3, 5, 3, 5], [8, 8]))
def test_anywhere_small_problems_keeps_what_the_best_placement_keeps(problem):
    assume(cover(problem.totals, problem.capacities) is None)
    found, best = solved(problem), best_anywhere(problem)

    assert (found is None) == (best is None)
    if found is not None and best is not None:
        solution, bound = found
        assert fits(problem, solution.homes, solution.main)
        assert solution.value == value_of(problem, solution.homes) == best
        resident = sum(w for w, home in zip(problem.weights, solution.homes, strict=True) if home is not None)
        assert resident <= bound <= sum(problem.weights)


@needs_solver
@given(problems())
def test_anywhere_never_keeps_less_than_neighbours_do(problem):
    assume(cover(problem.totals, problem.capacities) is None)
    contiguous, found = keep_most(problem), solved(problem)

    assert contiguous is None or (found is not None and found[0].value >= contiguous.value)


def model_like(seed: int) -> Problem:
    """Draw a problem of the size of a model: few classes of blocks, byte counts that are no round numbers."""
    draw = random.Random(seed)
    classes = [draw.randrange(10**6, 10**9) for _ in range(draw.randint(1, 5))]
    weights = [size for size in classes for _ in range(draw.randint(1, 30))]
    if draw.random() < 0.5:
        draw.shuffle(weights)
    weights = [draw.randrange(10**9), *weights, draw.randrange(10**9)]
    num_devices = draw.choice([1, 2, 4, 8])
    share = draw.uniform(0.3, 0.97)
    even = [int(share * sum(weights) / num_devices)] * num_devices
    capacities = even if draw.random() < 0.5 else [int(each * draw.uniform(0.5, 1.5)) for each in even]
    capacities[0] = max(capacities[0], 3 * max(weights))  # so that something can be kept
    return problem_of(weights, capacities, num_copies=draw.choice([1, 2]))


@needs_solver
@pytest.mark.parametrize("seed", [*range(2, 10), *(pytest.param(seed, marks=pytest.mark.full) for seed in (0, 1, 10))])
def test_anywhere_models_come_within_a_thousandth_of_the_proven_bound(seed, monkeypatch):
    monkeypatch.setattr(anywhere, "TIME_LIMIT_S", 60)  # how long it takes is the benchmark's question
    problem = model_like(seed)
    found = solved(problem)
    assert found is not None
    solution, bound = found

    assert fits(problem, solution.homes, solution.main)
    assert solution.value == value_of(problem, solution.homes)
    assert 0.999 * bound <= solution.value <= bound


@needs_solver
@given(st.lists(st.integers(10**9, 10**12), min_size=2, max_size=6), st.integers(2, 3), st.randoms())
def test_anywhere_exact_fits_to_the_byte_are_found(sizes, num_devices, draw):
    """Budgets that are exactly the sums of some partition: everything fits, with no byte to spare."""
    homes = [draw.randrange(num_devices) for _ in sizes]
    capacities = [sum(s for s, h in zip(sizes, homes, strict=True) if h == device) for device in range(num_devices)]
    assume(first_cover(sizes, capacities, in_listed_order=False) is None)
    problem = problem_of(sizes, capacities)
    found = solved(problem)

    assert found is not None
    assert found[0].value == sum(sizes) == found[1]
    assert None not in found[0].homes


@needs_solver
@given(st.lists(st.integers(10**9, 10**12), min_size=2, max_size=6), st.randoms())
def test_anywhere_one_byte_short_is_not_everything(sizes, draw):
    homes = [draw.randrange(2) for _ in sizes]
    capacities = [sum(s for s, h in zip(sizes, homes, strict=True) if h == device) for device in range(2)]
    short = problem_of(sizes, [max(0, capacities[0] - 1), capacities[1]])
    assume(capacities[0] and best_anywhere(short) != sum(sizes))
    found = solved(short)

    assert found is None or (None in found[0].homes and fits(short, found[0].homes, found[0].main))


@needs_solver
def test_anywhere_plan_of_scattered_fit_keeps_everything():
    """3, 5, 3, 5 in 6 and 10: no runs of neighbours hold it, the two threes together do."""
    plan = plan_of([3, 5, 3, 5], {0: 6, 1: 10})

    assert plan.device_map == {"b0": 0, "b1": 1, "b2": 0, "b3": 1}
    assert plan.resident_bytes == plan.bound == 16
    assert plan.gap == 0.0
    assert plan.warnings == ()


@needs_solver
@pytest.mark.parametrize("runtime", ["lading", "accelerate"])
@given(problems(most_devices=2))
def test_anywhere_plan_has_a_gap_that_is_true(runtime, problem):
    """The bound on the plan is above what it keeps and, with the main device kept, above every other placement."""
    memory = {**dict(enumerate(problem.capacities)), "cpu": 10**6}
    sizes = [size for size in problem.weights if size]
    assume(sizes)
    plan = plan_of(sizes, memory, runtime)

    assert 0.0 <= plan.gap <= 1.0
    assert plan.resident_bytes <= plan.bound <= plan.total_bytes


@needs_solver
@pytest.mark.parametrize("runtime", ["lading", "accelerate"])
@given(st.lists(st.integers(1, 12), min_size=2, max_size=6), st.integers(0, 30), st.integers(0, 20), st.integers(0, 20))
def test_anywhere_limited_disk_is_kept_and_never_worse_than_neighbours(runtime, sizes, room, host, disk):
    memory = {0: room, 1: room // 2, "cpu": host, "disk": disk}
    blocks = tuple(block(f"b{i}", size) for i, size in enumerate(sizes))
    plans = {}
    for strategy in ("contiguous", "any"):
        asked = Request(blocks=blocks, budget=budget_of(memory), strategy=strategy, runtime=runtime)
        with suppress(PlanError):
            plans[strategy] = make_plan(asked)

    assert "any" in plans or "contiguous" not in plans
    if "any" in plans:
        on_disk = sum(each.num_bytes for each in plans["any"].placements if each.home == "disk")
        assert on_disk <= disk
    if "contiguous" in plans and plans["contiguous"].main_device != "cpu":
        assert plans["any"].resident_bytes >= plans["contiguous"].resident_bytes


@needs_solver
def test_anywhere_swapped_budgets_keep_as_much():
    sizes = [7, 11, 7, 11, 13, 2]
    found = [solved(with_capacities(problem_of(sizes, [19, 23]), list(each))) for each in ((19, 23), (23, 19))]

    assert found[0] is not None
    assert found[1] is not None
    assert found[0][0].value == found[1][0].value


def test_anywhere_without_the_solver_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "highspy", None)

    with pytest.raises(MissingExtraError, match=r"lading\[solver\]") as caught:
        plan_of([3, 5, 3, 5], {0: 6, 1: 9, "cpu": 100})
    assert "strategy='contiguous'" in str(caught.value)


def test_anywhere_without_the_solver_plans_what_needs_none(monkeypatch):
    """Where neighbours reach the bound already, nothing is asked of the solver."""
    monkeypatch.setitem(sys.modules, "highspy", None)

    assert plan_of([3, 5], {0: 8}).device_map == {"": 0}
    assert plan_of([4, 4, 4], {0: 8, "cpu": 100}).gap == 0.0


@needs_solver
def test_anywhere_no_device_with_room_runs_on_the_cpu():
    plan = plan_of([5, 5, 5], {0: 3, "cpu": 100})

    assert plan.main_device == "cpu"
    assert plan.device_map == {"": "cpu"}
