"""Run one contender in this process, and tell in one line of JSON what it took.

As a script: ``offload_run.py JOB``, with the job as JSON; the last line of standard output is the answer. Times are
`time.monotonic`'s, so that who watches the memory of this process from outside knows what was when.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import transformers

import lading
import measure
from lading.checkpoint.pages import Pagemap, Span, drop
from offload_contenders import CONTENDERS

NUM_THREADS, NUM_TURNS = 4, 15


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """Say what to do. Immutable."""

    task: str
    """``time`` or ``manners``."""
    contender: str
    folder: str
    scratch: str
    threads: int
    shapes: dict[str, list[int]]
    """Name → batch and tokens."""
    runs: dict[str, int]
    """Name of a shape → warm forwards; there are as many cold ones."""


def inputs_of(batch: int, tokens: int, seed: int = 1, vocabulary: int = 256) -> torch.Tensor:
    return torch.randint(0, vocabulary, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def digest_of(logits: torch.Tensor) -> str:
    return hashlib.sha256(logits.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def run(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def watched(act: Callable[[], Any]) -> tuple[dict[str, float], Any]:
    """Do something; tell when it began and ended, and the bytes that the disk delivered meanwhile."""
    read = measure.read_bytes()
    begin_s = time.monotonic()
    result = act()
    end_s = time.monotonic()
    return {"begin_s": begin_s, "end_s": end_s, "s": end_s - begin_s, "read_bytes": measure.read_bytes() - read}, result


def cool(files: list[Path], *, is_ours: bool) -> None:
    """Take files out of the page cache; whatever of them this process maps goes first, but for what ours keeps.

    Raises:
        EvictionError: they stay.
    """
    if is_ours:  # its resident part is mapped, cannot be dropped, and is what the budget is for
        with suppress(measure.EvictionError):
            measure.evict(files, patience_s=0.2)
        return
    pagemap, names = Pagemap(), {str(path) for path in files}
    for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
        addresses, _, _, _, _, *name = line.split(maxsplit=5)
        if name and name[0] in names:
            begin, end = (int(address, 16) for address in addresses.split("-"))
            for stretch, is_own in pagemap.held(Span(begin, end)):
                if not is_own:  # what was written to is in no file
                    drop(stretch)
    measure.evict(files)


IMPORTED = ("transformers.models.llama.modeling_llama", "lading.api.loading", "lading.api.planning")
"""Not part of what loading costs, whoever loads."""


def time_forwards(job: Job) -> dict[str, Any]:
    """Load from cold files, run each shape once, then warm, then cold."""
    contender, is_ours = CONTENDERS[job.contender], job.contender == "lading"
    for module in IMPORTED if contender.is_there else ():
        import_module(module)
    folder, scratch = Path(job.folder), Path(job.scratch)
    files = [path for root in (folder, scratch) for path in root.rglob("*") if path.is_file()]
    measure.evict([path for path in files if path.stat().st_size])
    gc.collect()
    before = measure.memory_of()
    told: dict[str, Any] = {
        "before_anonymous_bytes": before.anonymous_bytes,
        "before_file_bytes": before.file_bytes,
        "digests": {},
        "forwards": {},
    }
    first_ids = inputs_of(*next(iter(job.shapes.values())))
    loaded, model = watched(lambda: contender.load(folder, scratch).eval())
    first, _ = watched(lambda: run(model, first_ids))
    told["load_s"], told["start_s"] = loaded["s"], first["end_s"] - loaded["begin_s"]
    kept = [path for root in (folder, scratch) for path in root.rglob("*") if path.is_file() and path.stat().st_size]
    for name, shape in job.shapes.items():
        ids = inputs_of(*shape)
        told["digests"][name] = digest_of(run(model, ids))
        warm = [watched(lambda: run(model, ids)) for _ in range(job.runs[name])]  # noqa: B023 - called at once
        cold = []
        for _ in range(job.runs[name] if contender.is_on_disk else 0):
            cool(kept, is_ours=is_ours)
            cold.append(watched(lambda: run(model, ids)))  # noqa: B023 - called at once
        if any(digest_of(logits) != told["digests"][name] for _, logits in [*warm, *cold]):
            raise SystemExit(f"{job.contender}, {name}: two forwards of one model differ")
        told["forwards"][name] = {"warm": [each for each, _ in warm], "cold": [each for each, _ in cold]}
    residency = lading.Residency.of(model)
    told["stats"] = None if residency is None else asdict(residency.stats())
    told["scratch_bytes"] = sum(path.stat().st_size for path in scratch.rglob("*") if path.is_file())
    return told


def check_manners(job: Job) -> dict[str, Any]:
    """Ask what `state_dict` shows, whether an edit survives, and what several threads at once get."""
    contender = CONTENDERS[job.contender]
    model = contender.load(Path(job.folder), Path(job.scratch)).eval()
    all_ids = [inputs_of(2, 16, seed) for seed in range(NUM_THREADS)]
    expected = [run(model, ids) for ids in all_ids]
    told: dict[str, Any] = {"digests": [digest_of(each) for each in expected]}
    told |= call_from_threads(model, all_ids, expected)
    model = contender.load(Path(job.folder), Path(job.scratch)).eval()
    run(model, all_ids[0])
    state = model.state_dict()
    told["state"] = {name: None if each.is_meta else digest_of(each) for name, each in state.items()}
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight.mul_(1.5)
    run(model, all_ids[1])
    told["edited_digest"] = digest_of(run(model, all_ids[0]))
    return told


def call_from_threads(model: Any, all_ids: list[torch.Tensor], expected: list[torch.Tensor]) -> dict[str, Any]:
    """Run forwards from several threads, each with inputs of its own; count what is wrong and what raises."""
    found: dict[str, list[str]] = {"wrong": [], "raised": []}
    barrier = threading.Barrier(NUM_THREADS)

    def call(number: int) -> None:
        barrier.wait()
        for _ in range(NUM_TURNS):
            try:
                if not torch.equal(run(model, all_ids[number]), expected[number]):
                    found["wrong"].append("")
            except Exception as error:  # noqa: BLE001 - counted
                found["raised"].append(f"{type(error).__name__}: {error}"[:120])

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    threads = [threading.Thread(target=call, args=(number,)) for number in range(NUM_THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sys.setswitchinterval(interval)
    return {
        "wrong": len(found["wrong"]),
        "raised": len(found["raised"]),
        "raised_as": found["raised"][:1],
        "calls": NUM_THREADS * NUM_TURNS,
    }


def perform(job: Job) -> dict[str, Any]:
    """Do what a job says."""
    torch.set_num_threads(job.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return {"time": time_forwards, "manners": check_manners}[job.task](job)


def in_fork(act: Callable[[], dict[str, Any]], title: str) -> dict[str, Any]:
    """Do something in a fork of this process: at no cost of imports, good for trying that everything runs."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            with os.fdopen(writing, "wb") as answer:
                answer.write(json.dumps(act()).encode())
        except BaseException:  # noqa: BLE001 - the parent is told
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as answer:
        said = answer.read()
    _, status = os.waitpid(child, 0)
    if status:
        raise SystemExit(f"{title}: failed, see above")
    told: dict[str, Any] = json.loads(said)
    return told


def main() -> None:
    print(json.dumps(perform(Job(**json.loads(sys.argv[1])))), flush=True)
    os._exit(0)  # what a library tidies up at exit is no part of this


if __name__ == "__main__":
    main()
