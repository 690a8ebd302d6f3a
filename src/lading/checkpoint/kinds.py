"""Tell what a file is by its first bytes, whatever its name: one of the kinds that lading reads, or what else.

A file under a wrong name is read as what it is. What is no checkpoint for torch is refused by the name of its format,
with what to do about it: a reader of another format would speak of header lengths. Imports no torch.
"""

from __future__ import annotations

import codecs
import os
from pathlib import Path
from typing import Literal, NamedTuple

from lading.checkpoint.header import open_regular, read_at
from lading.errors import CheckpointError, CorruptShardError, refusal

Kind = Literal["safetensors", "zip", "pickle", "json"]
"""What lading reads: ``zip`` and ``pickle`` are the two layouts of torch.save, ``json`` may be an index of shards."""

EXPECTED = "a checkpoint: safetensors, or what torch.save writes"

_HEAD_BYTES = 512
_UNPACK = "unpack it and name what was in it"
_CONVERT = "name a safetensors or .bin checkpoint of this model; transformers makes one with save_pretrained"
_GGUF = (
    "name a safetensors or .bin checkpoint of this model; from_pretrained(…, gguf_file=…) and save_pretrained make one"
)
NUMPY_WAY_OUT = "read it with numpy.load and write it with safetensors.numpy.save_file"
_TABLE = "name the model's files; this one holds rows of a dataset"


class _Format(NamedTuple):
    magic: bytes
    what: str
    way_out: str
    offset: int = 0


_FORMATS = (
    _Format(b"GGUF", "GGUF, the format of llama.cpp", _GGUF),
    *(_Format(magic, "GGML, an old format of llama.cpp", _GGUF) for magic in (b"lmgg", b"fmgg", b"tjgg", b"algg")),
    _Format(b"\x93NUMPY", "a NumPy array (.npy)", NUMPY_WAY_OUT),
    _Format(b"\x89HDF\r\n\x1a\n", "HDF5, in which Keras and TensorFlow keep weights", _CONVERT),
    _Format(b"TFL3", "a TensorFlow Lite model", _CONVERT, 4),
    _Format(b"\x08\x01\x12", "a TensorFlow model (SavedModel)", _CONVERT),
    _Format(b"\x1f\x8b", "a gzip archive", _UNPACK),
    _Format(b"BZh", "a bzip2 archive", _UNPACK),
    _Format(b"\xfd7zXZ\0", "an xz archive", _UNPACK),
    _Format(b"\x28\xb5\x2f\xfd", "a Zstandard archive", _UNPACK),
    _Format(b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive", _UNPACK),
    _Format(b"Rar!\x1a\x07", "a RAR archive", _UNPACK),
    _Format(b"ustar", "a tar archive", _UNPACK, 257),
    _Format(b"PAR1", "a Parquet table", _TABLE),
    _Format(b"ARROW1", "an Arrow table", _TABLE),
)
_ONNX = _Format(b"", "an ONNX model", "name the safetensors or .bin checkpoint that it was exported from")
_MESSAGE_PACK = _Format(b"", "MessagePack, in which Flax keeps weights", _CONVERT)
_TEXT_MAGIC = b"L119547037146038801333356L"
"""How torch.save begins its legacy layout with pickle protocol 1: its magic number in digits."""


def kind_of(path: Path) -> Kind:
    """Tell what a file is.

    Raises:
        CheckpointNotFoundError: there is none.
        CorruptShardError: a page or a text in place of weights, zeros, bytes of no known format; and as `open_regular`.
        CheckpointError: a format that is no checkpoint for torch.
    """
    head, num_bytes = _head_of(path)
    if _is_safetensors(head, num_bytes):
        return "safetensors"
    if head.startswith(b"PK\x03\x04"):
        return "zip"
    if head.startswith(_TEXT_MAGIC) or (head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05")):
        return "pickle"
    foreign = _foreign(head)
    if foreign is not None:
        raise CheckpointError(refusal(str(path), found=foreign.what, expected=EXPECTED, way_out=foreign.way_out))
    if head.removeprefix(codecs.BOM_UTF8).lstrip().startswith((b"{", b"[")):
        return "json"
    text = _text(head)
    if text is None and any(head) and int.from_bytes(head[:8], "little") <= num_bytes - 8:
        return "safetensors"  # a header follows in which something is wrong: its reader says what
    found, way_out = _what_came_instead(head, text)
    raise CorruptShardError(refusal(str(path), found=found, expected=EXPECTED, way_out=way_out))


def foreign_format(path: Path) -> str | None:
    """Name the format of a file that no torch reads; None for all others, and where it cannot be opened."""
    try:
        foreign = _foreign(_head_of(path)[0])
    except CheckpointError:
        return None
    return None if foreign is None else foreign.what


def _head_of(path: Path) -> tuple[bytes, int]:
    descriptor = open_regular(path)
    try:
        return read_at(descriptor, path, _HEAD_BYTES, 0), os.fstat(descriptor).st_size
    finally:
        os.close(descriptor)


def _is_safetensors(head: bytes, num_bytes: int) -> bool:
    """Say whether JSON follows a length: before all else, since a length may look like any other format's beginning."""
    if not head[8:].lstrip().startswith(b"{"):
        return False
    is_whole = int.from_bytes(head[:8], "little") <= num_bytes - 8
    return is_whole or (_foreign(head) is None and _text(head) is None)


def _foreign(head: bytes) -> _Format | None:
    for each in _FORMATS:
        if head.startswith(each.magic, each.offset):
            return each
    if len(head) > 2 and head[0] == 0x08 and 3 <= head[1] <= 32 and head[2] in b"\x12\x1a\x22\x28\x32\x3a\x42":
        return _ONNX  # the version of its format, then one of the fields that may follow it
    if len(head) > 1 and 0x81 <= head[0] <= 0x8F and 0xA1 <= head[1] <= 0xBF:
        return _MESSAGE_PACK  # a small map, whose first key is a short text
    return None


def _text(head: bytes) -> str | None:
    """Read the beginning of a file as text; None where it is none."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()  # it may end inside a character
    try:
        text = decoder.decode(head, final=len(head) < _HEAD_BYTES).strip()
    except UnicodeDecodeError:
        return None
    return text if text and all(each.isprintable() or each.isspace() for each in text) else None


def _what_came_instead(head: bytes, text: str | None) -> tuple[str, str]:
    if text is not None and text.startswith("<"):
        return f"a page that begins {text[:40]!r}, as servers send in place of a file", "download the file again"
    if text is not None:
        return f"a text that begins {text[:60]!r}", "name the checkpoint, or download it again"
    if not any(head):
        return "zeros, as an unfinished download leaves them", "download the file again"
    return (
        f"a file of no known format, whose first bytes are {head[:8].hex(' ')}",
        "name a checkpoint, or download it again",
    )
