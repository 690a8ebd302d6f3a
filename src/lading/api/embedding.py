"""Make an embedder from a path, or from a model and its tokenizer: loading, pooling settings and embedding composed.

The only place that knows both how a model is loaded and how texts are embedded.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lading.adapters.sentence_transformers import find_directory, load_tokenizer, read_embedding_model
from lading.api.arguments import PathOrRepoId
from lading.api.capturing import capture
from lading.api.convoying import convoy
from lading.api.loading import load
from lading.embed import embedder
from lading.embed.batching import Batch, Batching, Tokenizer
from lading.embed.settings import EmbedSettings
from lading.errors import EmbedError, MissingTensorError, name_list, refusal


class Embedder(embedder.Embedder):
    """Turn texts into vectors; everything but the making is inherited, thread rules included.

    For a sentence-transformers model the vectors are those of ``SentenceTransformer.encode``; for any other model they
    are the mean over the tokens of the last hidden states.

    Example:
        >>> embedder = Embedder("path/to/all-MiniLM-L6-v2")                # doctest: +SKIP
        >>> embedder.encode("What is a cargo?").shape                      # doctest: +SKIP
        torch.Size([384])
        >>> [row.id for row in embedder.stream(["tea", "silk"])]           # doctest: +SKIP
        [None, None]
    """

    def __init__(  # noqa: PLR0913 - those of the class below, and one
        self,
        model: nn.Module | str | os.PathLike[str],
        tokenizer: Tokenizer | None = None,
        settings: EmbedSettings | None = None,
        batching: Batching | None = None,
        runner: embedder.Runner | None = None,
        *,
        max_memory: Mapping[Any, Any] | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        """Load what is not given.

        Args:
            model: a loaded module in evaluation mode, or a path or repository, loaded in the checkpoint's dtype.
            tokenizer: None: the one beside the model; for a module, beside the ``name_or_path`` it was loaded from.
            settings: None: as the sentence-transformers files beside the model say, mean pooling where there are none.
            batching: None: the defaults.
            runner: None: batches cross the model together where it streams, else one after the other.
            max_memory: for a model given by its path: what its weights may take of each device, as for `lading.plan`;
                what does not fit streams. A loaded module is placed by whoever loaded it.
            trust_remote_code: allow code beside the model to run: its own classes of model and tokenizer.

        Raises:
            CheckpointError: the model cannot be loaded, or its files ask for something that lading does not do.
            MissingTensorError: the checkpoint lacks weights that hidden states need.
            EmbedError: a module without a tokenizer, and none beside it; or ``max_memory`` with a module.
            PlanError: no placement keeps within ``max_memory``.
        """
        if isinstance(model, nn.Module):
            if max_memory is not None:
                found, expected = "max_memory and a loaded module", "a path"
                raise EmbedError(refusal("Embedder", found=found, expected=expected, way_out="call lading.offload"))
            tokenizer, settings = _complete(model, tokenizer, settings, trust_remote_code)
            runner = runner or convoy_runner(model, embedder.forward_of(model))
            super().__init__(model, tokenizer, settings, batching, runner)
            return
        name = os.fspath(model)
        directory = find_directory(name, trust_remote_code=trust_remote_code)
        files = read_embedding_model(directory, str(directory.resolve()) if Path(name).expanduser().exists() else name)
        if tokenizer is None:
            tokenizer = load_tokenizer(
                files.directory, lowers_case=files.lowers_case, trust_remote_code=trust_remote_code
            )
        module = _load_encoder(name, files.subfolder, files.model_class, max_memory, trust_remote_code)
        runner = runner or convoy_runner(module, embedder.forward_of(module))
        super().__init__(module, tokenizer, settings or files.settings, batching, runner)


def site_embedder(  # noqa: PLR0913 - one about what is kept, the others about loading
    path_or_repo_id: PathOrRepoId,
    sites: str | Iterable[str],
    pooling: str = "lasttoken",
    *,
    batching: Batching | None = None,
    max_memory: Mapping[Any, Any] | None = None,
    trust_remote_code: bool = False,
) -> embedder.Embedder:
    """Make an embedder whose vectors are what modules give: those of several sites one behind the other.

    Args:
        path_or_repo_id: a transformers model with its tokenizer, loaded as its configuration says, with its head.
        sites: as for `capture`; each gives [texts, tokens, width] and is called once in a forward.
        pooling: one of the pooling modes of `lading.embed.pooling`.
        batching: None: the defaults.
        max_memory: what weights may take, as for `lading.plan`; None: no limit.
        trust_remote_code: allow code beside the model to run.

    Raises:
        CaptureError: a site that stands for nothing, or is called several times.
        CheckpointError: the model cannot be loaded.
        PlanError: no placement keeps within ``max_memory``.
    """
    asked = [sites] if isinstance(sites, str) else list(sites)
    place = None if max_memory is None else "auto"
    model = load(path_or_repo_id, device_map=place, max_memory=max_memory, trust_remote_code=trust_remote_code)
    alone = [capture(model, each) for each in asked]  # refuses what is not there before texts are read
    parts = [(each, name) for each in alone for name in (each.groups or each.names)]
    name = os.fspath(path_or_repo_id)
    settings = EmbedSettings(model=name, sites=" ".join(asked), pooling=(pooling,))
    forward = embedder.forward_of(model)

    def run(batch: Batch) -> torch.Tensor:
        with capture(model, asked) as seen:
            forward(batch)
        tensors: list[torch.Tensor] = []
        for each, part in parts:
            tensors += seen.group(part) if each.groups else [seen[part]]
        for tensor in tensors:
            if tensor.dim() != 3:
                raise EmbedError(
                    refusal(
                        f"what {' '.join(asked)} gives",
                        found=f"a tensor of shape {list(tensor.shape)}",
                        expected="[texts, tokens, width]",
                        way_out="name modules that keep the tokens apart, or use lading.capture",
                    )
                )
        return torch.cat(tensors, dim=-1)

    directory = find_directory(name, trust_remote_code=trust_remote_code)
    tokenizer = load_tokenizer(directory, trust_remote_code=trust_remote_code)
    return embedder.Embedder(model, tokenizer, settings, batching, convoy_runner(model, run))


def convoy_runner(model: nn.Module, function: Callable[[Batch], Any]) -> embedder.Runner:
    """Make the runner that sends batches through a model together where it streams, else one after the other."""

    def run(batches: Iterable[Batch]) -> Iterator[Any]:
        with convoy(model, batches, function=function, seed=0) as outputs:
            yield from outputs

    return run


def _load_encoder(
    name: str, subfolder: str, model_class: str, max_memory: Mapping[Any, Any] | None, trust_remote_code: bool
) -> nn.Module:
    """Load a model without its head; what only the head needs may be too much, and the pooler may be missing."""
    module, report = load(
        name,
        subfolder=subfolder,
        model_class=model_class,
        strict=False,
        output_loading_info=True,
        device_map=None if max_memory is None else "auto",
        max_memory=max_memory,
        trust_remote_code=trust_remote_code,
    )
    missing = [tensor for tensor in report.missing if "pooler" not in tensor.split(".")]
    if missing:
        raise MissingTensorError(
            refusal(
                name,
                found=f"no tensors {name_list(missing)}",
                expected=f"every weight of {type(module).__qualname__}",
                way_out="download the model again, or load the right class and pass the module",
            )
        )
    loaded: nn.Module = module
    return loaded


def _complete(
    model: nn.Module, tokenizer: Tokenizer | None, settings: EmbedSettings | None, trust_remote_code: bool
) -> tuple[Tokenizer, EmbedSettings]:
    """Take what was not given from the directory that a module was loaded from, where it still exists."""
    name = getattr(model, "name_or_path", None)
    directory = Path(name) if isinstance(name, str) and name and Path(name).is_dir() else None
    if settings is None and directory is not None and (directory / "modules.json").exists():
        settings = read_embedding_model(directory, str(directory.resolve())).settings
    if tokenizer is None:
        if directory is None:
            raise EmbedError(
                refusal(
                    type(model).__qualname__,
                    found="no tokenizer, and no directory that the module was loaded from",
                    expected="a tokenizer as transformers has them",
                    way_out="call Embedder(model, tokenizer)",
                )
            )
        tokenizer = load_tokenizer(directory, trust_remote_code=trust_remote_code)
    if settings is None:
        settings = replace(EmbedSettings(), model=str(directory.resolve()) if directory else "")
    return tokenizer, settings
