"""Find what transformers models keep between tokens, whatever it is called and however it is built.

A cache goes in as an argument and comes out as an entry of the output. Up to transformers 5.23 both are called
``past_key_values``, or ``cache_params`` where the layers are recurrent; since 5.24 ``cache``; RWKV says ``state``. An
entry of another name is a cache too where it is an object: outputs hold tensors, nested containers and caches. So a
further renaming upstream changes nothing here. Calls no model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any

import torch
from torch import nn
from transformers import Cache, PretrainedConfig

CACHE_NAMES = ("cache", "past_key_values", "cache_params", "state")
"""The names under which models take and give what they keep between tokens."""

_NO_CACHE = (type, ModuleType, nn.Module, PretrainedConfig, torch.device, torch.dtype, str, bytes, int, float, complex)
_CONTAINERS = (torch.Tensor, dict, list, tuple)


def caches_in(output: Any) -> dict[str, Any]:
    """Give the caches among a model's outputs by their names; empty for an output without names."""
    entries = output.items() if isinstance(output, dict) else ()
    return {name: value for name, value in entries if value is not None and (name in CACHE_NAMES or _is_object(value))}


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """Yield every tensor inside nested containers and objects, a cache's attributes among them, each object once."""
    pending, seen = [value], set[int]()
    while pending:
        found = pending.pop()
        if isinstance(found, torch.Tensor):
            yield found
        elif isinstance(found, (dict, list, tuple)):
            pending.extend(found.values() if isinstance(found, dict) else found)
        elif _is_object(found) and id(found) not in seen:
            seen.add(id(found))
            pending.append(getattr(found, "__dict__", None))


def as_arguments(caches: Mapping[str, Any], accepted: Mapping[str, Any]) -> dict[str, Any] | None:
    """Give caches the names under which a forward takes them; None where it takes no cache.

    Args:
        caches: of an output. Outputs of code written for an older transformers are renamed, its arguments are not.
        accepted: the parameters of the forward.
    """
    other = next((name for name in CACHE_NAMES if name in accepted), None)
    named = {name if name in accepted else other: cache for name, cache in caches.items()}
    return None if None in named else {str(name): cache for name, cache in named.items()}


def is_recurrent(name: str, cache: Any) -> bool:
    """Say whether a cache holds states alone and no tokens: a model with such a one takes no mask of earlier tokens."""
    return name == "cache_params" or (isinstance(cache, Cache) and all(getattr(cache, "is_linear", (False,))))


def _is_object(value: Any) -> bool:
    return value is not None and not isinstance(value, (*_NO_CACHE, *_CONTAINERS))
