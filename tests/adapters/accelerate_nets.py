"""Share what the tests beside accelerate run on."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn


@pytest.fixture(autouse=True)
def quiet_accelerate():
    """Keep accelerate's remarks about meta out of the report."""
    log = logging.getLogger("accelerate.big_modeling")
    before = log.level
    log.setLevel(logging.ERROR)
    yield
    log.setLevel(before)


class Small(nn.Module):
    """A linear layer, one with buffers, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.linear1 = nn.Linear(3, 4)
        self.batchnorm = nn.BatchNorm1d(4)
        self.linear2 = nn.Linear(4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear2(self.batchnorm(self.linear1(x)))
