# ruff: noqa: N803, N806 - names end in their shape
"""Make one vector of the hidden states of each text. Pure functions; know no tokenizer, model or file.

Shape suffixes: B texts of a batch, T token positions, D hidden size. ``mask_BT`` is 1 at a text's own tokens and 0 at
padding, which may stand on either side. The modes and their arithmetic are those of sentence-transformers 6.2
(``Pooling``); a text without any token gets the zero vector.
"""

from __future__ import annotations

import torch
from torch import Tensor

POOLING_MODES = ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")
"""``cls`` and ``lasttoken``: the first and the last token; ``max``: per dimension; ``mean``; ``mean_sqrt_len_tokens``:
the sum over the square root of the count; ``weightedmean``: weights 1, 2, 3 … by position."""

_TINIEST_WEIGHT = 1e-9


def pool(hidden_BTD: Tensor, mask_BT: Tensor, modes: tuple[str, ...], prompt_tokens: int = 0) -> Tensor:
    """Reduce each text's hidden states to one vector per mode and join them: a new tensor [B, D × modes].

    ``prompt_tokens``: so many leading tokens of every text take no part. Sums are taken in float32 at least; the result
    has the dtype of ``hidden_BTD``.

    >>> hidden = torch.tensor([[[1.0, 4.0], [3.0, 2.0], [9.0, 9.0]]])
    >>> pool(hidden, torch.tensor([[1, 1, 0]]), ("mean", "max"))
    tensor([[2., 3., 3., 4.]])
    """
    own_BT = mask_BT.to(hidden_BTD.device).bool()
    position_BT = own_BT.long().cumsum(dim=1)  # 1 at the first token of a text, wherever the padding stands
    kept_BT = own_BT & (position_BT > prompt_tokens)
    pooled = [_pool_one(hidden_BTD, kept_BT, position_BT, mode) for mode in modes]
    has_tokens_B1 = kept_BT.any(dim=1, keepdim=True)
    return torch.where(has_tokens_B1, torch.cat(pooled, dim=-1), 0)


def _pool_one(hidden_BTD: Tensor, kept_BT: Tensor, position_BT: Tensor, mode: str) -> Tensor:
    kept_BT1 = kept_BT.unsqueeze(-1)
    if mode == "cls":
        return _take(hidden_BTD, kept_BT.int().argmax(dim=1))
    if mode == "lasttoken":
        last_B = kept_BT.shape[1] - 1 - kept_BT.flip(1).int().argmax(dim=1)
        return _take(hidden_BTD, last_B)
    if mode == "max":
        return hidden_BTD.masked_fill(~kept_BT1, float("-inf")).amax(dim=1)
    wide = torch.promote_types(hidden_BTD.dtype, torch.float32)
    weight_BT1 = kept_BT1.to(wide)
    if mode == "weightedmean":
        weight_BT1 = weight_BT1 * position_BT.unsqueeze(-1)
    # masked_fill, not a product with 0: what stands at padding may be NaN
    sum_BD = (hidden_BTD.masked_fill(~kept_BT1, 0).to(wide) * weight_BT1).sum(dim=1)
    total_B1 = weight_BT1.sum(dim=1).clamp(min=_TINIEST_WEIGHT)
    if mode == "mean_sqrt_len_tokens":
        total_B1 = total_B1.sqrt()
    return (sum_BD / total_B1).to(hidden_BTD.dtype)


def _take(hidden_BTD: Tensor, index_B: Tensor) -> Tensor:
    return hidden_BTD[torch.arange(hidden_BTD.shape[0], device=hidden_BTD.device), index_B]
