"""What is free is counted once, within every limit of a container; what is fast is measured once a boot."""

from __future__ import annotations

import json
import logging
import math
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lading.errors import PlanError
from lading.placement import hardware
from lading.placement.hardware import Bandwidths, free_memory, probe_bandwidths

GIB = 2**30
V1_UNLIMITED = 9223372036854771712


@pytest.fixture(autouse=True)
def no_accelerator(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)


def write_root(root: Path, cgroup: str | None, files: dict[str, object], available_bytes: int = 8 * GIB) -> Path:
    """Lay out a proc and sys of our own; a folder's name in `files` stands below sys/fs/cgroup."""
    meminfo = f"MemTotal:       16777216 kB\nMemFree:  1 kB\nMemAvailable:   {available_bytes // 1024} kB\n"
    texts = {"proc/meminfo": meminfo, **{f"sys/fs/cgroup/{name}": str(text) + "\n" for name, text in files.items()}}
    for name, text in texts.items() if cgroup is None else [*texts.items(), ("proc/self/cgroup", cgroup)]:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_free_memory_without_groups_is_what_the_kernel_calls_available(tmp_path):
    assert free_memory(write_root(tmp_path, None, {})) == {"cpu": 8 * GIB}


def test_free_memory_where_no_meminfo_exists_is_what_is_installed(tmp_path):
    assert free_memory(tmp_path)["cpu"] > GIB // 8


STAT = "anon 5\ninactive_file 1073741824\nactive_file 1073741824\nslab_reclaimable 7"

GROUPS = {
    "v2 unlimited": ("0::/\n", {"cgroup.procs": 1}, 8 * GIB),
    "v2 max": ("0::/a\n", {"a/memory.max": "max", "a/memory.high": "max", "a/memory.current": 7 * GIB}, 8 * GIB),
    "v2 limit": ("0::/a\n", {"a/memory.max": 4 * GIB, "a/memory.high": "max", "a/memory.current": GIB}, 3 * GIB),
    "v2 high below max": (
        "0::/a\n",
        {"a/memory.max": 6 * GIB, "a/memory.high": 5 * GIB, "a/memory.current": GIB},
        4 * GIB,
    ),
    "v2 page cache is free": (
        "0::/a\n",
        {"a/memory.max": 4 * GIB, "a/memory.current": 3 * GIB, "a/memory.stat": STAT},
        3 * GIB,
    ),
    "v2 a parent binds": (
        "0::/a/b/c\n",
        {"a/b/c/memory.max": "max", "a/b/memory.max": 6 * GIB, "a/memory.max": 3 * GIB, "a/memory.current": 2 * GIB},
        GIB,
    ),
    "v2 over its limit": ("0::/a\n", {"a/memory.max": GIB, "a/memory.current": 2 * GIB}, 0),
    "v2 limit above memory": ("0::/a\n", {"a/memory.max": 64 * GIB, "a/memory.current": GIB}, 8 * GIB),
    "v2 container with its host's path": ("0::/docker/x\n", {"memory.max": 2 * GIB, "memory.current": GIB}, GIB),
    "v1 limit": (
        "5:cpu,cpuacct:/x\n4:memory:/a/b\n",
        {
            "memory/memory.limit_in_bytes": V1_UNLIMITED,
            "memory/a/memory.limit_in_bytes": 4 * GIB,
            "memory/a/memory.usage_in_bytes": 3 * GIB,
            "memory/a/memory.stat": "inactive_file 1\ntotal_inactive_file 1073741824",
            "memory/a/b/memory.limit_in_bytes": V1_UNLIMITED,
            "x/memory.max": 1,
        },
        2 * GIB,
    ),
    "v1 beside an empty v2": ("3:memory:/a\n0::/\n", {"memory/a/memory.limit_in_bytes": 2 * GIB}, 2 * GIB),
}


@pytest.mark.parametrize("case", GROUPS)
def test_free_memory_within_a_group_leaves_what_its_limits_leave(case, tmp_path):
    cgroup, files, expected = GROUPS[case]
    assert free_memory(write_root(tmp_path, cgroup, files)) == {"cpu": expected}


def fake_accelerator(monkeypatch, kind: str, module: object, count: int = 1) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device(kind))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: count)
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)


def fake_module(free_bytes: int, reserved_bytes: int = 0, allocated_bytes: int = 0, **facts: object) -> object:
    return SimpleNamespace(
        mem_get_info=lambda index: (free_bytes + index * GIB, 80 * GIB),
        memory_reserved=lambda index: reserved_bytes,
        memory_allocated=lambda index: allocated_bytes,
        get_device_properties=lambda index: SimpleNamespace(**facts),
    )


def test_free_memory_of_an_accelerator_counts_what_the_allocator_keeps_unused(monkeypatch, tmp_path):
    module = fake_module(10 * GIB, reserved_bytes=5 * GIB, allocated_bytes=2 * GIB, is_integrated=0)
    fake_accelerator(monkeypatch, "cuda", module, count=2)
    free = free_memory(write_root(tmp_path, None, {}))
    assert free == {0: 13 * GIB, 1: 14 * GIB, "cpu": 8 * GIB}
    assert list(free) == [0, 1, "cpu"]


@pytest.mark.parametrize("fact", ["is_integrated", "is_integrated_gpu"])
@pytest.mark.parametrize(("driver", "given"), [(6 * GIB, 6 * GIB), (30 * GIB, 8 * GIB)])
def test_free_memory_of_an_integrated_accelerator_is_counted_once(fact, driver, given, monkeypatch, tmp_path):
    module = fake_module(driver, reserved_bytes=3 * GIB, allocated_bytes=GIB, **{fact: 1})
    fake_accelerator(monkeypatch, "cuda", module)
    free = free_memory(write_root(tmp_path, None, {}))
    assert free == {0: given + 2 * GIB, "cpu": 8 * GIB - given}


def test_free_memory_of_mps_is_counted_once(monkeypatch, tmp_path):
    module = SimpleNamespace(
        recommended_max_memory=lambda: 6 * GIB,
        driver_allocated_memory=lambda: 3 * GIB,
        current_allocated_memory=lambda: 2 * GIB,
    )
    fake_accelerator(monkeypatch, "mps", module)
    assert free_memory(write_root(tmp_path, None, {})) == {"mps": 4 * GIB, "cpu": 5 * GIB}


def test_free_memory_of_an_accelerator_that_does_not_tell_asks_for_max_memory(monkeypatch, tmp_path):
    fake_accelerator(monkeypatch, "xpu", SimpleNamespace())
    with pytest.raises(PlanError, match=r"free memory of xpu:0: found .*mem_get_info.* · .*max_memory"):
        free_memory(write_root(tmp_path, None, {}))


@pytest.mark.parametrize("rate", [0, -1.0, math.inf, math.nan, True, "fast"])
@pytest.mark.parametrize("name", [field.name for field in fields(Bandwidths)])
def test_bandwidths_that_are_no_rates_are_refused(name, rate):
    with pytest.raises(PlanError, match=f"{name}: found {rate!r} · expected a positive, finite number"):
        Bandwidths(**{name: rate})


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    """Make a folder as the hub's: a small file, and a large one behind a link."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "large").write_bytes(bytes(range(256)) * 40_000)
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / "config.json").write_text("{}")
    (tmp_path / "snapshot" / "model.safetensors").symlink_to(tmp_path / "blobs" / "large")
    return tmp_path / "snapshot"


@pytest.fixture
def cache(monkeypatch, tmp_path) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "lading" / "bandwidths.json"


@pytest.fixture
def probes(monkeypatch) -> list[str]:
    """Replace what takes time; the list fills with what was measured."""
    made: list[str] = []
    monkeypatch.setattr(hardware, "_disk_rate", lambda file: made.append(file.name) or float(len(made)))
    monkeypatch.setattr(hardware, "_linear_rates", lambda device, dtype: made.append(f"{device} {dtype}") or (2.0, 3.0))
    return made


def test_probe_measures_each_rate_and_changes_nothing(checkpoint, cache, monkeypatch):
    monkeypatch.setattr(hardware, "_is_cached", lambda descriptor, offset: False)  # also on a memory disk
    before, state = (checkpoint / "model.safetensors").read_bytes(), torch.get_rng_state()
    found = probe_bandwidths(checkpoint, device="cpu", dtype=torch.float32)
    assert found.host_to_device_bytes_per_s is None
    assert min(found.disk_to_host_bytes_per_s, found.device_memory_bytes_per_s, found.flops_per_s) > 0
    assert (checkpoint / "model.safetensors").read_bytes() == before
    assert torch.equal(torch.get_rng_state(), state)


def test_probe_of_files_asks_the_kernel_what_is_in_memory(checkpoint):
    assert (hardware._disk_rate(checkpoint / "model.safetensors") or 1) > 0
    (checkpoint / "empty").touch()
    assert hardware._disk_rate(checkpoint / "empty") is None


def test_probe_of_a_file_that_stays_in_memory_is_unknown_and_not_kept(checkpoint, cache, monkeypatch):
    monkeypatch.setattr(hardware, "_is_cached", lambda descriptor, offset: True)
    monkeypatch.setattr(hardware, "_linear_rates", lambda device, dtype: (2.0, 3.0))
    found = probe_bandwidths(checkpoint, device="cpu")
    assert found == Bandwidths(device_memory_bytes_per_s=2.0, flops_per_s=3.0)
    assert not cache.exists()


def test_probe_measures_once_per_device_dtype_and_disk(checkpoint, cache, probes):
    first = probe_bandwidths(checkpoint, device="cpu")
    assert first == Bandwidths(disk_to_host_bytes_per_s=1.0, device_memory_bytes_per_s=2.0, flops_per_s=3.0)
    assert probes == ["model.safetensors", "cpu torch.bfloat16"]
    assert probe_bandwidths(checkpoint / "config.json", device="cpu") == first
    assert len(probes) == 2
    assert probe_bandwidths(None, device="cpu").disk_to_host_bytes_per_s is None
    probe_bandwidths(None, device="cpu", dtype=torch.float16)
    assert probes[2:] == ["cpu torch.bfloat16", "cpu torch.float16"]
    assert len(json.loads(cache.read_text())["entries"]) == 3
    assert [entry.name for entry in cache.parent.iterdir()] == [cache.name]


def test_probe_with_refresh_measures_again_and_keeps_that(checkpoint, cache, probes):
    probe_bandwidths(checkpoint, device="cpu")
    again = probe_bandwidths(checkpoint, device="cpu", refresh=True)
    assert again.disk_to_host_bytes_per_s == 3.0
    assert probe_bandwidths(checkpoint, device="cpu") == again
    assert len(json.loads(cache.read_text())["entries"]) == 1


@pytest.mark.parametrize(
    "broken",
    [
        b"",
        b"\xff\xfe",
        b"[]",
        b"{}",
        b'{"format": 2, "entries": {}}',
        b'{"format": 1, "entries": {"a": {"speed": 1}}}',
        b'{"format": 1, "entries": {"a": {"flops_per_s": -1}}}',
        b'{"format": 1, "entries": [1]}',
    ],
)
def test_probe_with_a_broken_cache_measures_and_writes_it_anew(broken, cache, probes):
    cache.parent.mkdir(parents=True)
    cache.write_bytes(broken)
    found = probe_bandwidths(None, device="cpu")
    assert len(probes) == 1
    assert probe_bandwidths(None, device="cpu") == found
    assert len(probes) == 1


def test_probe_without_a_place_for_the_cache_says_so_and_goes_on(cache, probes, caplog):
    cache.parent.parent.write_text("a file, where a folder should be")
    with caplog.at_level(logging.INFO, "lading"):
        assert probe_bandwidths(None, device="cpu").flops_per_s == 3.0
    assert "measured rates are not kept" in caplog.text


def test_probe_cache_keeps_the_newest_entries(cache, probes):
    probe_bandwidths(None, device="cpu")
    mine = next(iter(json.loads(cache.read_text())["entries"]))
    others = {f"host {index}": {"flops_per_s": 1.0} for index in range(100)}
    cache.write_text(json.dumps({"format": 1, "entries": others}))
    probe_bandwidths(None, device="cpu")
    assert list(json.loads(cache.read_text())["entries"]) == [*list(others)[-63:], mine]


def test_probe_of_a_dtype_without_matrix_products_is_unknown(cache, caplog):
    with caplog.at_level(logging.INFO, "lading"):
        assert probe_bandwidths(None, device="cpu", dtype=torch.bool) == Bandwidths()
    assert "a rate stays unknown" in caplog.text


def test_probe_of_a_missing_path_raises(tmp_path, cache):
    with pytest.raises(FileNotFoundError):
        probe_bandwidths(tmp_path / "nothing", device="cpu")


@pytest.mark.gpu
def test_probe_and_free_memory_of_a_real_gpu(monkeypatch, checkpoint, cache):
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache.parent.parent))
    assert free_memory()[0] > 0
    found = probe_bandwidths(checkpoint, device=0)
    assert min(found.host_to_device_bytes_per_s, found.device_memory_bytes_per_s, found.flops_per_s) > 0
