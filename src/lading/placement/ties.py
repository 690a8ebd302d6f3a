"""Find the tensors that a module declares to be one, although they are not one object yet.

A transformers model that was built but not tied says in ``_tied_weights_keys`` what ``tie_weights`` would do: in
version 5 as a mapping of names (or patterns) to the name they take their values from, with ``all_tied_weights_keys``
the same for the whole model; in version 4 as a list of names whose source is the input embedding. Tensors that are one
object already, or share their storage, need no declaration: `blocks` sees that by itself.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from lading.errors import PlanError, refusal


def declared_ties(module: nn.Module) -> dict[int, torch.Tensor]:
    """Map the id of each tensor that is declared to be another one to that one. Changes nothing."""
    ties: dict[int, torch.Tensor] = {}
    for one, other in _pairs(module):
        if one is not None and other is not None and one is not other and one.shape == other.shape:
            ties[id(one)] = other
    for target_id, first in list(ties.items()):  # a chain ends at the tensor that has values of its own
        source, seen = first, {target_id}
        while id(source) in ties and id(source) not in seen:
            seen.add(id(source))
            source = ties[id(source)]
        ties[target_id] = source
    return {target_id: source for target_id, source in ties.items() if target_id != id(source)}


def declaration(module: nn.Module, name: str) -> Any:
    """Give what a module declares under a private name of transformers; None for nothing.

    Raises:
        PlanError: a model of transformers has no such attribute. All of them have it, if only to say None, so it was
            renamed, and "nothing declared" would be a wrong plan.
    """
    found = vars(module).get(name) or getattr(type(module), name, None)
    if found or hasattr(module, name) or not any(_is_base_of_models(kind) for kind in type(module).__mro__):
        return found
    raise PlanError(
        refusal(
            type(module).__name__,
            found=f"no attribute {name!r}",
            expected="one, as in every release of transformers that lading's docs/versions.md lists",
            way_out="install one of those releases",
        )
    )


def _is_base_of_models(kind: type) -> bool:
    return kind.__name__ == "PreTrainedModel" and kind.__module__.startswith("transformers.")


def _pairs(module: nn.Module) -> Iterator[tuple[torch.Tensor | None, torch.Tensor | None]]:
    expanded = getattr(module, "all_tied_weights_keys", None)
    if isinstance(expanded, Mapping):
        yield from ((find_tensor(module, target), find_tensor(module, source)) for target, source in expanded.items())
        return
    declared = declaration(module, "_tied_weights_keys")
    if not declared or not _ties_are_wanted(module):
        return
    if isinstance(declared, Mapping):
        yield from _by_patterns(module, declared)
    else:
        yield from _by_list(module, [str(name) for name in declared])


def _ties_are_wanted(module: nn.Module) -> bool:
    """Ask the configuration of the text decoder, as transformers does."""
    config: Any = getattr(module, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config(decoder=True)
    wanted: bool = getattr(config, "tie_word_embeddings", True)
    return wanted


def _by_patterns(
    module: nn.Module, declared: Mapping[str, str]
) -> Iterator[tuple[torch.Tensor | None, torch.Tensor | None]]:
    tensors = dict(module.named_parameters(remove_duplicate=False))
    for target, source in declared.items():
        sources = [name for name in tensors if name == source or re.fullmatch(source, name)]
        targets = [name for name in tensors if name == target or re.fullmatch(target, name)]
        if not sources:
            continue
        for position, name in enumerate(targets):  # one source for all, or one for each
            yield tensors[name], tensors[sources[position % len(sources)]]


def _by_list(module: nn.Module, names: list[str]) -> Iterator[tuple[torch.Tensor | None, torch.Tensor | None]]:
    embedding = getattr(input_embedding(module), "weight", None)
    tensors = dict(module.named_parameters(remove_duplicate=False))
    identities = Counter(map(id, tensors.values()))
    meant = [name for name in tensors if any(name == listed or re.search(listed, name) for listed in names)]
    if any(identities[id(tensors[name])] > 1 for name in meant):
        return  # it was tied when it was built
    for listed in names:
        for name, tensor in tensors.items():
            if name != listed and not re.search(listed, name):
                continue
            bias = f"{name.removesuffix('decoder.bias')}bias"  # a head's bias that its decoder shows too
            if name.endswith("decoder.bias") and bias in tensors:
                yield tensor, tensors[bias]
            elif tensor is not embedding:
                yield tensor, embedding


def input_embedding(module: nn.Module) -> nn.Module | None:
    """Find the table that a transformers model gathers its input from; None where it has none or does not say."""
    try:
        found: Any = module.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError, TypeError):
        return None
    return found if isinstance(found, nn.Module) else None


def find_tensor(module: nn.Module, name: str) -> torch.Tensor | None:
    """Find a parameter or buffer by its name; None when there is none."""
    found: Any = module
    for part in name.split("."):
        found = getattr(found, part, None)
    return found if isinstance(found, torch.Tensor) else None
