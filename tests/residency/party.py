"""Run batches one by one as a convoy is said to run them, and say which threads of convoys there are."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import Any

import torch

from architectures import Architecture
from crowd import run_together

SEED = 11


def one_by_one(call: Callable[[Any], Any], batches: Iterable[Any], seed: int = SEED) -> list[Any]:
    """Call with each batch as after a seed of its own; what torch keeps for the process is left as it was."""
    outputs = []
    for index, batch in enumerate(batches):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed + index)
            outputs.append(call(batch))
    return outputs


def convoy_threads() -> list[threading.Thread]:
    """List the threads of convoys that live."""
    return [thread for thread in threading.enumerate() if thread.name == "lading-convoy"]


def varied(architecture: Architecture, number: int) -> dict[str, Any]:
    """Give an architecture's inputs with other values; every third batch has one row, where rows are all there is."""
    inputs = architecture.inputs()
    found = [value for value in inputs.values() if isinstance(value, torch.Tensor)]
    has_rows = len(found) == len(inputs) and all(value.dim() and len(value) == 2 for value in found)
    return {key: _varied(value, number, has_rows=has_rows) for key, value in inputs.items()}


def _varied(value: Any, number: int, *, has_rows: bool) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    if value.is_floating_point():
        value = value * (1 + 0.05 * number)
    elif value.dtype == torch.long and value.max() > 10:  # ids below are special tokens
        value = torch.where(value >= 10, 10 + (value - 10 + 7 * number) % 89, value)
    return value[:1] if has_rows and number % 3 == 2 else value


def watched(function, *functions) -> None:
    """Run functions together, each in a thread; whatever one raises is raised, and who never ends fails the test."""
    raised = run_together([function, *functions])
    if raised:
        raise raised[0]
