"""Say what more memory would change, exact to the byte, and how much is missing where nothing works.

Knows problems in integers, and names for the message only. Pure functions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lading.errors import name_list, refusal
from lading.placement.blocks import Block
from lading.placement.budget import Budget, Device
from lading.placement.minimum import least
from lading.placement.optimum import Problem, cover
from lading.units import format_bytes

_FEW = 0.05
"""Bytes are few up to this share of the model."""


def few_missing_for_all(problem: Problem) -> tuple[int, int] | None:
    """Find the accelerator on which the fewest bytes more would keep everything resident, and how many these are.

    None where it takes more than a few on any one of them.
    """
    totals, capacities = problem.totals, problem.capacities
    few = int(_FEW * sum(totals))
    if sum(capacities) + few < sum(totals):
        return None
    found = []
    for index, capacity in enumerate(capacities):

        def fits(more: int, at: int = index, now: int = capacity) -> bool:
            raised = [*capacities[:at], now + more, *capacities[at + 1 :]]
            return cover(totals, raised, in_listed_order=problem.in_listed_order) is not None

        if fits(few):
            found.append((least(fits, 0, few), index))
    if not found:
        return None
    more, index = min(found)
    return index, more


def got_nothing(device: Device, need: int, size: int) -> str:
    """Say how large an accelerator without a block would have to be to hold one."""
    return (
        f"device {device!r} got nothing: with {need:,} bytes ({format_bytes(need)}) it would hold a block, "
        f"it has {size:,}"
    )


def would_fit(what: str, more: int, device: Device) -> str:
    """Say how few bytes would keep everything resident."""
    return f"{what}: with {more:,} bytes ({format_bytes(more)}) more on device {device!r} every block would be resident"


def no_room(blocks: Sequence[Block], budget: Budget, missing: Mapping[Device, int]) -> str:
    """Say that a model cannot be placed, and for each device how many bytes more there would do.

    Args:
        blocks: to name the largest.
        budget: what there is.
        missing: bytes that are missing on a device, each on its own; devices on which nothing would help left out.
    """
    total = sum(block.total_bytes for block in blocks)
    largest = sorted(blocks, key=lambda block: -block.total_bytes)[:3]
    ways = [f"{more:,} bytes ({format_bytes(more)}) more on {device!r}" for device, more in missing.items()]
    return refusal(
        f"a model of {total:,} bytes ({format_bytes(total)})",
        found=f"room for {budget.describe()}",
        expected="room for one resident block and the largest streamed one where the model runs, and for all others "
        f"behind it: {' or '.join(ways) or 'no device could hold it alone'}",
        way_out="raise max_memory, name 'cpu' in it, load in a narrower dtype, or allow large blocks to be split (the "
        f"largest: {name_list(block.name for block in largest)})",
    )
