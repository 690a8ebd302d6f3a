"""Draw random modules for property tests: nested, with shared modules, tied tensors, and everything that is odd."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import nn


class Node(nn.Module):
    """A module of no special class, with whatever is registered on it."""

    def forward(self) -> None:
        """Exist, so that this is no mere container."""


class Whole(Node):
    """A module that tests declare not to be split."""


DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.int8, torch.bool]


@st.composite
def leaves(draw: st.DrawFn) -> nn.Module:
    """Draw a module without children, of torch's or plain, on meta or real."""
    device = "meta" if draw(st.booleans()) else "cpu"
    kind = draw(st.sampled_from(["linear", "embedding", "batch_norm", "silent", "odd"]))
    width = draw(st.integers(1, 6))
    if kind == "linear":
        return nn.Linear(width, draw(st.integers(1, 6)), bias=draw(st.booleans()), device=device)
    if kind == "embedding":
        return nn.Embedding(draw(st.integers(1, 9)), width, device=device)
    if kind == "batch_norm":
        return nn.BatchNorm1d(width, device=device)
    if kind == "silent":
        return nn.Sequential() if draw(st.booleans()) else nn.ReLU()
    node = Node()
    _register(draw, node)
    return node


def _register(draw: st.DrawFn, node: nn.Module) -> None:
    """Register a few tensors of any dtype on a module, also none, also empty ones."""
    for index in range(draw(st.integers(0, 3))):
        kind = draw(st.sampled_from(["parameter", "buffer", "unsaved", "none", "no buffer"]))
        size, dtype = draw(st.integers(0, 9)), draw(st.sampled_from(DTYPES))
        tensor = torch.zeros(size, dtype=dtype, device="meta" if draw(st.booleans()) else "cpu")
        if kind == "parameter":
            node.register_parameter(f"p{index}", nn.Parameter(tensor, requires_grad=False))
        elif kind == "none":
            node.register_parameter(f"p{index}", None)
        else:
            value = None if kind == "no buffer" else tensor
            node.register_buffer(f"b{index}", value, persistent=kind != "unsaved")


@st.composite
def trees(draw: st.DrawFn, *, depth: int = 2, has_ties: bool = True) -> nn.Module:
    """Draw a module tree: names of which one begins another, modules that stand twice, parameters that stand twice."""
    root = _node(draw, depth)
    if has_ties:
        for _ in range(draw(st.integers(0, 2))):
            _share_module(draw, root)
        for _ in range(draw(st.integers(0, 2))):
            _tie_parameter(draw, root)
    return root


def _node(draw: st.DrawFn, depth: int) -> nn.Module:
    if depth == 0 or draw(st.integers(0, 3)) == 0:
        return draw(leaves())
    node = draw(st.sampled_from([Node, Node, Whole, nn.Sequential]))()
    if not isinstance(node, nn.Sequential) and draw(st.booleans()):
        _register(draw, node)
    for name in draw(st.lists(st.sampled_from(["1", "10", "a", "ab", "b"]), max_size=3, unique=True)):
        node.add_module(name, None if draw(st.integers(0, 9)) == 0 else _node(draw, depth - 1))
    return node


def _share_module(draw: st.DrawFn, root: nn.Module) -> None:
    modules = list(root.modules())
    holder, shared = draw(st.sampled_from(modules)), draw(st.sampled_from(modules))
    if holder not in shared.modules() and isinstance(holder, (Node, nn.Sequential)):
        holder.add_module("again", shared)


def _tie_parameter(draw: st.DrawFn, root: nn.Module) -> None:
    parameters = list(root.parameters())
    holders = [module for module in root.modules() if isinstance(module, Node)]
    if parameters and holders:
        draw(st.sampled_from(holders)).register_parameter("tied", draw(st.sampled_from(parameters)))
