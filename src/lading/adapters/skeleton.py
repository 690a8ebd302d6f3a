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
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel, modeling_utils
from transformers.quantizers.auto import get_hf_quantizer
from transformers.utils import ContextManagers

from lading.adapters.deepspeed import refuse_zero_init
from lading.adapters.model_request import ModelRequest
from lading.adapters.quantised_sizes import (
    is_bitsandbytes,
    is_castable,
    quantised_bytes,
    refusing_quantizers,
    tensors_of_model,
)
from lading.adapters.transformers import ONE_BUILD, find_class, is_quantised, read_config
from lading.checkpoint.catalog import Catalog
from lading.checkpoint.dtypes import torch_dtype
from lading.checkpoint.empty import MetaWithoutInits
from lading.checkpoint.locate import Source, open_catalog
from lading.compat import has_transformers5
from lading.errors import CheckpointNotFoundError, CorruptShardError, PlanError, name_list, refusal
from lading.placement.blocks import declared_whole, state_bytes

_SIZELESS = {"config", "quantization_config", "attn_implementation", "experts_implementation", "generation_config"} | {
    "key_mapping", "max_memory", "offload_folder", "offload_buffers", "use_safetensors", "weights_only", "disable_mmap"
}  # fmt: skip
"""What ``from_pretrained`` takes and no size depends on, or is heeded here."""


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
    config = read_config(request)
    cls = find_class(config, request)
    kwargs = _init_kwargs(cls, request)
    find_catalog = cache(partial(_local_catalog, request.source))
    with ONE_BUILD, refusing_quantizers(request.directory_or_repo_id, is_quantised(config, request)):
        config, dtype, quantizer, device_map = _settle(cls, copy.deepcopy(config), request, find_catalog)
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


def _init_kwargs(cls: Any, request: ModelRequest) -> dict[str, Any]:
    """Pick the arguments that are the model's own; the others are the loader's, and must not change sizes."""
    own = inspect.signature(cls.__init__).parameters
    odd = sorted(request.model_kwargs.keys() - _SIZELESS - own.keys())
    if odd:
        raise PlanError(
            refusal(
                request.directory_or_repo_id or cls.__name__,
                found=f"the arguments {name_list(odd)}, which may change what is loaded",
                expected=f"arguments of {cls.__name__}, quantization_config or attn_implementation",
                way_out="leave them out, or plan the module that they make",
            )
        )
    return {key: value for key, value in request.model_kwargs.items() if key in own and key != "config"}


def _local_catalog(source: Source) -> Catalog | None:
    """Read the headers of a checkpoint whose files are all here; a plan downloads no weights."""
    if not source.path_or_repo_id:
        return None
    try:
        return open_catalog(replace(source, local_files_only=True))
    except CheckpointNotFoundError:
        return None
    except CorruptShardError as error:
        if isinstance(error.__cause__, FileNotFoundError):  # an index without its shards
            return None
        raise


def _settle(
    cls: Any, config: PretrainedConfig, request: ModelRequest, find_catalog: Callable[[], Catalog | None]
) -> tuple[PretrainedConfig, torch.dtype, Any, Any]:
    """Let transformers decide: the configuration with its dtype, the dtype, the quantizer and its device map."""
    for name in {"attn_implementation", "experts_implementation"} & request.model_kwargs.keys():
        setattr(config, f"_{name}", request.model_kwargs[name])
    wanted = copy.deepcopy(request.model_kwargs.get("quantization_config"))
    stored = _stored(find_catalog()) if getattr(config, "dtype", None) is None else {}
    if has_transformers5():
        quantizer, config, device_map = get_hf_quantizer(config, wanted, request.device_map, True, {})
        config, dtype = modeling_utils._get_dtype(request.dtype or "auto", None, config, None, stored, True, quantizer)
        return config, dtype, quantizer, device_map
    quantizer, config, asked, device_map = get_hf_quantizer(
        config, wanted, request.dtype, False, False, request.device_map, True, {}
    )
    with _default_dtype(None):
        config, dtype, _ = modeling_utils._get_dtype(cls, asked, None, config, None, stored, True)
    return config, dtype or torch.get_default_dtype(), quantizer, device_map


def _stored(catalog: Catalog | None) -> dict[str, torch.Tensor]:
    """Give tensors without bytes that have a checkpoint's dtypes; float32 where there is none."""
    if catalog is None:
        return {"": torch.empty(0, dtype=torch.float32)}
    return {spec.name: torch.empty(0, dtype=torch_dtype(spec.element), device="meta") for spec in catalog}


@contextmanager
def _default_dtype(dtype: torch.dtype | None) -> Iterator[None]:
    """Restore torch's default dtype afterwards: transformers 4 builds under it, and leaves it set."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype or before)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _contexts(cls: Any, dtype: torch.dtype, quantizer: Any) -> list[Any]:
    """Make what transformers builds in: no initialisation, parameters on meta, the dtype."""
    if has_transformers5():
        from lading.adapters import transformers5_names

        return transformers5_names.init_contexts(cls, dtype, is_quantized=quantizer is not None)
    return [_default_dtype(dtype), *cls.get_init_context(quantizer is not None, False)]


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
