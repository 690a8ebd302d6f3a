"""Run a model on a GPU that holds a part of it.

How fast is a forward whose weights come from host memory or disk?

A seeded random bf16 Llama of about 2 GB runs on ``cuda:0`` with a share of its bytes there and the rest elsewhere.
Ours: ``lading.load(plan=…)``.
Peer: accelerate's ``cpu_offload`` and, from disk, ``disk_offload``, where installed.
Ceiling, in the same run: all weights on the GPU, and the streamed bytes over the rate of a pinned copy.
Equal outputs are proved first; runs alternate.

    python benchmarks/gpu/bench_offload_gpu.py [--layers 24] [--share 0.25] [--runs 5]
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import lading

SHAPES = ((1, 16), (8, 128), (16, 512), (16, 1024))


def save(path: Path, num_layers: int) -> int:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=num_layers,
        num_attention_heads=16,
        num_key_value_heads=8,
        vocab_size=32000,
    )
    with torch.device("cuda"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(path)
    return sum(weight.nbytes for weight in model.parameters())


def pinned_copy_rate() -> float:
    host = torch.empty(512 << 20, dtype=torch.uint8, pin_memory=True)
    device = torch.empty_like(host, device="cuda")
    rates = []
    for _ in range(5):
        torch.cuda.synchronize()
        began = time.perf_counter()
        device.copy_(host, non_blocking=True)
        torch.cuda.synchronize()
        rates.append(host.nbytes / (time.perf_counter() - began))
    return max(rates)


def seconds(call: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    began = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - began


def contenders(path: Path, total: int, share: float, folder: str) -> dict[str, torch.nn.Module]:
    room = {0: int(total * share)}
    models = {
        "all on the GPU": lading.load(path, device_map={"": 0}),
        "lading, host → GPU": lading.load(path, plan=lading.plan(path, {**room, "cpu": 2 * total})),
        "lading, disk → GPU": lading.load(path, plan=lading.plan(path, {**room, "disk": 2 * total})),
    }
    if find_spec("accelerate") is not None:
        from accelerate import cpu_offload, disk_offload

        models["accelerate cpu_offload"] = cpu_offload(LlamaForCausalLM.from_pretrained(path), 0)
        models["accelerate disk_offload"] = disk_offload(LlamaForCausalLM.from_pretrained(path), folder, 0)
    return models


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--share", type=float, default=0.25, help="of the weights that the GPU may hold")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model")
        total = save(path, options.layers)
        rate = pinned_copy_rate()
        models = contenders(path, total, options.share, f"{folder}/offloaded")
        figures: dict[str, object] = {"total_bytes": total, "pinned_copy_bytes_per_s": rate}
        print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {total / 1e9:.2f} GB, share {options.share}")
        print(f"pinned copy {rate / 1e9:.1f} GB/s: streaming all takes {total / rate:.4f} s")
        for shape in SHAPES:
            ids = torch.randint(0, 32000, shape, device="cuda")
            with torch.no_grad():
                expected = models["all on the GPU"](ids, use_cache=False).logits
                for name, model in models.items():
                    assert torch.equal(model(ids, use_cache=False).logits, expected), name
                times: dict[str, list[float]] = {name: [] for name in models}
                for _ in range(options.runs):
                    for name, model in models.items():
                        times[name].append(seconds(lambda model=model, ids=ids: model(ids, use_cache=False)))
            for name, each in times.items():
                residency = lading.Residency.of(models[name])
                streamed = sum(p.num_bytes for p in residency.plan.placements if p.is_streamed) if residency else 0
                share = f", {streamed / rate / statistics.median(each):.2f} of the copy's ceiling" if streamed else ""
                line = f"min {min(each):.4f} median {statistics.median(each):.4f} max {max(each):.4f} s{share}"
                print(f"{shape[0]}×{shape[1]}  {name:24} {line}")
                figures[f"{shape[0]}x{shape[1]} {name}"] = each
        for name, model in models.items():
            if (residency := lading.Residency.of(model)) is not None:
                print(f"{name}: {residency.stats()}")
        line = json.dumps(figures)
        if options.out is not None:
            options.out.write_text(line, encoding="utf-8")
        print(line)


if __name__ == "__main__":
    main()
