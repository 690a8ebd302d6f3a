"""Say when two outputs have the same bits, what a model has on it, and which budgets and plans make a model stream."""

from __future__ import annotations

import torch
from fake_device import LazyDevice
from torch import nn

import lading
from lading.residency.residency import Residency
from lading.residency.settings import Settings
from zoo import named_tensors, tensors


def same_bits(left: object, right: object) -> bool:
    pairs = list(zip(tensors(left), tensors(right), strict=True))
    return bool(pairs) and all(
        a == b and x.dtype == y.dtype and torch.equal(x.nan_to_num(), y.nan_to_num()) for (a, x), (b, y) in pairs
    )


def traces(model: nn.Module) -> dict[str, object]:
    """List everything that lading could leave on a model's modules."""
    found: dict[str, object] = {}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            found[f"{name}|{key}"] = list(value) if isinstance(value, dict) else None
    return found


def budget_of(model: nn.Module, share: float) -> dict[str, int]:
    """Give the CPU so much of what the plan at least needs and the whole model takes."""
    total = sum(p.untyped_storage().nbytes() for p in model.parameters())
    low, high = 0, 3 * total + (1 << 20)
    while high - low > max(64, total // 64):
        middle = (low + high) // 2
        try:
            lading.plan(model, {"cpu": middle})
        except lading.PlanError:
            low = middle
        else:
            high = middle
    return {"cpu": high + int(share * max(0, total - high))}


def streamed_plan(model: nn.Module, share: float, homes: tuple[str, ...] = ("cpu",)) -> lading.Plan:
    """Plan the least share at or above the one given that can run from slots."""
    total = sum({id(each): each.nbytes for each in named_tensors(model).values()}.values())
    rooms = {"cpu": 4 * total + 100, "disk": 4 * total + 100}
    while True:
        try:
            return lading.plan(model, {0: int(total * share), **{home: rooms[home] for home in homes}})
        except lading.PlanError:
            share += 0.1


def opened(model: nn.Module, plan: lading.Plan, device: LazyDevice, **options) -> Residency:
    return Residency(model, plan, Settings(transfers=lambda _: device, **options))
