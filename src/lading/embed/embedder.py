"""Run a model over texts and give back one vector for each, in the order of the texts.

Knows a module by its forward, a tokenizer by its call and how hidden states become vectors; knows no checkpoint,
residency or store. Guarantees: memory is bounded by one window of texts and one batch; every vector handed out owns
its bytes; a module is left as it was found.
"""

from __future__ import annotations

import inspect
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lading.embed.batching import Batch, Batching, Tokenizer, TokenRow, pad_batch, plan_batches, tokenize, windows
from lading.embed.head import apply_head
from lading.embed.pooling import pool
from lading.embed.rows import Record, Row, VectorSource
from lading.embed.settings import EmbedSettings
from lading.errors import EmbedError, name_list, refusal

Runner = Callable[[Iterable[Batch]], Iterator[Any]]
"""Gives one model output for each batch, in order; it may take several batches before it gives the first output."""

_UNLIMITED_TOKENS = 2**31
"""transformers writes "no limit" as a model_max_length of 10**30."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbedStats:
    """Count what an embedder has done since it was made; texts that are cut count with the tokens that are left."""

    num_texts: int = 0
    num_tokens: int = 0
    num_padded_tokens: int = 0
    """Token positions that went through the model, padding included."""
    num_batches: int = 0
    run_s: float = 0.0
    """Seconds from the first batch of each window to its last vector, tokenising excluded."""


class Embedder:
    """Embed texts with a module that is already loaded.

    Any thread may call at any time, as far as the module itself may be called from several threads: settings are
    immutable, each call owns its state, and ``_lock`` guards the counts and the tokenizer (whose truncation is state).

    Example:
        >>> class Letters(nn.Module):
        ...     def forward(self, input_ids):
        ...         return input_ids[..., None].float()
        >>> def tokenizer(texts, **_):
        ...     return {"input_ids": [[ord(letter) for letter in text] for text in texts]}
        >>> Embedder(Letters().eval(), tokenizer).encode(["ac", "b"]).tolist()
        [[98.0], [98.0]]
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Tokenizer,
        settings: EmbedSettings | None = None,
        batching: Batching | None = None,
        runner: Runner | None = None,
    ) -> None:
        """Bind a model, a tokenizer and how to pool.

        ``settings`` None: mean pooling, nothing after it. ``runner`` None: one batch after the other under
        ``torch.inference_mode``, on the device of the model's first parameter. Nothing is run or changed here.
        """
        self.settings = EmbedSettings() if settings is None else settings
        self.batching = Batching() if batching is None else batching
        self._model = model
        self._tokenizer = tokenizer
        self._runner = plain_runner(model) if runner is None else runner
        self._max_tokens = _token_limit(self.settings.max_tokens, tokenizer, model)
        self._padding = _padding_values(tokenizer, model)
        self._pads_left = getattr(tokenizer, "padding_side", "right") == "left"
        self._lock = threading.Lock()
        self._stats = EmbedStats()

    def encode(self, texts: str | Sequence[str], prompt: str | None = None, prompt_name: str | None = None) -> Tensor:
        """Embed one text to a vector [dimension], or a sequence to a matrix [texts, dimension], on the CPU.

        The vectors have the model's dtype. ``prompt`` is put before every text; ``prompt_name`` takes one of the
        settings' prompts instead; neither: the settings' default.

        Raises:
            EmbedError: no prompt has that name, a text is no string, or the model is in training mode.
        """
        text_list = [texts] if isinstance(texts, str) else list(texts)
        chosen = self.settings.resolve_prompt(prompt, prompt_name)
        parts = [self._embed_window(window, chosen) for window in windows(text_list, self.batching.window_rows)]
        vectors = torch.cat(parts) if parts else torch.empty(0, 0)
        return vectors[0] if isinstance(texts, str) else vectors

    def stream(
        self, texts: Iterable[str | Record], prompt: str | None = None, prompt_name: str | None = None
    ) -> Iterator[Row]:
        """Embed any number of texts; rows come in the order of the texts, one window of texts after the other.

        A generator is consumed only as far as the rows are taken, in steps of ``batching.window_rows``. Arguments and
        errors as in ``encode``, raised here or while iterating.
        """
        return self._rows(texts, self.settings.resolve_prompt(prompt, prompt_name))

    @property
    def module(self) -> nn.Module:
        """Give the model that embeds."""
        return self._model

    def stats(self) -> EmbedStats:
        """Take a snapshot of the counts."""
        with self._lock:
            return self._stats

    def _rows(self, texts: Iterable[str | Record], prompt: str) -> Iterator[Row]:
        for window in windows(texts, self.batching.window_rows):
            records = [text if isinstance(text, Record) else Record(text=text) for text in window]
            vectors = self._embed_window([record.text for record in records], prompt)
            source = self.source(vectors.dtype, prompt)
            for record, vector in zip(records, vectors, strict=True):
                yield Row(id=record.id, text=record.text, fields=record.fields, vector=vector.clone(), source=source)

    def source(self, dtype: torch.dtype, prompt: str = "") -> VectorSource:
        """Say where this embedder's vectors come from."""
        return VectorSource(
            model=self.settings.model,
            sites=self.settings.sites,
            pooling="+".join(self.settings.pooling),
            dtype=str(dtype).removeprefix("torch."),
            prompt=prompt,
            similarity=self.settings.similarity,
        )

    def _embed_window(self, texts: list[str], prompt: str) -> Tensor:
        """Embed the texts of one window: a new matrix [texts, dimension] on the CPU, in the texts' order."""
        if any(module.training for module in self._model.modules()):
            raise EmbedError(
                refusal(
                    f"{type(self._model).__qualname__}",
                    found="training mode, where dropout makes vectors random",
                    expected="evaluation mode",
                    way_out="call model.eval() first",
                )
            )
        strangers = [type(text).__qualname__ for text in texts if not isinstance(text, str)]
        if strangers:
            raise EmbedError(
                refusal(
                    "texts", found=f"{strangers[0]}", expected="str", way_out="make every text a string or a Record"
                )
            )
        with self._lock:
            tokens = tokenize(self._tokenizer, [prompt + text for text in texts], self._max_tokens)
            prompt_tokens = 0 if self.settings.include_prompt else self._count_prompt_tokens(prompt)
        lengths = [len(row["input_ids"]) for row in tokens]
        plan = plan_batches(lengths, self.batching.max_batch_tokens)
        start_s = time.perf_counter()
        vectors = self._run(tokens, plan, prompt_tokens)
        self._count(lengths, plan, time.perf_counter() - start_s)
        return vectors

    def _run(self, tokens: list[TokenRow], plan: list[tuple[int, ...]], prompt_tokens: int) -> Tensor:
        pending: deque[Batch] = deque()

        def batches() -> Iterator[Batch]:
            for rows in plan:
                pending.append(pad_batch(tokens, rows, self._padding, pads_left=self._pads_left))
                yield pending[-1]

        vectors: Tensor | None = None
        num_done = 0
        for output in self._runner(batches()):
            if not pending:
                raise EmbedError(
                    refusal(
                        f"runner {self._runner!r}",
                        found="more outputs than batches it took",
                        expected="one for each batch, in order",
                        way_out="mend the runner",
                    )
                )
            batch = pending.popleft()
            pooled = self._pool(output, batch, prompt_tokens)
            if vectors is None:
                vectors = torch.empty(len(tokens), pooled.shape[1], dtype=pooled.dtype)
            vectors[list(batch.rows)] = pooled
            num_done += 1
            del output  # else two batches' hidden states would be alive during the next forward
        if vectors is None or num_done != len(plan):
            raise EmbedError(
                refusal(
                    f"runner {self._runner!r}",
                    found=f"{num_done} outputs",
                    expected=f"{len(plan)}, one for each batch",
                    way_out="mend the runner",
                )
            )
        return vectors

    def _pool(self, output: Any, batch: Batch, prompt_tokens: int) -> Tensor:
        with torch.inference_mode():
            hidden = _last_hidden(output, self._model)
            pooled = pool(hidden, batch.mask, self.settings.pooling, prompt_tokens)
            return apply_head(self.settings.head, pooled, self.settings.truncate_dim).cpu()

    def _count_prompt_tokens(self, prompt: str) -> int:
        """Count the prompt's tokens with the special tokens before it and without the one that ends a text."""
        if not prompt:
            return 0
        ids = tokenize(self._tokenizer, [prompt], self._max_tokens)[0]["input_ids"]
        ends_special = len(ids) > 0 and int(ids[-1]) in getattr(self._tokenizer, "all_special_ids", ())
        return len(ids) - int(ends_special)

    def _count(self, lengths: list[int], plan: list[tuple[int, ...]], run_s: float) -> None:
        with self._lock:
            done = self._stats
            self._stats = replace(
                done,
                num_texts=done.num_texts + len(lengths),
                num_tokens=done.num_tokens + sum(lengths),
                num_padded_tokens=done.num_padded_tokens + sum(lengths[rows[0]] * len(rows) for rows in plan),
                num_batches=done.num_batches + len(plan),
                run_s=done.run_s + run_s,
            )


def forward_of(model: nn.Module) -> Callable[[Batch], Any]:
    """Make the function that calls ``model`` with one batch, on the device of its first parameter.

    No gradient is recorded; outside of the calls the caller's grad mode is untouched.
    """
    first = next(model.parameters(), None)
    device = torch.device("cpu") if first is None else first.device
    constants = {"use_cache": False} if "use_cache" in _forward_parameters(model) else {}

    def forward(batch: Batch) -> Any:
        inputs = {name: tensor.to(device) for name, tensor in batch.inputs.items()}
        with torch.inference_mode():
            return model(**inputs, **constants)

    return forward


def plain_runner(model: nn.Module) -> Runner:
    """Make the runner that calls ``model`` once for each batch, one after the other."""
    forward = forward_of(model)

    def run(batches: Iterable[Batch]) -> Iterator[Any]:
        for batch in batches:
            yield forward(batch)  # not named here, so that it is freed before the next forward

    return run


def _forward_parameters(model: nn.Module) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(model.forward).parameters


def _padding_values(tokenizer: Tokenizer, model: nn.Module) -> dict[str, int]:
    """Choose the inputs that the model's forward takes, and what fills each at padding."""
    values = {
        "input_ids": getattr(tokenizer, "pad_token_id", None) or 0,  # masked: any id will do where there is none
        "attention_mask": 0,
        "token_type_ids": getattr(tokenizer, "pad_token_type_id", 0),
    }
    parameters = _forward_parameters(model)
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        return values
    return {name: value for name, value in values.items() if name in parameters}


def _token_limit(max_tokens: int | None, tokenizer: Tokenizer, model: nn.Module) -> int | None:
    """Take the settings' limit, else the tokenizer's, capped by the model's positions; None: there is no limit."""
    if max_tokens is not None:
        return max_tokens
    positions = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    limits = [getattr(tokenizer, "model_max_length", None), positions if positions != -1 else None]
    limit = min((limit for limit in limits if limit is not None), default=_UNLIMITED_TOKENS)
    return limit if limit < _UNLIMITED_TOKENS else None


def _last_hidden(output: Any, model: nn.Module) -> Tensor:
    """Find the last hidden states [texts, tokens, width] in what a forward returned."""
    hidden = output if isinstance(output, Tensor) else getattr(output, "last_hidden_state", None)
    if hidden is None and isinstance(output, (tuple, list)) and output:
        hidden = output[0]
    if not isinstance(hidden, Tensor) or hidden.dim() != 3:
        keys = name_list(output) if isinstance(output, Mapping) else type(output).__qualname__
        raise EmbedError(
            refusal(
                f"the forward of {type(model).__qualname__}",
                found=f"{keys}",
                expected="'last_hidden_state' [texts, tokens, width]",
                way_out="load the model without its head, as AutoModel does",
            )
        )
    return hidden
