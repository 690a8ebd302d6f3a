"""Sum up what planners made of many problems, and hold it against the aims.

Knows the fields of a problem; measures, checks and prints nothing.
"""

from __future__ import annotations

import re
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

_EXAMPLES = 3
_OURS = ("lading", "lading-any")


def summarise(problems: Sequence[Any], names: Sequence[str]) -> dict[str, Any]:
    """Give everything that the report and the last line say."""
    feasible = [problem for problem in problems if problem.best.kept_bytes >= 0 and problem.best.is_decided]
    undecided = sum(not problem.best.is_decided for problem in problems)
    planners = [name for name in names if name != "walk"]
    complaints = [found for problem in problems for found in _complaints(problem, planners)]
    summary: dict[str, Any] = {
        "num_models": len({problem.model for problem in problems}),
        "num_problems": len(problems),
        "num_infeasible": len(problems) - len(feasible) - undecided,
        "num_undecided": undecided,
        "num_that_fit": sum(problem.best.is_whole for problem in problems),
        "quality": {name: _quality(name, problems, feasible) for name in planners},
        "scenarios": _by_scenario(feasible, planners),
        "times_ms": _times(problems, names),
        "complaints": _grouped(complaints),
        "num_complaints": len(complaints),
    }
    if "accelerate" in planners:
        summary["slower_than_accelerate"] = _slower(problems)
    summary["aims"] = list(_aims(summary))
    return summary


def _quality(name: str, problems: Sequence[Any], feasible: Sequence[Any]) -> dict[str, Any]:
    outcomes = [(problem, problem.outcomes[name]) for problem in feasible]
    answered = [(problem, outcome) for problem, outcome in outcomes if outcome.finding is not None]
    valid = [(problem, outcome) for problem, outcome in answered if not outcome.finding.faults]
    rated = [problem for problem in feasible if problem.best.kept_bytes]
    shares = [_share(problem, name) for problem, _ in valid if problem.best.kept_bytes]
    crashed = [(problem, problem.outcomes[name].crash) for problem in problems if problem.outcomes[name].crash]
    bounds = [
        _held(outcome.finding) / outcome.bound_bytes
        for _, outcome in valid
        if outcome.bound_bytes and outcome.finding.kept_bytes
    ]
    return {
        "num_valid": len(valid),
        "valid_share": len(valid) / max(1, len(feasible)),
        "faults": dict(Counter(fault.split(":")[0] for _, outcome in answered for fault in outcome.finding.faults)),
        "num_valid_as_dispatched": sum(not outcome.as_dispatched.faults for _, outcome in answered),
        "num_that_part_uncalled": sum(outcome.finding.parts_uncalled for _, outcome in valid),
        "num_refused": sum(bool(outcome.refusal) for _, outcome in outcomes),
        "num_crashed": len(crashed),
        "crashes": dict(Counter(text.split(":")[0] for _, text in crashed)),
        "num_models_crashed": len({problem.model for problem, _ in crashed}),
        "share_of_optimum": {
            "valid_mean": statistics.fmean(shares) if shares else None,
            "valid_min": min(shares, default=None),
            "all_mean": sum(shares) / max(1, len(rated)),
            "num_reached": sum(share >= 1 for share in shares),
            "num_rated": len(rated),
        },
        "num_keeping_more_than_ours": sum(_kept(problem, name) > _kept(problem, "lading") for problem in feasible),
        "share_of_bound": {
            "mean": statistics.fmean(bounds) if bounds else None,
            "min": min(bounds, default=None),
            "num_within_a_thousandth": sum(share >= 0.999 for share in bounds),
            "num_rated": len(bounds),
        },
        "num_kept_whole": sum(problem.best.is_whole and outcome.finding.is_whole for problem, outcome in valid),
    }


def _complaints(problem: Any, planners: Sequence[str]) -> Iterator[dict[str, str]]:
    """Say what is wrong with our own answers."""
    for name in planners:
        if name not in _OURS:
            continue
        outcome, best = problem.outcomes[name], problem.best
        finding, reasons = outcome.finding, []
        if outcome.crash:
            reasons.append(outcome.crash)
        elif finding is None:
            reasons += ["refused, though there is a plan"] if best.kept_bytes >= 0 and best.is_decided else []
        else:
            kept = _held(finding)
            reasons += finding.faults
            if name == "lading" and best.kept_bytes < 0:
                reasons.append("a plan where none was thought to exist")
            if kept < best.kept_bytes and best.is_decided:
                reasons.append(f"keeps {kept:,} of {best.kept_bytes:,} bytes that a contiguous plan can keep")
            if best.is_whole and not finding.is_whole:
                reasons.append("streams, though everything fits")
            if kept and kept != outcome.resident_bytes:
                reasons.append(f"says it keeps {outcome.resident_bytes:,} bytes, keeps {kept:,}")
            possible = max(kept, best.kept_bytes)
            if kept and outcome.bound_bytes < possible:
                reasons.append(f"its bound {outcome.bound_bytes:,} is below {possible:,}, which is possible")
        for reason in reasons:
            yield {"planner": name, "model": problem.model, "scenario": problem.scenario, "reason": reason}


def _grouped(complaints: Sequence[Mapping[str, str]]) -> list[dict[str, Any]]:
    """Put complaints that differ in numbers alone together, each kind with a few examples."""
    kinds: dict[tuple[str, str], list[Mapping[str, str]]] = {}
    for each in complaints:
        kinds.setdefault((each["planner"], re.sub(r"\d[\d,]*", "#", each["reason"])), []).append(each)
    return [
        {"planner": planner, "kind": kind, "num": len(found), "examples": [dict(each) for each in found[:_EXAMPLES]]}
        for (planner, kind), found in kinds.items()
    ]


def _by_scenario(feasible: Sequence[Any], planners: Sequence[str]) -> dict[str, Any]:
    scenarios = dict.fromkeys(problem.scenario for problem in feasible)
    found: dict[str, Any] = {}
    for scenario in scenarios:
        posed = [problem for problem in feasible if problem.scenario == scenario]
        found[scenario] = {"num_problems": len(posed)}
        for name in planners:
            shares = [_share(problem, name) for problem in posed if problem.best.kept_bytes]
            found[scenario][name] = {
                "valid_share": sum(_is_valid(problem.outcomes[name]) for problem in posed) / len(posed),
                "share_of_optimum": statistics.fmean(shares) if shares else None,
            }
    return found


def _is_valid(outcome: Any) -> bool:
    return outcome.finding is not None and not outcome.finding.faults


def _kept(problem: Any, name: str) -> int:
    outcome = problem.outcomes[name]
    return _held(outcome.finding) if _is_valid(outcome) else 0


def _held(finding: Any) -> int:
    """Give what a map keeps, with what it sends along by name but whose room stays with the model."""
    held: int = finding.kept_bytes + finding.aside_bytes if finding.kept_bytes else 0
    return held


def _share(problem: Any, name: str) -> float:
    """Give the share of the contiguous optimum; 1 for more than that, which may be any multiple."""
    return min(1.0, _kept(problem, name) / problem.best.kept_bytes)


def _times(problems: Sequence[Any], names: Sequence[str]) -> dict[str, Any]:
    groups: dict[str, Callable[[Any], bool]] = {
        "architectures, one accelerator": lambda problem: not problem.is_timed and problem.is_single,
        "architectures, several or none": lambda problem: not problem.is_timed and not problem.is_single,
    }
    for model in dict.fromkeys(problem.model for problem in problems if problem.is_timed):
        groups[f"{model}, one accelerator"] = lambda problem, m=model: problem.model == m and problem.is_single
        groups[f"{model}, several or none"] = lambda problem, m=model: problem.model == m and not problem.is_single
    return {
        title: {
            name: _spread([s for problem in problems if belongs(problem) for s in _seconds(problem.outcomes[name])])
            for name in names
        }
        for title, belongs in groups.items()
    }


def _seconds(outcome: Any) -> list[float]:
    return [] if outcome.crash else outcome.seconds


def _spread(seconds: Sequence[float]) -> dict[str, float] | None:
    if not seconds:
        return None
    ordered = sorted(1000 * each for each in seconds)
    return {
        "median": statistics.median(ordered),
        "p95": ordered[min(len(ordered) - 1, len(ordered) * 95 // 100)],
        "max": ordered[-1],
        "min": ordered[0],
        "num": len(ordered),
    }


def _slower(problems: Sequence[Any]) -> dict[str, Any]:
    """Count where ours took longer than accelerate's default, by problem and by the medians of each model."""
    ratios: dict[str, list[float]] = {}
    for problem in problems:
        ours, peer = problem.outcomes["lading"], problem.outcomes["accelerate"]
        if not ours.crash and not peer.crash:
            ratio = statistics.median(ours.seconds) / statistics.median(peer.seconds)
            ratios.setdefault(problem.model, []).append(ratio)
    every = [ratio for found in ratios.values() for ratio in found]
    medians = {model: statistics.median(found) for model, found in ratios.items()}
    return {
        "num_problems": sum(ratio > 1 for ratio in every),
        "of_problems": len(every),
        "num_models": sum(ratio > 1 for ratio in medians.values()),
        "of_models": len(medians),
        "median_ratio": statistics.median(every) if every else None,
        "slowest": dict(sorted(medians.items(), key=lambda item: -item[1])[:5]),
    }


def _aims(summary: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    ours, times = summary["quality"]["lading"], summary["times_ms"]

    def aim(title: str, wanted: str, value: Any, is_met: bool | None) -> dict[str, Any]:
        return {"aim": title, "wanted": wanted, "found": value, "is_met": is_met}

    def slowest(start: str, key: str = "median", name: str = "lading") -> float | None:
        found = [
            spreads[name][key]
            for title, spreads in times.items()
            if title.startswith(start) and spreads.get(name) is not None
        ]
        return max(found, default=None)

    def at_most(title: str, limit: float, value: float | None) -> dict[str, Any]:
        return aim(title, f"≤ {limit:g}", value, None if value is None else value <= limit)

    yield aim("valid plans", "100 %", ours["valid_share"], ours["valid_share"] == 1)
    yield aim("crashes", "0", ours["num_crashed"], ours["num_crashed"] == 0)
    share = ours["share_of_optimum"]
    reached, rated = share["num_reached"], share["num_rated"]
    yield aim("contiguous optimum reached", str(rated), reached, reached == rated)
    fit = summary["num_that_fit"]
    yield aim("kept entirely where it fits", str(fit), ours["num_kept_whole"], ours["num_kept_whole"] == fit)
    if "lading-any" in summary["quality"]:
        worst = summary["quality"]["lading-any"]["share_of_bound"]["min"]
        yield aim("any: least share of its bound", "≥ 0.999", worst, None if worst is None else worst >= 0.999)
        yield at_most("any: longest, ms", 250, slowest("architectures", "max", "lading-any"))
    yield at_most("planning an architecture, median ms", 3, slowest("architectures"))
    yield at_most("Llama 70B, median ms", 3, slowest("Llama 70B"))
    yield at_most("DeepSeek V3 671B, median ms", 5, slowest("DeepSeek"))
    yield at_most("8,500 modules in layers, median ms", 25, slowest("8,500 modules in layers"))
    yield at_most("8,500 modules, all loose, median ms", 25, slowest("8,500 modules, all"))
    if "slower_than_accelerate" in summary:
        slower = summary["slower_than_accelerate"]
        yield aim("models planned more slowly than by accelerate", "0", slower["num_models"], slower["num_models"] == 0)
