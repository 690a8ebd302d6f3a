"""Bring a checkpoint's pages into memory in the order a forward will want them, beside whoever builds the module.

A thread walks the tensors in layer order and asks the kernel for their pages: with ``MADV_POPULATE_READ``, which also
enters them into the page table and answers EFAULT where a shortened file would kill a reader; on kernels before 5.14
with ``MADV_WILLNEED``. It stops by itself at the end, when every tensor of the mapping is gone, or when as much
as memory has room for was read: more would push out what came first. Nothing waits for it, a failure of it is logged
and costs speed only.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
import weakref
from collections.abc import Mapping
from pathlib import Path

from lading.checkpoint import pages
from lading.checkpoint.catalog import Catalog
from lading.checkpoint.mapping import ShardMapping
from lading.checkpoint.pages import Span, populate, will_need
from lading.errors import printable
from lading.names import layer_order_key

_LOG = logging.getLogger(__name__)
_STEP_BYTES = 8 << 20
_SHARE_OF_FREE = 0.8


def start_readahead(catalog: Catalog, mappings: Mapping[Path, ShardMapping]) -> threading.Thread:
    """Begin reading all pages of a checkpoint in layer order; returns the running daemon thread at once.

    Shards that could not be mapped are passed over: their tensors are read when they are made.
    """
    buffers = {path: weakref.ref(mapping.buffer) for path, mapping in mappings.items() if mapping.buffer is not None}
    ranges = [each for each in _ranges(catalog) if each[0] in buffers]
    thread = threading.Thread(
        target=_populate_all, args=(ranges, buffers, _free_bytes()), name="lading-readahead", daemon=True
    )
    thread.start()
    return thread


def _ranges(catalog: Catalog) -> list[tuple[Path, int, int]]:
    """List (shard, offset, length) in layer order, neighbours joined, none longer than a step."""
    joined: list[tuple[Path, int, int]] = []
    for spec in sorted(catalog, key=lambda spec: layer_order_key(spec.name)):
        path = catalog.owners[spec.name].path
        if joined and joined[-1][0] == path and joined[-1][1] + joined[-1][2] == spec.offset:
            path, offset, length = joined.pop()
            joined.append((path, offset, length + spec.num_bytes))
        elif spec.num_bytes:
            joined.append((path, spec.offset, spec.num_bytes))
    return [
        (path, offset + begin, min(_STEP_BYTES, length - begin))
        for path, offset, length in joined
        for begin in range(0, length, _STEP_BYTES)
    ]


def _free_bytes() -> int:
    with Path("/proc/meminfo").open(encoding="ascii") as lines:
        fields = dict(line.split(":", 1) for line in lines)
    return int(int(fields["MemAvailable"].split()[0]) * 1024 * _SHARE_OF_FREE)


def _populate_all(
    ranges: list[tuple[Path, int, int]], buffers: Mapping[Path, weakref.ref[pages.Mapping]], budget_bytes: int
) -> None:
    bring = populate
    for path, offset, length in ranges:
        budget_bytes -= length
        buffer = buffers[path]()
        if buffer is None or budget_bytes < 0:
            return
        begin = Span.of(buffer).begin + offset
        failure = bring(Span(begin, begin + length))
        if failure == errno.EINVAL and bring is populate:
            bring = will_need
            failure = bring(Span(begin, begin + length))
        del buffer
        if failure:
            _LOG.warning("readahead of %s stopped at byte %d: %s", printable(str(path)), offset, os.strerror(failure))
            return
