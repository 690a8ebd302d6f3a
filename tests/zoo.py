"""Share what the tests over the zoo of `architectures` have in common: its sample, its models' tensors, its noise.

Knows transformers and torch, and nothing of lading. The fixture ``saved`` stands in conftest.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from architectures import AVAILABLE, Architecture, sample

SAMPLE = sample()
EVERY = [
    pytest.param(architecture, id=architecture.name, marks=[] if architecture in SAMPLE else [pytest.mark.full])
    for architecture in AVAILABLE
]
BY_NAME = {architecture.name: architecture for architecture in AVAILABLE}
Directory = Callable[[Architecture], Path]  # what the fixture `saved` is

QUIET = [
    # transformers 4.57 under torch 2.13: TorchScript, `device`, indices in a list
    pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The `device` argument is deprecated:FutureWarning:transformers"),
    pytest.mark.filterwarnings(
        "ignore:Using a non-tuple sequence for multidimensional:UserWarning:transformers.models"
    ),
]


def named_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return all parameters and buffers, each under all of its names."""
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def ties(model: nn.Module, key: Callable[[torch.Tensor], Any] = id) -> set[frozenset[str]]:
    """Return the groups of names that are one tensor, or one by another key; empty tensors have no address."""
    groups = defaultdict(set)
    for name, tensor in named_tensors(model).items():
        if tensor.numel() or key is not torch.Tensor.data_ptr:
            groups[key(tensor)].add(name)
    return {frozenset(names) for names in groups.values() if len(names) > 1}


def tensors(
    value: Any, path: str = "outputs", seen: frozenset[int] = frozenset()
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every tensor inside nested outputs, caches included, with its path."""
    if isinstance(value, torch.Tensor):
        yield path, value
    elif id(value) in seen:
        return
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from tensors(inner, f"{path}.{key}", seen | {id(value)})
    elif isinstance(value, (list, tuple)):
        for index, inner in enumerate(value):
            yield from tensors(inner, f"{path}[{index}]", seen | {id(value)})
    elif type(value).__module__.startswith("transformers.") and hasattr(value, "__dict__"):
        yield from tensors(vars(value), path, seen | {id(value)})
