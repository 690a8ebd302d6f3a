"""Find the weights that accelerate laid aside, and put them back into a model whose tensors are on meta.

Knows the three places: a state dict, ``.dat`` files beside an ``index.json``, and entries of safetensors files. Files
are mapped, not read: what comes back are views, as from `lading.load`. What was one tensor is one tensor again: by the
model's own declaration, by one source for several names, or by accelerate's mark where bits are equal.

Imports no accelerate: its records are known by their attributes. Thread rule: one thread.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lading.checkpoint.catalog import Shard, TensorSpec
from lading.checkpoint.dtypes import element_type
from lading.checkpoint.header import identity_of, open_regular, read_header
from lading.checkpoint.mapping import ShardMapping
from lading.checkpoint.slots import Slot, remember, slots_of
from lading.errors import CorruptShardError, ResidencyError, name_list, refusal
from lading.placement.ties import declared_ties


@dataclass(frozen=True, slots=True, kw_only=True)
class LaidAside:
    """Say where weights are, in the order in which they are looked for. As accelerate's loader. Immutable."""

    state_dict: Mapping[str, torch.Tensor]
    index: Mapping[str, Mapping[str, Any]]
    """Name → ``safetensors_file`` with ``weight_name`` and ``dtype``, or ``shape`` and ``dtype`` of a ``.dat`` file."""
    save_folder: Path | None
    """Of the ``.dat`` files."""

    @classmethod
    def of(
        cls,
        state_dict: Mapping[str, torch.Tensor] | None = None,
        folder: str | os.PathLike[str] | None = None,
        index: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> LaidAside:
        """Read what callers of accelerate pass; a folder without an ``index.json`` holds nothing."""
        path = None if folder is None else Path(folder)
        if index is None and path is not None and (path / "index.json").is_file():
            index = json.loads((path / "index.json").read_text(encoding="utf-8"))
        return cls(state_dict=state_dict or {}, index=index or {}, save_folder=path)


class Finder:
    """Make tensors of weights that were laid aside; one source gives one tensor, however often it is asked for."""

    def __init__(self) -> None:
        self._mappings: dict[Path, ShardMapping] = {}
        self._made: dict[tuple[Path, str, torch.dtype | None], torch.Tensor] = {}

    def find(self, weights: Any, name: str) -> torch.Tensor:
        """Find a weight in a ``weights_map`` of accelerate's hooks, or in `LaidAside`.

        Raises:
            KeyError: it is not there.
            CheckpointError: its file is gone or broken.
        """
        while hasattr(weights, "dataset") and hasattr(weights, "prefix"):
            weights, name = weights.dataset, f"{weights.prefix}{name}"
        if not all(hasattr(weights, part) for part in ("state_dict", "index", "save_folder")):
            found: torch.Tensor = weights[name]
            return found
        if name in weights.state_dict:
            held: torch.Tensor = weights.state_dict[name]
            return held
        entry = weights.index[name]
        if entry.get("safetensors_file") is not None:
            path, stored = Path(entry["safetensors_file"]), entry.get("weight_name", name)
            return self._tensor(path, stored, getattr(torch, entry["dtype"]) if "dtype" in entry else None)
        if weights.save_folder is None:
            raise KeyError(name)
        return self._tensor_of_dat(Path(weights.save_folder) / f"{name}.dat", name, entry)

    def find_in_index(self, weights: Any, name: str) -> torch.Tensor | None:
        """Find a weight as `find` does, but only in files that an index names; None where it is not."""
        while hasattr(weights, "dataset") and hasattr(weights, "prefix"):
            weights, name = weights.dataset, f"{weights.prefix}{name}"
        is_there = name in getattr(weights, "index", ()) and name not in weights.state_dict
        return self.find(weights, name) if is_there else None

    def _tensor(self, path: Path, name: str, dtype: torch.dtype | None) -> torch.Tensor:
        if path not in self._mappings:
            self._mappings[path] = ShardMapping(read_header(path))
        if (path, name, dtype) not in self._made:
            mapping = self._mappings[path]
            tensor = mapping.tensor(mapping.shard.tensors[name])
            self._made[path, name, dtype] = tensor if dtype is None else tensor.to(dtype)
        return self._made[path, name, dtype]

    def _tensor_of_dat(self, path: Path, name: str, entry: Mapping[str, Any]) -> torch.Tensor:
        """Map a file that holds the bytes of one tensor and nothing else."""
        if (path, name, None) not in self._made:
            self._mappings[path] = ShardMapping(_describe_dat(path, name, entry))
            self._tensor(path, name, None)
        return self._made[path, name, None]


def _describe_dat(path: Path, name: str, entry: Mapping[str, Any]) -> Shard:
    shape = tuple(entry["shape"])
    element = element_type(getattr(torch, entry["dtype"]))
    if element is None:
        raise KeyError(name)
    num_bytes = math.prod(shape) * element.bits // 8
    descriptor = open_regular(path)
    try:
        identity = identity_of(descriptor)
    finally:
        os.close(descriptor)
    if identity.num_bytes != num_bytes:
        found, expected = f"{identity.num_bytes} bytes", f"{num_bytes} bytes: {list(shape)} of {entry['dtype']}"
        raise CorruptShardError(refusal(str(path), found=found, expected=expected, way_out="offload the model again"))
    spec = TensorSpec(name=name, element=element, shape=shape, offset=0, num_bytes=num_bytes)
    return Shard(path=path, identity=identity, tensors={name: spec})


@contextmanager
def restored_on_failure(model: nn.Module) -> Iterator[None]:
    """Put every parameter and buffer of a model back as it was if the body raises."""
    with ExitStack() as undo:
        remember(list(model.modules()), undo)
        yield
        undo.pop_all()


def slots_by_name(model: nn.Module) -> dict[str, Slot]:
    """List the places of parameters and persistent buffers, by each of their full names."""
    slots: dict[str, Slot] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        slots.update(slots_of(module, f"{path}." if path else ""))
    return slots


def on_meta(model: nn.Module) -> list[str]:
    """Name the tensors of a model that have no data."""
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return [name for name, tensor in tensors if tensor.is_meta]


def refuse_meta(model: nn.Module, reasons: Mapping[str, str] | None = None) -> None:
    """Refuse a model with tensors that have no data.

    Raises:
        ResidencyError: naming them, and why the first of them was not found.
    """
    names = on_meta(model)
    if names:
        first = (reasons or {}).get(names[0])
        raise ResidencyError(
            refusal(
                type(model).__name__,
                found=f"no data for {name_list(names)}" + (f" ({first})" if first else ""),
                expected="that each weight is in the model, in its hooks, or in what was passed",
                way_out="load the model again with lading.load, or pass a state_dict that has them",
            )
        )


def put_back(model: nn.Module, values: Mapping[str, torch.Tensor], marked: Collection[str] = ()) -> None:
    """Give tensors on meta their values; tied ones become one parameter again. The values are shared, not copied.

    Args:
        model: some of whose tensors are on meta; others stay as they are.
        values: full name → tensor of the right shape; cast where the model's tensor has another dtype.
        marked: names that were tied to some other name, which one is not known.
    """
    ties, slots = declared_ties(model), slots_by_name(model)
    real = [slot.get() for slot in slots.values() if not slot.get().is_meta]
    made: dict[int, torch.Tensor] = {}  # id of what is on meta → what will stand for it
    views: dict[object, torch.Tensor] = {}  # one source under several names
    roots: dict[int, torch.Tensor] = {}  # declared: id of what all of them are → the one that was met first
    alike: dict[object, list[torch.Tensor]] = {}  # where a marked one may find its like
    for tensor in real if marked else ():
        alike.setdefault((tensor.shape, tensor.dtype), []).append(tensor)
    for name, slot in slots.items():
        held = slot.get()
        if not held.is_meta or id(held) in made or name not in values:
            continue
        value = values[name].detach().to(held.dtype)
        root = ties.get(id(held), held)
        candidates = [roots.get(id(root), root)]
        if name in marked:
            candidates += alike.get((value.shape, value.dtype), ())
        known = views.get(_view_of(value)) if value.numel() else None
        if known is None:
            known = next((each for each in candidates if not each.is_meta and has_bits(each, value)), None)
        if known is None or type(known) is not type(held):
            known = _real_like(held, value)
        made[id(held)] = views[_view_of(value)] = known
        roots.setdefault(id(root), known)
        alike.setdefault((value.shape, value.dtype), []).extend([known] if name in marked else ())
    for slot in slots.values():
        if id(slot.get()) in made:
            slot.put(made[id(slot.get())])


def _view_of(tensor: torch.Tensor) -> object:
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def _real_like(held: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    if not isinstance(held, nn.Parameter):
        return value
    parameter = nn.Parameter(value, requires_grad=held.requires_grad)
    vars(parameter).update(vars(held))
    return parameter


def has_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Say whether two tensors are equal bit for bit, shape, dtype and device included."""
    if (one.shape, one.dtype, one.device) != (other.shape, other.dtype, other.device):
        return False
    return torch.equal(one.detach().reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))


def fill(model: nn.Module, laid_aside: LaidAside) -> None:
    """Give a model what was laid aside: to tensors on meta from anywhere, to real ones from the state dict.

    Raises:
        ResidencyError: a weight is nowhere, has another shape, is not the model's, or a folder holds another value for
            a real one.
    """
    slots, finder = slots_by_name(model), Finder()
    unknown = [name for name in laid_aside.state_dict if name not in slots]
    values: dict[str, torch.Tensor] = {}
    changed: list[str] = []
    for name, slot in slots.items():
        if name not in laid_aside.state_dict and name not in laid_aside.index:
            continue
        held, value = slot.get(), finder.find(laid_aside, name).detach()
        if held.shape != value.shape:
            unknown.append(name)
        elif held.is_meta:
            values[name] = value
        elif name in laid_aside.state_dict:
            if held.data_ptr() != value.data_ptr():
                held.data = value.to(device=held.device, dtype=held.dtype)
        elif not has_bits(held, value.to(device=held.device, dtype=held.dtype)):
            changed.append(name)
    if unknown or changed:
        found = f"other names or shapes: {name_list(unknown)}" if unknown else f"other values of {name_list(changed)}"
        subject = "state_dict" if unknown else f"offload folder {str(laid_aside.save_folder)!r}"
        expected = f"the weights of this {type(model).__name__}"
        way_out = "leave it out: the model's own weights are used, and need no folder"
        raise ResidencyError(refusal(subject, found=found, expected=expected, way_out=way_out))
    put_back(model, values)
    refuse_meta(model)
