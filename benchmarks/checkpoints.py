"""Make the checkpoints that benchmarks load, once, and know them again.

A checkpoint is made from a recipe: a transformers configuration, an element type and a seed. It is kept in a folder
named after the recipe, beside a manifest with the recipe and the SHA-256 of each file; it is used again only if every
byte is still the one that was written. Weights are random: no output means anything, but shapes, names and files are
those of real models. Making runs in a process of its own, this file as a script, whose memory goes with it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

_FORMAT = 1
_LLAMA = "LlamaForCausalLM"


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Say which checkpoint to make. Immutable."""

    model_class: str
    """A class of transformers."""
    config: dict[str, Any]
    file_dtype: str = "bfloat16"
    max_shard_size: str = "100GB"
    seed: int = 0

    @property
    def digest(self) -> str:
        """Identify the recipe: equal recipes have equal digests."""
        text = json.dumps([_FORMAT, asdict(self)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """Name one thing to load and say how. Immutable."""

    name: str
    title: str
    recipe: Recipe
    dtype: str = "auto"
    """What loaders are asked for: ``auto`` for the file's own, or another one to cast to."""
    is_converted: bool = False
    """Whether the loaded tensors cannot be the file's bytes: cast, or fused where the library fuses experts."""
    inputs: dict[str, list[int]] = field(default_factory=lambda: {"input_ids": [3, 1, 4, 1, 5, 9, 2, 6]})


def cases(*, tiny: bool) -> tuple[Case, ...]:
    """List all cases, at the size of real models or, ``tiny``, at one that loads in milliseconds."""

    def size(full: dict[str, Any], small: dict[str, Any]) -> dict[str, Any]:
        return {**full, **small} if tiny else full

    heads = {"num_attention_heads": 16, "num_key_value_heads": 4}
    few = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 128}
    few_heads = {**few, "num_attention_heads": 4, "num_key_value_heads": 2}
    llama = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 32, "vocab_size": 32000, **heads}
    qwen2 = {
        **{"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "vocab_size": 151936},
        **{"num_attention_heads": 14, "num_key_value_heads": 2, "tie_word_embeddings": True},
    }
    t5 = {"d_model": 1024, "d_kv": 64, "d_ff": 4096, "num_layers": 16, "num_decoder_layers": 16, "num_heads": 16}
    t5 |= {"vocab_size": 32128, "decoder_start_token_id": 0, "tie_word_embeddings": True}
    t5_few = {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4}
    mixtral = {"hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 8, "vocab_size": 32000, **heads}
    mixtral |= {"num_local_experts": 8, "num_experts_per_tok": 2}
    many = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 556, "vocab_size": 1000}
    many |= {"num_attention_heads": 4, "num_key_value_heads": 4}
    cast = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 16, "vocab_size": 32000, **heads}
    return (
        Case(name="llama", title="Llama, bf16", recipe=Recipe(model_class=_LLAMA, config=size(llama, few_heads))),
        Case(
            name="qwen2",
            title="Qwen2, bf16, embeddings tied",
            recipe=Recipe(model_class="Qwen2ForCausalLM", config=size(qwen2, few_heads)),
        ),
        Case(
            name="t5",
            title="T5, bf16, encoder and decoder, embeddings tied",
            recipe=Recipe(model_class="T5ForConditionalGeneration", config=size(t5, {**t5_few, "vocab_size": 128})),
            inputs={"input_ids": [3, 1, 4, 1, 5, 9, 2, 6], "decoder_input_ids": [0, 2, 7, 1]},
        ),
        Case(
            name="mixtral",
            title="Mixtral, bf16, one tensor per expert in the file, several shards",
            recipe=Recipe(
                model_class="MixtralForCausalLM",
                config=size(mixtral, {**few_heads, "num_local_experts": 4}),
                max_shard_size="100KB" if tiny else "300MB",
            ),
            is_converted=True,
        ),
        Case(
            name="many",
            title="Llama of 5,007 tensors, bf16" if not tiny else "Llama of many tensors, bf16",
            recipe=Recipe(model_class=_LLAMA, config=size(many, {"num_hidden_layers": 20})),
        ),
        Case(
            name="cast",
            title="Llama, fp32 in the file, bf16 in memory",
            recipe=Recipe(model_class=_LLAMA, config=size(cast, few_heads), file_dtype="float32"),
            dtype="bfloat16",
            is_converted=True,
        ),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """Hold a checkpoint on disk that is known to be what its recipe makes. Immutable."""

    folder: Path
    num_bytes: int
    """Of the shards."""
    num_tensors: int

    @property
    def shards(self) -> list[Path]:
        """List the files with weights."""
        return sorted(self.folder.glob("*.safetensors"))

    @property
    def files(self) -> list[Path]:
        """List all files."""
        return sorted(path for path in self.folder.iterdir() if path.is_file())


def prepare(wanted: Sequence[Case], cache: Path) -> dict[str, Checkpoint]:
    """Find the checkpoints of some cases in the cache, or make them there; case's name → checkpoint.

    Raises:
        subprocess.CalledProcessError: one could not be made.
    """
    places = {case.name: cache / f"{case.name}-{case.recipe.digest}" for case in wanted}
    absent = {places[case.name]: case.recipe for case in wanted if not _is_intact(places[case.name])}
    if absent:
        cache.mkdir(parents=True, exist_ok=True)
        for folder in absent:
            _manifest_of(folder).unlink(missing_ok=True)
            shutil.rmtree(folder, ignore_errors=True)
        _make_in_process(absent)
        for folder, recipe in absent.items():
            written = {"recipe": asdict(recipe), "sha256": _digests(folder)}
            _manifest_of(folder).write_text(json.dumps(written, indent=1), encoding="utf-8")
    return {name: _describe(folder) for name, folder in places.items()}


def clean(cache: Path) -> list[str]:
    """Delete what `prepare` made, and the cache if nothing else is in it; gives the names deleted."""
    deleted = []
    for recipe_file in sorted(cache.glob("*.json")):
        if "recipe" in json.loads(recipe_file.read_text(encoding="utf-8")):
            shutil.rmtree(recipe_file.with_suffix(""), ignore_errors=True)
            recipe_file.unlink()
            deleted.append(recipe_file.stem)
    if cache.is_dir() and not any(cache.iterdir()):
        cache.rmdir()
    return deleted


def _manifest_of(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.json")


def _is_intact(folder: Path) -> bool:
    try:
        manifest = json.loads(_manifest_of(folder).read_text(encoding="utf-8"))
        return bool(manifest["sha256"] == _digests(folder))
    except (OSError, ValueError, KeyError):
        return False


def _digests(folder: Path) -> dict[str, str]:
    digests = {}
    for path in sorted(folder.iterdir()):
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while piece := file.read(1 << 20):
                digest.update(piece)
        digests[path.name] = digest.hexdigest()
    return digests


def _describe(folder: Path) -> Checkpoint:
    shards = sorted(folder.glob("*.safetensors"))
    headers = [_header(path) for path in shards]
    return Checkpoint(
        folder=folder,
        num_bytes=sum(path.stat().st_size for path in shards),
        num_tensors=sum(len(header) - ("__metadata__" in header) for header in headers),
    )


def _header(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header: dict[str, Any] = json.loads(file.read(length))
    return header


def _make_in_process(recipes: Mapping[Path, Recipe]) -> None:
    """Make checkpoints in another process, each beside its place, and rename it there when it is whole."""
    unfinished = {folder: folder.with_name(f"{folder.name}.{os.getpid()}.unfinished") for folder in recipes}
    order = json.dumps([[str(unfinished[folder]), asdict(recipe)] for folder, recipe in recipes.items()])
    quiet = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    try:
        subprocess.run([sys.executable, __file__], input=order.encode(), check=True, env={**os.environ, **quiet})
        for folder, made in unfinished.items():
            made.rename(folder)
    finally:
        for made in unfinished.values():
            shutil.rmtree(made, ignore_errors=True)


def _make(folder: Path, recipe: Recipe) -> None:
    import torch
    import transformers

    torch.manual_seed(recipe.seed)
    torch.set_default_dtype(getattr(torch, recipe.file_dtype))
    model_class = getattr(transformers, recipe.model_class)
    model = model_class(model_class.config_class(**recipe.config, dtype=recipe.file_dtype))
    model.save_pretrained(folder, max_shard_size=recipe.max_shard_size)


if __name__ == "__main__":
    for name, fields in json.load(sys.stdin):
        _make(Path(name), Recipe(**fields))
