"""Hold a finished plan: where each block rests and why, what each device holds, and how good that is.

Everything here is a record or reads one; who decides is `planner`. A plan holds no tensor and can be pickled.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

from lading.placement.bound import most_resident_bytes
from lading.placement.budget import Device
from lading.placement.minimum import least_for_all, least_useful
from lading.placement.optimum import Problem
from lading.units import format_bytes


class PlanWarning(UserWarning):
    """A plan is right, but memory that was offered is of no use, or a little more of it would help much."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """The home of one block. Immutable."""

    name: str
    """The first of ``keys``."""
    keys: tuple[str, ...]
    """The module and tensor names that it stands for in a device map; several where tensors are tied."""
    class_name: str
    home: Device
    """Where its weights rest between forwards."""
    execution_device: Device
    """Where its forward runs."""
    num_bytes: int
    reason: str
    """Why it rests there."""
    is_lookup: bool
    """Its rows are gathered at its home; the table is never fetched."""

    @property
    def is_streamed(self) -> bool:
        """Say whether its weights leave the execution device between forwards."""
        return self.home != self.execution_device


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceUse:
    """What a plan asks of one device, in bytes. Immutable."""

    device: Device
    budget_bytes: int | None
    """None: no limit."""
    used_bytes: int
    """What rests here."""
    reserved: Mapping[str, int]
    """What is kept free, and for what: fetching, buffers of streamed blocks, KV cache, logits, activations, margin."""

    @property
    def reserved_bytes(self) -> int:
        """Add up what is kept free."""
        return sum(self.reserved.values())

    @property
    def free_bytes(self) -> int | None:
        """Give what is neither used nor kept free; None without a limit."""
        return None if self.budget_bytes is None else self.budget_bytes - self.used_bytes - self.reserved_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class MinimumMemory:
    """The least budgets that work, exact to the byte, everything reserved included. Immutable."""

    all_resident: Mapping[int, int]
    """For a number of equal devices, the budget of each with which runs of neighbours hold all blocks."""
    useful: int
    """The budget of a single device with which it keeps a block and can stream the rest."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Say where each block of a model rests. Made by `lading.plan`. Immutable; any thread.

    Example:
        >>> import lading, torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 8))
        >>> plan = lading.plan(net, max_memory={0: 100, 1: 200})
        >>> plan.device_map, plan.gap
        ({'0': 0, '1': 1}, 0.0)
    """

    placements: tuple[Placement, ...]
    """Every block, in execution order."""
    main_device: Device
    """Where streamed blocks run, and the model's own tensors rest."""
    devices: tuple[DeviceUse, ...]
    runtime: str
    strategy: str
    total_bytes: int
    resident_bytes: int
    """Weights and buffers that rest where they are used."""
    predicted: Mapping[str, float] = field(default_factory=dict)
    """Seconds of one forward for each term that could limit it; empty where bandwidths are not known."""
    notes: Mapping[str, str] = field(default_factory=dict)
    """How the terms beyond weights were determined."""
    warnings: tuple[str, ...] = ()
    problem: Problem = field(repr=False, compare=False)
    """What was solved, in integers."""
    overhead_bytes: int = field(default=0, repr=False)
    """What each execution device keeps free whatever it holds."""
    solver_bound: int | None = field(default=None, repr=False)
    """A bound on resident weights that a solver proved."""

    @cached_property
    def device_map(self) -> dict[str, Device]:
        """Give module names to devices, as accelerate's ``dispatch_model`` and ``from_pretrained`` take it.

        A module all of whose blocks share a home stands for them. Accelerate streams through the accelerator with the
        lowest number that is used: a plan for ``runtime="accelerate"`` keeps its room there.
        """
        return dict(_collapse({key: placement.home for placement in self.placements for key in placement.keys}))

    @cached_property
    def bound(self) -> int:
        """Bound the bytes that any placement at all could keep resident; see `lading.placement.bound`."""
        fixed = self.total_bytes - sum(self.problem.weights)
        proven = most_resident_bytes(self.problem)
        return fixed + min(proven, proven if self.solver_bound is None else self.solver_bound)

    @property
    def gap(self) -> float:
        """Give the share of the bound that this plan does not reach: 0.0 means that nothing better exists."""
        return 1 - self.resident_bytes / self.bound if self.bound else 0.0

    @property
    def fetch_bytes(self) -> int:
        """Give what the main device has for fetched blocks: what is kept for them, and what is left."""
        (use,) = (use for use in self.devices if use.device == self.main_device)
        return (use.free_bytes or 0) + use.reserved.get("fetched blocks", 0)

    @property
    def predicted_s(self) -> float | None:
        """Predict the seconds of one forward; None where bandwidths are not known.

        Lading fetches while it computes, so the largest term counts; accelerate does one after the other.
        """
        if not self.predicted:
            return None
        return (max if self.runtime == "lading" else sum)(self.predicted.values())

    @property
    def binding_term(self) -> str | None:
        """Name the term that the prediction depends on most."""
        return max(self.predicted, key=lambda term: self.predicted[term]) if self.predicted else None

    @cached_property
    def minimum(self) -> MinimumMemory:
        """Give the least budgets that work for this model and workload."""
        problem = replace(self.problem, num_copies=1)  # a fact about the model, not about the room it was given
        devices = {1, 2, 4, 8, max(1, len(self.problem.capacities))}
        return MinimumMemory(
            all_resident={k: least_for_all(problem, k) + self.overhead_bytes for k in sorted(devices)},
            useful=least_useful(problem) + self.overhead_bytes,
        )

    def explain(self) -> dict[str, Any]:
        """Give everything as plain data: strings, numbers, lists and dicts."""
        return {
            "device_map": dict(self.device_map),
            "main_device": self.main_device,
            "runtime": self.runtime,
            "strategy": self.strategy,
            "total_bytes": self.total_bytes,
            "resident_bytes": self.resident_bytes,
            "bound_bytes": self.bound,
            "gap": self.gap,
            "predicted_s": self.predicted_s,
            "binding_term": self.binding_term,
            "predicted": dict(self.predicted),
            "minimum": {
                "all_resident": {str(k): least for k, least in self.minimum.all_resident.items()},
                "useful": self.minimum.useful,
            },
            "devices": [
                {
                    "device": use.device,
                    "budget_bytes": use.budget_bytes,
                    "used_bytes": use.used_bytes,
                    "reserved": dict(use.reserved),
                    "free_bytes": use.free_bytes,
                }
                for use in self.devices
            ],
            "placements": [
                {
                    "block": placement.name,
                    "keys": list(placement.keys),
                    "class": placement.class_name,
                    "home": placement.home,
                    "execution_device": placement.execution_device,
                    "bytes": placement.num_bytes,
                    "is_lookup": placement.is_lookup,
                    "reason": placement.reason,
                }
                for placement in self.placements
            ],
            "notes": dict(self.notes),
            "warnings": list(self.warnings),
        }

    def to_json(self) -> str:
        """Write `explain` as JSON."""
        return json.dumps(self.explain(), indent=2)

    def stretches(self) -> Iterator[tuple[str, int, Placement, int]]:
        """Yield neighbours that share home and reason: their names, how many, the first of them, their bytes."""
        for _, group in groupby(self.placements, key=lambda each: (each.home, each.reason)):
            members = list(group)
            names = members[0].name or "(the whole model)"
            if len(members) > 1:
                names = f"{names} … {members[-1].name}"
            yield names, len(members), members[0], sum(member.num_bytes for member in members)

    def __str__(self) -> str:
        """Write a table for a person."""
        rows = [("blocks", "number", "home", "bytes", "why")]
        rows += [
            (names, str(count), str(first.home), format_bytes(size), first.reason)
            for names, count, first, size in self.stretches()
        ]
        uses = [("device", "budget", "used", "reserved", "free")]
        uses += [
            (
                str(use.device),
                "no limit" if use.budget_bytes is None else format_bytes(use.budget_bytes),
                format_bytes(use.used_bytes),
                " + ".join(f"{format_bytes(size)} {term}" for term, size in use.reserved.items() if size) or "0 B",
                "" if use.free_bytes is None else format_bytes(use.free_bytes),
            )
            for use in self.devices
        ]
        share = self.resident_bytes / self.total_bytes if self.total_bytes else 1.0
        proof = f"no placement keeps more than {format_bytes(self.bound)}, {self.gap:.1%} beyond this one"
        summary = (
            f"{format_bytes(self.resident_bytes)} of {format_bytes(self.total_bytes)} ({share:.1%}) rest where they "
            "run; "
            f"{'no placement keeps more' if self.gap <= 0 else proof}."
        )
        if any(placement.is_streamed for placement in self.placements):
            summary += f" Streamed blocks run on {self.main_device}."
        lines = [_table(rows), "", _table(uses), "", summary]
        if self.predicted_s is not None:
            terms = ", ".join(f"{term} {seconds:.3g} s" for term, seconds in self.predicted.items())
            lines.append(f"One forward: {self.predicted_s:.3g} s, bound by {self.binding_term} ({terms}).")
        lines += [f"{term}: {source}" for term, source in self.notes.items()]
        lines += [f"Warning: {warning}" for warning in self.warnings]
        return "\n".join(lines)

    def plot(self, path: str | Path) -> None:
        """Draw the plan to an ``.svg`` or ``.png`` file: devices as bars, blocks in execution order.

        Raises:
            MissingExtraError: matplotlib is missing: ``pip install 'lading[plot]'``.
            PlanError: the file's name ends otherwise.
        """
        from lading.placement.picture import Bar, Segment, draw

        bars = []
        for use in self.devices:
            segments = tuple(
                Segment(label=each.name, size_bytes=each.num_bytes, kind=each.class_name)
                for each in self.placements
                if each.home == use.device
            )
            bars.append(
                Bar(
                    label=str(use.device),
                    budget_bytes=use.budget_bytes,
                    segments=segments,
                    reserved_bytes=use.reserved_bytes,
                )
            )
        notes = tuple(
            f"{names} on {first.home}: {first.reason}" for names, _, first, _ in self.stretches() if first.is_streamed
        )
        share = self.resident_bytes / max(1, self.total_bytes)
        draw(
            Path(path), bars=tuple(bars), notes=notes, title=f"{share:.1%} of {format_bytes(self.total_bytes)} resident"
        )


def _table(rows: Sequence[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def _collapse(full: Mapping[str, Device]) -> Iterator[tuple[str, Device]]:
    """Name a module in place of everything below it where that shares one home; keep the order."""
    homes: dict[str, set[Device]] = {}
    for key, home in full.items():
        path = key
        while path:
            path = path.rpartition(".")[0]
            homes.setdefault(path, set()).add(home)
        homes.setdefault(key, set()).add(home)
    done: set[str] = set()
    for key, home in full.items():
        parts = key.split(".") if key else []
        for depth in range(len(parts) + 1):
            path = ".".join(parts[:depth])
            if len(homes[path]) == 1:
                if path not in done:
                    done.add(path)
                    yield path, home
                break
