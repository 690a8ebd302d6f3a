"""Begin, watch and end the streaming of one model's blocks: the lifetime of hooks, worker and files.

`lading.offload` is the public door. While a residency is open, the model's streamed blocks are on their execution
device exactly while their forward runs; the model itself stays the same object with the same parameters.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from torch import nn

from lading.checkpoint.pages import Span, expect_anything, expect_rows, merged
from lading.errors import ResidencyError, refusal
from lading.placement.plan import Plan
from lading.residency.backing import Region, Regions, Spill, storage_span
from lading.residency.hooks import Hooks, hooks_of
from lading.residency.mapped import MappedBlock, MappedMover
from lading.residency.readers import Reader
from lading.residency.room import ByteRoom
from lading.residency.rows import RowEscort
from lading.residency.schedule import Schedule
from lading.residency.stats import ResidencyStats
from lading.residency.units import Unit, doors_of, units_of


class Residency:
    """Keep a model's streamed blocks where they have to be. Made by `lading.offload`; a context manager.

    Any number of threads may call the model meanwhile. Weights may be read at any time; to write to them while another
    thread may be in a forward, use `editing`.

    Example:
        >>> with lading.offload(model, plan) as residency:   # doctest: +SKIP
        ...     model(**inputs)
        ...     print(residency.stats())
    """

    def __init__(self, model: nn.Module, plan: Plan, *, offload_folder: Path | None, reader: Reader) -> None:
        self.plan = plan
        self._parts = _Mapped(model, plan, offload_folder, reader)
        self._parts.hooks.owner = self
        self._is_open = True
        self._finalizer = weakref.finalize(model, self._parts.schedule.abandon)

    @staticmethod
    def of(model: nn.Module) -> Residency | None:
        """Give the open residency of a model; None where there is none."""
        hooks = hooks_of(model)
        return hooks.owner if hooks is not None and isinstance(hooks.owner, Residency) else None

    @contextmanager
    def editing(self) -> Iterator[None]:
        """Wait until no forward runs, and hold new ones back, while weights are edited.

        Raises:
            ResidencyError: called inside a forward of this model, which would wait for itself.
        """
        if self._parts.hooks.caller.visit is not None:
            raise ResidencyError(
                refusal(
                    "residency.editing()",
                    found="a forward of this model around it, in this thread",
                    expected="none",
                    way_out="edit before or after the forward",
                )
            )
        with self._parts.schedule.editing():
            yield

    def stats(self) -> ResidencyStats:
        """Say what happened since the beginning: a snapshot."""
        return self._parts.stats()

    def close(self) -> None:
        """Wait for forwards that run, take the hooks off and leave the model as it was. Twice is fine."""
        if not self._is_open:
            return
        if self._parts.hooks.caller.visit is not None:
            raise ResidencyError(
                refusal(
                    "residency.close()",
                    found="a forward of this model around it, in this thread",
                    expected="none",
                    way_out="close after the forward",
                )
            )
        self._is_open = False
        self._finalizer.detach()
        self._parts.close()

    def __enter__(self) -> Residency:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "open" if self._is_open else "closed"
        return f"<Residency {state}: {self.stats()}>"


class _Mapped:
    """The parts that stream from files to the CPU, put together."""

    def __init__(self, model: nn.Module, plan: Plan, offload_folder: Path | None, reader: Reader) -> None:
        self._reader = reader
        units = units_of(model, plan)
        blocks, self._spill = _blocks(units, offload_folder)
        sizes = [_weight_bytes(block) for block in blocks]
        streamed = {id(weight) for unit in units for weight in unit.weights}
        resident = [storage_span(weight) for weight in model.parameters() if id(weight) not in streamed]
        self._room = ByteRoom(sizes, _capacity(plan))
        self._mover = MappedMover(blocks, resident, reader, self._room.keep)
        fetched = [index for index, unit in enumerate(units) if not unit.is_lookup]
        self.schedule = Schedule(sizes, self._room, self._mover, fetched)
        self.hooks = Hooks(self.schedule)
        self._tables = [
            span for unit, block in zip(units, blocks, strict=True) for span in block.spans if unit.is_lookup
        ]
        for span in self._tables:
            expect_rows(span)
        for index, (unit, block) in enumerate(zip(units, blocks, strict=True)):
            if unit.is_lookup:
                escort = RowEscort(self.schedule, self._mover, index, unit.module, block)
                self.hooks.add_block(unit.module, None, escort)
            else:
                self.hooks.add_block(unit.module, index)
        for module, below in doors_of(model, units):
            self.hooks.add_door(module, below & frozenset(fetched))

    def close(self) -> None:
        self.schedule.close()
        self.hooks.remove()
        for span in self._tables:
            expect_anything(span)
        self._spill.restore()

    def stats(self) -> ResidencyStats:
        counts = self.schedule.counts
        return ResidencyStats(
            fetched_bytes=counts.fetched_bytes,
            disk_bytes=self._reader.cold_bytes,
            fetches=counts.fetches,
            evictions=counts.evictions,
            hits=counts.hits,
            waits=counts.waits,
            wait_s=counts.wait_s,
            resident_bytes=self._room.used_bytes,
            peak_bytes=counts.peak_bytes,
            capacity_bytes=self._room.capacity,
            edited_bytes=self._mover.edited_bytes,
            spilled_bytes=self._spill.num_bytes,
            reader=self._reader.name,
            read_bytes_per_s=self._reader.cold_bytes / self._reader.cold_s if self._reader.cold_s else None,
        )


def _weight_bytes(block: MappedBlock) -> int:
    """Count a block as plans do, to the byte: rounded to pages, two blocks would not fit into the room for two."""
    return min(block.num_bytes, sum(weight.nbytes for weight, _ in block.weights))


def _capacity(plan: Plan) -> int:
    """Give the bytes of the CPU's budget that the plan keeps for fetched blocks, and what it leaves."""
    (use,) = (use for use in plan.devices if use.device == plan.main_device)
    return (use.free_bytes or 0) + use.reserved.get("fetched blocks", 0)


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
