"""Say what a model is to do, and how much memory beyond its weights that takes.

Knows no model and computes nothing: an adapter measures the terms, the planner adds them up.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from lading.errors import PlanError, refusal
from lading.units import parse_dtype


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Describe the largest call that a plan must leave room for.

    >>> Workload(batch_size=8, num_tokens=2048, new_tokens=256).batch_size
    8

    Raises:
        PlanError: a count is out of range, or ``kv_dtype`` names no element type.
    """

    batch_size: int = 1
    """Rows of a batch."""
    num_tokens: int = 0
    """Tokens of input a row has. 0 with the other defaults: room for nothing but weights and margin."""
    new_tokens: int = 0
    """Tokens generated after the input. 0: one plain forward, which keeps the logits of all tokens."""
    kv_dtype: torch.dtype | str | None = None
    """Element type of the KV cache. None: what the model itself caches."""
    use_cache: bool | None = None
    """Whether forwards keep a KV cache. None: where the model can generate."""
    margin_bytes: int = 64 * 2**20
    """Bytes left free on each execution device, for the allocator's fragmentation and libraries' workspaces."""

    def __post_init__(self) -> None:
        least = {"batch_size": 1, "num_tokens": min(self.new_tokens, 1), "new_tokens": 0, "margin_bytes": 0}
        for name, minimum in least.items():
            if getattr(self, name) < minimum:
                raise PlanError(
                    refusal(
                        f"Workload.{name}",
                        found=str(getattr(self, name)),
                        expected=f"at least {minimum}",
                        way_out="describe the largest call that the plan must leave room for",
                    )
                )
        if self.kv_dtype is None:
            return
        try:
            object.__setattr__(self, "kv_dtype", parse_dtype(self.kv_dtype))
        except ValueError as error:
            raise PlanError(
                refusal(
                    "Workload.kv_dtype",
                    found=repr(self.kv_dtype),
                    expected="a torch.dtype or its name, like 'float8_e4m3fn'",
                    way_out="leave it out to count what the model itself caches",
                )
            ) from error


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryTerms:
    """Hold the bytes that a workload needs beside the weights; no byte stands in two terms."""

    kv_cache: Mapping[str, int]
    """Module name → bytes of cache that it owns at its largest: a decoder layer or a module inside one."""
    logits: int
    """Bytes of the final scores, with generation's float32 copy where tokens are generated."""
    activations: int
    """Peak bytes of live tensors in a forward that are neither weights nor in another term."""
    source: Mapping[str, str]
    """Term → how it was determined: ``traced``, or ``configuration`` and why it could not be traced."""
