"""Read the index of a sharded checkpoint, or refuse it.

The file, ``model.safetensors.index.json`` or ``pytorch_model.bin.index.json``, is one JSON object whose ``weight_map``
maps each tensor's name to the file name of its shard, in the same directory. Knows no shard's inside; imports no torch.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import NoReturn

from lading.checkpoint.catalog import Catalog
from lading.checkpoint.header import open_regular, parse_json_object
from lading.errors import CheckpointError, MissingTensorError, name_list, refusal


def read_index(path: Path) -> dict[str, str]:
    """Read an index: tensor name → shard file name.

    Raises:
        CheckpointError: not JSON, no or an empty ``weight_map``, or a shard name that leaves the directory.
    """
    descriptor = open_regular(path)
    with os.fdopen(descriptor, "rb") as file:
        data = file.read()
    try:
        parsed = parse_json_object(data)
    except ValueError as error:
        _refuse(path, found=f"no JSON object ({error})", expected="one JSON object in UTF-8, each key once")
    weight_map = parsed.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        _refuse(path, found=f"weight_map {weight_map!r:.60}", expected="an object of tensor names to shard file names")
    for name, shard in weight_map.items():
        _check_shard_name(path, name, shard)
    return weight_map


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


def check_against_index(catalog: Catalog, weight_map: Mapping[str, str], path: Path) -> None:
    """Hold the shards against what the index promised. Tensors that the index leaves out are allowed.

    Raises:
        MissingTensorError: names of the index that stand in no shard, or in another one than it says.
    """
    absent = [name for name in weight_map if name not in catalog and name not in catalog.aliases]
    if absent:
        listed = ", ".join(f"{name!r} in {weight_map[name]}" for name in absent[:10])
        more = f" … ({len(absent)} in all)" if len(absent) > 10 else ""
        raise MissingTensorError(
            refusal(
                str(path),
                found=f"no data for {listed}{more}",
                expected="every tensor of the index in its shard",
                way_out="download the shards and the index again, from one revision",
            )
        )
    moved = [
        name for name, shard in weight_map.items() if name in catalog and not _same(catalog, name, shard, path.parent)
    ]
    if moved:
        where = catalog.owners[moved[0]].path.name
        raise CheckpointError(
            refusal(
                str(path),
                found=f"{name_list(moved)} in another shard than named ({moved[0]!r} stands in {where})",
                expected=f"{moved[0]!r} in {weight_map[moved[0]]}",
                way_out="download the shards and the index again, from one revision",
            )
        )


def _same(catalog: Catalog, name: str, shard: str, directory: Path) -> bool:
    return catalog.owners[name].path == directory / shard
