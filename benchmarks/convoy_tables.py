"""Write the record of `bench_convoy` as markdown, and hold it against its aims.

Knows the shape of the record; measures nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from convoy_contenders import OURS
from offload_tables import best_rate, render_aims, spread

__all__ = ["judge", "render_aims", "render_floors", "render_head", "render_memory", "render_often", "render_times"]

_MB, _GB = 1e6, 1e9
_SHAPES = ("1x128", "4x128", "16x128")


def render_head(record: Mapping[str, Any]) -> str:
    machine = record["machine"]
    lines = [
        f"`{record['command']}`",
        "",
        f"- {record['cores']} cores ({machine['cpu']}), of which each measured process may use as many as torch has "
        f"threads; {machine['memory_bytes'] / 2**30:.0f} GiB of memory; {machine['kernel']}; load average before the "
        f"start {record['load_average']:.1f}",
        "- " + ", ".join(f"{name} {number}" for name, number in record["versions"].items()),
        f"- a model of {record['num_bytes'] / _MB:,.0f} MB; ours and device_map may hold "
        f"{record['budget_bytes'] / _MB:,.0f} MB of it",
        "- tokens per second are least / **median** / greatest of all runs, new tokens where tokens are generated; "
        "logits and tokens of all are equal bit for bit; ours and the model in memory take turns in one process",
        "- cold: files evicted from the page cache before each batch, each crossing, each step of generation; peers "
        "run fewer batches",
        "- fetched, and read from the disk: as multiples of what streams, once for each crossing (alone: each batch) "
        "and step; all runs together",
    ]
    lines += [f"- absent here: {title}" for title in record["absent"]]
    if record["is_tiny"]:
        lines.append("- tiny: the numbers mean nothing, and rows are of 16 tokens")
    return "\n".join(lines)


def render_floors(record: Mapping[str, Any]) -> str:
    rate = best_rate(record)
    seconds = record["num_bytes"] / rate
    return f"The best reader over the evicted file: {rate / _GB:.2f} GB/s, {seconds:.2f} s for the whole model."


def render_times(record: Mapping[str, Any], threads: str) -> str:
    cores = "one core" if threads == "1" else f"{threads} cores"
    cells = record["times"][threads]
    return "\n\n".join(_render_cell(record["titles"], f"{_title(name)}, {cores}", cells[name]) for name in cells)


def _title(cell: str) -> str:
    if cell in _SHAPES:
        return f"Micro-batches of {cell}"
    return "A longer corpus, 4x128" if cell == "corpus" else f"Generation, {cell} a call"


def _render_cell(titles: Mapping[str, str], title: str, ways: Mapping[str, Any]) -> str:
    lines = [
        f"## {title}",
        "",
        "| | files | tokens | tokens/s | of in memory | tokens a crossing | fetched | read | waiting |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for way, summary in ways.items():
        name, mode = way.split()
        run = summary["runs"][-1]
        convoy = run.get("convoy")
        cells = [
            titles[name],
            "" if name == "memory" else mode,
            f"{summary['tokens']:,}",
            spread(summary["tokens_per_s"], 1),
            f"{_speed(ways, way) / _speed(ways, 'memory warm'):.3f}",
            f"{summary['tokens'] / convoy['crossings']:,.0f}" if convoy else "",
            f"{_share(summary['runs'], 'fetched_bytes'):.3f}" if name in OURS else "",
            f"{_share(summary['runs'], 'read_bytes'):.3f}" if mode == "cold" and name in OURS else "",
            f"{_waiting(run):.2%}" if convoy else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _speed(ways: Mapping[str, Any], way: str) -> float:
    value: float = ways[way]["tokens_per_s"]["median"]
    return value


def _share(runs: Sequence[Mapping[str, Any]], quantity: str) -> float:
    """Divide the bytes of runs by what streams: over few crossings, a block fetched for the next one shows."""
    share: float = sum(run[quantity] for run in runs) / sum(run["streamed_bytes"] for run in runs)
    return share


def _waiting(run: Mapping[str, Any]) -> float:
    convoy = run["convoy"]
    waited: float = convoy["wait_s"] / max(1e-9, convoy["wait_s"] + convoy["run_s"])
    return waited


def render_memory(record: Mapping[str, Any]) -> str:
    lines = [
        "## Memory",
        "",
        "The greatest seen above what it was before loading, of a few batches (convoy and in memory: of half of them).",
        "",
        "| | 1x128: anonymous, MB | mapped, MB | 16x128: anonymous, MB | mapped, MB |",
        "|---|---|---|---|---|",
    ]
    for title, found in record["memory"].items():
        peaks = (found[cell][key] for cell in ("1x128", "16x128") for key in ("anonymous_bytes", "file_bytes"))
        lines.append(f"| {title} | {' | '.join('' if each is None else f'{each / _MB:,.0f}' for each in peaks)} |")
    return "\n".join(lines)


def render_often(record: Mapping[str, Any]) -> str:
    often = record["often"]
    return "\n".join(
        [
            f"## {often['crossings']:,} crossings of a small model",
            "",
            "Grown since the first tenth of them.",
            "",
            "| anonymous, MB | mapped, MB | open files | threads left |",
            "|---|---|---|---|",
            f"| {often['grown_anonymous_bytes'] / _MB:.2f} | {often['grown_file_bytes'] / _MB:.2f} | "
            f"{often['grown_descriptors']} | {often['threads_left']} |",
        ]
    )


def judge(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """List aims: limit, value, and whether it is met."""
    found = [*_aims_of_times(record), *_aims_of_bytes(record), *_aims_of_memory(record)]
    return [
        {"aim": aim, "limit": limit, "value": value, "is_met": value <= limit if at_most else value >= limit}
        for aim, limit, value, at_most in found
    ]


Aim = tuple[str, float, float, bool]


def _aims_of_times(record: Mapping[str, Any]) -> Iterator[Aim]:
    for threads, cells in record["times"].items():
        on = f"on {threads} core{'s' * (threads != '1')}"
        for cell in (cell for cell in (*_SHAPES, "corpus") if cell in cells):
            for way in (way for way in cells[cell] if way.split()[0] in ("convoy", "narrow")):
                share = _speed(cells[cell], way) / _speed(cells[cell], "memory warm")
                yield f"{cell} {on}: {way}, speed / in memory", 0.97, share, False
        for cell, limit in (("1x128", 3.5), ("1 sequence", 8)):
            if "disk_offload cold" in cells[cell]:
                ratio = _speed(cells[cell], "convoy cold") / _speed(cells[cell], "disk_offload cold")
                yield f"{cell} {on}: convoy cold, speed / accelerate disk_offload", limit, ratio, False


def _aims_of_bytes(record: Mapping[str, Any]) -> Iterator[Aim]:
    for threads, cells in record["times"].items():
        runs = [
            (cell, way, run)
            for cell, ways in cells.items()
            for way, summary in ways.items()
            for run in summary["runs"]
            if run.get("convoy")
        ]
        on = f"on {threads} core{'s' * (threads != '1')}"
        fetched = _share([run for *_, run in runs], "fetched_bytes")
        yield f"{on}: fetched by all crossings / streamed", 1.0, round(fetched, 2), True
        read = max(_share([run], "read_bytes") for _, way, run in runs if way.endswith("cold"))
        yield f"{on}: most read from disk by a crossing / streamed", 1.02, read, True
        waiting = [_waiting(run) for cell, _, run in runs if cell in (*_SHAPES, "corpus")]
        yield f"{on}: most waiting for weights, forwards", 0.01, max(waiting), True


def _aims_of_memory(record: Mapping[str, Any]) -> Iterator[Aim]:
    cells = ("1x128", "16x128")
    memory = record["memory"]
    if not record["is_tiny"]:
        base, ours, unlimited = (
            next(found for title, found in memory.items() if title.startswith(begin))
            for begin in ("in memory", "lading.convoy", "lading.convoy, malloc")
        )
        grown = max(ours[cell]["file_bytes"] - base[cell]["file_bytes"] for cell in cells)  # there, it is libraries
        yield "mapped bytes of weights / budget", 1.0, grown / record["budget_bytes"], True
        share = max(ours[cell]["anonymous_bytes"] / unlimited[cell]["anonymous_bytes"] for cell in cells)
        yield "anonymous bytes / with malloc's arenas not limited", 1.0, share, True
    yield "MB grown over many crossings", 1.0, record["often"]["grown_anonymous_bytes"] / _MB, True
    yield "threads left after a convoy", 0, record["often"]["threads_left"], True
