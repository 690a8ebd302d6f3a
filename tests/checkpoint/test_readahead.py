"""Readahead brings pages in layer order and stops by itself: at the end, without a reader, at a file that was cut."""

from __future__ import annotations

import errno
import gc
import logging
import mmap
import threading
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lading.checkpoint import readahead
from lading.checkpoint.locate import open_catalog
from lading.checkpoint.mapping import map_catalog, tensors_of
from lading.checkpoint.readahead import start_readahead

NAMES = ["lm_head.weight", "model.layers.10.w", "model.layers.2.w", "model.embed_tokens.weight", "model.norm.weight"]
STEP = 8 << 20


@pytest.fixture
def path(tmp_path: Path) -> Path:
    save_file(
        {name: torch.full((1 << 12,), float(index)) for index, name in enumerate(NAMES)}, tmp_path / "model.safetensors"
    )
    return tmp_path / "model.safetensors"


def resident_bytes(path: Path) -> int:
    """Count the bytes of a file that stand in this process's page table."""
    total, is_ours = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(" ", 1)[0] and ":" not in line.split(" ", 1)[0]:
            is_ours = line.endswith(str(path))
        elif is_ours and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total


def test_start_readahead_brings_in_every_page_and_ends(path):
    catalog = open_catalog(path)
    mappings = map_catalog(catalog)
    tensors = tensors_of(catalog, mappings)
    thread = start_readahead(catalog, mappings)
    assert thread.daemon
    assert thread.name == "lading-readahead"
    thread.join(30)
    assert not thread.is_alive()
    assert resident_bytes(path) >= catalog.num_bytes
    for index, name in enumerate(NAMES):
        assert torch.equal(tensors[name], torch.full((1 << 12,), float(index)))


def test_ranges_stand_in_layer_order_neighbours_joined_and_cover_all(path):
    catalog = open_catalog(path)
    ranges = readahead._ranges(catalog)
    first = catalog["model.embed_tokens.weight"]
    assert ranges[0][:2] == (path, first.offset)
    covered = sorted((offset, offset + length) for _, offset, length in ranges)
    assert sum(end - begin for begin, end in covered) == catalog.num_bytes
    assert all(covered[i][1] <= covered[i + 1][0] for i in range(len(covered) - 1))


def test_ranges_of_a_long_tensor_are_cut_into_steps(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros((2 * STEP + 4) // 4), "none": torch.empty(0)}, path)
    lengths = [length for _, _, length in readahead._ranges(open_catalog(path))]
    assert lengths == [STEP, STEP, 4]


def test_populate_stops_when_no_tensor_is_left(path):
    catalog = open_catalog(path)
    mappings = map_catalog(catalog)
    buffers = {path: weakref.ref(mappings[path].buffer)}
    del mappings
    gc.collect()
    readahead._populate_all(readahead._ranges(catalog), buffers, 1 << 40)  # returns, and touches nothing
    assert buffers[path]() is None


def test_populate_stops_at_the_room_that_memory_has(path, monkeypatch):
    catalog = open_catalog(path)
    mappings = map_catalog(catalog)
    read: list[int] = []
    monkeypatch.setattr(readahead, "populate", lambda span: read.append(span.num_bytes) or 0)
    ranges = [(path, 0, 100)] * 10
    readahead._populate_all(ranges, {path: weakref.ref(mappings[path].buffer)}, 350)
    assert read == [100, 100, 100]
    assert 0 < readahead._free_bytes() < 1 << 50


def test_populate_of_a_truncated_file_logs_and_does_not_die(path, caplog):
    catalog = open_catalog(path)
    mappings = map_catalog(catalog)
    with path.open("r+b") as file:
        file.truncate(mmap.PAGESIZE)
    with caplog.at_level(logging.WARNING, logger="lading.checkpoint.readahead"):
        thread = start_readahead(catalog, mappings)
        thread.join(30)
    assert not thread.is_alive()
    (record,) = caplog.records
    assert f"readahead of {path} stopped at byte" in record.getMessage()
    assert "Bad address" in record.getMessage()


def test_populate_on_an_old_kernel_asks_for_will_need(path, monkeypatch, caplog):
    catalog = open_catalog(path)
    mappings = map_catalog(catalog)
    asked: list[int] = []
    monkeypatch.setattr(readahead, "populate", lambda span: errno.EINVAL)
    real = readahead.will_need
    monkeypatch.setattr(readahead, "will_need", lambda span: asked.append(span.num_bytes) or real(span))
    with caplog.at_level(logging.WARNING, logger="lading.checkpoint.readahead"):
        readahead._populate_all(readahead._ranges(catalog), {path: weakref.ref(mappings[path].buffer)}, 1 << 40)
    assert sum(asked) == catalog.num_bytes
    assert not caplog.records


def test_readahead_beside_a_writer_loses_no_edit(path):
    """Populating reads pages in and must never replace one that was written meanwhile."""
    catalog = open_catalog(path)
    for _ in range(20):
        mappings = map_catalog(catalog)
        tensors = tensors_of(catalog, mappings)
        barrier = threading.Barrier(2)

        def edit(tensors: dict[str, torch.Tensor] = tensors, barrier: threading.Barrier = barrier) -> None:
            barrier.wait()
            for tensor in tensors.values():
                tensor.add_(1)

        writer = threading.Thread(target=edit)
        writer.start()
        barrier.wait()
        thread = start_readahead(catalog, mappings)
        writer.join()
        thread.join(30)
        for index, name in enumerate(NAMES):
            assert torch.equal(tensors[name], torch.full((1 << 12,), index + 1.0))
