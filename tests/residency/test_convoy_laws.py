"""Laws of convoys over many models: the bits of batches run one by one, each block fetched once, sources unhurried."""

from __future__ import annotations

import random

import pytest
import torch
from laws import budget_of, same_bits, traces
from party import SEED, convoy_threads, one_by_one, varied
from torch import nn

import lading
from architectures import Architecture
from zoo import EVERY, QUIET

pytestmark = [*QUIET, pytest.mark.filterwarnings("ignore::lading.PlanWarning")]


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


@pytest.mark.parametrize("architecture", EVERY)
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
