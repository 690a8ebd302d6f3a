"""Let an embedding table stay on disk: ask ahead for the rows that a forward gathers, and drop them after it.

The kernel maps 64 KiB around each row that is touched; that is what is kept room for.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch
from torch import nn

from lading.checkpoint.pages import Span, merged
from lading.residency.hooks import Arguments, Stay
from lading.residency.mapped import MappedBlock, MappedMover
from lading.residency.schedule import Schedule, Visit

_AROUND_BYTES = 64 << 10
_IDS = (torch.int32, torch.int64)


class RowEscort:
    """Escort calls of one ``nn.Embedding`` whose weight is a view of a file. Any thread.

    Args:
        schedule: lends the room for rows.
        mover: drops them.
        index: the table's number there.
        table: an ``nn.Embedding``; called with ids of any shape, int32 or int64.
        block: where its weight is.
    """

    def __init__(
        self, schedule: Schedule, mover: MappedMover, index: int, table: nn.Module, block: MappedBlock
    ) -> None:
        self._schedule = schedule
        self._mover = mover
        self._index = index
        self._weight = table.get_parameter("weight")
        (self._region, self._span), *_ = block.pieces
        self._num_bytes = block.num_bytes

    def arrive(self, visit: Visit, arguments: Arguments) -> tuple[Arguments | None, Stay | None]:
        """Borrow room for the rows, and have the kernel begin reading them."""
        args, kwargs = arguments
        ids = args[0] if args else kwargs.get("input")
        if not isinstance(ids, torch.Tensor) or ids.dtype not in _IDS or ids.is_meta:
            return None, None  # a table of another class may be called with anything
        if not self._span.begin <= self._weight.data_ptr() < self._span.end:
            return None, None  # replaced: it is in memory
        self._region.file.check()
        spans = self._spans(ids)
        num_bytes = sum(span.outward(_AROUND_BYTES).num_bytes for span in spans)
        stay = self._stay(min(num_bytes, self._num_bytes), visit)
        stay.__enter__()
        descriptor = self._region.file.descriptor
        if descriptor is not None:
            with suppress(OSError):  # advice only
                for span in spans:
                    offset = self._region.offset_of(span.begin)
                    os.posix_fadvise(descriptor, offset, span.num_bytes, os.POSIX_FADV_WILLNEED)
        return None, stay

    @contextmanager
    def _stay(self, num_bytes: int, visit: Visit) -> Iterator[None]:
        self._schedule.borrow(visit, num_bytes)
        try:
            yield
        finally:
            self._mover.drop_rows(self._index)
            self._schedule.give_back(visit, num_bytes)

    def _spans(self, ids: torch.Tensor) -> tuple[Span, ...]:
        """Give the pages of the rows that ids name; ids that the table does not have are left to its forward."""
        rows = torch.unique(ids.detach())
        rows = rows[(rows >= 0) & (rows < len(self._weight))].tolist()
        row_bytes = self._weight.stride(0) * self._weight.element_size()
        begin = self._weight.data_ptr()
        return merged([Span(begin + row * row_bytes, begin + (row + 1) * row_bytes) for row in rows])

    def depart(self, output: object) -> None:
        """Leave the output as it is."""
