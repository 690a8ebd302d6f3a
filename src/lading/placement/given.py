"""Make a plan of a device map that somebody else decided, so that it can be carried out like one of ours.

Searches nothing: each block rests where the map says. What the map streams runs on the main device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lading.errors import PlanError, name_list, refusal
from lading.placement.blocks import Block
from lading.placement.budget import Device, device_key
from lading.placement.optimum import Problem
from lading.placement.plan import DeviceUse, Placement, Plan

_NOT_RUNNING = ("cpu", "disk")
_NUM_COPIES = 2


def plan_of(
    blocks: Sequence[Block],
    device_map: Mapping[str, object],
    *,
    main_device: object = None,
    budgets: Mapping[Device, int] | None = None,
) -> Plan:
    """Say for each block what a device map says of its modules.

    Args:
        blocks: from `lading.placement.blocks.blocks_of`.
        device_map: module or tensor name → device; a name stands for everything below it, ``""`` for all.
        main_device: where blocks on ``"cpu"`` and ``"disk"`` run. None: the first other device of the map, else the
            CPU, which then runs its own blocks and those on disk.
        budgets: bytes of each device. None: no limits, and room for two of the largest streamed block.

    Raises:
        PlanError: a block without a device, or one whose tied tensors the map parts.
    """
    homes_of = {name: device_key(device) for name, device in device_map.items()}
    main = _main_device(homes_of, main_device)
    parted, lost, homes = [], [], []
    for block in blocks:
        found = {_home(key, homes_of) for key in block.keys}
        lost += [block.name] if None in found else []
        running = {home for home in found if home not in (*_NOT_RUNNING, None)}
        if len(found) > 1 and (len(running) > 1 or "disk" in found):
            parted.append(" and ".join(map(repr, block.keys)))
        home = next(iter(running or found))
        homes.append(main if home is None else home)  # the first accelerator is called 0
    if lost or parted:
        what = f"no device for {name_list(lost)}" if lost else f"tied tensors on several devices: {'; '.join(parted)}"
        expected = "one device for each block"
        raise PlanError(refusal("device_map", found=what, expected=expected, way_out="complete or correct the map"))
    placements = tuple(_placement(block, home, main) for block, home in zip(blocks, homes, strict=True))
    return Plan(
        placements=placements,
        main_device=main,
        devices=tuple(_uses(blocks, placements, main, budgets or {})),
        runtime="lading",
        strategy="given",
        total_bytes=sum(block.total_bytes for block in blocks),
        resident_bytes=sum(each.num_bytes for each in placements if not each.is_streamed),
        problem=Problem(
            weights=[block.weight_bytes for block in blocks],
            fixed=[block.total_bytes - block.weight_bytes for block in blocks],
            rooms=[block.fetch_bytes or block.weight_bytes for block in blocks],
            values=[block.weight_bytes for block in blocks],
            capacities=[(budgets or {}).get(main, sum(block.total_bytes for block in blocks))],
            num_copies=_NUM_COPIES,
        ),
    )


def _home(key: str, homes: Mapping[str, Device]) -> Device | None:
    """Find the longest name in a map that stands for a key."""
    while key not in homes and key:
        key = key.rpartition(".")[0]
    return homes.get(key)


def _main_device(homes: Mapping[str, Device], given: object) -> Device:
    if given is not None:
        return device_key(given)
    return next((home for home in homes.values() if home not in _NOT_RUNNING), "cpu")


def _placement(block: Block, home: Device, main: Device) -> Placement:
    execution = main if home in _NOT_RUNNING else home
    if not block.weight_bytes:
        home = execution  # what a split module holds itself is needed at any time
    return Placement(
        name=block.name,
        keys=block.keys,
        class_name=block.class_name,
        home=home,
        execution_device=execution,
        num_bytes=block.total_bytes,
        reason="as the device map says",
        is_lookup=block.is_lookup and home != execution,
    )


def _uses(
    blocks: Sequence[Block], placements: Sequence[Placement], main: Device, budgets: Mapping[Device, int]
) -> list[DeviceUse]:
    used: dict[Device, int] = {}
    largest = buffers = 0
    for block, placement in zip(blocks, placements, strict=True):
        if placement.is_streamed:
            used[placement.home] = used.get(placement.home, 0) + block.weight_bytes
            buffers += block.total_bytes - block.weight_bytes
            if not placement.is_lookup:
                largest = max(largest, block.fetch_bytes or block.weight_bytes)
        else:
            used[placement.home] = used.get(placement.home, 0) + block.total_bytes
    reserved = {"fetched blocks": _NUM_COPIES * largest, "buffers of streamed blocks": buffers}
    return [
        DeviceUse(
            device=device,
            budget_bytes=budgets.get(device),
            used_bytes=used.get(device, 0),
            reserved={term: size for term, size in reserved.items() if size} if device == main else {},
        )
        for device in dict.fromkeys([main, *used])
    ]
