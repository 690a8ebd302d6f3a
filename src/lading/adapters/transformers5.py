"""Bind a checkpoint directly to a transformers 5 model where nothing needs converting.

``from_pretrained`` compiles a thousand regular expressions and starts a thread pool before it looks at a tensor, and
calls every random initialisation on meta. This path leaves that out when every name, shape and dtype of the checkpoint
is the model's own. It builds, initialises, ties and finishes with transformers' own functions, so that the result is
the one that ``from_pretrained`` gives. Anything else (conversions, casts, quantizers, keep-in-fp32 plans, devices)
returns None, and the caller takes the public path.

Private names of transformers used here, all checked by `transformers5_names`: ``get_init_context``, ``_get_dtype``,
``_get_dtype_plan``, ``_finalize_model_loading``, ``LoadStateDictConfig``, ``LoadStateDictInfo``,
``patch_output_recorders`` and the table of ``conversion_mapping`` (transformers 5.16 to 5.24).
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Mapping
from functools import cache, partial
from types import FunctionType
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, conversion_mapping, modeling_utils
from transformers.core_model_loading import WeightConverter, WeightTransform, rename_source_key
from transformers.utils import ContextManagers

from lading.adapters.model_choice import ModelChoice
from lading.adapters.model_request import ModelRequest, load_generation_config
from lading.adapters.transformers5_names import missing_names
from lading.checkpoint.empty import MetaWithoutInits
from lading.checkpoint.slots import Slot

_LOG = logging.getLogger(__name__)
_KNOWN_KWARGS = {
    "adapter_kwargs",
    "adapter_name",
    "attn_implementation",
    "generation_config",
    "ignore_mismatched_sizes",
}


def load_directly(
    request: ModelRequest, choice: ModelChoice, tensors: Mapping[str, torch.Tensor]
) -> tuple[Any, dict[str, Any]] | None:
    """Build the chosen class and bind ``tensors`` to it, or give None where the public path is needed.

    Returns:
        The model and a loading info like ``from_pretrained``'s.
    """
    if missing_names() or not _is_plain(request, choice):
        return None
    cls, config = choice.model_class, copy.deepcopy(choice.config)  # the model's own from here on
    config, dtype = modeling_utils._get_dtype(request.dtype or "auto", None, config, None, dict(tensors), True, None)
    config.name_or_path = request.directory_or_repo_id
    contexts = cls.get_init_context(dtype, False, False, None)
    contexts = [MetaWithoutInits() if isinstance(each, torch.device) else each for each in contexts]
    with ContextManagers(contexts):
        model = cls(config)
        modeling_utils.patch_output_recorders(model)
    state = model.state_dict()
    modules = dict(model.named_modules(remove_duplicate=False))
    if not _fits(model, state, tensors, dtype) or _may_convert(modules.values()):
        return None
    _assign(modules, tensors)
    load_config = modeling_utils.LoadStateDictConfig(
        pretrained_model_name_or_path=request.directory_or_repo_id, dtype=dtype
    )
    info = modeling_utils.LoadStateDictInfo(
        missing_keys=set(state) - set(tensors),
        unexpected_keys=set(),
        mismatched_keys=set(),
        error_msgs=[],
        conversion_errors={},
        skipped_pp_keys=set(),
    )
    model._weight_conversions = []
    info = cls._finalize_model_loading(model, load_config, info)
    _bind_again(model, tensors)
    model.eval()
    model.set_use_kernels(False, None)
    load_generation_config(model, request)
    return model, info.to_dict()


def _is_plain(request: ModelRequest, choice: ModelChoice) -> bool:
    return (
        not set(choice.loader_kwargs) - _KNOWN_KWARGS
        and not choice.init_kwargs
        and request.device_map is None
        and not isinstance(request.dtype, dict)
        and not choice.is_quantised
        and getattr(choice.config, "fusion_config", None) is None
        and not modeling_utils.is_deepspeed_zero3_enabled()
        and not modeling_utils.is_fsdp_enabled()
        and not choice.model_class.is_remote_code()
    )


def _fits(
    model: Any, state: Mapping[str, torch.Tensor], tensors: Mapping[str, torch.Tensor], dtype: torch.dtype
) -> bool:
    """Say whether each tensor is exactly what the model has a place for, and only ties are without one."""
    if model._get_dtype_plan(dtype) or set(state) - set(tensors) - set(model.all_tied_weights_keys):
        return False
    return all(
        (slot := state.get(name)) is not None
        and isinstance(slot, torch.Tensor)
        and slot.shape == tensor.shape
        and slot.dtype == tensor.dtype
        for name, tensor in tensors.items()
    )


def _assign(modules: Mapping[str, nn.Module], tensors: Mapping[str, torch.Tensor]) -> None:
    """Put each tensor in its place, marked as transformers marks what it need not draw."""
    for name, tensor in tensors.items():
        path, _, attribute = name.rpartition(".")
        slot = Slot(modules[path], attribute, is_parameter=attribute not in modules[path]._buffers)
        bound = nn.Parameter(tensor, requires_grad=tensor.is_floating_point()) if slot.is_parameter else tensor
        bound._is_hf_initialized = True  # type: ignore[attr-defined]
        slot.put(bound)
    for module in modules.values():
        if _needs_no_drawing(module):
            module._is_hf_initialized = True  # type: ignore[assignment]


def _needs_no_drawing(module: nn.Module) -> bool:
    """Say whether transformers' initialisation would visit a module in vain: a leaf, complete, without buffers.

    Not embeddings: some models clear the padding row of a loaded one here, and so do we.
    """
    if module._modules or module._buffers or isinstance(module, nn.Embedding):
        return False
    held = [parameter for parameter in module._parameters.values() if parameter is not None]
    if not held:
        return type(module).__module__.startswith("torch.nn.modules.")
    return not any(parameter.is_meta for parameter in held)


def _bind_again(model: Any, tensors: Mapping[str, torch.Tensor]) -> None:
    """Give back the file's bytes where tying copied a bias only to pad it by nothing."""
    ties = {*model.all_tied_weights_keys.keys(), *model.all_tied_weights_keys.values()}
    for name in ties & set(tensors):
        parameter, tensor = model.get_parameter_or_buffer(name), tensors[name]
        is_copy = parameter.data_ptr() != tensor.data_ptr() and parameter.dim() == 1
        if is_copy and parameter.shape == tensor.shape and torch.equal(parameter, tensor):
            parameter.data = tensor


def _may_convert(modules: Iterable[nn.Module]) -> bool:
    """Say whether transformers may compute some of this model's tensors from others of the same name.

    Pure renames cannot matter here: every name is the model's own already.
    """
    parts = [part for part in modules if isinstance(part, PreTrainedModel)]
    identifiers = {type(part).__name__ for part in parts} | {str(part.config.model_type) for part in parts}
    converted: frozenset[str] | None = None
    if conversion_mapping._checkpoint_conversion_mapping_cache is None:
        converted = _sketch_converted()
    if converted is None:  # the real table: already built, or built now because its builder cannot be sketched
        conversion_mapping.get_checkpoint_conversion_mapping("legacy")
        table = conversion_mapping._checkpoint_conversion_mapping_cache
        converted = frozenset(
            key for key, rows in table.items() if any(isinstance(row, WeightConverter) for row in rows)
        )
    return bool(identifiers & converted)


@cache
def _sketch_converted() -> frozenset[str] | None:
    """List the model types and classes that have converters, without compiling the table's regular expressions.

    Runs transformers' own builder of the table with its entry classes replaced by plain records; None where the
    builder does more with them than such a record can answer.
    """
    build = conversion_mapping._build_checkpoint_conversion_mapping
    records = {
        name: partial(_Entry, issubclass(value, WeightConverter))
        for name, value in vars(conversion_mapping).items()
        if isinstance(value, type) and issubclass(value, WeightTransform)
    }
    try:
        table = FunctionType(build.__code__, {**build.__globals__, **records})()
        return frozenset(key for key, rows in table.items() if any(row.is_converter for row in rows))
    except (AttributeError, TypeError, LookupError):
        _LOG.debug("transformers' conversion table cannot be sketched", exc_info=True)
        return None


class _Entry:
    """Stand in for a row of the conversion table."""

    def __init__(
        self, is_converter: bool, source_patterns: Any = (), target_patterns: Any = (), *_rest: Any, **_more: Any
    ) -> None:
        self.is_converter = is_converter
        self.source_patterns = [source_patterns] if isinstance(source_patterns, str) else source_patterns
        self.target_patterns = [target_patterns] if isinstance(target_patterns, str) else target_patterns


def target_name(model: Any, name: str, state: Mapping[str, torch.Tensor]) -> str:
    """Follow one checkpoint name through transformers' renames and converters to the model's name."""
    table = conversion_mapping.get_model_conversion_mapping(model)
    renames = [entry for entry in table if not isinstance(entry, WeightConverter)]
    converters = [entry for entry in table if isinstance(entry, WeightConverter)]
    renamed: str = rename_source_key(name, renames, converters, model.base_model_prefix, state)[0]
    return renamed
