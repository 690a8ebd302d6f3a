"""Write the record of `bench_capture` as markdown, and hold it against its aims.

Knows the shape of the record; measures nothing.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from typing import Any

from capture_threads import NUM_THREADS, SCENARIOS
from offload_tables import spread

OURS = ("lading", "view", "flags")


def render_head(record: Mapping[str, Any]) -> str:
    machine = record["machine"]
    lines = [
        f"`{record['command']}`",
        "",
        f"- {record['cores']} cores to run on ({machine['cpu']}), torch threads {record['threads']}; "
        f"{machine['memory_bytes'] / 2**30:.0f} GiB of memory; {machine['kernel']}; load average before the start "
        f"{record['load_average']:.1f}",
    ]
    for name, versions in record["interpreters"].items():
        lines.append(f"- {name}: " + ", ".join(f"{package} {number}" for package, number in versions.items()))
    lines += [
        "- every contender in a fresh process, in turns; tensors of all equal those of plain hooks bit for bit, before "
        "anything is timed (but for the last, where transformers gives the model's output)",
        "- least / **median** / greatest over the processes of each one's median; ours/this divides medians: below 1 "
        "ours is faster",
        "- lading copies what it keeps, because a model may write over it, unless `view=True` is asked; all others "
        "keep the model's own tensors",
    ]
    lines += [f"- not measured: {title}: {why}" for title, why in record["absent"].items()]
    if record["is_tiny"]:
        lines.append("- tiny: the numbers mean nothing")
    return "\n".join(lines)


def render_modules(record: Mapping[str, Any]) -> str:
    found = record["modules"]
    lines = [
        f"## ns per module that does nothing ({record['num_modules']} of them)",
        "",
        "No hook: a plain stack in the same process. In an open capture: the forward alone; who has nothing to open, "
        "or opens with each call, has one number. ours/this: copies in an open capture, against this one's whole call; "
        "views/this: the same with `view=True`.",
        "",
        "| | no hook | idle, never used | idle after use | capturing, in an open capture | opened, run and closed | "
        "ours/this | views/this |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, each in found.items():
        cells = [spread(each[cell], 0) for cell in ("never", "idle", "after", "inside", "whole")]
        if abs(each["inside"]["median"] / each["whole"]["median"] - 1) < 0.02:
            cells[3] = "the same"
        divided = [f"{found[ours]['inside']['median'] / each['whole']['median']:.2f}" for ours in ("lading", "view")]
        lines.append(f"| {record['titles'][name]} | {' | '.join([*cells, *divided])} |")
    return "\n".join(lines)


def render_model(record: Mapping[str, Any], which: str) -> str:
    found, model = record["models"][which], record["sizes"][which]
    lines = [
        f"## ms per forward: {model['title']}",
        "",
        "| | never captured | idle after use | capturing, in an open capture | opened, run and closed | added by "
        "capturing | ours/this |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, each in found.items():
        cells = [spread(each[cell], model["digits"]) for cell in ("never", "after", "inside", "whole")]
        added = each["whole"]["median"] / each["after"]["median"] - 1  # in turns with it
        ours = found["lading"]["whole"]["median"] / each["whole"]["median"]
        lines.append(f"| {record['titles'][name]} | {' | '.join(cells)} | {added:+.1%} | {ours:.2f} |")
    return "\n".join(lines)


def render_memory(record: Mapping[str, Any]) -> str:
    lines = [
        f"## MB above the start of a forward, at most: {record['sizes']['memory']['title']}",
        "",
        "Pooled: the mean over tokens, of each layer; inside the hook where there is a way to. transformers has none.",
        "",
        "| | idle | all layers | all, pooled | stopped at half |",
        "|---|---|---|---|---|",
    ]
    for name, each in record["memory"].items():
        cells = [spread(_mb(each[key]), 1) if key in each else "" for key in ("idle", "all", "pooled", "half")]
        lines.append(f"| {record['titles'][name]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _mb(values: Mapping[str, float]) -> dict[str, float]:
    return {key: each / 1e6 for key, each in values.items()}


def render_stops(record: Mapping[str, Any]) -> str:
    lines = [
        f"## `stop_after`: share of the whole forward's time, {record['sizes']['stop']['title']}",
        "",
        "The ceiling is the share of the layers. Opening and closing the capture is included.",
        "",
        "| layers run | share of layers | share of time |",
        "|---|---|---|",
    ]
    num_layers = record["stop"]["num_layers"]
    for depth, share in record["stop"]["shares"].items():
        lines.append(f"| {depth} of {num_layers} | {int(depth) / num_layers:.3f} | {spread(share)} |")
    return "\n".join(lines)


def render_threads(record: Mapping[str, Any]) -> str:
    lines = [
        f"## {NUM_THREADS} threads, each with its own input",
        "",
        "Wrong: other tensors than a single thread gets, or another number of them, without an error / raised. Switch "
        "interval 1 µs. Left on the layers afterwards: hooks / replaced forwards. In the last scenario plain lading "
        "refuses, because a thread that does not listen does the work.",
        "",
        f"| wrong / raised of {record['num_calls']} | {' | '.join(SCENARIOS.values())} | left on layers | pickles |",
        f"|---|{'---|' * (len(SCENARIOS) + 2)}",
    ]
    for name, each in record["threads_table"].items():
        cells = [f"{each[key]['wrong']} / {each[key]['raised']}" if key in each else "" for key in SCENARIOS]
        alone = each["alone"]
        cells += [f"{alone['hooks']} / {alone['forwards']}", "yes" if alone["pickles"] else "no"]
        lines.append(f"| {record['titles'][name]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def judge(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """List aims: limit, value, and whether it is met."""
    return [
        {"aim": aim, "limit": limit, "value": value, "is_met": value <= limit} for aim, limit, value in _aims(record)
    ]


def _aims(record: Mapping[str, Any]) -> Iterator[tuple[str, float, float]]:
    modules = record["modules"]
    for name in ("lading", "view"):
        yield (
            f"{record['titles'][name]}: idle after use / never used",
            1.02,
            modules[name]["after"]["median"] / modules[name]["idle"]["median"],
        )
    limits = {"five": 0.85, "nnsight": round(1 / 3, 3), "lens": 0.25}
    for peer, limit in limits.items():
        if peer in modules:
            for name in ("view", "lading"):
                ratio = modules[name]["inside"]["median"] / modules[peer]["whole"]["median"]
                yield f"per module, {record['titles'][name]} / {record['titles'][peer]}", limit, ratio
                if peer != "five":
                    ratio = modules[name]["whole"]["median"] / modules[peer]["whole"]["median"]
                    yield f"the same, opened and closed around each forward / {record['titles'][peer]}", limit, ratio
    memory = record["memory"]["lading"]
    yield "MB of pooled capture above idle", 2.0, (memory["pooled"]["median"] - memory["idle"]["median"]) / 1e6
    stops = record["stop"]
    excess = [share["median"] - int(depth) / stops["num_layers"] for depth, share in stops["shares"].items()]
    yield "stop_after: share of time above the share of layers, at most", 0.03, max(excess)
    threads = record["threads_table"]
    for name in (each for each in OURS if each in threads):
        calls = [told for scenario, told in threads[name].items() if scenario != "worker"]
        wrong = sum(told["wrong"] + told["raised"] for told in calls) + threads[name].get("worker", {}).get("wrong", 0)
        yield f"{record['titles'][name]}: wrong, and raised but in the last scenario", 0, wrong


def median_of(values: list[float]) -> dict[str, float]:
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}
