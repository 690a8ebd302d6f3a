"""Write what `plan_summary` summed up as markdown. Knows the shape of the record; measures nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any


def render(record: Mapping[str, Any]) -> Iterator[str]:
    """Write the report, piece by piece."""
    yield _render_head(record)
    yield _render_quality(record)
    yield _render_faults(record)
    yield _render_scenarios(record)
    yield _render_times(record)
    yield _render_aims(record["aims"])
    yield _render_complaints(record)


def _render_head(record: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    reasons = Counter(record["skipped"].values())
    lines = [
        f"`{record['command']}`",
        "",
        f"- {record['cores']} cores ({record['machine']['cpu']}), one used; load average {record['load_average']}",
        f"- {versions}",
        f"- {record['num_models']:,} models, {record['num_problems']:,} problems: {record['num_that_fit']:,} fit "
        f"entirely, {record['num_infeasible']:,} have no plan, {record['num_undecided']:,} perhaps; "
        f"{record['seconds']:,} s",
    ]
    if reasons:
        told = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
        lines.append(f"- {len(record['skipped'])} more classes could not be built here: {told}")
    lines += [f"- left out: {name}, {reason}" for name, reason in record["absent"].items()]
    return "\n".join(lines)


def _render_quality(record: Mapping[str, Any]) -> str:
    rows = []
    for name, found in record["quality"].items():
        share, bound = found["share_of_optimum"], found["share_of_bound"]
        rows.append(
            [
                record["titles"][name],
                f"{found['num_valid']:,} ({found['valid_share']:.2%})",
                f"{found['num_crashed']:,} in {found['num_models_crashed']:,}",
                f"{found['num_refused']:,}",
                _number(share["all_mean"], 4),
                _number(share["valid_mean"], 4),
                _number(share["valid_min"], 3),
                f"{share['num_reached']:,} of {share['num_rated']:,}",
                f"{found['num_kept_whole']:,} of {record['num_that_fit']:,}",
                f"{_number(bound['mean'], 5)} / {_number(bound['min'], 4)}",
                f"{found['num_keeping_more_than_ours']:,}",
            ]
        )
    head = [
        "",
        "valid",
        "crashes in models",
        "refused wrongly",
        "share of the contiguous optimum (more as 1), invalid as 0",
    ]
    head += ["of valid plans", "least", "optimum reached", "kept entirely where it fits"]
    head += ["share of its bound, mean / least"]
    head += ["keeps more than lading.plan"]
    return "## Quality\n\n" + _table(head, rows)


def _render_faults(record: Mapping[str, Any]) -> str:
    rows = []
    for name, found in record["quality"].items():
        by_number = sorted(found["faults"].items(), key=lambda item: -item[1])
        faults = ", ".join(f"{kind} {count:,}" for kind, count in by_number)
        crashes = ", ".join(f"{kind} {count:,}" for kind, count in found["crashes"].items())
        dispatched = f"{found['num_valid_as_dispatched']:,}"
        rows.append([record["titles"][name], faults, crashes, dispatched, f"{found['num_that_part_uncalled']:,}"])
    head = ["", "faults (a plan may have several)", "crashes"]
    head += ["valid with the main device that dispatch_model takes by itself"]
    head += ["valid, but a module that reads its children's weights is divided"]
    return "## Faults\n\n" + _table(head, rows)


def _render_scenarios(record: Mapping[str, Any]) -> str:
    names = list(record["quality"])
    rows = []
    for scenario, found in record["scenarios"].items():
        cells = [scenario, f"{found['num_problems']:,}"]
        for name in names:
            cells.append(f"{found[name]['valid_share']:.1%} · {_number(found[name]['share_of_optimum'], 3)}")
        rows.append(cells)
    titles = [record["titles"][name] for name in names]
    return "## Scenarios: valid · share of the contiguous optimum (more as 1), invalid as 0\n\n" + _table(
        ["", "problems", *titles], rows
    )


def _render_times(record: Mapping[str, Any]) -> str:
    names = list(record["titles"])
    rows = []
    for title, found in record["times_ms"].items():
        cells = [title]
        for name in names:
            numbers = [] if found[name] is None else [found[name][key] for key in ("median", "p95", "max")]
            cells.append(" / ".join(_number(number, 2) for number in numbers))
        rows.append(cells)
    text = "## Time of a plan: median / p95 / max, ms\n\n" + _table(["", *record["titles"].values()], rows)
    slower = record.get("slower_than_accelerate")
    if slower is not None and slower["median_ratio"] is not None:
        told = ", ".join(f"{model} {ratio:.2f}" for model, ratio in slower["slowest"].items())
        text += (
            f"\n\nOurs / accelerate: median {slower['median_ratio']:.3f}; above 1 in {slower['num_problems']:,} of "
            f"{slower['of_problems']:,} problems and, by medians, {slower['num_models']:,} of {slower['of_models']:,} "
            f"models. Greatest medians: {told}."
        )
    return text


def _render_aims(aims: Iterable[Mapping[str, Any]]) -> str:
    words = {True: "yes", False: "**no**", None: "not measured"}
    rows = []
    for aim in aims:
        found = aim["found"]
        value = _number(found, 5) if isinstance(found, float) else str(found)
        rows.append([aim["aim"], aim["wanted"], value, words[aim["is_met"]]])
    return "## Aims\n\n" + _table(["aim", "wanted", "found", "met"], rows)


def _render_complaints(record: Mapping[str, Any]) -> str:
    if not record["num_complaints"]:
        return "Nothing is wrong with any plan of ours."
    rows = [
        [each["planner"], f"{each['num']:,}", example["model"], example["scenario"], example["reason"]]
        for each in record["complaints"]
        for example in each["examples"]
    ]
    head = ["planner", "of this kind", "for example", "scenario", "reason"]
    return f"## Wrong with ours: {record['num_complaints']:,}\n\n" + _table(head, rows)


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
