"""Tell a convoy what it has to go by: how large blocks are, how fast they come in, what activations may take.

Measures memory; chooses nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from lading.placement.hardware import free_memory
from lading.placement.plan import Plan
from lading.residency.moving import Pace

_OF_WEIGHTS = ("fetched blocks", "buffers of streamed blocks", "margin")
_SHARE_OF_FREE = 0.5  # the rest is for what a forward needs for a moment, and for others


@dataclass(frozen=True, slots=True, kw_only=True)
class Supply:
    """Say what fetching and activations have to go by. Immutable."""

    sizes: Sequence[int]
    """Bytes of each block."""
    pace: Pace
    used_bytes: Callable[[], int]
    """What activations share with the rest of the process: memory in use on the execution device."""
    settle: Callable[[], None] | None
    """Waits until all that was computed so far is done; None where a call returns with its result."""
    activation_bytes: int
    """What they may take."""


def activation_bytes(plan: Plan) -> int:
    """Give what activations may take: what the plan keeps for a workload, else half of what is free now."""
    (use,) = (use for use in plan.devices if use.device == plan.main_device)
    planned = sum(size for term, size in use.reserved.items() if term not in _OF_WEIGHTS)
    return planned or int(_SHARE_OF_FREE * free_memory().get(plan.main_device, 0))


def anonymous_bytes() -> int:
    """Count this process's memory that is in no file: activations, and all else but mapped weights."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0


def device_bytes(device: torch.device) -> int:
    """Count what torch holds of a device for this process."""
    return 0 if device.type == "cpu" else int(torch.get_device_module(device).memory_allocated(device))
