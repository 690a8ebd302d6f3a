"""Find the modules of a model that a plan streams, and check that the plan is about this model.

Pure functions over names and modules; nothing is moved.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from lading.errors import ResidencyError, name_list, refusal
from lading.placement.plan import Placement, Plan

_BY_USE = "experts"
"""A module of this name holds weights of which a forward reads a part: which, the data decide."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """One module that is streamed: a block, or its part where tied tensors join several modules. Immutable."""

    name: str
    module: nn.Module
    weights: tuple[nn.Parameter, ...]
    """Each once."""
    by_use: frozenset[int]
    """Identities (``id``) of those that are faulted in by use."""
    is_lookup: bool
    """Rows of its one weight are gathered."""
    placement: Placement


def units_of(model: nn.Module, plan: Plan) -> tuple[Unit, ...]:
    """List what a plan streams, in execution order.

    Raises:
        ResidencyError: the plan is not about this model, or a weight is on meta.
    """
    _check(model, plan)
    modules = dict(model.named_modules(remove_duplicate=False))
    units: dict[nn.Module, Unit] = {}
    for placement in plan.placements:
        for key in placement.keys if placement.is_streamed else ():
            module = modules.get(key)
            if module is not None and module not in units:
                units[module] = _unit(key, module, placement)
    return tuple(unit for unit in units.values() if unit.weights)


def _unit(name: str, module: nn.Module, placement: Placement) -> Unit:
    by_use: set[int] = set()
    for path, part in module.named_modules():
        if _BY_USE in path.split("."):
            by_use.update(id(weight) for weight in part.parameters(recurse=False))
    return Unit(
        name=name,
        module=module,
        weights=tuple(weight for weight in module.parameters() if weight.nbytes),
        by_use=frozenset(by_use),
        is_lookup=isinstance(module, nn.Embedding) and module.max_norm is None,
        placement=placement,
    )


def doors_of(model: nn.Module, streamed: Mapping[nn.Module, int]) -> Iterator[tuple[nn.Module, frozenset[int]]]:
    """Yield the model and every module above a streamed one, each with the numbers of the blocks below it.

    Left out: what has no forward, such as lists of modules.
    """
    for module in model.modules():
        below = frozenset(streamed[part] for part in module.modules() if part in streamed and part is not module)
        is_called = type(module).forward is not nn.Module.forward  # a list of modules is not
        if module is model or (below and is_called and module not in streamed):
            yield module, below


def _check(model: nn.Module, plan: Plan) -> None:
    """Refuse a plan that leaves a tensor of the model without a home, and a model without real tensors."""
    homes = {key for placement in plan.placements for key in placement.keys}
    lost, shown = [], []
    for name, tensor in _tensors(model):
        parts = name.split(".")
        if not any(".".join(parts[:depth]) in homes for depth in range(len(parts) + 1)):
            lost.append(name)
        if tensor.is_meta:
            shown.append(name)
    if lost:
        raise ResidencyError(
            refusal(
                "the plan",
                found=f"no home for {name_list(lost)}",
                expected=f"one for each tensor of {type(model).__name__}",
                way_out="plan this model: lading.plan(model, max_memory=…)",
            )
        )
    if shown:
        raise ResidencyError(
            refusal(
                type(model).__name__,
                found=f"tensors on meta: {name_list(shown)}",
                expected="real ones, or hooks of accelerate that know where they are",
                way_out="load the model with lading.load, or pass replace_hooks=True for one that accelerate hooked",
            )
        )


def _tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)
