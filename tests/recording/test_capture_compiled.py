"""Captures beside compilations, and where compiled code runs: right, or refused, never silently nothing."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

import lading


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.fixture
def net():
    torch.manual_seed(0)
    torch._dynamo.reset()
    yield Net().eval().requires_grad_(requires_grad=False)
    torch._dynamo.reset()


@pytest.mark.parametrize("is_warm", [False, True])
def test_a_call_of_what_was_compiled_of_the_model_is_refused(net, is_warm):
    compiled = torch.compile(net, backend="eager")
    x = torch.ones(2, 8)
    expected = net(x)
    if is_warm:
        compiled(x)
    refused = pytest.raises(lading.CaptureError, match=r"found a call of what torch\.compile made of it")
    with refused, lading.capture(net, "layers.*"):
        compiled(x)
    assert torch.equal(compiled(x), expected)
    with lading.capture(net, "layers.*") as seen:
        assert torch.equal(net(x), expected)
    assert torch.equal(seen["layers.2"], expected)


@pytest.mark.parametrize("part", ["", "layers.1"])
def test_what_is_compiled_in_place_while_a_capture_is_open_is_refused(net, part):
    refused = pytest.raises(lading.CaptureError, match="compiled code ignores hooks")
    with refused, lading.capture(net, "layers.1.0"):
        net.get_submodule(part).compile(backend="eager")
        net(torch.ones(2, 8))


def test_what_another_thread_compiles_beside_a_capture_holds_nothing_of_it(net):
    x = torch.ones(2, 8)
    expected = net(x)
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(net, backend=backend, fullgraph=True)
    for _ in range(12):  # more than what torch compiles anew before it gives up
        with lading.capture(net, "layers.*") as seen, ThreadPoolExecutor(1) as executor:
            assert torch.equal(executor.submit(compiled, x).result(), expected)
            assert [seen.calls(name) for name in seen] == [[]] * 3
            net(x)
        assert torch.equal(seen["layers.2"], expected)
        assert torch.equal(compiled(x), expected)
    assert len({len(graph.graph.nodes) for graph in graphs}) == 1
    assert len(graphs) <= 2
