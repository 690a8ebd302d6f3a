"""Laws of convoys over many models: the bits of batches run one by one, blocks fetched once, sources unhurried."""

from __future__ import annotations

import random

import pytest
import torch
from chain import BLOCK_BYTES, DEVICE_MAP, Chain, seeded
from fake_device import LazyDevice
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from laws import budget_of, opened, same_bits, streamed_plan, traces
from party import SEED, convoy_threads, one_by_one, varied
from torch import nn

import lading
import models
from architectures import MAJOR, Architecture
from zoo import EVERY, QUIET

pytestmark = [*QUIET, pytest.mark.filterwarnings("ignore::lading.PlanWarning")]

KEEPS_ITS_STATE = {"recurrent_gemma"} if MAJOR < 5 else set()  # of one call, on its modules: batches would mix
TOGETHER = [each for each in EVERY if each.values[0].name not in KEEPS_ITS_STATE]


def batches_of(architecture: Architecture, model: nn.Module, count: int) -> tuple[list, list]:
    """Give batches that the model takes, and its outputs one by one."""
    batches = [varied(architecture, number) for number in range(count)]
    with torch.no_grad():
        try:
            return batches, one_by_one(caller(architecture, model), batches)
        except Exception:  # noqa: BLE001 - its inputs belong together in a way that nobody else knows
            batches = [architecture.inputs()] * count
            return batches, one_by_one(caller(architecture, model), batches)


def caller(architecture: Architecture, model: nn.Module):
    method = model if architecture.forward == "__call__" else getattr(model, architecture.forward)
    return lambda batch: method(**batch)


@pytest.mark.parametrize("architecture", TOGETHER)
def test_a_convoy_has_the_bits_of_batches_run_one_by_one(architecture):
    model = architecture.build()
    chance = random.Random(architecture.name)
    width = chance.choice([1, 2, 3, 4, "auto"])
    batches, expected = batches_of(architecture, model, 5)
    call = caller(architecture, model)
    edits_itself = "weights in place" in architecture.odd  # the first forward edits more than a small budget holds
    share = 1.0 if edits_itself else chance.choice([0.0, 0.0, chance.random()])
    before = traces(model)
    with torch.no_grad(), lading.offload(model, lading.plan(model, budget_of(model, share))) as residency:
        given_as = {"function": call} if architecture.forward != "__call__" else {}
        for _ in range(2):
            with lading.convoy(model, batches, width=width, seed=SEED, **given_as) as outputs:
                found = list(outputs)
            assert [same_bits(one, other) for one, other in zip(found, expected, strict=True)] == [True] * len(batches)
        stats = residency.stats()
        assert stats.peak_bytes <= stats.capacity_bytes
        assert not convoy_threads()
    assert traces(model) == before


@pytest.mark.parametrize("architecture", TOGETHER)
def test_a_convoy_through_slots_has_the_bits_of_batches_run_one_by_one(architecture):
    model = architecture.build()
    batches, expected = batches_of(architecture, model, 4)
    width = random.Random(architecture.name).choice([2, 3, 4, "auto"])
    given_as = {"function": caller(architecture, model)} if architecture.forward != "__call__" else {}
    with torch.no_grad(), opened(model, streamed_plan(model, 0.3), LazyDevice()):
        found = list(lading.convoy(model, batches, width=width, seed=SEED, **given_as))
    assert [same_bits(one, other) for one, other in zip(found, expected, strict=True)] == [True] * len(batches)
    assert not convoy_threads()


@pytest.mark.parametrize("net_class", models.NETS, ids=lambda each: each.__name__)
def test_modules_of_every_kind_cross_together(net_class):
    net = models.build(net_class)
    batches = [models.example_input(seed) for seed in range(5)]
    expected = [net(batch) for batch in batches]
    with lading.offload(net, {"": "disk"}):
        found = list(lading.convoy(net, batches, width=3))
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


# Odd ways through a model --------------------------------------------------------------------------------------------


class Wayward(nn.Module):
    """A depth that the data decide, layers called again or skipped, one inside another, rows by use, an early end."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(64, 32)
        self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(4))
        self.outer = Outer()
        self.head = nn.Linear(32, 64)

    def forward(self, ids: torch.Tensor, scale: float = 1.0, *, depth: int = 3) -> torch.Tensor:
        x = self.table(ids) * scale
        while depth > 0:
            x = self.layers[depth % 4](x).tanh()
            depth -= 1 + int(x.sum() > 0)
        if len(ids) == 1:
            return x
        x = self.layers[0](self.outer(x)).tanh()
        return self.head(self.layers[0](x))


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(32))
        self.inner = nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x * self.scale) * self.scale


SHAPES = st.tuples(st.integers(1, 3), st.integers(1, 7), st.integers(0, 6))
HOWS = st.sampled_from(["tensor", "tuple", "mapping"])


@pytest.fixture(scope="module")
def wayward() -> Wayward:
    return seeded(Wayward())


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shapes=st.lists(st.tuples(SHAPES, HOWS), max_size=9),
    width=st.one_of(st.just("auto"), st.integers(1, 10)),
    share=st.floats(0, 0.6),
)
def test_batches_of_any_shape_cross_at_any_width(wayward, shapes, width, share):
    batches, expected = [], []
    for number, ((rows, length, depth), how) in enumerate(shapes):
        ids = torch.randint(0, 64, (rows, length), generator=torch.Generator().manual_seed(number))
        arguments = {"tensor": ids, "tuple": (ids, 0.5), "mapping": {"ids": ids, "depth": depth}}
        batches.append(arguments[how])
        args = {"tensor": (ids,), "tuple": (ids, 0.5), "mapping": (ids,)}[how]
        expected.append(wayward(*args, **({"depth": depth} if how == "mapping" else {})))
    with lading.offload(wayward, lading.plan(wayward, budget_of(wayward, share))) as residency:
        with lading.convoy(wayward, iter(batches), width=width) as outputs:
            found = list(outputs)
            stats = outputs.stats()
        assert residency.stats().peak_bytes <= residency.stats().capacity_bytes
    assert len(found) == len(expected)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert stats.batches == len(batches)
    if width != "auto":
        assert stats.crossings == -(-len(batches) // width)
        assert stats.width == min(width, len(batches))


# Bytes ---------------------------------------------------------------------------------------------------------------


def total_of(residency: lading.Residency) -> int:
    """Count the bytes of everything that is fetched whole."""
    return sum(residency._parts.supply().sizes)


@pytest.mark.parametrize("num_copies", [1, 2, 3])
@pytest.mark.parametrize("width", [2, 7])
def test_each_block_of_a_chain_is_fetched_once_in_each_crossing(mapped_chain, x, num_copies, width):
    model = mapped_chain()
    room = {"cpu": num_copies * BLOCK_BYTES + (16 << 10)}
    batches = [x + number for number in range(7)]
    with lading.offload(model, lading.plan(model, room)) as residency:
        with lading.convoy(model, batches, width=width) as outputs:
            list(outputs)
            stats = outputs.stats()
        assert 0 < stats.fetched_bytes <= stats.crossings * total_of(residency)
        assert residency.stats().fetched_bytes <= (stats.crossings + num_copies / 8) * total_of(residency)
        assert residency.stats().peak_bytes <= residency.stats().capacity_bytes <= room["cpu"]


@pytest.mark.parametrize("name", ["bert", "qwen2-tied", "gpt2", "mixtral", "mamba", "llava", "olmo"])
def test_an_architecture_is_fetched_once_for_all_batches(name):
    architecture = next(each for each in (param.values[0] for param in EVERY) if each.name == name)
    model = architecture.build()
    batches, expected = batches_of(architecture, model, 6)
    with torch.no_grad(), lading.offload(model, lading.plan(model, budget_of(model, 0.0))) as residency:
        for _ in range(3):  # the plan's order may be wrong in the first two: several visits begin before one ends
            before = residency.stats().fetched_bytes
            found = list(lading.convoy(model, batches, width=8, seed=SEED))
            fetched = residency.stats().fetched_bytes - before
        assert all(same_bits(one, other) for one, other in zip(found, expected, strict=True))
        assert fetched <= total_of(residency)
        assert residency.stats().peak_bytes <= residency.stats().capacity_bytes


# Sources -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1, 2, 3, 5])
def test_a_source_is_taken_only_as_far_as_a_crossing_needs(mapped_chain, x, width):
    model, num_taken, seen = mapped_chain(), 0, []

    def source():
        nonlocal num_taken
        for number in range(7):
            num_taken += 1
            yield x + number

    with lading.offload(model, DEVICE_MAP):
        outputs = lading.convoy(model, source(), width=width)
        assert num_taken == 0
        for _ in outputs:
            seen.append(num_taken)
    assert seen == [min(7, width * (number // width + 1)) for number in range(7)]


def test_a_source_without_an_end_gives_outputs_without_an_end(mapped_chain, x):
    model = mapped_chain()

    def source():
        while True:
            yield x

    with lading.offload(model, DEVICE_MAP), lading.convoy(model, source(), width="auto") as outputs:
        expected = model(x)
        for _ in range(70):
            assert torch.equal(next(outputs), expected)


def test_a_model_of_which_nothing_streams_is_called_batch_by_batch(x):
    model = seeded(Chain())
    num_taken = 0

    def source():
        nonlocal num_taken
        for number in range(5):
            num_taken += 1
            yield x + number

    def run() -> None:
        nonlocal num_taken
        num_taken = 0
        with lading.convoy(model, source(), width=3) as outputs:
            for number, output in enumerate(outputs):
                assert num_taken == number + 1
                assert torch.equal(output, model(x + number))
                assert not convoy_threads()
            stats = outputs.stats()
        assert (stats.batches, stats.crossings, stats.width, stats.limited_by) == (5, 0, 1, "resident")

    run()
    with lading.offload(model, {"": "cpu"}):
        run()
    with torch.no_grad(), opened(model, lading.plan(model, {0: 1 << 30}), LazyDevice()):
        run()
