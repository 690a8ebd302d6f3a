"""Plan a model given as a module, a configuration, a directory or a repo id.

Composes what `adapters` know of transformers models with the planner, and asks the machine what it has.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from lading.api.arguments import PathOrRepoId, named_dtype, source_of
from lading.checkpoint.locate import Source
from lading.errors import PlanError, refusal
from lading.placement.blocks import Block, BlockRules, blocks_of, declared_whole, in_order
from lading.placement.budget import budget_of
from lading.placement.hardware import Bandwidths, free_memory, probe_bandwidths
from lading.placement.plan import Plan, PlanWarning
from lading.placement.planner import Request, make_plan
from lading.placement.prediction import Speeds
from lading.placement.workload import Workload


def plan(  # noqa: PLR0913 - the names that users of device maps know
    model_or_path: nn.Module | PathOrRepoId | Any,
    max_memory: Mapping[Any, Any] | None = None,
    no_split_module_classes: Iterable[str] | str | None = None,
    dtype: torch.dtype | str | None = "auto",
    *,
    special_dtypes: Mapping[str, torch.dtype | str] | None = None,
    workload: Workload | None = None,
    strategy: str = "contiguous",
    runtime: str = "lading",
    order: str = "registration",
    bandwidths: Bandwidths | str | None = None,
    offload_buffers: bool = False,
    model_class: type | str | None = None,
    revision: str | None = None,
    subfolder: str = "",
    cache_dir: PathOrRepoId | None = None,
    local_files_only: bool = False,
    token: str | bool | None = None,
    trust_remote_code: bool = False,
    **model_kwargs: Any,
) -> Plan:
    """Decide which block of a model rests on which device, in host memory or on disk. No weight is read.

    What is kept on accelerators is the most that is possible with each accelerator holding one run of neighbours; the
    plan carries a bound that proves how close that is to the best of all placements. Of equally good ones it is the
    one that uses earlier-listed accelerators first, with few changes of device.

    Args:
        model_or_path: a module (on any device, or on meta), a transformers configuration, a directory, or a repo id of
            the hub, of which only ``config.json`` needs to be there.
        max_memory: device → bytes or a size such as ``"10GiB"``; devices are ``0`` or ``"cuda:0"``, ``"cpu"``,
            ``"disk"``. What is not named is not used, but for the disk, which is unlimited. None: what is free now.
        no_split_module_classes: names of classes that stay on one device. None: what a transformers model declares.
        dtype: what the weights will be loaded in; ``"auto"`` as `lading.load` would, or a module's own.
        special_dtypes: the same for single tensors by name.
        workload: what the memory beyond the weights must hold. None: nothing.
        strategy: ``"contiguous"``; ``"any"``, which gives up neighbourhood and needs ``lading[solver]``;
            ``"sequential"``, accelerators in the order in which they are listed; ``"balanced"``, as even as possible.
        runtime: whose room for streaming is kept on the main device: ``"lading"``, two of the largest streamed block
            (one if nothing else fits; none for embedding tables, whose rows are gathered), or ``"accelerate"``, one.
        order: ``"registration"``, or ``"trace"``: as a forward on fake tensors calls the blocks.
        bandwidths: rates of the machine: then the least time is the aim and `Plan.predicted_s` is known. ``"probe"``
            measures them once (a second or two; cached); None leaves them out.
        offload_buffers: stream buffers with the weights. They stay on the main device otherwise.
        model_class: see `lading.load`.
        revision: see `lading.load`.
        subfolder: see `lading.load`.
        cache_dir: see `lading.load`.
        local_files_only: see `lading.load`.
        token: see `lading.load`.
        trust_remote_code: see `lading.load`.
        **model_kwargs: what else ``from_pretrained`` takes and changes sizes, such as ``quantization_config``.

    Returns:
        The plan; `PlanWarning` is given where a little more memory would change much.

    Raises:
        PlanError: no placement keeps within the budget (with the missing bytes), or an argument is not understood.
        CheckpointError: the configuration cannot be read.

    Any thread. A module is only looked at.

    Example:
        >>> import lading, torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 8))
        >>> lading.plan(net, {"cuda:0": 100, "cuda:1": "1KiB", "cpu": "1MiB"}).device_map
        {'0': 0, '1': 1}
    """
    subject = _describe(
        model_or_path,
        source_of(
            model_or_path if isinstance(model_or_path, (str, os.PathLike)) else "",
            revision=revision,
            subfolder=subfolder,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            token=token,
        ),
        model_class=model_class,
        dtype=named_dtype(dtype),
        trust_remote_code=trust_remote_code,
        model_kwargs=model_kwargs,
    )
    rules = subject.rules
    if no_split_module_classes is not None:
        names = [no_split_module_classes] if isinstance(no_split_module_classes, str) else no_split_module_classes
        rules = dataclasses.replace(rules, no_split_classes=frozenset(names))
    if special_dtypes is not None:
        named: dict[str, Any] = {name: named_dtype(each) for name, each in special_dtypes.items()}
        rules = dataclasses.replace(rules, special_dtypes={**rules.special_dtypes, **named})
    blocks = blocks_of(subject.module, rules)
    if order != "registration":
        blocks = in_order(blocks, _call_order(subject.module, order))
    memory: Mapping[Any, Any] = max_memory if max_memory is not None else free_memory()
    request = Request(
        blocks=blocks,
        budget=budget_of(memory),
        strategy=strategy,
        runtime=runtime,
        offload_buffers=offload_buffers,
        speeds=_speeds(bandwidths, model_or_path, rules, workload, memory),
        **({} if workload is None else _beyond_weights(subject.module, workload, blocks)),
    )
    made = make_plan(request)
    for warning in made.warnings:
        warnings.warn(warning, PlanWarning, stacklevel=2)
    return made


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Subject:
    module: nn.Module
    rules: BlockRules


def _describe(model_or_path: Any, source: Source, **options: Any) -> _Subject:
    """Make of whatever was given a module without weights and the rules to weigh it."""
    dtype = options["dtype"]
    if isinstance(model_or_path, nn.Module) and not (isinstance(dtype, torch.dtype) and "transformers" in sys.modules):
        rules = BlockRules(
            no_split_classes=declared_whole(model_or_path), dtype=dtype if isinstance(dtype, torch.dtype) else None
        )
        return _Subject(module=model_or_path, rules=rules)
    from lading.adapters.model_request import ModelRequest
    from lading.adapters.skeleton import describe_module, skeleton_of

    if isinstance(model_or_path, nn.Module):
        skeleton = describe_module(model_or_path, dtype)  # knows what stays in float32
    else:
        if not isinstance(model_or_path, (str, os.PathLike)):
            options["model_kwargs"] = {**options["model_kwargs"], "config": model_or_path}
        skeleton = skeleton_of(ModelRequest(source=source, **options))
    rules = BlockRules(
        no_split_classes=frozenset(skeleton.no_split_classes),
        dtype=skeleton.dtype,
        special_dtypes=skeleton.loaded_dtypes,
        special_bytes=skeleton.loaded_bytes,
    )
    return _Subject(module=skeleton.module, rules=rules)


def _call_order(module: nn.Module, order: str) -> tuple[str, ...]:
    if order != "trace":
        known = "'registration' or 'trace'"
        raise PlanError(refusal("order", found=repr(order), expected=known, way_out="choose one"))
    from lading.adapters.transformers_workload import call_order

    return call_order(module)


def _beyond_weights(module: nn.Module, workload: Workload, blocks: tuple[Block, ...]) -> dict[str, Any]:
    """Give the parts of a request that a workload adds: caches and scores by block, and what each device keeps free."""
    overhead = {"margin": workload.margin_bytes}
    if not workload.num_tokens:
        return {"overhead": overhead}
    from lading.adapters.transformers_workload import memory_terms

    terms = memory_terms(module, workload)
    owners = {key: block.name for block in blocks for key in block.keys}
    kv_cache: dict[str, int] = {}
    for name, size in terms.kv_cache.items():
        block = _owner(name, owners)
        kv_cache[block] = kv_cache.get(block, 0) + size
    return {
        "extra_bytes": {"KV cache": kv_cache, "logits": {blocks[-1].name: terms.logits}},
        "overhead": {**overhead, "activations": terms.activations},
        "notes": terms.source,
    }


def _owner(name: str, owners: Mapping[str, str]) -> str:
    """Find the block that holds a module, or else the first one inside it."""
    path = name
    while path not in owners and path:
        path = path.rpartition(".")[0]
    return owners.get(path) or next(
        (block for key, block in owners.items() if key.startswith(f"{name}.")), next(iter(owners.values()))
    )


def _speeds(
    bandwidths: Bandwidths | str | None,
    model_or_path: Any,
    rules: BlockRules,
    workload: Workload | None,
    max_memory: Mapping[Any, Any],
) -> Speeds | None:
    if bandwidths is None:
        return None
    dtype = rules.dtype or torch.float32
    if isinstance(bandwidths, str):
        if bandwidths != "probe":
            expected = "Bandwidths, 'probe' or None"
            raise PlanError(refusal("bandwidths", found=repr(bandwidths), expected=expected, way_out="choose one"))
        from pathlib import Path

        is_path = isinstance(model_or_path, (str, os.PathLike)) and Path(model_or_path).exists()
        has_accelerator = bool(budget_of(max_memory).accelerators) and torch.accelerator.is_available()
        device = (torch.accelerator.current_accelerator() if has_accelerator else None) or torch.device("cpu")
        bandwidths = probe_bandwidths(Path(model_or_path) if is_path else None, device=device, dtype=dtype)
    num_tokens = max(1, workload.num_tokens) * workload.batch_size if workload is not None else 1
    return Speeds(bandwidths=bandwidths, num_tokens=num_tokens, element_bytes=dtype.itemsize)
