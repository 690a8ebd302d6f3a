"""Find the adapter that stands in a model's folder, and attach it as transformers does.

A folder with an ``adapter_config.json`` is a model with an adapter (PEFT's layout, 0.5 to 0.21): beside full weights,
or alone with the name of the model that it belongs to. Knows which of the two is the base and that every tensor of the
adapter must come from its file; what an adapter is, PEFT and transformers know.
"""

from __future__ import annotations

import importlib.util
import inspect
import json
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lading.adapters.model_request import ModelRequest
from lading.checkpoint.locate import find_file
from lading.compat import prefers_model_beside_adapter
from lading.errors import CheckpointError, MissingExtraError, MissingTensorError, name_list, refusal

_LOG = logging.getLogger(__name__)
_CONFIG = "adapter_config.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """Say where an adapter is. Immutable."""

    place: str
    """Its folder or repository."""
    name: str
    """What it is called in the model."""
    kwargs: dict[str, Any]
    """What finds its files: ``revision``, ``subfolder`` and the like."""


def find_adapter(request: ModelRequest) -> tuple[ModelRequest, Adapter | None]:
    """Look for an adapter where the model is, and say of which model it is one.

    Returns:
        The request for the base model: the same, or one for the model that an adapter standing alone names; and the
        adapter, or None.

    Raises:
        CheckpointError: its configuration cannot be read, or it stands alone and names no model.
        MissingExtraError: there is one, and PEFT is not installed.
    """
    place = request.directory_or_repo_id
    path = find_file(replace(request.source, path_or_repo_id=place), _CONFIG) if place else None
    if path is None:
        return request, None
    if importlib.util.find_spec("peft") is None:
        raise MissingExtraError(
            refusal(
                f"{place}, {_CONFIG}",
                found="an adapter, and no package peft",
                expected="peft, which attaches it",
                way_out='pip install "lading[peft]"',
            )
        )
    base = _base_of(path, place, request)
    kwargs = {key: value for key, value in request.hub_kwargs.items() if value}
    kwargs.update(request.model_kwargs.get("adapter_kwargs") or {})
    adapter = Adapter(place=place, name=request.model_kwargs.get("adapter_name") or "default", kwargs=kwargs)
    if base == place:
        return request, adapter
    return replace(request, source=replace(request.source, path_or_repo_id=base)), adapter


def _base_of(path: Path, place: str, request: ModelRequest) -> str:
    """Choose the base as the installed transformers does: what the adapter names, or a whole model beside it."""
    try:
        named = json.loads(path.read_bytes()).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(
            refusal(str(path), found=str(error), expected="a JSON object", way_out="save the adapter again")
        ) from error
    has_model = (Path(place).expanduser() / request.source.subfolder / "config.json").is_file()
    if has_model and (prefers_model_beside_adapter() or not named):
        return place
    if not isinstance(named, str) or not named:
        raise CheckpointError(
            refusal(
                str(path),
                found=f"base_model_name_or_path = {named!r}",
                expected="the model that the adapter belongs to",
                way_out="write its path or repo id into the file",
            )
        )
    return named


def attach_adapter(model: Any, adapter: Adapter) -> None:
    """Add an adapter to a loaded model, frozen, through the model's own ``load_adapter``.

    Raises:
        MissingTensorError: the adapter's file lacks tensors that its configuration asks for.
        CheckpointError: the model takes no adapters, or PEFT refuses this one.
    """
    if not hasattr(model, "load_adapter"):
        raise CheckpointError(
            refusal(
                f"{adapter.place}, {_CONFIG}",
                found=f"an adapter for a {type(model).__name__}",
                expected="a model that takes one (load_adapter)",
                way_out="attach it with peft.PeftModel.from_pretrained",
            )
        )
    options: dict[str, Any] = {"adapter_kwargs": adapter.kwargs}
    if "load_config" in inspect.signature(model.load_adapter).parameters:  # as `from_pretrained` passes it on
        options = {"adapter_kwargs": {}, "download_kwargs": adapter.kwargs, "dtype": model.config.dtype}
    try:
        info = model.load_adapter(adapter.place, adapter_name=adapter.name, **options)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise CheckpointError(
            refusal(
                f"{adapter.place}, {_CONFIG}",
                found=f"an adapter that cannot be attached ({error})",
                expected=f"one for {type(model).__name__}",
                way_out="load the base model alone and attach it with peft",
            )
        ) from error
    missing = sorted(getattr(info, "missing_keys", ())) if info is not None else _not_in_file(model, adapter)
    if missing:
        raise MissingTensorError(
            refusal(
                f"{adapter.place}, adapter {adapter.name!r}",
                found=f"no tensor for {name_list(missing)}",
                expected=f"every weight that {_CONFIG} asks for",
                way_out="save the adapter again, or name the model that it belongs to",
            )
        )
    _LOG.warning("%s: adapter %r is attached to %s", adapter.place, adapter.name, type(model).__name__)


def _not_in_file(model: Any, adapter: Adapter) -> list[str]:
    """List the adapter's names that its file has not: transformers 4 only logs them."""
    from peft import load_peft_weights

    prefix = "base_model.model."
    stored = {name.removeprefix(prefix) for name in load_peft_weights(adapter.place, device="cpu", **adapter.kwargs)}
    return sorted(set(model.get_adapter_state_dict(adapter.name)) - stored)


def inject_empty(skeleton: Any, adapter: Adapter, dtype: torch.dtype) -> None:
    """Add an adapter's layers to a model without weights, on meta, in the dtype that the model is loaded in."""
    from peft import PeftConfig, inject_adapter_in_model

    config = PeftConfig.from_pretrained(adapter.place, **adapter.kwargs)
    config.inference_mode = True
    before = set(skeleton.parameters())
    inject_adapter_in_model(config, skeleton, adapter.name, low_cpu_mem_usage=True)
    for parameter in set(skeleton.parameters()) - before:
        parameter.data = parameter.data.to(dtype)
