"""Stand in for accelerate's big-model calls: their signatures, with lading's residency inside.

The model that comes back is the model that came in, with its weights inside the modules: where accelerate parks a
weight on meta, there is a real CPU tensor here, a view of its file where it rests on disk. Needs no accelerate.

Thread rule: one thread, and nobody in a forward; afterwards any number of threads may call the model.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lading.adapters.accelerate_hooks import refuse_hooked
from lading.adapters.accelerate_weights import LaidAside, fill, restored_on_failure
from lading.checkpoint.bind import BindOptions, bind
from lading.checkpoint.catalog import Catalog
from lading.checkpoint.locate import open_catalog
from lading.checkpoint.mapping import map_catalog
from lading.errors import CheckpointNotFoundError, PlanError, refusal
from lading.placement.blocks import Block, BlockRules, blocks_of, declared_whole
from lading.placement.budget import budget_of, device_key
from lading.placement.given import plan_of
from lading.placement.hardware import free_memory
from lading.placement.plan import Plan
from lading.placement.planner import Request, make_plan
from lading.residency.residency import Residency, refuse_offloaded
from lading.residency.settings import Settings
from lading.residency.transfer import transfer_to
from lading.units import parse_dtype

_STRATEGIES = {
    "auto": "contiguous",
    "balanced": "balanced",
    "balanced_low_0": "balanced",
    "sequential": "sequential",
}


def dispatch_model(  # noqa: PLR0913, PLR0917 - accelerate's signature
    model: nn.Module,
    device_map: Mapping[str, Any] | Any,
    main_device: Any = None,
    state_dict: Mapping[str, torch.Tensor] | None = None,
    offload_dir: str | os.PathLike[str] | None = None,
    offload_index: Mapping[str, Mapping[str, Any]] | None = None,
    offload_buffers: bool = False,
    skip_keys: str | Sequence[str] | None = None,
    preload_module_classes: Iterable[str] | None = None,
    force_hooks: bool = False,
) -> nn.Module:
    """Run a model by a device map, as accelerate's function of this name does (1.15), with its weights inside it.

    A map of one device moves the model there and nothing more. Otherwise what the map puts on ``"disk"`` (and on
    ``"cpu"``, where an accelerator runs the model) is where it runs exactly while its forward runs.
    `Residency.of(model).close()` ends that.

    Args:
        model: real, or on meta where ``state_dict``, ``offload_dir`` or ``offload_index`` hold its weights.
        device_map: module or tensor name → ``0``, ``"cuda:0"``, ``"cpu"``, ``"disk"``; complete.
        main_device: where what rests on ``"cpu"`` and ``"disk"`` runs. None: the first other device of the map, or the
            CPU.
        state_dict: weights to use in place of the model's own, wherever they rest; their memory is shared.
        offload_dir: not needed: weights that came from a file stay in it, others go to a nameless file in this folder
            (None: the system's temporary one). If an ``index.json`` is there, weights on meta are taken from its
            ``.dat`` files, and real ones must equal them.
        offload_index: the same for an index in memory; its safetensors entries become views of these files.
        offload_buffers: changes nothing: buffers stay where the model runs.
        skip_keys: names of arguments that stay on the device where they are, such as caches.
        preload_module_classes: names of classes that are fetched whole. Not needed for correctness: a weight that is
            read without calling its module is real too.
        force_hooks: changes nothing: hooks stand where something is streamed.

    Returns:
        The same model, with ``hf_device_map``.

    Raises:
        PlanError: the map leaves a block out, or parts tied tensors or a class to preload.
        ResidencyError: weights that are nowhere, that are not the model's, or that a folder holds with other values; a
            device that is not here; a model that accelerate hooked, or that is offloaded already; no room to write. The
            model is as before then.

    Example:
        >>> import torch
        >>> from lading.adapters.accelerate import dispatch_model
        >>> net = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 8))
        >>> net = dispatch_model(net, {"0": "cpu", "1": "disk"})
        >>> net[1].weight.device, net.hf_device_map
        (device(type='cpu'), {'0': 'cpu', '1': 'disk'})
    """
    if not isinstance(device_map, Mapping):
        found, way_out = repr(device_map), "pass it to load_checkpoint_and_dispatch, or make one with lading.plan"
        raise PlanError(refusal("device_map", found=found, expected="names → devices", way_out=way_out))
    refuse_hooked(model)
    refuse_offloaded(model)
    with restored_on_failure(model):
        fill(model, LaidAside.of(state_dict, offload_dir, offload_index))
        plan = _plan_of(model, device_map, main_device, preload_module_classes or ())
        _carry_out(model, plan, device_map, _settings(offload_dir, skip_keys))
    return model


def cpu_offload(
    model: nn.Module,
    execution_device: Any = None,
    offload_buffers: bool = False,
    state_dict: Mapping[str, torch.Tensor] | None = None,
    preload_module_classes: Iterable[str] | None = None,
) -> nn.Module:
    """Keep all weights of a model in host memory, as accelerate's function of this name does.

    Where the CPU also runs the model, nothing has to move, and nothing is hooked.

    Args:
        model: see `dispatch_model`.
        execution_device: where it runs. None: where its first parameter is; the CPU for one on meta.
        offload_buffers: see `dispatch_model`.
        state_dict: see `dispatch_model`.
        preload_module_classes: see `dispatch_model`.

    Returns:
        The same model, with ``hf_device_map``.

    Raises:
        PlanError: as for `dispatch_model`.
        ResidencyError: as for `dispatch_model`.

    Example:
        >>> import torch
        >>> from lading.adapters.accelerate import cpu_offload
        >>> cpu_offload(torch.nn.Linear(4, 4)).weight.device
        device(type='cpu')
    """
    return dispatch_model(
        model,
        {"": "cpu"},
        _execution_device(model, execution_device),
        state_dict=state_dict,
        offload_buffers=offload_buffers,
        preload_module_classes=preload_module_classes,
    )


def disk_offload(
    model: nn.Module,
    offload_dir: str | os.PathLike[str] | None,
    execution_device: Any = None,
    offload_buffers: bool = False,
    preload_module_classes: Iterable[str] | None = None,
) -> nn.Module:
    """Let all weights of a model rest on disk, as accelerate's function of this name does, without its second copy.

    Args:
        model: see `dispatch_model`.
        offload_dir: see `dispatch_model`; None is enough.
        execution_device: where it runs. None: where its first parameter is; the CPU for one on meta.
        offload_buffers: see `dispatch_model`.
        preload_module_classes: see `dispatch_model`.

    Returns:
        The same model, with ``hf_device_map``.

    Raises:
        PlanError: as for `dispatch_model`.
        ResidencyError: as for `dispatch_model`.

    Example:
        >>> import torch
        >>> from lading.adapters.accelerate import disk_offload
        >>> net = disk_offload(torch.nn.Sequential(torch.nn.Linear(64, 64)), None)
        >>> net[0].weight.device, net.hf_device_map
        (device(type='cpu'), {'': 'disk'})
    """
    return dispatch_model(
        model,
        {"": "disk"},
        _execution_device(model, execution_device),
        offload_dir=offload_dir,
        offload_buffers=offload_buffers,
        preload_module_classes=preload_module_classes,
    )


def load_checkpoint_and_dispatch(  # noqa: PLR0913, PLR0917 - accelerate's signature
    model: nn.Module,
    checkpoint: str | os.PathLike[str],
    device_map: str | Mapping[str, Any] | None = None,
    max_memory: Mapping[Any, Any] | None = None,
    no_split_module_classes: Iterable[str] | None = None,
    offload_folder: str | os.PathLike[str] | None = None,
    offload_buffers: bool = False,
    dtype: str | torch.dtype | None = None,
    offload_state_dict: bool | None = None,
    skip_keys: str | Sequence[str] | None = None,
    preload_module_classes: Iterable[str] | None = None,
    force_hooks: bool = False,
    strict: bool = False,
    full_state_dict: bool = True,
    broadcast_from_rank0: bool = False,
) -> nn.Module:
    """Fill a model with a checkpoint without copying, and run it by a device map, as accelerate's function does (1.15).

    Args:
        model: built inside `lading.empty`, accelerate's ``init_empty_weights``, or real.
        checkpoint: a file, an index, or a directory that holds one of them; also what `lading.load_into` takes.
        device_map: as for `dispatch_model`; ``"auto"``, ``"sequential"`` or ``"balanced"`` plan with ``max_memory``,
            and so does ``"balanced_low_0"``, which is ``"balanced"`` here. None only loads.
        max_memory: device → bytes or ``"10GiB"``, for a ``device_map`` in words. None: what is free now.
        no_split_module_classes: names of classes that stay on one device.
        offload_folder: as ``offload_dir`` of `dispatch_model`, but nothing is read from it.
        offload_buffers: stream buffers with the weights, as far as a plan counts them.
        dtype: what floats are cast to. None: what the model declares; ``"auto"``: nothing, which copies nothing.
        offload_state_dict: changes nothing: the checkpoint is mapped, not read into memory.
        skip_keys: see `dispatch_model`.
        preload_module_classes: see `dispatch_model`.
        force_hooks: see `dispatch_model`.
        strict: refuse missing and unexpected names. False leaves what is missing as it is in a real model, initialises
            it in an empty one where the way is known, and logs both; nothing is ever left on meta.
        full_state_dict: only True: see the next.
        broadcast_from_rank0: only False: each process maps the checkpoint by itself.

    Returns:
        The same model, with ``hf_device_map`` if it was dispatched.

    Raises:
        CheckpointError: and its kinds, as for `lading.load_into`.
        PlanError: as for `dispatch_model`; no plan keeps within ``max_memory``; arguments that exclude each other.
        ResidencyError: as for `dispatch_model`. The model is as before in each case.

    Example:
        >>> import lading, torch
        >>> from lading.adapters.accelerate import load_checkpoint_and_dispatch
        >>> with lading.empty():
        ...     net = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 8))
        >>> net = load_checkpoint_and_dispatch(net, "net.safetensors", {"0": "cpu", "1": "disk"})  # doctest: +SKIP
    """
    if broadcast_from_rank0 or not full_state_dict:
        found = f"broadcast_from_rank0={broadcast_from_rank0}, full_state_dict={full_state_dict}"
        way_out = "leave them out: each process maps the same file, which is in memory once"
        raise PlanError(refusal("load_checkpoint_and_dispatch", found=found, expected="False, True", way_out=way_out))
    _check_map(device_map, max_memory)
    refuse_hooked(model)
    refuse_offloaded(model)
    catalog = _catalog_of(Path(checkpoint))
    with restored_on_failure(model):
        bind(
            model,
            catalog,
            map_catalog(catalog),
            BindOptions(dtype=_element(dtype), strict="exact" if strict else False),
        )
        whole = [*(no_split_module_classes or ()), *(preload_module_classes or ())]
        settings = _settings(offload_folder, skip_keys)
        if isinstance(device_map, Mapping):
            _carry_out(model, _plan_of(model, device_map, None, whole), device_map, settings)
        elif device_map is not None:
            blocks = blocks_of(model, BlockRules(no_split_classes=frozenset(whole) | declared_whole(model)))
            memory: Mapping[Any, Any] = free_memory() if max_memory is None else max_memory
            strategy = _STRATEGIES[device_map]
            plan = make_plan(
                Request(blocks=blocks, budget=budget_of(memory), strategy=strategy, offload_buffers=offload_buffers)
            )
            _carry_out(model, plan, plan.device_map, settings)
    return model


def _check_map(device_map: object, max_memory: object) -> None:
    if isinstance(device_map, str) and device_map not in _STRATEGIES:
        expected = ", ".join(map(repr, _STRATEGIES))
        raise PlanError(refusal("device_map", found=repr(device_map), expected=expected, way_out="choose one"))
    if max_memory is not None and not isinstance(device_map, str):
        found = "max_memory beside a device_map that is not made from it"
        raise PlanError(
            refusal("max_memory", found=found, expected='device_map="auto"', way_out="leave one of them out")
        )


def _element(dtype: str | torch.dtype | None) -> torch.dtype | str | None:
    if dtype is None or dtype == "auto":
        return dtype
    try:
        return parse_dtype(dtype)
    except ValueError as error:
        expected = "a torch.dtype, its name, 'auto' or None"
        raise PlanError(refusal("dtype", found=repr(dtype), expected=expected, way_out="correct it")) from error


def _execution_device(model: nn.Module, given: Any) -> Any:
    if given is not None:
        return given
    first = next(iter(model.parameters()), None)
    return "cpu" if first is None or first.is_meta else first.device


def _catalog_of(checkpoint: Path) -> Catalog:
    """Open a checkpoint; accelerate also takes a directory whose one index has another name."""
    try:
        return open_catalog(checkpoint)
    except CheckpointNotFoundError:
        indexes = sorted(checkpoint.glob("*.index.json")) if checkpoint.is_dir() else []
        if len(indexes) != 1:
            raise
        return open_catalog(indexes[0])


def _plan_of(model: nn.Module, device_map: Mapping[str, Any], main_device: Any, whole: Iterable[str]) -> Plan:
    main = None if main_device is None else device_key(main_device)
    if main == "disk":
        found, expected = "'disk'", "a device that computes"
        raise PlanError(refusal("main_device", found=found, expected=expected, way_out="leave it out, or name one"))
    return plan_of(_blocks(model, device_map, frozenset(whole)), device_map, main_device=main)


def _blocks(model: nn.Module, device_map: Mapping[str, Any], whole: frozenset[str]) -> tuple[Block, ...]:
    """Cut a model: classes to preload stay whole; those that the model declares do, unless the map goes inside them."""
    inside = {name.rpartition(".")[0] for name in device_map if name}
    above = {".".join(name.split(".")[:depth]) for name in inside for depth in range(1, name.count(".") + 2)}
    parted = {type(part).__name__ for name, part in model.named_modules() if name in above or (not name and inside)}
    if whole & parted:
        raise PlanError(
            refusal(
                "device_map",
                found=f"devices for parts of {', '.join(sorted(whole & parted))}",
                expected="one for each module of a class that is to stay whole",
                way_out="name the module itself in the map, or leave the class out",
            )
        )
    return blocks_of(model, BlockRules(no_split_classes=whole | (declared_whole(model) - parted)))


def _settings(folder: str | os.PathLike[str] | None, skip_keys: str | Iterable[str] | None) -> Settings:
    skipped = [skip_keys] if isinstance(skip_keys, str) else skip_keys or ()
    return Settings(offload_folder=None if folder is None else Path(folder), skip_keys=frozenset(skipped))


def _carry_out(model: nn.Module, plan: Plan, device_map: Mapping[str, Any], settings: Settings) -> None:
    """Make a plan true: move a model that has one device, stream what does not rest where it runs."""
    devices = dict.fromkeys(each.execution_device for each in plan.placements)
    running = [torch.device("cpu") if device == "cpu" else transfer_to(device).device for device in devices]
    is_residency = len(running) > 1 or any(each.is_streamed for each in plan.placements)
    start = torch.device("cpu") if is_residency or not running else running[0]
    if any(tensor.device != start for tensor in (*model.parameters(), *model.buffers())):
        model.to(start)
    if is_residency:
        if settings.offload_folder is not None:
            settings.offload_folder.mkdir(parents=True, exist_ok=True)
        Residency(model, plan, settings)
    vars(model)["hf_device_map"] = dict(device_map)
