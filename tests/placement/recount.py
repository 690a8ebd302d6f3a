"""Count a module's tensors again, from names and objects alone, and hold a plan's device map against them.

Nothing of `lading.placement` is used here but the public attributes of a plan. What holds together is found in two
steps: a tensor belongs to the outermost module that must not be split, or else to the module that holds it; modules
that share a tensor belong together.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

Tensors = dict[str, torch.Tensor]


def all_tensors(module: nn.Module) -> Tensors:
    """Name every parameter and buffer, persistent or not, under each of its names."""
    return {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }


def all_buffers(module: nn.Module) -> set[str]:
    """Name the buffers."""
    return {name for name, _ in module.named_buffers(remove_duplicate=False)}


def all_modules(module: nn.Module) -> dict[str, nn.Module]:
    """Name every module under each of its names."""
    return dict(module.named_modules(remove_duplicate=False))


def covering_key(name: str, keys: Collection[str]) -> str | None:
    """Find the longest key that is the name or a dotted prefix of it; None when there is none."""
    parts = name.split(".")
    prefixes = [".".join(parts[:end]) for end in range(len(parts), 0, -1)] + [""]
    return next((prefix for prefix in prefixes if prefix in keys), None)


@dataclass
class Unit:
    """What must rest on one device."""

    names: list[str]
    weight_bytes: int = 0
    """Parameters."""
    buffer_bytes: int = 0
    own_bytes: int = 0
    """Tensors that a module holds itself beside children that hold some too."""
    is_table: bool = False
    room_bytes: int = 0
    """What its largest module needs to be fetched: modules that share tensors are fetched one at a time."""

    @property
    def total_bytes(self) -> int:
        return self.weight_bytes + self.buffer_bytes + self.own_bytes


def holder_of(name: str, modules: Mapping[str, nn.Module], whole: Collection[str]) -> tuple[str, bool]:
    """Name what a tensor belongs to, and whether that is a module that is split."""
    owner = name.rpartition(".")[0]
    parts = owner.split(".") if owner else []
    for end in range(len(parts) + 1):
        path = ".".join(parts[:end])
        module = modules[path]
        is_one = isinstance(module, (nn.MultiheadAttention, nn.TransformerEncoderLayer))
        if type(module).__name__ in whole or is_one or hasattr(module, "parametrizations"):
            return path, False
    is_split = any(all_tensors(child) for child in modules[owner].children())
    return owner, is_split


def units_of(module: nn.Module, whole: Collection[str] = ()) -> list[Unit]:
    """List what must rest together, in the order in which the module registers it."""
    modules, tensors, buffers = all_modules(module), all_tensors(module), all_buffers(module)
    holders = {name: holder_of(name, modules, whole) for name in tensors}
    groups: dict[str, int] = {}
    for number, holder in enumerate(dict.fromkeys(path for path, _ in holders.values())):
        groups[holder] = number
    seen: dict[int, str] = {}
    for name, tensor in tensors.items():
        first = seen.setdefault(id(tensor), name)
        one, other = groups[holders[first][0]], groups[holders[name][0]]
        if one != other:
            groups = {path: min(one, other) if group in (one, other) else group for path, group in groups.items()}
    order = _registration_order(module)
    units: dict[int, Unit] = {}
    rooms: dict[str, dict[int, int]] = {}
    stay = {id(tensors[name]) for name, (_, is_split) in holders.items() if is_split}
    for name in sorted(tensors, key=lambda name: (not holders[name][1], order.index(name))):
        path, is_split = holders[name]
        unit = units.setdefault(groups[path], Unit([]))
        unit.names.append(name)
        size = tensors[name].numel() * tensors[name].element_size()
        if not is_split and name not in buffers and id(tensors[name]) not in stay:
            rooms.setdefault(path, {})[id(tensors[name])] = size
        if seen.pop(id(tensors[name]), None) is None:
            continue  # counted already: under its first name, or where a module that is split holds it
        if is_split:
            unit.own_bytes += size
        elif name in buffers:
            unit.buffer_bytes += size
        else:
            unit.weight_bytes += size
    for unit in units.values():
        holding = {holders[name][0] for name in unit.names}
        only = modules[next(iter(holding))]
        needed = [sum(rooms[path].values()) for path in holding if path in rooms]
        unit.room_bytes = min(unit.weight_bytes, max(needed, default=0))
        unit.is_table = len(holding) == 1 and isinstance(only, nn.Embedding) and only.max_norm is None
    return sorted(units.values(), key=lambda unit: min(order.index(name) for name in unit.names))


def _registration_order(module: nn.Module) -> list[str]:
    """List tensor names as a walk meets them: a module's own before its children's."""
    names = []
    for path, each in all_modules(module).items():
        prefix = f"{path}." if path else ""
        names += [prefix + name for name, tensor in each._parameters.items() if tensor is not None]
        names += [prefix + name for name, tensor in each._buffers.items() if tensor is not None]
    return names


def recount(plan: Any, module: nn.Module, memory: Mapping[Any, Any], whole: Collection[str] = ()) -> dict[Any, int]:
    """Check that a device map is valid for a module in a memory; give the bytes that each device must hold.

    ``memory`` has canonical keys and bytes; no ``"disk"`` means no limit. The module's dtypes are those loaded.
    """
    device_map, runtime = plan.device_map, plan.runtime
    homes = {}
    for name in all_tensors(module):
        key = covering_key(name, device_map)
        assert key is not None, f"{name} has no home"
        homes[name] = device_map[key]
    accelerators = {home for home in device_map.values() if home not in ("cpu", "disk")}
    main = plan.main_device
    assert main in accelerators or (main == "cpu" and not accelerators)
    if runtime == "accelerate" and accelerators:
        assert main == min(accelerators), "accelerate runs what is offloaded on the lowest number of the map"

    used: dict[Any, int] = {}
    rooms = [0]
    for unit in units_of(module, whole):
        places = {homes[name] for name in unit.names}
        assert len(places) == 1, f"{unit.names} rest apart: {places}"
        (home,) = places
        if home in accelerators or home == main:
            used[home] = used.get(home, 0) + unit.total_bytes
            continue
        used[home] = used.get(home, 0) + unit.total_bytes  # all of it is loaded there; what is no weight moves on
        used[main] = used.get(main, 0) + unit.buffer_bytes + unit.own_bytes
        if not (unit.is_table and runtime == "lading"):
            rooms.append(unit.room_bytes)
    used[main] = used.get(main, 0) + max(rooms)
    for device, size in used.items():
        limit = memory.get(device, None if device == "disk" else 0)
        assert limit is None or size <= limit, f"{size} bytes on {device}, which has {limit}"
    return used
