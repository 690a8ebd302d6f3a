"""Time the way from a checkpoint on disk to a model that has run.

How long does it take, and how much memory, until the model is there, and until its first forward is done?

Cases: Llama, Qwen2 with tied embeddings, T5, Mixtral in the hub's layout, five thousand small tensors, and fp32 cast to
bf16; real architectures, random weights, made here. Each load runs in a fresh process whose imports are done before the
clock starts, with the files in the page cache (warm) and evicted from it (cold, proved by mincore); ours and the others
take turns, in an order that moves on each round. First every contender must give the same logits, bit for bit, or
nothing is measured.

Ours: ``lading.load``, cold also with ``readahead=True``.
Peers, what a user would call instead: ``from_pretrained`` of transformers 5 and, with --python4, of transformers 4;
accelerate's ``load_checkpoint_and_dispatch``; an empty model with safetensors' ``load_file`` and
``load_state_dict(assign=True)``.
Ceiling, measured in the same run: the floors below which no loader can come. Parsing the headers alone; building the
empty model alone; parsing, building without drawing numbers and assigning with no checks at all; bringing every byte of
the evicted files into the page cache; copying every byte out of it. The second forward is the bare forward.

Memory is sampled from outside every millisecond (anonymous, file) and read from the kernel's own peak (both together);
reads are the bytes the disk delivered; Pss is that of two live processes that loaded and ran the same checkpoint.

    python benchmarks/bench_load.py --python4 path/to/python --report benchmarks/results/bench_load.md
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lading
import measure
import tables
from aims import judge
from checkpoints import Case, Checkpoint, cases, clean, prepare
from contenders import CONTENDERS, MODES, Job, Skip
from processes import ContenderError, Interpreter, Runner, Running, holding

_COUNTED = (
    *("load_s", "first_forward_s", "load_and_first_s", "second_forward_s", "peak_bytes"),
    *("load_peak_anonymous_bytes", "load_peak_file_bytes", "run_peak_anonymous_bytes", "run_peak_file_bytes"),
    *("read_bytes", "read_bytes_first", "major_faults", "major_faults_first"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """Put a contender in an interpreter. Immutable."""

    key: str
    contender: str
    interpreter: Interpreter
    title: str
    modes: tuple[str, ...] = MODES

    @property
    def is_model(self) -> bool:
        """Say whether it gives a model to run."""
        return CONTENDERS[self.contender].is_model

    @property
    def is_floor(self) -> bool:
        """Say whether it is a floor, not a loader."""
        return CONTENDERS[self.contender].is_floor


@dataclass(slots=True, kw_only=True)
class Trial:
    """Keep what the unmeasured first run of each entry told. One thread."""

    outputs: dict[str, str] = field(default_factory=dict)
    """Entry's key → SHA-256 of its logits."""
    imports: dict[str, list[str]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)


def list_entries(main: Interpreter, four: Interpreter | None) -> tuple[list[Entry], dict[str, str]]:
    """List who takes part, and who does not and why."""
    entries = []
    for name, contender in CONTENDERS.items():
        title, key = contender.title, name
        if name == "transformers":
            key = f"transformers-{main.transformers_major}"
            title = f"transformers {main.versions['transformers']} from_pretrained"
        entries.append(Entry(key=key, contender=name, interpreter=main, title=title, modes=contender.modes))
    absent = {}
    if four is not None:
        version = four.versions["transformers"]
        entries += [
            Entry(
                key="transformers-4",
                contender="transformers",
                interpreter=four,
                title=f"transformers {version} from_pretrained",
            ),
            Entry(key="lading-4", contender="lading", interpreter=four, title=f"lading.load, transformers {version}"),
        ]
    elif main.transformers_major != 4:
        absent["transformers-4"] = "no interpreter with transformers 4 was given (--python4)"
    if main.transformers_major < 5:
        absent["transformers-5"] = f"this interpreter has transformers {main.versions['transformers']}"
    return entries, absent


class Bench:
    """Measure cases with a runner. One thread."""

    def __init__(self, runner: Runner, entries: Sequence[Entry], *, runs: int) -> None:
        self._runner = runner
        self._entries = entries
        self._runs = runs

    def measure_case(self, case: Case, checkpoint: Checkpoint, modes: Sequence[str]) -> dict[str, Any]:
        """Prove equal outputs, then measure; gives a record for the last line.

        Raises:
            SystemExit: a contender's logits differ from ours, or ours failed.
        """
        trial = self._try_all(case, checkpoint)
        record: dict[str, Any] = {
            "title": case.title,
            "num_bytes": checkpoint.num_bytes,
            "num_tensors": checkpoint.num_tensors,
            "num_shards": len(checkpoint.shards),
            "is_converted": case.is_converted,
            "outputs_equal": True,
            "outputs_equal_across_versions": len(set(trial.outputs.values())) == 1,
            "skipped": trial.skipped,
            "modes": {},
        }
        for mode in modes:
            entries = [entry for entry in self._taking_part(trial) if mode in entry.modes]
            try:
                if mode == "cold":
                    measure.evict(checkpoint.files)
                record["modes"][mode] = self._measure_mode(case, checkpoint, mode, entries, trial)
            except measure.EvictionError as error:
                record["skipped"][mode] = str(error)
        record["two_processes"] = {
            entry.key: self._measure_pair(case, checkpoint, entry, trial)
            for entry in self._taking_part(trial)
            if entry.is_model and not entry.is_floor and "warm" in entry.modes
        }
        return record

    def _taking_part(self, trial: Trial) -> list[Entry]:
        return [entry for entry in self._entries if entry.key not in trial.skipped]

    def _job(self, case: Case, checkpoint: Checkpoint, entry: Entry, trial: Trial, **conditions: Any) -> Job:
        return Job(
            contender=entry.contender,
            folder=str(checkpoint.folder),
            model_class=case.recipe.model_class,
            dtype=case.dtype,
            inputs=case.inputs,
            threads=0,  # the runner knows
            imports=trial.imports.get(entry.key, []),
            **conditions,
        )

    def _try_all(self, case: Case, checkpoint: Checkpoint) -> Trial:
        trial = Trial()
        jobs = {entry: self._job(case, checkpoint, entry, trial) for entry in self._entries}
        for entry, running in self._started(jobs):
            try:
                running.wait_ready()
                told = running.measure()
            except Skip as reason:
                trial.skipped[entry.key] = str(reason)
                continue
            except ContenderError as error:
                if entry.contender.startswith("lading") or entry.is_floor:
                    raise SystemExit(f"{case.name}: {error}") from error
                trial.skipped[entry.key] = str(error).strip().splitlines()[-1]
                continue
            trial.imports[entry.key] = told["late_imports"]
            if entry.is_model:
                trial.outputs[entry.key] = told["output_sha256"]
        self._require_equal(case, trial)
        return trial

    def _require_equal(self, case: Case, trial: Trial) -> None:
        ours = {
            entry.interpreter.path: trial.outputs[entry.key]
            for entry in self._entries
            if entry.contender == "lading" and entry.key in trial.outputs
        }
        titles = {entry.key: entry for entry in self._entries}
        differ = [
            titles[key].title for key, digest in trial.outputs.items() if digest != ours[titles[key].interpreter.path]
        ]
        if differ:
            raise SystemExit(f"{case.name}: logits differ from lading.load's: {', '.join(differ)}. Nothing measured.")

    def _started(self, jobs: dict[Entry, Job]) -> Iterator[tuple[Entry, Running]]:
        """Give each job's process in turn; fresh ones import side by side first, none while another measures."""
        if self._runner.forked:
            for entry, job in jobs.items():
                with holding([self._runner.start(entry.interpreter, job)]) as (running,):
                    yield entry, running
            return
        waiting = {entry: self._runner.start(entry.interpreter, job) for entry, job in jobs.items()}
        for running in waiting.values():
            running.wait_imported()
        for entry, running in waiting.items():
            with holding([running]):
                yield entry, running

    def _measure_mode(
        self, case: Case, checkpoint: Checkpoint, mode: str, entries: Sequence[Entry], trial: Trial
    ) -> dict[str, Any]:
        told: dict[str, list[dict[str, Any]]] = {entry.key: [] for entry in entries}
        for turn in range(self._runs):
            order = [*entries[turn % len(entries) :], *entries[: turn % len(entries)]]
            if turn % 2:
                order.reverse()
            jobs = {entry: self._job(case, checkpoint, entry, trial, is_cold=mode == "cold") for entry in order}
            for entry, running in self._started(jobs):
                running.wait_ready()
                told[entry.key].append(running.measure())
        for key, rounds in told.items():
            if any(one.get("output_sha256") != trial.outputs.get(key) for one in rounds):
                raise SystemExit(f"{case.name}, {mode}: {key} gave other logits than in its first run")
        return {key: summarise(rounds, checkpoint) for key, rounds in told.items()}

    def _measure_pair(self, case: Case, checkpoint: Checkpoint, entry: Entry, trial: Trial) -> dict[str, int]:
        """Load and run in two processes that live together; gives what both together added."""
        jobs = [self._job(case, checkpoint, entry, trial, hold=True) for _ in range(2)]
        with holding([self._runner.start(entry.interpreter, job, seat) for seat, job in enumerate(jobs)]) as pair:
            for running in pair:
                running.wait_ready()
            before = [memory_now(running.pid) for running in pair]
            for running in pair:
                running.measure()
            after = [memory_now(running.pid) for running in pair]
        pss, rss = (sum(column) for column in zip(*after, strict=True))
        pss_before, rss_before = (sum(column) for column in zip(*before, strict=True))
        return {"pss_added_bytes": pss - pss_before, "rss_added_bytes": rss - rss_before}


def memory_now(pid: int) -> tuple[int, int]:
    return measure.proportional_bytes_of(pid), measure.memory_of(pid).total_bytes


def summarise(rounds: Sequence[dict[str, Any]], checkpoint: Checkpoint) -> dict[str, Any]:
    """Give least, median and greatest of each quantity, and the rate of a reader."""
    summary: dict[str, Any] = {"runs": len(rounds)}
    for name in _COUNTED:
        values = [one[name] for one in rounds if name in one]
        if values:
            summary[name] = {"min": min(values), "median": statistics.median(values), "max": max(values)}
    if "first_forward_s" not in summary:
        summary["bytes_per_s"] = round(checkpoint.num_bytes / summary["load_s"]["median"])
    return summary


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    names = [case.name for case in cases(tiny=True)]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="miniature models, one round, forked: proves that it runs")
    parser.add_argument("--cases", default=",".join(names), help=f"comma-separated, of {', '.join(names)}")
    parser.add_argument("--modes", default=",".join(MODES), help="comma-separated, of warm, cold")
    parser.add_argument("--runs", type=int, help="rounds per case and mode (default 5; tiny 1)")
    parser.add_argument("--threads", type=int, default=2, help="torch threads, and cores to use (default 2)")
    parser.add_argument("--python4", metavar="PATH", help="an interpreter with transformers 4")
    parser.add_argument("--cache", type=Path, metavar="DIR", help="where checkpoints are made and kept")
    parser.add_argument("--clean", action="store_true", help="delete the kept checkpoints, and do nothing else")
    parser.add_argument("--report", type=Path, metavar="FILE", help="write the tables as markdown")
    options = parser.parse_args(arguments)
    for given, known in ((options.cases, names), (options.modes, MODES)):
        unknown = [name for name in given.split(",") if name not in known]
        if unknown:
            parser.error(f"unknown: {', '.join(unknown)}; known: {', '.join(known)}")
    options.runs = options.runs or (1 if options.tiny else 5)
    return options


def command_of(options: argparse.Namespace) -> str:
    """Write the command anew, without the paths of this machine."""
    words = ["python benchmarks/bench_load.py", f"--runs {options.runs}", f"--threads {options.threads}"]
    words += [f"--cases {options.cases}", f"--modes {options.modes}"] + ["--tiny"] * options.tiny
    words += ["--python4 path/to/python/with/transformers4"] if options.python4 else []
    return " ".join(words)


@contextmanager
def cache_of(options: argparse.Namespace) -> Iterator[Path]:
    """Give the folder for checkpoints; a tiny run without --cache leaves none."""
    if options.cache is not None or not options.tiny:
        yield options.cache or Path(tempfile.gettempdir(), "lading-benchmarks")
        return
    with tempfile.TemporaryDirectory(prefix="lading-benchmarks-") as folder:
        yield Path(folder)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)
    with cache_of(options) as cache:
        if options.clean:
            print("deleted:", ", ".join(clean(cache)) or "nothing")
            return
        chosen = [case for case in cases(tiny=options.tiny) if case.name in options.cases.split(",")]
        checkpoints = prepare(chosen, cache)
        interpreter = Interpreter.at(sys.executable)
        four = Interpreter.at(options.python4) if options.python4 else None
        if four is not None and four.transformers_major != 4:
            raise SystemExit(f"--python4: found transformers {four.versions['transformers']}, expected 4")
        entries, absent = list_entries(interpreter, four)
        record: dict[str, Any] = {
            "benchmark": "bench_load",
            "command": command_of(options),
            "is_tiny": options.tiny,
            "cores": os.cpu_count(),
            "threads": options.threads,
            "load_average": round(os.getloadavg()[0], 2),
            "machine": tables.describe_machine(),
            "versions": {
                "lading": lading.__version__,
                **interpreter.versions,
                **({"transformers (--python4)": four.versions["transformers"]} if four else {}),
            },
            "titles": {entry.key: entry.title for entry in entries},
            "skipped": absent,
            "cases": {},
        }
        report = tables.Report(record, options.report)
        report.say(tables.render_head(record))
        with Runner(Path(lading.__file__).resolve().parent, options.threads, forked=options.tiny) as runner:
            bench = Bench(runner, entries, runs=options.runs)
            for case in chosen:
                told = bench.measure_case(case, checkpoints[case.name], options.modes.split(","))
                record["cases"][case.name] = told
                report.say(tables.render_case(told, record["titles"]))
        record["aims"] = judge(record["cases"])
        report.say(tables.render_aims(record["aims"]))
        report.save()
    print(json.dumps(record))


if __name__ == "__main__":
    main()
