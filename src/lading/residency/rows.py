"""Let an embedding table stay on disk: ask ahead for the rows that a forward gathers, and drop them after it.

The kernel maps 64 KiB around each row that is touched; that is what is kept room for. Where a call touches more than
all the room there is, a plain ``nn.Embedding`` is gathered piece by piece in place of its forward, which is then called
with no ids: gathering has one result however it is done. A class with a forward of its own takes what room there is.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import nn

from lading.checkpoint.pages import Span, merged
from lading.residency.hooks import Arguments, Stay
from lading.residency.mapped import MappedBlock, MappedMover
from lading.residency.schedule import Schedule
from lading.residency.units import Unit
from lading.residency.visits import Visit

_AROUND_BYTES = 64 << 10
_IDS = (torch.int32, torch.int64)


class RowEscort:
    """Escort calls of one ``nn.Embedding`` whose weight is a view of a file. Any thread.

    Args:
        schedule: lends the room for rows.
        mover: drops them.
        index: the table's number there.
        unit: an ``nn.Embedding``; called with ids of any shape, int32 or int64.
        block: where its weight is.
    """

    def __init__(self, schedule: Schedule, mover: MappedMover, index: int, unit: Unit, block: MappedBlock) -> None:
        self._schedule = schedule
        self._mover = mover
        self._index = index
        self._table: Any = unit.module
        self._weight = unit.module.get_parameter("weight")
        self._is_plain = type(unit.module) is nn.Embedding and not unit.module.sparse
        self._callers = threading.local()
        (self._region, self._span), *_ = block.pieces
        self._num_bytes = block.num_bytes

    def arrive(self, visit: Visit, arguments: Arguments) -> tuple[Arguments | None, Stay | None]:
        """Borrow room for the rows, and have the kernel begin reading them."""
        self._callers.rows = None
        args, kwargs = arguments
        ids = args[0] if args else kwargs.get("input")
        if not isinstance(ids, torch.Tensor) or ids.dtype not in _IDS or ids.is_meta:
            return None, None  # a table of another class may be called with anything
        if not self._span.begin <= self._weight.data_ptr() < self._span.end:
            return None, None  # replaced: it is in memory
        self._region.file.check()
        rows = torch.unique(ids.detach())
        is_gatherable = bool(len(rows)) and int(rows[0]) >= 0 and int(rows[-1]) < len(self._weight)
        if (
            is_gatherable
            and self._is_plain
            and min(self._around(rows), self._num_bytes) > self._schedule.lendable_bytes
        ):
            self._callers.rows = _Gathered.apply(self._weight, ids, self, visit)  # type: ignore[no-untyped-call]
            return ((ids.new_empty(0),), {}), None
        stay = self._stay(rows[(rows >= 0) & (rows < len(self._weight))], visit)
        stay.__enter__()
        return None, stay

    def depart(self, output: object) -> torch.Tensor | None:
        """Give the rows that were gathered piece by piece; else leave the output as it is."""
        gathered: torch.Tensor | None = self._callers.rows
        self._callers.rows = None
        return gathered

    def gather(self, ids: torch.Tensor, visit: Visit) -> torch.Tensor:
        """Gather rows in pieces that fit the room: ids of any shape → [*ids.shape, width]."""
        rows, places = torch.unique(ids, return_inverse=True)
        gathered = torch.empty(len(rows), self._weight.shape[1], dtype=self._weight.dtype)
        per_piece = max(1, self._schedule.lendable_bytes // (2 * _AROUND_BYTES))
        for begin in range(0, len(rows), per_piece):
            piece = rows[begin : begin + per_piece]
            with self._stay(piece, visit):
                torch.index_select(self._weight.detach(), 0, piece, out=gathered[begin : begin + per_piece])
        return gathered[places]

    @contextmanager
    def _stay(self, rows: torch.Tensor, visit: Visit) -> Iterator[None]:
        spans = self._spans(rows)
        num_bytes = min(
            sum(span.outward(_AROUND_BYTES).num_bytes for span in spans), self._num_bytes, self._schedule.lendable_bytes
        )
        self._schedule.borrow(visit, num_bytes)
        try:
            self._read_ahead(spans)
            yield
        finally:
            self._mover.drop_rows(self._index)
            self._schedule.give_back(visit, num_bytes)

    def _read_ahead(self, spans: tuple[Span, ...]) -> None:
        descriptor = self._region.file.descriptor
        if descriptor is not None:
            with suppress(OSError):  # advice only
                for span in spans:
                    offset = self._region.offset_of(span.begin)
                    os.posix_fadvise(descriptor, offset, span.num_bytes, os.POSIX_FADV_WILLNEED)

    def _around(self, rows: torch.Tensor) -> int:
        """Count what the kernel maps for rows."""
        return sum(span.outward(_AROUND_BYTES).num_bytes for span in self._spans(rows))

    def _spans(self, rows: torch.Tensor) -> tuple[Span, ...]:
        """Give the pages of rows."""
        row_bytes = self._weight.stride(0) * self._weight.element_size()
        begin = self._weight.data_ptr()
        return merged([Span(begin + row * row_bytes, begin + (row + 1) * row_bytes) for row in rows.tolist()])

    def backward(self, gradient: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Give the table's gradient, as its own forward's backward would."""
        table = self._table
        padding = -1 if table.padding_idx is None else table.padding_idx
        found: torch.Tensor = torch.ops.aten.embedding_dense_backward(
            gradient, ids, table.num_embeddings, padding, table.scale_grad_by_freq
        )
        return found


class _Gathered(torch.autograd.Function):
    """What ``functional.embedding`` gives, gathered in pieces."""

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, ids: torch.Tensor, escort: RowEscort, visit: Visit) -> torch.Tensor:
        ctx.escort = escort
        ctx.save_for_backward(ids)
        return escort.gather(ids, visit)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (ids,) = ctx.saved_tensors
        return ctx.escort.backward(gradient, ids), None, None, None
