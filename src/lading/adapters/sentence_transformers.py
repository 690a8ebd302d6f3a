"""Read what a sentence-transformers directory says about its vectors, without importing that package.

Knows its JSON files (as written by versions 0.3 to 6.2) and the names of its modules. Guarantees: what is not
understood in full is refused by name, never guessed; a directory without ``modules.json`` means mean pooling and
nothing after it.
Layout: https://sbert.net/docs/sentence_transformer/usage/custom_models.html
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from lading.checkpoint.locate import open_catalog
from lading.checkpoint.mapping import map_catalog, tensors_of
from lading.embed.batching import Tokenizer
from lading.embed.head import Dense, LayerNorm, Normalize
from lading.embed.settings import SIMILARITIES, EmbedSettings
from lading.errors import CheckpointError, CheckpointNotFoundError, MissingTensorError, name_list, refusal

_KEPT_MODULES = ("Transformer", "Pooling", "Dense", "LayerNorm", "Normalize", "Dropout")

_OLD_POOLING_KEYS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
"""In the order in which sentence-transformers joins the vectors of several modes."""

_PASS_THE_MODEL = "pass model, tokenizer and EmbedSettings to Embedder"

_TRANSFORMER_CONFIGS = tuple(
    f"sentence_{name}_config.json"
    for name in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)

_TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model", "*.spm", "*.tiktoken", "tekken.json")

_ENCODER_CLASSES = {
    "t5": "T5EncoderModel",
    "mt5": "MT5EncoderModel",
    "umt5": "UMT5EncoderModel",
    "longt5": "LongT5EncoderModel",
    "switch_transformers": "SwitchTransformersEncoderModel",
}
"""By model type: of these, sentence-transformers runs the encoder only."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class EmbeddingModel:
    """Say what to load from a directory and how to use it."""

    settings: EmbedSettings
    directory: Path
    """Where the JSON files and the tokenizer of the transformer lie."""
    subfolder: str
    """Path of the weights within the model's directory or repository; empty: at its top."""
    model_class: str
    """Class of transformers that gives hidden states."""
    lowers_case: bool
    """Whether texts are lower-cased before the tokenizer's own normalisation."""


def find_directory(path_or_repo_id: str, *, trust_remote_code: bool = False) -> Path:
    """Give the local directory of a model: the path itself, or the hub cache's after fetching everything but weights.

    Weights of layers behind the pooling lie in numbered folders and are fetched; Python files are, if the repository's
    code may run. ``HF_HUB_OFFLINE`` is respected.

    Raises:
        CheckpointNotFoundError: neither a directory nor a repository that can be reached or is cached.
    """
    path = Path(path_or_repo_id).expanduser()
    if path.exists() or path.is_absolute():
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    patterns = ["*.json", "*.txt", "*.model", "[0-9]*_*/*", *(["*.py"] if trust_remote_code else [])]
    try:
        return Path(snapshot_download(path_or_repo_id, allow_patterns=patterns))
    except (OSError, ValueError, HfHubHTTPError, HFValidationError) as error:
        raise CheckpointNotFoundError(
            refusal(
                path_or_repo_id,
                found="no directory of that name, and nothing of it in the hub's cache or on the hub",
                expected="a model's directory or repository",
                way_out="check the name, download the model, or unset HF_HUB_OFFLINE",
            )
        ) from error


def read_embedding_model(directory: Path, name: str) -> EmbeddingModel:
    """Read the JSON files of a directory, and map the weights of the layers behind the pooling.

    ``name`` is what stores record as the model.

    Raises:
        CheckpointNotFoundError: there is no directory, or no ``config.json`` where the weights should be.
        CheckpointError: a file is malformed, or says something that lading does not do.
    """
    if not directory.is_dir():
        raise CheckpointNotFoundError(
            refusal(str(directory), found="no directory", expected="a model's", way_out="name a downloaded model")
        )
    listed = _read_list(directory / "modules.json") if (directory / "modules.json").exists() else []
    modules = [_check_module(directory, module) for module in listed]
    kinds = [kind for kind, _ in modules]
    if modules and kinds[:2] != ["Transformer", "Pooling"]:
        raise _refused(
            directory / "modules.json", f"the modules {name_list(kinds)}", "Transformer, Pooling and then any others"
        )
    if any(kind in ("Transformer", "Pooling") for kind in kinds[2:]):
        raise _refused(directory / "modules.json", "a second Transformer or Pooling", "one of each")
    checkpoint = modules[0][1] if modules else directory
    transformer = _read_transformer(checkpoint) if modules else {}
    settings = EmbedSettings(
        model=name,
        max_tokens=transformer.get("max_seq_length"),
        head=tuple(layer for kind, folder in modules[2:] for layer in _read_layer(kind, folder)),
        **(_read_pooling(modules[1][1]) if modules else {}),
        **_read_model_config(directory),
    )
    return EmbeddingModel(
        settings=settings,
        directory=checkpoint,
        subfolder="" if checkpoint == directory else checkpoint.relative_to(directory).as_posix(),
        model_class=_model_class(checkpoint),
        lowers_case=bool(transformer.get("do_lower_case", False)),
    )


def load_tokenizer(directory: Path, *, lowers_case: bool = False, trust_remote_code: bool = False) -> Tokenizer:
    """Load a directory's tokenizer through transformers; ``lowers_case`` puts lower-casing before its normalisation.

    Raises:
        CheckpointError: transformers finds no tokenizer that it can load, or it is the directory's own code, which only
            runs with ``trust_remote_code``.
    """
    from lading.adapters.tokenizer import open_tokenizer

    if not any(file for pattern in _TOKENIZER_FILES for file in directory.glob(pattern)):
        # transformers 5 would make a tokenizer without a vocabulary, and every word would be unknown
        raise _refused(directory, "no file of a tokenizer", "one beside the weights", "pass a tokenizer")
    tokenizer = open_tokenizer(str(directory), trust_remote_code=trust_remote_code)
    if lowers_case:
        _lower_case_first(tokenizer)
    loaded: Tokenizer = tokenizer
    return loaded


def _lower_case_first(tokenizer: Any) -> None:
    if not tokenizer.is_fast:
        raise _refused(
            f"tokenizer {type(tokenizer).__qualname__}",
            "do_lower_case with a slow tokenizer",
            "a fast one",
            "pass a model and a tokenizer that lower-cases instead of a path",
        )
    from tokenizers.normalizers import Lowercase, Sequence

    own = tokenizer.backend_tokenizer.normalizer
    steps = list(cast("Any", own)) if isinstance(own, Sequence) else [own] if own is not None else []
    if not any(isinstance(step, Lowercase) for step in steps):
        tokenizer.backend_tokenizer.normalizer = Sequence([Lowercase(), *steps])


def _check_module(directory: Path, module: Any) -> tuple[str, Path]:
    """Split an entry of modules.json into the kind of module and its folder, which must lie in the directory."""
    place = directory / "modules.json"
    if not isinstance(module, dict) or not all(isinstance(module.get(key), str) for key in ("type", "path")):
        raise _refused(place, f"the entry {module!r}", "an object with a type and a path", "download the file again")
    package, _, kind = module["type"].rpartition(".")
    if kind not in _KEPT_MODULES or package.partition(".")[0] != "sentence_transformers":
        raise _refused(
            place, f"a module of type {module['type']!r}", f"sentence_transformers' {name_list(_KEPT_MODULES)}"
        )
    folder = directory / module["path"]
    if not folder.resolve().is_relative_to(directory.resolve()):
        raise _refused(
            place, f"the path {module['path']!r}", "one inside the directory", "do not use a model from this source"
        )
    return kind, folder


def _read_transformer(folder: Path) -> Mapping[str, Any]:
    path = next((folder / name for name in _TRANSFORMER_CONFIGS if (folder / name).exists()), None)
    if path is None:
        return {}
    config = _read_object(path)
    plain = {"method": "forward", "method_output_name": "last_hidden_state"}
    expected: dict[str, tuple[Any, ...]] = {
        "transformer_task": ("feature-extraction",),
        "module_output_name": ("token_embeddings",),
        "modality_config": ({"text": plain},),
        "processing_kwargs": ({}, None),
        "tokenizer_name_or_path": (None,),
        **{name: ({}, None) for old in ("model", "tokenizer", "config") for name in (f"{old}_args", f"{old}_kwargs")},
        "processor_kwargs": ({}, None),
    }
    for key, values in expected.items():
        found = config.get(key, values[0])
        if isinstance(found, dict):
            found = {name: value for name, value in found.items() if name != "trust_remote_code"}
        if found not in values:
            raise _refused(path, f"{key} = {found!r}", repr(values[0]), _PASS_THE_MODEL)
    _typed(path, config, "max_seq_length", int)
    return config


def _read_pooling(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    config = _read_object(path)
    named = config.get("pooling_mode")
    if named is None:
        modes = tuple(mode for key, mode in _OLD_POOLING_KEYS.items() if config.get(key)) or ("mean",)
    else:
        modes = (named,) if isinstance(named, str) else tuple(named)
    unknown = [mode for mode in modes if mode not in _OLD_POOLING_KEYS.values()]
    unknown += [key for key in config.keys() - _OLD_POOLING_KEYS if key.startswith("pooling_mode_") and config[key]]
    if unknown:
        raise _refused(path, f"the pooling {name_list(map(str, unknown))}", name_list(_OLD_POOLING_KEYS.values()))
    return {"pooling": modes, "include_prompt": bool(config.get("include_prompt", True))}


def _read_model_config(directory: Path) -> dict[str, Any]:
    path = directory / "config_sentence_transformers.json"
    config = _read_object(path) if path.exists() else {}
    kind = config.get("model_type", "SentenceTransformer")
    if kind != "SentenceTransformer":
        raise _refused(path, f"a {kind}", "a SentenceTransformer", "its vectors are of another kind")
    similarity = config.get("similarity_fn_name") or "cosine"
    if similarity not in SIMILARITIES:
        raise _refused(path, f"the similarity {similarity!r}", f"one of {name_list(SIMILARITIES)}", _PASS_THE_MODEL)
    prompts = {name: prompt or "" for name, prompt in (_typed(path, config, "prompts", dict) or {}).items()}
    default = config.get("default_prompt_name")
    if default is not None and default not in prompts:
        way_out = "mend default_prompt_name in the file"
        raise _refused(path, f"the default prompt {default!r}", f"one of {name_list(prompts)}", way_out)
    return {
        "prompts": prompts,
        "default_prompt_name": default,
        "truncate_dim": _typed(path, config, "truncate_dim", int),
        "similarity": similarity,
    }


def _read_layer(kind: str, folder: Path) -> list[Callable[[Tensor], Tensor]]:
    path = folder / "config.json"
    config = _read_object(path) if path.exists() else {}
    for key in ("module_input_name", "module_output_name"):
        if config.get(key) not in (None, "sentence_embedding"):
            raise _refused(path, f"{key} = {config[key]!r}", "'sentence_embedding'", "not supported")
    if kind == "Normalize":
        return [Normalize()]
    if kind == "Dropout":
        return []  # does nothing in evaluation mode
    catalog = open_catalog(folder)
    tensors = tensors_of(catalog, map_catalog(catalog))
    if kind == "LayerNorm":
        return [LayerNorm(weight=_tensor(tensors, "norm.weight", folder), bias=_tensor(tensors, "norm.bias", folder))]
    residual = "residual.weight" if config.get("use_residual") and "residual.weight" in tensors else None
    return [
        Dense(
            weight=_tensor(tensors, "linear.weight", folder),
            bias=_tensor(tensors, "linear.bias", folder) if config.get("bias", True) else None,
            activation=_activation(path, config.get("activation_function", "torch.nn.modules.activation.Tanh")),
            adds_input=bool(config.get("use_residual", False)),
            residual=None if residual is None else tensors[residual],
        )
    ]


def _activation(path: Path, name: Any) -> Callable[[Tensor], Tensor]:
    """Make the activation from its dotted name; only argument-free modules of ``torch.nn`` are ever made."""
    found = getattr(nn, str(name).rpartition(".")[2], None) if str(name).startswith("torch.nn.") else None
    if not isinstance(found, type) or not issubclass(found, nn.Module):
        raise _refused(path, f"the activation {name!r}", "a module of torch.nn", "not supported")
    try:
        activation: Callable[[Tensor], Tensor] = found()
    except TypeError as error:
        raise _refused(path, f"the activation {name!r}", "one that takes no arguments") from error
    return activation


def _tensor(tensors: Mapping[str, Tensor], name: str, folder: Path) -> Tensor:
    if name not in tensors:
        found = f"the tensors {name_list(tensors)}"
        raise MissingTensorError(refusal(str(folder), found=found, expected=repr(name), way_out="download it again"))
    return tensors[name]


def _model_class(checkpoint: Path) -> str:
    path = checkpoint / "config.json"
    if not path.exists():
        raise CheckpointNotFoundError(
            refusal(str(path), found="nothing", expected="a model's config", way_out="name a transformers model")
        )
    config = _read_object(path)
    model_type = str(config.get("model_type"))
    if model_type not in _ENCODER_CLASSES and config.get("is_encoder_decoder", False):
        known = name_list(_ENCODER_CLASSES)
        way_out = "pass its encoder and a tokenizer to Embedder"
        raise _refused(path, f"the encoder-decoder type {model_type!r}", f"one of {known}", way_out)
    return _ENCODER_CLASSES.get(model_type, "AutoModel")


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        found = f"no readable file ({error.strerror})"
        way_out = "download the model again"
        raise CheckpointNotFoundError(refusal(str(path), found=found, expected="JSON", way_out=way_out)) from error
    except (ValueError, RecursionError) as error:
        raise _refused(path, f"no JSON ({error})", "a JSON file", "download the file again") from error


def _read_object(path: Path) -> dict[str, Any]:
    parsed = _read_json(path)
    if not isinstance(parsed, dict):
        raise _refused(path, f"{type(parsed).__name__}", "a JSON object", "download the file again")
    return parsed


def _read_list(path: Path) -> list[Any]:
    parsed = _read_json(path)
    if not isinstance(parsed, list) or not parsed:
        raise _refused(path, f"{type(parsed).__name__}", "a list of modules", "download the file again")
    return parsed


def _typed(path: Path, config: Mapping[str, Any], key: str, kind: type) -> Any:
    value = config.get(key)
    if value is not None and not isinstance(value, kind):
        raise _refused(path, f"{key} = {value!r}", f"{kind.__name__} or nothing", "download the file again")
    return value


def _refused(
    subject: object, found: str, expected: str, way_out: str = "embed with the library that wrote this model"
) -> CheckpointError:
    return CheckpointError(refusal(str(subject), found=found, expected=expected, way_out=way_out))
