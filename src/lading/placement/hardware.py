"""Ask this machine what it has free and how fast it is; the only file that probes hardware.

Knows no model and no plan. Guarantees: no file of the user's is changed, no random state is touched, and what cannot
be measured is None, never a guess.

The cache, version 1: ``lading/bandwidths.json`` under ``$XDG_CACHE_HOME``, else ``~/.cache``. UTF-8 JSON, an object
with ``format`` (1) and ``entries``: what was measured → the fields of `Bandwidths`. The key is text: boot and host ·
device, its name or number of threads · dtype · number of the file system, or None · torch's version. The 64 newest
entries stay. It is replaced by renaming: a reader never sees half of it, and of two writers the later one's stay.
"""

from __future__ import annotations

import json
import logging
import math
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.nn import functional

from lading.errors import PlanError, refusal

_LOG = logging.getLogger(__name__)
_CACHE_FORMAT, _CACHE_ENTRIES = 1, 64
_BLOCK_BYTES, _NUM_BLOCKS, _DISK_S = 4 << 20, 64, 0.4
_COPY_BYTES = 64 << 20  # torch keeps pinned memory for the life of the process
_MEASURE_S, _QUICK_S = 0.06, 0.025
_COLUMNS = 8192

# Of a memory group: its limits, what it uses, and what the names of its page cache in memory.stat begin with.
_GROUP_V1 = (("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_")
_GROUP_V2 = (("memory.max", "memory.high"), "memory.current", "")


@dataclass(frozen=True, slots=True, kw_only=True)
class Bandwidths:
    """Say how fast bytes and numbers flow, so that the seconds of a forward can be predicted. None: unknown.

    Raises:
        PlanError: a rate is not a positive, finite number.

    Example:
        >>> Bandwidths(disk_to_host_bytes_per_s=1.2e9, host_to_device_bytes_per_s=55e9).flops_per_s is None
        True
    """

    disk_to_host_bytes_per_s: float | None = None  # from a cold file into the page cache
    host_to_device_bytes_per_s: float | None = None  # from pinned memory; None where nothing is copied
    device_memory_bytes_per_s: float | None = None  # weights that the execution device reads for one token
    flops_per_s: float | None = None  # of a linear layer over many tokens there; a multiply-add is two

    def __post_init__(self) -> None:
        for field in fields(self):
            rate = getattr(self, field.name)
            is_number = isinstance(rate, (int, float)) and not isinstance(rate, bool)
            if rate is not None and not (is_number and 0 < rate < math.inf):
                expected, way_out = "a positive, finite number per second", "give None where it is unknown"
                raise PlanError(refusal(field.name, found=repr(rate), expected=expected, way_out=way_out))


def free_memory(root: Path = Path("/")) -> dict[int | str, int]:
    """Count the bytes that are free now, by device: accelerators by index (or ``"mps"``), then ``"cpu"``.

    An accelerator's are its driver's and those that torch's allocator keeps for this process unused. The host's are
    the kernel's ``MemAvailable``, cut to what the memory groups (versions 1 and 2) of this process and all above them
    leave, page cache counted as free. An integrated accelerator lives in host memory: it is given what is free, the
    host the rest. ``RLIMIT_AS`` and ``RLIMIT_DATA`` are not asked: they count mappings, not memory. Asking creates a
    context on each accelerator, which takes memory of its own. ``root``: where ``proc`` and ``sys`` are.

    Raises:
        PlanError: an accelerator does not say what it has free.

    Example:
        >>> free_memory()["cpu"] > 0
        True
    """
    free: dict[int | str, int] = {}
    host_bytes = min([_available_bytes(root), *_group_bytes(root)])
    for key, driver_bytes, kept_bytes, is_integrated in _accelerators():
        given_bytes = min(driver_bytes, host_bytes) if is_integrated else driver_bytes
        host_bytes -= given_bytes if is_integrated else 0
        free[key] = given_bytes + kept_bytes
    return {**free, "cpu": host_bytes}


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:  # another kernel, another version of groups
        return ""


def _available_bytes(root: Path) -> int:
    found = dict(line.split(":", 1) for line in _text(root / "proc/meminfo").splitlines())
    if "MemAvailable" not in found:  # not Linux: nobody says what is free, what there is must do
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return int(found["MemAvailable"].split()[0]) * 1024


def _group_bytes(root: Path) -> Iterator[int]:
    """Yield what each limited memory group leaves; in a container a group's path may be missing, its mount is there."""
    for _, controllers, path in (line.split(":", 2) for line in _text(root / "proc/self/cgroup").splitlines()):
        if controllers and "memory" not in controllers.split(","):
            continue
        mount = root / ("sys/fs/cgroup/memory" if controllers else "sys/fs/cgroup")
        limits, usage, prefix = _GROUP_V1 if controllers else _GROUP_V2
        group = mount / path.lstrip("/")
        for level in (group, *group.parents):
            allowed = [int(text) for name in limits if (text := _text(level / name)).isdigit()]  # "max": no limit
            if allowed:
                stat = dict(line.split() for line in _text(level / "memory.stat").splitlines())
                cached_bytes = sum(int(stat.get(f"{prefix}{name}_file", 0)) for name in ("inactive", "active"))
                yield max(0, min(allowed) - max(0, int(_text(level / usage) or 0) - cached_bytes))
            if level == mount:
                break


def _accelerators() -> Iterator[tuple[int | str, int, int, bool]]:
    """Yield (key, bytes free for the driver, bytes torch keeps unused, whether it lives in host memory)."""
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if device is None:
        return
    module = torch.get_device_module(device)
    if device.type == "mps":
        taken_bytes = module.driver_allocated_memory()
        free_bytes = max(0, module.recommended_max_memory() - taken_bytes)
        yield "mps", free_bytes, taken_bytes - module.current_allocated_memory(), True
        return
    for index in range(torch.accelerator.device_count()):
        try:
            free_bytes, _ = module.mem_get_info(index)
            kept_bytes = module.memory_reserved(index) - module.memory_allocated(index)
            facts = module.get_device_properties(index)
        except (AttributeError, RuntimeError) as error:
            subject, found = f"free memory of {device.type}:{index}", str(error)
            way_out = "say with max_memory what may be used"
            raise PlanError(refusal(subject, found=found, expected="a number of bytes", way_out=way_out)) from error
        is_integrated = any(getattr(facts, name, False) for name in ("is_integrated", "is_integrated_gpu"))  # CUDA, XPU
        yield index, free_bytes, kept_bytes, is_integrated


def probe_bandwidths(
    path: Path | None, *, device: torch.device | str | int, dtype: torch.dtype = torch.bfloat16, refresh: bool = False
) -> Bandwidths:
    """Measure this machine's rates, or read what was measured since it booted.

    Blocks for about half a second, and takes 128 MiB on a CPU, else 64 MiB pinned, which torch keeps, and 400 MiB of
    the device. Any thread may call it; what else runs meanwhile slows the rates.

    Args:
        path: a checkpoint's file, or a folder, whose largest file counts. Up to 256 MiB of it are dropped from the page
            cache and read again. None: the disk's rate is not asked for.
        device: the execution device.
        dtype: that of the weights.
        refresh: measure also what is known.

    Raises:
        OSError: there is nothing at ``path``.
    """
    device, file = torch.device(device), _largest_file(path)
    key = _cache_key(file, device, dtype)
    entries = _read_cache()
    if not refresh and key in entries:
        return entries[key]
    disk_rate = _attempt(_disk_rate, file) if file else None
    weights_rate, flops = _attempt(_linear_rates, device, dtype) or (None, None)
    measured = Bandwidths(
        disk_to_host_bytes_per_s=disk_rate,
        host_to_device_bytes_per_s=_attempt(_copy_rate, device) if device.type != "cpu" else None,
        device_memory_bytes_per_s=weights_rate,
        flops_per_s=flops,
    )
    if file is None or disk_rate is not None:  # a file that stays in memory now may be cold later
        entries.pop(key, None)
        _write_cache({**entries, key: measured})
    return measured


def _attempt(measure: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return measure(*arguments)
    except (OSError, RuntimeError) as error:  # torch: no memory, or no such operation in this dtype
        _LOG.info("a rate stays unknown: %s", error)
        return None


def _largest_file(path: Path | None) -> Path | None:
    if path is None or path.is_file():
        return path
    return max((file for file in path.iterdir() if file.is_file()), key=lambda file: file.stat().st_size, default=None)


def _disk_rate(file: Path) -> float | None:
    """Read blocks in random order that are not in memory; None where all stay there: mapped, or a memory disk."""
    num_bytes = file.stat().st_size
    block_bytes = max(1, min(_BLOCK_BYTES, num_bytes))
    offsets = range(0, num_bytes - block_bytes + 1, block_bytes)
    buffer, read_bytes, read_s = bytearray(block_bytes), 0, 0.0
    with file.open("rb", buffering=0) as handle:
        descriptor = handle.fileno()
        for offset in (chosen := random.Random().sample(offsets, min(len(offsets), _NUM_BLOCKS))):
            os.posix_fadvise(descriptor, offset, block_bytes, os.POSIX_FADV_DONTNEED)
        for offset in chosen:
            began = time.perf_counter()  # before the question, which may begin to read ahead
            if not _is_cached(descriptor, offset) and read_s < _DISK_S:
                read_bytes += os.preadv(descriptor, [buffer], offset)
                read_s += time.perf_counter() - began
    return read_bytes / read_s if read_bytes else None


def _is_cached(descriptor: int, offset: int) -> bool:
    try:
        return os.preadv(descriptor, [bytearray(1)], offset, os.RWF_NOWAIT) > 0
    except OSError:  # the read would wait; or the file system cannot tell
        return False


def _copy_rate(device: torch.device) -> float:
    host = torch.empty(_COPY_BYTES, dtype=torch.uint8, device="cpu", pin_memory=True)
    copy = torch.empty_like(host, device=device)
    return _rate(lambda part: copy[:part].copy_(host[:part], non_blocking=True), _COPY_BYTES, device)


def _linear_rates(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """Measure a linear layer: bytes of weights per second for one token, operations per second for many."""
    weight_bytes, num_tokens, num_rows = (128 << 20, 128, 2048) if device.type == "cpu" else (256 << 20, 4096, 8192)
    row = torch.linspace(-1, 1, _COLUMNS, device=device).to(dtype)[None]
    weight, tokens = row.repeat(weight_bytes // row.nbytes, 1), row.repeat(num_tokens, 1)
    rows_for_one = _rate(lambda part: functional.linear(row, weight[:part]), len(weight), device)
    rows_for_many = _rate(lambda part: functional.linear(tokens, weight[:part]), num_rows, device)
    return row.nbytes * rows_for_one, 2 * num_tokens * _COLUMNS * rows_for_many


def _rate(work: Callable[[int], object], amount: int, device: torch.device) -> float:
    """Take the median of amount per second, with less of it where that much would be slow (emulated dtypes are)."""

    def seconds(part: int) -> float:
        began = time.perf_counter()
        work(part)
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        return time.perf_counter() - began

    part = max(1, amount // 512)
    seconds(part)  # libraries start
    while seconds(part) < _QUICK_S and part < amount:
        part = min(amount, 8 * part)
    runs = [seconds(part)]
    while sum(runs) < _MEASURE_S:
        runs.append(seconds(part))
    return part / median(runs)


def _cache_path() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "lading" / "bandwidths.json"


def _cache_key(file: Path | None, device: torch.device, dtype: torch.dtype) -> str:
    host = f"{_text(Path('/proc/sys/kernel/random/boot_id'))} {os.uname().nodename}"
    module = torch.get_device_module(device)
    name = f"{torch.get_num_threads()} threads" if device.type == "cpu" else module.get_device_name(device)
    return f"{host} · {device} {name} · {dtype} · {file and file.stat().st_dev} · torch {torch.__version__}"


def _read_cache() -> dict[str, Bandwidths]:
    try:
        found = json.loads(_cache_path().read_text(encoding="utf-8"))
        entries = found["entries"] if found["format"] == _CACHE_FORMAT else {}
        return {key: Bandwidths(**entry) for key, entry in entries.items()}
    except (OSError, RuntimeError, ValueError, TypeError, KeyError, AttributeError):  # absent, or broken: written anew
        return {}


def _write_cache(entries: dict[str, Bandwidths]) -> None:
    newest = {key: asdict(entries[key]) for key in list(entries)[-_CACHE_ENTRIES:]}
    try:
        path = _cache_path()
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            file = Path(folder, path.name)
            file.write_text(json.dumps({"format": _CACHE_FORMAT, "entries": newest}, indent=1), encoding="utf-8")
            file.replace(path)
    except (OSError, RuntimeError) as error:  # RuntimeError: nobody knows where home is
        _LOG.info("measured rates are not kept: %s", error)
