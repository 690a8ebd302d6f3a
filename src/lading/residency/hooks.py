"""Tell the schedule which thread enters and leaves what: one hook before and one after each streamed block.

A *door* is a module through which calls come in: the model and every module above a streamed block. A thread's
outermost call through a door, or into a block directly, is its visit. Each thread has a stack of what it is inside of;
what follows a forward is matched with what preceded it by the module, so that a hook that torch did not call (it skips
them on KeyboardInterrupt) is made up for by the next one further out, by the next visit of the same thread, or by the
thread's end. An unmatched hook is ignored.

Concurrency: the stack is the thread's own; the schedule guards the rest.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, MutableMapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from lading import compat
from lading.compat import frame_of
from lading.residency.schedule import Schedule
from lading.residency.visits import Visit

_TORCH = os.path.dirname(os.path.abspath(torch.__file__))  # noqa: PTH100, PTH120 - compared with names in frames
_FORWARD_CODE = (os.path.join(_TORCH, "nn", "modules", ""), os.path.join(_TORCH, "_dynamo", ""))  # noqa: PTH118

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
Stay = AbstractContextManager[None]
"""What an escort entered before a forward and is left after it."""


class Escort(Protocol):
    """Do what a module's calls need besides a place in the schedule: move inputs and outputs, gather rows."""

    def arrive(self, visit: Visit, arguments: Arguments) -> tuple[Arguments | None, Stay | None]:
        """Give other arguments for the forward, or None; and what to leave after it, which was entered."""

    def depart(self, output: Any) -> Any:
        """Give another output, or None; the module is not left yet."""


class Companion(Protocol):
    """Stand for one micro-batch of a convoy, in whose thread the model is called."""

    @property
    def party(self) -> Visit:
        """Give the convoy's visit."""

    def set_out(self, visit: Visit) -> None:
        """Note that the model is called once more."""

    def wait_turn(self, visit: Visit, block: int) -> None:
        """Wait until the convoy opens a block for this micro-batch; raises where the convoy ends instead."""

    def note_wait(self, seconds: float) -> None:
        """Note how long weights were waited for."""


def is_in_a_forward(thread_id: int) -> bool:
    """Say whether a live thread is inside any module's call: whether code of torch's is that called something."""
    frame = frame_of(thread_id)
    while frame is not None:
        if frame.f_code.co_filename.startswith(_FORWARD_CODE):
            return True
        frame = frame.f_back
    return False


class _Caller:
    """What one thread is inside of; its end gives up what it still holds. One thread."""

    def __init__(self, schedule: Schedule) -> None:
        self._schedule = schedule
        self._thread_id = threading.get_ident()
        self.visit: Visit | None = None
        self.companion: Companion | None = None
        """Where the thread is one of a convoy's."""
        self.stack: list[tuple[nn.Module, int | None, Stay | None, Escort | None]] = []

    def unwind(self, depth: int, *, is_complete: bool = False) -> None:
        """Leave everything above a depth of the stack; at its bottom the visit ends."""
        while len(self.stack) > depth:
            _, block, stay, _ = self.stack.pop()
            if stay is not None:
                stay.__exit__(None, None, None)
            goes_on = depth or is_complete  # else the visit ends: what a block was entered from is not needed again
            if block is not None and self.visit is not None and goes_on:
                self._schedule.leave(self.visit, block)
        if not self.stack and self.visit is not None:
            self._schedule.end(self.visit, is_complete=is_complete)
            self.visit = None

    def __del__(self) -> None:
        if self._thread_id == threading.get_ident():  # else it is the child of a fork that clears away other threads
            self.unwind(0)


class Hooks:
    """Stand at the doors and blocks of one model. Any thread may call the model; `remove` when nobody is inside.

    Args:
        schedule: admits threads.
    """

    def __init__(self, schedule: Schedule) -> None:
        for hook in (Hooks.before, Hooks.after):
            compat.keep_from_compiling(hook)
        self._schedule = schedule
        self._callers = threading.local()
        self._handles: list[RemovableHandle] = []
        self._insides: dict[int, frozenset[int]] = {}
        schedule.is_inside = is_in_a_forward
        self.owner: object = None
        """Whoever must live as long as the hooks do."""

    def add_door(self, module: nn.Module, reachable: frozenset[int], escort: Escort | None = None) -> None:
        """Have a module open visits; ``reachable``: the blocks below it, which its first visit expects.

        Its escort comes along where the door is the outermost.
        """
        self._insides[id(module)] = frozenset(map(id, module.modules()))
        self._add(module, _Station(hooks=self, block=None, is_block=False, reachable=reachable, escort=escort))

    def add_block(self, module: nn.Module, block: int | None, escort: Escort | None = None) -> None:
        """Have a module enter and leave a block of the schedule, and be escorted; None for the escort alone."""
        reachable = frozenset(() if block is None else (block,))
        self._add(module, _Station(hooks=self, block=block, is_block=True, reachable=reachable, escort=escort))

    def _add(self, module: nn.Module, station: _Station) -> None:
        self._handles += [
            module.register_forward_pre_hook(_Before(station), prepend=True, with_kwargs=True),
            module.register_forward_hook(_After(station), always_call=True),
        ]

    def remove(self) -> None:
        """Take every hook off again."""
        while self._handles:
            self._handles.pop().remove()
        self._insides.clear()

    @property
    def caller(self) -> _Caller:
        """Give the calling thread's own record."""
        try:
            caller: _Caller = self._callers.caller
        except AttributeError:
            caller = self._callers.caller = _Caller(self._schedule)
        return caller

    def before(self, station: _Station, module: nn.Module, arguments: Arguments) -> Arguments | None:
        """Enter a module; give other arguments for it, or None."""
        caller = self.caller
        if caller.visit is not None and self._is_left_over(caller, module):
            caller.unwind(0)
        depth = len(caller.stack)
        try:
            if caller.visit is None:
                caller.visit = self._begin(caller, module, station)
            escort = station.escort if station.is_block or not depth else None
            if station.block is not None:
                self._enter(caller, caller.visit, station.block)
            caller.stack.append((module, station.block, None, escort))
            if escort is None:
                return None
            changed, stay = escort.arrive(caller.visit, arguments)
            caller.stack[-1] = (module, station.block, stay, escort)
        except BaseException as error:
            caller.unwind(depth)
            if not isinstance(error, Exception):
                self._schedule.repair(caller.visit)
            raise
        return changed

    def _begin(self, caller: _Caller, module: nn.Module, station: _Station) -> Visit:
        companion = caller.companion
        if companion is None:
            return self._schedule.begin(id(module), station.reachable)
        visit = self._schedule.begin(id(module), station.reachable, companion.party)
        companion.set_out(visit)
        return visit

    def _enter(self, caller: _Caller, visit: Visit, block: int) -> None:
        companion = caller.companion
        if companion is None:
            self._schedule.enter(visit, block)
            return
        self._schedule.pause(visit, block)  # whoever waits for others holds nothing that they need
        companion.wait_turn(visit, block)
        began = time.perf_counter()
        self._schedule.enter(visit, block)
        companion.note_wait(time.perf_counter() - began)

    def _is_left_over(self, caller: _Caller, module: nn.Module) -> bool:
        """Say whether an earlier call was interrupted: it is over, or this module is what it is part of."""
        if not caller.stack or (caller.visit is not None and caller.visit.is_over):
            return True
        return id(caller.stack[0][0]) in self._insides.get(id(module), ())

    @property
    def is_in_convoy(self) -> bool:
        """Say whether the calling thread is one of a convoy's, or has one under way."""
        return self.caller.companion is not None or self._schedule.leads_party

    @property
    def is_inside(self) -> bool:
        """Say whether the calling thread is in a forward; what an interrupted one left is put right."""
        caller = self.caller
        if caller.visit is not None and not is_in_a_forward(threading.get_ident()):
            caller.unwind(0)
            self._schedule.repair(None)
        return caller.visit is not None

    def after(self, station: _Station, module: nn.Module, output: Any) -> Any:
        """Leave a module, and whatever inside it was not left; give another output, or None."""
        caller = self.caller
        depth = len(caller.stack) - 1  # nearly always this one
        while depth >= 0 and caller.stack[depth][0] is not module:
            depth -= 1
        if depth < 0:
            return None
        escort = caller.stack[depth][3]
        try:
            return None if escort is None or output is None else escort.depart(output)
        finally:
            caller.unwind(depth, is_complete=output is not None)


def hooks_of(module: nn.Module) -> Hooks | None:
    """Find the hooks that stand at a module; None where there are none."""
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, _Before):
            return hook.hooks
    return None


class _Station:
    """What the two hooks of one module share. Immutable."""

    __slots__ = ("block", "escort", "hooks", "is_block", "reachable")

    def __init__(
        self, *, hooks: Hooks, block: int | None, is_block: bool, reachable: frozenset[int], escort: Escort | None
    ) -> None:
        self.hooks = hooks
        self.block = block
        self.is_block = is_block
        self.reachable = reachable
        self.escort = escort


class _Before:
    """Enter a module: its first hook."""

    __slots__ = ("_station",)

    def __init__(self, station: _Station) -> None:
        self._station = station

    @property
    def hooks(self) -> Hooks:
        """Give those it belongs to."""
        return self._station.hooks

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments | None:
        return self._station.hooks.before(self._station, module, (args, kwargs))

    def __reduce__(self) -> tuple[type[_Leftover], tuple[()]]:
        return _Leftover, ()


class _After:
    """Leave a module: its last hook."""

    __slots__ = ("_station",)

    def __init__(self, station: _Station) -> None:
        self._station = station

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return self._station.hooks.after(self._station, module, output)

    def __reduce__(self) -> tuple[type[_Leftover], tuple[()]]:
        return _Leftover, ()


class _Leftover:
    """What becomes of a hook in a copy or pickle of the module, which is not offloaded.

    The first call of any module that has one takes it off from there and everything below.
    """

    def __call__(self, module: nn.Module, *_: Any) -> None:
        for part in module.modules():
            vars(part).pop("hf_device_map", None)  # of the residency that the copy is not in
            tables: tuple[tuple[MutableMapping[int, Callable[..., Any]], dict[int, bool]], ...] = (
                (part._forward_pre_hooks, part._forward_pre_hooks_with_kwargs),
                (part._forward_hooks, part._forward_hooks_always_called),
            )
            for table, marks in tables:
                for key, hook in list(table.items()):
                    if isinstance(hook, _Leftover):
                        table.pop(key, None)
                        marks.pop(key, None)  # another hook may get this number, in another process
