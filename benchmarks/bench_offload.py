"""Time a model that does not fit: its weights in files, its forward on the CPU.

How long does a forward take, how much memory and how many bytes of reading, when a quarter of the model may be held?

A bf16 Llama of 24 layers with random weights, made here and removed afterwards; forwards of 1×16 and of 8×128 tokens,
with the files in the page cache (warm) and evicted from it before each forward (cold, proved by mincore; what a
contender maps is unmapped before, but for the part that ours keeps within its budget). Contenders take turns, each
turn in a fresh process. First all must give the same logits, bit for bit.

Ours: ``lading.load`` with a plan for a quarter of the model's bytes.
Peers, what a user would call instead: plain mmap (``lading.load``), accelerate's ``cpu_offload`` and ``disk_offload``,
transformers' ``device_map`` with ``"disk"`` (the same plan as ours), diffusers' group offload to disk.
Ceiling, measured in the same run: the best reader over the evicted file, copying and mapping out of the page cache, and
the forward with everything in memory. A cold forward can be no faster than the greater of reading and computing.

Then, on a small model: four threads in one model (wrong, raised), what ``state_dict`` shows, whether an edit survives;
and the cost of a hook per block. Memory is sampled from outside every millisecond, above what it was before loading.

    taskset -c 0,1,2 python benchmarks/bench_offload.py --threads 2 --report benchmarks/results/bench_offload.md
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import measure
import offload_tables
from checkpoints import Case, Recipe, prepare
from offload_contenders import CONTENDERS, budget_of
from offload_floors import hook_cost, reader_rates, warm_rates
from offload_run import Job, in_fork, perform
from tables import Report, describe_machine

SHAPES = {"1x16": [1, 16], "8x128": [8, 128]}
SCRIPT = Path(__file__).with_name("offload_run.py")


def recipe(*, tiny: bool) -> Case:
    """Describe the model: 1.9 GB, or of the same shape and small."""
    big = {"hidden_size": 2048, "intermediate_size": 4608, "num_attention_heads": 16, "num_key_value_heads": 4}
    small = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 4}
    sizes = {**small, "vocab_size": 256, "num_hidden_layers": 12} if tiny else {**big, "vocab_size": 8192}
    config = {"num_hidden_layers": 24, "tie_word_embeddings": False, **sizes}
    name = "small" if tiny else "llama"
    return Case(name=name, title="Llama, bf16", recipe=Recipe(model_class="LlamaForCausalLM", config=config))


class Bench:
    """Run contenders on one checkpoint. One thread."""

    def __init__(self, folder: Path, scratch: Path, options: argparse.Namespace) -> None:
        self._folder = folder
        self._scratch = scratch
        self._options = options

    def _job(self, task: str, contender: str) -> dict[str, Any]:
        scratch = self._scratch / f"{self._folder.name}-{contender}"
        scratch.mkdir(exist_ok=True)
        few = self._options.forwards
        job = Job(
            task=task,
            contender=contender,
            folder=str(self._folder),
            scratch=str(scratch),
            threads=self._options.threads,
            shapes=SHAPES,
            runs={"1x16": 2 * few, "8x128": few},
        )
        if self._options.tiny:
            return in_fork(lambda: perform(job), f"{job.contender}, {job.task}")
        return self._run(job)

    def _run(self, job: Job) -> dict[str, Any]:
        words = [sys.executable, str(SCRIPT), json.dumps(asdict(job))]
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "HF_HUB_OFFLINE": "1"}
        with subprocess.Popen(
            words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as process:
            with measure.PeakSampler(process.pid) as sampler:
                said, complained = process.communicate()
            if process.returncode:
                raise SystemExit(f"{job.contender}, {job.task}: {complained[-3000:]}")
        told: dict[str, Any] = json.loads(said.splitlines()[-1])
        for modes in told.get("forwards", {}).values():
            for forward in (each for forwards in modes.values() for each in forwards):
                anonymous, file = sampler.peaks(forward["begin_s"], forward["end_s"])
                forward["anonymous_bytes"] = anonymous - told["before_anonymous_bytes"]
                forward["file_bytes"] = file - told["before_file_bytes"]
        return told

    def time(self, rounds: int) -> dict[str, Any]:
        """Time every contender in turns.

        Raises:
            SystemExit: logits differ.
        """
        names = [name for name, contender in CONTENDERS.items() if contender.is_there]
        told: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
        for turn in range(rounds):
            for name in names if turn % 2 == 0 else reversed(names):
                told[name].append(self._job("time", name))
                self._require_equal(told, name)
        return {name: summarise(each) for name, each in told.items()}

    def _require_equal(self, told: dict[str, list[dict[str, Any]]], name: str) -> None:
        if told[name][-1]["digests"] != told["memory"][0]["digests"]:
            raise SystemExit(f"{CONTENDERS[name].title}: logits differ from the model's in memory")

    def manners(self) -> dict[str, Any]:
        """Compare what contenders do with state, edits and threads."""
        told = {name: self._job("manners", name) for name, each in CONTENDERS.items() if each.is_there}
        expected = told["memory"]
        found = {}
        for name, each in told.items():
            states = each["state"]
            found[name] = {
                "wrong": each["wrong"],
                "raised": each["raised"],
                "raised_as": each["raised_as"],
                "calls": each["calls"],
                "state_total": len(expected["state"]),
                "state_meta": sum(digest is None for digest in states.values()),
                "state_right": sum(states.get(key) == digest for key, digest in expected["state"].items()),
                "is_edit_kept": each["edited_digest"] == expected["edited_digest"],
            }
        return found


def summarise(rounds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Give least, median and greatest over all forwards of all rounds, and the greatest of memory."""
    summary: dict[str, Any] = {
        "start_s": spread([each["start_s"] for each in rounds]),
        "scratch_bytes": max(each["scratch_bytes"] for each in rounds),
        "stats": rounds[-1]["stats"],
    }
    for shape in SHAPES:
        for mode in ("warm", "cold"):
            forwards = [each for told in rounds for each in told["forwards"][shape][mode]]
            if forwards:
                summary[f"{shape} {mode}"] = {
                    "s": spread([each["s"] for each in forwards]),
                    "read_bytes": statistics.median(each["read_bytes"] for each in forwards),
                    "anonymous_bytes": max(each.get("anonymous_bytes", 0) for each in forwards),
                    "file_bytes": max(each.get("file_bytes", 0) for each in forwards),
                }
    return summary


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a small model, one round: proves that it runs")
    parser.add_argument("--rounds", type=int, help="processes per contender (default 3; tiny 1)")
    parser.add_argument("--forwards", type=int, help="of 8x128 tokens per process, twice as many of 1x16 (default 2)")
    parser.add_argument("--threads", type=int, help="torch threads (default 2; tiny 1); bound cores with taskset")
    parser.add_argument("--cache", type=Path, metavar="DIR", help="where checkpoints are made; removed at the end")
    parser.add_argument("--report", type=Path, metavar="FILE", help="write the tables as markdown")
    options = parser.parse_args()
    options.threads = options.threads or (1 if options.tiny else 2)
    options.forwards = options.forwards or (1 if options.tiny else 2)
    options.rounds = options.rounds or (1 if options.tiny else 3)
    return options


def versions() -> dict[str, str]:
    found = {"python": sys.version.split()[0]}
    for name in ("torch", "transformers", "accelerate", "diffusers", "safetensors"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "absent"
    return found


def main() -> None:
    options = parse_arguments()
    load_average = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="lading-offload-", dir=options.cache) as made:
        cache = Path(made)
        small = prepare([recipe(tiny=True)], cache)["small"]
        case = recipe(tiny=options.tiny)
        checkpoint = prepare([case], cache)[case.name]
        (shard,) = checkpoint.shards
        path = checkpoint.folder / shard
        total, budget = budget_of(checkpoint.folder)
        record: dict[str, Any] = {
            "benchmark": "bench_offload",
            "command": f"python benchmarks/bench_offload.py --rounds {options.rounds} --forwards {options.forwards} "
            f"--threads {options.threads}" + " --tiny" * options.tiny,
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
        }
        report = Report(record, options.report)
        report.say(offload_tables.render_head(record))
        rounds = 1 if options.tiny else 3
        rates = reader_rates(path, rounds)
        record["contenders"] = Bench(checkpoint.folder, cache, options).time(options.rounds)
        for name, again in reader_rates(path, rounds).items():  # the disk drifts: before and after
            rates[name] += again
        record["readers"] = {name: spread(each) for name, each in rates.items()}
        record["warm_readers"] = {name: spread(each) for name, each in warm_rates(path, rounds).items()}
        report.say(offload_tables.render_floors(record))
        for cell in (f"{shape} {mode}" for shape in SHAPES for mode in ("warm", "cold")):
            report.say(offload_tables.render_forwards(record, cell))
        record["manners"] = Bench(small.folder, cache, options).manners()
        report.say(offload_tables.render_manners(record))
        record["hooks"] = hook_cost(*((20, 3) if options.tiny else (200, 30)))
        report.say(offload_tables.render_hooks(record))
        record["aims"] = offload_tables.judge(record)
        report.say(offload_tables.render_aims(record))
        report.save()
    print(json.dumps(record))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
