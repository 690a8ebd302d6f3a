"""Choose the class and the configuration of a transformers model, as ``from_pretrained`` would.

Knows configurations, classes, auto classes and the arguments that all of them share; no tensor. Loading and planning
both begin here, so that they speak of the same model.
"""

from __future__ import annotations

import copy
import inspect
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import NoneType
from typing import Any

import transformers
from transformers import AutoConfig, PretrainedConfig
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from lading.adapters.model_request import ModelRequest
from lading.checkpoint.locate import Source
from lading.errors import CheckpointError, CheckpointNotFoundError, name_list, refusal

_OF_THE_LOADER = frozenset(
    {"adapter_kwargs", "adapter_name", "allow_all_kernels", "attn_implementation", "device_mesh", "distributed_config"}
    | {"experts_implementation", "fusion_config", "generation_config", "ignore_mismatched_sizes", "kernel_config"}
    | {"key_mapping", "load_in_4bit", "load_in_8bit", "offload_buffers", "quantization_config", "tp_plan", "tp_size"}
    | {"use_kernels"}
)
"""What ``from_pretrained`` takes for itself; everything else is the configuration's, or else the constructor's."""

_WITHOUT_MEANING = frozenset(
    {"_fast_init", "config", "code_revision", "disable_mmap", "low_cpu_mem_usage", "mirror", "offload_folder"}
    | {"offload_state_dict", "resume_download", "tqdm_class", "use_safetensors", "weights_only"}
)
"""What is heeded elsewhere, or changes nothing here: no pickle is ever run, and memory use is always low."""

_ELSEWHERE = {
    "state_dict": "use lading.load_into, or from_pretrained",
    "gguf_file": "use transformers' from_pretrained, which dequantises GGUF files",
    "from_tf": "convert the checkpoint with transformers 4 first",
    "from_flax": "convert the checkpoint with transformers 4 first",
    "force_download": "download the model again with huggingface_hub first",
    "proxies": "set HTTPS_PROXY, or download the model with huggingface_hub first",
    "use_auth_token": "pass token=",
}
"""Arguments that are refused unless they are empty, and what to do instead."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelChoice:
    """Say which class is built, and from what. Immutable, but for the configuration: build with a copy of it."""

    model_class: Any
    config: PretrainedConfig
    loader_kwargs: Mapping[str, Any]
    """What ``from_pretrained`` takes for itself, such as ``attn_implementation``."""
    init_kwargs: Mapping[str, Any]
    """What the class's own constructor takes beside the configuration."""

    @property
    def is_quantised(self) -> bool:
        """Say whether a quantizer takes part, asked for or named by the configuration."""
        given = [self.loader_kwargs.get(name) for name in ("quantization_config", "load_in_4bit", "load_in_8bit")]
        return any(given) or getattr(self.config, "quantization_config", None) is not None

    @property
    def reads_own_files(self) -> bool:
        """Say whether the quantizer needs the files themselves, as torchao, which describes its tensors in them."""
        named = getattr(self.config, "quantization_config", None) or {}
        method = named.get("quant_method") if isinstance(named, dict) else getattr(named, "quant_method", None)
        return getattr(method, "value", method) == "torchao"


def choose_model(request: ModelRequest) -> ModelChoice:
    """Choose the class that was asked for, else the configuration's architecture, and read its configuration.

    A class decides what is read: that of a text model takes the text part of a composite's configuration.

    Raises:
        CheckpointNotFoundError: there is no configuration, or not in the local cache while offline.
        CheckpointError: it is not JSON, transformers has no such class, or it is remote code that was not allowed.
        TypeError: an argument that means nothing here.
    """
    _refuse_arguments(request)
    given = request.model_kwargs.get("config")
    loader = {name: value for name, value in request.model_kwargs.items() if name in _OF_THE_LOADER}
    others = {
        name: value
        for name, value in request.model_kwargs.items()
        if name not in _OF_THE_LOADER | _WITHOUT_MEANING | _ELSEWHERE.keys()
    }
    cls = _concrete(request.model_class)
    if isinstance(given, PretrainedConfig):
        config, rest = copy.deepcopy(given), others
    else:
        config, rest = _read(request, AutoConfig if cls is None else cls.config_class, cls, others)
    if cls is None:
        cls = find_class(config, request)
        if _is_a_part(cls, config):
            config = config.get_text_config()
        elif not isinstance(given, PretrainedConfig) and _needs_another(cls, config):
            config, rest = _read(request, cls.config_class, cls, others)
    _refuse_unknown(cls, rest)
    for name in ("attn", "experts"):
        if f"{name}_implementation" in loader:
            setattr(config, f"_{name}_implementation", loader[f"{name}_implementation"])
    return ModelChoice(model_class=cls, config=config, loader_kwargs=loader, init_kwargs=rest)


def _refuse_arguments(request: ModelRequest) -> None:
    for name, way_out in _ELSEWHERE.items():
        if request.model_kwargs.get(name):
            raise TypeError(refusal("lading.load", found=f"{name}=", expected="a model's own files", way_out=way_out))


def _refuse_unknown(cls: Any, rest: Mapping[str, Any]) -> None:
    own = inspect.signature(cls.__init__).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in own.values())
    odd = [] if takes_any else sorted(rest.keys() - own.keys())
    if odd:
        raise TypeError(
            refusal(
                cls.__name__,
                found=f"the arguments {name_list(odd)}",
                expected="arguments of from_pretrained, of the configuration or of the class",
                way_out="leave them out; a config= that is given takes no others",
            )
        )


def weights_source(request: ModelRequest, choice: ModelChoice) -> Source:
    """Say where the weights of a chosen model are: its configuration or class may name their files."""
    named = getattr(choice.config, "transformers_weights", None)
    if named is not None and not str(named).endswith((".safetensors", ".safetensors.index.json")):
        raise CheckpointError(
            refusal(
                f"{request.directory_or_repo_id}, config.json",
                found=f"transformers_weights = {named!r}",
                expected="the name of a .safetensors file, or of an index of such",
                way_out="correct it",
            )
        )
    return replace(
        request.source,
        weights_name=named,
        more_names=tuple(getattr(type(choice.config), "extra_files", ())),
        use_safetensors=request.model_kwargs.get("use_safetensors"),
    )


def _concrete(asked: type | str | None) -> Any:
    """Give the class of transformers or of one's own that was asked for; None for an auto class and where none was."""
    found = getattr(transformers, asked, None) if isinstance(asked, str) else asked
    is_model = isinstance(found, type) and hasattr(found, "from_pretrained") and hasattr(found, "config_class")
    return found if is_model else None


def _read(request: ModelRequest, reader: Any, cls: Any, others: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Read the configuration; also give the arguments that it has no attribute for."""
    given = request.model_kwargs.get("config")
    if not isinstance(given, (str, os.PathLike, NoneType)):
        expected = "a transformers configuration, or the path of one"
        raise TypeError(refusal("config", found=repr(given)[:60], expected=expected, way_out="leave it out"))
    place = request.directory_or_repo_id if given is None else os.fspath(given)
    if reader is None:
        raise CheckpointError(
            refusal(
                cls.__name__,
                found="no config_class",
                expected="a class that names its configuration's",
                way_out="set it, or pass config=",
            )
        )
    remote = {}
    if reader is AutoConfig:
        code = {name: value for name, value in request.model_kwargs.items() if name == "code_revision"}
        remote = {"trust_remote_code": request.trust_remote_code, **code}
    try:
        config, rest = reader.from_pretrained(
            place, return_unused_kwargs=True, **request.hub_kwargs, **remote, **copy.deepcopy(dict(others))
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:  # the last two: JSON, but no object
        raise _unreadable(place, request, error) from error
    rest = {name: value for name, value in rest.items() if name in others}
    if not request.trust_remote_code and "attn_implementation" not in request.model_kwargs:
        _refuse_hub_kernels(config, place)
    return config, rest


def _unreadable(place: str, request: ModelRequest, error: Exception) -> CheckpointError:
    folder = Path(place).expanduser()
    if not folder.exists():
        where = place + (f" at {request.source.revision}" if request.source.revision else "")
        return CheckpointNotFoundError(
            refusal(
                where,
                found="no directory of that name, and no config.json of it in the hub's cache or on the hub",
                expected="a transformers model",
                way_out="check the name, download the model, or unset HF_HUB_OFFLINE",
            )
        )
    path = folder if folder.is_file() else folder / request.source.subfolder / "config.json"
    kind, found = CheckpointError, str(error).strip()
    if not path.is_file():
        kind, found = CheckpointNotFoundError, "no such file"
    elif isinstance(error, (TypeError, AttributeError, KeyError)):
        found = f"no JSON object of the right form ({error})"
    return kind(
        refusal(
            f"{path.parent}, {path.name}",
            found=found,
            expected="a transformers configuration",
            way_out="pass config= or a model_class, or use lading.empty() and lading.load_into() for other modules",
        )
    )


def _refuse_hub_kernels(config: PretrainedConfig, place: str) -> None:
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
                f"{place}, config.json",
                found=f"code of the repository {kernels[0]!r} as its attention",
                expected="an implementation that transformers has, such as 'sdpa'",
                way_out="pass attn_implementation=, or trust_remote_code=True if you trust it",
            )
        )


def find_class(config: PretrainedConfig, request: ModelRequest) -> Any:
    """Find the class to build for a configuration: by an auto class, else the architecture that it names.

    Raises:
        CheckpointError: transformers has no such class, or it is remote code that was not allowed.
    """
    asked = request.model_class
    if asked is None:
        asked = next(iter(getattr(config, "architectures", None) or ["AutoModel"]))
    name = asked if isinstance(asked, str) else asked.__name__
    remote: str | None = _remote_reference(config, name)
    if remote is not None and request.trust_remote_code:
        code = {key: value for key, value in request.model_kwargs.items() if key == "code_revision"}
        return get_class_from_dynamic_module(remote, request.directory_or_repo_id, **code, **request.hub_kwargs)
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


def _is_a_part(cls: Any, config: PretrainedConfig) -> bool:
    """Say whether a class is that of the text model in a composite."""
    text = getattr(config, "sub_configs", {}).get("text_config")
    return text is not None and getattr(cls, "config_class", None) is text


def _needs_another(cls: Any, config: PretrainedConfig) -> bool:
    wanted = getattr(cls, "config_class", None)
    return isinstance(wanted, type) and not isinstance(config, wanted)
