"""A table whose own forward takes something else than ids (BART's positions take embeddings, for their shape) runs."""

from __future__ import annotations

import torch
from torch import nn

import lading


class Positions(nn.Embedding):
    """Gather one row for each token; only the input's shape counts, as in transformers' BART."""

    def forward(self, embedded: torch.Tensor) -> torch.Tensor:
        return super().forward(torch.arange(embedded.shape[1]))


def test_offload_of_a_table_that_is_called_with_floats_runs():
    net = nn.Sequential(Positions(100, 64))
    inputs = torch.full((1, 7, 64), 0.5)
    expected = net(inputs)
    with lading.offload(net, {"": "disk"}):
        assert torch.equal(net(inputs), expected)
