"""A chain of wide layers: eight blocks of a quarter of a MiB, more than their weights' budget holds."""

from __future__ import annotations

import torch
from torch import nn

BLOCK_BYTES = 256 * 256 * 4 + 256 * 4
DEVICE_MAP = {"layers": "disk", "norm": "cpu", "seen": "cpu"}


class Chain(nn.Module):
    """Eight linear layers, a norm and a buffer that training mode changes."""

    WIDTH = 256
    NUM_LAYERS = 8

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(self.NUM_LAYERS))
        self.norm = nn.LayerNorm(width)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x).tanh() + x
        if self.training:
            self.seen += 1
        return self.norm(x)


def seeded(model: nn.Module) -> nn.Module:
    """Draw every parameter from one seed."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model.eval().requires_grad_(False)
