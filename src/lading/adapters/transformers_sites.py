"""Find the sites behind the names that transformers gives to what its models can return: ``hidden_states`` and others.

A model declares them in ``_can_record_outputs``, itself and each model inside it: a name → a class of modules, an index
into their outputs and a part of their path. What transformers does with that declaration is done here with sites: the
first hidden state is the input of the first layer, the last one the model's own output where its decorator says so.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from lading.adapters.transformers_releases import rules
from lading.errors import CaptureError, name_list, refusal
from lading.recording.groups import Group
from lading.recording.sites import Site

_ENDS = ("prenorm", "postnorm")


def declared_groups(model: nn.Module, name: str, end: str = "") -> tuple[Group, ...]:
    """Give the groups of one name, one for each model inside that declares it.

    Args:
        model: as it is captured.
        name: as it is declared.
        end: of hidden states, ``"prenorm"`` for what the last layer gave, ``"postnorm"`` for the model's output;
            empty: as the architecture says.

    Raises:
        CaptureError: no model inside declares it, or only some do; the message lists what is declared.
    """
    if end and (name != "hidden_states" or end not in _ENDS):
        raise CaptureError(
            refusal(
                f"site '{name}:{end}'",
                found=f"{end!r} of {name}",
                expected=f"hidden_states with one of {name_list(_ENDS)}",
                way_out=f"write {name!r}",
            )
        )
    owners = [(path, owner) for path, owner in model.named_modules() if _declared(owner)]
    found = [(path, owner) for path, owner in owners if name in _declared(owner)]
    groups = [group for path, owner in found if (group := _group(path, owner, name, end)) is not None]
    if not groups:
        known = sorted({key for _, owner in owners for key in _declared(owner)})
        raise CaptureError(
            refusal(
                f"{name!r} of {type(model).__name__}",
                found="no declaration of it",
                expected=f"one of {name_list(known)}" if known else "a model that declares what it can return",
                way_out="name the modules, such as 'encoder.layer.*'",
            )
        )
    silent = [path for path, inner in model.named_modules() if _is_silent(inner)]
    if silent:
        raise CaptureError(
            refusal(
                f"{name!r} of {type(model).__name__}",
                found=f"no declaration of anything in {name_list(silent)}",
                expected="one in each model inside: a part of the answer would look like all of it",
                way_out=f"name the modules of each, such as '{silent[0]}.*'",
            )
        )
    if len(groups) == 1:
        return (_named(groups[0], name),)
    return tuple(groups)


def _declared(owner: nn.Module) -> dict[str, Any]:
    declared = getattr(owner, "_can_record_outputs", None) if isinstance(owner, PreTrainedModel) else None
    return declared if isinstance(declared, dict) else {}


def _is_silent(inner: nn.Module) -> bool:
    """Say whether a model has layers, and neither it nor any model inside it declares what it can return."""
    if not isinstance(inner, PreTrainedModel) or any(_declared(part) for part in inner.modules()):
        return False
    has_inner = any(isinstance(part, PreTrainedModel) for part in inner.modules() if part is not inner)
    return not has_inner and any(isinstance(part, nn.ModuleList) for part in inner.modules())


def _named(group: Group, name: str) -> Group:
    return dataclasses.replace(group, name=name)


def _group(path: str, owner: nn.Module, name: str, end: str) -> Group | None:
    declared = _declared(owner)[name]
    members: dict[str, Site] = {}
    wanted = declared if isinstance(declared, list) else [declared]
    is_hidden = "hidden_states" in name
    for member_path, module in _own_modules(owner):
        for each in wanted:
            index = getattr(each, "index", 0 if is_hidden else 1)
            if is_meant(each, member_path, module):
                full = _join(path, member_path)
                members.setdefault(full, _site(full, module, f"output[{index}]", index))
    if not members:
        return None
    first = next(iter(members.values())) if name == "hidden_states" else None
    takes_input = all(getattr(each, "capture_initial_hidden_state", True) for each in wanted)
    return Group(
        name=_join(path, name),
        owner=owner,
        first=None if first is None or not takes_input else _input(first),
        members=tuple(members.values()),
        last=_last(path, owner, end) if name == "hidden_states" else None,
    )


def _last(path: str, owner: nn.Module, end: str) -> Site | None:
    if end == "prenorm" or not (end or ends_with_own_output(owner)):
        return None
    site = _site(path, owner, "output[last_hidden_state]", "last_hidden_state")
    return dataclasses.replace(site, position=0, is_optional=not end)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path and name else path or name


def _site(path: str, module: nn.Module, suffix: str, element: str | int) -> Site:
    return Site(name=f"{path}:{suffix}", path=path, module=module, side="output", element=element, is_optional=True)


def _input(site: Site) -> Site:
    return Site(name=f"{site.path}:input", path=site.path, module=site.module, side="input", element=None)


def _own_modules(owner: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules of a model that are not those of a model inside it."""
    inner: set[str] = set()
    for path, module in owner.named_modules():
        if path and isinstance(module, PreTrainedModel):
            inner.add(path)
        if not any(path == each or path.startswith(f"{each}.") for each in inner):
            yield path, module


def is_meant(declared: Any, path: str, module: nn.Module) -> bool:
    """Say whether a declaration means a module; the path is that below the declaring model, or below one around it."""
    target = getattr(declared, "target_class", declared)
    suffix = getattr(declared, "class_name", None) or (declared if isinstance(declared, str) else None)
    part = getattr(declared, "layer_name", None)
    is_one = (isinstance(target, type) and isinstance(module, target)) or (suffix is not None and path.endswith(suffix))
    if part is None or not is_one:
        return is_one
    return f".{part.strip('.')}." in f".{path}." if rules().matches_whole_parts else part in path


def ends_with_own_output(owner: nn.Module) -> bool:
    """Say whether the last hidden state is the model's output: what its configuration, else its decorator says."""
    said = getattr(owner.config, "tie_last_hidden_states", None) if rules().heeds_tie_in_config else None
    forward: Any = type(owner).forward
    while said is None and forward is not None:  # decorators around it
        said = inspect.getclosurevars(forward).nonlocals.get("tie_last_hidden_states")
        forward = getattr(forward, "__wrapped__", None)
    return said is not False
