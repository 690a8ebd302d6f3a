"""Load one checkpoint in one way, in this process, and report what it took.

As a script it answers on standard output, line by line in JSON:

    reads   a job                      answers  {"pid": …} when everything is imported and nothing loaded,
                                                or {"skip": reason} where this way does not exist here
    reads   any line                   does it, answers the measurement, or {"error": …}
    reads   any line, if ``hold``      answers {} and ends, and the loaded model with it

With ``forked`` it does each job in a fork of itself and waits for the next: processes nearly as fresh, at no cost of
imports, but with page faults of their own. Good for trying that everything runs, not for measuring.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import measure
from contenders import CONTENDERS, Job, Skip, transformers_major


def require_possible(job: Job) -> None:
    """Import what a job needs.

    Raises:
        Skip: it cannot be done with these packages.
    """
    import torch  # noqa: F401
    import transformers  # noqa: F401

    try:
        for name in CONTENDERS[job.contender].imports:
            import_module(name)
    except ImportError as error:
        raise Skip(f"not installed: {error.name}") from error
    if job.contender == "accelerate" and "Mixtral" in job.model_class and transformers_major() >= 5:
        raise Skip("accelerate does not fuse a file's experts, which transformers 5's Mixtral needs")
    _ = job.cls
    for name in job.imports:
        with suppress(Exception):  # a name that only exists in the middle of something else
            import_module(name)


def perform(job: Job) -> dict[str, Any]:
    """Load, run twice, and tell what it took. Times are `time.monotonic`'s, in seconds; memory is counted in bytes."""
    import torch

    contender = CONTENDERS[job.contender]
    torch.set_num_threads(job.threads)
    inputs = {name: torch.tensor([ids]) for name, ids in job.inputs.items()}
    files = sorted(path for path in Path(job.folder).iterdir() if path.is_file())
    (measure.evict if job.is_cold else measure.warm_up)(files)
    known = set(sys.modules)
    gc.collect()
    measure.reset_peak()
    before, read_before, faults_before = measure.memory_of(), measure.read_bytes(), measure.major_faults()
    begin_s = time.monotonic()
    model = contender.load(job)
    loaded_s = time.monotonic()
    loaded = measure.memory_of()
    told: dict[str, Any] = {
        "begin_s": begin_s,
        "loaded_s": loaded_s,
        "load_s": loaded_s - begin_s,
        "before_anonymous_bytes": before.anonymous_bytes,
        "before_file_bytes": before.file_bytes,
        "peak_bytes": loaded.peak_bytes - before.total_bytes,
        "read_bytes": measure.read_bytes() - read_before,
        "major_faults": measure.major_faults() - faults_before,
    }
    ends = [loaded]
    if contender.is_model:
        first, told["first_forward_s"] = run(model, inputs)
        ends.append(measure.memory_of())
        told["read_bytes_first"] = measure.read_bytes() - read_before
        told["major_faults_first"] = measure.major_faults() - faults_before
        second, told["second_forward_s"] = run(model, inputs)
        told["load_and_first_s"] = told["load_s"] + told["first_forward_s"]
        told["output_sha256"] = digest_of(first)
        if digest_of(second) != told["output_sha256"]:
            raise RuntimeError("two forwards of one model differ")
    told["end_s"] = time.monotonic()
    told["loaded_anonymous_bytes"] = loaded.anonymous_bytes - before.anonymous_bytes
    told["loaded_file_bytes"] = loaded.file_bytes - before.file_bytes
    told["run_anonymous_bytes"] = ends[-1].anonymous_bytes - before.anonymous_bytes
    told["run_file_bytes"] = ends[-1].file_bytes - before.file_bytes
    told["late_imports"] = [name for name in sys.modules if name not in known]
    told["model"] = model if job.hold else None
    return told


def run(model: Any, inputs: dict[str, Any]) -> tuple[Any, float]:
    """Run a forward; gives its logits and its seconds."""
    import torch

    with torch.no_grad():
        begin_s = time.monotonic()
        logits = model(**inputs, use_cache=False).logits
        return logits, time.monotonic() - begin_s


def digest_of(logits: Any) -> str:
    import torch

    return hashlib.sha256(logits.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def pin(cores: list[int]) -> None:
    """Keep every thread of this process, and those it will start, on some cores."""
    for thread in Path("/proc/self/task").iterdir():
        os.sched_setaffinity(int(thread.name), cores)


def answer(job: Job, lines: Iterator[str], tell: Callable[[dict[str, Any]], None]) -> None:
    """Do one job and answer as the head of this file says."""
    try:
        require_possible(job)
        tell({"pid": os.getpid()})
        next(lines)
        pin(sorted(os.sched_getaffinity(0))[: job.threads])
        told = perform(job)
    except Skip as reason:
        tell({"skip": str(reason)})
        return
    except Exception as error:  # noqa: BLE001 - told to whoever asked
        tell({"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()})
        return
    model = told.pop("model")
    tell(told)
    if job.hold:
        next(lines)
        tell({})  # nothing more is read here: what comes next on the line is another's
    del model


def main() -> None:
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever a library prints is not an answer

    def tell(message: dict[str, Any]) -> None:
        channel.write(f"{json.dumps(message)}\n")
        channel.flush()

    lines = iter(sys.stdin)
    for line in lines:
        job = Job(**json.loads(line))
        if not job.forked:
            answer(job, lines, tell)
            return
        with suppress(Skip):
            require_possible(job)  # here, so that the next fork has these imports too
        gc.freeze()  # or each fork's collector would copy the pages of all that was imported
        child = os.fork()
        if child == 0:
            answer(job, lines, tell)
            os._exit(0)
        if os.waitpid(child, 0)[1]:
            return  # it was killed and told nothing: the end of this process says so


if __name__ == "__main__":
    main()
