"""Follow the calls of models whose outputs transformers' recorder would collect, each in its own context.

A `Flag` among the arguments keeps the recorder still; a `Record` collects what the modules give meanwhile; an `Owner`
opens and ends both around one model's ``forward``. Knows no hook.

Concurrency: calls live in a context variable; each record belongs to the thread that opened it, but for its strays.
"""

from __future__ import annotations

import inspect
import sys
import weakref
from collections.abc import Iterable
from contextvars import ContextVar
from typing import Any, Protocol

import torch
from torch import nn

from lading.adapters.transformers_recorder import BY_HOOKS, CODES, RECORDING, Task, asked, declared, is_joint
from lading.adapters.transformers_releases import Selection
from lading.adapters.transformers_sites import ends_with_own_output
from lading.errors import CaptureError, name_list, refusal

_ABSENT: Any = object()
CALLS: ContextVar[tuple[Call, ...]] = ContextVar("lading_flagged_calls", default=())


class Flag:
    """Stand for a flag that was asked for: true for the model's code, false for transformers' recorder.

    It travels wherever the flag does, down to models inside, and holds what is recorded: an interrupted call, after
    which torch runs no hook, takes that along.
    """

    __slots__ = ("asked", "is_on", "record")

    def __init__(self, asked: Any, is_on: bool, record: Record) -> None:
        self.asked = asked
        """What a model inside would be given; `_ABSENT` for nothing."""
        self.is_on = is_on
        self.record = record

    def __bool__(self) -> bool:
        return self.is_on and sys._getframe(1).f_code not in CODES

    @property  # type: ignore[misc]
    def __class__(self) -> type[bool]:  # type: ignore[override]  # transformers 5 takes whatever is no bool for a list
        return bool

    def __reduce__(self) -> tuple[type[bool], tuple[bool]]:
        return bool, (self.is_on,)

    def __deepcopy__(self, _: Any) -> Flag:
        return self


class Record:
    """What one call of one model collects. One thread, but for ``strays``."""

    def __init__(self, owner: Owner, keys: Iterable[str], selection: Selection | None, *, as_tuple: bool) -> None:
        self.owner = owner
        self.keys = frozenset(keys)
        self.kept: dict[str, list[Any]] = {key: [] for key in keys} if BY_HOOKS else {}
        """In the order of the output's entries; of transformers 4's, only those of which anything was seen."""
        self.selection = selection
        self.as_tuple = as_tuple
        self.task_id = torch._C._current_graph_task_id()
        """The backward that the call is part of: another one that runs layers again is not recorded."""
        self.heard: set[int] = set()
        self.strays: set[int] = set()

    def begin(self, key: str, args: tuple[Any, ...]) -> None:
        """Keep the first layer's input."""
        if not self.kept.get(key) and (self.selection is None or self.selection.counts_input):
            self.append(key, args[0])

    def append(self, key: str, value: Any) -> None:
        """Keep what one module gave."""
        kept = self.kept.setdefault(key, [])
        chosen = self.selection.positions if self.selection is not None and key == "hidden_states" else None
        kept.append(value if chosen is None or len(kept) in chosen else None)

    def fill(self, output: Any) -> Any:
        """Put everything into the model's output, and let go of it: what is checkpointed keeps the call's flags."""
        found, self.kept = self.kept, {}
        for key, kept in found.items():
            if key == "hidden_states" and kept and kept[-1] is not None and ends_with_own_output(self.owner.model):
                names = [each for each in ("vision_hidden_states", "last_hidden_state") if hasattr(output, each)]
                kept[-1] = getattr(output, names[0]) if names else kept[-1]
            if is_joint(self.owner.model, key):
                output[key], output[f"cross_{key}"] = tuple(kept[0::2]), tuple(kept[1::2])
            else:
                output[key] = tuple(kept)
        return output.to_tuple() if self.as_tuple else output


class Call:
    """One call of one model. Its record is weak: the flags among the call's arguments hold it. Immutable."""

    __slots__ = ("_record", "owner")

    def __init__(self, owner: Owner, record: Record | None) -> None:
        self.owner = owner
        self._record = None if record is None else weakref.ref(record)

    @property
    def record(self) -> Record | None:
        """Give what it collects; None where nothing was asked for, or the call was interrupted."""
        return None if self._record is None else self._record()


class Handle(Protocol):
    """What calls need of whoever installed the hooks."""

    def refresh(self, owner: Owner) -> None:
        """Find an owner's sites again where its modules were replaced."""

    def note(self, record: Record) -> None:
        """Note that a call which collects is running."""

    def forget(self, record: Record) -> list[str]:
        """Note that it is over; give the names of the modules that another thread called for it."""


class Owner:
    """Open and end the calls of one model whose ``forward`` is decorated."""

    def __init__(self, handle: Handle, model: nn.Module, recorder: Any) -> None:
        self.handle = handle
        self.model = model
        body = inspect.signature(recorder.__wrapped__).parameters
        self._named = frozenset(body)
        self._takes_any = any(each.kind is each.VAR_KEYWORD for each in body.values())
        self.inside: frozenset[int] = frozenset()
        """The modules of the model when its sites were found."""
        self.sites: dict[int, list[Task]] = {}
        """What modules are declared for, by identity; of a recorder with hooks those of other models too."""

    def before(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Open a call; give its arguments."""
        given = unwrapped(kwargs)
        wanted = asked(self.model, given)
        record = self._open(given, wanted) if wanted else None
        calls = CALLS.get()
        if not any(call.record is not None for call in calls):  # what an interrupted call left is dropped some day
            calls = tuple(call for call in calls if call.owner is not self)
        CALLS.set((*calls, Call(self, record)))
        return args, given

    def _open(self, given: dict[str, Any], wanted: dict[str, Any]) -> Record:
        """Make the record of a call, and flags of its arguments."""
        self.handle.refresh(self)
        default = getattr(self.model.config, "return_dict", True)
        return_dict = given.get("return_dict", default)
        if return_dict is None and not BY_HOOKS:
            return_dict = default
        count = 1 + sum(key == "hidden_states" for tasks in self.sites.values() for key, _, _ in tasks)
        selection = RECORDING.select(self.model, wanted.get("hidden_states"), count)
        record = Record(self, wanted, selection, as_tuple=return_dict is False)
        given["return_dict"] = True
        for name in {"output_attentions", *(f"output_{key}" for key in declared(self.model))}:
            value = given.get(name, _ABSENT)
            default = getattr(self.model.config, name, None)
            if value is _ABSENT and default and name in self._named:
                given[name] = Flag(default, True, record)  # such a forward takes its configuration's
            elif value is _ABSENT and default and self._takes_any:
                given[name] = Flag(_ABSENT, False, record)
            elif value is _ABSENT and default:
                raise CaptureError(
                    refusal(
                        f"{name} in the configuration of {type(self.model).__name__}",
                        found="a forward that does not take it",
                        expected="one that takes it as an argument",
                        way_out=f"set {name}=False there, and name the modules to lading.capture",
                    )
                )
            elif value is not _ABSENT and value is not None and value is not False:
                given[name] = Flag(value, bool(value), record)
        self.handle.note(record)
        return record

    def after(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Leave a call, and whatever inside it was not left; give the output with what was collected, or None."""
        calls = CALLS.get()
        record = next(
            (each.record for each in kwargs.values() if type(each) is Flag and each.record.owner is self), None
        )
        depth = len(calls) - 1
        while depth >= 0 and (calls[depth].owner is not self or calls[depth].record is not record):
            depth -= 1
        if depth < 0:
            return None
        CALLS.set(calls[:depth])
        if record is None:
            return None
        missed = self.handle.forget(record)
        if output is not None and missed:
            raise CaptureError(
                refusal(
                    f"{type(self.model).__name__} with {name_list(sorted(record.keys))} asked for",
                    found=f"{name_list(missed)} called in a thread outside the call",
                    expected="all layers called in the context of the call",
                    way_out="run that thread's work in contextvars.copy_context(), taken inside the call",
                )
            )
        return None if output is None else record.fill(output)


def unwrapped(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Give arguments with what flags stand for."""
    given = {name: value.asked if type(value) is Flag else value for name, value in kwargs.items()}
    return {name: value for name, value in given.items() if value is not _ABSENT}


def records() -> list[Record]:
    """List what the current calls collect: where hooks record, the innermost call's alone."""
    calls = CALLS.get()
    task_id = torch._C._current_graph_task_id() if calls else -1
    found = [call.record for call in (calls[-1:] if BY_HOOKS else calls)]
    return [record for record in found if record is not None and record.task_id == task_id]
