"""Describe a transformers model as `lading.load` would make it, without reading or allocating a weight.

Knows how ``from_pretrained`` settles the dtype, what stays in float32 and what is tied; `quantised_sizes` knows what
quantised weights weigh. Guarantees: name by name the dtype and the bytes of the loaded model, or an error. Headers are
read only where the configuration names no dtype, or says that the checkpoint is quantised.

Not seen from here: transformers 5 leaves declared ties untied where the checkpoint holds both with different values.

Private names of transformers used here: ``_get_dtype``, ``_get_dtype_plan``, ``_keep_in_fp32_modules``,
``_keep_in_fp32_modules_strict``, ``_no_split_modules`` and ``get_init_context``.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel, modeling_utils
from transformers.quantizers.auto import get_hf_quantizer
from transformers.utils import ContextManagers

from lading.adapters.deepspeed import refuse_zero_init
from lading.adapters.model_choice import ModelChoice, choose_model, weights_source
from lading.adapters.model_request import ModelRequest
from lading.adapters.peft import find_adapter, inject_empty
from lading.adapters.quantised_sizes import (
    is_bitsandbytes,
    is_castable,
    quantised_bytes,
    refusing_quantizers,
    tensors_of_model,
)
from lading.adapters.transformers import ONE_BUILD, default_dtype
from lading.checkpoint.catalog import Catalog
from lading.checkpoint.dtypes import torch_dtype
from lading.checkpoint.empty import MetaWithoutInits
from lading.checkpoint.locate import Source, open_catalog
from lading.compat import has_transformers5
from lading.errors import CheckpointNotFoundError, PlanError, name_list, refusal
from lading.placement.blocks import declared_whole, state_bytes

_RESIZING = frozenset(
    {"device_mesh", "distributed_config", "fusion_config", "kernel_config", "load_in_4bit", "load_in_8bit"}
    | {"tp_plan", "tp_size", "use_kernels"}
)
"""What ``from_pretrained`` takes and makes other tensors with than those that are counted here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Skeleton:
    """Say what a model will be once it is loaded. Immutable, but for the module."""

    module: nn.Module
    """From a configuration: tied, in evaluation mode, its tensors without memory and in the dtypes they will have."""
    dtype: torch.dtype
    """What weights are loaded in."""
    no_split_classes: tuple[str, ...]
    """Classes that transformers declares must stay on one device; empty: it declares none."""
    loaded_dtypes: Mapping[str, torch.dtype]
    """Name of a parameter or buffer → its dtype, wherever that is not ``dtype``; under all names of a tied one."""
    loaded_bytes: Mapping[str, int]
    """Name of a quantised weight → its bytes with its state, ahead of what shape and dtype say."""


def skeleton_of(request: ModelRequest) -> Skeleton:
    """Describe a model from its configuration; of its checkpoint, shards that are on this machine are looked at.

    Raises:
        CheckpointError: there is no configuration, or no class for it.
        PlanError: a quantizer that cannot work here, or sizes that cannot be told.

    Any thread; one model is built at a time.
    """
    refuse_zero_init()
    request, adapter = find_adapter(request)
    choice = choose_model(request)
    _refuse_resizing(request, choice)
    cls, kwargs = choice.model_class, choice.init_kwargs
    find_catalog = cache(partial(_local_catalog, weights_source(request, choice)))
    with ONE_BUILD, refusing_quantizers(request.directory_or_repo_id, choice.is_quantised):
        config, dtype, quantizer, device_map = _settle(request, choice, find_catalog)
        if is_bitsandbytes(quantizer) and quantizer.pre_quantized and find_catalog() is None:
            quantizer.pre_quantized = False  # then its weights are what quantising would make of them
        prepare = partial(_replace_layers, quantizer, dtype, device_map)
        try:
            contexts = [each for each in _contexts(cls, dtype, quantizer) if not isinstance(each, torch.device)]
            model = _build(cls, config, kwargs, [*contexts, MetaWithoutInits()], prepare)
        except RuntimeError:  # it reads a number while it is built, which transformers 4 keeps real
            model = _build(cls, config, kwargs, _contexts(cls, dtype, quantizer), prepare)
        dtypes = _loaded_dtypes(model, dtype, quantizer, casts=quantizer is not None and not has_transformers5())
        for _, tensor, _ in tensors_of_model(model):
            if dtypes.get(id(tensor), tensor.dtype) != tensor.dtype:
                tensor.data = tensor.data.to(dtypes[id(tensor)])
        sizes = {} if quantizer is None else quantised_bytes(model, quantizer, find_catalog)
        if adapter is not None:
            inject_empty(model, adapter, dtype)
    return _describe(model.eval(), dtype, {}, sizes)


def describe_module(module: nn.Module, dtype: torch.dtype | str | None = None) -> Skeleton:
    """Describe a model that exists already, on any device or on meta; it is only looked at.

    Args:
        module: a transformers model, or one wrapped in another module.
        dtype: what its floating-point parameters and persistent buffers will be cast to, but for those that its class
            keeps in float32 by name; anything but a ``torch.dtype``: they stay as they are.
    """
    if isinstance(dtype, torch.dtype):
        return _describe(module, dtype, _loaded_dtypes(module, dtype, None, casts=True), {})
    floats = (tensor.dtype for _, tensor, _ in tensors_of_model(module) if is_castable(tensor))
    return _describe(module, next(floats, torch.get_default_dtype()), {}, {})


def _describe(
    model: nn.Module, dtype: torch.dtype, dtypes: Mapping[int, torch.dtype], sizes: Mapping[str, int]
) -> Skeleton:
    others, weighed = {}, dict(sizes)
    for name, tensor, _ in tensors_of_model(model):
        final = dtypes.get(id(tensor), tensor.dtype)
        if final != dtype:
            others[name] = final
        if type(tensor) not in (nn.Parameter, torch.Tensor):
            state = state_bytes(tensor, model.get_submodule(name.rpartition(".")[0]))
            weighed.update({name: tensor.nbytes + state} if state else {})
    whole = tuple(sorted(declared_whole(model)))
    return Skeleton(module=model, dtype=dtype, no_split_classes=whole, loaded_dtypes=others, loaded_bytes=weighed)


def _refuse_resizing(request: ModelRequest, choice: ModelChoice) -> None:
    odd = sorted(choice.loader_kwargs.keys() & _RESIZING)
    if odd:
        raise PlanError(
            refusal(
                request.directory_or_repo_id or choice.model_class.__name__,
                found=f"the arguments {name_list(odd)}, which may change what is loaded",
                expected=f"arguments of {choice.model_class.__name__}, quantization_config or attn_implementation",
                way_out="leave them out, or plan the module that they make",
            )
        )


def _local_catalog(source: Source) -> Catalog | None:
    """Read the headers of a checkpoint whose files are all here; a plan downloads no weights."""
    if not source.path_or_repo_id:
        return None
    try:
        return open_catalog(replace(source, local_files_only=True))
    except CheckpointNotFoundError:  # an index without its shards too
        return None


def _settle(
    request: ModelRequest, choice: ModelChoice, find_catalog: Callable[[], Catalog | None]
) -> tuple[PretrainedConfig, torch.dtype, Any, Any]:
    """Let transformers decide: the configuration with its dtype, the dtype, the quantizer and its device map."""
    cls, config = choice.model_class, copy.deepcopy(choice.config)
    wanted = copy.deepcopy(choice.loader_kwargs.get("quantization_config"))
    stored = _stored(find_catalog()) if getattr(config, "dtype", None) is None else {}
    if has_transformers5():
        quantizer, config, device_map = get_hf_quantizer(config, wanted, request.device_map, True, {})
        config, dtype = modeling_utils._get_dtype(request.dtype or "auto", None, config, None, stored, True, quantizer)
        return config, dtype, quantizer, device_map
    quantizer, config, asked, device_map = get_hf_quantizer(
        config, wanted, request.dtype, False, False, request.device_map, True, {}
    )
    with default_dtype(None):
        config, dtype, _ = modeling_utils._get_dtype(cls, asked, None, config, None, stored, True)
    return config, dtype or torch.get_default_dtype(), quantizer, device_map


def _stored(catalog: Catalog | None) -> dict[str, torch.Tensor]:
    """Give tensors without bytes that have a checkpoint's dtypes; float32 where there is none."""
    if catalog is None:
        return {"": torch.empty(0, dtype=torch.float32)}
    specs = [shard.tensors[name] for shard in catalog.shards for name in shard.listing]
    return {
        spec.name: torch.empty(0, dtype=torch_dtype(spec.element), device="meta")
        for spec in specs
        if spec.element.torch_name is not None
    }


def _contexts(cls: Any, dtype: torch.dtype, quantizer: Any) -> list[Any]:
    """Make what transformers builds in: no initialisation, parameters on meta, the dtype."""
    if has_transformers5():
        from lading.adapters import transformers5_names

        return transformers5_names.init_contexts(cls, dtype, is_quantized=quantizer is not None)
    return [default_dtype(dtype), *cls.get_init_context(quantizer is not None, False)]


def _build(
    cls: Any, config: PretrainedConfig, kwargs: Mapping[str, Any], contexts: list[Any], prepare: Callable[[Any], None]
) -> Any:
    with ContextManagers(contexts):
        model = cls(copy.deepcopy(config), **kwargs)
        prepare(model)
    model.tie_weights(**({"recompute_mapping": False} if has_transformers5() else {}))
    return model


def _replace_layers(quantizer: Any, dtype: torch.dtype, device_map: Any, model: Any) -> None:
    if quantizer is not None:
        quantizer.preprocess_model(
            model=model,
            dtype=dtype,
            device_map=device_map,
            keep_in_fp32_modules=model._keep_in_fp32_modules,
            config=model.config,
            checkpoint_files=None,
            use_kernels=False,
        )


def _loaded_dtypes(model: nn.Module, dtype: torch.dtype, quantizer: Any, *, casts: bool) -> dict[int, torch.dtype]:
    """Say by identity what dtype loading gives to stored floats; what is tied takes after the name that is stored.

    ``casts``: they become ``dtype``, not what they were built in, unless kept in float32.
    """
    kept = _kept_in_float32(model, dtype, quantizer)
    targets = getattr(model, "all_tied_weights_keys", {})
    dtypes: dict[int, torch.dtype] = {}
    for name, tensor, is_stored in tensors_of_model(model):
        if is_stored and is_castable(tensor) and name not in targets:
            other = dtype if casts else tensor.dtype
            dtypes.setdefault(id(tensor), torch.float32 if kept is not None and kept.search(name) else other)
    return dtypes


def _kept_in_float32(model: nn.Module, dtype: torch.dtype, quantizer: Any) -> re.Pattern[str] | None:
    """Match the names that stay in float32: in transformers 4 by whole parts of a name, in 5 anywhere in it."""
    part = next((part for part in model.modules() if isinstance(part, PreTrainedModel)), None)
    if part is None:
        return None
    if has_transformers5():
        from lading.adapters import transformers5_names

        patterns = [name.replace("*", ".*") for name in transformers5_names.dtype_plan(part, dtype)]
    else:
        names = list(part._keep_in_fp32_modules_strict or ()) if dtype in (torch.float16, torch.bfloat16) else []
        if dtype == torch.float16 or getattr(quantizer, "use_keep_in_fp32_modules", False):
            names += part._keep_in_fp32_modules or ()
        patterns = [rf"(?:^|\.){name}(?:$|\.)" for name in names]
    return re.compile("|".join(patterns)) if patterns else None
