"""Say which transformers model is wanted, and read what stands beside its weights.

What the two loading paths, `transformers` and `transformers5`, share. Knows no tensor.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from lading.checkpoint.completeness import Strictness
from lading.checkpoint.locate import Source
from lading.compat import has_transformers5
from lading.errors import CheckpointError, refusal

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRequest:
    """Say which model is wanted, in which class and dtype. Immutable."""

    source: Source
    model_class: type | str | None = None
    """A class, an auto class or the name of either; None means the configuration's own architecture."""
    dtype: torch.dtype | str | dict[str, Any] | None = "auto"
    strict: Strictness = True
    trust_remote_code: bool = False
    device_map: Any = None
    """None or one device for everything."""
    model_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """What else ``from_pretrained`` takes, such as ``attn_implementation``."""

    @property
    def directory_or_repo_id(self) -> str:
        """Name the place of the configuration: a checkpoint file's directory, or what was asked for."""
        path = Path(self.source.path_or_repo_id).expanduser()
        return str(path.parent if path.is_file() else self.source.path_or_repo_id)

    @property
    def hub_kwargs(self) -> dict[str, Any]:
        """Give the arguments that all of transformers' readers of repositories take."""
        return {
            "cache_dir": self.source.cache_dir,
            "local_files_only": self.source.local_files_only,
            "token": self.source.token,
            "revision": self.source.revision or "main",
            "subfolder": self.source.subfolder,
        }


def load_generation_config(model: Any, request: ModelRequest) -> None:
    """Read generation_config.json, and custom generation code if it is trusted, as ``from_pretrained`` does.

    A ``generation_config`` that the caller gave takes its place, and no generation code is looked for then.
    transformers 4 also runs the code of a local folder that nobody said to trust; here it stays what it was.

    Raises:
        CheckpointError: this transformers reads it in a way that is not known here.
    """
    if not model.can_generate():
        return
    from transformers import GenerationMixin  # not at the top: it imports what no context may make something of

    if has_transformers5() and not hasattr(model, "adjust_generation_fn"):
        if isinstance(model, GenerationMixin):
            raise CheckpointError(
                refusal(
                    "transformers",
                    found="a GenerationMixin without adjust_generation_fn, which reads generation_config.json",
                    expected="a release that lading knows",
                    way_out="install one of those in docs/versions.md",
                )
            )
        return  # it generates in a way of its own
    given = request.model_kwargs.get("generation_config")
    if given is not None:
        model.generation_config = model.generation_config.from_dict(given.to_dict())
        return
    place = request.directory_or_repo_id
    hub = {**request.hub_kwargs, "force_download": False, "proxies": None}
    if has_transformers5():
        model.adjust_generation_fn(None, False, None, place, **hub, trust_remote_code=request.trust_remote_code)
        return
    try:
        model.generation_config = GenerationConfig.from_pretrained(place, **hub)
    except OSError:
        _LOG.info("%s has no generation_config.json: its model configuration speaks for it", place)
    if not request.trust_remote_code or not hasattr(model, "load_custom_generate"):  # like SpeechT5, which has its own
        return
    try:
        code = model.load_custom_generate(place, trust_remote_code=True, **hub)
    except OSError:
        return  # the repository brings none, as nearly all
    model.generate = partial(code, model=model)
