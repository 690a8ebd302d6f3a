"""Run a module's forward without the memory of its weights; see what it calls and what it would allocate.

A copy of the module runs on fake tensors of the CPU (`torch._subclasses.FakeTensorMode`): they have shapes, strides,
storages and lifetimes, but no numbers. What depends on token ids, positions and shapes alone is small and is computed
for real, so that code which asks "is anything masked?" gets its answer. What depends on weights is unknown. Where it
chooses (top-k, argmax), the first are chosen: all tokens go to the same experts, as many as one expert can ever get.
Where it decides a size, every position counts; where it decides which code runs, the trace is refused. Attention
through torch's `scaled_dot_product_attention` never holds its scores, as on accelerators.

Guarantees: the caller's module is not called, changed or referenced; its hooks do not run. Bytes are counted by
storage from birth to death; what a kernel allocates and frees inside one call is not seen. Knows no architecture.

Thread rule: one thread for each trace; modes of torch act on the thread that entered them.
"""

from __future__ import annotations

import copy
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import (
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lading.errors import PlanError, refusal

_MOST_COMPUTED = 2**22
"""Elements up to which a tensor that depends on no weight is computed for real."""
_MOST_CHOSEN = 2**16
"""Elements up to which choices are made up: torch sorts them slowly."""
_aten = torch.ops.aten
_NEVER_LARGER = frozenset({_aten._local_scalar_dense.default, _aten.nonzero.default})


@dataclass(slots=True, eq=False)
class Allocation:
    """One storage of a traced forward, known by identity."""

    num_bytes: int
    owner: str
    """The innermost module that made it; where that is a container of the first module to use it, the latter."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """What one forward did."""

    call_order: tuple[str, ...]
    """Names of the modules in the order in which they were first called; '' is the root."""
    output: Any
    """The forward's result, of fake tensors; it keeps their allocations alive."""
    events: tuple[tuple[Allocation, int], ...]
    """Allocations as they were born (+1) and died (-1); first those that were alive before."""

    def peak_bytes(self, *reserved: tuple[Iterable[Allocation], int]) -> int:
        """Return the most bytes alive at once, beyond weights and beyond what is reserved for some allocations.

        Args:
            reserved: allocations, and the bytes that are counted elsewhere for all of them together.
        """
        pools = {allocation: pool for pool, (allocations, _) in enumerate(reserved, 1) for allocation in allocations}
        room, live, peak = [0, *(num_bytes for _, num_bytes in reserved)], [0] * (len(reserved) + 1), 0
        for allocation, change in self.events:
            live[pools.get(allocation, 0)] += change * allocation.num_bytes
            peak = max(peak, sum(max(0, have - free) for have, free in zip(live, room, strict=True)))
        return peak


class Tracer:
    """Run forwards of a module's weightless copy; made by `tracing`."""

    def __init__(self, module: nn.Module, watch: _Watch) -> None:
        self.module, self._watch = module, watch

    def forward(self, *args: Any, **kwargs: Any) -> Trace:
        """Run one forward; make the inputs inside ``with tracing``.

        Raises:
            PlanError: the forward fails, or numbers that nobody knows decide which code runs.
        """
        watch = self._watch
        watch.events = [(allocation, 1) for allocation in watch.live.values()]
        watch.order, watch.path = {}, [""]
        try:
            output = self.module(*args, **kwargs)
        except Exception as error:
            reason = f"{type(error).__name__}: {str(error).strip()[:300]}"
            raise PlanError(
                refusal(
                    f"{type(self.module).__name__}, module {watch.path[-1]!r}",
                    found=f"a forward that cannot run without weights ({reason})",
                    expected="one that shapes, token ids and positions alone decide",
                    way_out="plan in the modules' own order and state the memory in max_memory instead",
                )
            ) from error
        return Trace(call_order=tuple(watch.order), output=output, events=tuple(watch.events))

    def allocations(self, tensors: Iterable[torch.Tensor]) -> dict[Allocation, torch.dtype]:
        """Return the storages behind tensors that a forward gave, each with the type of its elements."""
        found = ((self._watch.live.get(tensor.untyped_storage()._cdata), tensor.dtype) for tensor in tensors)
        return {allocation: dtype for allocation, dtype in found if allocation is not None}


@contextmanager
def tracing(module: nn.Module) -> Iterator[Tracer]:
    """Make a weightless copy of a module, in evaluation mode, to be called inside this context.

    >>> with tracing(nn.Linear(4, 8)) as tracer:
    ...     tracer.forward(torch.zeros(2, 4)).peak_bytes()  # the input and the output, float32
    96
    """
    watch = _Watch()
    with torch.device("cpu"), torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
        twin = _weightless(module)
        watch.weights = {storage._cdata: storage for storage in map(torch.Tensor.untyped_storage, _tensors(twin))}
        for name, part in twin.named_modules():
            part.register_forward_pre_hook(_entering(watch, name))
            part.register_forward_hook(_leaving(watch))
        with _Fused(), watch:
            yield Tracer(twin.eval(), watch)


def _tensors(module: nn.Module) -> Iterator[torch.Tensor]:
    yield from module.parameters()
    for part in module.modules():
        yield from (value for value in {**part._buffers, **vars(part)}.values() if isinstance(value, torch.Tensor))


def _weightless(module: nn.Module) -> nn.Module:
    """Copy a module, its parameters and large buffers fake, its small buffers real, its hooks left out."""
    memo: dict[int, Any] = {}
    for tensor in _tensors(module):
        if isinstance(tensor, nn.Parameter) or tensor.is_meta or tensor.numel() > _MOST_COMPUTED:
            fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
            memo[id(tensor)] = nn.Parameter(fake, requires_grad=False) if isinstance(tensor, nn.Parameter) else fake
        else:
            with unset_fake_temporarily():
                memo[id(tensor)] = tensor.detach().clone().cpu()
    for part in module.modules():
        for key, value in vars(part).items():
            if key.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called")) and isinstance(value, dict):
                memo[id(value)] = OrderedDict()
    try:
        with unset_fake_temporarily():
            twin = copy.deepcopy(module, memo)
    except Exception as error:
        raise PlanError(
            refusal(
                type(module).__name__,
                found=f"a module that cannot be copied ({type(error).__name__}: {error})",
                expected="one that copy.deepcopy takes",
                way_out="plan before anything is attached to the module",
            )
        ) from error
    for part in twin.modules():  # whose code would not attach its hooks again
        vars(part).update((key, False) for key in tuple(vars(part)) if key.endswith("_hooks_installed"))
        if type(part)._apply is nn.Module._apply:
            vars(part)["_apply"] = partial(_convert, part)
    return twin


def _convert(part: nn.Module, change: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
    """Do what ``.to`` does to a module, for code that casts itself inside forward.

    torch would swap a fake parameter's content with the new one's, which it refuses while weak references to either
    exist; its own fake mode keeps some, to those tensors alone that it made on the first call of a kind in a process.
    """
    for child in part.children() if recurse else ():
        child._apply(change)  # type: ignore[no-untyped-call]
    for name, tensor in part._parameters.items():
        if tensor is not None and (changed := change(tensor)) is not tensor:
            part._parameters[name] = nn.Parameter(changed, requires_grad=False)
    part._buffers.update((name, change(tensor)) for name, tensor in part._buffers.items() if tensor is not None)
    return part


def _entering(watch: _Watch, name: str) -> Callable[..., None]:
    def enter(*_: Any) -> None:
        watch.order.setdefault(name)
        watch.path.append(name)

    return enter


def _leaving(watch: _Watch) -> Callable[..., None]:
    def leave(*_: Any) -> None:
        watch.path.pop()

    return leave


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """See every call below autograd: compute what is known, bound what is not, note storages."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.weights: dict[int, torch.UntypedStorage] = {}
        self.live: dict[int, Allocation] = {}
        self.events: list[tuple[Allocation, int]] = []
        self.order: dict[str, None] = {}
        self.path = [""]
        self._watched: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._overwritten: set[int] = set()  # real storages into which something unknown was written

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:
            return func(*args, **kwargs)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if any(map(self._is_unknown, tensors)):
            result = self._shape(func, args, kwargs)
        else:
            result = self._compute(func, args, kwargs)
        for tensor in tensors:
            self._claim(tensor)
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._note(leaf)
        return result

    def _is_unknown(self, tensor: torch.Tensor) -> bool:
        return isinstance(tensor, FakeTensor) or tensor.untyped_storage()._cdata in self._overwritten

    def _compute(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call for real where the result is small and not drawn at random."""
        is_drawn = torch.Tag.nondeterministic_seeded in func.tags
        if func._schema.is_mutable and is_drawn:
            return self._overwrite(func, args, kwargs, args[0])
        if not (func._schema.is_mutable or func.is_view or func in _NEVER_LARGER):  # on shapes, torch would write twice
            try:
                shaped = func(*args, **kwargs)
            except DynamicOutputShapeException:
                shaped = None
            size = max((leaf.numel() for leaf in tree_leaves(shaped) if isinstance(leaf, torch.Tensor)), default=0)
            if is_drawn or size > _MOST_COMPUTED:
                return shaped
        with unset_fake_temporarily():
            return func(*args, **kwargs)

    def _shape(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call on shapes alone; where numbers decide a size, every position counts as chosen."""
        if func is _aten.nonzero.default:
            return _positions(args[0])
        if func is _aten.masked_select.default:
            both = torch.broadcast_shapes(args[0].shape, args[1].shape)  # type: ignore[no-untyped-call]
            return args[0].new_empty(both.numel())
        if func is _aten.index.Tensor:
            args = (args[0], [column for index in args[1] for column in self._columns(index)])
        if func.name() == "aten::_grouped_mm" and (args[0].dim(), args[1].dim()) == (2, 3):
            return args[0].new_empty(args[0].shape[0], args[1].shape[2])  # torch's own rule takes bfloat16 alone
        result = self._overwrite(func, args, kwargs, func(*args, **kwargs))
        if func is _aten.argmax.default:
            return _first(result, 1, 0)
        if func is _aten.topk.default:
            return type(result)((result[0], _first(result[1], args[1], args[2] if len(args) > 2 else -1)))
        return result

    def _columns(self, index: Any) -> tuple[Any, ...]:
        """Turn a mask into the positions that it chooses, one tensor a dimension."""
        if not isinstance(index, torch.Tensor) or index.dtype not in (torch.bool, torch.uint8):
            return (index,)
        if self._is_unknown(index):
            return _positions(index).unbind(1)
        with unset_fake_temporarily():
            return index.nonzero().unbind(1)

    def _overwrite(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Any:
        """Remember that a call on shapes left real tensors with the wrong numbers; give what the call gives."""
        written = [
            kwargs[taken.name] if taken.name in kwargs else args[place]
            for place, taken in enumerate(func._schema.arguments)
            if taken.is_write and (taken.name in kwargs or place < len(args))
        ]
        for tensor in written:
            if isinstance(tensor, torch.Tensor) and not isinstance(tensor, FakeTensor):
                self._note(tensor)
                self._overwritten.add(tensor.untyped_storage()._cdata)
        return written[0] if len(written) == 1 and isinstance(result, torch.Tensor) else result

    def _note(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.live or key in self.weights:
            return
        allocation = self.live[key] = Allocation(storage.nbytes(), self.path[-1])
        self.events.append((allocation, 1))

        def die(_: Any) -> None:
            del self.live[key], self._watched[key]
            self._overwritten.discard(key)
            self.events.append((allocation, -1))

        self._watched[key] = weakref.ref(storage, die)

    def _claim(self, tensor: torch.Tensor) -> None:
        """Let the first module inside the owner that uses an allocation own it: caches are often made above layers."""
        allocation, user = self.live.get(tensor.untyped_storage()._cdata), self.path[-1]
        if allocation is not None and user.startswith(f"{allocation.owner}." if allocation.owner else user[:1] or "."):
            allocation.owner = user


def _positions(mask: torch.Tensor) -> torch.Tensor:
    """Return the coordinates of every element: what `nonzero` gives at most."""
    if mask.numel() > _MOST_COMPUTED:
        return torch.empty(mask.numel(), mask.dim(), dtype=torch.long)
    with unset_fake_temporarily():
        return torch.ones(mask.shape, dtype=torch.bool, device="cpu").nonzero()


def _first(chosen: torch.Tensor, count: int, dim: int) -> torch.Tensor:
    """Let the first be chosen."""
    if chosen.numel() > _MOST_CHOSEN:
        return chosen
    with unset_fake_temporarily():
        first = torch.arange(count).reshape(-1, *[1] * ((chosen.dim() or 1) - 1 - dim % (chosen.dim() or 1)))
        return first.expand(chosen.shape).clone() if chosen.dim() else first[0]


class _Fused(TorchFunctionMode):
    """Give attention whose values have another width than its keys its result alone: the CPU's kernel takes none."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if (
            func is nn.functional.scaled_dot_product_attention
            and len(args) == 3
            and args[1].shape[-1] != args[2].shape[-1]
        ):
            return args[0].new_empty(*args[0].shape[:-1], args[2].shape[-1])
        return func(*args, **(kwargs or {}))
