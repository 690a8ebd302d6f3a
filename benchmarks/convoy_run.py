"""Run many batches through one or more contenders in this process, in turns; tell in one line of JSON what it took.

As a script: ``convoy_run.py JOB``, with the job as JSON; the last line of standard output is the answer. What is no
part of the work (evicting files, digesting outputs) is not counted. Cold: the files leave the page cache before each
batch, each crossing and each step of generation; a convoy is inside its only crossing while it generates, so there
what evicting costs is counted against it.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import transformers

import lading
import measure
from convoy_contenders import OURS, cross, loaded
from lading.residency import members
from offload_run import IMPORTED, cool, digest_of, inputs_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """Say what is run, and by whom. Immutable."""

    name: str
    rows: int
    """Of a batch."""
    tokens: int
    """Of a row."""
    batches: int
    vocabulary: int
    """Of which tokens are drawn."""
    ways: list[str]
    """Contender and ``warm`` or ``cold``; they take turns."""
    repeats: int = 1
    new_tokens: int = 0
    """Generated for each row; 0: a forward."""

    @property
    def passes(self) -> int:
        """Count the forwards of one batch."""
        return self.new_tokens or 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """Say what to do. Immutable."""

    task: str
    """``time`` or ``cross``: cross a model many times and look for growth."""
    contenders: list[str]
    folder: str
    scratch: str
    threads: int
    cells: list[dict[str, Any]]
    limits_arenas: bool = True
    """Whether a convoy may limit malloc's arenas."""
    crossings: int = 0


class Meter:
    """Count seconds, processor seconds and bytes read from disk, but for pauses. One thread."""

    def __init__(self) -> None:
        self._paused = [0.0, 0.0, 0.0]
        self._began = self._now()

    def _now(self) -> list[float]:
        return [time.perf_counter(), time.process_time(), measure.read_bytes()]

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out what is done inside."""
        before = self._now()
        yield
        self._paused = [sum(each) for each in zip(self._paused, _less(self._now(), before), strict=True)]

    def read(self) -> dict[str, float]:
        """Tell what was counted so far."""
        counted = _less(_less(self._now(), self._began), self._paused)
        return dict(zip(("s", "cpu_s", "read_bytes"), counted, strict=True))


def _less(minuend: list[float], subtrahend: list[float]) -> list[float]:
    return [one - other for one, other in zip(minuend, subtrahend, strict=True)]


class Run:
    """Run one cell in one way, once."""

    def __init__(self, way: str, model: Any, cell: Cell, files: list[Path]) -> None:
        self._name, self._mode = way.split()
        self._model = model
        self._cell = cell
        self._files = files
        self._meter = Meter()
        self._outputs: Iterator[Any] = iter(())
        self._num_forwards = 0

    def perform(self) -> dict[str, Any]:
        """Do it; gives what it took and digests of the outputs."""
        cell, is_generated = self._cell, self._cell.new_tokens > 0
        call = self._model.generate if is_generated else self._model
        chilled = self._model.register_forward_pre_hook(self._cool_for_step, prepend=True)
        if self._mode == "warm":
            measure.warm_up(self._files)
        before = _fetched_bytes(self._model)
        begin_s = time.monotonic()
        self._meter = Meter()
        self._outputs = cross(self._name, call, self._batches(), cell.rows * cell.tokens, **constants_of(cell))
        digests = []
        for output in self._outputs:
            with self._meter.paused():
                digests.append(digest_of(output if is_generated else output.logits)[:12])
            del output  # else it would be there beside the next one
        told: dict[str, Any] = {**self._meter.read(), "begin_s": begin_s, "end_s": time.monotonic()}
        chilled.remove()
        told["tokens"] = cell.batches * cell.rows * (cell.new_tokens or cell.tokens)
        return {**told, **self._fetched(before), "digests": digests}

    def _batches(self) -> Iterator[dict[str, torch.Tensor]]:
        seen = None
        for number, batch in enumerate(batches_of(self._cell)):
            crossing = self._outputs.stats().crossings if isinstance(self._outputs, lading.Convoy) else number
            if self._mode == "cold" and not self._cell.new_tokens and crossing != seen:
                with self._meter.paused():
                    self._cool()
            seen = crossing
            yield batch

    def _cool(self) -> None:
        cool(self._files, is_ours=self._name in OURS)

    def _cool_for_step(self, *_: object) -> None:
        """Evict before a step of generation; in a convoy, before the first of all that make it."""
        if self._mode == "warm" or not self._cell.new_tokens:
            return
        if not isinstance(self._outputs, lading.Convoy):
            with self._meter.paused():
                self._cool()
        elif self._num_forwards % self._cell.batches == 0:
            for path in self._files:
                with path.open("rb") as file:
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        self._num_forwards += 1

    def _fetched(self, before: int) -> dict[str, Any]:
        """Tell the bytes fetched, those that stream in as many crossings, and how it crossed."""
        if self._name not in OURS:
            return {}
        plan = lading.Residency.of(self._model).plan
        streamed = sum(each.num_bytes for each in plan.placements if each.is_streamed and not each.is_lookup)
        told: dict[str, Any] = {"convoy": None, "fetched_bytes": _fetched_bytes(self._model) - before}
        crossings = self._cell.batches
        if isinstance(self._outputs, lading.Convoy):
            stats = self._outputs.stats()
            crossings = stats.crossings
            told["convoy"] = asdict(stats)
        told["streamed_bytes"] = streamed * crossings * self._cell.passes
        return told


def _fetched_bytes(model: Any) -> int:
    residency = lading.Residency.of(model)
    return 0 if residency is None else residency.stats().fetched_bytes


def constants_of(cell: Cell) -> dict[str, Any]:
    """Give the arguments that all batches share."""
    if not cell.new_tokens:
        return {"use_cache": False}
    return {"max_new_tokens": cell.new_tokens, "min_new_tokens": cell.new_tokens, "do_sample": False}


def batches_of(cell: Cell) -> Iterator[dict[str, torch.Tensor]]:
    """Make the batches: those with the same number are the same for everybody."""
    for number in range(cell.batches):
        ids = inputs_of(cell.rows, cell.tokens, number, cell.vocabulary)
        yield {"input_ids": ids, "attention_mask": torch.ones_like(ids)} if cell.new_tokens else {"input_ids": ids}


def warm_up(model: Any, cell: Cell) -> None:
    """Run one batch, for what is done once: allocations, kernels, the order of blocks."""
    call = model.generate if cell.new_tokens else model
    for batch in islice(batches_of(cell), 1):
        call(**batch, **constants_of(cell))


def time_cells(job: Job) -> dict[str, Any]:
    """Load the contenders, warm up, and run all cells, the ways in turns."""
    for module in IMPORTED:
        import_module(module)
    if not job.limits_arenas:
        members.limit_arenas = lambda: None  # type: ignore[assignment]
    folder, scratch = Path(job.folder), Path(job.scratch)
    gc.collect()
    before = measure.memory_of()
    models = loaded(job.contenders, folder, scratch)
    files = [path for root in (folder, scratch) for path in root.rglob("*") if path.is_file() and path.stat().st_size]
    cells = [Cell(**fields) for fields in job.cells]
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    with torch.no_grad():
        for model in {id(each): each for each in models.values()}.values():
            for cell in cells:
                warm_up(model, cell)
        for cell in cells:
            told = found[cell.name] = {way: [] for way in cell.ways}
            for turn in range(cell.repeats):
                for way in cell.ways if turn % 2 == 0 else reversed(cell.ways):
                    told[way].append(Run(way, models[way.split()[0]], cell, files).perform())
    return {
        "before_anonymous_bytes": before.anonymous_bytes,
        "before_file_bytes": before.file_bytes,
        "cells": found,
    }


def cross_often(job: Job) -> dict[str, Any]:
    """Cross a model many times, four micro-batches each; tell what grew after the first tenth."""
    (fields,) = job.cells
    cell = Cell(**{**fields, "batches": 4 * job.crossings})
    model = loaded(job.contenders, Path(job.folder), Path(job.scratch))["convoy"]
    descriptors = Path("/proc/self/fd")
    with torch.no_grad(), lading.convoy(model, batches_of(cell), width=4, use_cache=False) as outputs:
        for _ in islice(outputs, cell.batches // 10):
            pass
        early, num_early = measure.memory_of(), sum(1 for _ in descriptors.iterdir())
        for _ in outputs:
            pass
        late, num_late = measure.memory_of(), sum(1 for _ in descriptors.iterdir())
        crossings = outputs.stats().crossings
    threads = [each.name for each in threading.enumerate() if each.name == "lading-convoy"]
    return {
        "crossings": crossings,
        "grown_anonymous_bytes": late.anonymous_bytes - early.anonymous_bytes,
        "grown_file_bytes": late.file_bytes - early.file_bytes,
        "grown_descriptors": num_late - num_early,
        "threads_left": len(threads),
    }


def perform(job: Job) -> dict[str, Any]:
    """Do what a job says."""
    torch.set_num_threads(job.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return {"time": time_cells, "cross": cross_often}[job.task](job)


def main() -> None:
    print(json.dumps(perform(Job(**json.loads(sys.argv[1])))), flush=True)
    os._exit(0)  # what a library tidies up at exit is no part of this


if __name__ == "__main__":
    main()
