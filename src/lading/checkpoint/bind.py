"""Fill any module with a checkpoint's tensors, completely and exactly, or leave it as it was.

Knows no architecture. Plain modules get their parameters and persistent buffers by name. A module with its own
``_load_from_state_dict`` or a load hook is asked to do it itself, in torch's order (parents first), with tensors that
are already checked and cast. What was one tensor before (a tied parameter, a shared module) is one tensor after.

Guarantees: on any error every slot is as before; on success no parameter or buffer of the module is on meta.
Thread rule: one thread, and nobody else may use the module meanwhile.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn
from torch.nn.modules.module import _IncompatibleKeys

from lading.checkpoint.catalog import Catalog
from lading.checkpoint.completeness import Names, Strictness, hold
from lading.checkpoint.dtypes import is_plain_float, require_compatible
from lading.checkpoint.empty import initialise, is_recipe
from lading.checkpoint.mapping import ShardMapping, tensors_of
from lading.checkpoint.report import LoadReport
from lading.checkpoint.slots import Slot, remember, settle_bytes, shape_refusal, slots_of
from lading.errors import CheckpointError, MissingTensorError, ShapeMismatchError, name_list, refusal
from lading.names import Rename, nearest, renamed


@dataclass(frozen=True, slots=True, kw_only=True)
class BindOptions:
    """Say how a module is to be filled. Immutable; `lading.load_into` documents each field."""

    rename: Rename | None = None
    dtype: torch.dtype | str | None = "auto"
    strict: Strictness = True
    copy: bool = False


@dataclass(slots=True)
class _Filling:
    """The state of one `bind` call. One thread."""

    module: nn.Module
    catalog: Catalog
    options: BindOptions
    state: dict[str, torch.Tensor]
    files: dict[str, Path]
    parts: list[tuple[str, nn.Module, dict[str, Slot]]] = field(default_factory=list)
    """Each module once, parents first: its prefix, itself, its own slots."""
    slots: dict[str, Slot] = field(default_factory=dict)
    groups: dict[str, list[str]] = field(default_factory=dict)
    """Name → all names of the same tensor, where there is more than one."""
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    trusted: list[str] = field(default_factory=list)
    """Prefixes of the modules that load themselves."""

    def file_of(self, name: str) -> str:
        """Name the shard of a tensor, for a message."""
        path = self.files.get(name)
        return self.catalog.describe() if path is None else str(path)


def bind(
    module: nn.Module, catalog: Catalog, mappings: Mapping[Path, ShardMapping], options: BindOptions
) -> LoadReport:
    """Fill ``module`` with a checkpoint's tensors.

    Raises:
        MissingTensorError: names that the module needs and the checkpoint has not; with ``strict=False`` only those
            that cannot be initialised.
        ShapeMismatchError: shapes differ, also with ``strict=False``.
        CheckpointError: unexpected names (``strict="exact"``), element types that cannot stand for each other,
            ambiguous names.
    """
    targets = _target_names(catalog, options.rename)
    tensors = tensors_of(catalog, mappings, copy=options.copy)
    filling = _Filling(
        module=module,
        catalog=catalog,
        options=options,
        state={target: tensors[name] for target, name in targets.items()},
        files={target: catalog.owners[name].path for target, name in targets.items()},
    )
    _find_slots(filling)
    _spread_over_ties(filling)
    _refuse_wrong_shapes(filling)
    with ExitStack() as undo:
        remember([part for _, part, _ in filling.parts], undo)
        _fill(filling)
        _tie(filling)
        _find_unexpected(filling)
        _initialise(filling)
        if any(part._load_state_dict_post_hooks for _, part, _ in filling.parts):
            _call_post_hooks(module, _IncompatibleKeys(filling.missing, filling.unexpected), set())
        _settle(filling)
        mapped, copied = settle_bytes(module, mappings, catalog.describe())
        undo.pop_all()
    return LoadReport(
        num_tensors=len(targets) - len(set(targets) & set(filling.unexpected)),
        mapped_bytes=mapped,
        copied_bytes=copied,
        missing=tuple(filling.missing),
        unexpected=tuple(filling.unexpected),
    )


def _target_names(catalog: Catalog, rename: Rename | None) -> dict[str, str]:
    """Give each tensor its name in the module; module's name → checkpoint's name."""
    targets: dict[str, str] = {}
    for name in [*catalog.owners, *catalog.aliases]:
        target = renamed(name, rename)
        stored = catalog.aliases.get(name, name)
        if target is not None and targets.setdefault(target, stored) != stored:
            raise CheckpointError(
                refusal(
                    catalog.describe(),
                    found=f"{targets[target]!r} and {stored!r} both renamed to {target!r}",
                    expected="one tensor for each name",
                    way_out="let rename give None for the one to leave out",
                )
            )
    return targets


def _find_slots(filling: _Filling) -> None:
    names: dict[int, list[str]] = {}
    seen: set[nn.Module] = set()
    for path, module in filling.module.named_modules(remove_duplicate=False):
        prefix = f"{path}." if path else ""
        own = slots_of(module, prefix)
        if module not in seen:
            seen.add(module)
            filling.parts.append((prefix, module, own))
        filling.slots.update(own)
        for name, slot in own.items():
            names.setdefault(id(slot.get()), []).append(name)
    filling.groups = {name: group for group in names.values() if len(group) > 1 for name in group}


def _spread_over_ties(filling: _Filling) -> None:
    """Give every name of a tied tensor the tensor that the checkpoint has under one of them."""
    for name, group in filling.groups.items():
        if name != group[0]:
            continue
        present = [alias for alias in group if alias in filling.state]
        for other in present[1:]:
            first, second = filling.state[present[0]], filling.state[other]
            if first.data_ptr() != second.data_ptr() and not _same_bits(first, second):
                raise CheckpointError(
                    refusal(
                        f"{filling.file_of(other)}, tensors {present[0]!r} and {other!r}",
                        found="different values",
                        expected="one value, because the module ties them",
                        way_out="untie them in the module, or let rename leave one out",
                    )
                )
        for alias in group if present else ():
            filling.state[alias] = filling.state[present[0]]
            filling.files.setdefault(alias, filling.files[present[0]])


def _same_bits(first: torch.Tensor, second: torch.Tensor) -> bool:
    if first.shape != second.shape or first.dtype != second.dtype:
        return False
    return torch.equal(first.contiguous().view(torch.uint8), second.contiguous().view(torch.uint8))


def _loads_itself(module: nn.Module) -> bool:
    return (
        type(module)._load_from_state_dict is not nn.Module._load_from_state_dict
        or bool(module._load_state_dict_pre_hooks)
        or type(module).set_extra_state is not nn.Module.set_extra_state
    )


def _refuse_wrong_shapes(filling: _Filling) -> None:
    """Refuse every wrong shape at once, before anything is cast or bound.

    Not where a hook may rename first, nor in a module that loads itself: those are looked at when they have.
    """
    if any(module._load_state_dict_pre_hooks for _, module, _ in filling.parts):
        return
    refused = [
        _shape_refusal(filling, name, slot.get())
        for name, slot in filling.slots.items()
        if name in filling.state and not _loads_itself(slot.owner) and not _has_shape(filling.state[name], slot.get())
    ]
    if refused:
        more = f" … ({len(refused)} in all)" if len(refused) > 10 else ""
        raise ShapeMismatchError("; ".join(refused[:10]) + more)


def _has_shape(tensor: torch.Tensor, held: torch.Tensor) -> bool:
    is_lazy = type(held) is not nn.Parameter and isinstance(held, (nn.UninitializedParameter, nn.UninitializedBuffer))
    return is_lazy or tensor.shape == held.shape


def _shape_refusal(filling: _Filling, name: str, held: torch.Tensor) -> str:
    return shape_refusal(f"{filling.file_of(name)}, tensor {name!r}", filling.state[name].shape, held.shape)


def _fill(filling: _Filling) -> None:
    for prefix, module, own in filling.parts:
        if _loads_itself(module):
            _let_load(filling, module, prefix, own)
            continue
        for name, slot in own.items():
            if name not in filling.state:
                filling.missing.append(name)
                continue
            if not _has_shape(filling.state[name], slot.get()):
                raise ShapeMismatchError(_shape_refusal(filling, name, slot.get()))
            _require_kind(filling, name, slot.get(), filling.state[name])
            _replace(filling, name, slot, _cast(filling, name, slot.get()))


def _require_kind(filling: _Filling, name: str, held: torch.Tensor, tensor: torch.Tensor) -> None:
    if tensor.dtype != held.dtype:
        require_compatible(tensor.dtype, held.dtype, f"{filling.file_of(name)}, tensor {name!r}")


def _cast(filling: _Filling, name: str, held: torch.Tensor) -> torch.Tensor:
    """Give a tensor the dtype that was asked for, once for all names of a tie."""
    tensor = filling.state[name]
    dtype = held.dtype if filling.options.dtype is None else filling.options.dtype
    if not isinstance(dtype, torch.dtype) or not is_plain_float(tensor.dtype) or dtype == tensor.dtype:
        return tensor
    cast = tensor.to(dtype)
    for alias in (name, *filling.groups.get(name, ())):
        filling.state[alias] = cast
    return cast


def _let_load(filling: _Filling, module: nn.Module, prefix: str, own: Mapping[str, Slot]) -> None:
    """Ask a module to load its own tensors, and hold it to the same rules; real tensors keep their identity."""
    before = {name: slot.get() for name, slot in own.items()}
    for name, held in before.items():
        if name in filling.state:
            _cast(filling, name, held)
    missing: list[str] = []
    unexpected: list[str] = []
    errors: list[str] = []
    metadata = {"assign_to_params_buffers": True}
    module._load_from_state_dict(filling.state, prefix, metadata, True, missing, unexpected, errors)
    for name in [name for name, held in before.items() if name in filling.state]:
        held, now = before[name], own[name].get()
        if now is not held and not _has_shape(now, held):
            errors.append(_shape_refusal(filling, name, held))
        _require_kind(filling, name, held, now)
    if errors:
        raise (ShapeMismatchError if any("size mismatch" in line for line in errors) else CheckpointError)(
            refusal(
                f"{filling.catalog.describe()}, module {prefix.rstrip('.') or '(root)'!r} ({type(module).__name__})",
                found="; ".join(errors[:10]),
                expected="that its own loading accepts the checkpoint",
                way_out="see the module's _load_from_state_dict",
            )
        )
    for name, held in before.items():
        now = own[name].get()
        if now is not held and not held.is_meta:
            held.data = now.data.to(held.device)
            own[name].put(held)
    filling.missing += missing
    filling.unexpected += unexpected
    filling.trusted.append(prefix)


def _replace(filling: _Filling, name: str, slot: Slot, tensor: torch.Tensor) -> None:
    held = slot.get()
    if not held.is_meta:
        held.data = tensor.to(held.device)
    elif not slot.is_parameter:
        slot.put(tensor)
    elif type(held) is not nn.Parameter:
        raise CheckpointError(
            refusal(
                f"{filling.file_of(name)}, tensor {name!r}",
                found=f"a parameter of type {type(held).__name__} in the module",
                expected="torch.nn.Parameter, whose making is known",
                way_out="give its module a _load_from_state_dict, or build it outside lading.empty()",
            )
        )
    else:
        slot.put(_parameter_like(held, tensor))


def _parameter_like(held: torch.Tensor, tensor: torch.Tensor) -> nn.Parameter:
    parameter = nn.Parameter(tensor, requires_grad=held.requires_grad)
    for attribute, value in vars(held).items():
        if not is_recipe(attribute):
            setattr(parameter, attribute, value)
    return parameter


def _tie(filling: _Filling) -> None:
    """Make one object again of what was one object before."""
    for name, group in filling.groups.items():
        if name != group[0]:
            continue
        filled = next((alias for alias in group if not filling.slots[alias].get().is_meta), group[0])
        for alias in group:
            filling.slots[alias].put(filling.slots[filled].get())


def _find_unexpected(filling: _Filling) -> None:
    names = set(filling.unexpected)
    for name in filling.state:
        owner, _, _ = name.rpartition(".")
        if name not in filling.slots and (f"{owner}." if owner else "") not in filling.trusted:
            names.add(name)
    claimed = {target for alias in filling.catalog.aliases if (target := renamed(alias, filling.options.rename))}
    filling.unexpected = sorted(names - claimed)  # what a file says of left-out names is a claim, no tensor


def _initialise(filling: _Filling) -> None:
    """Give missing parameters the values that the module's own code would have drawn, where that is known."""
    slots = [filling.slots[name] for name in filling.missing if name in filling.slots]
    absent = {id(slot.get()): slot.get() for slot in slots if slot.get().is_meta}
    values = dict(zip(absent, initialise(absent.values()), strict=True))
    made = {
        key: _parameter_like(absent[key], _as_float(value, filling.options.dtype))
        for key, value in values.items()
        if value is not None
    }
    for slot in filling.slots.values():
        if id(slot.get()) in made:
            slot.put(made[id(slot.get())])


def _call_post_hooks(module: nn.Module, names: _IncompatibleKeys, done: set[nn.Module]) -> None:
    """Call load hooks in torch's order, children first; they may take names off the lists."""
    for child in module.children():
        if child not in done:
            _call_post_hooks(child, names, done)
    done.add(module)
    for hook in module._load_state_dict_post_hooks.values():
        hook(module, names)


def _settle(filling: _Filling) -> None:
    """Refuse what is missing or left over as strictly as was asked, and in any case what nothing could initialise."""
    unexpected = filling.unexpected
    names = Names(
        missing=filling.missing,
        unexpected=unexpected,
        owner=type(filling.module).__name__,
        checkpoint=filling.catalog.describe(),
        file_of=filling.file_of,
        missing_way_out="rename the checkpoint's names, or initialise what is missing with strict=False",
        unexpected_way_out='rename them, or leave them out without strict="exact"',
        alike=nearest(unexpected[0], filling.slots) if unexpected else (),
    )
    hold(names, filling.options.strict)
    lost = [name for name in filling.missing if name in filling.slots and filling.slots[name].get().is_meta]
    if lost:
        raise MissingTensorError(
            refusal(
                filling.catalog.describe(),
                found=f"no tensor for {name_list(lost)} and no record of how the module initialises them",
                expected="a module built inside lading.empty(), or real",
                way_out="build the module inside `with lading.empty():`",
            )
        )


def _as_float(value: torch.Tensor, dtype: torch.dtype | str | None) -> torch.Tensor:
    return value.to(dtype) if isinstance(dtype, torch.dtype) and is_plain_float(value.dtype) else value
