"""Read every byte of a checkpoint once, and say what only the bytes can tell.

Finds unreadable and cut-short files, a hub blob whose content is not what its name promises (the hub's cache names
large files by their SHA-256), a zip member whose CRC-32 is wrong, and tensors of one dtype and shape with equal bytes:
ties that a header cannot show. Memory: one buffer. Imports no torch.
"""

from __future__ import annotations

import hashlib
import os
import re
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from lading.checkpoint.catalog import Catalog, Shard, TensorSpec
from lading.checkpoint.header import open_regular, read_at
from lading.errors import CorruptShardError, refusal

_BUFFER_BYTES = 4 << 20
_BLOB_NAME = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """What reading a whole checkpoint showed. Immutable."""

    num_bytes: int
    """Bytes read, headers included."""
    sha256: dict[str, str]
    """Shard → digest of the whole file; named as `Catalog.name_of` does."""
    equal: tuple[tuple[str, ...], ...]
    """Groups of two or more tensors with the same dtype, shape and bytes."""


def verify(catalog: Catalog, on_read: Callable[[int], object] = lambda _num_bytes: None) -> Verification:
    """Read all shards of a checkpoint from beginning to end.

    Args:
        catalog: what to read.
        on_read: called with the number of bytes of each piece, for a progress bar.

    Raises:
        CorruptShardError: a file that cannot be read to its end, or does not hash to what its name says.
    """
    groups: dict[tuple[object, ...], list[str]] = defaultdict(list)
    digests = {}
    for shard in catalog.shards:
        digests[catalog.name_of(shard)], tensors = _read_shard(shard, on_read)
        for name, digest in tensors.items():
            groups[shard.tensors[name]._replace(name="", offset=0), digest].append(name)
        _check_blob(shard, digests[catalog.name_of(shard)])
    return Verification(
        num_bytes=sum(shard.identity.num_bytes for shard in catalog.shards),
        sha256=digests,
        equal=tuple(tuple(names) for names in groups.values() if len(names) > 1),
    )


def _read_shard(shard: Shard, on_read: Callable[[int], object]) -> tuple[str, dict[str, bytes]]:
    """Hash the file, and each tensor's bytes as they go by."""
    whole = hashlib.sha256()
    parts = {place: hashlib.blake2b(digest_size=16) for place in {(s.offset, s.num_bytes) for s in _full(shard)}}
    descriptor = open_regular(shard.path)
    try:
        position = 0
        waiting = sorted(parts)
        while piece := read_at(descriptor, shard.path, _BUFFER_BYTES, position):
            whole.update(piece)
            _feed(parts, waiting, piece, position)
            position += len(piece)
            on_read(len(piece))
    finally:
        os.close(descriptor)
    if position != shard.identity.num_bytes:
        raise CorruptShardError(
            refusal(
                str(shard.path),
                found=f"{position} bytes",
                expected=f"{shard.identity.num_bytes} bytes, as when its header was read",
                way_out="download or save the file again",
            )
        )
    if zipfile.is_zipfile(shard.path):
        _check_zip(shard)
    return whole.hexdigest(), {spec.name: parts[spec.offset, spec.num_bytes].digest() for spec in _full(shard)}


def _full(shard: Shard) -> Iterable[TensorSpec]:
    return (spec for spec in shard.tensors.values() if spec.num_bytes)


def _feed(parts: dict[tuple[int, int], hashlib.blake2b], waiting: list[tuple[int, int]], piece: bytes, at: int) -> None:
    """Give each tensor the part of ``piece`` that is its own; drops from ``waiting`` what is complete."""
    end = at + len(piece)
    for place in [place for place in waiting if place[0] < end]:
        offset, num_bytes = place
        view = memoryview(piece)[max(0, offset - at) : max(0, offset + num_bytes - at)]
        parts[place].update(view)
        if offset + num_bytes <= end:
            waiting.remove(place)


def _check_zip(shard: Shard) -> None:
    with zipfile.ZipFile(shard.path) as archive:
        damaged = archive.testzip()
    if damaged is not None:
        raise CorruptShardError(
            refusal(
                f"{shard.path}, member {damaged!r}",
                found="another CRC-32 than the archive recorded",
                expected="undamaged data",
                way_out="download or save the file again",
            )
        )


def _check_blob(shard: Shard, sha256: str) -> None:
    promised = shard.path.resolve().name
    if _BLOB_NAME.fullmatch(promised) and promised != sha256:
        raise CorruptShardError(
            refusal(
                str(shard.path),
                found=f"content with SHA-256 {sha256}",
                expected=promised,
                way_out="delete it from the hub's cache and download it again",
            )
        )
