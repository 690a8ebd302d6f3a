from __future__ import annotations

import pytest
import torch

from lading.embed.pooling import POOLING_MODES, pool

HIDDEN = torch.tensor([[[1.0, -4.0], [2.0, 5.0], [6.0, 0.0], [float("nan"), float("inf")]]])
MASK = torch.tensor([[1, 1, 1, 0]])
EXPECTED = {
    "cls": [1.0, -4.0],
    "max": [6.0, 5.0],
    "mean": [3.0, 1 / 3],
    "mean_sqrt_len_tokens": [9 / 3**0.5, 1 / 3**0.5],
    "weightedmean": [(1 + 4 + 18) / 6, (-4 + 10) / 6],
    "lasttoken": [6.0, 0.0],
}


@pytest.mark.parametrize("mode", POOLING_MODES)
def test_pool_right_padding_ignores_what_stands_there(mode):
    torch.testing.assert_close(pool(HIDDEN, MASK, (mode,)), torch.tensor([EXPECTED[mode]]))


@pytest.mark.parametrize("mode", POOLING_MODES)
def test_pool_left_padding_gives_the_same_vector(mode):
    shifted, mask = HIDDEN.roll(1, dims=1), MASK.roll(1, dims=1)
    torch.testing.assert_close(pool(shifted, mask, (mode,)), torch.tensor([EXPECTED[mode]]))


def test_pool_several_modes_joins_them_in_the_given_order():
    joined = pool(HIDDEN, MASK, ("mean", "cls"))
    torch.testing.assert_close(joined, torch.tensor([EXPECTED["mean"] + EXPECTED["cls"]]))


@pytest.mark.parametrize(
    ("mode", "expected"), [("cls", [2.0, 5.0]), ("mean", [4.0, 2.5]), ("weightedmean", [22 / 5, 2.0])]
)
def test_pool_prompt_tokens_take_no_part(mode, expected):
    torch.testing.assert_close(pool(HIDDEN, MASK, (mode,), prompt_tokens=1), torch.tensor([expected]))


@pytest.mark.parametrize("mode", POOLING_MODES)
def test_pool_text_without_tokens_gives_zeros(mode):
    hidden = torch.full((1, 2, 3), float("nan"))
    assert torch.equal(pool(hidden, torch.zeros(1, 2), (mode,)), torch.zeros(1, 3))


def test_pool_half_precision_sums_in_float32_and_returns_half():
    hidden = torch.full((1, 4096, 1), 0.1, dtype=torch.bfloat16)
    pooled = pool(hidden, torch.ones(1, 4096), ("mean",))
    assert pooled.dtype == torch.bfloat16
    assert pooled.item() == hidden[0, 0, 0].item()
