"""A forward that is repeated has the first blocks of the next one fetched meanwhile: never more, and never wrong."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lading

NUM_STREAMED = 8


@pytest.fixture
def net():
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(256, 256) for _ in range(12)))


def offloaded(net):
    return lading.offload(net, {str(index): "disk" if index < NUM_STREAMED else "cpu" for index in range(12)})


def settled(residency):
    """Wait until nothing is fetched any more, and count."""
    with residency.editing():
        return residency.stats()


@torch.no_grad()
def test_repeated_forwards_fetch_each_block_once_a_forward_within_the_room(net):
    x = torch.randn(4, 256)
    expected = net(x)
    with offloaded(net) as residency:
        for turn in range(1, 6):
            assert torch.equal(net(x), expected)
            stats = settled(residency)
            ahead = stats.fetches - turn * NUM_STREAMED
            assert 0 <= ahead <= (0 if turn == 1 else 2), "no more than the room holds is fetched ahead"
            assert stats.peak_bytes <= stats.capacity_bytes


@torch.no_grad()
def test_repeated_forwards_see_an_edit_of_what_was_fetched_ahead(net):
    x = torch.randn(4, 256)
    with offloaded(net) as residency:
        residency._parts._room.capacity *= 2  # edits take room too
        for _ in range(3):
            net(x)
        with residency.editing():
            net[0].weight.mul_(2)
            net[5].bias.add_(1)
        found = [net(x) for _ in range(3)]
    assert all(torch.equal(each, net(x)) for each in found)


@torch.no_grad()
def test_repeated_forwards_where_all_blocks_are_held_fetch_nothing(net):
    x = torch.randn(4, 256)
    expected = net(x)
    with offloaded(net) as residency:
        residency._parts._room.capacity = 2**40
        net(x)
        fetched = settled(residency).fetches
        for _ in range(20):
            assert torch.equal(net(x), expected)
        assert settled(residency).fetches == fetched == NUM_STREAMED


@torch.no_grad()
def test_blocks_smaller_than_a_page_find_room_in_a_plan_for_two():
    net = nn.Sequential(*(nn.Linear(8, 8) for _ in range(6)))
    x = torch.randn(2, 8)
    expected = net(x)
    with offloaded_all(net) as residency:
        assert torch.equal(net(x), expected)
        assert torch.equal(net(x), expected)
        assert residency.stats().evictions > 0


def offloaded_all(net):
    return lading.offload(net, {"0": "cpu", **{str(index): "disk" for index in range(1, 6)}})
