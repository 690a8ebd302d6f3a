"""An offloaded model says where its blocks rest, as this ecosystem asks; afterwards it says what it said before."""

from __future__ import annotations

import pytest
from torch import nn

import lading


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 8))


def test_offload_shows_the_device_map_until_closed():
    model = net()
    before = dict(vars(model))
    with lading.offload(model, {"0": "cpu", "1": "disk"}) as residency:
        assert model.hf_device_map == residency.plan.device_map == {"0": "cpu", "1": "disk"}
    assert dict(vars(model)) == before


def test_offload_brings_an_earlier_device_map_back_on_close():
    model = net()
    model.hf_device_map = {"": "cpu"}
    with lading.offload(model, {"": "disk"}):
        assert model.hf_device_map == {"": "disk"}
    assert model.hf_device_map == {"": "cpu"}


def test_offload_of_an_offloaded_model_is_refused():
    model = net()
    with lading.offload(model, {"": "disk"}) as residency:
        with pytest.raises(lading.ResidencyError, match="Sequential: found an open residency"):
            lading.offload(model, {"": "disk"})
        assert residency.of(model) is residency
    lading.offload(model, {"": "disk"}).close()
