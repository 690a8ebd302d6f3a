"""Copy streamed blocks into fixed slots on an accelerator and point their parameters there: the mover for → device.

A block always gets the same slot, and a parameter the same address in it: captured graphs and compiled code may rely on
it. Between forwards parameters point to their homes in host memory; while somebody is inside their block they point to
the slot. What a parameter points to is the one that counts: an edit made inside a forward (seen by ``_version``) is
written back before the parameter points home again.

Orders, not waits: a slot is overwritten only after the mark that its last visitor left, and a visitor computes only
after the mark that the copy ended. The host waits for neither.

Concurrency: `fetch` and `evict` run one at a time (one worker); all else is called under the schedule's lock.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from lading.checkpoint.pages import Span, drop, open_pagemap
from lading.residency.backing import Region
from lading.residency.moving import Pace
from lading.residency.readers import STEP_BYTES, Reader
from lading.residency.transfer import Mark, Transfer

_ALIGNMENT = 512  # of torch's allocators: kernels choose the same path as for a resident copy
_NUM_STAGES = 3
_NUM_TIMED = 4  # fetches that the worker waits for, to know the rate


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotBlock:
    """Say what is copied into a slot together. Immutable."""

    name: str
    weights: tuple[nn.Parameter, ...]
    """Each once, contiguous or not."""
    regions: tuple[Region | None, ...]
    """The file behind each home that rests on disk; None for homes in memory."""

    @property
    def places(self) -> list[int]:
        """Give each weight's offset in the slot; the last entry is the bytes of all."""
        places = [0]
        for weight in self.weights:
            places.append(places[-1] + -(-weight.untyped_storage().nbytes() // _ALIGNMENT) * _ALIGNMENT)
        return places

    @property
    def num_bytes(self) -> int:
        """Count the bytes of a slot that it needs."""
        return self.places[-1]


class SlotMover:
    """Fetch blocks into slots. See the head of this file.

    Args:
        blocks: the streamed ones.
        slots: the slot of each.
        transfer: copies.
        reader: reads homes that rest on disk.
        pinned: addresses of homes that the device reads by itself.

    Raises:
        torch.OutOfMemoryError: the device has no room for the slots.
    """

    makes_copies = True

    def __init__(
        self,
        blocks: Sequence[SlotBlock],
        slots: Sequence[int],
        transfer: Transfer,
        reader: Reader,
        pinned: frozenset[int],
    ) -> None:
        self._blocks = tuple(blocks)
        self._slots = tuple(slots)
        self._transfer = transfer
        self._reader = reader
        widths: dict[int, int] = {}
        for block, slot in zip(blocks, slots, strict=True):
            widths[slot] = max(widths.get(slot, 0), block.num_bytes)
        self._memory = {slot: transfer.allocate(width) for slot, width in widths.items()}
        self._left: dict[int, dict[int, Mark]] = {slot: {} for slot in widths}
        self._ready: dict[int, Mark] = {}
        self._inside: dict[int, list[tuple[torch.Tensor, int]]] = {}
        self._homes: dict[int, torch.Tensor] = {}
        self._pinned = pinned
        self._stages: list[tuple[torch.Tensor, Mark | None]] = []
        self._next_stage = 0
        self._is_stage_pinned = False
        self.num_bytes = sum(widths.values())
        self._pagemap = open_pagemap()
        self.pace = Pace()
        self._num_timed = 0

    @property
    def addresses(self) -> frozenset[int]:
        """Give where the slots are."""
        return frozenset(memory.untyped_storage().data_ptr() for memory in self._memory.values())

    def begin(self) -> None:
        """Do nothing: homes are what they are, and copies of the last forwards were forgotten."""

    def fetch(self, block: int) -> None:
        """Queue the copies of a block into its slot, after its last visitors' marks."""
        slot, plan = self._slots[block], self._blocks[block]
        is_first = not self._left[slot] and self._num_timed < _NUM_TIMED
        began = time.perf_counter()
        for mark in self._left[slot].values():
            self._transfer.hold_copies(mark)
        self._left[slot].clear()
        memory = self._memory[slot]
        for weight, region, place in zip(plan.weights, plan.regions, plan.places, strict=False):
            source = _raw(weight.data)
            target = memory[place : place + len(source)]
            if region is None and source.data_ptr() in self._pinned:
                self._transfer.copy(target, source)
            else:
                self._stage(target, source, region)
        self._ready[block] = self._transfer.copied()
        if is_first:  # only those into slots that nobody used: else it waits for what is computed, too
            self._num_timed += 1
            self._transfer.wait(self._ready[block])
            self.pace.note(plan.num_bytes, time.perf_counter() - began)

    def _stage(self, target: torch.Tensor, source: torch.Tensor, region: Region | None) -> None:
        """Copy through a small ring of pinned buffers; drop a file's pages behind it."""
        for begin in range(0, len(source), STEP_BYTES):
            piece = source[begin : begin + STEP_BYTES]
            span = Span(piece.data_ptr(), piece.data_ptr() + len(piece))
            if region is not None and region.span.begin <= span.begin and span.end <= region.span.end:
                region.file.check()
                self._reader.read(region, span, source.data_ptr() + len(source))
            buffer = self._free_stage()[: len(piece)]
            buffer.copy_(piece)
            if region is not None and self._pagemap is not None:
                for stretch, is_edited in self._pagemap.held(span):
                    if not is_edited:
                        drop(stretch)
            self._transfer.copy(target[begin : begin + len(piece)], buffer)
            self._stages[self._next_stage] = (self._stages[self._next_stage][0], self._transfer.copied())
            self._next_stage = (self._next_stage + 1) % _NUM_STAGES

    def _free_stage(self) -> torch.Tensor:
        while len(self._stages) < _NUM_STAGES:
            buffer = torch.empty(STEP_BYTES, dtype=torch.uint8)
            self._is_stage_pinned = self._transfer.pin(buffer)
            self._stages.append((buffer, None))
        buffer, mark = self._stages[self._next_stage]
        if mark is not None:
            self._transfer.wait(mark)
        return buffer

    def enter(self, block: int) -> None:
        """Point the parameters to the slot."""
        slot, plan = self._memory[self._slots[block]], self._blocks[block]
        inside = []
        for weight, place in zip(plan.weights, plan.places, strict=False):
            home = weight.data
            self._homes[id(weight)] = home
            num_bytes = weight.untyped_storage().nbytes()
            weight.data = _shown(slot[place : place + num_bytes], home)
            inside.append((home, weight._version))
        self._inside[block] = inside

    def join(self, block: int) -> None:
        """Let the calling thread compute after the copy."""
        self._transfer.hold_compute(self._ready[block])

    def part(self, block: int) -> None:
        """Note where the calling thread's computing is, before which the slot must not be overwritten."""
        self._left[self._slots[block]][threading.get_ident()] = self._transfer.computed()

    def leave(self, block: int) -> None:
        """Point the parameters home, edits first."""
        for weight, (home, version) in zip(self._blocks[block].weights, self._inside.pop(block), strict=True):
            if weight._version != version:
                home.copy_(weight.data)
            weight.data = home
            del self._homes[id(weight)]

    def evict(self, block: int) -> int:
        """Forget the copy; the slot keeps its memory."""
        self._ready.pop(block, None)
        return 0

    def home_of(self, weight: torch.Tensor) -> torch.Tensor | None:
        """Give the home of a parameter that points to a slot now; None for others."""
        return self._homes.get(id(weight))

    def close(self) -> None:
        """Free the slots. Nobody is inside."""
        for marks in self._left.values():
            for mark in marks.values():
                self._transfer.wait(mark)
        for buffer, _ in self._stages:
            if self._is_stage_pinned:
                self._transfer.unpin(buffer)
        self._memory.clear()
        self._stages.clear()


def _raw(tensor: torch.Tensor) -> torch.Tensor:
    """View all bytes of a tensor's storage: uint8 [bytes]."""
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())


def _shown(raw: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """View bytes of a slot as a tensor of another's dtype and layout."""
    flat = raw[: raw.numel() // like.element_size() * like.element_size()].view(like.dtype)
    return flat.as_strided(like.size(), like.stride(), flat.storage_offset() + like.storage_offset())
