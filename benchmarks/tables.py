"""Write a benchmark's record as markdown, for the terminal and for a report.

Knows the shape of the record; measures nothing, and writes no path or name of the machine.
"""

from __future__ import annotations

import platform
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

_MiB = 2**20


class Report:
    """Print texts as they come, and save them together if a file is named."""

    def __init__(self, record: Mapping[str, Any], path: Path | None) -> None:
        self._name = record["benchmark"]
        self._path = path
        self._texts: list[str] = []

    def say(self, text: str) -> None:
        """Print a text now and keep it for the report."""
        self._texts.append(text)
        print(text, end="\n\n", flush=True)

    def save(self) -> None:
        """Write the report, if a file is named."""
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.write_text("\n\n".join([f"# {self._name}", *self._texts]) + "\n", encoding="utf-8")


def describe_machine() -> dict[str, Any]:
    """Tell processor, memory and kernel."""
    models = [line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    total = next(line.split()[1] for line in _lines("/proc/meminfo") if line.startswith("MemTotal"))
    kernel = ".".join(platform.release().split("-")[0].split(".")[:2])
    return {
        "cpu": models[0] if models else platform.machine(),
        "memory_bytes": int(total) * 1024,
        "kernel": f"{platform.system()} {kernel}",
    }


def _lines(path: str) -> list[str]:
    return Path(path).read_text(encoding="utf-8").splitlines()


def render_head(record: Mapping[str, Any]) -> str:
    """Say how it was measured, on what, with which versions."""
    machine = record["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    lines = [
        f"`{record['command']}`",
        "",
        f"- {record['cores']} cores ({machine['cpu']}), of which each measured process may use "
        f"{record['threads']}; torch threads {record['threads']}; "
        f"{machine['memory_bytes'] / 2**30:.0f} GiB of memory; {machine['kernel']}; "
        f"load average before the start {record['load_average']:.1f}",
        f"- {versions}",
        "- every load in a fresh process, imports before the clock; `MALLOC_MMAP_THRESHOLD_=65536` in all of them",
        "- times are least / **median** / greatest in seconds; ours/this divides medians, below 1 ours is faster",
    ]
    if record["is_tiny"]:
        lines.append("- tiny: forked processes and miniature models; the numbers mean nothing")
    lines += [f"- skipped: {record['titles'].get(name, name)}: {why}" for name, why in record["skipped"].items()]
    return "\n".join(lines)


def render_case(record: Mapping[str, Any], titles: Mapping[str, str]) -> str:
    """Write all tables of one case."""
    shards = f"{record['num_shards']} shard{'s' * (record['num_shards'] != 1)}"
    equal = "Logits of all contenders equal ours bit for bit"
    if "lading-4" in titles:
        across = "also" if record["outputs_equal_across_versions"] else "not"
        equal += f" under each version of transformers, {across} between the two"
    parts = [
        f"## {record['title']}",
        f"{record['num_bytes'] / 1e9:.3g} GB, {record['num_tensors']:,} tensors, {shards}. {equal}.",
    ]
    parts += [f"Skipped: {titles.get(name, name)}: {why}." for name, why in record["skipped"].items()]
    for mode, told in record["modes"].items():
        parts += [f"### {mode}", _render_times(told, titles), _render_bytes(told, titles)]
    parts += ["### two live processes, both loaded and run", _render_pairs(record["two_processes"], titles)]
    return "\n\n".join(parts)


def _render_times(told: Mapping[str, Any], titles: Mapping[str, str]) -> str:
    ours = told["lading"]
    rows = []
    for key, one in told.items():
        rate = f"{one['bytes_per_s'] / 1e9:.2f} GB/s" if key in ("read", "copy") else ""
        rows.append(
            [
                titles[key],
                _spread(one["load_s"]),
                _ratio(ours, one, "load_s"),
                _spread(one.get("first_forward_s")),
                _spread(one.get("load_and_first_s")) or rate,
                _ratio(ours, one, "load_and_first_s"),
                _spread(one.get("second_forward_s")),
            ]
        )
    head = ["", "load", "ours/this", "first forward", "load + first", "ours/this", "second forward"]
    return _table(head, rows)


def _render_bytes(told: Mapping[str, Any], titles: Mapping[str, str]) -> str:
    rows = []
    for key, one in told.items():
        has_run = "first_forward_s" in one
        rows.append(
            [
                titles[key],
                _mebibytes(one["peak_bytes"]),
                _mebibytes(one["load_peak_anonymous_bytes"]),
                _mebibytes(one["load_peak_file_bytes"]),
                _mebibytes(one["run_peak_anonymous_bytes"]) if has_run else "",
                _mebibytes(one["run_peak_file_bytes"]) if has_run else "",
                _mebibytes(one["read_bytes"]),
                _mebibytes(one["read_bytes_first"]) if has_run else "",
                f"{one['major_faults']['median']:.0f}",
            ]
        )
    head = ["medians, MiB", "peak added by load", "anonymous", "file", "peak anonymous with two forwards", "file"]
    head += ["read from disk by load", "with first forward", "major faults of load"]
    return _table(head, rows)


def _render_pairs(told: Mapping[str, Any], titles: Mapping[str, str]) -> str:
    rows = [
        [titles[key], f"{one['pss_added_bytes'] / _MiB:,.0f}", f"{one['rss_added_bytes'] / _MiB:,.0f}"]
        for key, one in told.items()
    ]
    return _table(["MiB added by both together", "Pss", "Rss"], rows)


def render_aims(aims: Iterable[Mapping[str, Any]]) -> str:
    """Write what was aimed at and what came of it."""
    words = {True: "yes", False: "**no**", None: "not measured"}
    rows = [
        [
            aim["case"],
            aim["aim"],
            f"≤ {aim['limit']:g}",
            "" if aim["value"] is None else f"{aim['value']:.3g}",
            words[aim["is_met"]],
        ]
        for aim in aims
    ]
    return "## Aims\n\n" + _table(["case", "aim", "limit", "found", "met"], rows)


def _spread(quantity: Mapping[str, float] | None) -> str:
    if quantity is None:
        return ""
    return f"{quantity['min']:.4f} / **{quantity['median']:.4f}** / {quantity['max']:.4f}"


def _ratio(ours: Mapping[str, Any], other: Mapping[str, Any], quantity: str) -> str:
    if quantity not in ours or quantity not in other or not other[quantity]["median"]:
        return ""
    return f"{ours[quantity]['median'] / other[quantity]['median']:.2f}"


def _mebibytes(quantity: Mapping[str, float]) -> str:
    return f"{quantity['median'] / _MiB:,.1f}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
