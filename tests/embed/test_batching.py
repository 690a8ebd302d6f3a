from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lading.embed.batching import Batching, pad_batch, plan_batches, tokenize, windows
from lading.errors import EmbedError


@given(st.lists(st.integers(0, 50), max_size=60), st.integers(1, 200))
def test_plan_batches_any_lengths_covers_each_text_once_within_the_budget(lengths, budget):
    plan = plan_batches(lengths, budget)
    assert sorted(row for rows in plan for row in rows) == list(range(len(lengths)))
    for rows in plan:
        longest = max(lengths[row] for row in rows)
        assert len(rows) == 1 or len(rows) * longest <= budget
        assert lengths[rows[0]] == longest


def test_plan_batches_much_shorter_texts_get_their_own_batch():
    plan = plan_batches([100, 100, 10, 10, 10], max_batch_tokens=1000)
    assert plan == [(0, 1), (2, 3, 4)]


def test_windows_of_a_generator_reads_no_further_than_asked():
    taken = []
    reader = windows((taken.append(n) or n for n in range(10)), 3)
    assert taken == []
    assert next(reader) == [0, 1, 2]
    assert taken == [0, 1, 2]


def test_tokenize_long_texts_cuts_them_and_keeps_the_order(word_tokenizer):
    texts = ["a cargo ship"] * 300 + ["tea"]
    rows = tokenize(word_tokenizer, texts, max_tokens=2)
    assert [len(row["input_ids"]) for row in rows] == [2] * 300 + [1]
    assert rows[0]["input_ids"].dtype == np.int32


def test_tokenize_something_else_than_a_tokenizer_is_refused():
    with pytest.raises(EmbedError, match="tokenizer function: found 'words'"):
        tokenize(lambda texts, **_: {"words": texts}, ["a"], None)


@pytest.mark.parametrize(("pads_left", "expected"), [(False, [[4, 5], [6, 9]]), (True, [[4, 5], [9, 6]])])
def test_pad_batch_short_text_is_filled_on_the_tokenizers_side(pads_left, expected):
    tokens = [{"input_ids": np.array([4, 5]), "extra": np.array([1, 1])}, {"input_ids": np.array([6])}]
    batch = pad_batch(tokens, (0, 1), {"input_ids": 9, "attention_mask": 0}, pads_left=pads_left)
    assert batch.inputs["input_ids"].tolist() == expected
    assert batch.mask.tolist() == [[1, 1], [0, 1] if pads_left else [1, 0]]
    assert set(batch.inputs) == {"input_ids", "attention_mask"}


def test_pad_batch_only_empty_texts_is_one_position_wide():
    batch = pad_batch([{"input_ids": np.array([])}], (0,), {"input_ids": 7}, pads_left=False)
    assert torch.equal(batch.inputs["input_ids"], torch.tensor([[7]]))
    assert torch.equal(batch.mask, torch.tensor([[0]]))


def test_batching_without_room_is_refused():
    with pytest.raises(EmbedError, match="max_batch_tokens: found 0 · expected a positive number"):
        Batching(max_batch_tokens=0)
