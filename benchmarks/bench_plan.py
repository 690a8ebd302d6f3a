"""Plan every architecture of transformers into twenty memories.

Is every plan valid, how much of what could be kept is kept, and how long does it take?

Problems: the model classes of transformers' own tables that build on meta (a thousand), a 70B Llama, a 671B DeepSeek V3
and two plain modules of 8,500 modules, each in twenty scenarios: shares of one accelerator, equal and unequal ones, a
tiny first one, exact fits, half a block, none, limited host memory, a limited disk.
Ours: ``lading.plan(runtime="accelerate")``, and the same with ``strategy="any"``.
Peers, what a user would call instead: accelerate's ``infer_auto_device_map``, the same with
``fallback_allocation=True``, and what transformers does for ``device_map="auto"``. All get the same classes to keep
whole, those that the model declares, and take turns in an order that moves on with each problem.
Ceiling, in the same run: for quality the best contiguous placement, found again without lading's code, and the bound
that each plan carries; for time one walk over the module.

Every device map is checked against its module by `plan_check`, which knows no planner. Times are those of a call with a
built model, the description of its modules included; the garbage of building is collected before.

    python benchmarks/bench_plan.py --report benchmarks/results/bench_plan.md
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import random
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch

import lading
import plan_check
import plan_summary
import plan_tables
from plan_check import Best, Finding, Inventory
from plan_problems import (
    FEW,
    SINGLE,
    Case,
    Skip,
    no_split_of,
    plain_cases,
    scenarios_of,
    time_limit,
    transformers_cases,
)
from planners import PLANNERS, Answer, Refused
from tables import Report, describe_machine

_PATIENCE_S = 5


@dataclass(slots=True, kw_only=True)
class Outcome:
    """What one planner made of one problem. One thread."""

    seconds: list[float] = field(default_factory=list)
    finding: Finding | None = None
    as_dispatched: Finding | None = None
    """The same with the main device that accelerate's ``dispatch_model`` takes when it is given nothing but the map."""
    refusal: str = ""
    crash: str = ""
    resident_bytes: int = 0
    """What the plan says is kept; lading's only."""
    bound_bytes: int = 0


@dataclass(slots=True, kw_only=True)
class Problem:
    """One model in one memory, and what came of it. One thread."""

    model: str
    scenario: str
    is_plain: bool
    is_timed: bool
    num_units: int
    total_bytes: int
    best: Best
    outcomes: dict[str, Outcome]

    @property
    def is_single(self) -> bool:
        """Say whether there is one accelerator."""
        return self.scenario in SINGLE


def solve(case: Case, names: Sequence[str], runs: int) -> list[Problem] | str:
    """Pose every scenario of a model to every planner; a reason instead where it cannot be built."""
    try:
        model = case.build()
    except Skip as reason:
        return str(reason)
    no_split = no_split_of(model)
    inventory = Inventory.of(model, no_split)
    units, solved = inventory.units(), []
    gc.collect()
    for position, (scenario, memory) in enumerate(scenarios_of(units).items()):
        outcomes: dict[str, Outcome] = {name: Outcome() for name in names}
        for turn in range(runs):
            shift = (position + turn) % len(names)
            for name in [*names[shift:], *names[:shift]]:
                call(name, model, no_split, memory, inventory, outcomes[name])
        solved.append(
            Problem(
                model=case.name,
                scenario=scenario,
                is_plain=case.is_plain,
                is_timed=case.is_timed,
                num_units=len(units),
                total_bytes=inventory.total_bytes,
                best=plan_check.best_of(units, memory),
                outcomes=outcomes,
            )
        )
    return solved


def call(name: str, model: Any, no_split: list[str], memory: Any, inventory: Inventory, outcome: Outcome) -> None:
    """Time one planner once; check its first answer. Who takes too long counts as crashed."""
    if outcome.crash:
        return
    given, answer = dict(memory), None
    began = time.perf_counter()
    try:
        with time_limit(_PATIENCE_S):
            answer = PLANNERS[name].call(model, no_split, given)
    except Refused as refusal:
        outcome.refusal = str(refusal)
    except Exception as error:  # noqa: BLE001 - counted
        outcome.crash = f"{type(error).__name__}: {error}"[:200]
    outcome.seconds.append(time.perf_counter() - began)
    if answer is not None and outcome.finding is None and not PLANNERS[name].is_floor:
        judge(answer, inventory, memory, outcome)


def judge(answer: Answer, inventory: Inventory, memory: Any, outcome: Outcome) -> None:
    device_map = dict(answer.device_map)
    outcome.finding = plan_check.check(inventory, device_map, memory)
    dispatched = [*(set(device_map.values()) - {"cpu", "disk"})][:1]  # accelerate 1.15, big_modeling.py
    outcome.as_dispatched = plan_check.check(inventory, device_map, memory, main=(dispatched or ["cpu"])[0])
    if answer.plan is not None:
        outcome.resident_bytes = answer.plan.resident_bytes
        outcome.bound_bytes = answer.plan.bound


def solve_all(
    cases: Sequence[Case], names: Sequence[str], options: argparse.Namespace
) -> Iterator[tuple[Case, list[Problem] | str]]:
    """Go through the models, side by side if there are workers; what is timed by itself comes last and alone."""
    many = [case for case in cases if not case.is_timed]
    if options.workers > 1:
        global _SHARED  # noqa: PLW0603 - inherited by the forks: cases hold closures, which cannot be sent
        _SHARED = (many, names)
        with ProcessPoolExecutor(options.workers, mp_context=get_context("fork")) as pool:
            yield from zip(many, pool.map(_solve_shared, range(len(many)), chunksize=4), strict=True)
    else:
        yield from ((case, solve(case, names, 1)) for case in many)
    yield from ((case, solve(case, names, options.runs)) for case in cases if case.is_timed)


_SHARED: tuple[Sequence[Case], Sequence[str]] = ((), ())


def _solve_shared(position: int) -> list[Problem] | str:
    cases, names = _SHARED
    return solve(cases[position], names, 1)


def choose_cases(options: argparse.Namespace) -> list[Case]:
    if options.tiny:
        return [*transformers_cases(FEW), *plain_cases(tiny=True)]
    if options.only:
        return transformers_cases(options.only.split(","))
    architectures = transformers_cases()
    if options.sample is not None:
        architectures = random.Random(options.seed).sample(architectures, options.sample)
    return [*architectures, *plain_cases()]


def choose_planners(wanted: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    absent = {name: f"{PLANNERS[name].missing} is not installed" for name in wanted if PLANNERS[name].missing}
    return [name for name in wanted if name not in absent], absent


def warm_up(names: Iterable[str]) -> None:
    """Let everybody import what it needs, and the solver start."""
    module = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 8))
    for name in names:
        PLANNERS[name].call(module, [], {0: 250, "cpu": 10_000})


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a dozen architectures, once: proves that it runs")
    parser.add_argument("--sample", type=int, metavar="N", help="only so many architectures, drawn with --seed")
    parser.add_argument("--seed", type=int, default=0, help="of the sample (default %(default)s)")
    parser.add_argument("--only", metavar="CLASS,…", help="only these classes of transformers")
    parser.add_argument("--planners", default=",".join(PLANNERS), help="comma-separated, of %(default)s")
    parser.add_argument(
        "--runs", type=int, help="rounds for the models that are timed by themselves (default 9; tiny 1)"
    )
    parser.add_argument("--workers", type=int, default=1, help="processes; with more than one, times mean nothing")
    parser.add_argument("--report", "--out", type=Path, metavar="FILE", help="write the tables as markdown")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.planners.split(",") if name not in PLANNERS]
    if unknown or "lading" not in options.planners.split(","):
        parser.error(f"unknown planner: {', '.join(unknown)}" if unknown else "lading must be among the planners")
    options.runs = options.runs or (1 if options.tiny else 9)
    return options


def command_of(options: argparse.Namespace) -> str:
    words = ["python benchmarks/bench_plan.py", f"--runs {options.runs}"] + ["--tiny"] * options.tiny
    words += [f"--sample {options.sample} --seed {options.seed}"] if options.sample is not None else []
    words += [f"--only {options.only}"] if options.only else []
    words += [f"--planners {options.planners}"] if options.planners != ",".join(PLANNERS) else []
    words += [f"--workers {options.workers}"] if options.workers > 1 else []
    return " ".join(words)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)  # peers log a line for every accelerator that is not there
    torch.set_num_threads(1)
    names, absent = choose_planners(options.planners.split(","))
    warm_up(names)
    began, problems, skipped = time.monotonic(), [], {}
    for number, (case, solved) in enumerate(solve_all(choose_cases(options), names, options)):
        if isinstance(solved, str):
            skipped[case.name] = solved
        else:
            problems += solved
        if sys.stderr.isatty():
            print(f"\r{number + 1} models, {len(problems)} problems", end="", file=sys.stderr)
    packages = ("torch", "transformers", "accelerate", "highspy")
    record: dict[str, Any] = {
        "benchmark": "bench_plan",
        "command": command_of(options),
        "is_tiny": options.tiny,
        "cores": os.cpu_count(),
        "load_average": round(os.getloadavg()[0], 2),
        "machine": describe_machine(),
        "versions": {
            "lading": lading.__version__,
            "python": sys.version.split()[0],
            **{name: version(name) for name in packages if name not in {PLANNERS[key].missing for key in absent}},
        },
        "seconds": round(time.monotonic() - began),
        "titles": {name: PLANNERS[name].title for name in names},
        "absent": absent,
        "skipped": skipped,
        **plan_summary.summarise(problems, names),
    }
    report = Report(record, options.report)
    for text in plan_tables.render(record):
        report.say(text)
    report.save()
    print(json.dumps(record))


if __name__ == "__main__":
    main()
