"""Time many batches through a model ten times larger than the memory given to its weights, on the CPU.

Does a corpus cross it at in-memory speed, and how much faster than batch by batch do many sequences decode?

A bf16 Llama of 24 layers with random weights, made here and removed afterwards; 64×128 tokens in micro-batches of
1×128, 4×128 and 16×128, a longer corpus, and 32 sequences that are continued; files in the page cache (warm) or evicted
from it before each batch, crossing and step (cold). The model in memory and ours take turns in one process; each peer
runs in a fresh one, with fewer tokens, because it is slow and each of its batches costs the same. All must give the
same logits and tokens, bit for bit, before any table is written.

Ours: ``lading.convoy`` over ``lading.load`` with a plan for a tenth of the model's bytes.
Peers, what a user would call instead: the same model batch by batch, accelerate's ``disk_offload``, transformers'
``device_map`` with ``"disk"`` (the same plan as ours).
Ceiling, measured in the same run: the same batches with everything in memory; the best reader over the evicted file.

Then memory, sampled from outside every few milliseconds, above what it was before loading, with and without the limit
on malloc's arenas; and many crossings of a small model.

    taskset -c 0,1,2 python benchmarks/bench_convoy.py --report benchmarks/results/bench_convoy.md
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

import convoy_tables
import measure
from bench_offload import recipe, spread, versions
from checkpoints import prepare
from convoy_contenders import CONTENDERS, OURS, PARTS
from convoy_run import Cell, Job, perform
from offload_contenders import budget_of
from offload_floors import reader_rates
from offload_run import IMPORTED, in_fork
from tables import Report, describe_machine

SCRIPT = Path(__file__).with_name("convoy_run.py")
PEERS = ("prefetch", "disk_offload", "device_map")
SAMPLE_S = 0.003
SLOW = {"1x128": 8, "4x128": 3, "16x128": 1, "1 sequence": 2, "8 sequences": 1, "32 sequences": 1}
"""Batches of a peer."""


class Sizes:
    """Say how much is run. Immutable."""

    def __init__(self, *, tiny: bool, vocabulary: int, threads: int, repeats: int) -> None:
        self._vocabulary = vocabulary
        self._tokens = 16 if tiny else 128
        self._rows = 16 if tiny else 64
        """Of all micro-batches together."""
        self._sequences = 4 if tiny else 32
        self._prompt = 8 if tiny else 24
        self._new_tokens = 2 if tiny else 6
        self._is_tiny = tiny
        self._is_whole = threads > 1 or tiny
        """Else a processor alone gets half of the tokens, and only what tells how it differs."""
        self._repeats = repeats

    def ours(self) -> list[Cell]:
        """List what the model in memory and the convoy run."""
        cells = [self._forward(rows, self._rows if self._is_whole else self._rows // 2) for rows in self._widths()]
        if self._is_whole:
            cells.append(self._forward(4, 2 * self._rows if self._is_tiny else 3 * self._rows, "corpus"))
        return [*cells, *(self._generation(rows) for rows in self._parties())]

    def peer(self, name: str) -> list[Cell]:
        """List what a peer runs: the first few of the same batches."""
        ways = [f"{name} cold", *[f"{name} warm"] * (not self._is_tiny)]
        cells = [self._forward(rows, self._rows, ways=ways) for rows in self._widths()]
        cells += [self._generation(rows, ways) for rows in self._parties()]
        few = dict.fromkeys(SLOW, 1) if self._is_tiny else SLOW
        return [Cell(**{**asdict(each), "batches": min(each.batches, few[each.name]), "repeats": 1}) for each in cells]

    def memory(self, name: str) -> list[Cell]:
        """List what is run while memory is watched."""
        mode = "cold" if CONTENDERS[name].is_on_disk else "warm"
        is_wide = name in ("convoy", "memory")
        totals = {rows: max(rows, self._rows // 2) if is_wide else rows for rows in (1, 16)}
        cells = [self._forward(rows, total, ways=[f"{name} {mode}"]) for rows, total in totals.items()]
        return [Cell(**{**asdict(each), "repeats": 1}) for each in cells]

    def small(self) -> Cell:
        """Say what crosses often."""
        return Cell(name="small", rows=1, tokens=16, batches=0, vocabulary=256, ways=[])

    def _widths(self) -> tuple[int, ...]:
        return (1, 4, 16) if self._is_whole else (1, 4)

    def _parties(self) -> tuple[int, ...]:
        return (1, 8, 32) if self._is_whole and not self._is_tiny else (1,)

    def _forward(self, rows: int, total: int, name: str | None = None, ways: list[str] | None = None) -> Cell:
        if ways is None:
            ways = ["memory warm", "convoy cold"]
            ways += ["narrow cold", "convoy warm"] if name is None and self._is_whole else []
        name = name or f"{rows}x128"
        repeats = 1 if name == "corpus" else self._repeats
        return Cell(
            name=name,
            rows=rows,
            tokens=self._tokens,
            batches=total // rows,
            vocabulary=self._vocabulary,
            ways=ways,
            repeats=repeats,
        )

    def _generation(self, rows: int, ways: list[str] | None = None) -> Cell:
        return Cell(
            name=f"{rows} sequence{'s' * (rows > 1)}",
            rows=rows,
            tokens=self._prompt,
            batches=self._sequences // rows,
            vocabulary=self._vocabulary,
            ways=ways or ["memory warm", "convoy cold", *["convoy warm"] * self._is_whole],
            new_tokens=self._new_tokens,
        )


class Bench:
    """Run contenders on one checkpoint. One thread."""

    def __init__(self, folder: Path, scratch: Path, *, tiny: bool) -> None:
        self._folder = folder
        self._scratch = scratch
        self._is_tiny = tiny

    def run(self, contenders: list[str], cells: list[Cell], threads: int, **others: Any) -> dict[str, Any]:
        """Run some contenders in a process of their own.

        Raises:
            SystemExit: one of them failed.
        """
        scratch = self._scratch / f"{self._folder.name}-{contenders[0]}"
        scratch.mkdir(exist_ok=True)
        fields: dict[str, Any] = {"task": "time", **others}
        is_watched = fields.pop("is_watched", False)
        job = Job(
            contenders=contenders,
            folder=str(self._folder),
            scratch=str(scratch),
            threads=threads,
            cells=[asdict(cell) for cell in cells],
            **fields,
        )
        title = f"{', '.join(contenders)}, {job.task}"
        return in_fork(lambda: perform(job), title) if self._is_tiny else self._in_process(job, title, is_watched)

    def _in_process(self, job: Job, title: str, is_watched: bool) -> dict[str, Any]:
        words = [sys.executable, str(SCRIPT), json.dumps(asdict(job))]
        cores = sorted(os.sched_getaffinity(0))
        bound = {"preexec_fn": lambda: os.sched_setaffinity(0, cores[: job.threads])}
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        with subprocess.Popen(words, env=environment, text=True, **pipes, **bound) as process:  # type: ignore[call-overload]
            sampler = measure.PeakSampler(process.pid, cores[job.threads :], SAMPLE_S if is_watched else 3600)
            with sampler:
                said, complained = process.communicate()
            if process.returncode:
                raise SystemExit(f"{title}: {complained[-3000:]}")
        told: dict[str, Any] = json.loads(said.splitlines()[-1])
        for run in (each for ways in told.get("cells", {}).values() for runs in ways.values() for each in runs):
            anonymous, file = sampler.peaks(run["begin_s"], run["end_s"])
            run["anonymous_bytes"] = anonymous - told["before_anonymous_bytes"] if is_watched else None
            run["file_bytes"] = file - told["before_file_bytes"] if is_watched else None
        return told

    def time(self, sizes: Sizes, threads: int) -> dict[str, Any]:
        """Time everybody; cell → way → all runs.

        Raises:
            SystemExit: outputs differ.
        """
        found: dict[str, dict[str, Any]] = self.run(["memory", "convoy", "narrow"], sizes.ours(), threads)["cells"]
        for name in (name for name in PEERS if CONTENDERS[name].is_there):
            for cell, ways in self.run([name], sizes.peer(name), threads)["cells"].items():
                found[cell] |= ways
        for cell, ways in found.items():
            expected = ways["memory warm"][0]["digests"]
            for way, runs in ways.items():
                if any(run["digests"] != expected[: len(run["digests"])] for run in runs):
                    raise SystemExit(f"{cell}, {way}: outputs differ from the model's in memory")
        return {cell: {way: summarise(runs) for way, runs in ways.items()} for cell, ways in found.items()}

    def memory(self, sizes: Sizes, threads: int) -> dict[str, Any]:
        """Watch everybody's memory; what → cell → peaks."""
        names = [name for name, each in CONTENDERS.items() if each.is_there and name != "narrow"]
        names = ["memory", "convoy"] if self._is_tiny else names
        turns = [(CONTENDERS[name].title, name, True) for name in names]
        turns.append(("lading.convoy, malloc's arenas not limited", "convoy", False))
        found = {}
        for title, name, is_limited in turns:
            others = {"is_watched": True, "limits_arenas": is_limited}
            cells = self.run([name], sizes.memory(name), threads, **others)["cells"]
            found[title] = {
                "is_ours": name in OURS,
                **{
                    cell: {key: runs[0].get(key) for key in ("anonymous_bytes", "file_bytes")}
                    for cell, ways in cells.items()
                    for runs in ways.values()
                },
            }
        return found


def summarise(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Give the spread of tokens a second, and the rest of all runs."""
    kept = ("s", "cpu_s", "read_bytes", "streamed_bytes", "fetched_bytes", "convoy")
    return {
        "tokens": runs[0]["tokens"],
        "tokens_per_s": spread([run["tokens"] / run["s"] for run in runs]),
        "runs": [{key: run[key] for key in kept if key in run} for run in runs],
    }


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a small model, few tokens: proves that it runs")
    parser.add_argument("--repeats", type=int, default=0, help="of each forward, ours (default 2; tiny 1)")
    parser.add_argument("--threads", type=int, nargs="+", help="of torch, and cores (default 2 1; tiny 1)")
    parser.add_argument("--crossings", type=int, default=0, help="of the small model (default 1000; tiny 30)")
    parser.add_argument("--cache", type=Path, metavar="DIR", help="where checkpoints are made; removed at the end")
    parser.add_argument("--report", type=Path, metavar="FILE", help="write the tables as markdown")
    options = parser.parse_args()
    options.repeats = options.repeats or (1 if options.tiny else 2)
    options.threads = options.threads or ([1] if options.tiny else [2, 1])
    options.crossings = options.crossings or (30 if options.tiny else 1000)
    return options


def main() -> None:
    options = parse_arguments()
    load_average = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="lading-convoy-", dir=options.cache) as made:
        cache = Path(made)
        small = prepare([recipe(tiny=True)], cache)["small"]
        case = recipe(tiny=options.tiny)
        checkpoint = prepare([case], cache)[case.name]
        vocabulary = case.recipe.config["vocab_size"]
        total, budget = budget_of(checkpoint.folder, PARTS)
        threads = " ".join(map(str, options.threads))
        record: dict[str, Any] = {
            "benchmark": "bench_convoy",
            "command": f"python benchmarks/bench_convoy.py --repeats {options.repeats} --threads {threads}"
            + " --tiny" * options.tiny,
            "is_tiny": options.tiny,
            "threads": options.threads,
            "cores": len(os.sched_getaffinity(0)),
            "load_average": load_average,
            "machine": describe_machine(),
            "versions": versions(),
            "num_bytes": total,
            "budget_bytes": budget,
            "titles": {name: contender.title for name, contender in CONTENDERS.items()},
            "absent": [each.title for each in CONTENDERS.values() if not each.is_there],
            "times": {},
        }
        report = Report(record, options.report)
        report.say(convoy_tables.render_head(record))
        record["readers"] = {
            name: spread(each) for name, each in reader_rates(checkpoint.shards[0], 1 if options.tiny else 3).items()
        }
        report.say(convoy_tables.render_floors(record))
        for module in IMPORTED if options.tiny else ():  # once, for all forks
            import_module(module)
        bench = Bench(checkpoint.folder, cache, tiny=options.tiny)
        for threads in options.threads:
            sizes = Sizes(tiny=options.tiny, vocabulary=vocabulary, threads=threads, repeats=options.repeats)
            record["times"][str(threads)] = bench.time(sizes, threads)
            report.say(convoy_tables.render_times(record, str(threads)))
        sizes = Sizes(tiny=options.tiny, vocabulary=vocabulary, threads=options.threads[0], repeats=1)
        record["memory"] = bench.memory(sizes, options.threads[0])
        report.say(convoy_tables.render_memory(record))
        often = {"task": "cross", "crossings": options.crossings}
        few = Bench(small.folder, cache, tiny=options.tiny)
        record["often"] = few.run(["convoy"], [sizes.small()], options.threads[0], **often)
        report.say(convoy_tables.render_often(record))
        record["aims"] = convoy_tables.judge(record)
        report.say(convoy_tables.render_aims(record))
        report.save()
    print(json.dumps(record))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
