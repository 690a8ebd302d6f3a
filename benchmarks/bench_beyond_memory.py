"""Embed texts with a model larger than this machine's memory.

How many tokens a second does a model give that does not fit into RAM, when many batches cross it together?

A bf16 Llama of seeded random weights, made shard by shard (no more than one layer in memory at a time) and removed
afterwards; by default a tenth larger than this machine's memory. Its last hidden states are computed for random tokens.

Ours: ``lading.convoy`` over ``lading.load(device_map="auto", max_memory={"cpu": a tenth of the weights})``.
Peer, what a user would call instead: transformers' ``device_map`` with ``"disk"`` for as many layers, batch by batch;
for fewer batches, because each of them reads the whole model.
Ceiling, measured in the same run: computing alone, as the same layers take in memory, two of them, scaled by their
number; the best of several measurements before and after. Equality is proven before on a model of two layers: both give
the bits of the model in memory.

    python benchmarks/bench_beyond_memory.py --threads 4 --report benchmarks/results/bench_beyond_memory.md
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaModel

import lading
import measure
from tables import Report, describe_machine

FULL = {"hidden_size": 5120, "intermediate_size": 13824, "num_attention_heads": 40, "num_key_value_heads": 40}
TINY = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 4}
_GiB = 2**30
_REPEATS = 3


def config_of(num_layers: int, *, tiny: bool) -> LlamaConfig:
    vocabulary = 512 if tiny else 32000
    return LlamaConfig(**(TINY if tiny else FULL), vocab_size=vocabulary, num_hidden_layers=num_layers)


def make(config: LlamaConfig, folder: Path) -> int:
    """Write a checkpoint layer by layer; give its bytes."""
    folder.mkdir(parents=True)
    config.architectures = ["LlamaModel"]
    config.dtype = torch.bfloat16
    config.save_pretrained(folder)
    with torch.device("meta"):
        skeleton = LlamaModel(config)
    generator = torch.Generator().manual_seed(0)
    shards: dict[str, dict[str, torch.Size]] = {}
    for name, weight in skeleton.named_parameters():
        part = name.split(".")[1] if name.startswith("layers.") else name.split(".")[0]
        shards.setdefault(f"model-{part}.safetensors", {})[name] = weight.shape
    weight_map, total = {}, 0
    for shard, shapes in shards.items():
        tensors = {name: drawn(shape, generator) for name, shape in shapes.items()}
        save_file(tensors, folder / shard, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, shard))
        total += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return total


def drawn(shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    return torch.randn(shape, generator=generator, dtype=torch.bfloat16).mul_(0.02)


def batches_of(count: int, shape: tuple[int, int], vocabulary: int) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, vocabulary, (count, *shape), generator=generator)
    return [{"input_ids": each, "use_cache": False} for each in ids]


def evict(folder: Path) -> None:
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def ours(folder: Path, budget: int, batches: list[dict[str, Any]]) -> tuple[dict[str, Any], list[torch.Tensor]]:
    evict(folder)
    model = lading.load(folder, device_map="auto", max_memory={"cpu": budget})
    residency = lading.Residency.of(model)
    before = measure.memory_of().anonymous_bytes
    peaks, outputs = [before], []
    begin = time.perf_counter()
    with lading.convoy(model, batches) as results:
        for output in results:
            outputs.append(output.last_hidden_state)
            peaks.append(measure.memory_of().anonymous_bytes)
    seconds = time.perf_counter() - begin
    told = {"s": seconds, "convoy": str(results.stats()), "residency": str(residency.stats())}
    told |= {"peak_weight_bytes": residency.stats().peak_bytes, "disk_bytes": residency.stats().disk_bytes}
    told |= {"anonymous_bytes": max(peaks) - before, "wait_s": results.stats().wait_s}
    residency.close()
    return told, outputs


def theirs(folder: Path, batches: list[dict[str, Any]], num_resident: int) -> tuple[dict[str, Any], list[torch.Tensor]]:
    evict(folder)
    layers = json.loads((folder / "config.json").read_text(encoding="utf-8"))["num_hidden_layers"]
    places: dict[str, Any] = {"embed_tokens": "cpu", "norm": "cpu", "rotary_emb": "cpu"}
    places |= {f"layers.{number}": "cpu" if number < num_resident else "disk" for number in range(layers)}
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        model = LlamaModel.from_pretrained(folder, device_map=places, offload_folder=scratch, dtype=torch.bfloat16)
        begin = time.perf_counter()
        outputs = [model(**batch).last_hidden_state for batch in batches]
        return {"s": time.perf_counter() - begin}, outputs


def in_memory(folder: Path, batches: list[dict[str, Any]]) -> tuple[float, list[torch.Tensor]]:
    model = LlamaModel.from_pretrained(folder, dtype=torch.bfloat16)
    model(**batches[0])
    begin = time.perf_counter()
    outputs = [model(**batch).last_hidden_state for batch in batches]
    return time.perf_counter() - begin, outputs


def prove_equal(folder: Path, batches: list[dict[str, Any]]) -> None:
    """Compare on a model of two layers.

    Raises:
        SystemExit: outputs differ.
    """
    _, expected = in_memory(folder, batches)
    least = lading.plan(folder, {"cpu": "1TiB"}).minimum.useful
    for name, (_, outputs) in {"ours": ours(folder, least, batches), "theirs": theirs(folder, batches, 1)}.items():
        if not all(map(torch.equal, outputs, expected)):
            raise SystemExit(f"{name}: hidden states differ from the model's in memory")


def render(record: dict[str, Any]) -> str:
    tokens = record["tokens"]
    lines = [
        f"`{record['command']}`",
        "",
        f"- {record['cores']} cores ({record['machine']['cpu']}), {record['threads']} torch threads, "
        f"{record['machine']['memory_bytes'] / _GiB:.1f} GiB of memory, {record['machine']['kernel']}; load average "
        f"before the start {record['load_average']:.1f}",
        "- " + ", ".join(f"{name} {number}" for name, number in record["versions"].items()),
        f"- {record['num_bytes'] / 1e9:.1f} GB ({record['num_bytes'] / _GiB:.1f} GiB) of bf16 weights in "
        f"{record['layers']} layers; {record['budget_bytes'] / 1e9:.2f} GB of memory given; micro-batches of "
        f"{record['shape'][0]}×{record['shape'][1]} tokens; files evicted before each contender",
        "",
        "| | tokens | s | tokens/s | of the ceiling |",
        "|---|---|---|---|---|",
    ]
    ceiling = tokens["ceiling"] / record["ceiling_s"]
    for name, title in (("ours", "`lading.convoy`"), ("theirs", "transformers, disk, batch by batch")):
        rate = tokens[name] / record[name]["s"]
        lines.append(f"| {title} | {tokens[name]:,} | {record[name]['s']:.1f} | {rate:.1f} | {rate / ceiling:.3f} |")
    lines.append(
        f"| ceiling: computing alone | {tokens['ceiling']:,} | {record['ceiling_s']:.1f} | {ceiling:.1f} | 1 |"
    )
    told = record["ours"]
    lines += ["", f"The slowest measurement of the ceiling took {record['ceiling_spread']:.2f} × the best."]
    lines += [
        "",
        f"Ours held at most {told['peak_weight_bytes'] / 1e9:.2f} GB of weights at once, beside them "
        f"{told['anonymous_bytes'] / 1e6:,.0f} MB of anonymous memory, and read {told['disk_bytes'] / 1e9:.1f} GB.",
        "",
        f"- {told['convoy']}",
        f"- {told['residency']}",
    ]
    return "\n".join(lines)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a small model: proves that it runs")
    parser.add_argument("--threads", type=int, default=2, help="torch threads (default: %(default)s)")
    parser.add_argument("--layers", type=int, help="of the large model (default: a tenth more than fits into memory)")
    parser.add_argument("--batches", type=int, default=8, help="micro-batches of 4x128 tokens (default: %(default)s)")
    parser.add_argument("--cache", type=Path, metavar="DIR", help="where checkpoints are made; removed at the end")
    parser.add_argument("--report", type=Path, metavar="FILE", help="write the table as markdown")
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    warnings.simplefilter("ignore", lading.PlanWarning)
    torch.set_num_threads(1 if options.tiny else options.threads)
    machine = describe_machine()
    load_average = os.getloadavg()[0]
    shape = (2, 16) if options.tiny else (4, 128)
    per_layer = sum(p.numel() * 2 for p in skeleton_of(options).layers[0].parameters())
    layers = options.layers or (6 if options.tiny else int(1.1 * machine["memory_bytes"] / per_layer))
    with tempfile.TemporaryDirectory(prefix="lading-beyond-", dir=options.cache) as made, torch.inference_mode():
        config = config_of(layers, tiny=options.tiny)
        batches = batches_of(options.batches, shape, config.vocab_size)
        small = Path(made) / "small"
        make(config_of(2, tiny=options.tiny), small)
        prove_equal(small, batches[:2])
        two_s = [in_memory(small, batches[:2])[0] for _ in range(_REPEATS)]
        folder = Path(made) / "large"
        num_bytes = make(config, folder)
        budget = max(num_bytes // 10, lading.plan(folder, {"cpu": "10TiB"}).minimum.useful)
        told, _ = ours(folder, budget, batches)
        few = batches[: 1 if not options.tiny else 2]
        peer, _ = theirs(folder, few, max(1, budget // per_layer - 1))
        shutil.rmtree(folder)
        two_s += [in_memory(small, batches[:2])[0] for _ in range(_REPEATS)]
    each = shape[0] * shape[1]
    record = {
        "benchmark": "bench_beyond_memory",
        "command": f"python benchmarks/bench_beyond_memory.py --threads {options.threads} --layers {layers} "
        f"--batches {options.batches}" + " --tiny" * options.tiny,
        "is_tiny": options.tiny,
        "threads": options.threads,
        "cores": len(os.sched_getaffinity(0)),
        "load_average": load_average,
        "machine": machine,
        "versions": {"python": sys.version.split()[0]} | {name: version(name) for name in ("torch", "transformers")},
        "layers": layers,
        "num_bytes": num_bytes,
        "budget_bytes": budget,
        "shape": shape,
        "tokens": {"ours": len(batches) * each, "theirs": len(few) * each, "ceiling": 2 * each},
        "ours": told,
        "theirs": peer,
        "ceiling_s": min(two_s) * layers / 2,
        "ceiling_spread": max(two_s) / min(two_s),
    }
    report = Report(record, options.report)
    report.say(render(record))
    report.save()
    print(json.dumps(record))


def skeleton_of(options: argparse.Namespace) -> LlamaModel:
    with torch.device("meta"):
        return LlamaModel(config_of(1, tiny=options.tiny))


if __name__ == "__main__":
    main()
