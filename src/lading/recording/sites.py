"""Find the modules that a capture asks for: by name, by pattern, by class; their inputs or outputs, or one element.

A site is written ``path``, ``path:input`` or ``path:output``, with an element in brackets behind it where a module
takes or gives several: ``layers.3:output[1]``, ``model:output[last_hidden_state]``, ``layers.3:input[position_ids]``.
Between dots ``*`` stands for any name, ``{0,6,-1}`` for one of several; a negative number counts from the end of the
numbered children beside it. A class stands for all its instances.

Knows modules and names; registers nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from lading.errors import CaptureError, name_list, refusal
from lading.names import nearest

_WRITTEN = re.compile(r"(?P<path>[^:\[\]]*)(?::(?P<side>input|output))?(?:\[(?P<element>[^\]]+)\])?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """One place in one model whose tensor is kept. Immutable."""

    name: str
    """As it is looked up in what was seen: the path, with side and element where they were written."""
    path: str
    module: nn.Module
    side: str
    """``"input"`` or ``"output"``."""
    element: str | int | None
    """Which of several; None for the only or the first tensor."""
    is_optional: bool = False
    """Whether calls in which it is None are passed over."""
    position: int | None = None
    """Where a named element stands in a plain tuple, for models that can give either; None: nowhere."""

    def find(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> torch.Tensor | None:
        """Take the tensor of this site out of one call; None for an optional one that is not there.

        Raises:
            CaptureError: there is none.
        """
        value = output if self.side == "output" else _Arguments(args, kwargs)
        is_plain = self.position is not None and type(value) is tuple
        found = _element(value, self.position if is_plain else self.element)
        if found is None and self.is_optional:
            return None
        if not isinstance(found, torch.Tensor):
            raise CaptureError(
                refusal(
                    f"site {self.name!r}",
                    found=f"{type(found).__name__} in {_describe(value)}",
                    expected="a tensor",
                    way_out=f"name an element that is one, such as '{self.path}:{self.side}[0]'",
                )
            )
        return found


class _Arguments:
    """What a module is called with, by position or by name."""

    def __init__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self.args = args
        self.kwargs = kwargs

    def values(self) -> Iterator[Any]:
        yield from self.args
        yield from self.kwargs.values()


def _element(value: Any, element: str | int | None) -> Any:
    """Take a named or numbered one of several, or the first tensor; None where there is none."""
    if isinstance(value, torch.Tensor):
        return value if element in (None, 0, -1) else None
    if isinstance(element, str):
        named = value.kwargs if isinstance(value, _Arguments) else value
        return named.get(element) if isinstance(named, Mapping) else getattr(named, element, None)
    listed: list[Any] = []
    if isinstance(value, (_Arguments, Mapping)):
        listed = list(value.values())
    elif isinstance(value, (list, tuple)):
        listed = list(value)
    if element is None:
        return next((each for each in listed if isinstance(each, torch.Tensor)), None)
    return listed[element] if -len(listed) <= element < len(listed) else None


def _describe(value: Any) -> str:
    if isinstance(value, _Arguments):
        return f"{len(value.args)} positional arguments and {name_list(value.kwargs)}"
    if isinstance(value, Mapping):
        return f"{type(value).__name__} of {name_list(map(str, value))}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return f"{type(value).__name__} of {len(value)}"
    return type(value).__name__


def resolve(model: nn.Module, wanted: str | type[nn.Module] | Iterable[str | type[nn.Module]]) -> tuple[Site, ...]:
    """Find the sites that patterns and classes stand for, each once, in the order of asking and then of the model.

    Raises:
        CaptureError: one stands for nothing; the message lists the nearest names.
    """
    asked = [wanted] if isinstance(wanted, (str, type)) else list(wanted)
    modules = dict(model.named_modules(remove_duplicate=False))
    sites: dict[str, Site] = {}
    for each in asked:
        for site in _by_pattern(each, modules) if isinstance(each, str) else _by_class(each, modules):
            sites.setdefault(site.name, site)
    return tuple(sites.values())


def _by_class(wanted: type[nn.Module], modules: Mapping[str, nn.Module]) -> list[Site]:
    seen: set[int] = set()
    found = []
    for path, module in modules.items():
        if isinstance(module, wanted) and id(module) not in seen:
            seen.add(id(module))
            found.append(Site(name=path, path=path, module=module, side="output", element=None))
    if not found:
        classes = sorted({type(module).__name__ for module in modules.values()})
        raise CaptureError(
            refusal(
                f"class {wanted.__name__}",
                found="no module of it",
                expected=f"one of {name_list(classes)}",
                way_out="name another class",
            )
        )
    return found


def _by_pattern(written: str, modules: Mapping[str, nn.Module]) -> list[Site]:
    parts = _WRITTEN.fullmatch(written)
    if parts is None:
        raise CaptureError(
            refusal(
                f"site {written!r}",
                found="text that is no site",
                expected="path, path:input or path:output, an element in brackets behind it",
                way_out="see lading.capture",
            )
        )
    paths = list(_matches(parts["path"], modules))
    if not paths:
        near = nearest(parts["path"], modules)
        raise CaptureError(
            refusal(
                f"site {written!r}",
                found="no module of this name",
                expected=f"a name such as {name_list(near)}" if near else "a name of the model's modules",
                way_out="list them with model.named_modules()",
            )
        )
    suffix = written[len(parts["path"]) :]
    element = parts["element"]
    index = int(element) if element is not None and re.fullmatch(r"-?\d+", element) else element
    return [
        Site(name=path + suffix, path=path, module=modules[path], side=parts["side"] or "output", element=index)
        for path in paths
    ]


def _matches(pattern: str, modules: Mapping[str, nn.Module]) -> Iterator[str]:
    if pattern in modules:
        yield pattern
        return
    wanted = _split(pattern)
    for path in modules:
        names = path.split(".")
        if len(names) == len(wanted) and all(
            any(_is_named(name, choice, modules[".".join(names[:depth])]) for choice in choices)
            for depth, (name, choices) in enumerate(zip(names, wanted, strict=True))
        ):
            yield path


def _split(pattern: str) -> list[list[str]]:
    """Split a pattern at its dots, and each part into its choices."""
    parts = re.findall(r"(?:\{[^{}]*\}|[^.{}])+", pattern)
    choices = []
    for part in parts:
        braces = re.fullmatch(r"([^{}]*)\{([^{}]*)\}([^{}]*)", part)
        listed = braces[2].split(",") if braces else [part]
        choices.append([f"{braces[1]}{each.strip()}{braces[3]}" for each in listed] if braces else listed)
    return choices


def _is_named(name: str, choice: str, parent: nn.Module) -> bool:
    if re.fullmatch(r"-\d+", choice):
        count = sum(child.isdecimal() for child in parent._modules)
        return name == str(count + int(choice))
    return fnmatchcase(name, choice)
