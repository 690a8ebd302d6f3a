"""Capture every layer of a model, in each of the ways there are.

What does it cost while capturing and while not, in time and memory, and is it right when many threads do it?

First each way must give the tensors of plain hooks, bit for bit. Then, in fresh processes and in turns: nanoseconds per
module that does nothing; a small model of 24 layers and two layers of Llama 3 8B's layout, with and without capturing;
the greatest memory of a forward with all layers kept, pooled, or stopped half-way; forwards that stop after a layer;
and eight threads, each with its own input, alone, beside compilations, and with layers run in worker threads.

Ours: ``lading.capture``, with its copies and with ``view=True``, and transformers' flags made right by
``thread_safe_outputs``. Peers, what a user would call instead: transformers 5 and 4 (``output_hidden_states``), nnsight
(``trace``), TransformerLens (``run_with_cache`` over HookPoints), plain hooks added and removed around each call.
Ceiling, measured in the same run: a hook that does nothing; the idle forward's memory; the share of the layers.

Peers live in environments of their own: `make env-t4`, `make env-peers`. Who is not there is left out and said so.

    taskset -c 0,1 python benchmarks/bench_capture.py --report benchmarks/results/bench_capture.md
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import capture_tables
from capture_contenders import CONTENDERS, has_flags
from capture_run import Job, perform
from capture_tables import median_of
from capture_threads import NUM_THREADS, SCENARIOS
from offload_tables import render_aims
from tables import Report, describe_machine

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = Path(__file__).with_name("capture_run.py")
ENVIRONMENTS = {"5": ".venv-t5", "4": ".venv-t4", "peers": ".venv-peers"}
_VERSIONS = """
import json, sys
from importlib.metadata import PackageNotFoundError, version
found = {"python": sys.version.split()[0]}
for name in ("torch", "transformers", "nnsight", "transformer-lens"):
    try:
        found[name] = version(name)
    except PackageNotFoundError:
        pass
print(json.dumps(found))
"""


def sizes_of(*, tiny: bool) -> dict[str, dict[str, Any]]:
    """Describe the models: sizes of a Llama, rows and tokens, runs per process."""
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 256}
    small = {**heads, "num_hidden_layers": 24, "hidden_size": 128, "intermediate_size": 256}
    wide = {**small, "hidden_size": 256, "intermediate_size": 512}
    llama = {"hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 14336}
    layout = {**llama, "num_hidden_layers": 2, "vocab_size": 1024}
    if tiny:
        small = wide = layout = {**heads, "num_hidden_layers": 4, "hidden_size": 16, "intermediate_size": 16}
    many = 2 if tiny else 30
    cases = {
        "small": ("24 layers of width 128, 2×16 tokens", small, (2, 16), many, "float32", 2),
        "layout": ("2 layers of Llama 3 8B's layout, bf16, 2×56 tokens", layout, (2, 56), many // 6, "bfloat16", 1),
        "memory": ("24 layers of width 256, 8×512 tokens", wide, (8, 512), 1, "float32", 1),
        "stop": ("24 layers of width 256, 8×128 tokens", wide, (8, 128), many // 2, "float32", 1),
        "threads": ("24 layers of width 128, 2×16 tokens", small, (2, 16), many, "float32", 1),
    }
    names = ("title", "sizes", "shape", "runs", "dtype", "digits")
    found = {name: dict(zip(names, case, strict=True)) for name, case in cases.items()}
    if tiny:
        for case in found.values():
            case["shape"], case["runs"] = (2, 8), 1
    return found


class Bench:
    """Run contenders in turns, each job in a process of its own, or here if tiny. One thread."""

    def __init__(self, options: argparse.Namespace, pythons: dict[str, str]) -> None:
        self._options = options
        self._pythons = pythons
        self.sizes = sizes_of(tiny=options.tiny)
        self.names = [name for name, each in CONTENDERS.items() if each.interpreter in pythons]
        if not has_flags():
            self.names = [name for name in self.names if name != "flags"]

    def ask(self, task: str, name: str, *, case: str, **more: Any) -> dict[str, Any]:
        """Have one contender do one task.

        Raises:
            SystemExit: it failed, or gave other tensors than plain hooks.
        """
        found = self.sizes[case]
        job = Job(
            **{
                "task": task,
                "contender": name,
                "threads": self._options.threads,
                **{key: found[key] for key in ("sizes", "shape", "runs", "dtype")},
                **more,
            }
        )
        if self._options.tiny:
            return json.loads(json.dumps(perform(job)))
        python = self._pythons[CONTENDERS[name].interpreter]
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(
            [python, str(SCRIPT), json.dumps(asdict(job))],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=900,
        )
        if done.returncode:
            raise SystemExit(f"{CONTENDERS[name].title}, {task}: {done.stderr[-3000:]}")
        told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return told

    def take_turns(self, task: str, *, case: str, names: list[str], **more: Any) -> dict[str, Any]:
        """Ask all in turns, forth and back; give the spread of each one's numbers."""
        told: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
        for turn in range(self._options.rounds):
            for name in names if turn % 2 == 0 else reversed(names):
                told[name].append(self.ask(task, name, case=case, **more))
        return {
            name: {key: median_of([each[key] for each in rounds]) for key in rounds[0]} for name, rounds in told.items()
        }

    def table_of_threads(self, names: list[str]) -> dict[str, Any]:
        """Count what threads get wrong, in each scenario."""
        return {
            name: {
                scenario: self.ask("threads", name, case="threads", scenario=scenario, runs=self._options.turns)
                for scenario in SCENARIOS
            }
            for name in names
        }

    def stops(self) -> dict[str, Any]:
        """Time forwards that stop after some layers."""
        rounds = [self.ask("stop", "lading", case="stop") for _ in range(self._options.rounds)]
        depths = rounds[0]["shares"]
        shares = {depth: median_of([each["shares"][depth] for each in rounds]) for depth in depths}
        return {"num_layers": rounds[0]["num_layers"], "shares": shares}


def find_pythons(options: argparse.Namespace) -> tuple[dict[str, str], dict[str, dict[str, str]]]:
    """Find the interpreters that are there, and what is installed in each; where tiny, this one alone."""

    def ask(python: str) -> dict[str, str]:
        told: dict[str, str] = json.loads(
            subprocess.run([python, "-c", _VERSIONS], check=True, capture_output=True, text=True).stdout
        )
        return told

    versions = {"here": ask(sys.executable)}
    major = versions["here"]["transformers"].split(".", 1)[0]
    pythons = {"here": sys.executable, major: sys.executable}
    for name, folder in ENVIRONMENTS.items():
        python = Path(getattr(options, f"python_{name}") or ROOT / folder / "bin" / "python")
        if name not in pythons and not options.tiny and python.exists():
            pythons[name], versions[name] = str(python), ask(str(python))
    return pythons, versions


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="small models, one round, here: proves that it runs")
    parser.add_argument("--rounds", type=int, help="processes per contender and task (default 5; tiny 1)")
    parser.add_argument("--turns", type=int, help="calls per thread (default 40; tiny 1)")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default 1); bound cores with taskset")
    for name, folder in ENVIRONMENTS.items():
        parser.add_argument(
            f"--python-{name}", metavar="PATH", help=f"an interpreter (default {folder}'s, if it is there)"
        )
    parser.add_argument("--report", type=Path, metavar="FILE", help="write the tables as markdown")
    options = parser.parse_args()
    options.rounds = options.rounds or (1 if options.tiny else 5)
    options.turns = options.turns or (1 if options.tiny else 40)
    return options


def absent(bench: Bench) -> dict[str, str]:
    """Say who is not measured, and why."""
    why = {"peers": "no .venv-peers; `make env-peers` makes it", "4": "no .venv-t4", "5": "no .venv-t5"}
    missing = {name: each for name, each in CONTENDERS.items() if name not in bench.names}
    return {each.title: why.get(each.interpreter, "not in this version of lading") for each in missing.values()}


def main() -> None:
    options = parse_arguments()
    pythons, versions = find_pythons(options)
    bench = Bench(options, pythons)
    record: dict[str, Any] = {
        "benchmark": "bench_capture",
        "command": f"python benchmarks/bench_capture.py --rounds {options.rounds} --turns {options.turns} "
        f"--threads {options.threads}" + " --tiny" * options.tiny,
        "is_tiny": options.tiny,
        "threads": options.threads,
        "cores": len(os.sched_getaffinity(0)),
        "load_average": os.getloadavg()[0],
        "machine": describe_machine(),
        "interpreters": versions,
        "titles": {name: each.title for name, each in CONTENDERS.items()},
        "absent": absent(bench),
        "sizes": bench.sizes,
        "num_modules": 8 if options.tiny else 200,
        "num_calls": NUM_THREADS * options.turns,
    }
    right = [name for name in bench.names if CONTENDERS[name].is_right]
    report = Report(record, options.report)
    report.say(capture_tables.render_head(record))
    stack = {"num_layers": record["num_modules"]}
    record["modules"] = bench.take_turns("modules", case="small", names=bench.names, sizes=stack)
    report.say(capture_tables.render_modules(record))
    record["models"] = {case: bench.take_turns("model", case=case, names=bench.names) for case in ("small", "layout")}
    for case in record["models"]:
        report.say(capture_tables.render_model(record, case))
    record["memory"] = bench.take_turns("memory", case="memory", names=right)
    report.say(capture_tables.render_memory(record))
    record["stop"] = bench.stops()
    report.say(capture_tables.render_stops(record))
    record["threads_table"] = bench.table_of_threads([name for name in right if name != "view"])  # its copies differ
    report.say(capture_tables.render_threads(record))
    record["aims"] = capture_tables.judge(record)
    report.say(render_aims(record))
    report.save()
    print(json.dumps(record))


if __name__ == "__main__":
    main()
