"""Read the header of one safetensors file, or refuse the file.

The format, as read here. All integers are little-endian.

    bytes 0-7          N, an unsigned 64-bit integer: the length of the header, at most 100,000,000
    bytes 8-(8+N-1)    the header: one JSON object in UTF-8, between spaces, tabs and line ends if there are any
    bytes (8+N)-end    the data, back to back in the order of their offsets, with no gap, no overlap and nothing after

Each key of the object is a tensor's name and maps to ``{"dtype": str, "shape": [int ≥ 0, …], "data_offsets": [begin,
end]}`` with offsets counted from the first data byte and ``end - begin`` equal to what dtype and shape need. The key
``__metadata__`` maps to an object of strings, or to null. Source: the safetensors README, section "Format".

Where that text and the library differ, the library (safetensors 0.8) says what is read, since its users' files are
read with it: white space before the object, further keys in an entry (their values are ignored), an entry as the array
of its three values, a dtype as ``{"F32": null}``. In two places a file is refused that the library reads:

- A key that stands twice. The library refuses it too for ``__metadata__`` and inside an entry, but of two tensors of
  one name, and of two entries of the metadata, it keeps the last and other readers of JSON the first: which of them
  the writer meant nobody can tell.
- A size of 2**63 or more beside a size of 0: torch has no such tensor.

And one is read that the library refuses: the dtype C128.

Guarantees: nothing but the header's own bytes is read, nothing is allocated by a number in the file (a length is
compared with the file's size first), every tensor's bytes lie inside the file. Imports no torch. A file is read through
one descriptor; its identity is taken from the same descriptor.
"""

from __future__ import annotations

import errno
import json
import os
import stat
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from lading.checkpoint.catalog import FileIdentity, Shard, TensorSpec
from lading.checkpoint.dtypes import ELEMENT_TYPES
from lading.errors import CheckpointError, CheckpointNotFoundError, CorruptShardError, name_list, refusal

MAX_HEADER_BYTES = 100_000_000
_LFS_POINTER = b"version https://git-lfs"
_ENTRY_KEYS = frozenset({"dtype", "shape", "data_offsets"})
_JSON_SPACE = b" \t\r\n"
_MAX_DEPTH = 125
"""How deep a value that is ignored may be nested: as deep as safetensors allows."""
_AGAIN = "download or save the file again"
_WAYS_TO_OPEN = {
    errno.EACCES: "allow this user to read it (chmod u+r), or load as a user who may",
    errno.EPERM: "allow this user to read it (chmod u+r), or load as a user who may",
    errno.EMFILE: "close files, or let the process have more of them (ulimit -n)",
    errno.ENFILE: "close files of other processes, or let the system have more of them (sysctl fs.file-max)",
    errno.ENOMEM: "free memory",
}
"""What to do about a file that cannot be opened though nothing is wrong with it."""


def identity_of(descriptor: int) -> FileIdentity:
    """Take a file's identity from an open descriptor."""
    status = os.fstat(descriptor)
    return FileIdentity(
        device=status.st_dev, inode=status.st_ino, num_bytes=status.st_size, modified_ns=status.st_mtime_ns
    )


def open_regular(path: Path) -> int:
    """Open a shard for reading and give its descriptor.

    Raises:
        CheckpointNotFoundError: it is missing, or a link to nothing.
        CorruptShardError: a directory, another special file, empty, or a git-lfs pointer.
        CheckpointError: this process may not open it, or has too many files open.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError as error:
        link = f"a link to {path.readlink()}, which is not there" if path.is_symlink() else "no such file"
        message = refusal(str(path), found=link, expected="a file", way_out="download it again, or check the path")
        raise CheckpointNotFoundError(message) from error
    except OSError as error:
        found, way_out = error.strerror or str(error), _WAYS_TO_OPEN.get(error.errno or 0)
        kind = CorruptShardError if way_out is None else CheckpointError
        message = refusal(str(path), found=found, expected="a readable file", way_out=way_out or _AGAIN)
        raise kind(message) from error
    try:
        _check_regular(descriptor, path)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _check_regular(descriptor: int, path: Path) -> None:
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        found = "a directory" if stat.S_ISDIR(status.st_mode) else "a special file"
        _refuse(path, found=found, expected="a regular file", way_out="remove it and download the shard again")
    if status.st_size == 0:
        _refuse(path, found="an empty file (0 bytes)", expected="a checkpoint", way_out=_AGAIN)
    if read_at(descriptor, path, len(_LFS_POINTER), 0) == _LFS_POINTER:
        _refuse(
            path,
            found=f"a git-lfs pointer of {status.st_size} bytes, not the weights",
            expected="the file it points to",
            way_out="run `git lfs pull` in the repository",
        )


def read_at(descriptor: int, path: Path, num_bytes: int, offset: int) -> bytes:
    """Read bytes of an open file; fewer where it ends.

    Raises:
        CorruptShardError: the disk or the network does not give them.
    """
    data = b""
    try:
        while len(data) < num_bytes and (piece := os.pread(descriptor, num_bytes - len(data), offset + len(data))):
            data = data + piece if data else piece
    except OSError as error:
        found = f"bytes {offset} to {offset + num_bytes} unreadable ({error.strerror or error})"
        _refuse(path, found=found, expected="a readable file", way_out="check the disk, or download the file again")
    return data


def read_header(path: Path) -> Shard:
    """Read and check one safetensors file's header.

    Args:
        path: the file; its data are not touched.

    Returns:
        The shard, with specs in the order of their bytes.

    Raises:
        CorruptShardError: the file breaks the format in any way; the message names file, tensor, found, expected.

    Example:
        >>> shard = read_header(Path("model.safetensors"))  # doctest: +SKIP
        >>> list(shard.tensors)[:1]                          # doctest: +SKIP
        ['model.embed_tokens.weight']
    """
    descriptor = open_regular(path)
    try:
        identity = identity_of(descriptor)
        text = _read_text(descriptor, path, identity.num_bytes)
    finally:
        os.close(descriptor)
    entries = _parse(text, path)
    metadata = _metadata(entries.pop("__metadata__", None), path)
    data_start = 8 + len(text)
    specs = [_spec(name, entry, path, data_start) for name, entry in entries.items()]
    specs.sort(key=lambda spec: (spec.offset, spec.num_bytes))
    _check_layout(specs, path, data_start, identity.num_bytes)
    tensors = {spec.name: spec for spec in specs}
    aliases = {
        key: value for key, value in metadata.items() if value in tensors and key not in tensors and key != "format"
    }
    return Shard(path=path, identity=identity, tensors=tensors, metadata=metadata, aliases=aliases)


def _refuse(path: Path, *, found: str, expected: str, way_out: str = _AGAIN, tensor: str | None = None) -> NoReturn:
    subject = str(path) if tensor is None else f"{path}, tensor {tensor!r}"
    raise CorruptShardError(refusal(subject, found=found, expected=expected, way_out=way_out))


def _read_text(descriptor: int, path: Path, file_bytes: int) -> bytes:
    if file_bytes < 8:
        _refuse(path, found=f"{file_bytes} bytes", expected="at least 8 bytes of header length")
    length = int.from_bytes(read_at(descriptor, path, 8, 0), "little")
    if length > file_bytes - 8:
        _refuse(
            path,
            found=f"a header length of {length} bytes",
            expected=f"at most {file_bytes - 8} bytes, all that follows in the file (truncated, or not safetensors)",
        )
    if length > MAX_HEADER_BYTES:
        _refuse(path, found=f"a header of {length} bytes", expected=f"at most {MAX_HEADER_BYTES} bytes")
    if length < 2:
        _refuse(path, found=f"a header length of {length} bytes", expected="at least 2 bytes, a JSON object")
    text = read_at(descriptor, path, length, 8)
    if len(text) < length:
        _refuse(path, found=f"{len(text)} bytes of header", expected=f"{length} bytes")
    return text


def unique_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build a JSON object, refusing a key that stands twice (json itself keeps the last one silently)."""
    built = dict(pairs)
    if len(built) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice!r:.80} twice")
    return built


def _integer(text: str) -> int | float:
    """Make a number of JSON's "-0" that is no integer, as safetensors does; there is no integer of that sign."""
    return -0.0 if text == "-0" else int(text)


def parse_json_object(data: bytes) -> dict[str, Any]:
    """Parse one JSON object of UTF-8 text whose every string is UTF-8 too and whose keys each stand once.

    Raises:
        ValueError: saying which of these it is not.
    """
    try:
        parsed = json.loads(
            data.decode("utf-8"), object_pairs_hook=unique_pairs, parse_int=_integer if b"-0" in data else None
        )
        if b"\\u" in data:  # an escape may spell half a character
            json.dumps(parsed, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"text that is not UTF-8 (byte {error.start})") from error
    except UnicodeEncodeError as error:
        raise ValueError("a string with half a surrogate pair") from error
    except RecursionError as error:
        raise ValueError("JSON nested too deeply") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"text that is not JSON ({error})") from error
    if not isinstance(parsed, dict):
        raise ValueError(f"JSON that is a {type(parsed).__name__}, no object")  # noqa: TRY004 - the file's fault
    return parsed


def _parse(text: bytes, path: Path) -> dict[str, Any]:
    if not text.lstrip(_JSON_SPACE).startswith(b"{"):
        _refuse(path, found=f"a header that begins with {text[:8]!r}", expected="a JSON object, beginning with '{'")
    try:
        return parse_json_object(text)
    except ValueError as error:
        _refuse(path, found=f"a header of {error}", expected="one JSON object in UTF-8, each key once")


def _metadata(entry: Any, path: Path) -> Mapping[str, str]:
    if entry is None:
        return {}
    if not isinstance(entry, dict) or not all(isinstance(value, str) for value in entry.values()):
        _refuse(path, tensor="__metadata__", found=f"{entry!r:.80}", expected="an object of strings")
    return entry


def _natural(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def _parts(name: str, entry: Any, path: Path) -> tuple[Any, Any, Any]:
    """Take dtype, shape and data_offsets out of an entry; the values of other keys must be no more than JSON."""
    if isinstance(entry, list) and len(entry) == len(_ENTRY_KEYS):
        entry = dict(zip(("dtype", "shape", "data_offsets"), entry, strict=True))
    if not isinstance(entry, dict) or not entry.keys() >= _ENTRY_KEYS:
        _refuse(path, tensor=name, found=f"{entry!r:.80}", expected="an object of dtype, shape and data_offsets")
    if len(entry) > len(_ENTRY_KEYS) and not all(
        _is_json(entry[key], _MAX_DEPTH) for key in entry.keys() - _ENTRY_KEYS
    ):
        expected = "JSON: finite numbers, nested less deeply"
        _refuse(path, tensor=name, found=f"{list(entry)!r:.80} with values that are none", expected=expected)
    dtype = entry["dtype"]
    if isinstance(dtype, dict) and len(dtype) == 1 and None in dtype.values():
        (dtype,) = dtype
    return dtype, entry["shape"], entry["data_offsets"]


def _is_json(value: Any, depth: int) -> bool:
    """Say whether a parsed value is what stricter readers of JSON take for one; Python's reads NaN and the like."""
    if isinstance(value, (list, dict)):
        return depth > 0 and all(
            _is_json(each, depth - 1) for each in (value.values() if isinstance(value, dict) else value)
        )
    if isinstance(value, (int, float)):
        return abs(value) <= sys.float_info.max
    return True


def _spec(name: str, entry: Any, path: Path, data_start: int) -> TensorSpec:
    dtype, shape, offsets = _parts(name, entry, path)
    element = ELEMENT_TYPES.get(dtype) if isinstance(dtype, str) else None
    if element is None:
        known = ", ".join(ELEMENT_TYPES)
        _refuse(path, tensor=name, found=f"dtype {dtype!r:.40}", expected=f"one of {known}")
    if not isinstance(shape, list) or not all(_natural(size) for size in shape):
        _refuse(path, tensor=name, found=f"shape {shape!r:.80}", expected="a list of integers ≥ 0 and < 2**63")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_natural(offset) for offset in offsets):
        _refuse(path, tensor=name, found=f"data_offsets {offsets!r:.80}", expected="two integers ≥ 0 and < 2**63")
    begin, end = offsets
    num_bits = 1
    for size in (*shape, element.bits):
        num_bits *= size
        if num_bits >= 1 << 64:  # past any file, and the product must not grow without bound
            _refuse(path, tensor=name, found=f"shape {shape!r:.80}", expected="fewer than 2**61 bytes")
    if num_bits % 8 or end - begin != num_bits // 8:
        _refuse(
            path,
            tensor=name,
            found=f"data_offsets [{begin}, {end}], {end - begin} bytes",
            expected=f"{num_bits / 8:g} bytes for {dtype} of shape {shape!r:.80}",
        )
    return TensorSpec(name=name, element=element, shape=tuple(shape), offset=data_start + begin, num_bytes=end - begin)


def _check_layout(specs: list[TensorSpec], path: Path, data_start: int, file_bytes: int) -> None:
    expected = data_start
    previous = "the header"
    for spec in specs:
        if spec.offset != expected:
            kind = "overlapping" if spec.offset < expected else "gapped"
            _refuse(
                path,
                tensor=spec.name,
                found=f"{kind} offsets: its data begin at byte {spec.offset - data_start}",
                expected=f"byte {expected - data_start}, right after {previous!r}",
            )
        expected += spec.num_bytes
        previous = spec.name
    if expected > file_bytes:
        cut = [spec.name for spec in specs if spec.offset + spec.num_bytes > file_bytes]
        _refuse(
            path,
            tensor=cut[0],
            found=f"a truncated file of {file_bytes} bytes ({name_list(cut, 3)} cut short or absent)",
            expected=f"{expected} bytes",
        )
    if expected < file_bytes:
        _refuse(
            path, found=f"{file_bytes - expected} bytes after the end of the last tensor", expected=f"{expected} bytes"
        )
