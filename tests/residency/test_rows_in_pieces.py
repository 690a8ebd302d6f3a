"""A table whose rows do not fit the room at once: the same bits and gradients, and the room is kept."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lading


class Net(nn.Module):
    def __init__(self, **options) -> None:
        super().__init__()
        self.table = nn.Embedding(4000, 256, **options)
        self.layers = nn.ModuleList(nn.Linear(256, 256) for _ in range(4))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.table(ids)
        for layer in self.layers:
            x = x + layer(x)
        return x


@pytest.fixture(params=[{}, {"padding_idx": 3}, {"scale_grad_by_freq": True}], ids=str)
def net(request) -> Net:
    torch.manual_seed(0)
    return Net(**request.param)


def offloaded(net: Net) -> lading.Residency:
    layer = sum(weight.nbytes for weight in net.layers[0].parameters())
    return lading.offload(net, lading.plan(net, {"cpu": 3 * layer, "disk": 10**8}))


def many_ids() -> torch.Tensor:
    return torch.randint(0, 4000, (16, 200), generator=torch.Generator().manual_seed(1))


def test_more_rows_than_room_give_the_same_bits_within_the_room(net):
    ids = many_ids()
    with torch.no_grad():
        expected = net(ids)
        with offloaded(net) as residency:
            assert residency.stats().capacity_bytes < net.table.weight.nbytes // 4
            for _ in range(2):
                assert torch.equal(net(ids), expected)
                assert torch.equal(net.table(ids), net.table.weight[ids])
            assert residency.stats().peak_bytes <= residency.stats().capacity_bytes


def test_gradients_through_pieces_are_the_tables_own(net):
    ids = many_ids()
    net(ids).square().sum().backward()
    expected = {name: weight.grad.clone() for name, weight in net.named_parameters()}
    net.zero_grad()
    with offloaded(net):
        net(ids).square().sum().backward()
    assert all(torch.equal(weight.grad, expected[name]) for name, weight in net.named_parameters())


def test_edited_rows_are_gathered_as_they_are(net):
    ids = many_ids()
    with torch.no_grad(), offloaded(net):
        net(ids)
        net.table.weight[7] = 1.0
        assert (net.table(torch.full((1, 1), 7)) == 1.0).all()
        assert torch.equal(net.table(ids), net.table.weight[ids])


def test_ids_beyond_the_table_are_its_own_error(net):
    with torch.no_grad(), offloaded(net), pytest.raises(IndexError):
        net(torch.cat([many_ids().flatten(), torch.tensor([4000])]))
