"""Load any transformers architecture from a catalog, as ``from_pretrained`` would, and hold the result to the laws.

Knows configurations, classes and the loading path that both major versions share, ``cls.from_pretrained(None,
config=…, state_dict={name: mapped tensor})``, through which renames, conversions, casts, ties and quantizers are
transformers' own. Where nothing of that is needed, `transformers5` binds directly.

Guarantees: complete and exact, or an error; nothing on meta; the file untouched.
"""

from __future__ import annotations

import copy
import logging
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from transformers import AutoConfig, PretrainedConfig
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.utils import logging as transformers_logging

from lading.adapters.model_request import ModelRequest, load_generation_config
from lading.checkpoint.catalog import Catalog
from lading.checkpoint.dtypes import is_plain_float, require_compatible, torch_dtype
from lading.checkpoint.empty import empty
from lading.checkpoint.mapping import ShardMapping
from lading.checkpoint.report import LoadReport
from lading.checkpoint.slots import settle_bytes, shape_refusal
from lading.compat import has_transformers5
from lading.errors import CheckpointError, MissingTensorError, ShapeMismatchError, name_list, refusal

if TYPE_CHECKING:
    from lading.adapters.transformers_flags import thread_safe_outputs  # noqa: F401 - public here

_LOG = logging.getLogger(__name__)
ONE_BUILD = threading.RLock()
"""transformers patches torch and its own classes while it builds a model: two builds at once leave them patched."""


def __getattr__(name: str) -> Any:
    if name == "thread_safe_outputs":  # it needs transformers' models, which cannot be imported under every context
        from lading.adapters.transformers_flags import thread_safe_outputs

        return thread_safe_outputs
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def read_config(request: ModelRequest) -> PretrainedConfig:
    """Read a model's configuration.

    Raises:
        CheckpointError: there is none, it is not JSON, or it needs remote code that was not allowed.
    """
    given = request.model_kwargs.get("config")
    if isinstance(given, PretrainedConfig):
        return given
    try:
        config = AutoConfig.from_pretrained(
            request.directory_or_repo_id, trust_remote_code=request.trust_remote_code, **request.hub_kwargs
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:  # the last two: JSON, but no object
        raise CheckpointError(
            refusal(
                f"{request.directory_or_repo_id}, config.json",
                found=str(error).strip(),
                expected="a transformers configuration",
                way_out="use lading.empty() and lading.load_into() for other modules",
            )
        ) from error
    if not request.trust_remote_code and "attn_implementation" not in request.model_kwargs:
        _refuse_hub_kernels(config, request)
    return config


def _refuse_hub_kernels(config: PretrainedConfig, request: ModelRequest) -> None:
    """Refuse a configuration that names code of somebody's repository as its attention: transformers would run it."""
    named: list[Any] = []
    parts = [config]
    for part in parts:
        named += [getattr(part, f"_{kind}_implementation", None) for kind in ("attn", "experts")]
        parts += [inner for inner in vars(part).values() if isinstance(inner, PretrainedConfig)]
    named += [name for each in named if isinstance(each, dict) for name in each.values()]
    kernels = [name for name in named if isinstance(name, str) and "/" in name]
    if kernels:
        raise CheckpointError(
            refusal(
                f"{request.directory_or_repo_id}, config.json",
                found=f"code of the repository {kernels[0]!r} as its attention",
                expected="an implementation that transformers has, such as 'sdpa'",
                way_out="pass attn_implementation=, or trust_remote_code=True if you trust it",
            )
        )


def find_class(config: PretrainedConfig, request: ModelRequest) -> type[Any]:
    """Find the class to build: the one asked for, else the architecture that the configuration names.

    Raises:
        CheckpointError: transformers has no such class, or it is remote code that was not allowed.
    """
    asked = request.model_class
    if asked is None:
        asked = next(iter(getattr(config, "architectures", None) or ["AutoModel"]))
    name = asked if isinstance(asked, str) else asked.__name__
    remote: str | None = _remote_reference(config, name)
    if remote is not None and request.trust_remote_code:
        found: type[Any] = get_class_from_dynamic_module(remote, request.directory_or_repo_id, **request.hub_kwargs)
        return found
    cls = getattr(transformers, name, None) if isinstance(asked, str) else asked
    if hasattr(cls, "_model_mapping"):
        cls = _from_auto_class(cls, config)
    if isinstance(cls, type) and hasattr(cls, "from_pretrained"):
        return cls
    where, way_out = f"which transformers {transformers.__version__} does not have", "pass model_class="
    if remote is not None:
        where, way_out = "whose code stands in the repository", "pass trust_remote_code=True if you trust it"
    raise CheckpointError(
        refusal(
            request.directory_or_repo_id,
            found=f"architecture {name!r} for a {type(config).__name__}, {where}",
            expected="a model class of transformers",
            way_out=way_out,
        )
    )


def _remote_reference(config: PretrainedConfig, name: str) -> str | None:
    references = [ref for ref in (getattr(config, "auto_map", None) or {}).items() if isinstance(ref[1], str)]
    return next((ref for auto, ref in references if name in (auto, ref.rpartition(".")[2])), None)


def _from_auto_class(auto_class: Any, config: PretrainedConfig) -> type[Any] | None:
    if type(config) not in auto_class._model_mapping:
        return None
    found = auto_class._model_mapping[type(config)]
    classes = list(found) if isinstance(found, (list, tuple)) else [found]
    architectures = getattr(config, "architectures", None) or []
    named: type[Any] | None = next((cls for cls in classes if cls.__name__ in architectures), classes[0])
    return named


def load_model(
    request: ModelRequest,
    config: PretrainedConfig,
    catalog: Catalog,
    mappings: Mapping[Path, ShardMapping],
    tensors: Mapping[str, torch.Tensor],
) -> tuple[Any, LoadReport]:
    """Build the model and give it the checkpoint's tensors.

    Args:
        request: what is wanted.
        config: from `read_config`.
        catalog: the checkpoint.
        mappings: its shards, to count what was mapped.
        tensors: its tensors by their names in the checkpoint, on the CPU.

    Raises:
        MissingTensorError: strict, and the model has names that the checkpoint has not.
        ShapeMismatchError: shapes differ, also with ``strict=False``.
        CheckpointError: strict, and names are left over; or element types that cannot stand for each other.
    """
    cls = find_class(config, request)
    with ONE_BUILD:
        model, info, loader = _build(cls, request, config, catalog, tensors)
    missing, unexpected = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    _refuse_mismatched(info["mismatched_keys"], model, catalog)
    if info.get("error_msgs"):
        raise CheckpointError(f"{catalog.describe()}: {'; '.join(map(str, info['error_msgs']))}")
    _settle(missing, unexpected, model, catalog, request.strict)
    if loader == "transformers" and getattr(model, "hf_quantizer", None) is None:
        _refuse_cast_kinds(model, catalog)
    mapped, copied = settle_bytes(model, mappings, catalog.describe())
    return model, LoadReport(
        num_tensors=len(catalog) - len(unexpected),
        mapped_bytes=mapped,
        copied_bytes=copied,
        missing=tuple(missing),
        unexpected=tuple(unexpected),
        loader=loader,
    )


def _build(
    cls: Any,
    request: ModelRequest,
    config: PretrainedConfig,
    catalog: Catalog,
    tensors: Mapping[str, torch.Tensor],
) -> tuple[Any, dict[str, Any], str]:
    """Build and fill the model by the shorter path where it fits; also give the loading info and who loaded."""
    if has_transformers5():
        from lading.adapters import transformers5

        loaded = transformers5.load_directly(cls, request, config, tensors)
        if loaded is not None:
            return *loaded, "lading"
    kinds = {spec.element.kind for spec in catalog}
    if "small float" in kinds and not is_quantised(config, request):
        _refuse_cast_kinds(_skeleton(cls, config), catalog)  # afterwards transformers 4 has such parameters itself
    try:
        return *_load_through_transformers(cls, request, config, tensors), "transformers"
    except RuntimeError as error:  # transformers 4, over a tensor of integers, without naming it
        if kinds == {"float"} or is_quantised(config, request):
            raise
        _refuse_cast_kinds(_skeleton(cls, config), catalog)
        raise CheckpointError(f"{catalog.describe()}: {error}") from error


def is_quantised(config: PretrainedConfig, request: ModelRequest) -> bool:
    """Say whether a quantizer takes part, asked for or named by the configuration."""
    given = request.model_kwargs.get("quantization_config")
    return given is not None or getattr(config, "quantization_config", None) is not None


def _skeleton(cls: Any, config: PretrainedConfig) -> Any:
    """Build a model without weights, to ask it for the element types that it declares."""
    with empty():
        return cls(copy.deepcopy(config))


def _load_through_transformers(
    cls: Any, request: ModelRequest, config: PretrainedConfig, tensors: Mapping[str, torch.Tensor]
) -> tuple[Any, dict[str, Any]]:
    kwargs = {key: value for key, value in request.model_kwargs.items() if key != "config"}
    with _quiet_unless_terminal():
        model, info = cls.from_pretrained(
            None,
            config=config,
            state_dict=dict(tensors),
            dtype=request.dtype,
            device_map=request.device_map,
            output_loading_info=True,
            trust_remote_code=request.trust_remote_code,
            ignore_mismatched_sizes=True,  # they are refused by name afterwards
            **kwargs,
        )
    model.config.name_or_path = request.directory_or_repo_id
    written = model.name_or_path  # what transformers makes of None, in the model and where its configuration went
    for part in model.modules():
        if vars(part).get("name_or_path") == written:
            part.name_or_path = request.directory_or_repo_id
    load_generation_config(model, request)
    return model, info


@contextmanager
def _quiet_unless_terminal() -> Iterator[None]:
    """Keep transformers' progress bar off where nobody watches."""
    was_active = transformers_logging.is_progress_bar_enabled()
    if was_active and not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_active and not transformers_logging.is_progress_bar_enabled():
            transformers_logging.enable_progress_bar()


def _refuse_mismatched(mismatched: Iterable[Any], model: Any, catalog: Catalog) -> None:
    """Refuse wrong shapes; transformers 5 gives them with the names, transformers 4 the model's names only."""
    rows = []
    for entry in mismatched:
        if isinstance(entry, str):
            sources = [spec for spec in catalog if _target_name(model, spec.name, {}) == entry]
            found = list(sources[0].shape) if sources else []
            rows.append((entry, found, list(model.state_dict()[entry].shape)))
        else:
            rows.append((entry[0], list(entry[1]), list(entry[2])))
    if not rows:
        return
    rows.sort()
    listed = [
        shape_refusal(f"{_file_of(name, catalog)}, tensor {name!r}", found, expected)
        for name, found, expected in rows[:10]
    ]
    raise ShapeMismatchError("; ".join(listed) + (f" … ({len(rows)} in all)" if len(rows) > 10 else ""))


def _file_of(name: str, catalog: Catalog) -> str:
    return str(catalog.owners[name].path) if name in catalog else catalog.describe()


def _settle(missing: list[str], unexpected: list[str], model: Any, catalog: Catalog, strict: bool) -> None:
    """Refuse what is missing or left over; without ``strict``, tell."""
    if unexpected:
        message = refusal(
            _file_of(unexpected[0], catalog),
            found=f"names that the model has no place for: {name_list(unexpected)}",
            expected=f"names of {type(model).__name__}",
            way_out="pass the model_class that wrote them, or leave them out with strict=False",
        )
        if strict:
            raise CheckpointError(message)
        _LOG.warning(message)
    if missing:
        message = refusal(
            catalog.describe(),
            found=f"no tensor for {name_list(missing)}",
            expected=f"every parameter and persistent buffer of {type(model).__name__}",
            way_out="pass the model_class that wrote it, or initialise what is missing with strict=False",
        )
        if strict:
            raise MissingTensorError(message)
        _LOG.warning(message)


def _refuse_cast_kinds(model: Any, catalog: Catalog) -> None:
    """Refuse integers cast to floats, floats cast to integers and the like: transformers does that without a word."""
    state = model.state_dict()
    odd = {name for name, held in state.items() if isinstance(held, torch.Tensor) and not is_plain_float(held.dtype)}
    for spec in catalog:
        if spec.element.kind == "float" and (not odd or (spec.name in state and spec.name not in odd)):
            continue
        name = spec.name if spec.name in state else _target_name(model, spec.name, state)
        if name in state:
            require_compatible(
                torch_dtype(spec.element), state[name].dtype, f"{_file_of(spec.name, catalog)}, tensor {spec.name!r}"
            )


def _target_name(model: Any, name: str, state: Mapping[str, torch.Tensor]) -> str:
    """Follow one checkpoint name through transformers' renames to the model's name."""
    if has_transformers5():
        from lading.adapters import transformers5

        return transformers5.target_name(model, name, state)
    renames: dict[str, str] = model._get_key_renaming_mapping(
        [name], getattr(model, "_checkpoint_conversion_mapping", None)
    )
    return renames.get(name, name)
