"""Make transformers' own output flags right in every thread, where its recorder would mix threads up or lose states.

Models of transformers that collect in their own ``forward`` need nothing. Those whose ``forward`` is decorated leave it
to a recorder: before transformers 5.2 it replaces the layers' ``forward`` during each call, for all threads at once;
since then its hooks ask whether the process is compiling, and then share one variable. Here hooks at the same
modules record for the call that the current context is inside of, after the same rules, and the recorder is told that
nothing was asked.

Guarantees: the outputs that one thread alone would get; no ``forward`` replaced; nothing left after `FlagHandle.close`.

Concurrency: hooks are added and removed under ``_lock``, which guards the running records too.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, MutableMapping
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from lading.adapters.transformers_calls import CALLS, Flag, Owner, Record, records, unwrapped
from lading.adapters.transformers_recorder import BY_HOOKS, Task, find_recorder, own_sites, require_known_recorder
from lading.errors import CaptureError, name_list, refusal
from lading.recording.compiled import is_compiled


class _Hook:
    """Stand at a module; in a copy or pickle of it, only until the first call. Immutable."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *arguments: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():  # of the code being traced, not of the process: its recorder is right
            return None
        return self._function(*arguments)

    def __reduce__(self) -> tuple[type[_Leftover], tuple[()]]:
        return _Leftover, ()


class _Leftover:
    """What becomes of a hook in a copy: the first call takes it off."""

    def __call__(self, module: nn.Module, *_: Any) -> None:
        tables: tuple[tuple[MutableMapping[int, Any], ...], ...] = (
            (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
            (module._forward_hooks, module._forward_hooks_with_kwargs, module._forward_hooks_always_called),
        )
        for hooks, *marks in tables:
            for key in [key for key, hook in hooks.items() if isinstance(hook, _Leftover)]:
                for each in (hooks, *marks):
                    each.pop(key, None)


class FlagHandle:
    """Keep a model's flags right until `close`: what `thread_safe_outputs` gives, and a context manager.

    Any thread may call the model; install and close when nobody is inside.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._lock = threading.Lock()
        self._owners: dict[int, Owner] = {}
        self._handles: dict[int, tuple[nn.Module, list[RemovableHandle]]] = {}
        self._running: weakref.WeakSet[Record] = weakref.WeakSet()
        with self._lock:
            self._install()

    def __enter__(self) -> FlagHandle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Take every hook off again. Twice is fine."""
        with self._lock:
            for _, handles in self._handles.values():
                for handle in handles:
                    handle.remove()
            self._handles.clear()

    def refresh(self, owner: Owner) -> None:
        """Find the sites again where modules of a model were replaced.

        Raises:
            CaptureError: modules were compiled.
        """
        parts = _parts(owner.model)
        if set(map(id, parts)) != owner.inside:
            with self._lock:
                self._install()
        if any(map(is_compiled, parts)):
            _refuse_compiled(owner.model)

    def note(self, record: Record) -> None:
        """Note that a call which collects is running."""
        with self._lock:
            self._running.add(record)

    def forget(self, record: Record) -> list[str]:
        """Note that it is over; give the names of the modules that another thread called for it."""
        with self._lock:
            self._running.discard(record)
        missed = record.strays - record.heard
        return [name for name, module in record.owner.model.named_modules() if id(module) in missed] if missed else []

    def _install(self) -> None:
        found = {id(each): (each, find_recorder(type(each).forward)) for each in self._model.modules()}
        owners = {
            key: self._owners.get(key) or Owner(self, each, recorder)
            for key, (each, recorder) in found.items()
            if recorder is not None
        }
        if not owners:
            require_known_recorder()
        below = {key: {id(each): each for each in _parts(owner.model)} for key, owner in owners.items()}
        shared: dict[int, list[Task]] = {}
        tables = {key: shared if BY_HOOKS else {} for key in owners}
        sites: dict[int, nn.Module] = {}
        for key, owner in owners.items():
            if BY_HOOKS and any(key in below[around] for around in owners if around != key):
                continue  # found from the outermost model
            for module, tasks in own_sites(owner.model):
                tables[key][id(module)] = [*tables[key].get(id(module), ()), *tasks]
                sites[id(module)] = module
        every = {key: part for parts in below.values() for key, part in parts.items()}
        inner = {key: part for key, part in every.items() if isinstance(part, PreTrainedModel)}
        self._owners = owners
        self._stand({**inner, **sites, **{key: owner.model for key, owner in owners.items()}}, sites)
        for key, owner in owners.items():  # calls that are running meanwhile read one table or the other
            owner.sites, owner.inside = tables[key], frozenset(below[key])

    def _stand(self, wanted: dict[int, nn.Module], sites: dict[int, nn.Module]) -> None:
        """Have hooks at exactly the wanted modules."""
        for key in [key for key in self._handles if key not in wanted]:
            for handle in self._handles.pop(key)[1]:
                handle.remove()
        for key, module in wanted.items():
            if key in self._handles:
                continue
            handles: list[RemovableHandle] = []
            if key in sites:
                # a replaced forward gives its output before anybody's hooks change it
                handles.append(
                    module.register_forward_hook(_Hook(partial(self._after_site, key)), prepend=not BY_HOOKS)
                )
                if not BY_HOOKS:
                    handles.append(module.register_forward_pre_hook(_Hook(partial(self._before_site, key))))
            if key in self._owners:
                owner = self._owners[key]
                handles += [
                    module.register_forward_pre_hook(_Hook(owner.before), with_kwargs=True),
                    module.register_forward_hook(_Hook(owner.after), prepend=True, with_kwargs=True, always_call=True),
                ]
            elif isinstance(module, PreTrainedModel):
                handles.append(module.register_forward_pre_hook(_Hook(_at_inner_model), with_kwargs=True))
            self._handles[key] = module, handles

    def _before_site(self, site: int, _: nn.Module, args: tuple[Any, ...]) -> None:
        for record in records():
            for key, _index, takes_input in record.owner.sites.get(site, ()):
                if takes_input and key in record.keys:
                    record.begin(key, args)

    def _after_site(self, site: int, _: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        for record in records():
            for key, index, takes_input in record.owner.sites.get(site, ()):
                if key not in record.keys:
                    continue
                record.heard.add(site)
                if takes_input:
                    record.begin(key, args)
                value = output[index] if isinstance(output, tuple) else output
                if value is not None or not (isinstance(output, tuple) or key == "hidden_states"):
                    record.append(key, value)
        if self._running and not CALLS.get() and torch._C._current_graph_task_id() == -1:
            self._stray(site)

    def _stray(self, site: int) -> None:
        """Note that a thread outside every call reached a module."""
        with self._lock:
            for record in self._running:
                tasks = record.owner.sites.get(site, ())
                if site in record.owner.inside and any(name in record.keys for name, _, _ in tasks):
                    record.strays.add(site)


def _parts(model: nn.Module) -> list[nn.Module]:
    """List a model's modules: at each call that asks for anything, so faster than its generator does."""
    parts = [model]
    for part in parts:
        parts.extend(child for child in part._modules.values() if child is not None)
    return parts


def _at_inner_model(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Give a model that collects by itself what flags stand for."""
    return (args, unwrapped(kwargs)) if any(type(each) is Flag for each in kwargs.values()) else None


def _refuse_compiled(model: nn.Module) -> None:
    compiled = [name for name, module in model.named_modules() if is_compiled(module)]
    if compiled:
        raise CaptureError(
            refusal(
                type(model).__name__,
                found=f"compiled modules: {name_list(compiled)}",
                expected="modules that run as they are: compiled code ignores hooks",
                way_out="compile the whole model with torch.compile(model) instead, whose flags are transformers' own",
            )
        )


def thread_safe_outputs(model: nn.Module) -> FlagHandle:
    """Make the flags of a transformers model right in every thread, until the handle is closed.

    ``output_hidden_states``, ``output_attentions``, ``output_router_logits`` and whatever else the architecture
    declares, as arguments or in the configuration, give what transformers gives to one thread alone: same types, same
    entries, with ``return_dict=False``, under ``generate``, gradient checkpointing and `lading.offload` too. Without it
    transformers before 5.2 mixes threads up and leaves layers patched that hold tensors
    (https://github.com/huggingface/transformers/issues/42673), and later ones lose states silently while any other
    thread compiles anything.

    ``output_hidden_states`` may be a position or a list of positions among all hidden states, negative ones from the
    end: the others are None. That is the meaning since transformers 5.23, given here to transformers 4 too. Between
    them each release keeps its own: a number is True before 5.23; a list is True before 5.17, and from there to 5.22
    selects among what layers give, without the first layer's input and without negative positions. Models that collect
    in their own ``forward`` are right as they are, are left alone, and take a list for True.

    Args:
        model: a transformers model, or a module around some. One that needs nothing gets no hooks.

    Returns:
        A context manager. After its `FlagHandle.close` no hook, attribute or replaced method remains.

    Raises:
        CaptureError: no transformers model, compiled modules, or a model that has a handle; a recorder of outputs in a
            form that is not known here, or one that knows nothing of what a model declares. From a call of the model:
            modules compiled meanwhile, layers that another thread ran for it, a flag in the configuration of a model
            whose forward takes none.

    Any thread may call the model; install and close when nobody is inside. A model handed to ``torch.compile`` runs
    with transformers' own recorder while it is compiled. Outputs of methods other than ``forward`` stay transformers'.

    Example:
        >>> import torch, transformers
        >>> from lading.adapters.transformers import thread_safe_outputs
        >>> config = transformers.Qwen3Config(hidden_size=8, num_hidden_layers=2, intermediate_size=8, vocab_size=9,
        ...     num_attention_heads=2, num_key_value_heads=2, head_dim=4)
        >>> model = transformers.Qwen3Model(config)
        >>> with thread_safe_outputs(model):
        ...     output = model(torch.tensor([[1, 2, 3]]), output_hidden_states=[0, -1])
        >>> [None if each is None else list(each.shape) for each in output.hidden_states]
        [[1, 3, 8], None, [1, 3, 8]]
    """
    if not any(isinstance(each, PreTrainedModel) for each in model.modules()):
        raise CaptureError(
            refusal(
                type(model).__name__,
                found="no transformers model, nor one inside it",
                expected="a model of transformers, whose flags these are",
                way_out="use lading.capture",
            )
        )
    _refuse_compiled(model)
    if any(type(hook) is _Hook for each in model.modules() for hook in each._forward_pre_hooks.values()):
        raise CaptureError(
            refusal(
                type(model).__name__,
                found="flags that have a handle",
                expected="one handle at a time",
                way_out="close that one first",
            )
        )
    return FlagHandle(model)
