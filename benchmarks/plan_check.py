"""Check a device map against the module it was made for, and find the best there could have been.

Independent of what it checks: no line of lading is used, only the module, the map and the memory. Written to be plain,
not fast. `Inventory` lists what a module holds; `check` says what is wrong with a map; `best_of` solves the contiguous
problem again, with blocks cut anew.

The rules. Every parameter and buffer has a home: that of the longest dotted prefix of its name. A tensor that stands in
several places is counted once. A module that must not be split has one home. What rests on ``cpu`` or ``disk`` while an
accelerator runs the model (the one with the lowest number in the map) is streamed, whole blocks at a time: that
accelerator also holds the buffers of what is streamed, and must have room for the largest streamed block. Without an
accelerator in the map the CPU runs the model, and what rests on disk is streamed.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import nn

Device = int | str
Memory = Mapping[Device, int]
"""Bytes of each device; a disk that is not named has no limit."""


class Held(NamedTuple):
    """One name of one tensor. Immutable."""

    name: str
    identity: int
    num_bytes: int
    is_parameter: bool
    whole: int | None
    """Which module that must not be split it belongs to, the outermost."""
    leaf: int
    """What it would be streamed with: that module, or the leaf module, or the other tensors of the module itself."""
    block: int
    """The same where modules that use their children's weights without calling them are whole too."""
    is_own: bool
    """It belongs to a module that is split, or that is never called."""


class Unit(NamedTuple):
    """A block of the programme: what moves together. Immutable."""

    weight: int
    """Bytes that leave the accelerator when it is streamed; its room while it is fetched."""
    fixed: int
    """Bytes that stay."""


@dataclass(slots=True)
class Inventory:
    """List the tensors of a module, under every name they have, in the order of registration. One thread."""

    no_split: frozenset[str]
    held: list[Held] = field(default_factory=list)
    _num_groups: int = 0

    @classmethod
    def of(cls, module: nn.Module, no_split: Sequence[str]) -> Inventory:
        """Walk a module."""
        inventory = cls(frozenset(no_split))
        inventory._walk(module, "", None, None)
        return inventory

    def _walk(self, module: nn.Module, path: str, whole: int | None, block: int | None) -> None:
        if whole is None and type(module).__name__ in self.no_split:
            whole = self._new_group()
        if block is None and (whole is not None or uses_its_children(module)):
            block = whole if whole is not None else self._new_group()
        prefix = f"{path}." if path else ""
        is_never_called = isinstance(module, (nn.ParameterList, nn.ParameterDict))
        leaf, is_own = self._new_group(), is_never_called or any(any(_tensors(child)) for child in module.children())
        for name, tensor in _tensors(module, recurse=False):
            self.held.append(
                Held(
                    name=prefix + name,
                    identity=_identity(tensor, is_parameter=name in module._parameters),
                    num_bytes=tensor.numel() * tensor.element_size(),
                    is_parameter=name in module._parameters,  # a buffer may be of the class Parameter
                    whole=whole,
                    leaf=leaf if whole is None else whole,
                    block=leaf if block is None else block,
                    is_own=is_own and block is None,
                )
            )
        for name, child in module._modules.items():  # also those that stand in several places
            if child is not None:
                self._walk(child, prefix + name, whole, block)

    def _new_group(self) -> int:
        self._num_groups += 1
        return self._num_groups

    @property
    def total_bytes(self) -> int:
        """Count each tensor once."""
        return sum({each.identity: each.num_bytes for each in self.held}.values())

    def units(self) -> list[Unit]:
        """Join the blocks that share a tensor, at the place of the first, and weigh them.

        Parameters that a split module holds itself, or a list of parameters, never move, whatever they are joined to:
        no forward of their own says when they are needed.
        """
        leaders: dict[int, int] = {}

        def leader(group: int) -> int:
            while leaders.setdefault(group, group) != group:
                group = leaders[group]
            return group

        first: dict[int, Held] = {}
        for each in self.held:
            one = first.setdefault(each.identity, each)
            low, high = sorted((leader(one.block), leader(each.block)))
            leaders[high] = low
        own = {each.identity for each in self.held if each.is_own}
        sizes: dict[int, list[int]] = {}
        for each in self.held:
            weight_and_fixed = sizes.setdefault(leader(each.block), [0, 0])
            if first[each.identity] is each:
                is_fixed = not each.is_parameter or each.identity in own
                weight_and_fixed[is_fixed] += each.num_bytes
        return [Unit(weight, fixed) for weight, fixed in sizes.values()]


def _tensors(module: nn.Module, *, recurse: bool = True) -> Any:
    yield from module.named_parameters(recurse=recurse, remove_duplicate=False)
    yield from module.named_buffers(recurse=recurse, remove_duplicate=False)


def uses_its_children(module: nn.Module) -> bool:
    """Say whether a module reads its children's weights itself, so that no hook on a child can fetch them in time."""
    return isinstance(module, (nn.MultiheadAttention, nn.TransformerEncoderLayer)) or hasattr(
        module, "parametrizations"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What a device map comes to. Immutable."""

    faults: tuple[str, ...]
    """Each begins with a kind and a colon; none: the map is valid."""
    kept_bytes: int
    """What rests where it runs, buffers of streamed modules included; 0 if accelerators are there and run nothing."""
    aside_bytes: int
    """What a split module shares with a streamed block: it is sent along by name, but its room stays with the model."""
    is_whole: bool
    """Whether nothing is streamed, and accelerators run everything if there are any."""
    parts_uncalled: bool
    """Whether a module that reads its children's weights itself is divided: it would not run. No fault by itself."""
    main: Device


def check(
    inventory: Inventory, device_map: Mapping[str, Device], memory: Memory, main: Device | None = None
) -> Finding:
    """Recompute from its names what a device map asks for; ``main`` other than None is taken in place of the first."""
    faults: dict[str, str] = {}
    used_devices = list(dict.fromkeys(device_map.values()))
    if main is None:
        main = next(iter(set(used_devices) - {"cpu", "disk"}), "cpu")  # as accelerate 1.15 does in dispatch_model
    tiers = ("disk",) if main == "cpu" else ("cpu", "disk")
    homes, uncovered = {}, []
    for each in inventory.held:
        home = home_of(each.name, device_map)
        if home is None:
            uncovered.append(each.name)
        else:
            homes[each.name] = home
    if uncovered:
        faults["uncovered"] = f"{len(uncovered)} tensors, first {uncovered[0]}"
    kept, is_whole = 0, True
    used: dict[Device, int] = dict.fromkeys([*used_devices, main], 0)
    counted: set[tuple[int, Device]] = set()
    where: dict[int, set[Device]] = {}
    rooms: dict[int, int] = {}
    streamed: set[tuple[int, int]] = set()
    wholes: dict[int, set[Device]] = {}
    blocks: dict[int, set[Device]] = {}
    for each in inventory.held:
        home = homes.get(each.name)
        if home is None:
            continue
        where.setdefault(each.identity, set()).add(home)
        blocks.setdefault(each.block, set()).add(home)
        if each.whole is not None:
            wholes.setdefault(each.whole, set()).add(home)
        is_streamed = home in tiers
        is_whole = is_whole and not is_streamed
        if is_streamed and each.is_parameter and (each.leaf, each.identity) not in streamed:
            streamed.add((each.leaf, each.identity))
            rooms[each.leaf] = rooms.get(each.leaf, 0) + each.num_bytes
        rests_on = main if is_streamed and not each.is_parameter else home
        if (each.identity, rests_on) in counted:
            continue
        counted.add((each.identity, rests_on))
        used[rests_on] += each.num_bytes
        kept += each.num_bytes if rests_on not in tiers else 0
    own = {each.identity for each in inventory.held if each.is_own}
    aside = {
        each.identity: each.num_bytes
        for each in inventory.held
        if each.identity in own and not each.is_own and each.is_parameter and homes.get(each.name) in tiers
    }
    split = [devices for devices in wholes.values() if len(devices) > 1]
    if split:
        faults["split"] = f"{len(split)} modules that must stay whole"
    parted = [devices for devices in where.values() if len(devices) > 1]
    if parted:
        faults["parted"] = f"{len(parted)} shared tensors on several devices, first {sorted(map(str, parted[0]))}"
    for device, size in used.items():
        limit = memory.get(device, None if device == "disk" else 0)
        if limit is not None and size > limit:
            faults[f"over budget of {'an accelerator' if isinstance(device, int) else device}"] = (
                f"device {device!r} holds {size:,} of {limit:,}"
            )
    room = max(rooms.values(), default=0)
    if used[main] <= memory.get(main, 0) < used[main] + room:
        faults["no room to stream"] = f"device {main!r} holds {used[main]:,} and needs {room:,} of {memory[main]:,}"
    has_accelerators = any(isinstance(device, int) for device in memory)
    return Finding(
        faults=tuple(f"{kind}: {text}" for kind, text in faults.items()),
        kept_bytes=0 if has_accelerators and main == "cpu" else kept,
        aside_bytes=sum(aside.values()),
        is_whole=is_whole and not uncovered and not (has_accelerators and main == "cpu"),
        parts_uncalled=any(len(devices) > 1 for devices in blocks.values()) and not split,
        main=main,
    )


def home_of(name: str, device_map: Mapping[str, Device]) -> Device | None:
    """Find the entry with the longest dotted prefix of a name; the empty one is a prefix of all."""
    while name not in device_map:
        if not name:
            return None
        name = name.rpartition(".")[0]
    return device_map[name]


# The best there could have been


@dataclass(frozen=True, slots=True, kw_only=True)
class Best:
    """What the best contiguous placement reaches. Immutable."""

    kept_bytes: int
    """0 where accelerators can keep nothing, so that the CPU runs the model; -1 where it cannot run either."""
    is_whole: bool
    """Everything fits on the accelerators (on the CPU, if there are none)."""
    is_decided: bool = True
    """False: what is streamed may or may not be divided between host memory and a limited disk; nobody counted."""


def best_of(units: Sequence[Unit], memory: Memory) -> Best:
    """Solve the problem: one run of neighbours for each accelerator, in any order; the rest streams.

    What streams runs on the accelerator with the lowest number of those that hold anything, which accelerate's
    ``dispatch_model`` takes, wherever its run stands.

    Host memory and a disk of known size surely hold what is smaller than both by the largest block and all buffers
    (which a planner may also keep where blocks are streamed from), and surely do not hold what is larger than both; in
    between the problem counts as undecided.
    """
    accelerators = [memory[device] for device in sorted(each for each in memory if isinstance(each, int))]
    capacities, total = accelerators or [memory.get("cpu", 0)], sum(map(sum, units))
    if all_fit(units, capacities):
        return Best(kept_bytes=total, is_whole=True)
    kept = most_kept(units, capacities)
    if kept is None and accelerators:
        host = memory.get("cpu", 0)
        on_cpu = total if total <= host else most_kept(units, [host])
        runs_on_cpu = on_cpu is not None and total - on_cpu <= memory.get("disk", total)
        return Best(kept_bytes=0 if runs_on_cpu else -1, is_whole=False)
    if kept is None:
        return Best(kept_bytes=-1, is_whole=False)
    left = memory.get("disk", total) + (memory.get("cpu", 0) if accelerators else 0) - (total - kept)
    is_decided = left < 0 or left >= max(map(sum, units)) + sum(unit.fixed for unit in units) or "disk" not in memory
    return Best(
        kept_bytes=kept if left >= 0 or not is_decided else -1,
        is_whole=False,
        is_decided=is_decided,
    )


def all_fit(units: Sequence[Unit], capacities: Sequence[int]) -> bool:
    """Say whether runs of neighbours, one for each capacity in any order, cover all."""
    sums = list(accumulate((weight + fixed for weight, fixed in units), initial=0))

    @cache
    def reached(left: tuple[int, ...]) -> int:
        """Count the first units that these accelerators can hold: the longer a run, the better."""
        ends = [
            bisect_right(sums, sums[reached((*left[:at], *left[at + 1 :]))] + capacity) - 1
            for at, capacity in enumerate(left)
            if capacity not in left[:at] and capacity >= 0
        ]
        return max(ends, default=0)

    return reached(tuple(sorted(capacities))) == len(units)


def least_equal(units: Sequence[Unit], num_devices: int) -> int:
    """Find the least capacity with which so many equal accelerators hold all."""
    low, high = 0, sum(map(sum, units))
    while low < high:
        middle = (low + high) // 2
        if all_fit(units, [middle] * num_devices):
            high = middle
        else:
            low = middle + 1
    return low


def most_kept(units: Sequence[Unit], capacities: Sequence[int]) -> int | None:
    """Give the most bytes that can rest on accelerators, at least one weight on the main one, when not all can.

    For every size that the largest streamed unit may have, for every accelerator as the main one, for every way to
    divide those after it in the list between both sides of it, for every run of it: what the others can keep beside it.
    Of what they keep, both the weight and the fixed bytes count: what they do not take of the latter lies on the main
    one.

    Args:
        units: what is placed, in execution order.
        capacities: of accelerators in the order of their numbers. The main one is the first of those used.
    """
    best = -1
    for room in sorted({unit.weight for unit in units}):
        if sum(capacities) - room - sum(unit.fixed for unit in units) <= best:
            break  # nothing larger can leave more
        best = max(best, _Search(units, room).run(capacities, best))
    return best + sum(unit.fixed for unit in units) if best > 0 else None


_NEVER = -(2**80)

Front = list[tuple[int, int]]
"""Weight kept and fixed bytes kept, where neither can grow without the other falling; the heaviest first."""


class _Search:
    """Search with room for streamed units up to one size. One thread."""

    def __init__(self, units: Sequence[Unit], room: int) -> None:
        self._room = room
        self._weights = list(accumulate((unit.weight for unit in units), initial=0))
        self._num_fixed_bytes = sum(unit.fixed for unit in units)
        self._behind = _Suffixes(units, room)
        self._before = _Suffixes(units[::-1], room)

    def run(self, capacities: Sequence[int], best: int) -> int:
        for at, capacity in enumerate(capacities):
            if capacity <= max(capacities[:at], default=-1):
                continue  # that one, which would be unused, could take its place
            for before, behind in _divisions(capacities[at + 1 :]):
                fronts = self._before.fronts(before)[::-1], self._behind.fronts(behind)
                best = self._run_between(*fronts, capacity, best)
        return best

    def _run_between(self, before: list[Front], behind: list[Front], capacity: int, best: int) -> int:
        """Try every run of the main accelerator, with what others can keep up to its start and from its end."""
        weights, spare = self._weights, capacity - self._room - self._num_fixed_bytes
        for start, front in enumerate(before[:-1]):
            if not front:
                break  # what must not stream is in its way
            for end in range(bisect_right(weights, weights[start] + capacity - self._room) - 1, start, -1):
                own = weights[end] - weights[start]
                if not own or not behind[end] or front[0][0] + own + behind[end][0][0] <= best:
                    break  # a shorter run cannot lead to more
                best = max(best, own + _heaviest(front, behind[end], own - spare))
        return best


class _Suffixes:
    """Find what accelerators that are not the main one can keep from each position on. One thread."""

    def __init__(self, units: Sequence[Unit], room: int) -> None:
        self._weights = list(accumulate((unit.weight for unit in units), initial=0))
        self._fixed = list(accumulate((unit.fixed for unit in units), initial=0))
        self._totals = [weight + fixed for weight, fixed in zip(self._weights, self._fixed, strict=True)]
        self._may_stream = [unit.weight <= room for unit in units]
        self._fronts: dict[tuple[int, ...], list[Front]] = {}

    def fronts(self, left: tuple[int, ...]) -> list[Front]:
        """Give a front for each position; an empty one where something must not stream and fits nowhere."""
        if left not in self._fronts:
            num_units = len(self._may_stream)
            fronts: list[Front] = [[] for _ in range(num_units)] + [[(0, 0)]]
            rests = [
                (capacity, self.fronts((*left[:at], *left[at + 1 :])))
                for at, capacity in enumerate(left)
                if capacity not in left[:at] and capacity >= 0
            ]
            for start in reversed(range(num_units)):
                found = list(fronts[start + 1]) if self._may_stream[start] else []
                for capacity, rest in rests:
                    end = bisect_right(self._totals, self._totals[start] + capacity) - 1  # the longer, the better
                    own = self._weights[end] - self._weights[start], self._fixed[end] - self._fixed[start]
                    found += [(own[0] + weight, own[1] + kept) for weight, kept in rest[end]]
                fronts[start] = _front(found)
            self._fronts[left] = fronts
        return self._fronts[left]


def _divisions(capacities: Sequence[int]) -> set[tuple[tuple[int, ...], tuple[int, ...]]]:
    """List every way to divide accelerators in two; equal ones are not told apart."""
    found: set[tuple[tuple[int, ...], tuple[int, ...]]] = {((), ())}
    for capacity in sorted(capacities):
        found = {pair for one, other in found for pair in (((*one, capacity), other), (one, (*other, capacity)))}
    return found


def _heaviest(before: Front, behind: Front, fixed: int) -> int:
    """Give the most weight that two sides keep of which the fixed bytes reach a number; less than nothing for none."""
    kept = [each for _, each in behind]
    places = [(weight, bisect_left(kept, fixed - each)) for weight, each in before]
    return max((weight + behind[at][0] for weight, at in places if at < len(kept)), default=_NEVER)


def _front(found: Front) -> Front:
    kept: Front = []
    for weight, fixed in sorted(found, reverse=True):
        if not kept or fixed > kept[-1][1]:
            kept.append((weight, fixed))
    return kept


def _identity(tensor: torch.Tensor, *, is_parameter: bool) -> int:
    """Tell tensors apart: parameters as objects, buffers by storage, for they are shared through ``.data``."""
    return id(tensor) if is_parameter else tensor.untyped_storage()._cdata
