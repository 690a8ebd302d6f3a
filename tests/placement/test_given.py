"""A device map that somebody else decided becomes a plan that says the same, or is refused by name."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lading.errors import PlanError
from lading.placement.blocks import Block, BlockRules, blocks_of
from lading.placement.given import plan_of


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 4)
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.head = nn.Linear(4, 10, bias=False)
        self.scale = nn.Parameter(torch.ones(4))


def blocks(*, is_tied: bool = False) -> list[Block]:
    net = Net()
    if is_tied:
        net.head.weight = net.table.weight
    return blocks_of(net, BlockRules())


def homes(plan: object) -> dict[str, object]:
    return {key: placement.home for placement in plan.placements for key in placement.keys}


def test_the_longest_name_decides():
    plan = plan_of(blocks(), {"": "cpu", "second": "disk", "table": "disk"})
    assert homes(plan) == {"table": "disk", "first": "cpu", "second": "disk", "head": "cpu", "scale": "cpu"}
    assert plan.main_device == "cpu"
    assert {placement.execution_device for placement in plan.placements} == {"cpu"}
    assert [placement.name for placement in plan.placements if placement.is_lookup] == ["table"]
    assert plan.fetch_bytes == 2 * (16 + 4) * 4, "two of the largest streamed block; a table is not fetched"


def test_what_is_elsewhere_runs_on_the_first_accelerator_or_where_it_is_said():
    device_map = {"table": "cpu", "first": 1, "second": "disk", "head": 0, "scale": 1}
    plan = plan_of(blocks(), device_map)
    assert plan.main_device == 1
    runs = {placement.name: placement.execution_device for placement in plan.placements}
    assert runs == {"table": 1, "first": 1, "second": 1, "head": 0, "scale": 1}
    assert plan_of(blocks(), device_map, main_device="cuda:0").main_device == 0


def test_budgets_are_what_is_left_for_fetching():
    plan = plan_of(blocks(), {"": "cpu", "second": "disk"}, budgets={"cpu": 10_000})
    (use,) = (use for use in plan.devices if use.device == "cpu")
    assert use.used_bytes + use.reserved_bytes + use.free_bytes == 10_000
    assert plan.fetch_bytes == 10_000 - use.used_bytes


def test_names_that_only_begin_alike_are_not_below():
    with pytest.raises(PlanError, match=r"device_map: found no device for 'scale', 'second', 'head'"):
        plan_of(blocks(), {"table": "cpu", "first": "cpu", "sec": "cpu", "hea": "disk"})


def test_tied_tensors_on_several_devices_are_refused_and_beside_a_running_one_join_it():
    whole = {"first": "cpu", "second": "cpu", "scale": "cpu"}
    with pytest.raises(PlanError, match=r"tied tensors on several devices: 'table' and 'head"):
        plan_of(blocks(is_tied=True), {**whole, "table": "disk", "head": "cpu"})
    with pytest.raises(PlanError, match="tied tensors on several devices"):
        plan_of(blocks(is_tied=True), {**whole, "table": 0, "head": 1})
    assert homes(plan_of(blocks(is_tied=True), {**whole, "table": "cpu", "head": 0}))["table"] == 0
