"""Slots on a device that works late and in any order: every reader sees its own block, nothing waits for ever."""

from __future__ import annotations

import pytest
import torch
from fake_device import FakeDevice
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lading.residency.readers import STEP_BYTES, Reader
from lading.residency.slots import SlotBlock, SlotMover


def make_blocks(num_blocks: int, *, num_bytes: int = 2048) -> list[SlotBlock]:
    blocks = []
    for number in range(num_blocks):
        weights = (
            nn.Parameter(torch.full((num_bytes // 4,), float(number + 1)), requires_grad=False),
            nn.Parameter(torch.full((3, 5), number + 0.5, dtype=torch.bfloat16).t(), requires_grad=False),
        )
        blocks.append(SlotBlock(name=str(number), weights=weights, regions=(None, None)))
    return blocks


def make_mover(blocks: list[SlotBlock], slots: list[int], device: FakeDevice) -> SlotMover:
    pinned = set()
    for block in blocks:
        for weight in block.weights:
            raw = torch.empty(0, dtype=torch.uint8).set_(weight.untyped_storage())
            pinned.update({raw.data_ptr()} if device.pin(raw) else ())
    return SlotMover(blocks, slots, device, Reader(), frozenset(pinned))


@settings(max_examples=150)
@given(
    num_blocks=st.integers(1, 6),
    num_slots=st.integers(1, 3),
    visits=st.lists(st.integers(0, 5), max_size=25),
    seed=st.integers(0, 2**16),
    can_pin=st.booleans(),
)
def test_every_kernel_reads_its_own_block_whatever_the_device_does_first(num_blocks, num_slots, visits, seed, can_pin):
    device = FakeDevice(seed, can_pin=can_pin)
    blocks = make_blocks(num_blocks)
    slots = [block % num_slots for block in range(num_blocks)]
    mover = make_mover(blocks, slots, device)
    occupants: dict[int, int] = {}
    results = []
    for visit in visits:
        block = visit % num_blocks
        if occupants.get(slots[block]) != block:
            if slots[block] in occupants:
                mover.evict(occupants[slots[block]])
            mover.fetch(block)
            occupants[slots[block]] = block
        mover.enter(block)
        mover.join(block)
        for weight in blocks[block].weights:
            results.append((device.compute(weight.data), block))
        mover.part(block)
        mover.leave(block)
        device.run(device.random.randrange(4))
    device.run()
    for number, (result, block) in enumerate(results):
        expected = block + (1.0 if number % 2 == 0 else 0.5)
        assert torch.equal(result, torch.full_like(result, expected)), (number, block, result)


def test_a_parameter_points_home_between_forwards_and_to_the_same_address_inside():
    device = FakeDevice()
    blocks = make_blocks(4)
    mover = make_mover(blocks, [0, 1, 0, 1], device)
    homes = [[weight.data_ptr() for weight in block.weights] for block in blocks]
    inside: dict[int, list[int]] = {}
    for block in (0, 1, 2, 3, 2, 1, 0):
        mover.fetch(block)
        mover.enter(block)
        addresses = [weight.data_ptr() for weight in blocks[block].weights]
        assert not set(addresses) & {address for each in homes for address in each}
        assert inside.setdefault(block, addresses) == addresses
        assert [address % 512 for address in addresses] == [addresses[0] % 512] * 2
        assert blocks[block].weights[1].stride() == (1, 5)
        mover.part(block)
        mover.leave(block)
        mover.evict(block)
        assert [[weight.data_ptr() for weight in each.weights] for each in blocks] == homes
    assert set(inside[0]) & set(inside[2]), "blocks of one slot share its memory"


def test_an_edit_inside_a_forward_goes_home_and_is_there_next_time():
    device = FakeDevice()
    (block,) = make_blocks(1)
    mover = make_mover([block], [0], device)
    weight = block.weights[0]
    for expected in (1.0, 2.0, 3.0):
        mover.fetch(0)
        mover.enter(0)
        device.run()
        assert weight.data[0] == expected
        with torch.no_grad():
            weight.add_(1)
        mover.part(0)
        mover.leave(0)
        mover.evict(0)
        assert torch.equal(weight.data, torch.full_like(weight, expected + 1))


def test_a_home_larger_than_the_stages_arrives_whole_where_nothing_can_be_pinned():
    device = FakeDevice(3, can_pin=False)
    numbers = torch.arange(5 * STEP_BYTES // 4 + 7, dtype=torch.int32)
    block = SlotBlock(name="large", weights=(nn.Parameter(numbers.clone(), requires_grad=False),), regions=(None,))
    mover = make_mover([block], [0], device)
    mover.fetch(0)
    mover.enter(0)
    device.run()
    assert torch.equal(block.weights[0].data, numbers)


def test_stages_are_reused_only_after_the_device_has_read_them():
    device = FakeDevice(5)
    numbers = torch.arange(5 * STEP_BYTES // 4, dtype=torch.int32)
    block = SlotBlock(name="large", weights=(nn.Parameter(numbers.clone(), requires_grad=False),), regions=(None,))
    mover = SlotMover([block], [0], device, Reader(), frozenset())  # nothing of the home is pinned, the stages are
    mover.fetch(0)  # has to wait for stages: the fake's clock moves only where it does
    mover.enter(0)
    device.run()
    assert torch.equal(block.weights[0].data, numbers)
    assert len(device.pinned) == 3
    mover.part(0)
    mover.leave(0)
    mover.close()
    assert not device.pinned


@pytest.mark.parametrize("missing", ["join", "part"])
def test_the_fake_notices_a_missing_order(missing):
    """A proof that the first test can fail: without either order some interleaving reads the wrong bytes."""
    wrong = 0
    for seed in range(40):
        device = FakeDevice(seed)
        blocks = make_blocks(2)
        mover = make_mover(blocks, [0, 0], device)
        results = []
        for block in (0, 1, 0, 1):
            mover.fetch(block)
            mover.enter(block)
            if missing != "join":
                mover.join(block)
            results.append((device.compute(blocks[block].weights[0].data), block + 1.0))
            if missing != "part":
                mover.part(block)
            mover.leave(block)
            mover.evict(block)
        device.run()
        wrong += any(not torch.equal(result, torch.full_like(result, expected)) for result, expected in results)
    assert wrong
