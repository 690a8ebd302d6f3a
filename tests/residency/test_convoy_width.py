"""How many micro-batches a crossing takes, and that thousands of crossings leave nothing behind."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from chain import DEVICE_MAP
from party import convoy_threads

import lading
from lading.residency.members import Timing
from lading.residency.moving import Counts, Pace
from lading.residency.supply import Supply
from lading.residency.width import Width

BLOCK = 1000


def rig(bytes_per_s: float | None, *, given=None, settle=None, used=lambda: 0, activation_bytes=1 << 40, **options):
    """Make the width of a convoy through ten blocks that come in at a pace."""
    pace = Pace()
    if bytes_per_s is not None:
        pace.note(BLOCK, BLOCK / bytes_per_s)
    supply = Supply(sizes=[BLOCK] * 10, pace=pace, used_bytes=used, settle=settle, activation_bytes=activation_bytes)
    return Width(given, supply, is_one_call=options.pop("is_one_call", True))


def cross(width: Width, block_s: float, *, wait_s: float = 0.0, fetched: int = 10 * BLOCK, most: int = 1000) -> int:
    """Take as many aboard as it wants, each of which is so long in every block; give how many."""
    counts = Counts(fetched_bytes=0)
    width.begin(counts)
    count = 0
    while count < most and (not count or width.wants_more()):
        timing = Timing()
        width.note(timing)
        timing.first_block_s, count = block_s, count + 1
        timing.run_s, timing.wait_s = 10 * block_s, wait_s
    if count < most:
        assert not width.wants_more()
    counts.fetched_bytes += fetched
    counts.fetches += fetched // BLOCK
    width.end(counts)
    return count


def device() -> None:
    """Stand for waiting until a device is done."""


def test_a_slower_pace_takes_more_aboard():
    found = [cross(rig(BLOCK / (0.01 * slower), settle=device), 0.01) for slower in (0.5, 1, 2, 4, 8)]
    assert found == sorted(found)
    assert found[0] == 1
    assert found[-1] > 8


def test_a_shorter_batch_takes_more_aboard():
    found = [cross(rig(1e6, settle=device), block_s) for block_s in (1e-2, 1e-3, 2e-4, 1e-4)]
    assert found == sorted(found)
    assert found[0] < found[-1]


def test_where_computing_and_fetching_share_processors_more_come_aboard():
    assert cross(rig(1e6), 1e-3) > cross(rig(1e6, settle=device), 1e-3)


def test_enough_is_named():
    width = rig(1e6, settle=device)
    count = cross(width, 1e-3)
    stats = width.stats()
    assert (stats.limited_by, stats.width, stats.batches, stats.crossings) == ("enough", count, count, 1)
    assert stats.fetched_bytes == 10 * BLOCK
    assert stats.bound == "compute"


def test_a_given_width_is_kept_and_named():
    width = rig(1e6, given=3)
    assert [cross(width, 1e-3), cross(width, 1e-9)] == [3, 3]
    assert width.settle is None
    assert width.stats().limited_by == "width"
    assert width.stats().crossings == 2


def test_threads_are_limited_and_named():
    width = rig(1.0, settle=device)
    assert cross(width, 1e-9) == 64
    assert width.stats().limited_by == "threads"
    assert width.stats().bound == "reading"


def test_no_more_batches_are_named():
    width = rig(1.0)
    assert cross(width, 1e-9, most=5) == 5
    assert width.stats().limited_by == "batches"


def test_memory_limits_and_is_named_and_one_always_goes():
    used = iter(range(0, 10**6, 100))
    last = 0

    def used_bytes() -> int:
        nonlocal last
        last = next(used)
        return last

    width = rig(1.0, used=used_bytes, activation_bytes=650)
    count = cross(width, 1e-9, most=20)
    assert 1 < count < 7
    assert width.stats().limited_by == "memory"
    width = rig(1.0, used=used_bytes, activation_bytes=0)
    assert cross(width, 1e-9, most=20) == 1


def test_a_crossing_that_waited_makes_the_next_one_longer():
    width = rig(1e6)
    first = cross(width, 0.02, wait_s=0.0)
    assert cross(width, 0.02, wait_s=0.2) <= first
    assert cross(width, 0.02) > first
    assert width.stats().bound == "reading"


def test_an_unknown_pace_takes_all_that_may_come():
    assert cross(rig(None), 1e-3, most=9) == 9
    assert cross(rig(1e6, is_one_call=False), 1e-3) >= 1


@pytest.mark.parametrize("width", ["auto", 2])
def test_statistics_of_a_convoy_say_what_happened(mapped_chain, x, width):
    model = mapped_chain()
    with lading.offload(model, DEVICE_MAP), lading.convoy(model, [x] * 5, width=width) as outputs:
        assert outputs.stats().batches == 0
        list(outputs)
        stats = outputs.stats()
    assert stats.batches == 5
    assert stats.run_s > 0
    assert stats.bound in ("compute", "reading")
    assert stats.limited_by in (("width",) if width == 2 else ("enough", "batches", "memory", "threads"))
    assert f"5 batches in {stats.crossings} crossings" in str(stats)


# Growth --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_crossings", [150, pytest.param(1000, marks=pytest.mark.full)])
def test_crossings_leave_nothing_in_memory(num_crossings, chain_file):
    """In a process of its own: threads, visits, memory and malloc's arenas are after all as after a few."""
    code = f"""
import sys; sys.path[:0] = {[str(Path(__file__).parent)]!r}
sys.modules["torchao"] = None  # where it is installed it tells standard error what it cannot load
import gc, os, threading, torch, lading
from pathlib import Path
from chain import Chain, DEVICE_MAP
torch.set_num_threads(2)
with lading.empty():
    model = Chain()
lading.load_into(model, {str(chain_file)!r})
model.eval().requires_grad_(False)
x = torch.ones(64, 256)

def anonymous():
    gc.collect()
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon:"))

def heaps():  # malloc makes each arena of a thread at an address that 64 MiB divide, with a guard behind it
    begins = [line.split("-")[0] for line in open("/proc/self/maps") if "rw-p 00000000 00:00 0" in line]
    return sum(int(begin, 16) % (64 << 20) == 0 for begin in begins)

with lading.offload(model, DEVICE_MAP) as residency:
    expected = model(x)
    def cross(count):
        right = all(torch.equal(output, expected) for output in lading.convoy(model, [x] * (4 * count), width=4))
        right &= all(torch.equal(output, expected) for output in lading.convoy(model, [x] * 3, width=3))
        assert right
    for _ in range(5):
        cross(5)
    before, tasks, arenas = anonymous(), len(os.listdir("/proc/self/task")), heaps()
    for _ in range({num_crossings} // 10):
        cross(9)
    assert not residency._parts.schedule._ledger.visits
    assert threading.active_count() <= 3, threading.enumerate()
    print(anonymous() - before, len(os.listdir("/proc/self/task")) - tasks, heaps() - arenas)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    grown_kib, more_tasks, more_arenas = map(int, done.stdout.split())
    assert grown_kib < 8 << 10  # each crossing has outputs of 256 KiB; what is free at a time varies by 2 MiB
    assert more_tasks <= 0
    assert more_arenas <= 0


def test_threads_of_a_convoy_are_as_many_as_it_is_wide(mapped_chain, x):
    model = mapped_chain()
    seen = set()
    with lading.offload(model, DEVICE_MAP), lading.convoy(model, [x] * 12, width=3) as outputs:
        for _ in outputs:
            seen.add(len(convoy_threads()))
    assert seen == {3}
