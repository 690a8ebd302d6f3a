"""Make a plan: choose where the model runs, place every block, check the result again, and say why.

The accelerators run the model if they can keep at least one block and fetch the others; else the CPU does, with the
disk behind it. What the accelerators do not keep fills host memory, then the disk.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from lading.errors import PlanError, name_list, refusal
from lading.placement import packing
from lading.placement.blocks import Block
from lading.placement.budget import Budget, Device
from lading.placement.minimum import least, least_for_all, least_useful
from lading.placement.optimum import Problem, Solution, cover, keep_most
from lading.placement.plan import DeviceUse, Placement, Plan
from lading.placement.prediction import Speeds, predict
from lading.units import format_bytes

STRATEGIES = ("contiguous", "any", "balanced", "sequential")
RUNTIMES = ("lading", "accelerate")
_WORTH_A_WARNING = 0.05
"""Tell what would avoid all streaming when it is no more than this share of the model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What to plan. Immutable."""

    blocks: tuple[Block, ...]
    budget: Budget
    strategy: str = "contiguous"
    runtime: str = "lading"
    offload_buffers: bool = False
    """Whether buffers are streamed with the weights (accelerate can)."""
    extra_bytes: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """Term, then block name: bytes that a block's execution device holds besides the model, such as its KV cache."""
    overhead: Mapping[str, int] = field(default_factory=dict)
    """Term: bytes that each execution device keeps free, such as activations."""
    speeds: Speeds | None = None
    """What the hardware can do; then the least time is the aim, and what costs none to fetch is worth nothing."""
    notes: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, value, known in (("strategy", self.strategy, STRATEGIES), ("runtime", self.runtime, RUNTIMES)):
            if value not in known:
                raise PlanError(refusal(name, found=repr(value), expected=f"one of {known}", way_out="choose one"))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Stage:
    """Where a model could run: the devices that may keep blocks, and the tiers behind them."""

    devices: tuple[Device, ...]
    host_bytes: int
    """What streamed blocks may take of host memory; 0 where the CPU runs the model itself."""
    disk_bytes: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Answer:
    """A placement found, before it is written out."""

    stage: _Stage
    problem: Problem
    homes: tuple[int | None, ...]
    main: int
    in_host: tuple[bool, ...]
    """For each block, whether its home is host memory if it is streamed."""
    solver_bound: int | None = None


def make_plan(request: Request) -> Plan:
    """Place every block of a model.

    Raises:
        PlanError: it cannot be done within the budget: the message says how many bytes are missing where.
    """
    return _Planner(request).plan()


class _Planner:
    """Carry one request through the stages. One thread."""

    def __init__(self, request: Request) -> None:
        self._request = request
        self._budget = request.budget
        self._blocks = request.blocks
        self._overhead = sum(request.overhead.values())
        streams_buffers = request.offload_buffers
        extra = [sum(term.get(block.name, 0) for term in request.extra_bytes.values()) for block in self._blocks]
        self._weights = [block.weight_bytes + (block.buffer_bytes if streams_buffers else 0) for block in self._blocks]
        self._fixed = [
            block.total_bytes - weight + more
            for block, weight, more in zip(self._blocks, self._weights, extra, strict=True)
        ]
        self._at_home = [
            block.weight_bytes + block.buffer_bytes + (block.pinned_bytes if block.weight_bytes else 0)
            for block in self._blocks
        ]

    def plan(self) -> Plan:
        """Try the accelerators, then the CPU."""
        budget = self._budget
        accelerators = _Stage(
            devices=tuple(budget.accelerators), host_bytes=budget.host_bytes, disk_bytes=budget.disk_bytes
        )
        cpu = _Stage(devices=("cpu",), host_bytes=0, disk_bytes=budget.disk_bytes)
        for stage in (accelerators, cpu):
            answer = self._solve(stage) if stage.devices else None
            if answer is not None:
                return self._write(answer)
        raise PlanError(self._what_is_missing())

    def _problem(self, stage: _Stage, num_copies: int) -> Problem:
        request = self._request
        is_lading = request.runtime == "lading"
        rooms = [
            0 if is_lading and block.is_lookup else weight
            for block, weight in zip(self._blocks, self._weights, strict=True)
        ]
        budgets = {**self._budget.accelerators, "cpu": self._budget.host_bytes}
        return Problem(
            weights=self._weights,
            fixed=self._fixed,
            rooms=rooms,
            values=self._weights if request.speeds is None else rooms,
            capacities=[budgets[device] - self._overhead for device in stage.devices],
            num_copies=num_copies,
            in_listed_order=request.strategy == "sequential",
        )

    def _solve(self, stage: _Stage) -> _Answer | None:
        """Place everything resident, else the most, else nothing: None."""
        problem = self._problem(stage, 1)
        capacities = problem.capacities
        if self._request.strategy == "balanced" and len(capacities) > 1:
            capacities = _leveled(problem)
        resident = cover(problem.totals, capacities, in_listed_order=problem.in_listed_order)
        if resident is not None:
            return self._answer(
                stage, problem, Solution(homes=tuple(resident), main=resident[0] if resident else 0, value=0)
            )
        # two copies let one block be fetched while another runs; one, if nothing else will do
        for num_copies in (2, 1) if self._request.runtime == "lading" else (1,):
            problem = self._problem(stage, num_copies)
            if self._request.strategy == "any":
                answer = self._solve_any(stage, problem)
            else:
                answer = self._answer(stage, problem, keep_most(problem))
            if answer is not None:
                return answer
        return None

    def _solve_any(self, stage: _Stage, problem: Problem) -> _Answer | None:
        from lading.placement.anywhere import keep_most_anywhere

        found = keep_most_anywhere(problem, start=keep_most(problem))
        if found is None:
            return None
        answer = self._answer(stage, problem, found[0])
        return None if answer is None else dataclasses.replace(answer, solver_bound=found[1])

    def _answer(self, stage: _Stage, problem: Problem, solution: Solution | None) -> _Answer | None:
        """Give what is streamed a home in host memory or on disk; None where these are too small."""
        if solution is None:
            return None
        streamed = [
            size if home is None and weight else 0
            for size, home, weight in zip(self._at_home, solution.homes, self._weights, strict=True)
        ]
        least_in_host = 0 if stage.disk_bytes is None else max(0, sum(streamed) - stage.disk_bytes)
        in_host = packing.choose(streamed, stage.host_bytes, least_in_host)
        if in_host is None:
            return None
        return _Answer(stage=stage, problem=problem, homes=solution.homes, main=solution.main, in_host=tuple(in_host))

    def _write(self, answer: _Answer) -> Plan:
        request, stage, blocks = self._request, answer.stage, self._blocks
        devices = stage.devices
        main = devices[answer.main]
        runs_on = [main if home is None else devices[home] for home in answer.homes]
        rests_on: list[Device] = [
            device if home is not None or not weight else ("cpu" if in_host else "disk")
            for home, device, weight, in_host in zip(answer.homes, runs_on, self._weights, answer.in_host, strict=True)
        ]
        uses = self._uses(answer, runs_on, rests_on)
        free = {use.device: use.free_bytes for use in uses}
        placements = tuple(
            Placement(
                name=block.name,
                keys=block.keys,
                class_name=block.class_name,
                home=home,
                execution_device=device,
                num_bytes=block.total_bytes,
                reason=self._reason(block, home, device, free),
                is_lookup=block.is_lookup and home != device and request.runtime == "lading",
            )
            for block, home, device in zip(blocks, rests_on, runs_on, strict=True)
        )
        total = sum(block.total_bytes for block in blocks)
        away = sum(
            weight for weight, home, device in zip(self._weights, rests_on, runs_on, strict=True) if home != device
        )
        notes = dict(request.notes)
        if away and request.runtime == "lading" and answer.problem.num_copies == 1:
            notes["fetching"] = "there is room for one block at a time: nothing is fetched ahead"
        return Plan(
            placements=placements,
            main_device=main,
            devices=uses,
            runtime=request.runtime,
            strategy=request.strategy,
            total_bytes=total,
            resident_bytes=total - away,
            predicted=predict(placements, request.speeds) if request.speeds is not None else {},
            notes=notes,
            warnings=tuple(self._warnings(answer, uses, away)),
            problem=answer.problem,
            overhead_bytes=self._overhead,
            solver_bound=answer.solver_bound,
        )

    def _uses(self, answer: _Answer, runs_on: Sequence[Device], rests_on: Sequence[Device]) -> tuple[DeviceUse, ...]:
        """Add up every device again, from the placements alone, and check the sums against the budget."""
        budgets: dict[Device, int | None] = {
            **self._budget.accelerators,
            "cpu": self._budget.host_bytes,
            "disk": self._budget.disk_bytes,
        }
        used = dict.fromkeys(budgets, 0)
        reserved: dict[Device, dict[str, int]] = {device: {} for device in budgets}
        largest = 0
        for block, weight, room, device, home in zip(
            self._blocks, self._weights, answer.problem.rooms, runs_on, rests_on, strict=True
        ):
            if home == device:
                used[home] += block.total_bytes
            else:
                used[home] += weight
                largest = max(largest, room)
                _add(reserved[device], "buffers of streamed blocks", block.total_bytes - weight)
            for term, sizes in self._request.extra_bytes.items():
                _add(reserved[device], term, sizes.get(block.name, 0))
        main = answer.stage.devices[answer.main]
        _add(reserved[main], "fetched blocks", answer.problem.num_copies * largest)
        for device in set(runs_on) | {main}:
            for term, size in self._request.overhead.items():
                _add(reserved[device], term, size)
        uses = [
            DeviceUse(device=device, budget_bytes=budget, used_bytes=used[device], reserved=reserved[device])
            for device, budget in budgets.items()
            if used[device] or budget
        ]
        assert all(use.free_bytes is None or use.free_bytes >= 0 for use in uses), "a plan breaks its own budget"
        return tuple(uses)

    def _reason(self, block: Block, home: Device, device: Device, free: Mapping[Device, int | None]) -> str:
        if home == device:
            return "resident" if block.weight_bytes or block.buffer_bytes else "rests where the model runs"
        if block.is_lookup and self._request.runtime == "lading":
            return f"rows are gathered from {home}; the table is not fetched"
        beside = f"on {device} {format_bytes(free[device] or 0)} are left"
        if home == "disk" and self._budget.host_bytes:
            beside += f", on cpu {format_bytes(free.get('cpu') or 0)}" if device != "cpu" else ""
        return f"streamed: beside the room for fetching, {beside}"

    def _warnings(self, answer: _Answer, uses: Sequence[DeviceUse], away: int) -> list[str]:
        """Say what a little more memory would change; nothing while everything is resident."""
        accelerators = self._budget.accelerators
        if not accelerators or (not away and answer.stage.devices[0] in accelerators):
            return []
        written = []
        holds = {use.device: use.used_bytes for use in uses}
        for index, device in enumerate(accelerators):
            if not holds.get(device):
                need = self._least_to_be_used(index, answer)
                written.append(
                    f"device {device!r} got nothing: with {need:,} bytes ({format_bytes(need)}) it would hold a block, "
                    f"it has {accelerators[device]:,}"
                )
        missing = self._missing_for_all()
        if missing is not None:
            device, more = missing
            written.append(
                f"{format_bytes(away)} are streamed or run on the CPU: with {more:,} bytes ({format_bytes(more)}) more "
                f"on device {device!r} every block would be resident"
            )
        return written

    def _least_to_be_used(self, index: int, answer: _Answer) -> int:
        """Find the least budget with which an accelerator that got nothing would hold a block."""
        capacities = [size - self._overhead for size in self._budget.accelerators.values()]
        others = [*capacities[:index], *capacities[index + 1 :]]
        stage = _Stage(devices=tuple(self._budget.accelerators), host_bytes=0, disk_bytes=None)
        problem = self._problem(stage, 1 if answer.stage.devices == ("cpu",) else answer.problem.num_copies)

        def value(of: list[int]) -> int:
            if of and cover(problem.totals, of, in_listed_order=problem.in_listed_order) is not None:
                return sum(problem.weights) + 1
            best = keep_most(dataclasses.replace(problem, capacities=of)) if of else None
            return -1 if best is None else best.value

        without = value(others)
        high = sum(problem.totals) + problem.num_copies * max(problem.rooms)
        found = least(
            lambda size: value([*capacities[:index], size, *capacities[index + 1 :]]) > without, capacities[index], high
        )
        return found + self._overhead

    def _missing_for_all(self) -> tuple[Device, int] | None:
        """Find the accelerator on which the fewest bytes more would keep everything, if these are few."""
        problem = self._problem(_Stage(devices=tuple(self._budget.accelerators), host_bytes=0, disk_bytes=None), 1)
        totals, capacities = problem.totals, list(problem.capacities)
        few = int(_WORTH_A_WARNING * sum(totals))
        best: tuple[Device, int] | None = None
        for index, device in enumerate(self._budget.accelerators):

            def fits(more: int, at: int = index) -> bool:
                raised = [*capacities[:at], capacities[at] + more, *capacities[at + 1 :]]
                return cover(totals, raised, in_listed_order=problem.in_listed_order) is not None

            if sum(capacities) + few >= sum(totals) and fits(few):
                more = least(fits, 0, few)
                best = (device, more) if best is None or more < best[1] else best
        return best

    def _what_is_missing(self) -> str:
        """Say for each way in which the model could run how many bytes are missing."""
        total = sum(block.total_bytes for block in self._blocks)
        budget, ways = self._budget, []
        problem = self._problem(_Stage(devices=("cpu",), host_bytes=0, disk_bytes=None), 1)
        useful = least_useful(problem) + self._overhead
        alone = least_for_all(problem.totals, 1) + self._overhead
        for device, size in {**budget.accelerators, "cpu": budget.host_bytes}.items():
            if size < useful:
                ways.append(
                    f"device {device!r} lacks {useful - size:,} bytes to stream the model through it "
                    f"({useful:,} needed), {alone - size:,} to hold it"
                )
        room = sum(budget.accelerators.values()) + budget.host_bytes
        if budget.disk_bytes is not None:
            short = total - room - budget.disk_bytes
            ways.append(
                f"the disk lacks {short:,} bytes for what no other device holds"
                if short > 0
                else f"the blocks do not fit into what is left of host memory and disk ({budget.disk_bytes:,} bytes)"
            )
        largest = sorted(self._blocks, key=lambda block: -block.total_bytes)[:3]
        return refusal(
            f"a model of {total:,} bytes ({format_bytes(total)})",
            found=f"room for {budget.describe()}; {'; '.join(ways)}",
            expected="room for one resident block and the largest streamed one where the model runs, and for the rest",
            way_out="raise max_memory, name 'cpu' or 'disk' in it, load in a narrower dtype, or allow large blocks to "
            f"be split (the largest: {name_list(block.name for block in largest)})",
        )


def _leveled(problem: Problem) -> list[int]:
    """Lower the budgets as far as they still hold everything; as they are, if they never do."""
    totals, capacities = problem.totals, list(problem.capacities)

    def clipped(level: int) -> list[int]:
        return [min(level, capacity) for capacity in capacities]

    if cover(totals, capacities) is None:
        return capacities
    low = max(max(totals, default=0), -(-sum(totals) // len(capacities)))
    return clipped(least(lambda level: cover(totals, clipped(level)) is not None, low, max(*capacities, low)))


def _add(terms: dict[str, int], term: str, size: int) -> None:
    if size:
        terms[term] = terms.get(term, 0) + size
