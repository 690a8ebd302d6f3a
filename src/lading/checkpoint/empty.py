"""Build a module without its parameters' memory, and remember how each would have been initialised.

Inside ``with lading.empty():`` calls that only reserve or draw numbers (``torch.empty``, ``torch.rand*``,
``torch.nn.init``) make tensors on ``meta``; parameters made in any other way (``torch.zeros``, ``torch.ones``, computed
ones) go to meta when they are registered. Buffers stay real, because no checkpoint has the non-persistent ones.

What was skipped is written on a tape: the calls whose results, views or targets are on meta. Replaying the part of the
tape that a tensor depends on makes the value the module's own code would have given it; that is how a name missing from
a checkpoint is initialised with ``strict=False``, and how a drawn buffer becomes real. Tensors are known on the tape by
their storage, so that parameters, ``.data`` and views of one tensor are one thing (the idea of deferred initialisation:
torchdistX, "Deferred Module Initialization").

Thread rule: one thread. The context acts on the thread that entered it; others build their modules as usual.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as nn_module
from torch.overrides import TorchFunctionMode
from torch.utils._device import DeviceContext
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakIdKeyDictionary

_RESERVES = frozenset(
    {torch.empty, torch.empty_like, torch.empty_strided, torch.Tensor.new_empty, torch.Tensor.new_empty_strided}
    | {torch.rand, torch.rand_like, torch.randn, torch.randn_like, torch.randint, torch.randint_like, torch.randperm}
)
_INITS = frozenset(
    function
    for name, function in vars(nn.init).items()
    if name.endswith("_") and not name.startswith("_") and callable(function)
)
_RECIPE = "_lading_recipe"


@dataclass(slots=True)
class _Step:
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Any
    touched: set[int]
    """The storages that this call made or wrote to."""


@dataclass(slots=True)
class Tape:
    """Keep the calls whose work was skipped, in order."""

    steps: list[_Step] = field(default_factory=list)

    def record(self, function: Callable[..., Any], args: Any, kwargs: Any, result: Any) -> None:
        """Add a call. Its first argument counts as written to when the function's name says so."""
        touched = {_storage(tensor) for tensor in _metas(result)}
        if _writes(function, kwargs):
            touched |= {_storage(tensor) for tensor in _metas((args[:1], kwargs))}
        if touched:
            self.steps.append(_Step(function, args, kwargs, result, touched))

    def replay(self, tensors: Iterable[torch.Tensor]) -> list[torch.Tensor]:
        """Make real tensors of meta ones, on the CPU, drawing from torch's global generator."""
        targets = list(tensors)
        wanted = {_storage(tensor) for tensor in targets}
        needed: list[_Step] = []
        for step in reversed(self.steps):
            if step.touched & wanted:
                needed.append(step)
                wanted |= {_storage(tensor) for tensor in _metas((step.args, step.kwargs))}
        storages: dict[int, torch.UntypedStorage] = {}

        def real(leaf: Any) -> Any:
            if not (isinstance(leaf, torch.Tensor) and leaf.is_meta):
                return leaf
            view = torch.empty(0, dtype=leaf.dtype)
            return view.set_(storages[_storage(leaf)], leaf.storage_offset(), leaf.shape, leaf.stride())

        with torch.no_grad():
            for step in reversed(needed):
                args, kwargs = tree_map(real, (step.args, step.kwargs))
                result = step.function(*args, **kwargs)
                for made, value in zip(tree_leaves(step.result), tree_leaves(result), strict=False):
                    if isinstance(made, torch.Tensor) and made.is_meta:
                        storages.setdefault(_storage(made), value.untyped_storage())
            return [real(tensor.detach()) for tensor in targets]


def _metas(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor) and leaf.is_meta]


def _storage(tensor: torch.Tensor) -> int:
    identity: int = tensor.untyped_storage()._cdata
    return identity


def _writes(function: Callable[..., Any], kwargs: dict[str, Any]) -> bool:
    name = getattr(function, "__name__", "")
    in_place = name.endswith("_") and not name.endswith("__")
    return in_place or name == "__setitem__" or (name.startswith("__i") and name.endswith("__")) or "out" in kwargs


class _EmptyMode(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.tape = Tape()
        self.moved: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _RESERVES:
            result = func(*args, **{**kwargs, "device": "meta"})
            self.tape.record(func, args, kwargs, result)
            return result
        metas = _metas((args, kwargs))
        if not metas:
            return func(*args, **kwargs)
        if func in _INITS:
            target = args[0] if args else kwargs["tensor"]
            self.tape.record(func, args, kwargs, target)
            return target
        if any(isinstance(leaf, torch.Tensor) and not leaf.is_meta for leaf in tree_leaves((args, kwargs))):
            return self._mixed(func, args, kwargs)
        try:
            result = func(*args, **kwargs)
        except (NotImplementedError, RuntimeError):  # needs the numbers, like .item()
            return self._for_real(func, args, kwargs)
        self.tape.record(func, args, kwargs, result)
        return result

    def _mixed(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call with both real and meta tensors; torch answers some of these with garbage instead of an error."""
        if _writes(func, kwargs) and args and isinstance(args[0], torch.Tensor) and args[0].is_meta:
            frozen = tree_map(lambda leaf: leaf.clone() if _is_real(leaf) else leaf, args[1:])
            self.tape.record(func, (args[0], *frozen), kwargs, None)
            return args[0]
        return self._for_real(func, args, kwargs)

    def _for_real(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        metas = _metas((args, kwargs))
        values = {id(meta): value for meta, value in zip(metas, self.tape.replay(metas), strict=True)}
        args, kwargs = tree_map(lambda leaf: values.get(id(leaf), leaf), (args, kwargs))
        return func(*args, **kwargs)

    def on_parameter(self, module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        """Send a real parameter to meta as it is registered; returns None where it may stay."""
        if type(parameter) is not nn.Parameter:
            return None
        if parameter.is_meta:
            setattr(parameter, _RECIPE, self.tape)
            return None
        if parameter not in self.moved:
            empty = nn.Parameter(parameter.data.to("meta"), requires_grad=parameter.requires_grad)
            function, value = _constant(parameter.data)
            self.tape.record(function, value, {}, empty)
            setattr(empty, _RECIPE, self.tape)
            self.moved[parameter] = empty
        moved: nn.Parameter = self.moved[parameter]
        return moved

    def on_module(self, module: nn.Module, name: str, child: nn.Module | None) -> None:
        """Mark the parameters of a child that came ready made, such as a deepcopy of a layer built before."""
        for parameter in child.parameters() if child is not None else ():
            if parameter.is_meta and not hasattr(parameter, _RECIPE):
                setattr(parameter, _RECIPE, self.tape)

    def on_buffer(self, module: nn.Module, name: str, buffer: torch.Tensor | None) -> torch.Tensor | None:
        """Make a drawn buffer real as it is registered."""
        if buffer is None or not buffer.is_meta:
            return None
        if isinstance(buffer, nn.UninitializedBuffer):  # a lazy module's: it has no numbers yet
            return nn.UninitializedBuffer(device="cpu", dtype=buffer.dtype)  # type: ignore[call-arg]  # torch's stub
        return self.tape.replay([buffer])[0]


def _is_real(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and not leaf.is_meta


def _constant(value: torch.Tensor) -> tuple[Callable[..., torch.Tensor], tuple[Any, ...]]:
    """Remember a real parameter's value: by one number where all its elements are equal, else by a copy."""
    flat = value.reshape(-1)
    if flat.numel() > 1 and bool((flat == flat[0]).all()):
        first = flat[0].clone()
        return (lambda number, shape: number.expand(shape).clone()), (first, value.shape)
    return torch.clone, (value.clone(),)


class MetaWithoutInits(DeviceContext):
    """Make all new tensors on meta, as ``torch.device("meta")`` does, and skip every ``torch.nn.init`` call on one.

    Such a call does nothing, and all of them together take as long as building the module.
    """

    def __init__(self) -> None:
        super().__init__("meta")

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _INITS:
            target = args[0] if args else (kwargs or {})["tensor"]
            if target.is_meta:
                return target
        return super().__torch_function__(func, types, args, kwargs)  # type: ignore[no-untyped-call]


@contextmanager
def empty() -> Iterator[None]:
    """Build modules whose parameters take no memory and whose buffers are real.

    Fill them with `lading.load_into`. Modules are built by this thread only; nothing outlasts the context but the
    recipes on the empty parameters, which go with them.

    Example:
        >>> import lading, torch
        >>> with lading.empty():
        ...     layer = torch.nn.Linear(4096, 4096)
        >>> layer.weight.device.type, layer.weight.shape
        ('meta', torch.Size([4096, 4096]))
    """
    mode = _EmptyMode()
    owner = threading.get_ident()

    def here(hook: Callable[..., Any]) -> Callable[..., Any]:
        return lambda module, name, value: (
            _without_mode(hook, module, name, value) if threading.get_ident() == owner else None
        )

    handles = [
        nn_module.register_module_parameter_registration_hook(here(mode.on_parameter)),
        nn_module.register_module_buffer_registration_hook(here(mode.on_buffer)),
        nn_module.register_module_module_registration_hook(here(mode.on_module)),
    ]
    try:
        with mode:
            yield
    finally:
        for handle in handles:
            handle.remove()


def _without_mode(hook: Callable[..., Any], *arguments: Any) -> Any:
    with torch._C.DisableTorchFunction():
        return hook(*arguments)


def initialise(parameters: Iterable[torch.Tensor]) -> list[torch.Tensor | None]:
    """Make the initial values of parameters built inside `empty`; None for one that has no recipe."""
    listed = list(parameters)
    values: list[torch.Tensor | None] = [None] * len(listed)
    tapes = {id(tape): tape for p in listed if (tape := getattr(p, _RECIPE, None)) is not None}
    for tape in tapes.values():
        places = [index for index, parameter in enumerate(listed) if getattr(parameter, _RECIPE, None) is tape]
        for index, value in zip(places, tape.replay(listed[index] for index in places), strict=True):
            values[index] = value
    return values


def is_recipe(attribute: str) -> bool:
    """Say whether an attribute of a parameter is this file's own, to be left behind when the parameter is replaced."""
    return attribute == _RECIPE
