"""Interpret the pickle inside a file of torch.save: dicts, numbers, texts and *descriptions* of tensors, nothing else.

Nothing that a pickle names is looked up, imported or called. The few functions by which torch.save describes tensors
are known here by name; whatever else a pickle names becomes a `Placeholder`, which remembers that name and swallows
what the pickle would do with it. Whether a file with placeholders in it is any use, the caller decides.

The bounds that hold for hostile pickles: nothing is allocated by a number in the file; nothing is hashed but texts and
identities, since hashing tuples that share their parts takes time without end; the state that a pickle sets on an
object is dropped, and only taken for what may have one: set on anything else it would change this process; no message
shows an object of the file. Time and memory are those of its opcodes, each a constant or its own length. Imports no
torch.
"""

from __future__ import annotations

import pickle
import struct
from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol

from lading.checkpoint.dtypes import ELEMENT_TYPES, ElementType

_STORAGE_KINDS = {
    "FloatStorage": "F32",
    "DoubleStorage": "F64",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "LongStorage": "I64",
    "IntStorage": "I32",
    "ShortStorage": "I16",
    "CharStorage": "I8",
    "ByteStorage": "U8",
    "BoolStorage": "BOOL",
    "ComplexFloatStorage": "C64",
    "ComplexDoubleStorage": "C128",
    "UntypedStorage": "U8",
}
_BY_TORCH_NAME = {element.torch_name: element for element in ELEMENT_TYPES.values() if element.torch_name}
_REFUSED = (pickle.EXT1, pickle.EXT2, pickle.EXT4, pickle.NEXT_BUFFER, pickle.READONLY_BUFFER)
"""Opcodes that reach for this process's registry of extensions, or for buffers that no file has."""


@dataclass(frozen=True, slots=True)
class StorageRecord:
    """Describe one storage. Immutable."""

    key: str
    element: ElementType
    num_elements: int


@dataclass(frozen=True, slots=True)
class TensorRecord:
    """Describe one tensor. Immutable."""

    storage: StorageRecord
    element: ElementType
    storage_offset: int
    """In elements."""
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    is_conj: bool = False
    is_neg: bool = False


_MAX_DIMENSIONS = 255


class Placeholder:
    """Stand for something that a pickle names, or for what it made of that; does nothing. Hashed by its identity."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name


@dataclass(frozen=True, slots=True, kw_only=True)
class Interpreted:
    """What one pickle says. Immutable."""

    content: Any
    foreign: tuple[str, ...]
    """What it names besides tensors, in order."""
    storages: Mapping[str, StorageRecord]
    """Each storage by its key."""


class Readable(Protocol):
    """Give bytes, and no more than there are: ``read`` allocates first."""

    def read(self, count: int, /) -> bytes:
        """Give at most so many bytes."""

    def readline(self) -> bytes:
        """Give the bytes up to the next line end."""


def interpret(file: Readable) -> Interpreted:
    """Interpret the pickle that begins where ``file`` stands, and leave ``file`` behind it.

    Raises:
        Exception: of many kinds, where the bytes are not what torch.save writes.
    """
    reader = _TableReader(file)
    content = reader.load()
    return Interpreted(content=content, foreign=tuple(reader.foreign), storages=reader.storages)


class _TableReader(pickle._Unpickler):
    """Interpret a pickle's opcodes; the pure Python base, because the C one allocates by numbers in the file.

    Keys of a dict that are no texts become placeholders: what they were nobody needs to know.
    """

    dispatch: ClassVar[dict[int, Any]] = {
        code: step for code, step in pickle._Unpickler.dispatch.items() if bytes([code]) not in _REFUSED
    }

    stack: list[Any]
    append: Callable[[Any], None]
    read: Callable[[int], bytes]
    readline: Callable[[], bytes]
    pop_mark: Callable[[], list[Any]]

    def __init__(self, file: Any) -> None:
        super().__init__(file)
        self.foreign: dict[str, None] = {}
        self.storages: dict[str, StorageRecord] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _CALLABLES:
            return _CALLABLES[module, name]
        if module in ("torch", "torch.storage") and name in _STORAGE_KINDS:
            return ELEMENT_TYPES[_STORAGE_KINDS[name]]
        if module == "torch" and name in _BY_TORCH_NAME:
            return _BY_TORCH_NAME[name]
        self.foreign[f"{module}.{name}"[:200]] = None
        return Placeholder(f"{module}.{name}"[:200])

    def persistent_load(self, pid: Any) -> StorageRecord | Placeholder:
        for part in pid:  # a class with its source, or a storage of elements that torch has and a checkpoint has not
            if isinstance(part, Placeholder):
                return part
        kind, element, key, _location, num_elements, *view = pid
        if kind != "storage" or not isinstance(element, ElementType):
            raise ValueError("a persistent id that is no storage")
        if any(part is not None for part in view):
            raise ValueError("a storage that is a view of another, as torch before 0.4 wrote them")
        record = StorageRecord(_text(key), element, _natural(num_elements))
        self.storages[record.key] = record
        return record

    def load_reduce(self) -> None:
        arguments = self.stack.pop()
        called = self.stack[-1]
        self.stack[-1] = called if isinstance(called, Placeholder) else called(*arguments)

    def load_newobj(self) -> None:
        self._make(arguments=1)

    def load_newobj_ex(self) -> None:
        self._make(arguments=2)

    def _make(self, arguments: int) -> None:
        del self.stack[-arguments:]
        self.stack[-1] = _instance(self.stack[-1])

    def load_inst(self) -> None:
        module, name = (self.readline()[:-1].decode("ascii") for _ in range(2))
        self.pop_mark()
        self.append(_instance(self.find_class(module, name)))

    def load_obj(self) -> None:
        self.append(_instance(self.pop_mark()[0]))

    def load_build(self) -> None:
        self.stack.pop()
        if type(self.stack[-1]) not in (OrderedDict, Placeholder):
            raise TypeError(f"state for a {type(self.stack[-1]).__name__}")

    def load_dict(self) -> None:
        items = self.pop_mark()
        self.append({})
        self._set(items)

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set([key, value])

    def load_setitems(self) -> None:
        self._set(self.pop_mark())

    def _set(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, Placeholder):
            return
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[key if type(key) is str else Placeholder(f"a key that is a {type(key).__name__}")] = value

    def load_append(self) -> None:
        self._extend([self.stack.pop()])

    def load_appends(self) -> None:
        self._extend(self.pop_mark())

    def _extend(self, items: list[Any]) -> None:
        if not isinstance(self.stack[-1], Placeholder):
            self.stack[-1].extend(items)

    def load_empty_set(self) -> None:
        self.append(Placeholder("builtins.set"))

    def load_additems(self) -> None:
        self.pop_mark()
        if not isinstance(self.stack[-1], Placeholder):
            raise TypeError(f"items for a {type(self.stack[-1]).__name__}")

    def load_frozenset(self) -> None:
        self.pop_mark()
        self.append(Placeholder("builtins.frozenset"))

    def load_bytearray8(self) -> None:
        (num_bytes,) = struct.unpack("<Q", self.read(8))
        self.read(num_bytes)
        self.append(Placeholder("builtins.bytearray"))

    dispatch |= {
        code[0]: step
        for code, step in (
            (pickle.REDUCE, load_reduce),
            (pickle.NEWOBJ, load_newobj),
            (pickle.NEWOBJ_EX, load_newobj_ex),
            (pickle.INST, load_inst),
            (pickle.OBJ, load_obj),
            (pickle.BUILD, load_build),
            (pickle.DICT, load_dict),
            (pickle.SETITEM, load_setitem),
            (pickle.SETITEMS, load_setitems),
            (pickle.APPEND, load_append),
            (pickle.APPENDS, load_appends),
            (pickle.EMPTY_SET, load_empty_set),
            (pickle.ADDITEMS, load_additems),
            (pickle.FROZENSET, load_frozenset),
            (pickle.BYTEARRAY8, load_bytearray8),
        )
    }


def _instance(cls: Any) -> Placeholder:
    if not isinstance(cls, Placeholder):
        raise TypeError(f"an object made of a {type(cls).__name__}")
    return cls


def _natural(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise ValueError(f"{value if type(value) is int else type(value).__name__} where a size belongs")
    return value


def _text(value: Any) -> str:
    if type(value) is not str:
        raise TypeError(f"a {type(value).__name__} where a name belongs")
    return value


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, strides: Any) -> TensorRecord | Placeholder:
    if isinstance(storage, Placeholder):
        return storage
    if not isinstance(storage, StorageRecord) or len(shape) != len(strides):
        raise ValueError("a tensor without a storage, or with other strides than sizes")
    for sizes in (shape, strides):  # kept as they are: copies of one that many tensors share would have no bound
        if type(sizes) is not tuple or len(sizes) > _MAX_DIMENSIONS:
            raise TypeError(f"{len(sizes)} sizes in a {type(sizes).__name__}")
        for size in sizes:
            _natural(size)
    return TensorRecord(storage, storage.element, _natural(offset), shape, strides)


def _rebuild_tensor_v2(
    storage: Any, offset: Any, shape: Any, strides: Any, _grad: Any, _hooks: Any, metadata: Any = None
) -> TensorRecord | Placeholder:
    return _with_flags(_rebuild_tensor(storage, offset, shape, strides), metadata)


def _rebuild_tensor_v3(
    storage: Any, offset: Any, shape: Any, strides: Any, _grad: Any, _hooks: Any, *rest: Any
) -> TensorRecord | Placeholder:
    dtype, metadata = rest if len(rest) == 2 else (*rest, None)
    tensor = _rebuild_tensor(storage, offset, shape, strides)
    if isinstance(tensor, Placeholder) or isinstance(dtype, Placeholder):
        return tensor if isinstance(tensor, Placeholder) else dtype
    if not isinstance(dtype, ElementType):
        raise TypeError(f"a {type(dtype).__name__} where a dtype belongs")
    return _with_flags(replace(tensor, element=dtype), metadata)


def _with_flags(tensor: TensorRecord | Placeholder, metadata: Any) -> TensorRecord | Placeholder:
    flags = _flags(metadata)
    if not flags or isinstance(tensor, Placeholder):
        return tensor
    if ("conj" in flags and tensor.element.kind != "complex") or ("neg" in flags and tensor.element.kind == "bool"):
        raise ValueError(f"{tensor.element.name} with the bits {', '.join(sorted(flags))}")
    return replace(tensor, is_conj="conj" in flags, is_neg="neg" in flags)


def _flags(metadata: Any) -> set[str]:
    """Read which lazy bits a tensor was saved with: torch sets those that are named, whatever their value."""
    if metadata is not None and not isinstance(metadata, dict):
        raise TypeError(f"a {type(metadata).__name__} where a tensor's metadata belong")
    return {"conj", "neg"} & set(metadata or ())


def _rebuild_parameter(tensor: Any, _grad: Any = None, _hooks: Any = None, _state: Any = None) -> Any:
    return tensor


def _ordered_dict(*arguments: Any) -> OrderedDict[Any, Any]:
    if arguments not in ((), ([],)):
        raise ValueError("an OrderedDict made from something")
    return OrderedDict()


_CALLABLES: dict[tuple[str, str], Callable[..., Any]] = {
    ("collections", "OrderedDict"): _ordered_dict,
    ("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor_v2,
    ("torch._utils", "_rebuild_tensor_v3"): _rebuild_tensor_v3,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _rebuild_parameter,
}


def inner_tables(content: Any, limit: int = 10) -> list[str]:
    """Name dicts of tensors up to three dicts deep in a pickled object, by their inner keys; outer ones first."""
    if not isinstance(content, dict):
        return []
    found: list[str] = []
    seen = {id(content)}
    level = [("", content)]
    for _ in range(3):
        below: list[tuple[str, Any]] = []
        for path, outer in level:
            for key, value in outer.items():
                if type(key) is str and isinstance(value, dict) and id(value) not in seen:
                    seen.add(id(value))
                    below.append((f"{path}.{key}" if path else key, value))
        found += [path for path, table in below if is_table(table)]
        level = below
    return found[:limit]


def is_table(content: Any) -> bool:
    """Say whether this is a dict of named tensors, and of one at least."""
    is_dict = isinstance(content, dict) and bool(content)
    return is_dict and all(type(key) is str and isinstance(value, TensorRecord) for key, value in content.items())


def inner_table(content: Any, inner_key: str) -> Any:
    """Find the value under a key, or under several with dots between them; the longest key that is there goes first.

    Raises:
        KeyError: there is no such value.
    """
    if not isinstance(content, dict):
        raise KeyError(inner_key)
    if inner_key in content:
        return content[inner_key]
    for end in range(len(inner_key) - 1, 0, -1):
        if inner_key[end] == "." and inner_key[:end] in content:
            with suppress(KeyError):
                return inner_table(content[inner_key[:end]], inner_key[end + 1 :])
    raise KeyError(inner_key)
