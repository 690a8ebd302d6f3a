"""Bring the pages of blocks that rest on disk into memory and drop them again: the mover for disk → CPU.

Weights stay views of their file's mapping all the time; nothing is copied and no tensor changes. Fetching faults pages
in ahead of whoever computes, evicting drops clean ones. What was edited is a page of the process's own, in no file: it
stays and is counted. A thread that reads an evicted weight all the same gets the right bytes, faulted in by the kernel:
what this file does decides memory and speed, never results.

The kernel maps up to a few megabytes around what was asked for (large folios, fault-around): these strays are dropped
too, unless they belong to a block that is here.

Concurrency: `fetch` and `evict` run one at a time (one worker); `begin` runs while nobody is inside.
"""

from __future__ import annotations

import os
import time
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from lading.checkpoint.pages import Span, drop, merged, open_pagemap
from lading.errors import ResidencyError
from lading.residency.backing import Region
from lading.residency.moving import Pace
from lading.residency.readers import STEP_BYTES, Reader

_GRAIN = 2 << 20  # the largest folio that the kernel maps at once


@dataclass(frozen=True, slots=True, kw_only=True)
class MappedBlock:
    """Say where the bytes of one block are. Immutable; spans are rounded to pages and do not touch."""

    name: str
    pieces: tuple[tuple[Region, Span], ...]
    fetched: tuple[tuple[Region, Span], ...]
    """What is read ahead: all but what is faulted in by use."""
    weights: tuple[tuple[nn.Parameter, int], ...]
    """Whose bytes these are, with their addresses."""
    storages: tuple[torch.UntypedStorage, ...]
    """Kept, so that no other memory ever has these addresses."""

    @property
    def spans(self) -> tuple[Span, ...]:
        """Give the addresses alone."""
        return tuple(span for _, span in self.pieces)

    @property
    def num_bytes(self) -> int:
        """Count the bytes of all its pages."""
        return sum(span.num_bytes for _, span in self.pieces)


class MappedMover:
    """Fetch and evict blocks that are views of files. See the head of this file.

    Args:
        blocks: the streamed ones.
        resident: spans that stay: blocks whose home is memory.
        reader: how bytes come in.
        on_edits: told block and bytes when edits to an absent block are found.
    """

    makes_copies = False

    def __init__(
        self,
        blocks: Sequence[MappedBlock],
        resident: Sequence[Span],
        reader: Reader,
        on_edits: Callable[[int, int], None],
    ) -> None:
        self._blocks = tuple(blocks)
        self._reader = reader
        self._on_edits = on_edits
        self._present: set[int] = set()
        owned = [(span, index) for index, block in enumerate(blocks) for span in block.spans]
        owned += [(span, -1) for span in merged(list(resident))]
        self._owned = sorted(owned)
        self._begins = [span.begin for span, _ in self._owned]
        self._longest = max((span.num_bytes for span, _ in self._owned), default=0)
        self._windows = [self._window(block) for block in blocks]
        self._files = tuple({id(region.file): region.file for block in blocks for region, _ in block.pieces}.values())
        self._everything = merged([window for windows in self._windows for window in windows])
        self._pagemap = open_pagemap()
        self.edited_bytes = 0
        self.pace = Pace()

    def _window(self, block: MappedBlock) -> tuple[Span, ...]:
        """Widen a block's spans to where strays may be, within the mappings."""
        wide = []
        for region, span in block.pieces:
            begin, end = span.outward(_GRAIN)
            bounds = region.span.outward()
            wide.append(Span(max(begin, bounds.begin), min(end, bounds.end)))
        return merged(wide)

    def begin(self) -> None:
        """Drop what was read between forwards, and count what was edited.

        Raises:
            CorruptShardError: a file was changed in place: reading a weight might kill the process.
        """
        for file in self._files:
            file.check()
        if self._pagemap is None:
            return
        edited = [
            sum(weight.nbytes for weight, address in block.weights if weight.data_ptr() != address)  # replaced
            for block in self._blocks
        ]
        for window in self._everything:
            for stretch, is_edited in self._pagemap.held(window):
                if not is_edited:
                    self._drop_strays(stretch)
                    continue
                for owned, index in self._owners(stretch):
                    if index >= 0:
                        edited[index] += min(owned.end, stretch.end) - max(owned.begin, stretch.begin)
        for index, num_bytes in enumerate(edited):
            if index not in self._present:
                self._on_edits(index, num_bytes)
        self.edited_bytes = sum(edited)

    def fetch(self, block: int) -> None:
        """Read a block's pages in, step by step, then drop strays around them."""
        began = time.perf_counter()
        self._present.add(block)
        files = {id(region.file): region.file for region, _ in self._blocks[block].fetched}
        try:
            for file in files.values():
                file.check()
            for region, span in self._blocks[block].fetched:
                for begin in range(span.begin, span.end, STEP_BYTES):
                    step = Span(begin, min(begin + STEP_BYTES, span.end))
                    self._reader.read(region, step, span.end)
        except BaseException:
            self._present.discard(block)
            raise
        for window in self._windows[block]:
            self._clean(self._edges(window, block), ())
        self.pace.note(sum(span.num_bytes for _, span in self._blocks[block].fetched), time.perf_counter() - began)

    def _edges(self, window: Span, block: int) -> Iterator[Span]:
        """Yield the parts of a window that are not the block's own."""
        begin = window.begin
        for span in self._blocks[block].spans:
            if span.end <= window.begin or span.begin >= window.end:
                continue
            if begin < span.begin:
                yield Span(begin, span.begin)
            begin = span.end
        if begin < window.end:
            yield Span(begin, window.end)

    def enter(self, block: int) -> None:
        """Do nothing: the weights are where they always are."""

    def join(self, block: int) -> None:
        """Do nothing."""

    def part(self, block: int) -> None:
        """Do nothing."""

    def leave(self, block: int) -> None:
        """Do nothing."""

    def evict(self, block: int) -> int:
        """Drop a block's clean pages and strays around them; give the bytes that were edited."""
        self._present.discard(block)
        return self._clean(self._windows[block], self._blocks[block].spans)

    def close(self) -> None:
        """Give descriptors back. Nobody is inside."""
        for file in self._files:
            file.close()
        self._pagemap = None

    def drop_rows(self, block: int) -> None:
        """Drop what was faulted in of a block by use."""
        self._clean(self._windows[block], self._blocks[block].spans)

    def _clean(self, windows: Iterable[Span], own: Sequence[Span]) -> int:
        if self._pagemap is None:
            return 0
        kept = 0
        for window in windows:
            for stretch, is_edited in self._pagemap.held(window):
                if is_edited:
                    kept += sum(max(0, min(span.end, stretch.end) - max(span.begin, stretch.begin)) for span in own)
                else:
                    self._drop_strays(stretch)
        return kept

    def _drop_strays(self, stretch: Span) -> None:
        """Drop a clean stretch, but for what belongs to blocks that are here."""
        begin = stretch.begin
        for owned, index in (*self._owners(stretch), (Span(stretch.end, stretch.end), -1)):
            if index >= 0 and index not in self._present:
                continue
            if begin < owned.begin:
                failure = drop(Span(begin, min(owned.begin, stretch.end)))
                if failure:
                    raise ResidencyError(f"dropping pages of weights failed: {os.strerror(failure)}")
            begin = max(begin, owned.end)

    def _owners(self, stretch: Span) -> Iterator[tuple[Span, int]]:
        """Yield who owns bytes of a stretch, in the order of addresses; spans of tied blocks may overlap."""
        first = bisect_right(self._begins, stretch.begin - self._longest)
        for span, index in self._owned[max(0, first - 1) :]:
            if span.begin >= stretch.end:
                return
            if span.end > stretch.begin:
                yield span, index
