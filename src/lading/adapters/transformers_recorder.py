"""Read what transformers' recorders of outputs go by: what was asked for, and which modules give it.

The recorder is the decorator around a model's ``forward``. It reads the flags from the call's arguments, else from the
configuration, and the modules from ``_can_record_outputs``, each release by rules of its own: `transformers_releases`
tells them. What follows for one model stands here, and for its calls in `transformers_flags`. Registers nothing.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from types import CodeType
from typing import Any

import transformers
from torch import nn
from transformers import PreTrainedModel

from lading.adapters.transformers_releases import find_recording
from lading.adapters.transformers_sites import is_meant
from lading.errors import CaptureError, refusal

RECORDING = find_recording()
BY_HOOKS = RECORDING.rules.by_hooks
"""Whether the recorder hooks layers, with the innermost model's call alone recording; else it replaces forwards."""
Task = tuple[str, int, bool]
"""A key of the output, the element that a module gives for it, and whether its first input comes before."""
Specs = list[tuple[str, Any]]
"""Keys and one declaration of modules for each: a class, the end of a path, or a description."""

_CODE: CodeType = RECORDING.decorated.__code__
CODES: frozenset[CodeType] = frozenset({_CODE, *(each for each in _CODE.co_consts if isinstance(each, CodeType))})
"""The code that asks flags whether they are on: all that it decorates have it in common."""
_COMPUTED = ("eager", "eager_paged", "flex_attention")
"""The implementations of attention that give weights, for the recorder that warns of the others."""
_DECORATED = "LlamaModel"
"""A model whose forward every known release decorates."""


def find_recorder(function: Any) -> Any:
    """Give the recorder among the decorators of a function; None where it is not there."""
    while function is not None and getattr(function, "__code__", None) is not _CODE:
        function = getattr(function, "__wrapped__", None)
    return function


def require_known_recorder() -> None:
    """Make sure that a model without a recorder is one that collects by itself, not one whose recorder is unknown.

    Raises:
        CaptureError: transformers decorates its own models with something else.
    """
    if find_recorder(getattr(transformers, _DECORATED).forward) is None:
        raise CaptureError(
            refusal(
                f"{_DECORATED}.forward in transformers {transformers.__version__}",
                found="no recorder of outputs that is known here",
                expected=f"{RECORDING.decorated.__qualname__.split('.')[0]} around it",
                way_out="install a transformers that lading's docs/versions.md lists, or use lading.capture",
            )
        )


def declared(model: nn.Module) -> dict[str, Any]:
    """Give what a model declares: keys of its output, and what modules give them.

    Raises:
        CaptureError: the recorder knows nothing of what its class declares.
    """
    return RECORDING.declared(model)


def asked(model: Any, given: dict[str, Any]) -> dict[str, Any]:
    """Give what is asked for under each key, by a call's arguments, else by the configuration."""
    config = model.config
    attentions = given.get("output_attentions", getattr(config, "output_attentions", False))
    default = False if BY_HOOKS else attentions
    found = {key: given.get(f"output_{key}", getattr(config, f"output_{key}", default)) for key in declared(model)}
    with_attentions = ("cross_attentions", "mask_decoder_attentions") if BY_HOOKS else ("cross_attentions",)
    if BY_HOOKS or "attentions" in found:
        found |= {key: attentions for key in with_attentions if key in found}
    if RECORDING.rules.warns_of_attentions and found.get("attentions"):
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


def is_joint(model: nn.Module, key: str) -> bool:
    """Say whether each second entry of one key belongs to another: the cross-attentions of older releases."""
    found = declared(model).get(key)
    return RECORDING.rules.joins_attentions and key == "attentions" and isinstance(found, list) and len(found) == 2


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
