"""List the planners that are compared: lading, the peers as their users call them, and a floor.

Each takes a built model, the classes that must stay whole and the memory, and gives a device map. Nothing is measured.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from plan_check import Device
from plan_problems import MAJOR

DeviceMap = Mapping[str, Device]


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A device map, and what lading says of it. Immutable."""

    device_map: DeviceMap
    plan: Any = None


class Refused(Exception):  # noqa: N818 - an answer too
    """Say that a planner said that there is no plan."""


Call = Callable[[nn.Module, Sequence[str], dict[Device, int]], Answer]


def _lading(strategy: str) -> Call:
    def call(model: nn.Module, no_split: Sequence[str], memory: dict[Device, int]) -> Answer:
        import lading

        try:
            plan = lading.plan(model, memory, no_split_module_classes=no_split, runtime="accelerate", strategy=strategy)
        except lading.PlanError as error:
            raise Refused(str(error)) from error
        return Answer(device_map=plan.device_map, plan=plan)

    return call


def _accelerate(**options: Any) -> Call:
    def call(model: nn.Module, no_split: Sequence[str], memory: dict[Device, int]) -> Answer:
        from accelerate import infer_auto_device_map

        return Answer(
            device_map=infer_auto_device_map(
                model, max_memory=memory, no_split_module_classes=list(no_split), **options
            )
        )

    return call


def _auto(model: Any, no_split: Sequence[str], memory: dict[Device, int]) -> Answer:
    if MAJOR >= 5 and hasattr(model, "all_tied_weights_keys"):
        from transformers.integrations.accelerate import get_balanced_memory, infer_auto_device_map
    else:
        from accelerate.utils import get_balanced_memory, infer_auto_device_map
    balanced = get_balanced_memory(model, max_memory=memory, no_split_module_classes=list(no_split))
    device_map = infer_auto_device_map(model, max_memory=balanced, no_split_module_classes=list(no_split))
    return Answer(device_map=device_map)


def _walk(model: nn.Module, no_split: Sequence[str], memory: dict[Device, int]) -> Answer:
    """Read the size of every tensor and the class of every module once."""
    sizes = [tensor.nbytes for tensor in model.parameters()] + [tensor.nbytes for tensor in model.buffers()]
    classes = {type(module).__name__ for module in model.modules()}
    return Answer(device_map={"": sum(sizes) + len(classes)})


@dataclass(frozen=True, slots=True, kw_only=True)
class Planner:
    """Name one way to plan. Immutable."""

    call: Call
    title: str
    imports: tuple[str, ...] = ()
    is_floor: bool = False

    @property
    def missing(self) -> str:
        """Name the package that it needs and that is not here; empty: nothing."""
        return next((name for name in self.imports if importlib.util.find_spec(name) is None), "")


PLANNERS = {
    "lading": Planner(call=_lading("contiguous"), title="lading.plan"),
    "lading-any": Planner(call=_lading("any"), title='lading.plan, strategy="any"', imports=("highspy",)),
    "accelerate": Planner(call=_accelerate(), title="accelerate infer_auto_device_map", imports=("accelerate",)),
    "accelerate-fallback": Planner(
        call=_accelerate(fallback_allocation=True),
        title="the same, fallback_allocation=True",
        imports=("accelerate",),
    ),
    "auto": Planner(call=_auto, title=f"transformers {MAJOR} auto", imports=("accelerate",)),
    "walk": Planner(call=_walk, title="floor: one walk over the module", is_floor=True),
}
