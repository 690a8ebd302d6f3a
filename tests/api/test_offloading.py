"""`lading.offload` at its door: what it takes, what it refuses, and what it leaves where nothing has to move."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lading
from lading.residency.residency import Residency
from models import Plain, TiedParameters, build, example_input


def test_offload_takes_a_plan_or_a_device_map():
    for make in (lambda net: {"": "disk"}, lambda net: lading.plan(net, {"cpu": 800})):
        net = build(Plain)
        expected = net(example_input())
        with lading.offload(net, make(net)) as residency:
            assert torch.equal(net(example_input()), expected)
            assert residency.stats().fetches > 0
            assert "fetched" in str(residency.stats())
            assert repr(residency).startswith("<Residency open: fetched")
        assert repr(residency).startswith("<Residency closed: ")
        residency.close()  # twice is fine


def test_offload_of_another_models_plan_is_refused_by_name():
    with pytest.raises(
        lading.ResidencyError, match=r"the plan: found no home for 'up.weight', .* of Plain .* plan this"
    ):
        lading.offload(build(Plain), lading.plan(nn.Sequential(nn.Linear(2, 2)), {"cpu": "1GB"}))


def test_offload_of_a_model_on_meta_is_refused_by_name():
    with torch.device("meta"):
        net = Plain()
    plan = lading.plan(net, {"cpu": 800})
    with pytest.raises(lading.ResidencyError, match=r"Plain: found tensors on meta: 'up.weight'"):
        lading.offload(net, plan)


def test_offload_keeps_parameters_and_ties_what_they_are():
    net = build(TiedParameters)
    before = {name: id(parameter) for name, parameter in net.named_parameters(remove_duplicate=False)}
    expected = net(example_input())
    with lading.offload(net, {"": "disk"}):
        assert torch.equal(net(example_input()), expected)
        assert {name: id(parameter) for name, parameter in net.named_parameters(remove_duplicate=False)} == before
        assert net.head.weight.data_ptr() == net.embedding.weight.data_ptr()
    assert net.head.weight.data_ptr() == net.embedding.weight.data_ptr()


def test_offload_of_a_table_called_with_other_than_ids():
    """Embeddings of transformers may take a mask and compute positions from it."""

    class Positions(nn.Embedding):
        def forward(self, mask: torch.Tensor) -> torch.Tensor:
            return super().forward(mask.long().cumsum(-1))

    net = nn.Sequential(Positions(16, 8))
    for mask in (torch.ones(2, 5), torch.ones(2, 5, dtype=torch.bool), torch.ones(2, 5, dtype=torch.int32)):
        expected = net(mask)
        with lading.offload(net, {"": "disk"}):
            assert torch.equal(net(mask), expected)


def test_offload_of_a_table_with_many_rows_runs_however_little_room_there_is():
    net = nn.Sequential(nn.Embedding(4000, 64), nn.Linear(64, 64))
    ids = torch.arange(0, 4000, 3)
    expected = net(ids)
    with lading.offload(net, {"": "disk"}) as residency:
        for _ in range(2):
            assert torch.equal(net(ids), expected)
        assert residency.stats().peak_bytes <= residency.stats().capacity_bytes
    assert Residency.of(net) is None


def test_offload_of_ids_that_the_table_lacks_is_the_tables_own_error():
    net = nn.Sequential(nn.Embedding(10, 64))
    with lading.offload(net, {"": "disk"}):
        with pytest.raises(IndexError):
            net(torch.tensor([3, 10]))
        net(torch.tensor([3, 9]))
