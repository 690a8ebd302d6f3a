"""Read the index of a sharded checkpoint, or refuse it.

The file, ``model.safetensors.index.json`` or ``pytorch_model.bin.index.json``, is one JSON object whose ``weight_map``
maps each tensor's name to the file name of its shard, in the same directory or in a folder below it. As in
transformers, the index says which files are shards, and the shards say what stands in them: where the two differ, that
is told, and whether a tensor is missing is seen when a model asks for it. Imports no torch.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn

from lading.checkpoint.catalog import Shard
from lading.checkpoint.header import MAX_HEADER_BYTES, open_regular, parse_json_object, read_at
from lading.errors import CheckpointError, name_list, refusal


def read_index(path: Path) -> dict[str, str]:
    """Read an index: tensor name → shard file name.

    Raises:
        CheckpointError: not JSON, no or an empty ``weight_map``, or a shard name that leaves the directory.
    """
    descriptor = open_regular(path)
    try:
        num_bytes = os.fstat(descriptor).st_size
        if num_bytes > MAX_HEADER_BYTES:
            _refuse(path, found=f"{num_bytes} bytes of text", expected=f"an index of at most {MAX_HEADER_BYTES} bytes")
        data = read_at(descriptor, path, num_bytes, 0)
    finally:
        os.close(descriptor)
    try:
        parsed = parse_json_object(data)
    except ValueError as error:
        _refuse(path, found=f"no JSON object ({error})", expected="one JSON object in UTF-8, each key once")
    if "weight_map" not in parsed:
        _refuse_configuration(path, parsed)
    weight_map = parsed.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        _refuse(path, found=f"weight_map {weight_map!r:.60}", expected="an object of tensor names to shard file names")
    for name, shard in weight_map.items():
        _check_shard_name(path, name, shard)
    return weight_map


def _refuse_configuration(path: Path, parsed: Mapping[str, Any]) -> None:
    """Refuse JSON that is known to be something else than an index."""
    for key, what in (("peft_type", "an adapter's"), ("architectures", "a model's"), ("model_type", "a model's")):
        if key in parsed:
            raise CheckpointError(
                refusal(
                    str(path),
                    found=f"{what} configuration ({key} {parsed[key]!r:.60})",
                    expected="a checkpoint, or the index of one",
                    way_out=f"name its directory, {path.parent}",
                )
            )


def _refuse(path: Path, *, found: str, expected: str) -> NoReturn:
    raise CheckpointError(
        refusal(str(path), found=found, expected=expected, way_out="download or save the index again")
    )


def _check_shard_name(path: Path, name: str, shard: object) -> None:
    if not isinstance(shard, str) or not shard or "\0" in shard:
        _refuse(path, found=f"shard {shard!r:.60} for tensor {name!r}", expected="a file name")
    pure = PurePosixPath(shard)
    if pure.is_absolute() or ".." in pure.parts or "\\" in shard:
        _refuse(
            path,
            found=f"shard {shard!r} for tensor {name!r}, which leaves the checkpoint's directory",
            expected="a file inside it",
        )


def notes_on_index(shards: Iterable[Shard], weight_map: Mapping[str, str], path: Path) -> list[str]:
    """Say where an index and its shards differ. Tensors that the index leaves out are nothing to speak of.

    Args:
        shards: those that could be read; names in others are passed over.
        weight_map: from `read_index`.
        path: the index.

    Returns:
        At most two messages: about names that no shard has, and about names in another shard than the index says.
    """
    by_path = {shard.path: shard for shard in shards}
    places = {name: shard for shard in by_path.values() for name in (*shard.tensors, *shard.aliases)}
    absent: list[str] = []
    moved: list[str] = []
    for name, file_name in weight_map.items():
        named = by_path.get(path.parent / file_name)
        if named is None or name in named.tensors or name in named.aliases:
            continue
        (moved if name in places else absent).append(name)
    notes = []
    if absent:
        notes.append(
            refusal(
                str(path),
                found=f"no data for {name_list(absent)} ({absent[0]!r} should stand in {weight_map[absent[0]]})",
                expected="every tensor of the index in its shard",
                way_out="right where these are tied to others; if a model misses them, download shards and index again",
            )
        )
    if moved:
        notes.append(
            refusal(
                str(path),
                found=f"{name_list(moved)} in another shard than named ({moved[0]!r} stands in "
                f"{places[moved[0]].path.name})",
                expected=f"{moved[0]!r} in {weight_map[moved[0]]}",
                way_out="nothing to do: the shards are right",
            )
        )
    return notes
