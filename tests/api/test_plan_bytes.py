"""Prove that a plan counts a model's bytes by storage, to the byte, whatever it is planned from."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lading
from architectures import AVAILABLE, Architecture
from zoo import QUIET, SAMPLE, Directory, named_tensors

pytestmark = QUIET
SHARING = ("fsmt", "janus", "llava", "sam", "t5gemma")  # ties that one version declares in a way of its own
EVERY = [
    pytest.param(each, id=each.name, marks=[] if each in SAMPLE or each.name in SHARING else [pytest.mark.full])
    for each in AVAILABLE
]
EVERYTHING = {0: 10**15}


def bytes_by_storage(model: nn.Module) -> int:
    """Return the bytes of all parameters and buffers, each storage once."""
    storages = [tensor.untyped_storage() for tensor in named_tensors(model).values()]
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


@pytest.mark.parametrize("architecture", EVERY)
def test_plan_of_any_architecture_counts_the_bytes_of_its_storages(architecture: Architecture, saved: Directory):
    model, directory = architecture.build(), saved(architecture)
    expected = bytes_by_storage(model)
    assert lading.plan(model, EVERYTHING).total_bytes == expected
    assert lading.plan(directory, EVERYTHING).total_bytes == expected
    options = {"model_class": architecture.model_class, "dtype": torch.float32}
    assert lading.plan(model.config, EVERYTHING, **options).total_bytes == expected
    loaded = lading.load(directory, copy=True)
    assert bytes_by_storage(loaded) == lading.plan(loaded, EVERYTHING).total_bytes == expected
