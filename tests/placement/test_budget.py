"""Read what users write as ``max_memory``: every spelling of a device, every size, and each wrong one refused."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lading.errors import PlanError
from lading.placement.budget import Budget, budget_of, device_key

GIB = 2**30


@pytest.mark.parametrize(
    ("written", "key"),
    [
        (0, 0),
        (3, 3),
        ("0", 0),
        (" 2 ", 2),
        ("cuda", 0),
        ("cuda:0", 0),
        ("cuda:7", 7),
        ("xpu:1", 1),
        (torch.device("cuda"), 0),
        (torch.device("cuda", 1), 1),
        (np.int64(1), 1),
        ("cpu", "cpu"),
        ("cpu:0", "cpu"),
        (torch.device("cpu"), "cpu"),
        ("mps", "mps"),
        ("mps:0", "mps"),
        ("disk", "disk"),
    ],
)
def test_device_key_every_spelling_is_a_key_of_a_device_map(written, key):
    found = device_key(written)

    assert found == key
    assert type(found) is type(key)


@pytest.mark.parametrize(
    "written", [-1, "-1", True, False, None, "", 1.0, 0.5, "gpu", "cuda:x", "cuda:-1", "gpu:0", "meta", (0,), b"cpu"]
)
def test_device_key_nonsense_is_refused_by_name(written):
    with pytest.raises(PlanError, match="max_memory: found device") as caught:
        device_key(written)

    assert repr(written) in str(caught.value)
    assert "'cuda:0'" in str(caught.value)


def test_budget_of_all_kinds_is_sorted_into_tiers():
    budget = budget_of({"cuda:1": "10GiB", 0: "500MB", "cpu": 7 * GIB, "disk": "1.5 TiB", "mps": 3})

    assert budget == Budget(
        accelerators={1: 10 * GIB, 0: 500_000_000, "mps": 3}, host_bytes=7 * GIB, disk_bytes=3 * 2**39
    )
    assert list(budget.accelerators) == [1, 0, "mps"], "the order is the user's preference"


def test_budget_of_nothing_is_an_unlimited_disk():
    assert budget_of({}) == Budget(accelerators={}, host_bytes=0, disk_bytes=None)


def test_budget_of_a_disk_of_zero_is_no_disk():
    assert budget_of({"disk": 0}).disk_bytes == 0


@pytest.mark.parametrize("size", [0, "0", "0GiB", 0.0])
def test_budget_of_zero_is_a_size(size):
    assert budget_of({0: size}).accelerators == {0: 0}


@pytest.mark.parametrize(
    ("first", "second"),
    [(0, "cuda:0"), ("cuda", "cuda:0"), (1, torch.device("cuda", 1)), ("cpu", torch.device("cpu")), ("0", 0)],
)
def test_budget_of_one_device_under_two_names_is_refused(first, second):
    with pytest.raises(PlanError, match="twice") as caught:
        budget_of({first: "1GiB", second: "2GiB"})

    assert repr(device_key(first)) in str(caught.value)


@pytest.mark.parametrize(
    "size",
    [-1, -0.5, "-1GiB", "ten", "10 giraffes", "GiB", "", None, True, float("nan"), float("inf"), [1], "1e9", "1,5GB"],
)
@pytest.mark.parametrize("device", [0, "cpu", "disk"])
def test_budget_of_a_wrong_size_is_refused_by_device(device, size):
    with pytest.raises(PlanError) as caught:
        budget_of({device: size})

    message = str(caught.value)
    assert f"max_memory of device {device!r}: found {size!r}" in message
    assert "'10GiB'" in message


@pytest.mark.parametrize("number", [np.int64(2**40), np.uint64(2**40), np.float64(2**40)])
def test_budget_of_a_number_of_numpy_is_a_number(number):
    """What psutil's or a data frame's arithmetic gives."""
    assert budget_of({0: number}).accelerators == {0: 2**40}


@given(st.dictionaries(st.integers(0, 15), st.integers(0, 2**50), max_size=8), st.permutations(["cpu", "disk"]))
def test_budget_of_any_integers_keeps_order_and_value(sizes, others):
    budget = budget_of({others[0]: 5, **sizes, others[1]: 5})

    assert dict(budget.accelerators) == sizes
    assert list(budget.accelerators) == list(sizes)
    assert (budget.host_bytes, budget.disk_bytes) == (5, 5)


def test_budget_describe_names_every_device():
    written = budget_of({0: "3GiB", "cpu": 512}).describe()

    assert written == "0: 3.0 GiB, cpu: 512 B, disk: no limit"


def test_budget_with_device_changes_one_and_no_other():
    budget = budget_of({0: 1, 1: 2, "cpu": 3, "disk": 4})

    assert budget.with_device(1, 9).sizes() == {0: 1, 1: 9, "cpu": 3, "disk": 4}
    assert budget.with_device("cpu", 9).sizes() == {0: 1, 1: 2, "cpu": 9, "disk": 4}
    assert budget.with_device("disk", 9).sizes() == {0: 1, 1: 2, "cpu": 3, "disk": 9}
    assert budget.sizes() == {0: 1, 1: 2, "cpu": 3, "disk": 4}


def test_budget_pickled_is_the_same():
    budget = budget_of({0: 1, "cpu": 3})

    assert pickle.loads(pickle.dumps(budget)) == budget
