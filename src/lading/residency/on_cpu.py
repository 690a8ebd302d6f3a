"""Put together what streams from disk to the CPU: files found behind weights, hooks at blocks, rows of tables.

Nothing moves when the residency opens, but for weights that are in no file.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from lading.checkpoint.pages import Span, expect_anything, expect_rows, merged
from lading.placement.plan import Plan
from lading.residency.backing import Region, Regions, Spill, storage_span
from lading.residency.hooks import Hooks
from lading.residency.mapped import MappedBlock, MappedMover
from lading.residency.room import ByteRoom
from lading.residency.rows import RowEscort
from lading.residency.schedule import Schedule
from lading.residency.settings import Settings
from lading.residency.stats import ResidencyStats, stats_of
from lading.residency.supply import Supply, activation_bytes, anonymous_bytes
from lading.residency.units import Unit, doors_of, units_of


class OnCpu:
    """Stream from files to the CPU. One thread builds and closes it.

    Args:
        model: on the CPU.
        plan: whose main device is the CPU.
        settings: of files.
    """

    def __init__(self, model: nn.Module, plan: Plan, settings: Settings) -> None:
        self._plan = plan
        self._reader = settings.reader
        self.devices: tuple[torch.device, ...] = ()
        """Accelerators that it uses."""
        units = units_of(model, plan)
        blocks, self._spill = _blocks(units, settings.offload_folder)
        sizes = [_weight_bytes(block) for block in blocks]
        streamed = {id(weight) for unit in units for weight in unit.weights}
        tensors = (*model.parameters(), *model.buffers())  # a forward may write to buffers beside an eviction
        resident = [storage_span(tensor) for tensor in tensors if id(tensor) not in streamed]
        self._room = ByteRoom(sizes, _capacity(plan, units, sizes))
        self._mover = MappedMover(blocks, resident, settings.reader, self._room.keep)
        fetched = [index for index, unit in enumerate(units) if not unit.is_lookup]
        self._fetched_sizes = [0 if unit.is_lookup else size for unit, size in zip(units, sizes, strict=True)]
        self.schedule = Schedule(sizes, self._room, self._mover, fetched)
        self.hooks = Hooks(self.schedule)
        self._tables = [
            span for unit, block in zip(units, blocks, strict=True) for span in block.spans if unit.is_lookup
        ]
        for span in self._tables:
            expect_rows(span)
        for index, (unit, block) in enumerate(zip(units, blocks, strict=True)):
            if unit.is_lookup:
                escort = RowEscort(self.schedule, self._mover, index, unit, block)
                self.hooks.add_block(unit.module, None, escort)
            else:
                self.hooks.add_block(unit.module, index)
        numbers = {units[index].module: index for index in fetched}
        for module, below in doors_of(model, numbers):
            self.hooks.add_door(module, below)

    def close(self) -> None:
        """End the hooks, and take back into memory what was in no file."""
        self.schedule.close()
        self.hooks.remove()
        for span in self._tables:
            expect_anything(span)
        self._spill.restore()
        self._mover.close()
        self._reader.close()

    def supply(self) -> Supply:
        """Say what a convoy has to go by."""
        return Supply(
            sizes=self._fetched_sizes,
            pace=self._mover.pace,
            used_bytes=anonymous_bytes,
            settle=None,
            activation_bytes=activation_bytes(self._plan),
        )

    def stats(self) -> ResidencyStats:
        """Say what happened since the beginning."""
        return stats_of(
            self.schedule.counts,
            self._reader,
            resident_bytes=self._room.used_bytes,
            capacity_bytes=self._room.capacity,
            edited_bytes=self._mover.edited_bytes,
            spilled_bytes=self._spill.num_bytes,
        )


def _weight_bytes(block: MappedBlock) -> int:
    """Count a block as plans do, to the byte: rounded to pages, two blocks would not fit into the room for two."""
    return min(block.num_bytes, sum(weight.nbytes for weight, _ in block.weights))


def _capacity(plan: Plan, units: Sequence[Unit], sizes: Sequence[int]) -> int:
    """Give the bytes for what is fetched: as planned, or without a limit for two blocks and any one table."""
    largest = max((size for unit, size in zip(units, sizes, strict=True) if not unit.is_lookup), default=0)
    if any(use.budget_bytes is not None for use in plan.devices if use.device == plan.main_device):
        return max(plan.fetch_bytes, largest)
    return max(plan.fetch_bytes, 2 * largest, *sizes, 0)


def _blocks(units: Sequence[Unit], offload_folder: Path | None) -> tuple[list[MappedBlock], Spill]:
    """Find the files behind the units' weights; what is in none is written to one."""
    regions = Regions()
    found = {weight: regions.find(storage_span(weight)) for unit in units for weight in unit.weights}
    spill = Spill([weight for weight, region in found.items() if region is None], offload_folder)
    blocks = []
    for unit in units:
        pieces = [(found[weight] or spill.region, weight) for weight in unit.weights]
        ahead = [(region, weight) for region, weight in pieces if id(weight) not in unit.by_use]
        blocks.append(
            MappedBlock(
                name=unit.name,
                pieces=_joined(pieces),
                fetched=_joined(ahead),
                weights=tuple((weight, weight.data_ptr()) for weight in unit.weights),
                storages=tuple(weight.untyped_storage() for weight in unit.weights),
            )
        )
    return blocks, spill


def _joined(pieces: Sequence[tuple[Region | None, nn.Parameter]]) -> tuple[tuple[Region, Span], ...]:
    """Round weights to pages and join neighbours of one mapping."""
    by_region: dict[Span, tuple[Region, list[Span]]] = {}
    for region, weight in pieces:
        assert region is not None, "what has no file was spilled"
        by_region.setdefault(region.span, (region, []))[1].append(storage_span(weight))
    return tuple((region, span) for region, spans in by_region.values() for span in merged(spans))
