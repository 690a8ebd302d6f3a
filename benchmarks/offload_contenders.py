"""Load a causal language model in one of the ways to run it with its weights elsewhere, on the CPU.

Knows lading and its peers, each under the name of the call that a user would write; measures nothing. Each runs in a
process of its own, because some of them patch what they touch.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """Name one way. Immutable."""

    title: str
    load: Callable[[Path, Path], Any]
    """Takes the checkpoint's folder and one for files of its own; gives the model."""
    needs: str = "torch"
    """A package."""
    is_on_disk: bool = True
    """Whether its weights rest in files, so that a cold forward means something."""

    @property
    def is_there(self) -> bool:
        """Say whether its package is installed."""
        return find_spec(self.needs) is not None


def budget_of(folder: Path, parts: int = 4) -> tuple[int, int]:
    """Give a model's bytes, and one part of them, or the least with which it can be streamed if that is more."""
    import lading

    plan = lading.plan(str(folder), {"cpu": 2**60})
    return plan.total_bytes, max(plan.total_bytes // parts, int(plan.explain()["minimum"]["useful"]))


def plan_of(folder: Path, parts: int = 4) -> Any:
    """Plan a model into that budget: the same for everybody who takes a device map."""
    import lading

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", lading.PlanWarning)
        return lading.plan(str(folder), {"cpu": budget_of(folder, parts)[1]})


def load_in_memory(folder: Path, _: Path) -> Any:
    import lading

    return lading.load(str(folder), copy=True)


def load_mapped(folder: Path, _: Path) -> Any:
    import lading

    return lading.load(str(folder))


def load_streamed(folder: Path, _: Path, parts: int = 4) -> Any:
    import lading

    return lading.load(str(folder), plan=plan_of(folder, parts))


def offload_to_memory(folder: Path, _: Path) -> Any:
    import torch
    from accelerate import cpu_offload

    return cpu_offload(load_in_memory(folder, folder), execution_device=torch.device("cpu"))


def offload_to_disk(folder: Path, scratch: Path) -> Any:
    import torch
    from accelerate import disk_offload

    return disk_offload(load_mapped(folder, folder), str(scratch), execution_device=torch.device("cpu"))


def load_by_device_map(folder: Path, scratch: Path, parts: int = 4) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        str(folder), dtype="auto", device_map=plan_of(folder, parts).device_map, offload_folder=str(scratch)
    )


def offload_groups(folder: Path, _: Path) -> Any:
    import torch
    from diffusers.hooks import apply_group_offloading

    model = load_in_memory(folder, folder)
    scratch = tempfile.mkdtemp()  # its files are named by counting: a folder that is used again would be mixed up
    cpu = torch.device("cpu")
    options = {"offload_type": "block_level", "num_blocks_per_group": 1, "offload_to_disk_path": scratch}
    apply_group_offloading(model, onload_device=cpu, offload_device=cpu, **options)
    return model


CONTENDERS = {
    "memory": Contender(title="in memory", load=load_in_memory, is_on_disk=False),
    "mmap": Contender(title="plain mmap: lading.load", load=load_mapped),
    "lading": Contender(title="lading.load, a quarter of the memory", load=load_streamed),
    "cpu_offload": Contender(
        title="accelerate cpu_offload", load=offload_to_memory, needs="accelerate", is_on_disk=False
    ),
    "disk_offload": Contender(title="accelerate disk_offload", load=offload_to_disk, needs="accelerate"),
    "device_map": Contender(title="transformers device_map, disk", load=load_by_device_map, needs="accelerate"),
    "groups": Contender(title="diffusers group offload to disk", load=offload_groups, needs="diffusers"),
}
