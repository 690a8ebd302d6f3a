"""Join the shards of a checkpoint into one catalog, in which each name stands once.

A name in two shards is harmless where both hold the same tensor, bit for bit: transformers would take the last, which
is the same. The catalog then has the first, and a note says so. To know it, the bytes of doubled names are compared,
and no others, a piece at a time. Doubled names of other bytes are a fault: which of the two is meant nobody can tell.

Imports no torch.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path

from lading.checkpoint.catalog import Catalog, Shard, TensorSpec
from lading.checkpoint.header import open_regular, read_at
from lading.errors import CheckpointError, CorruptShardError, name_list, refusal

_PIECE_BYTES = 1 << 20
_Reader = Callable[[int, int], bytes]


def join(shards: Iterable[Shard]) -> tuple[Catalog, list[CheckpointError]]:
    """Join shards, each name once.

    Returns:
        The catalog, with the first tensor of each name, and the faults: names whose tensors differ between shards.
    """
    kept: list[Shard] = []
    owners: dict[str, Shard] = {}
    pairs: list[tuple[Shard, Shard, list[str]]] = []
    for shard in shards:
        doubled: dict[Path, list[str]] = {}
        for name in shard.tensors:
            if name in owners:
                doubled.setdefault(owners[name].path, []).append(name)
        pairs += [(owners[names[0]], shard, names) for names in doubled.values()]
        rest = {name: spec for name, spec in shard.tensors.items() if name not in owners}
        owners.update(dict.fromkeys(rest, shard))
        kept.append(replace(shard, tensors=rest) if doubled else shard)
    notes: list[str] = []
    faults: list[CheckpointError] = []
    for one, other, names in pairs:
        same, different = _parted(one, other, names)
        notes += [_note(one, other, same)] if same else []
        faults += [_fault(one, other, different)] if different else []
    return Catalog.of(kept, notes), faults


def _parted(one: Shard, other: Shard, names: list[str]) -> tuple[list[str], list[str]]:
    """Part names that stand in two shards: those of one tensor, and those of two different ones."""
    same: set[str] = set()
    first = open_regular(one.path)
    try:
        second = open_regular(other.path)
        try:
            for name in names:
                here, there = one.tensors[name], other.tensors[name]
                if here._replace(offset=there.offset) == there and (
                    (one.identity == other.identity and here.offset == there.offset)  # two links to one file
                    or _has_same_bytes(
                        partial(read_at, first, one.path), here, partial(read_at, second, other.path), there
                    )
                ):
                    same.add(name)
        finally:
            os.close(second)
    finally:
        os.close(first)
    return [name for name in names if name in same], [name for name in names if name not in same]


def _has_same_bytes(read_one: _Reader, one: TensorSpec, read_other: _Reader, other: TensorSpec) -> bool:
    for done in range(0, one.num_bytes, _PIECE_BYTES):
        count = min(_PIECE_BYTES, one.num_bytes - done)
        if read_one(count, one.offset + done) != read_other(count, other.offset + done):
            return False
    return True


def _note(one: Shard, other: Shard, names: list[str]) -> str:
    return refusal(
        str(other.path),
        found=f"{name_list(names)} a second time, with the same bytes as in {one.path}",
        expected="each name in one shard",
        way_out="nothing to do: the first is used",
    )


def _fault(one: Shard, other: Shard, names: list[str]) -> CheckpointError:
    return CorruptShardError(
        refusal(
            str(other.path),
            found=f"{name_list(names)} with another dtype, shape or other bytes than in {one.path}",
            expected="each name in one shard",
            way_out="delete the shard that does not belong to this checkpoint",
        )
    )
