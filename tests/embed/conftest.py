"""What the tests of the embed room share: the real MiniLM, a tiny tokenizer, a module of known hidden states."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "a",
    "cargo",
    "ship",
    "sails",
    "the",
    "of",
    "and",
    "rope",
    "tea",
    "silk",
    "port",
    "night",
]


class CountingModel(nn.Module):
    """Hidden states [id, position, texts in the batch]: what a text got shows what was fed."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.seen_shapes: list[tuple[int, ...]] = []

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> SimpleNamespace:
        self.seen_shapes.append(tuple(input_ids.shape))
        ids = input_ids.float()
        position = attention_mask.cumsum(1).float()
        return SimpleNamespace(last_hidden_state=torch.stack([ids, position, torch.ones_like(ids)], -1) * self.scale)


class WordTokenizer:
    """Split at blanks; unknown words get id 1. Not a fast tokenizer, but called like one."""

    pad_token_id = 0
    padding_side = "right"
    model_max_length = 10**30
    all_special_ids = (0, 1, 2, 3)

    def __init__(self) -> None:
        self.num_texts_seen = 0

    def __call__(
        self, texts: list[str], *, padding: bool, truncation: bool, max_length: int | None = None
    ) -> dict[str, list[list[int]]]:
        assert not padding
        self.num_texts_seen += len(texts)
        rows = [[WORDS.index(word) if word in WORDS else 1 for word in text.split()] for text in texts]
        return {"input_ids": [row[:max_length] if truncation else row for row in rows]}


@pytest.fixture
def counting_model() -> CountingModel:
    return CountingModel().eval()


@pytest.fixture
def word_tokenizer() -> WordTokenizer:
    return WordTokenizer()
