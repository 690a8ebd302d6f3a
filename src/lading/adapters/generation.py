"""Continue texts with a transformers language model, greedily.

Knows tokenizers and ``generate``; not where the model's weights are. Guarantees: the same tokens as the model's own
greedy search, whatever sampling its generation config asks for, and no message of transformers on the way.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import Cache

from lading.adapters.tokenizer import open_tokenizer
from lading.adapters.transformers_caches import CACHE_NAMES
from lading.errors import CheckpointError, ResidencyError, refusal


@dataclass(frozen=True, slots=True, kw_only=True)
class Continuation:
    """What a model made of a prompt. Immutable."""

    prompt: str
    text: str
    """What follows the prompt."""
    num_prompt_tokens: int
    num_tokens: int
    """Of ``text``."""


class Continuer:
    """Continue prompts one at a time. Any thread; the tokenizer is for one at a time.

    Args:
        model: a transformers causal language model on the CPU or with its inputs there.
        path_or_repo_id: where its tokenizer is.
        trust_remote_code: whether a tokenizer that is the folder's own code may run.
        **hub: ``revision``, ``subfolder`` and what else finds files of a repository.

    Raises:
        CheckpointError: the model cannot generate from text alone, or there is no tokenizer.
    """

    def __init__(self, model: Any, path_or_repo_id: str, *, trust_remote_code: bool = False, **hub: Any) -> None:
        config = model.config
        if not hasattr(model, "generate") or not model.can_generate() or config.is_encoder_decoder:
            raise CheckpointError(
                refusal(
                    path_or_repo_id,
                    found=f"{type(model).__name__}",
                    expected="a causal language model, which continues a text",
                    way_out="name such a model, as LlamaForCausalLM",
                )
            )
        self._model = model
        place = Path(path_or_repo_id).expanduser()
        folder = place.parent if place.is_file() else place if place.exists() else path_or_repo_id
        self._tokenizer = open_tokenizer(str(folder), trust_remote_code=trust_remote_code, **hub)
        if not len(self._tokenizer):  # transformers 5 makes one of nothing
            raise CheckpointError(
                refusal(
                    str(folder),
                    found="a tokenizer without a vocabulary",
                    expected="one beside the weights",
                    way_out="save the model's tokenizer there: tokenizer.save_pretrained",
                )
            )

    def __call__(self, prompt: str, *, new_tokens: int) -> Continuation:
        """Continue a prompt by at most a number of tokens; fewer where the model ends.

        Raises:
            CheckpointError: the tokenizer makes no token of the prompt.
        """
        inputs = self._tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        num_prompt_tokens = inputs["input_ids"].shape[1]
        if not num_prompt_tokens:
            raise CheckpointError(
                refusal(
                    f"prompt {prompt!r}",
                    found="no token",
                    expected="one or more",
                    way_out="write something to continue",
                )
            )
        inputs = inputs.to(self._model.device)
        with torch.inference_mode():
            tokens = self._model.generate(**inputs, **self._greedy(), max_new_tokens=new_tokens)[0]
        added = tokens[num_prompt_tokens:]
        return Continuation(
            prompt=prompt,
            text=self._text_after(inputs["input_ids"][0], tokens),
            num_prompt_tokens=num_prompt_tokens,
            num_tokens=len(added),
        )

    def _text_after(self, prompt: torch.Tensor, tokens: torch.Tensor) -> str:
        """Write what follows the prompt; some tokenizers drop the space before a text that they begin with."""
        begin = self._tokenizer.decode(prompt, skip_special_tokens=True)
        whole = self._tokenizer.decode(tokens, skip_special_tokens=True)
        if whole.startswith(begin):
            return str(whole[len(begin) :])
        return str(self._tokenizer.decode(tokens[len(prompt) :], skip_special_tokens=True))

    def _greedy(self) -> dict[str, Any]:
        """Turn sampling off, with the settings that would be complained about then, and caches kept at the model."""
        ends = self._model.generation_config.eos_token_id
        end = ends[0] if isinstance(ends, list) else ends
        pad = self._tokenizer.pad_token_id
        unused = {"temperature": None, "top_p": None, "top_k": None, "max_length": None}
        unused["cache_implementation"] = None  # a static one would be the model's, and several prompts may be under way
        return {"do_sample": False, "num_beams": 1, "pad_token_id": end if pad is None else pad, **unused}


_OWN_CACHES = (None, "dynamic", "dynamic_full", "offloaded", "quantized")  # each call makes its own


def refuse_static_cache(model: Any, arguments: Mapping[str, Any], *, is_for_all: bool = True) -> None:
    """Refuse caches that several calls of ``generate`` at once would share.

    Args:
        model: whose generation config counts; None where ``generate`` is not what is called.
        arguments: of every call, or of one.
        is_for_all: whether of every call: a cache that one brings along is its own.

    Raises:
        ResidencyError: a cache given to all calls, or of a kind that transformers keeps at the model.
    """
    own = None if model is None else getattr(model.generation_config, "cache_implementation", None)
    own = None if own == "hybrid" else own  # which transformers takes for dynamic where nobody asks for it
    given = getattr(arguments.get("generation_config"), "cache_implementation", None)
    kind = arguments.get("cache_implementation") or given or own
    found = f"cache_implementation={kind!r}" if kind not in _OWN_CACHES else None
    names = () if model is None else CACHE_NAMES
    shared = [
        name for name, each in arguments.items() if isinstance(each, Cache) or (name in names and each is not None)
    ]
    if is_for_all and shared:
        found = f"{shared[0]} for all batches"
    if found is not None:
        raise ResidencyError(
            refusal(
                "a convoy of sequences",
                found=found,
                expected="a cache for each batch: this one belongs to all of them",
                way_out='leave it out, or give cache_implementation="dynamic"',
            )
        )
