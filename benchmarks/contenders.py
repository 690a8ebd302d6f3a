"""List the ways to load that are compared: lading, the peers as their documentation shows them, and the floors.

Runs under transformers 4 and 5, with lading on its path or without; each way imports what it needs by itself. Knows
nothing of clocks and processes: `measured` calls these functions, one in each process.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import measure

MODES = ("warm", "cold")


@dataclass(slots=True, kw_only=True)
class Job:
    """Say what to load, how, and under which conditions. One thread."""

    contender: str
    folder: str
    model_class: str
    dtype: str
    inputs: dict[str, list[int]]
    threads: int
    is_cold: bool = False
    hold: bool = False
    forked: bool = False
    imports: list[str] = field(default_factory=list)
    """Modules that this way imports while loading, found by a trial, to be imported before the clock starts."""

    @property
    def cls(self) -> Any:
        """Give the transformers class."""
        import transformers

        return getattr(transformers, self.model_class)

    @property
    def shards(self) -> list[Path]:
        """List the files with weights."""
        return sorted(Path(self.folder).glob("*.safetensors"))

    def element_type(self, config: Any) -> Any:
        """Give the torch dtype that is asked for."""
        import torch

        name = config.dtype if self.dtype == "auto" else self.dtype
        return getattr(torch, name) if isinstance(name, str) else name


class Skip(Exception):  # noqa: N818 - nothing is wrong
    """Say why a way to load does not exist here."""


def transformers_major() -> int:
    import transformers

    return int(transformers.__version__.split(".", 1)[0])


# lading


def load_lading(job: Job) -> Any:
    import lading

    return lading.load(job.folder, dtype=job.dtype)


def load_lading_readahead(job: Job) -> Any:
    import lading

    return lading.load(job.folder, dtype=job.dtype, readahead=True)


# The peers


def load_transformers(job: Job) -> Any:
    return job.cls.from_pretrained(job.folder, dtype=job.dtype)


def load_accelerate(job: Job) -> Any:
    from accelerate import init_empty_weights, load_checkpoint_and_dispatch
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(job.folder)
    dtype = job.element_type(config)
    with init_empty_weights():
        model = job.cls._from_config(config, dtype=dtype)
    model.tie_weights()
    return load_checkpoint_and_dispatch(model, job.folder, device_map={"": "cpu"}, dtype=dtype).eval()


def load_plain(job: Job) -> Any:
    import torch
    from safetensors.torch import load_file
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(job.folder)
    dtype = job.element_type(config)
    with torch.device("meta"):
        model = job.cls._from_config(config, dtype=dtype)
    state = {name: tensor.to(dtype) for path in job.shards for name, tensor in load_file(path).items()}
    model.load_state_dict(fuse_experts(model, state), strict=False, assign=True)
    model.tie_weights()
    make_buffers(model)
    return model.eval()


def make_buffers(model: Any) -> None:
    """Make the buffers that no checkpoint has, by making their modules again (here: rotary embeddings)."""
    for name, part in [*model.named_modules()]:
        if any(buffer.is_meta for buffer in part.buffers(recurse=False)):
            model.get_submodule(name.rpartition(".")[0])._modules[name.rpartition(".")[2]] = type(part)(part.config)


def fuse_experts(model: Any, state: dict[str, Any]) -> dict[str, Any]:
    """Turn one tensor per expert into the stacks that transformers 5's Mixtral has; other states stay as they are."""
    import torch

    own = model.state_dict()
    for name in [name for name in own if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        stem = name.rpartition(".")[0].replace(".mlp.", ".block_sparse_moe.")
        stacked = torch.empty(own[name].shape, dtype=own[name].dtype)
        half = stacked.shape[1] // 2
        for expert, slot in enumerate(stacked):
            if name.endswith("down_proj"):
                slot.copy_(state.pop(f"{stem}.{expert}.w2.weight"))
            else:
                slot[:half].copy_(state.pop(f"{stem}.{expert}.w1.weight"))
                slot[half:].copy_(state.pop(f"{stem}.{expert}.w3.weight"))
        state[name] = stacked
    return {name if name in own else name.replace(".block_sparse_moe.", ".mlp."): state[name] for name in state}


# The floors


def parse_headers(job: Job) -> None:
    from lading.checkpoint.locate import open_catalog

    open_catalog(job.folder)


def build_on_meta(job: Job) -> None:
    with ExitStack() as contexts:
        config = read_config(job)
        dtype = job.element_type(config)
        if transformers_major() >= 5:
            entered = job.cls.get_init_context(dtype, False, False, None)
        else:
            entered = [default_dtype(dtype), *job.cls.get_init_context(False, False)]
        for context in entered:
            contexts.enter_context(context)
        job.cls(config)


def map_and_assign(job: Job) -> Any:
    """Do what cannot be left out: parse, map, build without drawing numbers, put each tensor in its place."""
    import torch

    config = read_config(job)
    dtype = job.element_type(config)
    state = {name: tensor.to(dtype) for path in job.shards for name, tensor in map_shard(path)}
    with default_dtype(dtype), no_init_weights(), torch.device("meta"):
        model = job.cls(config)
    modules = dict(model.named_modules())
    for name, tensor in fuse_experts(model, state).items():
        path, _, attribute = name.rpartition(".")
        modules[path]._parameters[attribute] = torch.nn.Parameter(tensor)
    model.tie_weights()
    make_buffers(model)
    return model.eval()


def read_config(job: Job) -> Any:
    return job.cls.config_class.from_dict(json.loads(Path(job.folder, "config.json").read_bytes()))


def map_shard(path: Path) -> Iterator[tuple[str, Any]]:
    import torch

    dtypes = {"BF16": torch.bfloat16, "F32": torch.float32}
    with path.open("rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(start - 8))
        buffer = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE | 0x4000, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    header.pop("__metadata__", None)
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        dtype = dtypes[entry["dtype"]]
        flat = torch.frombuffer(buffer, dtype=dtype, count=(end - begin) // dtype.itemsize, offset=start + begin)
        yield name, flat.view(entry["shape"])


@contextmanager
def default_dtype(dtype: Any) -> Iterator[None]:
    import torch

    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def no_init_weights() -> Any:
    name = "transformers.initialization" if transformers_major() >= 5 else "transformers.modeling_utils"
    return import_module(name).no_init_weights()


def read_all(job: Job) -> None:
    measure.fill_page_cache(job.shards)


def copy_all(job: Job) -> None:
    measure.copy_out(job.shards)


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """Name one way to load. Immutable."""

    load: Callable[[Job], Any]
    title: str
    imports: tuple[str, ...] = ()
    is_floor: bool = False
    is_model: bool = True
    """Whether it gives a model that can be run."""
    modes: tuple[str, ...] = MODES


CONTENDERS = {
    "lading": Contender(load=load_lading, title="lading.load", imports=("lading.api.loading",)),
    "lading-readahead": Contender(
        load=load_lading_readahead,
        title="lading.load, readahead=True",
        imports=("lading.api.loading",),
        modes=("cold",),
    ),
    "transformers": Contender(load=load_transformers, title="from_pretrained"),
    "accelerate": Contender(
        load=load_accelerate, title="accelerate load_checkpoint_and_dispatch", imports=("accelerate",)
    ),
    "plain": Contender(
        load=load_plain, title="meta + load_file + load_state_dict(assign=True)", imports=("safetensors.torch",)
    ),
    "assign": Contender(load=map_and_assign, title="floor: parse, build on meta, assign, no checks", is_floor=True),
    "build": Contender(load=build_on_meta, title="floor: build on meta alone", is_floor=True, is_model=False),
    "header": Contender(
        load=parse_headers,
        title="floor: parse headers alone",
        imports=("lading.checkpoint.locate",),
        is_floor=True,
        is_model=False,
    ),
    "read": Contender(
        load=read_all, title="floor: read every byte from disk", is_floor=True, is_model=False, modes=("cold",)
    ),
    "copy": Contender(
        load=copy_all, title="floor: copy every byte from memory", is_floor=True, is_model=False, modes=("warm",)
    ),
}
