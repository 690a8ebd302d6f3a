"""Make a plan true for a model: stream what the plan streams.

Composes `residency` with what `adapters` know of other libraries' hooks.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from lading.adapters.accelerate_hooks import unhooked
from lading.api.arguments import BY_PLAN
from lading.api.planning import plan as make_plan
from lading.errors import PlanError, refusal
from lading.placement.blocks import BlockRules, blocks_of, declared_whole
from lading.placement.given import plan_of
from lading.placement.plan import Plan
from lading.residency.residency import Residency
from lading.residency.settings import Settings


def offload(  # noqa: PLR0913 - the names that users of device maps know
    model: nn.Module,
    plan: Plan | Mapping[str, Any],
    *,
    offload_folder: str | os.PathLike[str] | None = None,
    skip_keys: str | Iterable[str] = (),
    io_same_device: bool = True,
    replace_hooks: bool = False,
) -> Residency:
    """Run a model by a plan: what rests elsewhere is where it runs exactly while its forward runs.

    The model stays what it is: the same object, the same parameters, each of them a real tensor at any time, with a
    hook before and after each streamed block. Where the CPU runs the model and blocks rest on disk, weights stay views
    of the checkpoint that they were loaded from: nothing is copied, neither in memory nor on disk, and an edit stays.

    Args:
        model: loaded by `lading.load` or otherwise, on the CPU. Weights that are in no file (built, cast or trained in
            this process) are written to one if their home is the disk.
        plan: from `lading.plan`, or a device map: module names → devices.
        offload_folder: where that file is made; None for the system's temporary folder. It has no name and is gone when
            the process ends, however it ends. Weights of a mapped checkpoint need none.
        skip_keys: names of arguments that are not moved between devices, such as ``"past_key_values"``.
        io_same_device: bring outputs back to the device of the first input; False leaves them where they were made.
        replace_hooks: take over a model that accelerate hooked, as ``from_pretrained(device_map=…)`` does: the hooks go
            for good, and every weight that they parked on meta comes back, from safetensors and ``.dat`` files as a
            view. `close` leaves a plain model on the CPU.

    Returns:
        What to ask for `stats`, to edit weights beside running forwards with `editing`, and to `close`; a context
        manager. It may be dropped: the model keeps it, and `Residency.of` finds it again.

    Raises:
        ResidencyError: the plan is not about this model; weights are on meta, or hooks of accelerate there that are not
            to be replaced or whose weights are not all to be found (they are named); no room to write. The model is as
            before then.
        PlanError: a device map that leaves a block out.

    Nobody may be inside a forward meanwhile. Afterwards any number of threads may call the model.

    Example:
        >>> import lading, torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64), torch.nn.Linear(64, 64))
        >>> with lading.offload(net, {"0": "cpu", "1": "disk", "2": "disk"}) as residency:
        ...     _ = net(torch.ones(1, 64))
        ...     residency.stats().fetches
        2
    """
    folder = None if offload_folder is None else Path(offload_folder)
    skipped = frozenset([skip_keys] if isinstance(skip_keys, str) else skip_keys)
    settings = Settings(offload_folder=folder, skip_keys=skipped, io_same_device=io_same_device)
    with unhooked(model, replace=replace_hooks):
        if not isinstance(plan, Plan):
            plan = plan_of(blocks_of(model, BlockRules(no_split_classes=declared_whole(model))), plan)
        return Residency(model, plan, settings)


def refuse_two_places(device_map: Any, max_memory: Mapping[Any, Any] | None, plan: Plan | None) -> None:
    """Refuse arguments of `lading.load` of which one would have to be ignored.

    Raises:
        PlanError: both a plan and a device map, or ``max_memory`` without ``device_map="auto"`` or its like.
    """
    if plan is not None and (device_map is not None or max_memory is not None):
        found, expected = "plan and device_map or max_memory", "one way to say where blocks rest"
        raise PlanError(refusal("lading.load", found=found, expected=expected, way_out="pass the plan alone"))
    if max_memory is not None and not (isinstance(device_map, str) and device_map in BY_PLAN):
        found, expected = f"max_memory and device_map={device_map!r}", 'device_map="auto"'
        raise PlanError(refusal("lading.load", found=found, expected=expected, way_out="add it"))


def place(
    model: nn.Module,
    device_map: Any,
    max_memory: Mapping[Any, Any] | None,
    plan: Plan | None,
    offload_folder: str | os.PathLike[str] | None,
) -> None:
    """Carry out what a caller of `lading.load` said about devices; nothing, where the CPU holds everything.

    Raises:
        PlanError: it cannot be carried out.
    """
    if isinstance(device_map, str) and device_map in BY_PLAN:
        plan = make_plan(model, max_memory, strategy=BY_PLAN[device_map])
    given = plan if plan is not None else device_map if isinstance(device_map, Mapping) else {"": device_map or "cpu"}
    if isinstance(given, Mapping) and {str(device) for device in given.values()} == {"cpu"}:
        if "" not in given:  # whether it leaves a block out
            plan_of(blocks_of(model, BlockRules(no_split_classes=declared_whole(model))), given)
        return
    offload(model, given, offload_folder=offload_folder)
