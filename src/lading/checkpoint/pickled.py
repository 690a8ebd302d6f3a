"""Read the table of tensors of a file written by ``torch.save``, without torch and without running its pickle.

Two layouts are known (source: ``torch/serialization.py``):

    zip (torch ≥ 1.6)  an uncompressed zip archive: ``<top>/data.pkl`` is the pickled dict, ``<top>/data/<key>`` the raw
                       bytes of storage ``<key>``, ``<top>/byteorder`` says "little" or "big"
    legacy             five pickles in a row (magic number, protocol, system, the dict, the list of storage keys), then
                       for each key a little-endian 64-bit element count and the raw bytes

The pickle is interpreted by a reader that can build dicts, tuples, numbers, strings and *descriptions* of tensors, and
nothing else: a pickle that names any other function is refused by that name, so code in a checkpoint never runs. What
comes out is the same `Shard` as for safetensors, so that one mapping serves both (torch's own ``mmap=True`` maps
without ``MAP_NORESERVE``, which a file larger than memory needs).

Guarantees: only the pickles are read; every tensor's bytes lie inside the file. Imports no torch.
"""

from __future__ import annotations

import io
import math
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, NoReturn

from lading.checkpoint.catalog import Shard, TensorSpec
from lading.checkpoint.dtypes import ELEMENT_TYPES, ElementType
from lading.checkpoint.header import MAX_HEADER_BYTES, identity_of, open_regular
from lading.errors import CheckpointError, CorruptShardError, name_list, refusal

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
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
_BY_TORCH_NAME = {element.torch_name: element for element in ELEMENT_TYPES.values()}
_BUILDS_OBJECTS = (
    pickle.INST,
    pickle.OBJ,
    pickle.NEWOBJ,
    pickle.NEWOBJ_EX,
    pickle.EXT1,
    pickle.EXT2,
    pickle.EXT4,
    pickle.BYTEARRAY8,
    pickle.NEXT_BUFFER,
    pickle.READONLY_BUFFER,
    pickle.EMPTY_SET,
    pickle.ADDITEMS,
    pickle.FROZENSET,
    pickle.DICT,
)

_DAMAGE = (
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    pickle.PickleError,
    struct.error,
    zipfile.BadZipFile,
)
"""What an interpreter of opcodes runs into when the bytes are not what torch.save wrote."""


@dataclass(frozen=True, slots=True)
class _Storage:
    key: str
    element: ElementType
    num_elements: int


@dataclass(frozen=True, slots=True)
class _Tensor:
    storage: _Storage
    element: ElementType
    storage_offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _UnknownNameError(Exception):
    """The pickle names something that is no part of a table of tensors."""


class _BoundedFile:
    """Read from an open file at most what a header may hold, and never more than there is: ``read`` allocates first."""

    def __init__(self, file: BinaryIO, num_bytes: int) -> None:
        self._file = file
        self._num_bytes = num_bytes

    def read(self, count: int) -> bytes:
        if count > min(MAX_HEADER_BYTES, self._num_bytes - self._file.tell()):
            raise EOFError(f"{count} bytes claimed")
        return self._file.read(count)

    def readline(self) -> bytes:
        return self._file.readline(MAX_HEADER_BYTES)


class _TableReader(pickle._Unpickler):
    """Interpret a pickle's opcodes; the pure Python base, because the C one allocates by numbers in the file.

    Keys are strings: hashing tuples that share their parts takes time without end. State (BUILD) is dropped, and only
    taken for a dict: set on anything else it would change this process. Messages show no object of the file.
    """

    dispatch: ClassVar[dict[int, Any]] = {
        code: step for code, step in pickle._Unpickler.dispatch.items() if bytes([code]) not in _BUILDS_OBJECTS
    }

    stack: list[Any]
    pop_mark: Callable[[], list[Any]]

    def load_build(self) -> None:
        self.stack.pop()
        if type(self.stack[-1]) is not OrderedDict:
            raise TypeError(f"state for a {type(self.stack[-1]).__name__}")

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.stack[-1][_text(key)] = value

    def load_setitems(self) -> None:
        items: list[Any] = self.pop_mark()
        for key, value in zip(items[::2], items[1::2], strict=True):
            self.stack[-1][_text(key)] = value

    dispatch[pickle.BUILD[0]] = load_build
    dispatch[pickle.SETITEM[0]] = load_setitem
    dispatch[pickle.SETITEMS[0]] = load_setitems

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _CALLABLES:
            return _CALLABLES[module, name]
        if module in ("torch", "torch.storage") and name in _STORAGE_KINDS:
            return ELEMENT_TYPES[_STORAGE_KINDS[name]]
        if module == "torch" and name in _BY_TORCH_NAME:
            return _BY_TORCH_NAME[name]
        raise _UnknownNameError(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> _Storage:
        kind, element, key, _location, num_elements, *view = pid
        if kind != "storage" or not isinstance(element, ElementType):
            raise ValueError("a persistent id that is no storage")
        if any(part is not None for part in view):
            raise ValueError("a storage that is a view of another, as torch before 0.4 wrote them")
        return _Storage(_text(key), element, _natural(num_elements))


def _natural(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise ValueError(f"{value if type(value) is int else type(value).__name__} where a size belongs")
    return value


def _text(value: Any) -> str:
    if type(value) is not str:
        raise TypeError(f"a {type(value).__name__} where a name belongs")
    return value


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_grad: Any) -> _Tensor:
    if not isinstance(storage, _Storage) or len(shape) != len(strides):
        raise ValueError("a tensor without a storage, or with other strides than sizes")
    sizes, steps = tuple(map(_natural, shape)), tuple(map(_natural, strides))
    return _Tensor(storage, storage.element, _natural(offset), sizes, steps)


def _rebuild_typed_tensor(
    storage: Any, offset: Any, shape: Any, strides: Any, _grad: Any, _hooks: Any, dtype: Any, *_metadata: Any
) -> _Tensor:
    tensor = _rebuild_tensor(storage, offset, shape, strides)
    if not isinstance(dtype, ElementType):
        raise TypeError(f"a {type(dtype).__name__} where a dtype belongs")
    return _Tensor(tensor.storage, dtype, tensor.storage_offset, tensor.shape, tensor.strides)


def _rebuild_parameter(tensor: Any, *_grad: Any) -> Any:
    return tensor


def _ordered_dict(*arguments: Any) -> OrderedDict[Any, Any]:
    if arguments not in ((), ([],)):
        raise ValueError("an OrderedDict made from something")
    return OrderedDict()


_CALLABLES: dict[tuple[str, str], Callable[..., Any]] = {
    ("collections", "OrderedDict"): _ordered_dict,
    ("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _rebuild_typed_tensor,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _rebuild_parameter,
}


def read_pickled(path: Path) -> Shard:
    """Read and check the table of one file written by ``torch.save``.

    Args:
        path: the file; only its pickles are read, no tensor's data.

    Raises:
        CorruptShardError: neither layout, truncated, or a tensor that leaves its storage.
        CheckpointError: the pickle names code, or holds something else than named tensors.
    """
    descriptor = open_regular(path)
    with os.fdopen(descriptor, "rb") as file:
        identity = identity_of(file.fileno())
        try:
            content, places = _read_zip(file, path) if zipfile.is_zipfile(file) else _read_legacy(file, path)
        except _UnknownNameError as error:
            raise CheckpointError(
                refusal(
                    str(path),
                    found=f"a pickle that names {error}, which lading never runs",
                    expected="a dict of plain tensors",
                    way_out="save it as safetensors where you trust it",
                )
            ) from error
        except CheckpointError:
            raise
        except _DAMAGE as error:
            _refuse(path, found=f"a damaged file ({type(error).__name__}: {error})", cause=error)
    specs = [_spec(name, tensor, places, path, identity.num_bytes) for name, tensor in _named(content, path)]
    specs.sort(key=lambda spec: (spec.offset, spec.num_bytes))
    return Shard(path=path, identity=identity, tensors={spec.name: spec for spec in specs})


def _refuse(path: Path, *, found: str, tensor: str | None = None, cause: BaseException | None = None) -> NoReturn:
    subject = str(path) if tensor is None else f"{path}, tensor {tensor!r}"
    raise CorruptShardError(
        refusal(subject, found=found, expected="what torch.save writes", way_out="download or save the file again")
    ) from cause


def _read_zip(file: BinaryIO, path: Path) -> tuple[Any, dict[str, tuple[int, int]]]:
    """Give the pickled object and, for each storage key, where its bytes begin and how many they are."""
    with zipfile.ZipFile(file) as archive:
        members = {info.filename: info for info in archive.infolist()}
        if len(members) != len(archive.infolist()):
            _refuse(path, found="a zip archive in which a member stands twice")
        pickles = [name for name in members if name.endswith("/data.pkl") and name.count("/") == 1]
        if len(pickles) != 1:
            _refuse(path, found=f"a zip archive with {len(pickles)} data.pkl")
        top = pickles[0].removesuffix("data.pkl")
    if top + "byteorder" in members and _member(file, members[top + "byteorder"], path).strip() != b"little":
        _refuse(path, found="big-endian data")
    content = _TableReader(io.BytesIO(_member(file, members[pickles[0]], path))).load()
    places = {
        name.removeprefix(top + "data/"): (_data_start(file, info, path), info.file_size)
        for name, info in members.items()
        if name.startswith(top + "data/")
    }
    return content, places


def _member(file: BinaryIO, info: zipfile.ZipInfo, path: Path) -> bytes:
    """Read a small member as it stands in the archive; nothing is decompressed."""
    start = _data_start(file, info, path)
    if info.file_size > min(MAX_HEADER_BYTES, os.fstat(file.fileno()).st_size - start):
        _refuse(path, found=f"a member {info.filename!r} that claims {info.file_size} bytes")
    return os.pread(file.fileno(), info.file_size, start)


def _data_start(file: BinaryIO, info: zipfile.ZipInfo, path: Path) -> int:
    header = os.pread(file.fileno(), 30, info.header_offset)
    if len(header) < 30 or header[:4] != b"PK\x03\x04" or info.compress_type != zipfile.ZIP_STORED:
        _refuse(path, found=f"member {info.filename!r} compressed or without its local header")
    return info.header_offset + 30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")


def _read_legacy(file: BinaryIO, path: Path) -> tuple[Any, dict[str, tuple[int, int]]]:
    file.seek(0)
    bounded = _BoundedFile(file, os.fstat(file.fileno()).st_size)
    readers = [_TableReader(bounded) for _ in range(5)]
    if readers[0].load() != _LEGACY_MAGIC:
        _refuse(path, found="a pickle without torch's magic number")
    readers[1].load()
    readers[2].load()
    content = readers[3].load()
    keys = readers[4].load()
    elements = {tensor.storage.key: tensor.storage.element for _, tensor in _named(content, path)}
    places: dict[str, tuple[int, int]] = {}
    position = file.tell()
    for key in map(_text, keys):
        count = int.from_bytes(os.pread(file.fileno(), 8, position), "little")
        num_bytes = count * elements[key].bits // 8
        places[key] = (position + 8, num_bytes)
        position += 8 + num_bytes
    return content, places


def _named(content: Any, path: Path) -> list[tuple[str, _Tensor]]:
    if not isinstance(content, dict):
        _refuse(path, found=f"a pickled {type(content).__name__}")
    others = [key for key, value in content.items() if not isinstance(value, _Tensor)]
    if others:
        raise CheckpointError(
            refusal(
                str(path),
                found=f"entries that are no named tensors: {name_list(others)}",
                expected="a flat dict of tensor names to tensors",
                way_out="save the inner state_dict alone, as safetensors or with torch.save",
            )
        )
    return list(content.items())


def _spec(name: str, tensor: _Tensor, places: Mapping[str, tuple[int, int]], path: Path, file_bytes: int) -> TensorSpec:
    if tensor.storage.key not in places:
        _refuse(path, tensor=name, found=f"storage {tensor.storage.key!r}, which is not in the file")
    start, storage_bytes = places[tensor.storage.key]
    item_bytes = tensor.element.bits // 8
    is_empty = 0 in tensor.shape
    if tensor.element.bits * math.prod(size or 1 for size in tensor.shape) // 8 > file_bytes:
        _refuse(path, tensor=name, found=f"shape {list(tensor.shape)!r:.80} on {storage_bytes} bytes of storage")
    span = 0 if is_empty else 1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.strides, strict=True))
    begin = tensor.storage_offset * item_bytes
    if begin + span * item_bytes > storage_bytes or start + storage_bytes > file_bytes:
        _refuse(
            path,
            tensor=name,
            found=f"bytes {start + begin} to {start + begin + span * item_bytes} of a {storage_bytes}-byte storage "
            f"in a file of {file_bytes} bytes",
        )
    return TensorSpec(
        name=name,
        element=tensor.element,
        shape=tensor.shape,
        offset=start + begin,
        num_bytes=span * item_bytes,
        strides=None if is_empty or tensor.strides == _contiguous(tensor.shape) else tensor.strides,
    )


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides: list[int] = []
    step = 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(1, size)
    return tuple(reversed(strides))
