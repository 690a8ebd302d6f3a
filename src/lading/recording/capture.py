"""Listen at chosen sites of a model, in the calling context alone.

A hook stands at a site while some capture of that site is open, one for all captures, and none otherwise. Who listens
is told by a context variable: threads that did not open the capture, and were not given it with `Capture.bind`, are not
heard, whatever they call meanwhile; tasks begun inside it are. Never asked: whether anything is compiling. That is a
question to the whole process.

Concurrency: hooks are counted where they stand, in `stations`. What is heard goes to the end of a list, which needs no
lock; what is read of it, and which calls run, is guarded by each capture's own.
"""

from __future__ import annotations

import functools
import itertools
import threading
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType
from typing import Any, TypeVar

import torch
from torch import nn

from lading.errors import CaptureError, name_list, refusal
from lading.recording.calls import CALLS, Call, is_inside, masks_above
from lading.recording.compiled import refuse_compiled
from lading.recording.ear import Ear
from lading.recording.groups import Event, Group, assemble
from lading.recording.log import Log
from lading.recording.selection import Selection
from lading.recording.sites import Site
from lading.recording.stations import LISTENING, STATIONS

Result = TypeVar("Result")


class Stopped(Exception):  # noqa: N818 - no error: the forward went as far as it was asked to
    """End a forward after the site at which its capture wanted it to stop."""

    def __init__(self, capture: Capture) -> None:
        super().__init__("the forward was stopped by lading.capture(stop_after=…), which catches this")
        self.capture = capture


class Capture:
    """Keep tensors of a model's forwards: what `lading.capture` gives, and a context manager whose value it is.

    Any thread may read what was seen. Use it once.
    """

    def __init__(
        self,
        model: nn.Module,
        sites: tuple[Site, ...],
        selection: Selection,
        stop_after: Site | None = None,
        groups: tuple[Group, ...] = (),
    ) -> None:
        self._model = model
        self._sites = tuple(
            {site.name: site for site in (*sites, *(s for each in groups for s in each.sites))}.values()
        )
        self._selection = selection
        self._stop_after = stop_after
        self._groups = {group.name: group for group in groups}
        if any(self._groups[group.name] != group for group in groups):
            found, expected = f"several ends of {name_list(self._groups)}", "one of each"
            raise CaptureError(
                refusal("a capture", found=found, expected=expected, way_out="open another capture inside this one")
            )
        self._log = Log(site.name for site in self._sites)
        self.ear = Ear(note=self._log.note, keep=selection.keep_whole, is_bare=selection.view)
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        self._running: list[Call] = []
        self._state = "new"

    # What was seen

    @property
    def names(self) -> tuple[str, ...]:
        """List the sites."""
        return tuple(self._log.names)

    @property
    def groups(self) -> tuple[str, ...]:
        """List the groups."""
        return tuple(self._groups)

    def calls(self, name: str) -> list[Any]:
        """Give what one site was seen to give, call by call; of a group its tuples, one for each call of its model.

        Raises:
            KeyError: no such site or group was asked for.
        """
        if name in self._groups:
            return self._tuples(self._groups[name])
        if name not in self._log.names:
            known = (*self._log.names, *self._groups)
            raise KeyError(refusal("seen", found=repr(name), expected=name_list(known), way_out="ask for it"))
        return self._log.tensors_of(name)

    def __getitem__(self, name: str) -> Any:
        """Give the tensor of the only call, or the tuple of a group.

        Raises:
            KeyError: no such site or group was asked for.
            CaptureError: it was called not at all, or several times.
        """
        found = self.calls(name)
        if len(found) != 1:
            way_out = "call the model inside the capture" if not found else f"use calls({name!r})"
            if not found and name in self._groups:
                way_out = 'call the model; attention weights exist under attn_implementation="eager" alone'
            raise CaptureError(
                refusal(
                    f"{'group' if name in self._groups else 'site'} {name!r}",
                    found=f"{len(found)} calls",
                    expected="one",
                    way_out=way_out,
                )
            )
        return found[0]

    def __getattr__(self, name: str) -> tuple[torch.Tensor, ...]:
        if name not in self.__dict__.get("_groups", {}):
            raise AttributeError(f"nothing was asked for under the name {name!r}")
        return self.group(name)

    def group(self, name: str) -> tuple[torch.Tensor, ...]:
        """Give a group's tensors in the order of the calls: what transformers returns under its name.

        Raises:
            KeyError: no such group was asked for.
            CaptureError: nothing was seen of it, or several calls of its model.
        """
        if name not in self._groups:
            raise KeyError(refusal("seen", found=repr(name), expected=name_list(self._groups), way_out="ask for it"))
        found: tuple[torch.Tensor, ...] = self[name]
        return found

    def _tuples(self, group: Group) -> list[Any]:
        names = {group.name, *(site.name for site in group.sites)}
        rows = self._log.rows(names)
        events = [Event(name=name, tensor=tensor, call=number) for name, tensor, _, number in rows]
        return assemble(group, events)

    def __repr__(self) -> str:
        counts = ", ".join(f"{name}: {len(self._log.rows((name,)))}" for name in (*self._groups, *self._log.names))
        return f"<Capture {self._state}, calls: {counts}>"

    def __iter__(self) -> Iterator[str]:
        return iter(self._log.names)

    def __len__(self) -> int:
        return len(self._log.names)

    # Who listens

    def bind(self, function: Callable[..., Result]) -> Callable[..., Result]:
        """Give a function whose forwards are heard wherever it runs: for threads and executors."""

        @functools.wraps(function)
        def bound(*args: Any, **kwargs: Any) -> Result:
            listening, calls = LISTENING.set((*LISTENING.get(), (self, self.ear))), CALLS.set(())
            try:
                return function(*args, **kwargs)
            finally:
                CALLS.reset(calls)
                LISTENING.reset(listening)

        return bound

    def until_stop(self, function: Callable[..., Result], *args: Any, **kwargs: Any) -> Result | None:
        """Call a function, such as the model; None where ``stop_after`` ended it. For several calls in one capture."""
        try:
            return function(*args, **kwargs)
        except Stopped as stop:
            if stop.capture is not self:
                raise
            return None

    def __enter__(self) -> Capture:
        if self._state != "new":
            raise CaptureError(
                refusal("a capture", found=f"it is {self._state}", expected="a new one", way_out="call lading.capture")
            )
        self._state = "open"
        others = [group.owner for group in self._groups.values()]
        if self._stop_after is not None:
            others.append(self._stop_after.module)
        modules = self.ear.open(self._sites, others, is_whole=self._selection.is_whole)
        try:
            STATIONS.open(self, modules)
        except BaseException:
            STATIONS.close(self)
            raise
        others_open = (
            each for each in LISTENING.get() if not each[1].is_closed
        )  # one may have ended in another context
        LISTENING.set((*others_open, (self, self.ear)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        self._state = "closed"
        self.ear.close()
        STATIONS.close(self)
        # No tokens: captures may overlap, and a generator that holds one may be closed in another context.
        LISTENING.set(tuple(each for each in LISTENING.get() if each[0] is not self))
        CALLS.set(tuple(each for each in CALLS.get() if each.listener is not self))
        if error is None:
            refuse_compiled(self._model)  # meanwhile: what ran in it was not heard
        return isinstance(error, Stopped) and error.capture is self

    # What hooks tell

    def begin_call(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call:
        """Note that the model is called in a listening context."""
        call = Call(listener=self, number=next(self._numbers), given=(module, args, kwargs))
        with self._lock:
            self._running.append(call)
        return call

    def drop_calls(self) -> None:
        """Forget calls of this context that a KeyboardInterrupt ended: torch runs no hook after one."""
        stale = [each for each in CALLS.get() if each.listener is self]
        with self._lock:
            self._running = [each for each in self._running if each not in stale]
        CALLS.set(tuple(each for each in CALLS.get() if each not in stale))

    def end_call(self, call: Call, *, is_complete: bool) -> None:
        """Note that the call is over.

        Raises:
            CaptureError: another thread did some of its work, or the model went on after the stop.
        """
        with self._lock:
            self._running = [each for each in self._running if each is not call]
        heard = {name for name, _, _, number in self._log.rows(call.strays) if number == call.number}
        missed = sorted(call.strays - call.heard - heard)
        if is_complete and missed:
            raise CaptureError(
                refusal(
                    "a captured forward",
                    found=f"{name_list(missed)} called in a thread that does not listen",
                    expected="all sites called where the capture was opened",
                    way_out="give that thread's function to bind()",
                )
            )
        if is_complete and call.is_stopped:
            raise CaptureError(
                refusal(
                    "stop_after",
                    found="a forward that went on: the model's own code swallowed the stop",
                    expected="that it ends there",
                    way_out="capture without stop_after",
                )
            )

    def hear(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
        """Keep what the sites at a module ask for.

        Raises:
            Stopped: this was the last one that was wanted.
            CaptureError: it has no such tensor.
        """
        calls = [each for each in CALLS.get() if each.listener is self]
        number = calls[-1].number if calls else None
        for site in self.ear.sites.get(id(module), ()):
            for call in calls:
                call.heard.add(site.name)
            found = site.find(args, kwargs, output)
            if found is None:
                continue
            masks = masks_above(site.path, calls) if self._selection.asks_mask else ()
            kept = self._selection.choose(found, masks, site.name)
            if self._selection.reduce is not None:
                reduced: Any = self._selection.reduce(kept)
                if not isinstance(reduced, torch.Tensor):
                    kind, way_out = type(reduced).__name__, "hand what is none to a function: to="
                    raise CaptureError(
                        refusal(f"reduce at {site.name!r}", found=kind, expected="a tensor", way_out=way_out)
                    )
                kept = reduced
            kept, event = self._selection.move(kept, found)
            if callable(self._selection.to):
                self._selection.to(site.name, kept)
            else:
                self.ear.note((site.name, kept, event, number))
        for group in self._groups.values():
            if group.owner is module:
                self.ear.note((group.name, None, None, number))
        if self._stop_after is not None and self._stop_after.module is module:
            for call in calls:
                call.is_stopped = True
            raise Stopped(self)

    def stray(self, module: nn.Module) -> None:
        """Note that a module was reached where nobody listens, unless it was by a call of the model of its own."""
        if not self._running or is_inside(self._model):
            return
        names = {site.name for site in self._sites if site.module is module}
        with self._lock:
            for call in self._running:
                call.strays |= names

    def root(self) -> nn.Module:
        """Give the captured model."""
        return self._model
