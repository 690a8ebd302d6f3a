"""Let many batches cross a model of which a GPU holds a part.

From how many tokens a crossing does it run as fast as with all weights on the GPU?

The model of `bench_offload_gpu`, a tenth of its bytes on ``cuda:0`` and the rest in host memory; micro-batches of
4×1024 tokens, as many of them a crossing as `CROSSINGS` says, and sequences that are continued.
Ours: ``lading.convoy`` over ``lading.load(plan=…)``.
Peers: the same model batch by batch; accelerate's ``cpu_offload``, where installed.
Ceiling, in the same run: all weights on the GPU, and the streamed bytes over the rate of a pinned copy.
Equal outputs are proved first; runs alternate.

    python benchmarks/gpu/bench_convoy_gpu.py [--layers 24] [--share 0.1] [--runs 3]
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from bench_offload_gpu import pinned_copy_rate, save, seconds
from transformers import LlamaForCausalLM

import lading

ROWS, TOKENS, VOCABULARY = 4, 1024, 32000
CROSSINGS = (1, 4, 16)
"""Micro-batches that cross together: 4,096, 16,384 and 65,536 tokens."""
NUM_SEQUENCES, PROMPT_TOKENS, NEW_TOKENS = 32, 32, 16
REFERENCE, CONVOY = "all on the GPU", "lading.convoy"

Call = Callable[..., Any]
Crosses = Callable[..., Iterator[Any]]


def one_by_one(call: Call, batches: Iterable[Any], **constants: Any) -> Iterator[Any]:
    return (call(batch, **constants) for batch in batches)


def contenders(path: Path, total: int, share: float) -> dict[str, tuple[Any, Crosses]]:
    """Give each one's model, and how it is called with batches."""
    least = lading.plan(path, {0: 2 * total, "cpu": 2 * total}).explain()["minimum"]["useful"]
    plan = lading.plan(path, {0: max(int(total * share), least), "cpu": 2 * total})
    streamed = lading.load(path, plan=plan)
    found: dict[str, tuple[Any, Crosses]] = {
        REFERENCE: (lading.load(path, device_map={"": 0}), one_by_one),
        CONVOY: (streamed, lading.convoy),
        "lading.load alone": (streamed, one_by_one),
    }
    if find_spec("accelerate") is not None:
        from accelerate import cpu_offload

        found["accelerate cpu_offload"] = (cpu_offload(LlamaForCausalLM.from_pretrained(path), 0), one_by_one)
    return found


def batches_of(rows: int, tokens: int, count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, VOCABULARY, (rows, tokens), generator=generator).cuda() for _ in range(count)]


def forward(model: Any, cross: Crosses, batches: list[torch.Tensor]) -> list[torch.Tensor]:
    """Give the logits of each batch's last tokens, so that what is kept is small."""
    width = {"width": len(batches)} if cross is lading.convoy else {}
    return [output.logits[:, -1].clone() for output in cross(model, batches, use_cache=False, **width)]


def generate(model: Any, cross: Crosses, batches: list[torch.Tensor]) -> list[torch.Tensor]:
    lengths = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS}
    return list(cross(model.generate, batches, do_sample=False, **lengths))


def measure(
    models: dict[str, tuple[Any, Crosses]],
    act: Callable[[Any, Crosses, list[torch.Tensor]], list[torch.Tensor]],
    batches: list[torch.Tensor],
    runs: int,
) -> dict[str, list[float]]:
    """Prove that all give the same, then time them in turns.

    Raises:
        SystemExit: outputs differ.
    """
    expected = act(*models[REFERENCE], batches)
    for name, (model, cross) in models.items():
        if not all(map(torch.equal, act(model, cross, batches), expected)):
            raise SystemExit(f"{name}: outputs differ from those with all weights on the GPU")
    times: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(runs):
        for name in models if turn % 2 == 0 else reversed(models):
            times[name].append(seconds(partial(act, *models[name], batches)))
    return times


def show(title: str, times: dict[str, list[float]], num_tokens: int, least_s: float) -> None:
    """Print tokens a second; ``least_s``: what copying the streamed weights once takes, however many times that is."""
    whole = statistics.median(times[REFERENCE])
    for name, each in times.items():
        median = statistics.median(each)
        rates = " ".join(f"{num_tokens / one:,.0f}" for one in (max(each), median, min(each)))
        shares = f"{whole / median:.3f} of all on the GPU, {max(whole, least_s) / median:.3f} of the ceiling"
        print(f"{title}  {name:24} {rates} tokens/s (least, median, greatest): {shares}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--share", type=float, default=0.1, help="of the weights that the GPU may hold")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        path = Path(folder, "model")
        total = save(path, options.layers)
        rate = pinned_copy_rate()
        models = contenders(path, total, options.share)
        residency = lading.Residency.of(models[CONVOY][0])
        streamed = sum(each.num_bytes for each in residency.plan.placements if each.is_streamed and not each.is_lookup)
        figures: dict[str, Any] = {"total_bytes": total, "streamed_bytes": streamed, "pinned_copy_bytes_per_s": rate}
        print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {total / 1e9:.2f} GB, share {options.share}")
        print(f"pinned copy {rate / 1e9:.1f} GB/s: streaming {streamed / 1e9:.2f} GB takes {streamed / rate:.4f} s")
        for width in CROSSINGS:
            batches = batches_of(ROWS, TOKENS, width)
            title = f"{width} × {ROWS}×{TOKENS}"
            times = measure(models, forward, batches, options.runs)
            show(title, times, width * ROWS * TOKENS, streamed / rate)
            figures[title] = times
        prompts = batches_of(1, PROMPT_TOKENS, NUM_SEQUENCES)
        title = f"{NUM_SEQUENCES} sequences"
        times = measure(models, generate, prompts, 1)
        show(title, times, NUM_SEQUENCES * NEW_TOKENS, NEW_TOKENS * streamed / rate)
        figures[title] = times
        print(f"{CONVOY}: {residency.stats()}")
        line = json.dumps(figures)
        if options.out is not None:
            options.out.write_text(line, encoding="utf-8")
        print(line)


if __name__ == "__main__":
    main()
