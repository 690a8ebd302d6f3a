"""Begin, watch and end the streaming of one model's blocks: the lifetime of hooks, worker and files.

`lading.offload` is the public door. While a residency is open, the model's streamed blocks are on their execution
device exactly while their forward runs; the model itself stays the same object with the same parameters.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from torch import nn

from lading.errors import ResidencyError, name_list, refusal
from lading.placement.plan import Plan
from lading.residency.convoy import Convoy
from lading.residency.crew import Crew, Crossings
from lading.residency.device_map import show_device_map
from lading.residency.hooks import hooks_of
from lading.residency.on_cpu import OnCpu
from lading.residency.on_device import OnDevice
from lading.residency.refusals import inside_a_convoy, inside_a_forward
from lading.residency.settings import Settings
from lading.residency.stats import ResidencyStats
from lading.residency.width import Width


class Residency:
    """Keep a model's streamed blocks where they have to be. Made by `lading.offload`; a context manager.

    Any number of threads may call the model meanwhile. Weights may be read at any time; to write to them while another
    thread may be in a forward, use `editing`.

    Example:
        >>> with lading.offload(model, plan) as residency:   # doctest: +SKIP
        ...     model(**inputs)
        ...     print(residency.stats())
    """

    def __init__(self, model: nn.Module, plan: Plan, settings: Settings) -> None:
        refuse_offloaded(model)
        self.plan = plan
        is_on_cpu = {placement.execution_device for placement in plan.placements} <= {"cpu"}
        self._parts = OnCpu(model, plan, settings) if is_on_cpu else OnDevice(model, plan, settings)
        self._parts.hooks.owner = self
        self._is_open = True
        self._closing = threading.Lock()
        self._finalizer = weakref.finalize(model, self._parts.schedule.abandon)
        self._convoys: weakref.WeakSet[Convoy] = weakref.WeakSet()
        self._hide_device_map = show_device_map(model, plan.device_map)

    @staticmethod
    def of(model: nn.Module) -> Residency | None:
        """Give the open residency of a model; None where there is none."""
        hooks = hooks_of(model)
        return hooks.owner if hooks is not None and isinstance(hooks.owner, Residency) else None

    @contextmanager
    def editing(self) -> Iterator[None]:
        """Wait until no forward runs, and hold new ones back, while weights are edited.

        Raises:
            ResidencyError: called inside a forward of this model, or in the thread of a convoy under way: it would
                wait for itself.
        """
        self._refuse_inside("residency.editing()", "edit")
        with self._parts.schedule.editing():
            yield

    def _refuse_inside(self, what: str, verb: str) -> None:
        if self._parts.hooks.is_inside:
            raise inside_a_forward(what, verb)
        if self._parts.hooks.is_in_convoy:
            raise inside_a_convoy(what, verb)

    def stats(self) -> ResidencyStats:
        """Say what happened since the beginning: a snapshot."""
        return self._parts.stats()

    def close(self) -> None:
        """Wait for forwards that run, take the hooks off and leave the model as it was. Twice is fine."""
        if self._is_open:
            self._refuse_inside("residency.close()", "close")
        with self._closing:
            if self._is_open:
                self._parts.close()
                self._is_open = False
                self._finalizer.detach()
                for convoy in list(self._convoys):
                    convoy.dismiss()
        self._hide_device_map()

    def __enter__(self) -> Residency:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for convoy in list(self._convoys):
            if convoy.is_led_here:  # an error came between its outputs: nobody iterates any more
                convoy.close()
        self.close()

    def __repr__(self) -> str:
        state = "open" if self._is_open else "closed"
        return f"<Residency {state}: {self.stats()}>"


def refuse_offloaded(model: nn.Module) -> None:
    """Refuse a model with an open residency at any module: two would count and evict the same weights.

    Raises:
        ResidencyError: there is one.
    """
    hooked = [name or type(model).__name__ for name, module in model.named_modules() if hooks_of(module) is not None]
    if hooked:
        raise ResidencyError(
            refusal(
                type(model).__name__,
                found=f"an open residency at {name_list(hooked)}",
                expected="a model that is not offloaded",
                way_out="close it first: lading.Residency.of(model).close()",
            )
        )


def convoy_of(  # noqa: PLR0913 - what a convoy is made of
    model: nn.Module,
    batches: Iterable[Any],
    crossings: Crossings,
    width: int | None,
    *,
    is_one_call: bool,
    returns_errors: bool,
) -> Convoy:
    """Make the convoy of a model: with a crew where something in it streams.

    Raises:
        ResidencyError: several modules inside are offloaded, each for itself.
    """
    owners = {id(hooks.owner): hooks.owner for module in model.modules() if (hooks := hooks_of(module)) is not None}
    residencies = [owner for owner in owners.values() if isinstance(owner, Residency)]
    if len(residencies) > 1:
        raise ResidencyError(
            refusal(
                f"a convoy through {type(model).__name__}",
                found=f"{len(residencies)} residencies, of modules that were offloaded separately",
                expected="one: micro-batches that wait in one would hold room of the other",
                way_out="offload the whole model, or call it batch by batch",
            )
        )
    if not residencies:
        devices = sorted({weight.device for weight in model.parameters()}, key=str)
        return Convoy(None, batches, crossings, devices, returns_errors=returns_errors)
    parts = residencies[0]._parts
    supply = parts.supply()
    if not any(supply.sizes):
        return Convoy(None, batches, crossings, parts.devices, returns_errors=returns_errors)
    chosen = Width(width, supply, is_one_call=is_one_call)
    crew = Crew(parts.hooks, parts.schedule, crossings, parts.devices, chosen)
    convoy = Convoy(crew, batches, crossings, parts.devices, returns_errors=returns_errors)
    residencies[0]._convoys.add(convoy)
    return convoy
