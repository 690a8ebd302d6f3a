"""Listen at chosen sites of a model, in the calling context alone.

A hook stands at a site while some capture of that site is open, one for all captures, and none otherwise. Who listens
is told by a context variable: threads that did not open the capture, and were not given it with `Capture.bind`, are not
heard, whatever they call meanwhile; tasks begun inside it are. Never asked: whether anything is compiling. That is a
question to the whole process.

Concurrency: hooks are counted under `_Stations._lock`. What is heard goes to the end of a list, which needs no
lock; what is read of it, and which calls run, is guarded by each capture's own.
"""

from __future__ import annotations

import functools
import itertools
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from types import TracebackType
from typing import Any, TypeVar

import torch
from torch import nn
from torch.compiler import is_dynamo_compiling
from torch.utils.hooks import RemovableHandle

from lading.compat import compiling_caller, run_uncompiled
from lading.errors import CaptureError, name_list, refusal
from lading.recording.calls import CALLS, Call, is_inside, masks_above
from lading.recording.compiled import refuse_compiled, refuse_compiled_call
from lading.recording.ear import Ear
from lading.recording.groups import Event, Group, assemble
from lading.recording.log import Log
from lading.recording.selection import Selection
from lading.recording.sites import Site

Result = TypeVar("Result")


class Stopped(Exception):  # noqa: N818 - no error: the forward went as far as it was asked to
    """End a forward after the site at which its capture wanted it to stop."""

    def __init__(self, capture: Capture) -> None:
        super().__init__("the forward was stopped by lading.capture(stop_after=…), which catches this")
        self.capture = capture


_compiling_caller = compiling_caller()
_graph_task = torch._C._current_graph_task_id
_LISTENING: ContextVar[tuple[tuple[Capture, Ear], ...]] = ContextVar("lading_captures", default=())
"""With its ear: a capture answers for names of its own, and is slow to look anything up on."""


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

    def __iter__(self) -> Iterator[str]:
        return iter(self._log.names)

    def __len__(self) -> int:
        return len(self._log.names)

    # Who listens

    def bind(self, function: Callable[..., Result]) -> Callable[..., Result]:
        """Give a function whose forwards are heard wherever it runs: for threads and executors."""

        @functools.wraps(function)
        def bound(*args: Any, **kwargs: Any) -> Result:
            listening, calls = _LISTENING.set((*_LISTENING.get(), (self, self.ear))), CALLS.set(())
            try:
                return function(*args, **kwargs)
            finally:
                CALLS.reset(calls)
                _LISTENING.reset(listening)

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
                refusal("a capture", found=f"an {self._state} one", expected="a new one", way_out="call lading.capture")
            )
        self._state = "open"
        others = [group.owner for group in self._groups.values()]
        if self._stop_after is not None:
            others.append(self._stop_after.module)
        modules = self.ear.open(self._sites, others, is_whole=self._selection.is_whole)
        try:
            _STATIONS.open(self, modules)
        except BaseException:
            _STATIONS.close(self)
            raise
        _LISTENING.set((*_LISTENING.get(), (self, self.ear)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        self._state = "closed"
        self.ear.close()
        _STATIONS.close(self)
        # No tokens: captures may overlap, and a generator that holds one may be closed in another context.
        _LISTENING.set(tuple(each for each in _LISTENING.get() if each[0] is not self))
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
                kept = self._selection.reduce(kept)
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


class _Stations:
    """Stand at the modules that open captures ask for: one hook a module, counted. Guarded by ``_lock``."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: dict[int, list[Capture]] = {}
        self._handles: dict[int, list[RemovableHandle]] = {}
        self._roots: dict[int, list[Capture]] = {}
        self._root_handles: dict[int, list[RemovableHandle]] = {}

    def open(self, capture: Capture, modules: Iterable[nn.Module]) -> None:
        with self._lock:
            for module in modules:
                captures = self._open.setdefault(id(module), [])
                captures.append(capture)
                if len(captures) == 1:
                    self._handles[id(module)] = [
                        # told which module it stands at: copies that torch makes to run elsewhere share its hooks
                        module.register_forward_hook(functools.partial(self._at_site, module), with_kwargs=True)
                    ]
            root = capture.root()
            captures = self._roots.setdefault(id(root), [])
            captures.append(capture)
            if len(captures) == 1:
                self._root_handles[id(root)] = [
                    root.register_forward_pre_hook(self._before_root, prepend=True, with_kwargs=True),
                    root.register_forward_hook(self._after_root, always_call=True),
                ]

    def close(self, capture: Capture) -> None:
        with self._lock:
            for table, handles in ((self._open, self._handles), (self._roots, self._root_handles)):
                for key in [key for key, captures in table.items() if capture in captures]:
                    table[key].remove(capture)
                    if not table[key]:
                        del table[key]
                        for handle in handles.pop(key):
                            handle.remove()

    def _at_site(self, module: nn.Module, _: nn.Module, args: tuple[Any, ...], *rest: Any) -> None:
        # Traced, it is for somebody else, and nothing of it stays in compiled code. Without the keyword arguments,
        # torch saw the hook between two steps of its coming or going: no capture that listens here is open.
        if is_dynamo_compiling() or len(rest) != 2:
            return
        kwargs, output = rest
        if _graph_task() != -1:
            return  # backward runs a checkpointed forward again
        is_heard, calls = False, CALLS.get()
        for capture, ear in _LISTENING.get():
            name = ear.whole.get(id(module))
            if (
                name is not None
                and output.__class__ is torch.Tensor
                and len(calls) == 1
                and calls[0].listener is capture
            ):
                is_heard = True
                kept = output if ear.is_bare and not output.requires_grad else ear.keep(output)
                ear.note((name, kept, None, calls[0].number))
            elif id(module) in ear.sites:
                is_heard = True
                capture.hear(module, args, kwargs, output)
        if not is_heard:
            for capture in list(self._open.get(id(module), ())):
                capture.stray(module)

    def _before_root(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
        if not is_dynamo_compiling() and kwargs is not None and _graph_task() == -1:
            self._begin(module, args, kwargs, _compiling_caller() is not None)

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], is_compiled: bool) -> None:
        for capture, _ in _LISTENING.get():
            if capture in self._roots.get(id(module), ()):
                if is_compiled:
                    refuse_compiled_call(module)
                if not is_inside(module, times=2):
                    capture.drop_calls()
                CALLS.set((*CALLS.get(), capture.begin_call(module, args, kwargs)))

    def _after_root(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if is_dynamo_compiling():
            return
        for capture, _ in reversed(_LISTENING.get()):
            calls = [each for each in CALLS.get() if each.listener is capture]
            if calls and capture in self._roots.get(id(module), ()):
                CALLS.set(tuple(each for each in CALLS.get() if each is not calls[-1]))
                capture.end_call(calls[-1], is_complete=output is not None)


for _hook in (_Stations._at_site, _Stations._begin, _Stations._after_root):
    run_uncompiled(_hook)
run_uncompiled(_Stations._before_root, with_callees=False)
_STATIONS = _Stations()
