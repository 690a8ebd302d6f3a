"""Load a model in one call: find the checkpoint, map it, build the model, bind, check.

Composes `checkpoint` and `adapters`; knows neither's inside.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal, overload

import torch
from torch import nn

from lading.adapters.deepspeed import refuse_zero_init
from lading.adapters.model_choice import ModelChoice, choose_model, weights_source
from lading.adapters.model_request import ModelRequest
from lading.adapters.peft import attach_adapter, find_adapter
from lading.adapters.transformers import load_model
from lading.api.arguments import (
    PathOrRepoId,
    named_dtype,
    one_device,
    one_dtype,
    plain_torch,
    source_of,
    strictness,
)
from lading.api.offloading import place, refuse_two_places
from lading.checkpoint.bind import BindOptions, bind
from lading.checkpoint.catalog import Catalog
from lading.checkpoint.completeness import Strictness
from lading.checkpoint.guard import FileGuard
from lading.checkpoint.locate import find_entry, open_catalog
from lading.checkpoint.mapping import map_catalog, tensors_of
from lading.checkpoint.readahead import start_readahead
from lading.checkpoint.report import LoadReport
from lading.errors import CheckpointNotFoundError
from lading.names import Rename
from lading.placement.plan import Plan


@overload
def load(path_or_repo_id: PathOrRepoId, *, output_loading_info: Literal[False] = False, **options: Any) -> Any: ...
@overload
def load(
    path_or_repo_id: PathOrRepoId, *, output_loading_info: Literal[True], **options: Any
) -> tuple[Any, LoadReport]: ...
def load(  # noqa: PLR0913 - the names that users of from_pretrained know
    path_or_repo_id: PathOrRepoId,
    *,
    model_class: type | str | None = None,
    dtype: torch.dtype | str | dict[str, Any] | None = "auto",
    strict: Strictness = True,
    copy: bool = False,
    readahead: bool = False,
    guard: bool = False,
    device_map: Any = None,
    max_memory: Mapping[Any, Any] | None = None,
    plan: Plan | None = None,
    offload_folder: PathOrRepoId | None = None,
    output_loading_info: bool = False,
    revision: str | None = None,
    subfolder: str = "",
    variant: str | None = None,
    cache_dir: PathOrRepoId | None = None,
    local_files_only: bool = False,
    token: str | bool | None = None,
    trust_remote_code: bool = False,
    torch_dtype: torch.dtype | str | None = None,
    low_cpu_mem_usage: bool | None = None,
    **model_kwargs: Any,
) -> Any:
    """Load a transformers model whose weights are the checkpoint's own bytes.

    In the checkpoint's dtype on the CPU nothing is copied and nothing read: each parameter is a private view of the
    file, read when a forward reads it. Writing to a weight (training, editing) copies its page and never reaches the
    file. Outputs are bit-identical to ``from_pretrained``'s. Casts, fused experts, quantised checkpoints and devices go
    through transformers' own path.

    Args:
        path_or_repo_id: a directory, a checkpoint file beside its ``config.json``, or a repo id of the hub.
        model_class: a transformers class or auto class, or its name; None means the architecture in the configuration.
        dtype: ``"auto"`` keeps the configuration's dtype, else the checkpoint's; a ``torch.dtype`` or its name casts.
        strict: True: every parameter and persistent buffer comes from the checkpoint, or loading raises; what the
            checkpoint has beyond them (heads, prediction layers) is left out, logged in one line and in the report.
            ``"exact"`` refuses that too. False initialises what is missing as the model does, and logs it. Wrong shapes
            and element types are refused in any case.
        copy: read the weights into memory now, immune to later changes of the file. Otherwise replace a checkpoint by
            rename, as all savers here do: a file shortened in place kills the process that reads it.
        readahead: read the file in layer order in the background, beginning before the model is built.
        guard: before each forward, check that no shard changed in place (size and time of change; best effort). Keeps
            one open file for each shard.
        device_map: None for the CPU; one device for the whole model, such as ``"cuda:0"`` or ``{"": 0}``; a map of
            module names to devices; or ``"auto"``, which plans with ``max_memory``. What does not rest where it runs is
            streamed, see `lading.offload`.
        max_memory: for ``device_map="auto"``, as for `lading.plan`.
        plan: from `lading.plan`, in place of a ``device_map``.
        offload_folder: see `lading.offload`.
        output_loading_info: also return a `LoadReport`.
        revision: branch, tag or commit, for a repo id.
        subfolder: folder inside the repo or directory.
        variant: such as ``"fp16"`` for ``model.fp16.safetensors``.
        cache_dir: the hub's cache, where it is not the one of ``HF_HOME``.
        local_files_only: do not ask the network; so does ``HF_HUB_OFFLINE=1``.
        token: for private repositories.
        trust_remote_code: allow code from the repository to run.
        torch_dtype: the older name of ``dtype``.
        low_cpu_mem_usage: accepted for older code; memory use is always low.
        **model_kwargs: what else ``from_pretrained`` takes: ``config``, ``attn_implementation``, ``use_safetensors``,
            ``ignore_mismatched_sizes``, ``generation_config``, attributes of the configuration such as ``num_labels``.

    Returns:
        The model in evaluation mode, no tensor of it on meta; with ``output_loading_info`` a pair of it and a report.

    Raises:
        CheckpointNotFoundError: nothing there, or not in the local cache while offline.
        MissingTensorError: names that no shard has, unless ``strict`` is False; a new head is such a name too.
        ShapeMismatchError: shapes differ.
        CorruptShardError: a shard breaks its format; with ``guard``, raised by the forward after a change in place.
        CheckpointError: anything else that does not fit, each time with file, tensor, found and expected.
        MissingExtraError: an adapter stands in the folder, and PEFT is not installed to attach it.
        PlanError: no placement keeps within ``max_memory``, a ``device_map`` that leaves a block out, or a device that
            is not here.
        TypeError: an argument that means nothing here.

    Any thread may load: models are built one at a time, because transformers patches torch meanwhile. (A module that
    another thread builds without lading at that moment may be caught by these patches, as with ``from_pretrained``.)
    The model may then be called from many threads.

    Example:
        >>> import lading
        >>> model = lading.load("path/to/model")                              # doctest: +SKIP
        >>> model, report = lading.load("org/name", output_loading_info=True)  # doctest: +SKIP
        >>> report.copied_bytes                                               # doctest: +SKIP
        0
    """
    refuse_zero_init()
    refuse_two_places(device_map, max_memory, plan)
    copy = copy or bool(model_kwargs.get("disable_mmap"))
    source = source_of(
        path_or_repo_id,
        revision=revision,
        subfolder=subfolder,
        variant=variant,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
        token=token,
    )
    request = ModelRequest(
        source=source,
        model_class=model_class,
        dtype=one_dtype(dtype, torch_dtype),
        strict=strictness(strict),
        trust_remote_code=trust_remote_code,
        device_map=one_device(device_map),
        model_kwargs=model_kwargs,
    )
    base, adapter = find_adapter(request)
    choice = _chosen(base)
    catalog = open_catalog(weights_source(base, choice))
    mappings = {} if copy else map_catalog(catalog)
    if readahead and not copy:
        start_readahead(catalog, mappings)
    with plain_torch(torch.float32):
        tensors = tensors_of(catalog, mappings, copy=copy)
        model, report = load_model(base, choice, catalog, mappings, tensors)
        if adapter is not None:
            attach_adapter(model, adapter)
            report = replace(report, adapter=adapter.place)
    if guard and not copy:
        _guard(model, catalog)
    if plan is not None or request.device_map is None:
        place(model, device_map, max_memory, plan, offload_folder)
    return (model, report) if output_loading_info else model


def load_into(  # noqa: PLR0913 - as for load
    module: nn.Module,
    path_or_repo_id: PathOrRepoId,
    *,
    rename: Rename | None = None,
    dtype: torch.dtype | str | None = "auto",
    strict: Strictness = True,
    copy: bool = False,
    readahead: bool = False,
    guard: bool = False,
    revision: str | None = None,
    subfolder: str = "",
    inner_key: str | None = None,
) -> LoadReport:
    """Fill any module with a checkpoint, without copying, or leave it as it was.

    Args:
        module: built inside `lading.empty` (its parameters on meta), or real; a real parameter keeps its identity and
            its device and gets the checkpoint's bytes.
        path_or_repo_id: a file of safetensors or of torch.save, a directory that holds one, or a repo id.
        rename: how the checkpoint's names become the module's: a mapping of names or dotted prefixes, or a function
            that returns the new name, or None to leave a tensor out.
        dtype: ``"auto"`` binds floats in the checkpoint's dtype; None casts them to what the module declares; a
            ``torch.dtype`` casts them to it. Other element types must match exactly.
        strict: see `lading.load`; False draws what is missing as the module's own code would have.
        copy: see `lading.load`.
        readahead: see `lading.load`.
        guard: see `lading.load`.
        revision: see `lading.load`.
        subfolder: see `lading.load`.
        inner_key: for a file of torch.save that holds more than named tensors, such as a training checkpoint: the key
            of the dict of tensors in it (``"state_dict"``), with dots between the keys of dicts in dicts. Nothing of
            the rest is loaded, and no code that it names runs.

    Returns:
        What was bound, copied, missing and left over.

    Raises:
        CheckpointError: and its kinds, as for `lading.load`; the module is then as it was before.

    Thread rule: nobody else may use the module meanwhile.

    Example:
        >>> import lading, torch
        >>> with lading.empty():
        ...     net = torch.nn.Linear(2, 2)
        >>> report = lading.load_into(net, "net.safetensors", rename={"model": ""})  # doctest: +SKIP
    """
    refuse_zero_init()
    source = source_of(path_or_repo_id, revision=revision, subfolder=subfolder, inner_key=inner_key)
    catalog = open_catalog(source)
    mappings = {} if copy else map_catalog(catalog)
    if readahead and not copy:
        start_readahead(catalog, mappings)
    options = BindOptions(rename=rename, dtype=named_dtype(dtype), strict=strictness(strict), copy=copy)
    with plain_torch():
        report = bind(module, catalog, mappings, options)
    if guard and not copy:
        _guard(module, catalog)
    return report


def _chosen(request: ModelRequest) -> ModelChoice:
    """Choose class and configuration; where weights are lacking too, what is said of them says more."""
    try:
        return choose_model(request)
    except CheckpointNotFoundError:
        find_entry(request.source)
        raise


def _guard(module: nn.Module, catalog: Catalog) -> None:
    module.register_forward_pre_hook(FileGuard(catalog.shards), prepend=True)
