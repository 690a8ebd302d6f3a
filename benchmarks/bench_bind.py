"""Fill a plain module of five thousand tensors.

How long does it take, without any architecture around it?

A module of 1,250 pairs of linear and norm layers is built without memory, then filled from one safetensors file, each
time in the same process after a collection of garbage, ours and the peer in turns.
Ours: ``lading.load_into`` on a module built inside ``lading.empty()``.
Peer: a module built on meta, safetensors' ``load_file``, ``load_state_dict(assign=True)``.
Ceiling, in the same run: parse the header, make the tensors, put them in their places, check nothing.
Equal tensors are proved first. Not counted: building the module.

    python benchmarks/bench_bind.py [--tiny] [--runs 9]
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

import lading
from lading.checkpoint.locate import open_catalog
from lading.checkpoint.mapping import map_catalog, tensors_of


def build(num_pairs: int) -> nn.Module:
    return nn.Sequential(*[nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)) for _ in range(num_pairs)])


def build_empty(num_pairs: int) -> nn.Module:
    with lading.empty():
        return build(num_pairs)


def build_meta(num_pairs: int) -> nn.Module:
    with torch.device("meta"):
        return build(num_pairs)


def fill_as_peer(module: nn.Module, path: Path) -> None:
    module.load_state_dict(load_file(path), assign=True)


def fill_unchecked(module: nn.Module, path: Path) -> None:
    catalog = open_catalog(path)
    modules = dict(module.named_modules())
    for name, tensor in tensors_of(catalog, map_catalog(catalog)).items():
        owner, _, attribute = name.rpartition(".")
        modules[owner]._parameters[attribute] = nn.Parameter(tensor)


CONTENDERS: dict[str, tuple[Callable[[int], nn.Module], Callable[[nn.Module, Path], object]]] = {
    "lading.load_into": (build_empty, lading.load_into),
    "load_file + load_state_dict(assign=True)": (build_meta, fill_as_peer),
    "ceiling: no checks": (build_meta, fill_unchecked),
}


def measure(name: str, num_pairs: int, path: Path) -> tuple[float, nn.Module]:
    make, fill = CONTENDERS[name]
    module = make(num_pairs)
    gc.collect()
    began = time.perf_counter()
    fill(module, path)
    return time.perf_counter() - began, module


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a miniature module, one round: proves that it runs")
    parser.add_argument("--runs", type=int, default=9, help="rounds (default: %(default)s)")
    options = parser.parse_args()
    num_pairs, runs = (5, 1) if options.tiny else (1250, options.runs)
    torch.manual_seed(0)
    source = build(num_pairs)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "many.safetensors")
        save_file(source.state_dict(), path)
        for name in CONTENDERS:
            _, module = measure(name, num_pairs, path)
            for key, expected in source.state_dict().items():
                assert torch.equal(module.state_dict()[key], expected), f"{name}: {key} differs"
        seconds: dict[str, list[float]] = {name: [] for name in CONTENDERS}
        for _ in range(runs):
            for name in CONTENDERS:
                seconds[name].append(measure(name, num_pairs, path)[0])
    ours = statistics.median(seconds["lading.load_into"])
    print(f"{4 * num_pairs} tensors, {runs} rounds, {torch.get_num_threads()} threads, torch {torch.__version__}")
    for name, found in seconds.items():
        median = statistics.median(found)
        print(f"{name:42} {min(found):.4f} / {median:.4f} / {max(found):.4f} s   ours/this {ours / median:.2f}")
    print(json.dumps({"benchmark": "bench_bind", "num_tensors": 4 * num_pairs, "seconds": seconds}))


if __name__ == "__main__":
    main()
