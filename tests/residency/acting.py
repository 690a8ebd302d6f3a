"""A model that acts between its blocks as a test says, and what must hold when a convoy through it is over."""

from __future__ import annotations

import threading
import time

import torch
from party import convoy_threads
from torch import nn

import lading
from crowd import PATIENCE_S

WIDTH = 64


class OopsError(Exception):
    """What a model raises."""


class Acting(nn.Module):
    """Six layers; an input says before which of them to act, and how."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(6))
        self.act = lambda x, place: None
        self.num_begun = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.num_begun += 1
        for place, layer in enumerate(self.layers):
            self.act(x, place)
            x = layer(x).tanh() + x
        self.act(x, len(self.layers))
        return x


def inputs(count: int) -> list[torch.Tensor]:
    return [torch.full((1, WIDTH), 1.0 + number) for number in range(count)]


def check_restored(model: nn.Module, residency: lading.Residency, expected: list[torch.Tensor]) -> None:
    """Nothing of a convoy is left: no thread, visit or lease; editing gets in, forwards are right, close works."""
    model.act = lambda x, place: None
    end = time.monotonic() + PATIENCE_S
    while convoy_threads() and time.monotonic() < end:  # one whose start was interrupted cannot be joined yet
        time.sleep(0.001)
    assert not convoy_threads()
    entered = threading.Event()

    def edit() -> None:
        with residency.editing():
            entered.set()

    editor = threading.Thread(target=edit, daemon=True)
    editor.start()
    editor.join(PATIENCE_S)
    assert entered.is_set(), "somebody is still inside"
    ledger = residency._parts.schedule._ledger
    assert (ledger.visits, ledger.tickets, sum(ledger.leases)) == ([], [], 0)
    with torch.no_grad():
        for batch, output in zip(inputs(len(expected)), expected, strict=True):
            assert torch.equal(model(batch), output)
        found = list(lading.convoy(model, inputs(len(expected)), width=3))
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
