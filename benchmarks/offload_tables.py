"""Write the record of `bench_offload` as markdown, and hold it against its aims.

Knows the shape of the record; measures nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

_MB, _GB = 1e6, 1e9


def render_head(record: Mapping[str, Any]) -> str:
    machine = record["machine"]
    lines = [
        f"`{record['command']}`",
        "",
        f"- {record['cores']} cores to run on ({machine['cpu']}), torch "
        f"threads {record['threads']}; {machine['memory_bytes'] / 2**30:.0f} GiB of memory; {machine['kernel']}; load "
        f"average before the start {record['load_average']:.1f}",
        "- " + ", ".join(f"{name} {number}" for name, number in record["versions"].items()),
        f"- a model of {record['num_bytes'] / _MB:,.0f} MB; ours and device_map may hold "
        f"{record['budget_bytes'] / _MB:,.0f} MB of it",
        "- times are least / **median** / greatest of all forwards in seconds; memory is the greatest seen above "
        "what it was before loading; logits of all are equal bit for bit",
        "- ours/this divides medians: below 1 ours is faster",
    ]
    lines += [f"- absent here: {title}" for title in record["absent"]]
    if record["is_tiny"]:
        lines.append("- tiny: the numbers mean nothing")
    return "\n".join(lines)


def spread(values: Mapping[str, float], digits: int = 3) -> str:
    return " / ".join(
        (f"{values['min']:.{digits}f}", f"**{values['median']:.{digits}f}**", f"{values['max']:.{digits}f}")
    )


def best_rate(record: Mapping[str, Any]) -> float:
    """Give the median rate of the best reader."""
    return max(each["median"] for each in record["readers"].values())


def render_floors(record: Mapping[str, Any]) -> str:
    lines = ["## Floors", "", "| bytes of the whole file per second | GB/s |", "|---|---|"]
    for name, rates in {**record["readers"], **record["warm_readers"]}.items():
        cold = "cold: " if name in record["readers"] else "warm: "
        lines.append(f"| {cold}{name} | {spread({key: each / _GB for key, each in rates.items()}, 2)} |")
    return "\n".join(lines)


def floor_s(record: Mapping[str, Any], cell: str, contender: str) -> float:
    """Give the least seconds that a forward can take: computing, or reading what this contender read."""
    shape, mode = cell.split()
    computing: float = record["contenders"]["memory"][f"{shape} warm"]["s"]["median"]
    if mode == "warm":
        return computing
    read: float = record["contenders"][contender][cell]["read_bytes"]
    return max(computing, read / best_rate(record))


def render_forwards(record: Mapping[str, Any], cell: str) -> str:
    shape, mode = cell.split()
    floor = "computing in memory" if mode == "warm" else "the greater of computing and reading as many bytes"
    lines = [
        f"## {shape} tokens, {mode}",
        "",
        f"Floor: {floor}.",
        "",
        "| | s per forward | ours/this | floor/this | read, MB | anonymous, MB | mapped, MB |",
        "|---|---|---|---|---|---|---|",
    ]
    ours = record["contenders"]["lading"][cell]["s"]["median"]
    for name, summary in record["contenders"].items():
        if cell not in summary:
            continue
        found = summary[cell]
        median = found["s"]["median"]
        sizes = (f"{found[key] / _MB:,.0f}" for key in ("read_bytes", "anonymous_bytes", "file_bytes"))
        lines.append(
            f"| {record['titles'][name]} | {spread(found['s'])} | {ours / median:.2f} | "
            f"{floor_s(record, cell, name) / median:.2f} | {' | '.join(sizes)} |"
        )
    return "\n".join(lines)


def render_manners(record: Mapping[str, Any]) -> str:
    lines = [
        "## One model, four threads; state and edits",
        "",
        "A small model. Wrong and raised: of the calls of four threads, each with its own input. Edit: a weight of "
        "the first layer, which is streamed, scaled in place, another forward between.",
        "",
        "| | wrong | raised | of | state_dict right | on meta | of | edit kept |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, each in record["manners"].items():
        cells = [each[key] for key in ("wrong", "raised", "calls", "state_right", "state_meta", "state_total")]
        kept = "yes" if each["is_edit_kept"] else "no"
        lines.append(f"| {record['titles'][name]} | {' | '.join(map(str, cells))} | {kept} |")
    return "\n".join(lines)


def render_hooks(record: Mapping[str, Any]) -> str:
    hooks = record["hooks"]
    costs = hooks["us_per_block"]
    return "\n".join(
        [
            "## Cost per block",
            "",
            f"{hooks['num_blocks']} linear blocks of 64×64, {hooks['plain_us']:.1f} µs each without lading.",
            "",
            "| | µs added per block |",
            "|---|---|",
            f"| streamed, and there already | {costs['held']:.1f} |",
            f"| streamed, fetched and evicted each time, room for two | {costs['moved']:.1f} |",
            f"| resident ({hooks['hooks_on_resident_blocks']} hooks in all) | {costs['resident']:.1f} |",
        ]
    )


def judge(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """List aims: limit, value, and whether it is met."""
    return [
        {"aim": aim, "limit": limit, "value": value, "is_met": value <= limit if at_most else value >= limit}
        for aim, limit, value, at_most in _aims(record)
    ]


def _aims(record: Mapping[str, Any]) -> Iterator[tuple[str, float, float, bool]]:
    contenders = record["contenders"]
    ours, memory = contenders["lading"], contenders["memory"]

    def median(name: str, cell: str) -> float:
        value: float = contenders[name][cell]["s"]["median"]
        return value

    cold = ours["1x16 cold"]
    rate = cold["read_bytes"] / cold["s"]["median"]
    yield "1x16 cold: bytes read per second / best reader", 0.95, rate / best_rate(record), False
    yield "8x128 warm: speed / in memory", 0.95, median("memory", "8x128 warm") / median("lading", "8x128 warm"), False
    floor = floor_s(record, "8x128 cold", "lading")
    yield "8x128 cold: speed / floor of reading and computing", 0.95, floor / median("lading", "8x128 cold"), False
    for cell in ("1x16 warm", "1x16 cold", "8x128 warm", "8x128 cold"):
        yield f"{cell}: seconds / plain mmap's", 1.0, median("lading", cell) / median("mmap", cell), True
        read = ours[cell]["read_bytes"] / max(1, contenders["mmap"][cell]["read_bytes"])
        if cell.endswith("cold"):
            yield f"{cell}: bytes read / plain mmap's", 1.0, read, True
    yield "µs per streamed block that is there", 8, record["hooks"]["us_per_block"]["held"], True
    yield "hooks on resident blocks", 0, record["hooks"]["hooks_on_resident_blocks"], True
    yield "bytes written to disk", 0, ours["scratch_bytes"], True
    least = record["num_bytes"] / best_rate(record)
    yield "load and first forward from cold / bytes at the best rate", 1.1, ours["start_s"]["median"] / least, True
    cells = [cell for cell in memory if cell.endswith("warm")]  # in memory, what is mapped are libraries
    grown = max(ours[cell]["file_bytes"] - memory[cell]["file_bytes"] for cell in cells)
    yield "mapped bytes of weights / budget", 1.0, grown / record["budget_bytes"], True


def render_aims(record: Mapping[str, Any]) -> str:
    lines = ["## Aims", "", "| aim | limit | found | met |", "|---|---|---|---|"]
    for each in record["aims"]:
        lines.append(f"| {each['aim']} | {each['limit']} | {each['value']:.3f} | {'yes' if each['is_met'] else 'no'} |")
    return "\n".join(lines)
