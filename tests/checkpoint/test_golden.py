"""Hold the header reader against golden files, one for each rule of the format, and those against safetensors."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, deserialize, safe_open

from lading.checkpoint.dtypes import ELEMENT_TYPES, element_type, torch_dtype
from lading.checkpoint.header import read_header
from lading.checkpoint.mapping import ShardMapping
from lading.errors import CheckpointError, CorruptShardError

GOLDEN = Path(__file__).parent / "golden"
MANIFEST: list[dict[str, Any]] = json.loads((GOLDEN / "manifest.json").read_text(encoding="utf-8"))
VALID = [row for row in MANIFEST if "tensors" in row]
REFUSED = [row for row in MANIFEST if "refused" in row]
PEER_LACKS = {"C128"}  # safetensors 0.8 does not know it; torch and lading do


def by_file(row: dict[str, Any]) -> str:
    return row["file"].removesuffix(".safetensors")


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_golden", GOLDEN / "make_golden.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def test_golden_files_made_again_are_those_committed(script):
    made = script.golden()
    committed = {path.name: path.read_bytes() for path in GOLDEN.iterdir() if path.suffix in (".safetensors", ".json")}
    assert made.keys() == committed.keys()
    assert [name for name in made if made[name] != committed[name]] == []


def test_golden_files_cover_every_element_type(script):
    assert {name: element.bits for name, element in ELEMENT_TYPES.items()} == script.BITS


@pytest.mark.parametrize("row", VALID, ids=by_file)
def test_read_header_of_a_valid_file_gives_names_dtypes_shapes_and_offsets(row):
    shard = read_header(GOLDEN / row["file"])
    found = {
        name: {
            "dtype": spec.element.name,
            "shape": list(spec.shape),
            "offset": spec.offset,
            "num_bytes": spec.num_bytes,
        }
        for name, spec in shard.tensors.items()
    }
    assert found == row["tensors"]
    assert dict(shard.metadata) == row["metadata"]
    assert dict(shard.aliases) == row["aliases"]
    assert [spec.offset for spec in shard.tensors.values()] == sorted(spec.offset for spec in shard.tensors.values())
    assert shard.identity.num_bytes == (GOLDEN / row["file"]).stat().st_size


@pytest.mark.parametrize("row", VALID, ids=by_file)
def test_mapped_tensors_of_a_valid_file_equal_those_of_safetensors(row):
    dtypes = {spec["dtype"] for spec in row["tensors"].values()}
    if dtypes & PEER_LACKS:
        with pytest.raises(SafetensorError):  # when this fails, the peer has learnt it: compare
            deserialize((GOLDEN / row["file"]).read_bytes())
        return
    shard = read_header(GOLDEN / row["file"])
    mapping = ShardMapping(shard)
    with safe_open(GOLDEN / row["file"], framework="pt") as peer:
        assert set(peer.keys()) == set(shard.tensors)
        for name, spec in shard.tensors.items():
            if name in row.get("unmade", ()):
                with pytest.raises(SafetensorError):
                    peer.get_tensor(name)
                continue
            ours, theirs = mapping.tensor(spec), peer.get_tensor(name)
            assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
            assert bits(ours) == bits(theirs)


@pytest.mark.parametrize("row", VALID, ids=by_file)
def test_mapped_tensors_of_a_valid_file_hold_its_bytes(row):
    raw = (GOLDEN / row["file"]).read_bytes()
    mapping = ShardMapping(read_header(GOLDEN / row["file"]))
    for name, spec in mapping.shard.tensors.items():
        if name in row.get("unmade", ()):
            continue
        tensor, expected = mapping.tensor(spec), row["tensors"][name]
        assert bits(tensor) == raw[expected["offset"] : expected["offset"] + expected["num_bytes"]]
        assert tensor.dtype == torch_dtype(ELEMENT_TYPES[expected["dtype"]])
        assert element_type(tensor.dtype) is spec.element
        assert tensor.data_ptr() % tensor.element_size() == 0
        assert tensor.untyped_storage().nbytes() == expected["num_bytes"]


@pytest.mark.parametrize("row", [row for row in VALID if "unmade" in row], ids=by_file)
def test_mapped_tensors_that_torch_cannot_hold_are_refused_when_they_are_asked_for(row):
    mapping = ShardMapping(read_header(GOLDEN / row["file"]))
    for name, says in row["unmade"].items():
        with pytest.raises(CheckpointError) as caught:
            mapping.tensor(mapping.shard.tensors[name])
        message = str(caught.value)
        assert [text for text in (row["file"], *says, "leave the tensor out") if text not in message] == [], message


@pytest.mark.parametrize("row", REFUSED, ids=by_file)
def test_read_header_of_a_broken_file_names_file_tensor_found_and_expected(row):
    with pytest.raises(CorruptShardError) as caught:
        read_header(GOLDEN / row["file"])
    assert [text for text in row["refused"] if text not in str(caught.value)] == [], str(caught.value)
    assert str(GOLDEN) in str(caught.value)
    assert "found" in str(caught.value)
    assert "expected" in str(caught.value)


LENIENT_PEER = {"bad_key_twice", "bad_metadata_key_twice"}  # rules that safetensors 0.8 does not hold, and lading does


@pytest.mark.parametrize("row", REFUSED, ids=by_file)
def test_safetensors_refuses_the_broken_file_too(row):
    raw = (GOLDEN / row["file"]).read_bytes()
    if by_file(row) in LENIENT_PEER:
        deserialize(raw)
        return
    with pytest.raises(SafetensorError):
        deserialize(raw)
