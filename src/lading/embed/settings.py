"""Say how hidden states become a text's vector: pooling, prompts, length and what follows the pooling.

Knows no file: an adapter reads these facts from a model's directory. Every field has the meaning that
sentence-transformers gives it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING

from lading.embed.pooling import POOLING_MODES
from lading.errors import EmbedError, name_list, refusal

if TYPE_CHECKING:
    from torch import Tensor

SIMILARITIES = ("cosine", "dot", "euclidean")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class EmbedSettings:
    """Hold the facts that decide a vector, apart from the weights.

    >>> EmbedSettings(pooling=("cls", "max"), prompts={"query": "query: "}).resolve_prompt(None, "query")
    'query: '
    """

    model: str = ""
    """Where the weights come from, as a store records it; empty: a module in memory."""
    sites: str = ""
    """The modules whose tensors are pooled, as a store records them; empty: the last hidden states."""
    pooling: tuple[str, ...] = ("mean",)
    """Modes of ``POOLING_MODES``; the vectors of several are joined in this order."""
    include_prompt: bool = True
    """Whether the prompt's tokens take part in the pooling."""
    max_tokens: int | None = None
    """Longer texts are cut, special tokens counted; None: as tokenizer and model allow."""
    prompts: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    """Prompts by name; one of them is put before each text where it is asked for."""
    default_prompt_name: str | None = None
    """The prompt of a call that names none; None: no prompt."""
    head: tuple[Callable[[Tensor], Tensor], ...] = ()
    """Applied to the pooled vectors [rows, width] in this order; see ``lading.embed.head``."""
    truncate_dim: int | None = None
    """Keep only so many leading dimensions, last of all; None: keep all."""
    similarity: str = "cosine"
    """One of ``SIMILARITIES``: how a store compares the vectors."""

    def __post_init__(self) -> None:
        unknown = [mode for mode in self.pooling if mode not in POOLING_MODES]
        if unknown or not self.pooling:
            found = name_list(unknown) if unknown else "no mode"
            raise EmbedError(
                refusal(
                    "pooling",
                    found=f"{found}",
                    expected=f"one or more of {name_list(POOLING_MODES)}",
                    way_out="choose among them",
                )
            )
        if self.similarity not in SIMILARITIES:
            raise EmbedError(
                refusal(
                    "similarity",
                    found=f"{self.similarity!r}",
                    expected=f"one of {name_list(SIMILARITIES)}",
                    way_out="choose one of them",
                )
            )
        for name in ("max_tokens", "truncate_dim"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise EmbedError(
                    refusal(
                        f"{name}",
                        found=f"{value}",
                        expected="a positive number or None",
                        way_out="leave it out for no limit of your own",
                    )
                )
        if self.default_prompt_name is not None:
            self.resolve_prompt(None, None)

    def resolve_prompt(self, prompt: str | None, prompt_name: str | None) -> str:
        """Choose the text put before every text: ``prompt`` itself, or the named one, or the default, or nothing.

        Raises:
            EmbedError: there is no prompt of that name, or both were given.
        """
        if prompt is not None and prompt_name is not None:
            raise EmbedError(
                refusal(
                    "prompt",
                    found=f"both a prompt {prompt!r} and a prompt_name {prompt_name!r}",
                    expected="one of them",
                    way_out="leave one out",
                )
            )
        if prompt is not None:
            return prompt
        name = self.default_prompt_name if prompt_name is None else prompt_name
        if name is None:
            return ""
        if name not in self.prompts:
            known = name_list(self.prompts) or "none at all"
            raise EmbedError(
                refusal(
                    "prompt_name",
                    found=repr(name),
                    expected=f"one of the model's prompts: {known}",
                    way_out="give the text itself as prompt",
                )
            )
        return self.prompts[name]
