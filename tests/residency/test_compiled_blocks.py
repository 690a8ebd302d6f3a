"""torch.compile beside streaming: hooks stay outside compiled code, and nothing is compiled again."""

from __future__ import annotations

import pytest
import torch
from fake_device import LazyDevice
from torch import nn

import lading
from lading.residency.residency import Residency
from lading.residency.settings import Settings

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's compiler itself


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(x)))


class Net(nn.Module):
    _no_split_modules = ("Block",)

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Counting:
    """A compiler that runs what it is given, and counts the graphs."""

    def __init__(self) -> None:
        self.graphs: list[torch.fx.GraphModule] = []

    def __call__(self, graph: torch.fx.GraphModule, _: list[torch.Tensor]):
        self.graphs.append(graph)
        return graph.forward


def compile_whole(net: Net, compiler: Counting):
    return torch.compile(net, backend=compiler)


def compile_in_place(net: Net, compiler: Counting):
    for layer in net.layers:
        layer.compile(backend=compiler)
    return net


def compile_wrapped(net: Net, compiler: Counting):
    net.layers = nn.ModuleList(torch.compile(layer, backend=compiler) for layer in net.layers)
    return net


@pytest.mark.parametrize("to_slots", [False, True], ids=["disk to CPU", "slots"])
@pytest.mark.parametrize("compiling", [compile_whole, compile_in_place, compile_wrapped])
def test_compiled_blocks_stream_with_the_same_bits_and_compile_once(compiling, to_slots):
    torch.manual_seed(0)
    torch._dynamo.reset()
    net, x = Net().eval(), torch.randn(2, 32)
    size = sum(weight.nbytes for weight in net.layers[0].parameters())
    rooms = {0: 3 * size, "cpu": 10**6} if to_slots else {"cpu": 3 * size}
    plan = lading.plan(net, rooms)
    num_streamed = sum(placement.is_streamed for placement in plan.placements)
    assert num_streamed == 3
    compiler = Counting()
    with torch.no_grad():
        expected = net(x)
        with Residency(net, plan, Settings(transfers=lambda _: LazyDevice())) as residency:
            call = compiling(net, compiler)
            assert torch.equal(call(x), expected)
            graphs = len(compiler.graphs)
            linears = [node for graph in compiler.graphs for node in graph.graph.nodes if "linear" in str(node.target)]
            assert len(linears) >= 2, "the blocks' own work is compiled"
            for _ in range(3):
                assert torch.equal(call(x), expected)
            assert len(compiler.graphs) == graphs, "nothing was compiled again"
            assert residency.stats().hits + residency.stats().waits == 4 * num_streamed
    torch._dynamo.reset()
