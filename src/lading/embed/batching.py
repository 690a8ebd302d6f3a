"""Cut texts into windows and token-budget batches, and pad the batches.

Knows a tokenizer by its call only, and no model. Guarantees: an iterable is consumed one window at a time; a batch
holds at most the budget of padded tokens (or one text); within a window long texts come first, so that a batch that
does not fit in memory is met at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from lading.errors import EmbedError, name_list, refusal

Item = TypeVar("Item")
Tokenizer = Callable[..., Mapping[str, Any]]
TokenRow = Mapping[str, "np.ndarray[Any, np.dtype[np.int32]]"]
"""One text's tokens: model input name → int32 [length]."""

_TEXTS_PER_CALL = 256
"""A fast tokenizer keeps about 150 bytes per token until a call's result is dropped: this bounds it."""

_WORTH_A_CALL = 1 / 8
"""Of the budget: below it the fixed cost of a forward outweighs the padding saved."""

_MUCH_SHORTER = 3 / 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Batching:
    """Bound the work in memory.

    >>> Batching(max_batch_tokens=4096).window_rows
    4096
    """

    window_rows: int = 4096
    """Texts that are tokenised, sorted by length and finished together."""
    max_batch_tokens: int = 4096
    """Tokens of one batch, padding counted; a single longer text is a batch of its own."""

    def __post_init__(self) -> None:
        for name in ("window_rows", "max_batch_tokens"):
            if getattr(self, name) < 1:
                raise EmbedError(
                    refusal(
                        f"{name}",
                        found=f"{getattr(self, name)}",
                        expected="a positive number",
                        way_out="give one, or leave it out",
                    )
                )


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Hold padded model inputs and say whose they are."""

    inputs: Mapping[str, Tensor]
    """Keyword arguments of the model's forward, int64 [texts, longest], on the CPU."""
    mask: Tensor
    """int64 [texts, longest]: 1 at a text's own tokens, 0 at padding; also an input where the model takes one."""
    rows: tuple[int, ...]
    """Position of each text within its window."""


def windows(items: Iterable[Item], window_rows: int) -> Iterator[list[Item]]:
    """Take ``window_rows`` items at a time; the iterable is not touched beyond the window that was asked for.

    >>> list(windows("abcde", 2))
    [['a', 'b'], ['c', 'd'], ['e']]
    """
    iterator = iter(items)
    while window := list(islice(iterator, window_rows)):
        yield window


def tokenize(tokenizer: Tokenizer, texts: Sequence[str], max_tokens: int | None) -> list[TokenRow]:
    """Turn every text into token arrays of its own length; longer texts are cut as the tokenizer cuts them.

    Not for several threads at once with one tokenizer: transformers' fast tokenizers keep truncation as state.

    Raises:
        EmbedError: the tokenizer returns something else than token lists.
    """
    cut: dict[str, Any] = {"truncation": False}
    if max_tokens is not None:
        cut = {"truncation": True, "max_length": max_tokens}
    rows: list[TokenRow] = []
    for start in range(0, len(texts), _TEXTS_PER_CALL):
        part = list(texts[start : start + _TEXTS_PER_CALL])
        encoded = tokenizer(part, padding=False, **cut)
        if "input_ids" not in encoded or len(encoded["input_ids"]) != len(part):
            raise EmbedError(
                refusal(
                    f"tokenizer {type(tokenizer).__qualname__}",
                    found=f"{name_list(encoded)}",
                    expected="'input_ids' with one list of tokens for each text",
                    way_out="pass a tokenizer that is called as those of transformers are",
                )
            )
        rows.extend({name: np.asarray(encoded[name][i], dtype=np.int32) for name in encoded} for i in range(len(part)))
    return rows


def plan_batches(lengths: Sequence[int], max_batch_tokens: int) -> list[tuple[int, ...]]:
    """Choose the positions of each batch: sorted by length, longest first, equal lengths in their given order.

    A batch also ends early where the next text is much shorter than its longest, once it is worth a call of its own:
    padding costs as much as tokens do.

    >>> plan_batches([2, 9, 3, 3], max_batch_tokens=8)
    [(1,), (2, 3), (0,)]
    """
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    batches: list[tuple[int, ...]] = []
    start = 0
    while start < len(order):
        longest = max(lengths[order[start]], 1)
        stop = start + 1
        while stop < len(order) and (stop + 1 - start) * longest <= max_batch_tokens:
            is_worth_a_call = (stop - start) * longest >= _WORTH_A_CALL * max_batch_tokens
            if is_worth_a_call and lengths[order[stop]] < _MUCH_SHORTER * longest:
                break
            stop += 1
        batches.append(tuple(order[start:stop]))
        start = stop
    return batches


def pad_batch(
    tokens: Sequence[TokenRow], rows: tuple[int, ...], padding: Mapping[str, int], *, pads_left: bool
) -> Batch:
    """Lay the tokens of ``rows`` side by side, each input filled with its value in ``padding`` at the short ones' ends.

    Inputs outside ``padding`` are left out; without any token the tensors are one position wide. The mask is 1 at every
    token of a text, whatever the token: it is no input of the model unless ``padding`` names ``attention_mask``.
    """
    longest = max(1, *(len(tokens[row]["input_ids"]) for row in rows))
    names = [name for name in tokens[rows[0]] if name in padding and name != "attention_mask"]
    tables = {name: np.full((len(rows), longest), padding[name], dtype=np.int64) for name in names}
    mask = np.zeros((len(rows), longest), dtype=np.int64)
    for line, row in enumerate(rows):
        length = len(tokens[row]["input_ids"])
        start = longest - length if pads_left else 0
        mask[line, start : start + length] = 1
        for name in names:
            tables[name][line, start : start + length] = tokens[row][name]
    inputs = {name: torch.from_numpy(table) for name, table in tables.items()}
    mask_tensor = torch.from_numpy(mask)
    if "attention_mask" in padding:
        inputs["attention_mask"] = mask_tensor
    return Batch(inputs, mask_tensor, rows)
