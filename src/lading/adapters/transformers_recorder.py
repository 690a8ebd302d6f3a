"""Read what transformers' recorders of outputs go by: what was asked for, and which modules give it.

The recorder is the decorator around a model's ``forward``: in transformers 4 it replaces layers' ``forward`` for the
time of a call, in transformers 5 it hooks them. Both read the flags from the call's arguments, else from the
configuration, and the modules from ``_can_record_outputs``, each by rules of its own. Those rules stand here, and what
follows from them in `transformers_flags`. Registers nothing.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from types import CodeType
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.utils import generic

from lading.adapters.transformers_sites import is_meant

try:
    from transformers.utils import output_capturing
except ImportError:  # transformers 4, and the first releases of 5
    output_capturing = None

BY_HOOKS = output_capturing is not None
"""Whether the recorder hooks layers, with the innermost model's call alone recording; else it replaces forwards."""
Task = tuple[str, int, bool]
"""A key of the output, the element that a module gives for it, and whether its first input comes before."""
Specs = list[tuple[str, Any]]
"""Keys and one declaration of modules for each: a class, the end of a path, or a description."""

_DECORATED = (output_capturing.capture_outputs if BY_HOOKS else generic.check_model_inputs)()(lambda self: None)
CODES: frozenset[CodeType] = frozenset(
    {_DECORATED.__code__, *(each for each in _DECORATED.__code__.co_consts if isinstance(each, CodeType))}
)
"""The code that asks flags whether they are on: all that it decorates have it in common."""
_COMPUTED = ("eager", "eager_paged", "flex_attention")
"""The implementations of attention that give weights, for the recorder that warns of the others."""


def find_recorder(function: Any) -> Any:
    """Give the recorder among the decorators of a function; None where it is not there."""
    while function is not None and getattr(function, "__code__", None) is not _DECORATED.__code__:
        function = getattr(function, "__wrapped__", None)
    return function


def declared(model: nn.Module) -> dict[str, Any]:
    """Give what a model declares: keys of its output, and what modules give them."""
    registry = output_capturing._CAN_RECORD_REGISTRY if BY_HOOKS else generic._CAN_RECORD_REGISTRY
    found: dict[str, Any] = registry.get(model if BY_HOOKS else str(type(model))) or {}
    return found


def asked(model: Any, given: dict[str, Any]) -> dict[str, Any]:
    """Give what is asked for under each key, by a call's arguments, else by the configuration."""
    config = model.config
    attentions = given.get("output_attentions", getattr(config, "output_attentions", False))
    default = False if BY_HOOKS else attentions
    found = {key: given.get(f"output_{key}", getattr(config, f"output_{key}", default)) for key in declared(model)}
    with_attentions = ("cross_attentions", "mask_decoder_attentions") if BY_HOOKS else ("cross_attentions",)
    if BY_HOOKS or "attentions" in found:
        found |= {key: attentions for key in with_attentions if key in found}
    if not BY_HOOKS and found.get("attentions"):
        _warn_of_attentions(config)
    return {key: value for key, value in found.items() if value}


def _warn_of_attentions(config: Any) -> None:
    parts = [config, *(getattr(config, name, None) for name in config.sub_configs)]
    named = [getattr(part, "_attn_implementation", None) for part in parts if part is not None]
    if any(each not in _COMPUTED for each in named):
        warnings.warn(
            f"`output_attentions=True` is not supported with attention implementations other than {list(_COMPUTED)}: "
            "use `model.set_attn_implementation('eager')`",
            UserWarning,
            stacklevel=2,
        )


def selected(model: nn.Module, value: Any, count: int) -> set[int] | None:
    """Give the positions of the hidden states that are wanted; None for all of them.

    Args:
        model: whose.
        value: of the flag.
        count: of the states, for the recorder that knows no positions.
    """
    if value is None or isinstance(value, bool):
        return None
    listed = [value] if isinstance(value, int) else list(value)
    if BY_HOOKS:  # before 5.23 a list means True there
        find = getattr(output_capturing, "resolve_hidden_states_indices", None)
        return None if find is None else set(find(model, listed))
    return {each % count for each in listed if -count <= each < count}


def is_joint(model: nn.Module, key: str) -> bool:
    """Say whether each second entry of one key belongs to another: transformers 4's cross-attentions."""
    found = declared(model).get(key)
    return not BY_HOOKS and key == "attentions" and isinstance(found, list) and len(found) == 2


def own_sites(model: nn.Module) -> Iterator[tuple[nn.Module, list[Task]]]:
    """Yield the modules that one model's calls record from."""
    specs = _specs(model)
    if BY_HOOKS:
        yield from _walk(model, "", specs)
        return
    for path, module in model.named_modules():
        if found := _tasks(specs, path, module):
            yield module, found


def _walk(module: nn.Module, path: str, specs: Specs) -> Iterator[tuple[nn.Module, list[Task]]]:
    """Go down as the recorder with hooks does: each model inside goes by its own declaration."""
    for name, child in module.named_children():
        inner = _specs(child) if isinstance(child, PreTrainedModel) else specs
        yield from _walk(child, f"{path}.{name}", inner)
    if found := _tasks(specs, path, module):
        yield module, found


def _specs(model: nn.Module) -> Specs:
    others = (each for name, each in vars(type(model)).items() if name != "forward")
    if find_recorder(type(model).forward) is None and any(find_recorder(each) for each in others):
        return []  # such a method records by itself, and keeps its layers from the model around it
    found = declared(model).items()
    return [(key, each) for key, value in found for each in (value if isinstance(value, list) else [value])]


def _tasks(specs: Specs, path: str, module: nn.Module) -> list[Task]:
    """Give what one module is declared for."""
    tasks = []
    for key, spec in specs:
        if is_meant(spec, path, module):
            index = getattr(spec, "index", 0 if "hidden_states" in key else 1)
            takes_input = key == "hidden_states" and getattr(spec, "capture_initial_hidden_state", True)
            tasks.append((key, index, takes_input))
    return tasks
