"""Make a plan: choose where the model runs, place every block, check the result again, and say why.

The accelerators run the model if they can keep at least one block and fetch the others; else the CPU does, with the
disk behind it. What the accelerators do not keep fills host memory, then the disk.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from lading.errors import PlanError, refusal
from lading.placement import advice
from lading.placement.blocks import Block
from lading.placement.budget import Budget, Device
from lading.placement.feasible import can_keep_some, least_as_main
from lading.placement.homes import Homes, LeastRoom
from lading.placement.minimum import least, least_useful, leveled, likely_needs, likely_needs_before
from lading.placement.optimum import Problem, Solution, cover
from lading.placement.plan import DeviceUse, Placement, Plan
from lading.placement.prediction import Speeds, predict
from lading.placement.streaming import fill_main, keep_most
from lading.units import format_bytes

STRATEGIES = ("contiguous", "any", "balanced", "sequential")
RUNTIMES = ("lading", "accelerate")


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
    homes: Homes


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
            block.weight_bytes + block.buffer_bytes + (block.pinned_bytes if block.weight_bytes else 0) if weight else 0
            for block, weight in zip(self._blocks, self._weights, strict=True)
        ]

    def plan(self) -> Plan:
        """Try the accelerators, then the CPU."""
        answer = self._search()
        if answer is None:
            raise PlanError(advice.no_room(self._blocks, self._budget, self._missing()))
        return self._write(answer)

    def _search(self) -> _Answer | None:
        return next(filter(None, (self._solve(stage) for stage in self._stages() if stage.devices)), None)

    def _with(self, device: Device, size: int) -> _Planner:
        """Ask again as if one device had another budget."""
        contiguous = "contiguous" if self._request.strategy == "any" else self._request.strategy
        budget = self._budget.with_device(device, size)
        return _Planner(dataclasses.replace(self._request, budget=budget, strategy=contiguous))

    def _missing(self) -> dict[Device, int]:
        """Find for each device on which more would do how many bytes more it takes."""
        accelerators, cpu = self._stages()
        missing = {}
        for device, size in self._budget.sizes().items():
            needs: list[int | None] = []
            if device not in ("cpu", "disk"):
                needs.append(self._least_to_run(0, device))
            elif size is not None:
                needs.append(self._least_behind(accelerators, device))
                needs.append(self._least_to_run(1, device) if device == "cpu" else self._least_behind(cpu, device))
            known = [need for need in needs if need is not None]
            if known and size is not None:
                missing[device] = min(known) - size
        return missing

    def _least_behind(self, stage: _Stage, device: Device) -> int | None:
        """Find how large host memory or the disk must be for what one of the best placements streams; None for none."""
        if stage.homes.disk_bytes is None or not stage.devices:
            return None
        room = LeastRoom(stage.homes, of_disk=device == "disk")
        for num_copies in self._numbers_of_copies:
            keep_most(self._problem(stage, num_copies), room.refuse)
        return room.least

    def _least_to_run(self, index: int, device: Device, known: Collection[int | None] = ()) -> int | None:
        """Find the least budget of a device with which a stage runs the model; that of others may be it too."""
        high = sum(self._weights) + sum(self._fixed) + self._overhead
        if not self._blocks or not high:
            return None
        planner = self._with(device, high)
        stage = planner._stages()[index]
        problem, homes, at = planner._problem(stage, 1), stage.homes, stage.devices.index(device)
        if homes.most_bytes is None:
            alone = least_as_main(problem, at)
            high = high if alone is None else min(high, alone + self._overhead)
            likely = likely_needs(problem)
        else:
            likely = likely_needs_before(problem, homes.sizes, homes.most_bytes, at)

        def runs(size: int) -> bool:
            return self._with(device, size)._can_run(index)

        for need in known:
            if need is not None and need < high and runs(need):
                high = need
        if homes.most_bytes is None and not runs(high - 1):
            return high
        return least(runs, 1, high, sorted(need + self._overhead for need in likely))

    def _can_run(self, index: int) -> bool:
        """Say whether a stage can keep a block, and place all others."""
        stage = self._stages()[index]
        if stage.homes.disk_bytes is not None:
            return bool(stage.devices) and self._solve(stage) is not None
        problem = self._problem(stage, 1)
        return bool(self._blocks) and (can_keep_some(problem) or _covered(problem, problem.capacities) is not None)

    def _stages(self) -> tuple[_Stage, _Stage]:
        """Name the accelerators with host memory and the disk behind them, and the CPU with the disk behind it."""
        usable = [device for device, size in self._budget.accelerators.items() if size and size >= self._overhead]
        if self._request.runtime == "accelerate":  # it runs what is offloaded on the lowest number used
            usable.sort(key=lambda device: (isinstance(device, str), device))
        homes = Homes(
            sizes=self._at_home,
            are_fetched=[not block.is_lookup or self._request.runtime == "accelerate" for block in self._blocks],
            host_bytes=self._budget.host_bytes,
            disk_bytes=self._budget.disk_bytes,
        )
        cpu: tuple[Device, ...] = ("cpu",) if homes.host_bytes >= self._overhead else ()
        behind_cpu = dataclasses.replace(homes, host_bytes=0)
        return _Stage(devices=tuple(usable), homes=homes), _Stage(devices=cpu, homes=behind_cpu)

    def _problem(self, stage: _Stage, num_copies: int) -> Problem:
        request = self._request
        is_lading = request.runtime == "lading"
        rooms = [
            0
            if is_lading and block.is_lookup
            else weight - block.weight_bytes + (block.fetch_bytes or block.weight_bytes)
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
            main_is_first_used=not is_lading,  # which is what accelerate takes
        )

    def _solve(self, stage: _Stage) -> _Answer | None:
        """Place everything resident, else the most, else nothing: None."""
        problem = self._problem(stage, 1)
        capacities = problem.capacities
        if self._request.strategy == "balanced" and len(capacities) > 1:
            capacities = leveled(problem)
        resident = _covered(problem, capacities)
        if resident is not None:
            main = 0 if not resident else min(resident) if problem.main_is_first_used else resident[0]
            return self._answer(stage, problem, Solution(homes=tuple(resident), main=main, value=0))
        homes = stage.homes
        for num_copies in self._numbers_of_copies:
            problem = self._problem(stage, num_copies)
            accept = None if homes.disk_bytes is None else homes.suffice
            above = homes.least_kept(problem.weights) - 1 if problem.values is problem.weights else -1
            found = keep_most(problem, accept, above=above)
            filled = None if found is None else fill_main(problem, found)
            if self._request.strategy == "any":
                answer = self._solve_any(stage, problem, filled)
            else:
                answer = self._answer(stage, problem, filled) or self._answer(stage, problem, found)
            if answer is not None:
                return answer
        return None

    def _solve_any(self, stage: _Stage, problem: Problem, start: Solution | None) -> _Answer | None:
        from lading.placement.anywhere import keep_most_anywhere

        found = keep_most_anywhere(problem, start)
        if found is None:
            return None
        answer = self._answer(stage, problem, found[0]) or self._answer(stage, problem, start)
        return None if answer is None else dataclasses.replace(answer, solver_bound=found[1])

    def _answer(self, stage: _Stage, problem: Problem, solution: Solution | None) -> _Answer | None:
        """Give what is streamed a home in host memory or on disk; None where these are too small."""
        in_host = None if solution is None else stage.homes.pack(solution)
        if solution is None or in_host is None:
            return None
        return _Answer(stage=stage, problem=problem, homes=solution.homes, main=solution.main, in_host=tuple(in_host))

    @property
    def _numbers_of_copies(self) -> tuple[int, ...]:
        """Two copies let one block be fetched while another runs; one, if nothing else will do."""
        return (2, 1) if self._request.runtime == "lading" else (1,)

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
        """Add up every device again, from where blocks run and rest, and check the sums against the budget."""
        budgets = self._budget.sizes()
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
        on_cpu = answer.stage.devices == ("cpu",)
        stage = self._stages()[0]
        problem = self._problem(stage, 1)
        holds = {use.device: use.used_bytes for use in uses}
        needs: dict[Device, int | None] = {}
        is_ordered = self._request.runtime == "accelerate" or self._request.strategy == "sequential"
        written = []
        for device, size in accelerators.items():
            if holds.get(device):
                continue
            alike = device if is_ordered else f"any of {size} bytes"  # without an order, equal ones need the same
            if alike not in needs:
                needs[alike] = self._least_to_be_used(device, problem, on_cpu=on_cpu, known=needs.values())
            need = needs[alike]
            if need is not None:
                written.append(advice.got_nothing(device, need, size))
        few = advice.few_missing_for_all(problem)
        if few is not None:
            what = "the model runs on the CPU" if on_cpu else f"{format_bytes(away)} are streamed"
            written.append(advice.would_fit(what, few[1], stage.devices[few[0]]))
        return written

    def _least_to_be_used(
        self, device: Device, problem: Problem, *, on_cpu: bool, known: Collection[int | None]
    ) -> int | None:
        """Find the least budget with which an accelerator that got nothing would hold a block; None for none."""

        def is_used(size: int) -> bool:
            answer = self._with(device, size)._search()
            homes = () if answer is None else answer.homes
            return answer is not None and device in {answer.stage.devices[home] for home in homes if home is not None}

        if on_cpu and self._budget.disk_bytes is None:  # any plan with accelerators uses it: without it is none
            return self._least_to_run(0, device, known)
        size = self._budget.accelerators[device]
        high = max(size, least_useful(problem) + self._overhead)
        likely = {need + self._overhead for need in likely_needs(problem)} | {need for need in known if need}
        return least(is_used, size, high, sorted(likely)) if is_used(high) else None


def _covered(problem: Problem, capacities: Sequence[int]) -> list[int] | None:
    return cover(problem.totals, capacities, in_listed_order=problem.in_listed_order)


def _add(terms: dict[str, int], term: str, size: int) -> None:
    if size:
        terms[term] = terms.get(term, 0) + size
