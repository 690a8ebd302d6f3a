"""A device map names no budget: whatever it streams must have room, counted in the pages that are really fetched."""

from __future__ import annotations

import torch
from torch import nn

import lading


def test_offload_of_blocks_smaller_than_a_page_has_room(tmp_path):
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5))
    for index, tensor in enumerate(net.parameters()):  # each in a file, and so on a page, of its own
        file = tmp_path / f"{index}.dat"
        file.write_bytes(tensor.detach().numpy().tobytes())
        shown = torch.from_file(str(file), shared=False, size=tensor.numel(), dtype=tensor.dtype)
        tensor.data = shown.view(tensor.shape)
    inputs = torch.ones(1, 3)
    expected = net(inputs)
    with lading.offload(net, {"": "disk"}) as residency:
        assert torch.equal(net(inputs), expected)
        assert residency.stats().fetches == 2


def test_offload_of_an_embedding_table_alone_has_room_for_rows():
    net = nn.Sequential(nn.Embedding(1000, 64))
    expected = net(torch.arange(300))
    with lading.offload(net, {"0": "disk"}):
        assert torch.equal(net(torch.arange(300)), expected)
