"""Read the table of tensors of a file written by ``torch.save``, without torch and without running its pickle.

Two layouts are known (source: ``torch/serialization.py``):

    zip (torch ≥ 1.6)  an uncompressed zip archive: ``<top>/data.pkl`` is the pickled dict, ``<top>/data/<key>`` the raw
                       bytes of storage ``<key>``, ``<top>/byteorder`` says "little" or "big"
    legacy             five pickles in a row (magic number, protocol, system, the dict, the list of storage keys), then
                       for each key a little-endian 64-bit element count and the raw bytes

The pickle is interpreted by a reader that can build dicts, tuples, numbers, strings and *descriptions* of tensors, and
nothing else (`lading.checkpoint.unpickling`). A pickle that names anything else is refused by that name, so code in a
checkpoint never runs. Training checkpoints name classes beside their dict of tensors; they are read where the caller
says by ``inner_key`` which dict is meant, and what else stands in the file is left alone. What comes out is the same
`Shard` as for safetensors, so that one mapping serves both (torch's own ``mmap=True`` maps without ``MAP_NORESERVE``,
which a file larger than memory needs).

Guarantees: only the pickles are read; every tensor's bytes lie inside the file. Imports no torch.
"""

from __future__ import annotations

import io
import math
import os
import pickle
import struct
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from lading.checkpoint.catalog import Shard, TensorSpec
from lading.checkpoint.header import MAX_HEADER_BYTES, identity_of, open_regular
from lading.checkpoint.kinds import NUMPY_WAY_OUT
from lading.checkpoint.unpickling import Placeholder, TensorRecord, inner_table, inner_tables, interpret
from lading.errors import CheckpointError, CorruptShardError, name_list, refusal

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_SAFETENSORS = "save it as safetensors where you trust it"
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


def read_pickled(path: Path, inner_key: str | None = None) -> Shard:
    """Read and check the table of one file written by ``torch.save``.

    Args:
        path: the file; only its pickles are read, no tensor's data.
        inner_key: which dict in the pickled one is the table, see `lading.checkpoint.locate.Source`; None: that one.

    Raises:
        CorruptShardError: neither layout, truncated, or a tensor that leaves its storage.
        CheckpointError: the pickle names code, or holds something else than named tensors.
    """
    descriptor = open_regular(path)
    with os.fdopen(descriptor, "rb") as file:
        identity = identity_of(file.fileno())
        try:
            is_zip = os.pread(file.fileno(), 4, 0) == b"PK\x03\x04"
            table, places = _read_zip(file, path, inner_key) if is_zip else _read_legacy(file, path, inner_key)
        except CheckpointError:
            raise
        except _DAMAGE as error:
            _refuse(path, found=f"a damaged file ({type(error).__name__}: {error!s:.200})", cause=error)
    specs = [_spec(name, tensor, places, path, identity.num_bytes) for name, tensor in table.items()]
    return Shard(path=path, identity=identity, tensors={spec.name: spec for spec in specs}, is_pickled=True)


def _refuse(path: Path, *, found: str, tensor: str | None = None, cause: BaseException | None = None) -> NoReturn:
    subject = str(path) if tensor is None else f"{path}, tensor {tensor!r}"
    raise CorruptShardError(
        refusal(subject, found=found, expected="what torch.save writes", way_out="download or save the file again")
    ) from cause


def _read_zip(
    file: BinaryIO, path: Path, inner_key: str | None
) -> tuple[dict[str, TensorRecord], dict[str, tuple[int, int]]]:
    """Give the table and, for each storage key, where its bytes begin and how many they are."""
    with zipfile.ZipFile(file) as archive:
        members = {info.filename: info for info in archive.infolist()}
        if len(members) != len(archive.infolist()):
            _refuse(path, found="a zip archive in which a member stands twice")
    pickles = [name for name in members if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(pickles) != 1:
        _refuse_archive(path, list(members))
    top = pickles[0].removesuffix("data.pkl")
    if top + "constants.pkl" in members:
        way_out = "save the state_dict() of what torch.jit.load gives"
        raise CheckpointError(
            refusal(str(path), found="TorchScript", expected="a dict of plain tensors", way_out=way_out)
        )
    if top + "byteorder" in members and _member(file, members[top + "byteorder"], path).strip() != b"little":
        _refuse(path, found="big-endian data")
    read = interpret(io.BytesIO(_member(file, members[pickles[0]], path)))
    table = _table(read.content, read.foreign, path, inner_key)
    places = {
        name.removeprefix(top + "data/"): (_data_start(file, info, path), info.file_size)
        for name, info in members.items()
        if name.startswith(top + "data/")
    }
    return table, places


def _refuse_archive(path: Path, members: list[str]) -> NoReturn:
    """Refuse a zip archive that torch.save did not write."""
    found, way_out = f"a zip archive of {name_list(members, 3) or 'nothing'}", "unpack it and name what was in it"
    if members and all(name.endswith(".npy") for name in members):
        found, way_out = "a NumPy archive (.npz)", NUMPY_WAY_OUT
    expected = "what torch.save writes: one data.pkl"
    raise CorruptShardError(refusal(str(path), found=found, expected=expected, way_out=way_out))


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


def _read_legacy(
    file: BinaryIO, path: Path, inner_key: str | None
) -> tuple[dict[str, TensorRecord], dict[str, tuple[int, int]]]:
    file.seek(0)
    bounded = _BoundedFile(file, os.fstat(file.fileno()).st_size)
    first = interpret(bounded)
    if first.content != _LEGACY_MAGIC:
        refused = f", which names {first.foreign[0]}" if first.foreign else ""
        _refuse(path, found=f"a pickle without torch's magic number{refused}")
    protocol, system, content, keys = (interpret(bounded) for _ in range(4))
    foreign = [*protocol.foreign, *system.foreign, *content.foreign, *keys.foreign]
    table = _table(content.content, foreign, path, inner_key)
    storages = content.storages
    places: dict[str, tuple[int, int]] = {}
    position = file.tell()
    for key in keys.content:
        if type(key) is not str or key not in storages:  # what follows it stands nobody knows where
            _refuse(path, found="a storage of elements whose width is not known")
        count = int.from_bytes(os.pread(file.fileno(), 8, position), "little")
        num_bytes = count * storages[key].element.bits // 8
        places[key] = (position + 8, num_bytes)
        position += 8 + num_bytes
    return table, places


def _table(content: Any, foreign: Iterable[str], path: Path, inner_key: str | None) -> dict[str, TensorRecord]:
    """Pick the dict of named tensors out of a pickled object; ``foreign`` is what the pickle names besides tensors.

    Raises:
        CorruptShardError: the object is no dict.
        CheckpointError: a dict of other things, none under the inner key, or foreign names and no inner key.
    """
    tables = inner_tables(content)
    found, way_out = "", "save the state_dict alone, as safetensors or with torch.save"
    if tables:
        way_out = f"pass inner_key={tables[0]!r} to lading.load_into, or --inner-key to lading inspect"
        way_out += f"; dicts of tensors inside are {name_list(tables)}" if len(tables) > 1 else ""
    if inner_key is not None:
        try:
            content = inner_table(content, inner_key)
        except KeyError:
            found = f"nothing under inner_key={inner_key!r}"
    else:
        name = next(iter(foreign), None)
        if name is not None:
            found, way_out = f"a pickle that names {name}, which lading never runs", way_out if tables else _SAFETENSORS
    if not found and isinstance(content, dict):
        others = {key: value for key, value in content.items() if not _is_named_tensor(key, value)}
        strange = next((each.name for item in others.items() for each in item if isinstance(each, Placeholder)), None)
        if not others:
            return content
        found = f"entries that are no named tensors: {name_list(key if type(key) is str else '?' for key in others)}"
        found += f" (such as {strange}, which lading never runs)" if strange else ""
    if not found:
        what = content.name if isinstance(content, Placeholder) else type(content).__name__
        _refuse(path, found=f"a pickled {what}")
    raise CheckpointError(refusal(str(path), found=found, expected="a dict of plain tensors", way_out=way_out))


def _is_named_tensor(key: Any, value: Any) -> bool:
    return type(key) is str and isinstance(value, TensorRecord)


def _spec(
    name: str, tensor: TensorRecord, places: Mapping[str, tuple[int, int]], path: Path, file_bytes: int
) -> TensorSpec:
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
        is_conj=tensor.is_conj,
        is_neg=tensor.is_neg,
    )


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides: list[int] = []
    step = 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(1, size)
    return tuple(reversed(strides))
