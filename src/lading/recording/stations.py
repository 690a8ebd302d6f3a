"""Stand at the modules that open captures ask for: one hook a module, however many listen, and none otherwise.

Knows who stands where and who listens in this context; what is heard, a listener keeps itself.

Concurrency: what stands is counted under a lock; hooks read without it.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterable, Mapping, MutableMapping
from contextvars import ContextVar
from typing import Any, Protocol

import torch
from torch import nn
from torch.compiler import is_dynamo_compiling
from torch.utils.hooks import RemovableHandle

from lading.compat import compiling_caller, run_uncompiled
from lading.recording.calls import CALLS, Call, is_inside
from lading.recording.compiled import refuse_compiled_call
from lading.recording.ear import Ear


class Listener(Protocol):
    """Hear what happens at stations, while open; all but `root` in whichever thread it happens."""

    def root(self) -> nn.Module:
        """Give the model whose calls are heard."""

    def begin_call(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call:
        """Note that the model is called in a listening context."""

    def drop_calls(self) -> None:
        """Forget calls of this context that ended unnoticed."""

    def end_call(self, call: Call, *, is_complete: bool) -> None:
        """Note that a call is over."""

    def hear(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
        """Keep what is wanted of a module's call."""

    def stray(self, module: nn.Module) -> None:
        """Note that a module was reached where nobody listens."""


_compiling_caller = compiling_caller()
_graph_task = torch._C._current_graph_task_id
LISTENING: ContextVar[tuple[tuple[Listener, Ear], ...]] = ContextVar("lading_captures", default=())
"""With its ear: a capture answers for names of its own, and is slow to look anything up on."""


class Stations:
    """Stand at the modules that open captures ask for: one hook a module, counted. Guarded by ``_lock``."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: dict[int, list[Listener]] = {}
        self._handles: dict[int, list[RemovableHandle]] = {}
        self._roots: dict[int, list[Listener]] = {}
        self._root_handles: dict[int, list[RemovableHandle]] = {}

    def open(self, capture: Listener, modules: Iterable[nn.Module]) -> None:
        """Stand at modules, and at the model, for one more capture."""
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

    def close(self, capture: Listener) -> None:
        """Stand no more where this capture was the last."""
        with self._lock:
            for table, handles in ((self._open, self._handles), (self._roots, self._root_handles)):
                for key in [key for key, captures in table.items() if capture in captures]:
                    table[key].remove(capture)
                    if not table[key]:
                        del table[key]
                        for handle in handles.pop(key):
                            handle.remove()

    def __reduce__(self) -> str:
        return "STATIONS"  # a copy or pickle of a module finds it again, and sheds its hooks when they are called

    def _shed(self, module: nn.Module) -> None:
        """Take the hooks off a copy that was made of a module while a capture was open."""
        with self._lock:
            if id(module) in self._open or id(module) in self._roots:
                return
            tables: tuple[MutableMapping[int, Any], ...] = (
                module._forward_pre_hooks_with_kwargs,
                module._forward_hooks_with_kwargs,
                module._forward_hooks_always_called,
                module._forward_pre_hooks,
                module._forward_hooks,
            )
            standing = (*module._forward_pre_hooks.items(), *module._forward_hooks.items())
            for key, hook in standing:
                if getattr(getattr(hook, "func", hook), "__self__", None) is self:
                    for table in tables:
                        table.pop(key, None)

    def _at_site(self, module: nn.Module, _: nn.Module, args: tuple[Any, ...], *rest: Any) -> None:
        # Traced, it is for somebody else, and nothing of it stays in compiled code. Without the keyword arguments,
        # torch saw the hook between two steps of its coming or going: no capture that listens here is open.
        if is_dynamo_compiling() or len(rest) != 2:
            return
        kwargs, output = rest
        if _graph_task() != -1:
            return  # backward runs a checkpointed forward again
        is_heard, calls = False, CALLS.get()
        for capture, ear in LISTENING.get():
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
            standing = self._open.get(id(module))
            if standing is None:
                self._shed(module)
            for capture in list(standing or ()):
                capture.stray(module)

    def _before_root(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
        if not is_dynamo_compiling() and kwargs is not None and _graph_task() == -1:
            self._begin(module, args, kwargs, _compiling_caller() is not None)

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], is_compiled: bool) -> None:
        if id(module) not in self._roots:
            self._shed(module)
        for capture, _ in LISTENING.get():
            if capture in self._roots.get(id(module), ()):
                if is_compiled:
                    refuse_compiled_call(module)
                if not is_inside(module, times=2):
                    capture.drop_calls()
                CALLS.set((*CALLS.get(), capture.begin_call(module, args, kwargs)))

    def _after_root(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if is_dynamo_compiling():
            return
        for capture, _ in reversed(LISTENING.get()):
            calls = [each for each in CALLS.get() if each.listener is capture]
            if calls and capture in self._roots.get(id(module), ()):
                CALLS.set(tuple(each for each in CALLS.get() if each is not calls[-1]))
                capture.end_call(calls[-1], is_complete=output is not None)


for _hook in (Stations._at_site, Stations._begin, Stations._after_root):
    run_uncompiled(_hook)
run_uncompiled(Stations._before_root, with_callees=False)
STATIONS = Stations()
