"""Put together what streams to accelerators: residents moved once, homes pinned, slots, hooks, and the way back.

Blocks that rest on an accelerator are moved there when the residency opens. Homes in host memory become pinned copies
of exactly their size; homes on disk stay views of their file. Closing brings every tensor back to the CPU, edits
included.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lading.errors import ResidencyError, name_list, refusal
from lading.placement.budget import Device
from lading.placement.plan import Placement, Plan
from lading.residency.backing import Regions, Spill, storage_span
from lading.residency.escorts import BlockEscort, DoorEscort, TableEscort
from lading.residency.hooks import Hooks
from lading.residency.room import SlotRoom
from lading.residency.schedule import Schedule
from lading.residency.settings import Settings
from lading.residency.slots import SlotBlock, SlotMover
from lading.residency.stats import ResidencyStats, stats_of
from lading.residency.supply import Supply, activation_bytes, device_bytes
from lading.residency.transfer import Transfer
from lading.residency.units import Unit, doors_of, units_of
from lading.units import format_bytes

CPU = torch.device("cpu")


class OnDevice:
    """Stream to one accelerator, and hold what rests on it and others. One thread builds and closes it.

    Args:
        model: on the CPU.
        plan: whose main device is an accelerator.
        settings: of files and calls.
    """

    def __init__(self, model: nn.Module, plan: Plan, settings: Settings) -> None:
        self._plan = plan
        self._reader = settings.reader
        self._transfer = settings.transfers(plan.main_device)
        used = dict.fromkeys(placement.execution_device for placement in plan.placements)
        self._devices = {
            device: self._transfer.device if device == plan.main_device else _device_of(device, settings.transfers)
            for device in used
        }
        self._moved: list[tuple[torch.Tensor, torch.Tensor | None]] = []
        self._arenas: list[torch.Tensor] = []
        units = units_of(model, plan)
        tables = [unit for unit in units if unit.placement.is_lookup]
        streamed = _by_placement([unit for unit in units if not unit.placement.is_lookup])
        _refuse_unknown_kinds(streamed)
        with ExitStack() as undo:
            undo.callback(self._bring_back)
            self._spill, blocks, pinned = self._settle_homes(streamed, tables, settings.offload_folder)
            undo.callback(self._spill.restore)
            self._move_residents(model, plan, tables)
            slots = _slots_of(blocks, plan.fetch_bytes)
            self._mover = self._open_slots(blocks, slots, pinned)
            undo.pop_all()
        self._sizes = [block.num_bytes for block in blocks]
        self._room = SlotRoom(self._sizes, slots)
        self.schedule = Schedule(self._sizes, self._room, self._mover, range(len(blocks)))
        self.hooks = Hooks(self.schedule)
        self._add_hooks(model, plan, settings, streamed, tables)

    def _add_hooks(
        self,
        model: nn.Module,
        plan: Plan,
        settings: Settings,
        streamed: Mapping[Placement, list[Unit]],
        tables: list[Unit],
    ) -> None:
        main = self._transfer.device
        self._state_hooks = []
        for index, units in enumerate(streamed.values()):
            for unit in units:
                self.hooks.add_block(
                    unit.module, index, BlockEscort(main, settings.skip_keys, unit.weights, self._mover.addresses)
                )
                self._state_hooks.append(unit.module.register_state_dict_post_hook(partial(_show_homes, self._mover)))  # type: ignore[no-untyped-call]
        for unit in tables:
            self.hooks.add_block(unit.module, None, TableEscort(CPU, main))
        if len(self._devices) > 1:
            modules = dict(model.named_modules(remove_duplicate=False))
            for placement in plan.placements:
                for key in placement.keys if not placement.is_streamed else ():
                    if key in modules and modules[key] is not model:
                        escort = BlockEscort(self._devices[placement.execution_device], settings.skip_keys)
                        self.hooks.add_block(modules[key], None, escort)
        numbers = {unit.module: index for index, units in enumerate(streamed.values()) for unit in units}
        for module, below in doors_of(model, numbers):
            door = DoorEscort(main, settings.skip_keys, is_returning=settings.io_same_device)
            self.hooks.add_door(module, below, door)

    def _settle_homes(
        self, streamed: Mapping[Placement, list[Unit]], tables: list[Unit], offload_folder: Path | None
    ) -> tuple[Spill, list[SlotBlock], frozenset[int]]:
        """Give homes in memory pinned copies, and homes on disk a file if they have none."""
        regions = Regions()
        on_disk = [
            weight
            for unit in [*tables, *(unit for units in streamed.values() for unit in units)]
            if unit.placement.home == "disk"
            for weight in unit.weights
        ]
        found = {weight: regions.find(storage_span(weight)) for weight in on_disk}
        spill = Spill([weight for weight, region in found.items() if region is None], offload_folder)
        blocks: list[SlotBlock] = []
        pinned: set[int] = set()
        for placement, units in streamed.items():
            weights = tuple(dict.fromkeys(weight for unit in units for weight in unit.weights))
            if placement.home != "disk":
                pinned.update(self._pin(weights, regions))
            files = tuple(found[weight] or spill.region if weight in found else None for weight in weights)
            blocks.append(SlotBlock(name=placement.name, weights=weights, regions=files))
        return spill, blocks, frozenset(pinned)

    def _pin(self, weights: tuple[nn.Parameter, ...], regions: Regions) -> Iterator[int]:
        """Move a block's weights into one piece of memory of their own and pin it; yield their addresses."""
        places = [0]
        for weight in weights:
            places.append(places[-1] + -(-weight.untyped_storage().nbytes() // 64) * 64)
        if not places[-1]:
            return
        buffer = mmap.mmap(-1, places[-1])
        arena = torch.frombuffer(buffer, dtype=torch.uint8)
        for weight, place in zip(weights, places, strict=False):
            storage = weight.untyped_storage()
            is_mapped = regions.find(storage_span(weight)) is not None
            self._moved.append((weight, weight.data if is_mapped else None))
            raw = torch.frombuffer(buffer, dtype=torch.uint8, count=storage.nbytes(), offset=place)
            raw.copy_(torch.empty(0, dtype=torch.uint8).set_(storage))
            empty = torch.empty(0, dtype=weight.dtype)
            weight.data = empty.set_(raw.untyped_storage(), weight.storage_offset(), weight.size(), weight.stride())
        if self._transfer.pin(arena):
            self._arenas.append(arena)
            yield from (weight.data_ptr() for weight in weights)

    def _move_residents(self, model: nn.Module, plan: Plan, tables: list[Unit]) -> None:
        """Move what rests on accelerators there, and the buffers of what runs there."""
        at_home = {id(unit.module) for unit in tables}
        modules = dict(model.named_modules(remove_duplicate=False))
        tensors = dict([*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)])
        regions = Regions()
        for placement in plan.placements:
            device = self._devices[placement.execution_device]
            for key in placement.keys:
                module = modules.get(key)
                if module is None:
                    self._move(tensors[key], device, regions)
                elif id(module) not in at_home:
                    kept = [] if placement.is_streamed else list(module.parameters())
                    for tensor in [*kept, *module.buffers()]:
                        self._move(tensor, device, regions)

    def _move(self, tensor: torch.Tensor, device: torch.device, regions: Regions) -> None:
        if tensor.device == device:
            return
        home = tensor.data if tensor.nbytes and regions.find(storage_span(tensor)) is not None else None
        try:
            tensor.data = tensor.data.to(device)
        except torch.OutOfMemoryError as error:
            raise self._no_room(device, tensor.nbytes) from error
        self._moved.append((tensor, home))

    def _open_slots(self, blocks: list[SlotBlock], slots: list[int], pinned: frozenset[int]) -> SlotMover:
        try:
            return SlotMover(blocks, slots, self._transfer, self._reader, pinned)
        except torch.OutOfMemoryError as error:
            raise self._no_room(self._transfer.device, sum(block.num_bytes for block in blocks)) from error

    def _no_room(self, device: torch.device, num_bytes: int) -> ResidencyError:
        held = sum(tensor.nbytes for tensor, _ in self._moved if tensor.device == device)
        return ResidencyError(
            refusal(
                f"memory of {device}",
                found=f"no room for {format_bytes(num_bytes)} beside {format_bytes(held)} of this model",
                expected="what the plan was told that it has",
                way_out="plan with less max_memory for this device, or end what else uses it",
            )
        )

    def close(self) -> None:
        """End the hooks and bring everything back."""
        self.schedule.close()
        self.hooks.remove()
        while self._state_hooks:
            self._state_hooks.pop().remove()
        self._mover.close()
        self._reader.close()
        while self._arenas:
            self._transfer.unpin(self._arenas.pop())
        self._bring_back()
        self._spill.restore()

    def _bring_back(self) -> None:
        """Put every tensor where it was: a view of its file if nobody edited it, else memory of the CPU."""
        while self._moved:
            tensor, home = self._moved.pop()
            here = tensor.data.to(CPU)
            is_same = home is not None and home.shape == here.shape and home.dtype == here.dtype and _same(home, here)
            tensor.data = home if home is not None and is_same else here

    @property
    def devices(self) -> tuple[torch.device, ...]:
        """List the accelerators that it uses."""
        return tuple(device for device in self._devices.values() if device != CPU)

    def supply(self) -> Supply:
        """Say what a convoy has to go by."""
        transfer = self._transfer
        return Supply(
            sizes=self._sizes,
            pace=self._mover.pace,
            used_bytes=partial(device_bytes, transfer.device),
            settle=lambda: transfer.wait(transfer.computed()),
            activation_bytes=activation_bytes(self._plan),
        )

    def stats(self) -> ResidencyStats:
        """Say what happened since the beginning."""
        return stats_of(
            self.schedule.counts,
            self._reader,
            resident_bytes=self._room.used_bytes,
            capacity_bytes=self._mover.num_bytes,
            edited_bytes=0,
            spilled_bytes=self._spill.num_bytes,
        )


def _same(first: torch.Tensor, second: torch.Tensor) -> bool:
    return torch.equal(first.contiguous().view(torch.uint8), second.contiguous().view(torch.uint8))


def _device_of(device: Device, transfers: Callable[[Device], Transfer]) -> torch.device:
    return CPU if device == "cpu" else transfers(device).device


def _by_placement(units: list[Unit]) -> dict[Placement, list[Unit]]:
    """Join the modules of tied weights: they are fetched as one."""
    joined: dict[str, list[Unit]] = {}
    for unit in units:
        joined.setdefault(unit.placement.name, []).append(unit)
    return {members[0].placement: members for members in joined.values()}


def _slots_of(blocks: list[SlotBlock], capacity: int) -> list[int]:
    """Give each block a slot: as many slots as there is room for, in turn along the model."""
    largest = max((block.num_bytes for block in blocks), default=1)
    count = max(1, min(len(blocks), capacity // max(1, largest)))
    return [index % count for index in range(len(blocks))]


def _refuse_unknown_kinds(streamed: Mapping[Placement, list[Unit]]) -> None:
    """Refuse weights that keep state beside their data, as quantised ones do: a slot would hold the data alone."""
    names = {
        f"{unit.name} ({type(weight).__name__})"
        for units in streamed.values()
        for unit in units
        for weight in unit.weights
        if type(weight) is not nn.Parameter
    }
    if names:
        raise ResidencyError(
            refusal(
                "blocks streamed to an accelerator",
                found=f"weights of other types than torch.nn.Parameter in {name_list(sorted(names))}",
                expected="plain parameters: what else these keep would stay behind",
                way_out="give the accelerator room for these blocks, or run the model on the CPU",
            )
        )


def _show_homes(mover: SlotMover, module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    """Let a state dict hold homes, also where another thread is in a forward: a hook."""
    for name, weight in module.named_parameters(remove_duplicate=False):
        home = mover.home_of(weight)
        if home is not None and f"{prefix}{name}" in state:
            state[f"{prefix}{name}"] = home
