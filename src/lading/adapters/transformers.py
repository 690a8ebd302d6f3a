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
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from transformers.utils import logging as transformers_logging

from lading.adapters.model_choice import ModelChoice
from lading.adapters.model_request import ModelRequest, load_generation_config
from lading.checkpoint.catalog import Catalog
from lading.checkpoint.completeness import Names, hold
from lading.checkpoint.dtypes import is_plain_float, require_compatible, torch_dtype
from lading.checkpoint.empty import empty
from lading.checkpoint.mapping import ShardMapping
from lading.checkpoint.report import LoadReport
from lading.checkpoint.slots import settle_bytes, shape_refusal
from lading.compat import has_transformers5
from lading.errors import CheckpointError, ShapeMismatchError, name_list, refusal
from lading.names import folded

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


def load_model(
    request: ModelRequest,
    choice: ModelChoice,
    catalog: Catalog,
    mappings: Mapping[Path, ShardMapping],
    tensors: Mapping[str, torch.Tensor],
) -> tuple[Any, LoadReport]:
    """Build the model and give it the checkpoint's tensors.

    Args:
        request: what is wanted.
        choice: from `choose_model`.
        catalog: the checkpoint.
        mappings: its shards, to count what was mapped.
        tensors: its tensors by their names in the checkpoint, on the CPU.

    Raises:
        MissingTensorError: the model has names that the checkpoint has not, unless ``strict`` is False.
        ShapeMismatchError: shapes differ, also with ``strict=False``, unless ``ignore_mismatched_sizes`` was given.
        CheckpointError: names are left over and ``strict`` is ``"exact"``; or element types that cannot stand for each
            other.
    """
    # In the order in which transformers meets them: where nothing else does, the first float tells the dtype.
    tensors = {name: tensors[name] for shard in catalog.shards for name in shard.listing}
    with ONE_BUILD, _quiet_about_names():
        model, info, loader = _build(request, choice, catalog, tensors)
    missing, unexpected = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    mismatched = _mismatched(info["mismatched_keys"], model, catalog)
    if mismatched and not choice.loader_kwargs.get("ignore_mismatched_sizes"):
        _refuse_mismatched(mismatched, catalog)
    if info.get("error_msgs"):
        raise CheckpointError(f"{catalog.describe()}: {'; '.join(map(str, info['error_msgs']))}")
    hold(_names(missing, unexpected, model, catalog), request.strict)
    if mismatched:
        _LOG.warning(
            "%s: tensors of another shape are initialised as %s does: %s",
            catalog.describe(),
            type(model).__name__,
            name_list(folded(name for name, _, _ in mismatched)),
        )
    if loader == "transformers" and not choice.is_quantised:
        _refuse_cast_kinds(model, catalog)
    _compute_own_buffers(model, choice)
    mapped, copied = settle_bytes(model, mappings, catalog.describe())
    return model, LoadReport(
        num_tensors=len(catalog) - len(unexpected),
        mapped_bytes=mapped,
        copied_bytes=copied,
        missing=tuple(missing),
        unexpected=tuple(unexpected),
        mismatched=tuple(name for name, _, _ in mismatched),
        loader=loader,
    )


def _build(
    request: ModelRequest, choice: ModelChoice, catalog: Catalog, tensors: Mapping[str, torch.Tensor]
) -> tuple[Any, dict[str, Any], str]:
    """Build and fill the model by the shorter path where it fits; also give the loading info and who loaded."""
    if has_transformers5():
        from lading.adapters import transformers5

        loaded = transformers5.load_directly(request, choice, tensors)
        if loaded is not None:
            return *loaded, "lading"
    kinds = {spec.element.kind for spec in catalog}
    if "small float" in kinds and not choice.is_quantised:
        _refuse_cast_kinds(_skeleton(choice), catalog)  # afterwards transformers 4 has such parameters itself
    try:
        return *_load_through_transformers(request, choice, tensors), "transformers"
    except RuntimeError as error:  # transformers 4, over a tensor of integers, without naming it
        if kinds == {"float"} or choice.is_quantised:
            raise
        _refuse_cast_kinds(_skeleton(choice), catalog)
        raise CheckpointError(f"{catalog.describe()}: {error}") from error
    except ValueError as error:
        if "state dictionary" not in str(error) or "corrupted" not in str(error):
            raise
        # transformers 4, where the checkpoint has only what stands beside the base model, such as a head
        skeleton = _skeleton(choice)
        hold(_names(sorted(set(skeleton.state_dict()) - set(tensors)), [], skeleton, catalog), strict=True)
        raise CheckpointError(f"{catalog.describe()}: {error}") from error


def _skeleton(choice: ModelChoice) -> Any:
    """Build a model without weights, to ask it for the element types that it declares."""
    with empty():
        return choice.model_class(copy.deepcopy(choice.config), **choice.init_kwargs)


def _load_through_transformers(
    request: ModelRequest, choice: ModelChoice, tensors: Mapping[str, torch.Tensor]
) -> tuple[Any, dict[str, Any]]:
    kwargs = {**choice.loader_kwargs, **choice.init_kwargs}
    for name in ("adapter_kwargs", "adapter_name", "generation_config"):  # heeded afterwards
        kwargs.pop(name, None)
    source: dict[str, Any] = {"pretrained_model_name_or_path": None, "state_dict": dict(tensors)}
    if choice.reads_own_files:
        source = {"pretrained_model_name_or_path": request.directory_or_repo_id, **request.hub_kwargs}
        source |= {"variant": request.source.variant, "use_safetensors": request.source.use_safetensors}
    with _quiet_unless_terminal(), _refusing_quantizers(request, choice):
        model, info = choice.model_class.from_pretrained(
            **source,
            config=choice.config,
            dtype=request.dtype,
            device_map=request.device_map,
            output_loading_info=True,
            trust_remote_code=request.trust_remote_code,
            **{**kwargs, "ignore_mismatched_sizes": True},  # they are refused by name afterwards
        )
    model.config.name_or_path = request.directory_or_repo_id
    written = model.name_or_path  # what transformers makes of None, in the model and where its configuration went
    for part in model.modules():
        if vars(part).get("name_or_path") == written:
            part.name_or_path = request.directory_or_repo_id
    load_generation_config(model, request)
    return model, info


def _compute_own_buffers(model: Any, choice: ModelChoice) -> None:
    """Give non-persistent buffers of classes that are not transformers' own the values that their code computes.

    No checkpoint has them. transformers 5 builds models on meta and computes such buffers anew in its own classes only:
    in others they are whatever was in memory. Here the class is built once more, without memory for its weights.
    """
    # Not at the top of the file: it cannot be imported under a context that makes something of every module.
    from transformers import PreTrainedModel

    parts = (part for part in model.modules() if isinstance(part, PreTrainedModel))
    if not has_transformers5() or all(type(part).__module__.startswith("transformers.") for part in parts):
        return
    dtype = getattr(model.config, "dtype", None)
    with ONE_BUILD, empty(), default_dtype(dtype if isinstance(dtype, torch.dtype) else None):
        built = dict(choice.model_class(copy.deepcopy(choice.config), **choice.init_kwargs).named_modules())
    for path, part in model.named_modules():
        for name in part._non_persistent_buffers_set & part._buffers.keys():
            value = built[path]._buffers.get(name) if path in built else None
            if value is not None and part._buffers[name] is not None:
                part._buffers[name] = value.to(part._buffers[name].device)


@contextmanager
def default_dtype(dtype: torch.dtype | None) -> Iterator[None]:
    """Build under another default dtype, or under the same; restored afterwards, whatever is set meanwhile."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype or before)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


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


@contextmanager
def _refusing_quantizers(request: ModelRequest, choice: ModelChoice) -> Iterator[None]:
    """Say by name what a quantizer of transformers refuses: a missing package, a machine without its device."""
    try:
        yield
    except (ImportError, RuntimeError, ValueError, AttributeError, NotImplementedError) as error:
        if not choice.is_quantised:
            raise
        raise CheckpointError(
            refusal(
                request.directory_or_repo_id,
                found=f"a quantised checkpoint that transformers cannot load here ({str(error).strip()})",
                expected="its package, and a device that it works on",
                way_out="install what is named, or load a checkpoint that is not quantised",
            )
        ) from error


@contextmanager
def _quiet_about_names() -> Iterator[None]:
    """Keep back what transformers logs about missing and left-over names in this thread: `hold` says it in one line.

    Where loading fails it is logged after all: errors of transformers refer to it.
    """
    logger, thread = logging.getLogger("transformers.modeling_utils"), threading.get_ident()
    kept: list[str] = []

    def passes(record: logging.LogRecord) -> bool:
        text = str(record.msg)
        is_report = text.startswith("Some weights of") or " LOAD REPORT" in text.partition("\n")[0]
        if record.thread == thread and is_report:
            kept.append(text)
            return False
        return True

    logger.addFilter(passes)
    try:
        yield
    except BaseException:
        for text in kept:
            _LOG.warning("%s", text)
        raise
    finally:
        logger.removeFilter(passes)


_Mismatch = tuple[str, list[int], list[int]]


def _mismatched(entries: Iterable[Any], model: Any, catalog: Catalog) -> list[_Mismatch]:
    """Give name, found and expected shape; transformers 5 has them, transformers 4 the model's names only."""
    rows = []
    for entry in entries:
        if isinstance(entry, str):
            sources = [spec for spec in catalog if _target_name(model, spec.name, {}) == entry]
            found = list(sources[0].shape) if sources else []
            rows.append((entry, found, list(model.state_dict()[entry].shape)))
        else:
            rows.append((entry[0], list(entry[1]), list(entry[2])))
    return sorted(rows)


def _refuse_mismatched(rows: list[_Mismatch], catalog: Catalog) -> NoReturn:
    listed = [
        shape_refusal(f"{_file_of(name, catalog)}, tensor {name!r}", found, expected)
        for name, found, expected in rows[:10]
    ]
    raise ShapeMismatchError("; ".join(listed) + (f" … ({len(rows)} in all)" if len(rows) > 10 else ""))


def _file_of(name: str, catalog: Catalog) -> str:
    return str(catalog.owners[name].path) if name in catalog else catalog.describe()


def _names(missing: list[str], unexpected: list[str], model: Any, catalog: Catalog) -> Names:
    """Say what did not meet, and the way out: of a head that the checkpoint never had it is another than of a layer."""
    prefix = f"{model.base_model_prefix}."
    has_head = model.base_model is not model
    way_out = "pass the model_class that wrote it, or initialise what is missing with strict=False"
    if missing and has_head and not any(name.startswith(prefix) for name in missing):
        way_out = (
            "this is a new head, which would be random: pass the model_class that wrote the checkpoint, or "
            "strict=False to initialise it and train it"
        )
    return Names(
        missing=missing,
        unexpected=unexpected,
        owner=type(model).__name__,
        checkpoint=catalog.describe(),
        file_of=lambda name: _file_of(name, catalog),
        missing_way_out=way_out,
        unexpected_way_out='pass the model_class that wrote them, or leave them out without strict="exact"',
    )


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
