"""Hold what was measured against what was aimed at.

Knows the names of cases and contenders and the shape of a case's record, and measures nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

_MiB = 2**20


def judge(records: Mapping[str, Any]) -> list[dict[str, Any]]:
    """List the aims: case, what was aimed at, limit, value found, and whether it is met (None: not measured)."""
    found: list[dict[str, Any]] = []
    for name, record in records.items():
        if record["is_converted"]:
            continue
        for aim, limit, value in _aims_of(name, record["modes"]):
            is_met = None if value is None else value <= limit
            found.append({"case": name, "aim": aim, "limit": limit, "value": value, "is_met": is_met})
    return found


def _aims_of(case: str, modes: Mapping[str, Any]) -> Iterator[tuple[str, float, float | None]]:
    def median(mode: str, key: str, quantity: str) -> float | None:
        value: float | None = modes.get(mode, {}).get(key, {}).get(quantity, {}).get("median")
        return value

    def ratio(mode: str, key: str, peer: str, quantity: str) -> float | None:
        ours, theirs = median(mode, key, quantity), median(mode, peer, quantity)
        return None if ours is None or not theirs else ours / theirs

    yield "warm load / transformers 5", 0.3, ratio("warm", "lading", "transformers-5", "load_s")
    yield "warm load / transformers 4", 0.6, ratio("warm", "lading", "transformers-4", "load_s")
    yield "warm load / floor", 1.3, ratio("warm", "lading", "assign", "load_s")
    ours, floor = median("warm", "lading", "peak_bytes"), median("warm", "assign", "peak_bytes")
    added = None if ours is None or floor is None else (ours - floor) / _MiB
    yield "peak memory of a warm load above the floor's, MiB", 4, added
    if case == "many":
        yield "warm load of 5,000 tensors, s", 0.1, median("warm", "lading", "load_s")
        return
    yield "cold load call, s", 0.04, median("cold", "lading", "load_s")
    cold = ratio("cold", "lading-readahead", "transformers-5", "load_and_first_s")
    yield "cold load with readahead and first forward / transformers 5", 0.8, cold
