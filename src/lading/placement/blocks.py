"""Cut a module into blocks: the smallest units that move whole. Every parameter and buffer belongs to exactly one.

A block is a module of a class that must not be split; or a module that uses the weights of its children without calling
them (attention and fast-path layers of torch, parametrised modules); or a module whose children hold no tensor; or the
tensors that a split module holds itself. These last are pinned: no forward of their own tells when they are needed, so
they rest where the model runs and are never streamed. Blocks that share a tensor, by identity, by storage or by
declaration (`ties`), are one block, whose bytes are counted once.

Knows sizes and names; reads no value, so that a module on meta is as good as a real one.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn

from lading.errors import PlanError, name_list, refusal
from lading.placement.ties import declaration, declared_ties, input_embedding

_USES_ITS_CHILDREN = (nn.MultiheadAttention, nn.TransformerEncoderLayer)
_PLAIN = (nn.Parameter, torch.Tensor)
_SCALES = ("SCB", "quant_state", "state2")
"""Under which names a weight of bitsandbytes, or the state of one, keeps its scales."""
_CASTABLE = frozenset((torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.complex128))


class Block(NamedTuple):
    """One unit of placement. Immutable."""

    name: str
    """The first of ``keys``."""
    keys: tuple[str, ...]
    """Where it stands in a ``device_map``: module names, and the names of tensors that a split module holds itself."""
    weight_bytes: int
    """Its parameters, which leave the execution device between forwards when the block is streamed."""
    buffer_bytes: int
    """Its buffers, which stay on the execution device."""
    pinned_bytes: int
    """Tensors that a split module holds itself; they stay on the execution device too."""
    is_lookup: bool
    """An embedding table that shares its weight with nobody: rows can be gathered where it rests."""
    class_name: str
    fetch_bytes: int | None = None
    """What has to be on the execution device at once, where modules share tensors: the largest one's. None: all."""

    @property
    def total_bytes(self) -> int:
        """Count everything."""
        return self.weight_bytes + self.buffer_bytes + self.pinned_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockRules:
    """Say how a module is cut and what its tensors will weigh. Immutable."""

    no_split_classes: frozenset[str] = frozenset()
    dtype: torch.dtype | None = None
    """What floating-point parameters and persistent buffers are cast to on loading; None for their own dtype."""
    special_dtypes: Mapping[str, torch.dtype] = field(default_factory=dict)
    """The same for single tensors by name, ahead of ``dtype``."""
    special_bytes: Mapping[str, int] = field(default_factory=dict)
    """What single tensors by name will weigh, ahead of everything: quantised weights with their state."""


class _Part(NamedTuple):
    """What the walk finds before shared tensors join parts to blocks."""

    keys: tuple[str, ...]
    sizes: list[int]
    """Bytes of parameters, of buffers."""
    is_pinned: bool
    is_lookup: bool
    class_name: str
    borrowed: list[int]
    """The same for what another part has counted already."""


def blocks_of(module: nn.Module, rules: BlockRules) -> tuple[Block, ...]:
    """Cut a module into blocks, in the order of registration.

    Tensors may be on any device or on meta. Nothing is changed. Any thread, while nobody alters the module.
    """
    walk = _Walk(rules, declared_ties(module), module)
    walk.visit(module, "")
    return walk.join()


def declared_whole(module: nn.Module) -> frozenset[str]:
    """Collect the classes that a model and the models in it declare must not be split (``_no_split_modules``)."""
    names: set[str] = set()

    def collect(part: nn.Module) -> None:
        if type(part).__name__ not in names:
            names.update(declaration(part, "_no_split_modules") or ())
            for child in part._modules.values():
                if child is not None:
                    collect(child)

    collect(module)
    return frozenset(names)


class _Walk:
    """Collect the parts of one module tree, and who shares with whom. One thread."""

    def __init__(self, rules: BlockRules, aliases: Mapping[int, torch.Tensor], root: nn.Module) -> None:
        self._rules = rules
        self._aliases = aliases
        self._parts: list[_Part] = []
        self._owners: dict[int, tuple[int, int, int]] = {}  # a tensor -> the part it is counted in, bytes, kind
        self._shares: list[tuple[int, int]] = []
        self._spans: dict[int, tuple[int, int, int, int, int]] = {}  # real ones: from, to, part, kind, bytes counted
        self._borrowed = [0, 0]
        self._names_its_table = hasattr(type(root), "get_input_embeddings")
        self._table = input_embedding(root)
        self._weighs_by_name = bool(rules.special_dtypes or rules.special_bytes)

    def visit(self, module: nn.Module, path: str) -> bool:
        """Make parts of a module and what is below it; say whether it holds any tensor."""
        if type(module).__name__ in self._rules.no_split_classes or _is_one(module):
            return self._add_whole(module, path)
        position = len(self._parts)
        has_own = any(_own(module))
        if has_own:
            self._parts.append(None)  # type: ignore[arg-type] # its own tensors come before its children's
        prefix = f"{path}." if path else ""
        holds = [self.visit(child, prefix + name) for name, child in module._modules.items() if child is not None]
        if has_own:
            self._add_own(module, path, position, is_leaf=not any(holds))
        return has_own or any(holds)

    def _add_whole(self, module: nn.Module, path: str) -> bool:
        position, sizes = len(self._parts), [0, 0]
        self._borrowed = [0, 0]
        holds = self._gather(module, path, position, sizes)
        if holds:
            self._parts.append(_Part((path,), sizes, False, False, type(module).__name__, self._borrowed))
        return holds

    def _gather(self, module: nn.Module, path: str, position: int, sizes: list[int]) -> bool:
        holds = self._count(module, path, position, sizes)
        for name, child in module._modules.items():
            if child is not None and self._gather(child, f"{path}.{name}" if path else name, position, sizes):
                holds = True
        return holds

    def _add_own(self, module: nn.Module, path: str, position: int, *, is_leaf: bool) -> None:
        sizes = [0, 0]
        self._borrowed = [0, 0]
        is_pinned = not is_leaf or isinstance(module, (nn.ParameterList, nn.ParameterDict))
        self._count(module, path, position, sizes, is_pinned=is_pinned)
        prefix = f"{path}." if path else ""
        keys = (path,) if is_leaf else tuple(prefix + name for name in _own(module))
        is_lookup = is_leaf and self._is_lookup(module)
        self._parts[position] = _Part(keys, sizes, is_pinned, is_lookup, type(module).__name__, self._borrowed)

    def _is_lookup(self, module: nn.Module) -> bool:
        """Say whether a module gathers rows. A model that names its input table may read its other tables whole."""
        is_table = isinstance(module, nn.Embedding) and module.max_norm is None
        return is_table and (not self._names_its_table or module is self._table)

    def _count(self, module: nn.Module, path: str, position: int, sizes: list[int], *, is_pinned: bool = False) -> bool:
        """Add a module's own tensors to a part's sizes; note which of them another part has already.

        What a pinned part shares is counted there: it stays where the model runs, whoever else reads it.
        """
        holds = False
        both: tuple[Mapping[str, torch.Tensor | None], ...] = (module._parameters, module._buffers)
        for kind, tensors in enumerate(both):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                holds = True
                num_bytes = self._weigh(module, path, name, tensor, kind)
                identity = self._identify(tensor)
                owner, counted, first_kind = self._owners.setdefault(identity, (position, 0, kind))
                if owner != position:
                    self._shares.append((owner, position))
                    self._borrowed[kind] += num_bytes
                    if is_pinned and not self._parts[owner].is_pinned:
                        self._parts[owner].sizes[first_kind] -= counted
                        num_bytes, owner, counted = max(num_bytes, counted), position, 0
                if identity < 0 and owner == position and not counted:
                    self._spans[identity] = (-identity, tensor.nbytes - identity, position, kind, num_bytes)
                if num_bytes > counted:  # also where a view of the same storage was met first
                    self._owners[identity] = owner, num_bytes, kind
                    (sizes if owner == position else self._parts[owner].sizes)[kind] += num_bytes - counted
        return holds

    def _identify(self, tensor: torch.Tensor) -> int:
        if self._aliases:
            tensor = self._aliases.get(id(tensor), tensor)
        if tensor.is_meta and type(tensor) is torch.Tensor and tensor.layout is torch.strided:
            address: int = tensor.untyped_storage()._cdata  # buffers share by it; of parameters loading parts it again
            return address if not tensor.storage_offset() else id(tensor)
        if tensor.is_meta or tensor.layout is not torch.strided:
            return id(tensor)
        try:
            return -tensor.data_ptr() or id(tensor)  # negative: no id is
        except RuntimeError:  # a subclass without storage, such as a fake tensor
            return id(tensor)

    def _weigh(self, module: nn.Module, path: str, name: str, tensor: torch.Tensor, kind: int) -> int:
        rules = self._rules
        dtype = rules.dtype
        if self._weighs_by_name:
            full_name = f"{path}.{name}" if path else name
            if full_name in rules.special_bytes:
                return rules.special_bytes[full_name]
            special = rules.special_dtypes.get(full_name)
            if special is not None:
                return tensor.numel() * special.itemsize
        if type(tensor) not in _PLAIN:
            state = state_bytes(tensor, module)
            if state:
                return tensor.nbytes + state
        if dtype is None or tensor.dtype is dtype or tensor.dtype not in _CASTABLE:
            return tensor.nbytes
        if kind == 1 and name in module._non_persistent_buffers_set:
            return tensor.nbytes  # not in a checkpoint, so not cast on loading
        return tensor.numel() * dtype.itemsize

    def join(self) -> tuple[Block, ...]:
        """Join the parts that share tensors, each at the place of its first part."""
        self._share_overlaps()
        leaders = list(range(len(self._parts)))

        def leader(position: int) -> int:
            while leaders[position] != position:
                position = leaders[position]
            return position

        for one, other in self._shares:
            low, high = sorted((leader(one), leader(other)))
            leaders[high] = low
        shared: dict[int, list[_Part]] = {}
        if self._shares:
            for position, part in enumerate(self._parts):
                shared.setdefault(leader(position), []).append(part)
        return tuple(
            _single(part) if len(shared.get(position, ())) < 2 else _joined(shared[position])
            for position, part in enumerate(self._parts)
            if leaders[position] == position
        )

    def _share_overlaps(self) -> None:
        """Find views that lie inside another tensor's bytes; these are counted there."""
        end, holder = 0, -1
        spans = sorted(self._spans.values(), key=lambda span: (span[0], -span[1]))
        for start, stop, position, kind, num_bytes in spans:
            if start < end:
                self._shares.append((holder, position))
                self._parts[position].sizes[kind] -= num_bytes * (min(stop, end) - start) // (stop - start)
            if stop > end:
                end, holder = stop, position


def _own(module: nn.Module) -> list[str]:
    parameters = [name for name, tensor in module._parameters.items() if tensor is not None]
    return parameters + [name for name, tensor in module._buffers.items() if tensor is not None]


def _is_one(module: nn.Module) -> bool:
    return isinstance(module, _USES_ITS_CHILDREN) or "parametrizations" in module._modules


def _single(part: _Part) -> Block:
    weights, buffers = part.sizes
    if part.is_pinned:
        return Block(part.keys[0], part.keys, 0, 0, weights + buffers, False, part.class_name)
    return Block(part.keys[0], part.keys, weights, buffers, 0, part.is_lookup, part.class_name)


def _joined(parts: Sequence[_Part]) -> Block:
    keys = tuple(key for part in parts for key in part.keys)
    movable = [part for part in parts if not part.is_pinned]
    if not movable:
        return Block(keys[0], keys, 0, 0, sum(sum(part.sizes) for part in parts), False, parts[0].class_name)
    weights = sum(part.sizes[0] for part in movable)
    buffers = sum(part.sizes[1] for part in movable)
    pinned = sum(sum(part.sizes) for part in parts if part.is_pinned)
    fetched = min(weights, max(part.sizes[0] + part.borrowed[0] for part in movable))
    return Block(keys[0], keys, weights, buffers, pinned, False, parts[0].class_name, fetched)


def state_bytes(weight: torch.Tensor, module: nn.Module) -> int:
    """Count what bitsandbytes keeps beside a quantised weight: row scales (``SCB``), or 4-bit scales, nested once.

    The first forward of a ``Linear8bitLt`` moves the scales from the weight to the module's own ``state``.

    Raises:
        PlanError: a weight that bitsandbytes quantised, and no scales.
    """
    size = _scale_bytes(weight) or _scale_bytes(vars(module).get("state"))
    is_quantised = type(weight).__module__.startswith("bitsandbytes.") and weight.dtype in (torch.int8, torch.uint8)
    if size or not is_quantised or weight.is_meta:
        return size
    raise PlanError(
        refusal(
            f"a {type(weight).__name__} of {list(weight.shape)} in a {type(module).__name__}",
            found="a quantised weight without scales",
            expected=f"scales under one of {name_list(_SCALES)}",
            way_out="plan with the bitsandbytes of lading's requirements/constraints-t5.txt",
        )
    )


def _scale_bytes(holder: Any) -> int:
    total = 0
    for name in _SCALES:
        state = getattr(holder, "__dict__", {}).get(name)  # a 4-bit weight answers for the attributes of its state too
        if isinstance(state, torch.Tensor):
            total += state.nbytes
        elif state is not None:
            own = (value for value in vars(state).values() if isinstance(value, torch.Tensor))
            total += sum(tensor.nbytes for tensor in own) + _scale_bytes(state)
    return total


def in_order(blocks: Sequence[Block], called: Collection[str]) -> tuple[Block, ...]:
    """Sort blocks by when their modules are first called; those never called follow in their own order.

    Args:
        blocks: from `blocks_of`.
        called: module names in the order of their first call, as a trace gives them.
    """
    first = {name: position for position, name in enumerate(called)}
    last = len(first)

    def when(block: Block) -> int:
        is_own = not (block.weight_bytes or block.buffer_bytes)
        names = [key.rpartition(".")[0] if is_own else key for key in block.keys]
        return min(first.get(name, last) for name in names)

    return tuple(sorted(blocks, key=when))
