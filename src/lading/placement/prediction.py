"""Predict what one forward costs under a plan, and which part of the machine it waits for. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lading.placement.hardware import Bandwidths

if TYPE_CHECKING:
    from lading.placement.plan import Placement


@dataclass(frozen=True, slots=True, kw_only=True)
class Speeds:
    """What a forward meets: the machine's rates, and how much there is to compute. Immutable."""

    bandwidths: Bandwidths
    num_tokens: int
    """Tokens of one forward, over the whole batch."""
    element_bytes: int
    """Bytes of one weight, to count multiplications."""


def predict(placements: Sequence[Placement], speeds: Speeds) -> dict[str, float]:
    """Give the seconds of each term whose rate is known: reading the disk, copying, reading all weights, computing."""
    rates = speeds.bandwidths
    fetched = [each for each in placements if each.is_streamed and not each.is_lookup]
    from_disk = sum(each.num_bytes for each in fetched if each.home == "disk")
    to_device = sum(each.num_bytes for each in fetched if each.execution_device != "cpu")
    multiplied = sum(each.num_bytes for each in placements if each.class_name != "Embedding")
    num_operations = 2 * multiplied // speeds.element_bytes * speeds.num_tokens
    terms = {
        "reading the disk": (from_disk, rates.disk_to_host_bytes_per_s),
        "copying to the device": (to_device, rates.host_to_device_bytes_per_s),
        "reading device memory": (multiplied, rates.device_memory_bytes_per_s),
        "computing": (num_operations, rates.flops_per_s),
    }
    return {term: amount / rate for term, (amount, rate) in terms.items() if rate is not None}
