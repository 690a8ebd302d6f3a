"""Captures on a real accelerator: kept on the host without waiting for the device, and on the device by name."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lading

pytestmark = pytest.mark.gpu


@pytest.fixture
def net():
    torch.manual_seed(0)
    layers = (nn.Linear(256, 256) for _ in range(6))
    return nn.Sequential(*layers).cuda().eval().requires_grad_(requires_grad=False)


def test_captures_on_the_host_equal_those_on_the_device_and_own_their_bytes(net):
    x = torch.randn(4, 32, 256, device="cuda")
    with lading.capture(net, "*") as there, lading.capture(net, "*", to="cpu") as here:
        for number in range(20):
            net(x + number)
    for name in there:
        for kept, copied in zip(there.calls(name), here.calls(name), strict=True):
            assert kept.is_cuda
            assert copied.device.type == "cpu"
            assert torch.equal(kept.cpu(), copied)
            assert copied.untyped_storage().nbytes() == copied.nbytes


def test_a_capture_on_the_host_does_not_wait_for_the_device(net):
    """Behind a kernel that takes long, the forward comes back while the first copy has not even begun."""
    x = torch.randn(4, 32, 256, device="cuda")
    with lading.capture(net, "*", to="cpu"):
        net(x)  # pinned memory is taken now
    with lading.capture(net, "*", to="cpu") as seen:
        torch.cuda._sleep(2_000_000_000)
        net(x)
        is_done = torch.cuda.current_stream().query()
    assert not is_done
    assert torch.equal(seen["5"], net(x).cpu())


def test_the_gpu_is_the_current_accelerator(net):
    with lading.capture(net, "0", to="gpu") as seen:
        net(torch.ones(2, 256, device="cuda"))
    assert seen["0"].is_cuda
    cpu = nn.Linear(4, 4)
    with torch.no_grad(), lading.capture(cpu, "", to="gpu") as seen:
        expected = cpu(torch.ones(2, 4))
    assert torch.equal(seen[""].cpu(), expected)


def test_streams_of_several_threads_keep_to_themselves(net):
    from concurrent.futures import ThreadPoolExecutor

    def one(number: int) -> bool:
        x = torch.full((2, 256), float(number), device="cuda")
        torch.cuda.synchronize()
        with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(50):
                with lading.capture(net, "*", to="cpu") as seen:
                    found = net(x)
                if not torch.equal(seen["5"], found.cpu()):
                    return False
        return True

    with ThreadPoolExecutor(6) as executor:
        assert all(executor.map(one, range(6)))
