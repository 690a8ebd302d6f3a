"""Listen at chosen sites of a model, in the calling context alone.

A hook stands at a site while some capture of that site is open, one for all captures, and none otherwise. Who listens
is told by a context variable: threads that did not open the capture, and were not given it with `Capture.bind`, are not
heard, whatever they call meanwhile; tasks begun inside it are. Never asked: whether anything is compiling. That is a
question to the whole process.

Concurrency: hooks are counted under `_LOCK`; what was seen is guarded by each capture's own lock.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from lading.errors import CaptureError, name_list, refusal
from lading.recording.groups import Group
from lading.recording.selection import Selection
from lading.recording.sites import Site, resolve

Result = TypeVar("Result")
_MASKS = ("attention_mask", "decoder_attention_mask")


class Stopped(Exception):  # noqa: N818 - no error: the forward went as far as it was asked to
    """End a forward after the site at which its capture wanted it to stop."""

    def __init__(self, capture: Capture) -> None:
        super().__init__("the forward was stopped by lading.capture(stop_after=…), which catches this")
        self.capture = capture


@dataclass(slots=True)
class _Call:
    """One call of the captured model in a listening context. One thread, but for ``strays``."""

    masks: list[torch.Tensor]
    heard: set[str] = field(default_factory=set)
    strays: set[str] = field(default_factory=set)
    """Sites that some thread outside every call of the model reached meanwhile."""
    is_stopped: bool = False


_LISTENING: ContextVar[tuple[Capture, ...]] = ContextVar("lading_captures", default=())
_CALLS: ContextVar[tuple[_Call, ...]] = ContextVar("lading_captured_calls", default=())


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
        self._order: list[str] = []
        """The sites in the order in which they were called."""
        self._lock = threading.Lock()
        self._kept: dict[str, list[tuple[Any, Any]]] = {site.name: [] for site in self._sites}
        self._running: list[_Call] = []
        self._state = "new"
        self._tokens: tuple[Any, Any] = (None, None)

    # What was seen

    @property
    def names(self) -> tuple[str, ...]:
        """List the sites."""
        return tuple(self._kept)

    @property
    def groups(self) -> tuple[str, ...]:
        """List the groups."""
        return tuple(self._groups)

    def calls(self, name: str) -> list[torch.Tensor]:
        """Give what one site was seen to give, call by call.

        Raises:
            KeyError: no such site was asked for.
        """
        if name not in self._kept:
            raise KeyError(refusal("seen", found=repr(name), expected=name_list(self._kept), way_out="ask for it"))
        with self._lock:
            kept = list(self._kept[name])
        for _, event in kept:
            if event is not None:
                event.synchronize()
        return [tensor for tensor, _ in kept]

    def __getitem__(self, name: str) -> torch.Tensor:
        """Give the tensor of the only call.

        Raises:
            CaptureError: the site was called not at all, or several times.
        """
        found = self.calls(name)
        if len(found) != 1:
            raise CaptureError(
                refusal(
                    f"site {name!r}",
                    found=f"{len(found)} calls",
                    expected="one",
                    way_out="call the model inside the capture" if not found else f"use calls({name!r})",
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
            CaptureError: nothing was seen of it.
        """
        if name not in self._groups:
            raise KeyError(refusal("seen", found=repr(name), expected=name_list(self._groups), way_out="ask for it"))
        group = self._groups[name]
        kept = {site.name: self.calls(site.name) for site in group.sites}
        with self._lock:
            order = [each for each in self._order if any(each == site.name for site in group.members)]
        if not order:
            raise CaptureError(
                refusal(
                    f"group {name!r}",
                    found="no tensor in it",
                    expected="one of each layer",
                    way_out='call the model; attention weights exist under attn_implementation="eager" alone',
                )
            )
        begun = [] if group.first is None else kept[group.first.name][:1]
        positions = dict.fromkeys(order, 0)
        members = []
        for each in order:
            members.append(kept[each][positions[each]])
            positions[each] += 1
        if group.last is not None and kept[group.last.name]:
            members[-1:] = kept[group.last.name][-1:]
        return (*begun, *members)

    def __iter__(self) -> Iterator[str]:
        return iter(self._kept)

    def __len__(self) -> int:
        return len(self._kept)

    # Who listens

    def bind(self, function: Callable[..., Result]) -> Callable[..., Result]:
        """Give a function whose forwards are heard wherever it runs: for threads and executors."""

        @functools.wraps(function)
        def bound(*args: Any, **kwargs: Any) -> Result:
            listening, calls = _LISTENING.set((*_LISTENING.get(), self)), _CALLS.set(())
            try:
                return function(*args, **kwargs)
            finally:
                _CALLS.reset(calls)
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
        wanted = {*self._sites, *([self._stop_after] if self._stop_after is not None else [])}
        _STATIONS.open(self, {id(site.module): site.module for site in wanted}.values())
        self._tokens = _LISTENING.set((*_LISTENING.get(), self)), _CALLS.set(())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        self._state = "closed"
        listening, calls = self._tokens
        _CALLS.reset(calls)
        _LISTENING.reset(listening)
        _STATIONS.close(self)
        return isinstance(error, Stopped) and error.capture is self

    # What hooks tell

    def begin_call(self, kwargs: Mapping[str, Any]) -> _Call:
        """Note that the model is called in a listening context."""
        call = _Call(masks=[kwargs[name] for name in _MASKS if isinstance(kwargs.get(name), torch.Tensor)])
        with self._lock:
            self._running.append(call)
        return call

    def end_call(self, call: _Call, *, is_complete: bool) -> None:
        """Note that the call is over.

        Raises:
            CaptureError: another thread did some of its work, or the model went on after the stop.
        """
        with self._lock:
            self._running = [each for each in self._running if each is not call]
        missed = sorted(call.strays - call.heard)
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
        calls = _CALLS.get()
        masks = calls[-1].masks if calls else []
        for site in self._sites:
            if site.module is module:
                for call in calls:
                    call.heard.add(site.name)
                found = site.find(args, kwargs, output)
                if found is None:
                    continue
                kept, event = self._selection.apply(found, masks, site.name)
                if callable(self._selection.to):
                    self._selection.to(site.name, kept)
                else:
                    with self._lock:
                        self._kept[site.name].append((kept, event))
                        self._order.append(site.name)
        if self._stop_after is not None and self._stop_after.module is module:
            for call in calls:
                call.is_stopped = True
            raise Stopped(self)

    def stray(self, module: nn.Module) -> None:
        """Note that a thread outside every call of the model reached a module."""
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
        self._depth = threading.local()

    def open(self, capture: Capture, modules: Iterable[nn.Module]) -> None:
        with self._lock:
            for module in modules:
                captures = self._open.setdefault(id(module), [])
                captures.append(capture)
                if len(captures) == 1:
                    self._handles[id(module)] = [module.register_forward_hook(self._at_site, with_kwargs=True)]
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

    def _at_site(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if torch._C._current_graph_task_id() != -1:
            return  # backward runs a checkpointed forward again
        captures = [each for each in _LISTENING.get() if each in self._open.get(id(module), ())]
        for capture in captures:
            capture.hear(module, args, kwargs, output)
        if not captures and not getattr(self._depth, "roots", 0):
            for capture in list(self._open.get(id(module), ())):
                capture.stray(module)

    def _before_root(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._depth.roots = getattr(self._depth, "roots", 0) + 1
        for capture in _LISTENING.get():
            if capture in self._roots.get(id(module), ()):
                call = capture.begin_call(kwargs)
                _CALLS.set((*_CALLS.get(), call))

    def _after_root(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._depth.roots = max(0, getattr(self._depth, "roots", 0) - 1)
        for capture in reversed(_LISTENING.get()):
            if capture in self._roots.get(id(module), ()) and _CALLS.get():
                *outer, call = _CALLS.get()
                _CALLS.set(tuple(outer))
                capture.end_call(call, is_complete=output is not None)


_STATIONS = _Stations()


def open_capture(
    model: nn.Module,
    sites: str | type[nn.Module] | Iterable[str | type[nn.Module]],
    selection: Selection,
    stop_after: str | None = None,
    groups: tuple[Group, ...] = (),
) -> Capture:
    """Make a capture of plain sites and groups.

    Raises:
        CaptureError: a site stands for nothing, or several to stop after, or a compiled model.
    """
    compiled = [name for name, module in model.named_modules() if is_compiled(module)]
    if compiled:
        raise CaptureError(
            refusal(
                type(model).__name__,
                found=f"compiled modules: {name_list(compiled)}",
                expected="modules that run as they are: compiled code ignores hooks",
                way_out="capture on the model that was compiled, before it was",
            )
        )
    last = resolve(model, stop_after) if stop_after is not None else ()
    if len(last) > 1:
        raise CaptureError(
            refusal("stop_after", found=f"{len(last)} modules", expected="one", way_out="name the last of them")
        )
    return Capture(model, resolve(model, sites), selection, last[0] if last else None, groups)


def is_compiled(module: nn.Module) -> bool:
    """Say whether a module runs compiled code, or stands before one that does."""
    return "_orig_mod" in module._modules or module._compiled_call_impl is not None
