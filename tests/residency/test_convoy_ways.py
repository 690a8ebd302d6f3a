"""Convoys through models that go any way through their blocks: everybody gets through, within capacity, one by one."""

from __future__ import annotations

import threading
import time

from fake_mover import FakeMover, make_schedule
from hypothesis import given, settings
from hypothesis import strategies as st
from party import convoy_threads, watched
from torch import nn

from crowd import PATIENCE_S
from lading.residency.convoy import Convoy
from lading.residency.crew import Crew, Crossings
from lading.residency.hooks import Hooks
from lading.residency.moving import Pace
from lading.residency.schedule import Schedule
from lading.residency.supply import Supply
from lading.residency.width import Width

steps = st.deferred(lambda: st.lists(st.tuples(st.integers(0, 4), st.lists(st.integers(0, 4), max_size=2)), max_size=5))
calls = st.lists(steps, max_size=3)


class Block(nn.Module):
    def __init__(self, number: int, net: Net) -> None:
        super().__init__()
        self.number = number
        self.net = [net]

    def forward(self, inner: list) -> None:
        mover = self.net[0].mover
        mover._check(self.number in mover.inside, f"{self.number} is not there inside")
        self.net[0].step()
        for number in inner:
            self.net[0].blocks[number]([])
        mover._check(self.number in mover.inside, f"{self.number} did not come back after what it contains")


class Net(nn.Module):
    """Goes through blocks as its input says; notes whether two convoy threads are ever in its code at once."""

    def __init__(self, count: int, mover: FakeMover) -> None:
        super().__init__()
        self.mover = mover
        self.blocks = nn.ModuleList(Block(number, self) for number in range(count))
        self.is_running = False

    def step(self) -> None:
        if threading.current_thread().name != "lading-convoy":
            return
        self.mover._check(not self.is_running, "two convoy threads run at once")
        self.is_running = True
        time.sleep(0)
        self.is_running = False

    def forward(self, way: list) -> int:
        self.step()
        for number, inner in way:
            self.blocks[number](inner)
            self.step()
        return len(way)


def rig(capacity: int, planned: list[int] | None = None) -> tuple[Net, Hooks, Schedule, FakeMover]:
    schedule, mover, _ = make_schedule([1] * 5, capacity, planned)
    net, hooks = Net(5, mover), Hooks(schedule)
    for number, block in enumerate(net.blocks):
        hooks.add_block(block, number)
    hooks.add_door(net, frozenset(range(5)))
    return net, hooks, schedule, mover


def convoy_through(net: Net, hooks: Hooks, schedule: Schedule, ways: list, width: int | None) -> Convoy:
    def call(way: list) -> list:
        return [net(each) for each in way]

    supply = Supply(sizes=[1] * 5, pace=Pace(), used_bytes=lambda: 0, settle=None, activation_bytes=1 << 30)
    crossings = Crossings(call=call, seeds=lambda index: index, patience_s=PATIENCE_S)
    crew = Crew(hooks, schedule, crossings, (), Width(width, supply, is_one_call=False))
    return Convoy(crew, ways, crossings, (), returns_errors=False)


@settings(max_examples=60)
@given(
    convoys=st.lists(
        st.tuples(st.lists(calls, max_size=5), st.sampled_from([1, 2, 3, 5, None])), min_size=1, max_size=2
    ),
    plain=st.lists(steps, max_size=2),
    capacity=st.integers(1, 5),
    planned=st.lists(st.integers(0, 4), max_size=5, unique=True),
    num_edits=st.integers(0, 2),
)
def test_everybody_gets_through_whatever_way_models_go(convoys, plain, capacity, planned, num_edits):
    net, hooks, schedule, mover = rig(capacity, planned)

    def edit() -> None:
        for _ in range(num_edits):
            with schedule.editing():
                mover._check(not mover.inside, "editing beside a forward")

    def cross(ways: list, width: int | None) -> None:
        found = list(convoy_through(net, hooks, schedule, ways, width))
        assert found == [[len(each) for each in way] for way in ways]

    if len(convoys) > 1:
        net.step = lambda: None  # one of each convoy runs
    watched(
        edit,
        *[lambda way=way: net(way) for way in plain],
        *[lambda each=each: cross(*each) for each in convoys],
    )
    assert mover.wrong == []
    assert schedule.counts.peak_bytes <= capacity
    assert not convoy_threads()
    ledger = schedule._ledger
    assert (ledger.visits, ledger.tickets, sum(ledger.leases)) == ([], [], 0)
    hooks.remove()
    schedule.close()


def test_a_block_is_fetched_once_for_all_with_room_for_one():
    net, hooks, schedule, mover = rig(1)
    ways = [[[(number, []) for number in range(5)]]] * 6
    list(convoy_through(net, hooks, schedule, ways, 6))
    assert mover.fetched == dict.fromkeys(range(5), 1)
    schedule.close()


class Nest(nn.Module):
    """Blocks in blocks; goes as deep as it is told."""

    def __init__(self, inner: nn.Module | None = None) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, depth: int) -> int:
        if depth > 1:
            self.inner(depth - 1)
        return depth


class Nests(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.outer = Nest(Nest(Nest()))

    def forward(self, depths: list[int]) -> list[int]:
        return [self.outer(depth) for depth in depths]


def test_a_convoy_that_ends_deep_inside_blocks_ends_also_where_they_cannot_be_fetched_again():
    schedule, mover, _ = make_schedule([1] * 3, 1)
    net, hooks = Nests(), Hooks(schedule)
    for number, block in enumerate((net.outer, net.outer.inner, net.outer.inner.inner)):
        hooks.add_block(block, number)
    hooks.add_door(net, frozenset(range(3)))
    supply = Supply(sizes=[1] * 3, pace=Pace(), used_bytes=lambda: 0, settle=None, activation_bytes=1 << 30)
    crossings = Crossings(call=net, seeds=lambda index: index, patience_s=PATIENCE_S)
    crew = Crew(hooks, schedule, crossings, (), Width(2, supply, is_one_call=True))
    outputs = Convoy(crew, [[2, 1], [3]], crossings, (), returns_errors=False)
    assert next(outputs) == [2, 1]
    assert any(visit.held == [0, 1] for visit in schedule._ledger.visits)  # before the third

    def fail(block: int) -> None:
        raise OSError(f"{block} cannot be read")

    mover.on_fetch = fail
    watched(outputs.close)
    assert mover.wrong == []
    assert not convoy_threads()
    assert schedule._ledger.visits == []
    schedule.close()
