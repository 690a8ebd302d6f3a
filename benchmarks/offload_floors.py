"""Measure what bounds streaming on this machine: how fast a file is read, copied and mapped, what a hook costs.

Each reader reads the whole evicted file once in steps of 8 MiB, in turns with the others.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import lading
import measure
from lading.checkpoint.pages import Span, map_private, populate

STEP_BYTES = 8 << 20


def read_by_pread(path: Path, ahead_bytes: int) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    buffer = memoryview(bytearray(STEP_BYTES))
    for offset in range(0, path.stat().st_size, STEP_BYTES):
        if ahead_bytes:
            os.posix_fadvise(descriptor, offset + STEP_BYTES, ahead_bytes, os.POSIX_FADV_WILLNEED)
        os.preadv(descriptor, [buffer], offset)
    os.close(descriptor)


def read_by_populate(path: Path, ahead_bytes: int) -> None:
    descriptor, num_bytes = os.open(path, os.O_RDONLY), path.stat().st_size
    mapping = map_private(descriptor, num_bytes)
    first = Span.of(mapping).begin
    for offset in range(0, num_bytes, STEP_BYTES):
        if ahead_bytes:
            os.posix_fadvise(descriptor, offset + STEP_BYTES, ahead_bytes, os.POSIX_FADV_WILLNEED)
        populate(Span(first + offset, first + min(offset + STEP_BYTES, num_bytes)))
    os.close(descriptor)


READERS: dict[str, Callable[[Path], None]] = {
    "pread": lambda path: read_by_pread(path, 0),
    "willneed + pread": lambda path: read_by_pread(path, 2 * STEP_BYTES),
    "populate": lambda path: read_by_populate(path, 0),
    "willneed + populate": lambda path: read_by_populate(path, 2 * STEP_BYTES),
}


def reader_rates(path: Path, rounds: int) -> dict[str, list[float]]:
    """Give bytes per second of each reader over the evicted file, all rounds."""
    rates: dict[str, list[float]] = {name: [] for name in READERS}
    for _ in range(rounds):
        for name, read in READERS.items():
            measure.evict([path])
            rates[name].append(_rate(path, read))
    return rates


def warm_rates(path: Path, rounds: int) -> dict[str, list[float]]:
    """Give bytes per second of copying the cached file into a buffer, and of mapping it."""
    measure.warm_up([path])
    ways = {"copy out of the page cache": "pread", "map what is in the page cache": "populate"}
    return {title: [_rate(path, READERS[name]) for _ in range(rounds)] for title, name in ways.items()}


def _rate(path: Path, read: Callable[[Path], None]) -> float:
    begin_s = time.perf_counter()
    read(path)
    return path.stat().st_size / (time.perf_counter() - begin_s)


def hook_cost(num_blocks: int, rounds: int) -> dict[str, Any]:
    """Time a chain of tiny linear blocks, plain and offloaded; gives microseconds per block.

    ``held``: the room holds all of them, so that each call enters and leaves a block that is there. ``moved``: the room
    holds two, so that each is fetched and evicted, whatever its size.
    """
    torch.manual_seed(0)
    with torch.inference_mode():
        x = torch.ones(1, 64)
        plain = _chain(num_blocks)
        expected = plain(x)
        seconds: dict[str, list[float]] = {"plain": [], "held": [], "moved": [], "resident": []}
        nets = {name: _chain(num_blocks) for name in seconds}
        for name, net in nets.items():
            net.load_state_dict(plain.state_dict())
            if name != "plain":
                home = "cpu" if name == "resident" else "disk"
                residency = lading.offload(net, {"0": "cpu", **{str(i): home for i in range(1, num_blocks)}})
                if name == "held":
                    residency._parts._room.capacity = 2**40  # a map of devices keeps room for two
        num_resident_hooks = sum(len(part._forward_pre_hooks) + len(part._forward_hooks) for part in nets["resident"])
        for _ in range(rounds + 1):
            for name, net in nets.items():
                begin_s = time.perf_counter()
                found = net(x)
                seconds[name].append((time.perf_counter() - begin_s) / num_blocks)
                if not torch.equal(found, expected):
                    raise SystemExit(f"offloaded linear blocks ({name}) give another output")
    least = {name: statistics.median(each[1:]) * 1e6 for name, each in seconds.items()}
    return {
        "us_per_block": {name: least[name] - least["plain"] for name in ("held", "moved", "resident")},
        "plain_us": least["plain"],
        "hooks_on_resident_blocks": num_resident_hooks,
        "num_blocks": num_blocks,
    }


def _chain(num_blocks: int) -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(64, 64) for _ in range(num_blocks)))
