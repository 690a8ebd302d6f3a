"""Run one contender of `bench_capture` in this process, and tell in one line of JSON what came of it.

As a script: ``capture_run.py JOB``, with the job as JSON; the last line of standard output is the answer.
"""

from __future__ import annotations

import copy
import gc
import json
import os
import pickle
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn

import capture_threads
import measure
from capture_contenders import CONTENDERS, Contender, Stack, build_llama, by_hooks, by_lading, layers_of, run

POOLED_TOLERANCE = 1e-4


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """Say what to do. Immutable."""

    task: str
    """``modules``, ``model``, ``memory``, ``stop`` or ``threads``."""
    contender: str
    threads: int
    sizes: dict[str, Any]
    """Of a Llama; of a stack ``num_layers``."""
    shape: tuple[int, int]
    """Rows and tokens."""
    runs: int
    dtype: str = "float32"
    scenario: str = ""
    """Of threads."""


class Clock:
    """Run a model and keep how long it took: what is inside an open capture, and no more. One thread."""

    def __init__(self) -> None:
        self.ns = 0

    def __call__(self, model: Any, inputs: Mapping[str, Any]) -> Any:  # noqa: D102
        began = time.perf_counter_ns()
        output = model(**inputs)
        self.ns = time.perf_counter_ns() - began
        return output


def inputs_of(job: Job, seed: int = 1) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, job.sizes["vocab_size"], job.shape, generator=generator)
    return {"input_ids": ids, "use_cache": False}


def timed(act: Callable[[], Any]) -> int:
    began = time.perf_counter_ns()
    act()
    return time.perf_counter_ns() - began


@contextmanager
def quiet_collector() -> Iterator[None]:
    """Let the garbage collector pass over all that is there already: it is no part of any contender."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def require_equal(job: Job, found: Iterable[torch.Tensor], expected: Iterable[torch.Tensor]) -> None:
    """Compare tensors bit for bit, but for the last where a contender gives the model's output there.

    Raises:
        SystemExit: they differ.
    """
    found, expected = list(found), list(expected)
    last = len(expected) - CONTENDERS[job.contender].is_tied
    if len(found) != len(expected) or not all(map(torch.equal, found[:last], expected[:last])):
        raise SystemExit(f"{job.contender}: {len(found)} tensors that are not those of plain hooks, {len(expected)}")


def time_modules(job: Job) -> dict[str, Any]:
    """Time modules that do nothing: without hooks, idle, idle after use, and while all are captured."""
    contender, inputs = CONTENDERS[job.contender], {"x": torch.zeros(1, 4, 8)}
    num_layers = job.sizes["num_layers"]
    if contender.is_right:
        proved = contender.wrap(contender.stack(num_layers))
        require_equal(job, contender.capture(proved, inputs), [inputs["x"]] * num_layers)
    plain, idle, used = Stack(num_layers), *(contender.wrap(contender.stack(num_layers)) for _ in range(2))
    contender.capture(used, inputs)
    clock = Clock()
    told: dict[str, list[float]] = {name: [] for name in ("never", "idle", "after", "inside", "whole")}
    with quiet_collector():
        for _ in range(job.runs):
            for name, model in (("never", plain), ("idle", idle), ("after", used)):
                told[name].append(timed(lambda: run(model, inputs)) / num_layers)  # noqa: B023 - called at once
            clock.ns = 0
            told["whole"].append(timed(lambda: contender.capture(used, inputs, clock)) / num_layers)
            told["inside"].append((clock.ns or told["whole"][-1] * num_layers) / num_layers)
    return {name: statistics.median(each) for name, each in told.items()}


def time_model(job: Job) -> dict[str, Any]:
    """Time a whole model: never captured, captured, idle after use."""
    contender, inputs = CONTENDERS[job.contender], inputs_of(job)
    model = build_llama(job.sizes, job.dtype)
    if contender.is_right and job.sizes["hidden_size"] < 1024:
        twin = copy.deepcopy(model)
        require_equal(job, contender.capture(contender.wrap(twin), inputs), by_hooks(copy.deepcopy(model), inputs))
    for _ in range(3):  # the first ones find their memory
        run(model, inputs)
    told: dict[str, list[int]] = {"never": [timed(lambda: run(model, inputs)) for _ in range(job.runs)]}
    expected = by_hooks(model, inputs) if job.sizes["hidden_size"] >= 1024 else ()
    model, clock = contender.wrap(model), Clock()
    found = contender.capture(model, inputs)
    if contender.is_right and expected:
        require_equal(job, found, expected)
    del found, expected
    told |= {"after": [], "inside": [], "whole": []}
    with quiet_collector():
        for _ in range(job.runs):
            told["after"].append(timed(lambda: run(model, inputs)))
            clock.ns = 0
            told["whole"].append(timed(lambda: contender.capture(model, inputs, clock)))
            told["inside"].append(clock.ns or told["whole"][-1])
    return {name: statistics.median(found) / 1e6 for name, found in told.items()}


def weigh(job: Job) -> dict[str, Any]:
    """Take the greatest memory of a forward above what was there: idle, all captured, pooled, half of the layers."""
    contender, inputs = CONTENDERS[job.contender], inputs_of(job)
    model = contender.wrap(build_llama(job.sizes))
    acts: dict[str, Callable[[], Any]] = {
        "idle": lambda: run(model, inputs),
        "all": lambda: contender.capture(model, inputs),
    }
    if contender.pooled is not None:
        pooled = contender.pooled
        acts["pooled"] = lambda: pooled(model, inputs)
        expected = [each.mean(1) for each in contender.capture(model, inputs)]
        for each, wanted in zip(pooled(model, inputs), expected, strict=True):
            if not torch.allclose(each, wanted, atol=POOLED_TOLERANCE):
                raise SystemExit(f"{job.contender}: pooled tensors are not the means of the whole ones")
    if job.contender == "lading":
        acts["half"] = lambda: stop_after(model, inputs, job.sizes["num_hidden_layers"] // 2)
    told: dict[str, list[int]] = {name: [] for name in acts}
    for act in acts.values():
        act()
    for _ in range(job.runs):
        for name, act in acts.items():
            gc.collect()
            measure.reset_peak()
            before = measure.memory_of().total_bytes
            act()
            told[name].append(measure.memory_of().peak_bytes - before)
    return {name: statistics.median(each) for name, each in told.items()}


def stop_after(model: Any, inputs: Mapping[str, Any], num_layers: int) -> None:
    """Run so many layers, keep the last one's output, and no more."""
    import lading

    site = f"layers.{num_layers - 1}"
    with lading.capture(model, site, stop_after=site) as seen:
        run(model, inputs)
    assert len(seen.calls(site)) == 1


def time_stops(job: Job) -> dict[str, Any]:
    """Time forwards that end after some of the layers, as shares of the whole one's time beside them."""
    inputs, model = inputs_of(job), build_llama(job.sizes)
    num_layers = job.sizes["num_hidden_layers"]
    depths = sorted({max(1, round(num_layers * share)) for share in (1 / 8, 1 / 4, 1 / 2, 3 / 4)})
    reached = by_lading(model, inputs)
    require_equal(job, reached, by_hooks(copy.deepcopy(model), inputs))
    told: dict[int, list[float]] = {depth: [] for depth in depths}
    for depth in depths:
        stop_after(model, inputs, depth)
    for _ in range(job.runs):
        for depth in depths:
            whole = timed(lambda: run(model, inputs))
            told[depth].append(timed(lambda: stop_after(model, inputs, depth)) / whole)  # noqa: B023 - called at once
    return {"num_layers": num_layers, "shares": {str(depth): statistics.median(each) for depth, each in told.items()}}


def compare_threads(job: Job) -> dict[str, Any]:
    """Count what threads get wrong, each with inputs of its own; then look at what stays on the model."""
    contender = CONTENDERS[job.contender]

    def build() -> Any:
        model = build_llama(job.sizes)
        if job.scenario == "worker":
            model.layers = nn.ModuleList(map(capture_threads.alternate, range(len(model.layers)), model.layers))
        return contender.wrap(model)

    all_inputs = [inputs_of(job, seed) for seed in range(capture_threads.NUM_THREADS)]
    reference = build_llama(job.sizes)
    expected = [by_hooks(reference, inputs) for inputs in all_inputs]
    model = build()
    if contender.is_tied:
        expected = [(*each[:-1], reference.norm(each[-1])) for each in expected]
    told: dict[str, Any] = capture_threads.call_from_threads(
        lambda number: contender.capture(model, all_inputs[number]),
        expected,
        job.runs,
        capture_threads.beside(job.scenario, model, all_inputs[0]),
    )
    if job.scenario == "alone":
        told |= left_on(model, contender)
    return told


def left_on(model: Any, contender: Contender) -> dict[str, Any]:
    """Tell what stays on a model after use: hooks and forwards of its layers, and whether it pickles."""
    inner = getattr(model, "_module", model)  # nnsight's
    inner = getattr(inner, "model", inner) if contender.interpreter == "peers" else inner
    layers = [module for layer in layers_of(inner) for module in layer.modules()]
    told: dict[str, Any] = {
        "hooks": sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in layers),
        "forwards": sum("forward" in vars(module) for module in layers),
        "pickles": False,
    }
    with suppress(Exception):
        pickle.dumps(inner)
        told["pickles"] = True
    return told


TASKS = {
    "modules": time_modules,
    "model": time_model,
    "memory": weigh,
    "stop": time_stops,
    "threads": compare_threads,
}


def perform(job: Job) -> dict[str, Any]:
    """Do what a job says."""
    torch.set_num_threads(job.threads)
    transformers.logging.set_verbosity_error()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return TASKS[job.task](job)


def main() -> None:
    job = json.loads(sys.argv[1])
    print(json.dumps(perform(Job(**{**job, "shape": tuple(job["shape"])}))), flush=True)
    os._exit(0)  # what a library tidies up at exit is no part of this


if __name__ == "__main__":
    main()
