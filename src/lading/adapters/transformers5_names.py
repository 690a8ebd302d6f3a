"""Hold the private names of transformers 5 that are not the same in every release from 5.0 on.

`transformers5` binds directly with a dozen of them, which came between 5.1 and 5.16. `missing_names` is the gate: it
looks once whether all are there with the parameters that they are called with; where one is not, loading takes the
public path, which gives the same model. What the description of a model cannot do without is asked here in each form.
"""

from __future__ import annotations

import inspect
import logging
from functools import cache
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel, conversion_mapping, core_model_loading, modeling_utils

_LOG = logging.getLogger(__name__)
_SUBJECT = f"transformers {transformers.__version__}"
_CALLED: tuple[tuple[Any, str, tuple[str, ...]], ...] = (
    (PreTrainedModel, "get_init_context", ("dtype", "is_quantized", "_is_ds_init_called", "allow_all_kernels")),
    (PreTrainedModel, "is_remote_code", ()),
    (PreTrainedModel, "_get_dtype_plan", ("dtype",)),
    (PreTrainedModel, "_finalize_model_loading", ("model", "load_config", "loading_info")),
    (PreTrainedModel, "set_use_kernels", ("use_kernels", "kernel_config")),
    (modeling_utils, "_get_dtype", ("dtype", "config", "state_dict", "weights_only", "hf_quantizer")),
    (modeling_utils, "patch_output_recorders", ("model",)),
    (modeling_utils, "LoadStateDictConfig", ("pretrained_model_name_or_path", "dtype")),
    (modeling_utils, "LoadStateDictInfo", ("missing_keys", "unexpected_keys", "mismatched_keys", "skipped_pp_keys")),
    (modeling_utils, "is_deepspeed_zero3_enabled", ()),
    (modeling_utils, "is_fsdp_enabled", ()),
    (conversion_mapping, "_build_checkpoint_conversion_mapping", ()),
    (conversion_mapping, "get_checkpoint_conversion_mapping", ()),
    (core_model_loading, "WeightConverter", ()),
)
"""What the direct path calls: where it is, its name, and the parameters that it must have."""


@cache
def missing_names() -> tuple[str, ...]:
    """Name what the direct path needs and this transformers has not, or not in that form; say so once in the log."""
    found = []
    for place, name, parameters in _CALLED:
        held = getattr(place, name, None)
        known = inspect.signature(held).parameters if callable(held) else {}
        lacking = [each for each in parameters if each not in known]
        if held is None or lacking:
            found.append(f"{place.__name__}.{name}" + (f"({', '.join(lacking)})" if held is not None else ""))
    if found:
        _LOG.debug("%s lacks %s: loading goes through from_pretrained", _SUBJECT, ", ".join(found))
    return tuple(found)


def init_contexts(cls: Any, dtype: torch.dtype, *, is_quantized: bool) -> list[Any]:
    """Give the contexts in which ``from_pretrained`` builds a model; before 5.3 nobody asked about kernels."""
    asks_about_kernels = "allow_all_kernels" in inspect.signature(cls.get_init_context).parameters
    contexts: list[Any] = cls.get_init_context(dtype, is_quantized, False, *([None] if asks_about_kernels else []))
    return contexts


def dtype_plan(model: Any, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Give the names, or parts of them, that have another dtype than the rest; in 5.0 they stand at the model."""
    found: dict[str, torch.dtype] = (
        model._get_dtype_plan(dtype) if hasattr(model, "_get_dtype_plan") else model.dtype_plan
    )
    return found
