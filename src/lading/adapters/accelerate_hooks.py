"""Take over a model that accelerate hooked: find every weight, take the hooks off, leave nothing behind.

Accelerate replaces ``forward`` on each module's instance, keeps ``_old_forward`` and ``_hf_hook`` there, wraps ``to``
and ``cuda`` of the model, and parks offloaded weights on meta. All of that is undone here.

Imports no accelerate: its hooks are known by their attributes (1.15). Thread rule: one thread, and nobody in a forward.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from lading import compat
from lading.adapters.accelerate_weights import (
    Finder,
    has_bits,
    put_back,
    refuse_meta,
    restored_on_failure,
    slots_by_name,
)
from lading.errors import CheckpointError, ResidencyError, name_list, refusal

_LOG = logging.getLogger(__name__)
_WRAPPED = ("to", "cuda", "npu", "xpu", "mlu", "sdaa", "musa", "neuron")
_KEPT = ("_hf_hook", "_old_forward", "forward", "hf_device_map", *_WRAPPED)


def _hooked(model: nn.Module) -> dict[str, nn.Module]:
    """Give the modules that accelerate hooked by their names.

    Raises:
        ResidencyError: a hook of accelerate stands under another name than those known here.
    """
    hooked = {name: module for name, module in model.named_modules() if "_hf_hook" in vars(module)}
    for path, module in model.named_modules():
        if "forward" not in vars(module) or path in hooked:
            continue
        for name, value in vars(module).items():
            if type(value).__module__ == "accelerate.hooks":
                raise ResidencyError(
                    refusal(
                        f"module {path!r}",
                        found=f"a {type(value).__name__} of accelerate under {name!r}",
                        expected="hooks under '_hf_hook', as in accelerate 1.15",
                        way_out="remove it first: accelerate.hooks.remove_hook_from_module(module)",
                    )
                )
    return hooked


def refuse_hooked(model: nn.Module) -> None:
    """Refuse a model that accelerate hooked.

    Raises:
        ResidencyError: naming the hooked modules, or a hook under a name that is not known.
    """
    hooked = [name or "(the model)" for name in _hooked(model)]
    if hooked:
        raise ResidencyError(
            refusal(
                type(model).__name__,
                found=f"hooks of accelerate on {name_list(hooked, 3)}",
                expected="a model that nobody else streams",
                way_out="pass replace_hooks=True to lading.offload, or load the model without a device_map",
            )
        )


@contextmanager
def unhooked(model: nn.Module, *, replace: bool) -> Iterator[None]:
    """Free a model of accelerate's hooks, with real weights inside, for the body and after it.

    Weights in safetensors files and ``.dat`` files become views of these files, those in a state dict share its
    memory. If the body raises, the hooks and everything else are back as before.

    Args:
        model: hooked or not; without hooks nothing happens.
        replace: False refuses a hooked model.

    Raises:
        ResidencyError: weights that cannot be recovered, by name; hooks that do more than align devices; or a hooked
            model that is not to be changed.
    """
    hooked = _hooked(model)
    if not hooked:
        yield
        return
    if not replace:
        refuse_hooked(model)
    _refuse_foreign(hooked)
    with restored_on_failure(model), ExitStack() as undo:
        values, marked, reasons = _collect(hooked)
        put_back(model, values, marked)
        refuse_meta(model, reasons)
        _load_left_out(model, hooked)
        for module in dict.fromkeys([model, *hooked.values()]):
            _take_off(module, undo)
        yield
        undo.pop_all()


def _hooks_of(module: nn.Module) -> Iterator[Any]:
    waiting = [vars(module)["_hf_hook"]]
    while waiting:
        hook = waiting.pop(0)
        if type(hook).__name__ == "SequentialHook":
            waiting[:0] = hook.hooks
        else:
            yield hook


def _refuse_foreign(hooked: dict[str, nn.Module]) -> None:
    """Refuse hooks that are not about devices: what they do would be lost."""
    for name, module in hooked.items():
        for hook in _hooks_of(module):
            if type(hook).__name__ not in ("AlignDevicesHook", "ModelHook"):
                raise ResidencyError(
                    refusal(
                        f"module {name!r}",
                        found=f"an accelerate hook of type {type(hook).__name__}",
                        expected="AlignDevicesHook, which lading stands in for",
                        way_out="remove it first: accelerate.hooks.remove_hook_from_module(module)",
                    )
                )


def _offloads(hook: Any) -> bool:
    """Say whether a hook parks weights: a plain ModelHook does nothing."""
    return type(hook).__name__ == "AlignDevicesHook" and bool(hook.offload)


def _collect(hooked: dict[str, nn.Module]) -> tuple[dict[str, torch.Tensor], set[str], dict[str, str]]:
    """Find what the hooks parked on meta: values, names marked as tied, and why others were not found."""
    finder = Finder()
    values: dict[str, torch.Tensor] = {}
    marked: set[str] = set()
    reasons: dict[str, str] = {}
    for path, module in hooked.items():
        for hook in _hooks_of(module):
            if not _offloads(hook):
                continue
            recurse = hook.place_submodules
            for name, held in [*module.named_parameters(recurse=recurse), *module.named_buffers(recurse=recurse)]:
                full_name = f"{path}.{name}" if path else name
                if not held.is_meta or full_name in values:
                    continue
                if type(held) not in (nn.Parameter, torch.Tensor):
                    reasons[full_name] = f"it is a {type(held).__name__}, whose state stands elsewhere"
                    continue
                try:
                    value = finder.find(hook.weights_map, name)
                except (CheckpointError, KeyError) as error:
                    reasons[full_name] = str(error) if isinstance(error, CheckpointError) else "in no map of its hook"
                    continue
                if value.shape != held.shape or value.is_meta:
                    reasons[full_name] = f"what its hook holds has shape {list(value.shape)} on {value.device}"
                    continue
                values[full_name] = value
                if name in hook.tied_params_names:
                    marked.add(full_name)
    return values, marked, reasons


def _load_left_out(model: nn.Module, hooked: dict[str, nn.Module]) -> None:
    """Load the buffers that ``from_pretrained`` of transformers 4 leaves as they were built, where a module is on disk.

    They are in the index, and nobody reads them from there unless ``offload_buffers=True``: BatchNorm's statistics or
    a router's bias are initial values then, and accelerate's outputs are wrong without an error.
    """
    is_transformers = any(kind.__name__ == "PreTrainedModel" for kind in type(model).__mro__)
    if compat.has_transformers5() or not is_transformers:
        return
    finder, slots = Finder(), slots_by_name(model)
    loaded = []
    for path, module in hooked.items():
        for hook in _hooks_of(module):
            if not _offloads(hook) or hook.offload_buffers:
                continue
            for name, held in module.named_buffers(recurse=hook.place_submodules):
                full_name = f"{path}.{name}" if path else name
                value = finder.find_in_index(hook.weights_map, name) if full_name in slots else None
                if value is not None and value.shape == held.shape and not has_bits(held, value.to(held)):
                    slots[full_name].put(value.to(held))
                    loaded.append(full_name)
    if loaded:
        _LOG.warning("loaded from their files: %s, which transformers 4 left out of modules on disk", name_list(loaded))


def _take_off(module: nn.Module, undo: ExitStack) -> None:
    """Give a module its own ``forward`` and methods back; register on ``undo`` what hooks it again."""
    own = vars(module)
    before = {name: own[name] for name in _KEPT if name in own}
    kind: Any = type(module)
    forward_of_class = vars(kind).get("forward")

    def restore() -> None:
        for name in _KEPT:
            own.pop(name, None)
        own.update(before)
        if forward_of_class is not None and vars(kind).get("forward") is not forward_of_class:
            kind.forward = forward_of_class

    undo.callback(restore)
    for name in ("_hf_hook", "hf_device_map"):
        own.pop(name, None)
    original = own.pop("_old_forward", None)
    if original is not None and "forward" in own:
        _unwrap(module, "forward", original)
    elif original is not None:  # of a traced module accelerate replaces the class's own
        kind.forward = getattr(original, "__func__", original)
    for name in _WRAPPED:
        if hasattr(own.get(name), "__wrapped__"):
            _unwrap(module, name, own[name].__wrapped__)


def _unwrap(module: nn.Module, name: str, original: Any) -> None:
    """Take an instance's attribute off; an original that was the instance's own and not its class's comes back."""
    own = vars(module)
    del own[name]
    if getattr(original, "__func__", None) is not getattr(type(module), name, None):
        own[name] = original
