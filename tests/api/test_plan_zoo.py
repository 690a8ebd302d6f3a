"""Prove that plans of real architectures are valid and the best there are, by a referee that shares no code with ours.

The problems and the referee are those of `benchmarks/bench_plan.py`: transformers' own model classes on meta, twenty
memories in proportion to each. By default a seeded part of the architectures is planned, under the marker `full` all.
The referee is tried first: on plans with one fault each, and on small problems against every possible placement.
"""

from __future__ import annotations

import itertools
import random
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import lading

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))
sys.path.append(str(Path(__file__).resolve().parents[1] / "placement"))

from brute_force import best_contiguous

from lading.placement.optimum import Problem
from plan_check import Inventory, Unit, all_fit, best_of, check, most_kept
from plan_problems import Skip, no_split_of, scenarios_of, transformers_cases

CASES = transformers_cases()
SAMPLE = random.Random(11).sample(CASES, 6)
PARTS = 4


# The referee


class Pair(nn.Module):
    def __init__(self, *, is_tied: bool = False) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)  # 256 bytes each
        if is_tied:
            self.second.weight = self.first.weight


class Net(nn.Module):
    def __init__(self, *, is_tied: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(4, 8)  # 128 bytes
        self.pair = Pair(is_tied=is_tied)
        self.register_buffer("scale", torch.ones(8), persistent=False)  # 32 bytes


ROOMY = {0: 10_000, 1: 10_000, "cpu": 10_000}


@pytest.mark.parametrize(
    ("device_map", "memory", "fault"),
    [
        ({"": 0}, ROOMY, None),
        ({"": 0}, {0: 672}, None),
        ({"": 0}, {0: 671}, "over budget of an accelerator"),
        ({"": 3}, ROOMY, "over budget of an accelerator"),
        ({"embedding": 0, "pair": 1, "scale": 0}, {0: 160, 1: 512}, None),
        ({"embedding": 0, "pair": 0}, ROOMY, "uncovered"),
        ({"embedding": 0, "pair.first": 0, "pair.second": 1, "scale": 0}, ROOMY, "split"),
        ({"embedding": 0, "pair": "cpu", "scale": 0}, {0: 672, "cpu": 512}, None),
        ({"embedding": 0, "pair": "cpu", "scale": "cpu"}, {0: 672, "cpu": 512}, None),  # a buffer stays on 0
        ({"embedding": 0, "pair": "cpu", "scale": "cpu"}, {0: 671, "cpu": 512}, "no room to stream"),
        ({"embedding": 0, "pair": "cpu", "scale": 0}, {0: 672, "cpu": 511}, "over budget of cpu"),
        ({"embedding": 0, "pair": "disk", "scale": 0}, {0: 672, "disk": 511}, "over budget of disk"),
        ({"embedding": "cpu", "pair": "disk", "scale": "cpu"}, {"cpu": 672}, None),
        ({"embedding": "cpu", "pair": "disk", "scale": "cpu"}, {"cpu": 671}, "no room to stream"),
    ],
)
def test_referee_names_the_fault_of_a_map(device_map, memory, fault):
    finding = check(Inventory.of(Net(), ["Pair"]), device_map, memory)
    assert [each.split(":")[0] for each in finding.faults] == ([fault] if fault else [])


def test_referee_counts_a_tied_tensor_once_and_refuses_to_part_it():
    inventory = Inventory.of(Net(is_tied=True), [])
    assert check(inventory, {"": 0}, {0: 416}).faults == ()
    parted = {"embedding": 0, "pair.first": 0, "pair.second": 1, "scale": 0}
    assert [each.split(":")[0] for each in check(inventory, parted, ROOMY).faults] == ["parted"]


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.decoder = nn.Linear(8, 4)  # 128 + 16 bytes
        self.bias = self.decoder.bias
        self.scales = nn.ParameterList([nn.Parameter(torch.ones(2))])  # 8 bytes


def test_referee_streams_nothing_that_no_forward_of_its_own_asks_for():
    """Neither what a split module holds itself, though a block may share it, nor a list that is never called."""
    inventory = Inventory.of(Shared(), [])
    assert sorted(inventory.units()) == [Unit(0, 8), Unit(128, 16)]

    streamed = check(inventory, {"decoder": "cpu", "bias": "cpu", "scales": 0}, ROOMY)
    assert (streamed.faults, streamed.kept_bytes, streamed.aside_bytes) == ((), 8, 16)
    assert check(inventory, {"": 0}, ROOMY).aside_bytes == 0


def every_placement(units: list[Unit], capacities: list[int]) -> tuple[bool, int | None]:
    """Try all: whether everything fits, and the most bytes kept otherwise, with a weight on the main device."""
    is_whole, best = False, None
    for homes in itertools.product([None, *range(len(capacities))], repeat=len(units)):
        runs = [device for device, _ in itertools.groupby(homes) if device is not None]
        places = {device: [at for at, home in enumerate(homes) if home == device] for device in runs}
        if not runs or any(found[-1] - found[0] >= len(found) for found in places.values()):
            continue
        used, room, main = [0] * len(capacities), 0, min(runs)  # accelerate streams through the lowest number
        for unit, home in zip(units, homes, strict=True):
            used[main if home is None else home] += unit.fixed + (0 if home is None else unit.weight)
            room = max(room, unit.weight if home is None else 0)
        used[main] += room
        if any(size > capacity for size, capacity in zip(used, capacities, strict=True)):
            continue
        if None not in homes:
            is_whole = True
        elif any(units[at].weight for at in places[main]):
            best = max(best or 0, sum(used) - room)
    return is_whole, best


def test_referee_finds_the_best_of_all_placements():
    draw = random.Random(3)
    for _ in range(300):
        num_units = draw.randint(1, 5)
        units = [Unit(draw.choice([0, 1, 2, 3, 5, 8]), draw.choice([0, 0, 0, 1, 2])) for _ in range(num_units)]
        capacities = [draw.randint(0, 14) for _ in range(draw.randint(1, 3))]
        if not sum(map(sum, units)):
            continue
        is_whole, best = every_placement(units, capacities)
        assert all_fit(units, capacities) == is_whole, (units, capacities)
        if not is_whole:
            assert most_kept(units, capacities) == best, (units, capacities)


def test_referee_agrees_with_brute_force_wherever_the_main_device_stands():
    """Try up to four accelerators, so that others stand on both sides of the main one."""
    draw, num_rated = random.Random(7), 0
    for _ in range(2000):
        num_units, num_devices = draw.choice([(8, 1), (6, 2), (5, 3), (4, 4)])
        sizes = draw.choice([[0, 1, 2, 3, 5, 8], [1, 2, 3], [4, 5, 6, 20]])
        units = [Unit(draw.choice(sizes), draw.choice([0, 0, 0, 1, 2])) for _ in range(draw.randint(1, num_units))]
        highest = sum(map(sum, units)) * 13 // (10 * num_devices) + 2
        capacities = [draw.randint(0, highest) for _ in range(num_devices)]
        weights, fixed = [unit.weight for unit in units], [unit.fixed for unit in units]
        best = best_contiguous(
            Problem(
                weights=weights,
                fixed=fixed,
                rooms=weights,
                values=weights,
                capacities=capacities,
                main_is_first_used=True,
            )
        )
        if sum(weights) and not all_fit(units, capacities):
            num_rated += best is not None
            assert most_kept(units, capacities) == (None if best is None else best[0] + sum(fixed)), (units, capacities)
    assert num_rated > 200


def test_best_of_streams_through_the_lowest_number_wherever_it_is_named():
    units = [Unit(3, 0)] * 4
    assert best_of(units, {0: 4, 1: 6, "cpu": 100}).kept_bytes == 3  # 0 would be the main one: it could not fetch
    assert best_of(units, {1: 6, 0: 4, "cpu": 100}).kept_bytes == 3
    assert best_of(units, {0: 6, 1: 4, "cpu": 100}).kept_bytes == 6


# Our plans


def complaints_of(case, strategy: str) -> Iterator[str]:
    """Plan one architecture in every memory and say what is wrong; nothing if it cannot be built here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # constructors and tight memories have much to say
        try:
            model = case.build()
        except Skip:
            return
        no_split = no_split_of(model)
        inventory = Inventory.of(model, no_split)
        units = inventory.units()
        for scenario, memory in scenarios_of(units).items():
            best, where = best_of(units, memory), f"{case.name}, {scenario}"
            try:
                plan = lading.plan(model, memory, no_split, runtime="accelerate", strategy=strategy)
            except lading.PlanError:
                if best.kept_bytes >= 0 and best.is_decided:
                    yield f"{where}: refused"
                continue
            finding = check(inventory, plan.device_map, memory)
            kept = finding.kept_bytes and finding.kept_bytes + finding.aside_bytes
            yield from (f"{where}: {fault}" for fault in finding.faults)
            if best.is_decided and kept < best.kept_bytes:
                yield f"{where}: keeps {kept:,} of {best.kept_bytes:,} bytes"
            if best.is_whole and not finding.is_whole:
                yield f"{where}: everything fits: {best.is_whole}, nothing is streamed: {finding.is_whole}"
            if kept and not kept == plan.resident_bytes <= plan.bound:
                yield f"{where}: keeps {kept:,}, says {plan.resident_bytes:,} of at most {plan.bound:,}"


@pytest.mark.parametrize("part", range(PARTS))
def test_plans_of_sampled_architectures_are_valid_and_the_best(part):
    found = [each for case in SAMPLE[part::PARTS] for each in complaints_of(case, "contiguous")]
    assert found == []


@pytest.mark.full
@pytest.mark.needs("highspy")
def test_plans_without_neighbourhood_are_valid_and_no_worse():
    assert [each for case in SAMPLE[:4] for each in complaints_of(case, "any")] == []


@pytest.mark.full
@pytest.mark.parametrize("part", range(16))
def test_plans_of_all_architectures_are_valid_and_the_best(part):
    found = [each for case in CASES[part::16] for each in complaints_of(case, "contiguous")]
    assert found == []


@pytest.mark.full
def test_most_architectures_build_without_memory():
    built = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for case in CASES[::4]:
            try:
                case.build()
            except Skip:
                continue
            built += 1
    assert built > 0.8 * len(CASES[::4])
