"""Stand in for accelerate's ``infer_auto_device_map``: its signature and its kind of answer, with lading's plan inside.

Knows how accelerate's users write their arguments; `lading.placement` decides. Needs no accelerate, and the plan keeps
the room that accelerate's own hooks need. The calls that carry a map out are in `accelerate_dispatch`, named here too.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from itertools import chain
from typing import Any

import torch
from torch import nn

from lading.adapters.accelerate_dispatch import (
    cpu_offload,
    disk_offload,
    dispatch_model,
    load_checkpoint_and_dispatch,
)
from lading.errors import PlanError, refusal
from lading.placement.blocks import BlockRules, blocks_of
from lading.placement.budget import Device, budget_of
from lading.placement.hardware import free_memory
from lading.placement.plan import PlanWarning
from lading.placement.planner import Request, make_plan
from lading.units import parse_dtype

__all__ = [
    "cpu_offload",
    "disk_offload",
    "dispatch_model",
    "infer_auto_device_map",
    "load_checkpoint_and_dispatch",
]

_PACKED_BITS = {"fp8": 8, "int4": 4, "int2": 2}
"""The members of ``accelerate.utils.CustomDtype``, by value: bits of one number."""


def infer_auto_device_map(  # noqa: PLR0913, PLR0917 - accelerate's signature
    model: nn.Module,
    max_memory: Mapping[Any, Any] | None = None,
    no_split_module_classes: Iterable[str] | str | None = None,
    dtype: torch.dtype | str | Any | None = None,
    special_dtypes: Mapping[str, torch.dtype | str | Any] | None = None,
    verbose: bool = False,
    clean_result: bool = True,
    offload_buffers: bool = False,
    fallback_allocation: bool = False,
) -> OrderedDict[str, Device]:
    """Give every module of a model a device, as accelerate's function of this name does (1.15), keeping the most.

    Where the answers differ: a model that fits is kept entirely, without a reserve; a later block may go to an earlier
    device; buffers of what is streamed count on the device that runs it; the disk's limit holds; and where accelerate
    returns a map that cannot run within the budget, this raises. ``"10Gb"`` are bytes here, bits there; modules
    without tensors are not named.

    Args:
        model: on any device, or on meta.
        max_memory: device → bytes or ``"10GiB"``; accelerators are used in the order of their numbers. None: what is
            free now.
        no_split_module_classes: names of classes that stay on one device. None: every module may be split.
        dtype: what the weights will be loaded in, a dtype of torch, its name, or a ``CustomDtype`` of accelerate.
        special_dtypes: the same for single tensors by name.
        verbose: print where each block goes and why, then the plan.
        clean_result: name a module in place of everything below it where that shares one device.
        offload_buffers: stream buffers with the weights; they stay on the main device otherwise.
        fallback_allocation: changes nothing. It asks accelerate to look further for a module that fits where the next
            one does not; the plan here keeps the most that fits in any case.

    Returns:
        Module names → ``int``, ``"mps"``, ``"cpu"`` or ``"disk"``, for ``dispatch_model`` and ``from_pretrained``.
        `PlanWarning` is given where a little more memory would change much.

    Raises:
        PlanError: no placement keeps within the budget, or an argument is not understood.

    Any thread. The model and the arguments are only looked at.

    Example:
        >>> import torch
        >>> from lading.adapters.accelerate import infer_auto_device_map
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 8))
        >>> dict(infer_auto_device_map(net, max_memory={0: 100, 1: "1KB"}))
        {'0': 0, '1': 1}
    """
    classes = [no_split_module_classes] if isinstance(no_split_module_classes, str) else no_split_module_classes or ()
    rules = dataclasses.replace(_weights(model, dtype, special_dtypes or {}), no_split_classes=frozenset(classes))
    memory: Mapping[Any, Any] = free_memory() if max_memory is None else max_memory
    budget = budget_of(memory)
    by_number = sorted(budget.accelerators.items(), key=lambda each: (isinstance(each[0], str), each[0]))
    budget = dataclasses.replace(budget, accelerators=dict(by_number))
    blocks = blocks_of(model, rules)
    plan = make_plan(Request(blocks=blocks, budget=budget, runtime="accelerate", offload_buffers=offload_buffers))
    if verbose:
        for each in plan.placements:
            print(f"Putting {' and '.join(each.keys)} (size={each.num_bytes}) on {each.home}: {each.reason}.")
        print(f"\n{plan}")
    for warning in plan.warnings:
        warnings.warn(warning, PlanWarning, stacklevel=2)
    if clean_result:
        return OrderedDict(plan.device_map)
    return OrderedDict((key, placement.home) for placement in plan.placements for key in placement.keys)


def _weights(model: nn.Module, dtype: Any, special: Mapping[str, Any]) -> BlockRules:
    """Say what the tensors will weigh; numbers narrower than torch knows are weighed here, name by name."""
    packed, bits = _packed(dtype), {name: _packed(each) for name, each in special.items()}
    sizes = {}
    if packed or any(bits.values()):
        both = chain(model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
        for name, tensor in both:
            width = bits[name] if name in special else packed if tensor.is_floating_point() else None
            if width:
                sizes[name] = -(-tensor.numel() * width // 8)
    named = {name: _named(each) for name, each in special.items() if not bits[name]}
    own = None if dtype is None or packed else _named(dtype)
    return BlockRules(dtype=own, special_dtypes=named, special_bytes=sizes)


def _packed(dtype: Any) -> int | None:
    return _PACKED_BITS.get(getattr(dtype, "value", ""))


def _named(dtype: Any) -> torch.dtype:
    try:
        return parse_dtype(dtype)
    except ValueError as error:
        expected = "a torch.dtype or its name"
        raise PlanError(refusal("dtype", found=repr(dtype), expected=expected, way_out="correct it")) from error
