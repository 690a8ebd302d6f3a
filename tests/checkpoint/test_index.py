"""Read indexes of sharded checkpoints, valid, hostile and mutated, and hold them against their shards."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from handmade import attempt
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from lading.checkpoint.index import read_index
from lading.checkpoint.locate import open_catalog
from lading.errors import CheckpointError, CorruptShardError, MissingTensorError

NAME = "model.safetensors.index.json"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def examples(at_least: int) -> settings:
    unfit = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
    return settings(max_examples=max(at_least, settings().max_examples), suppress_health_check=unfit)


def write(directory: Path, content: Any) -> Path:
    path = directory / NAME
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return path


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    save_file({"a": torch.ones(2), "b": torch.zeros(2)}, tmp_path / FIRST)
    save_file({"c": torch.ones(3)}, tmp_path / SECOND)
    write(tmp_path, {"metadata": {"total_size": 28}, "weight_map": {"a": FIRST, "b": FIRST, "c": SECOND}})
    return tmp_path


def test_open_catalog_of_a_sharded_directory_lists_all_tensors(sharded):
    catalog = open_catalog(sharded)
    assert {spec.name: spec.shape for spec in catalog} == {"a": (2,), "b": (2,), "c": (3,)}
    assert [shard.path.name for shard in catalog.shards] == [FIRST, SECOND]
    assert catalog.owners["c"].path == sharded / SECOND
    assert (len(catalog), catalog.num_bytes) == (3, 28)


def test_open_catalog_of_the_index_itself_or_of_a_shard_works(sharded):
    assert len(open_catalog(sharded / NAME)) == 3
    assert [spec.name for spec in open_catalog(sharded / SECOND)] == ["c"]


def test_open_catalog_of_shards_in_a_subdirectory_of_the_index(tmp_path):
    (tmp_path / "parts").mkdir()
    save_file({"a": torch.ones(2)}, tmp_path / "parts" / "one.safetensors")
    write(tmp_path, {"weight_map": {"a": "parts/one.safetensors"}})
    assert [spec.name for spec in open_catalog(tmp_path)] == ["a"]


def test_open_catalog_with_tensors_that_the_index_leaves_out_lists_them_too(sharded):
    write(sharded, {"weight_map": {"a": FIRST, "c": SECOND}})
    assert sorted(spec.name for spec in open_catalog(sharded)) == ["a", "b", "c"]


def test_open_catalog_with_a_tied_name_left_out_of_its_shard_accepts_it(tmp_path):
    save_file({"embed": torch.ones(2)}, tmp_path / FIRST, metadata={"format": "pt", "head": "embed"})
    write(tmp_path, {"weight_map": {"embed": FIRST, "head": FIRST}})
    catalog = open_catalog(tmp_path)
    assert catalog.aliases == {"head": "embed"}


REFUSED: dict[str, tuple[Any, str]] = {
    "git_lfs": (b"version https://git-lfs.github.com/spec/v1\nsize 4\n", "git-lfs pointer"),
    "nothing": (b"", r"an empty file \(0 bytes\)"),
    "not_json": (b"{weight_map", "no JSON"),
    "not_utf8": (b'{"weight_map":{"\xff":"a"}}', "no JSON"),
    "nested": (b'{"weight_map":' * 100_000, "no JSON"),
    "long_number": (b'{"weight_map":' + b"9" * 10_000 + b"}", "no JSON"),
    "key_twice": (b'{"weight_map":{"a":"x","a":"y"}}', "the key 'a' twice"),
    "map_twice": (b'{"weight_map":{"a":"x"},"weight_map":{"a":"y"}}', "the key 'weight_map' twice"),
    "list": ([], "JSON that is a list, no object"),
    "no_map": ({"metadata": {}}, "weight_map None"),
    "empty_map": ({"weight_map": {}}, "weight_map {}"),
    "map_is_a_list": ({"weight_map": [FIRST]}, r"weight_map \['model"),
    "map_is_null": ({"weight_map": None}, "weight_map None"),
    "shard_is_a_number": ({"weight_map": {"a": 1}}, "shard 1 for tensor 'a' · expected a file name"),
    "shard_is_null": ({"weight_map": {"a": None}}, "shard None for tensor 'a'"),
    "shard_is_empty": ({"weight_map": {"a": ""}}, "shard '' for tensor 'a'"),
    "shard_has_a_zero": ({"weight_map": {"a": "x\0y"}}, r"shard 'x\\x00y' for tensor 'a'"),
    "shard_above": ({"weight_map": {"a": "../x.safetensors"}}, "'../x.safetensors' for tensor 'a', which leaves"),
    "shard_above_inside": ({"weight_map": {"a": "b/../../x"}}, "which leaves the checkpoint's directory"),
    "shard_above_and_back": ({"weight_map": {"a": "b/../x"}}, "which leaves the checkpoint's directory"),
    "shard_absolute": ({"weight_map": {"a": "/etc/passwd"}}, "'/etc/passwd' for tensor 'a', which leaves"),
    "shard_with_backslash": ({"weight_map": {"a": "..\\x"}}, "which leaves the checkpoint's directory"),
    "shard_with_a_lone_surrogate": (b'{"weight_map":{"a":"\\ud800.safetensors"}}', "."),
    "shard_name_too_long": ({"weight_map": {"a": "x" * 5000}}, "."),
    "shard_is_the_directory": ({"weight_map": {"a": "."}}, "a directory"),
    "shard_absent": ({"weight_map": {"a": "absent.safetensors"}}, r"absent\.safetensors: found No such file"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_open_catalog_of_a_broken_index_names_file_found_and_expected(tmp_path, case):
    content, says = REFUSED[case]
    write(tmp_path, content)
    with pytest.raises(CheckpointError, match=says) as caught:
        open_catalog(tmp_path)
    message = str(caught.value)
    assert str(tmp_path) in message
    assert "found" in message
    assert "expected" in message
    assert message.count(" · ") >= 2, "no way out"
    assert len(message) < 20_000


def test_read_index_follows_no_path_out_of_the_directory(tmp_path):
    (tmp_path / "model").mkdir()
    save_file({"a": torch.ones(2)}, tmp_path / "secret.safetensors")
    for shard in ("../secret.safetensors", str(tmp_path / "secret.safetensors"), "x/../../secret.safetensors"):
        write(tmp_path / "model", {"weight_map": {"a": shard}})
        with pytest.raises(CheckpointError, match="leaves the checkpoint's directory"):
            open_catalog(tmp_path / "model")


def test_open_catalog_with_a_shard_that_is_a_directory_refuses(sharded):
    (sharded / SECOND).unlink()
    (sharded / SECOND).mkdir()
    with pytest.raises(CorruptShardError, match=rf"{SECOND}: found a directory · expected a regular file"):
        open_catalog(sharded)


def test_open_catalog_with_a_name_that_no_shard_has_lists_all_such_names(sharded):
    missing = {f"layer.{index}": SECOND for index in range(12)}
    write(sharded, {"weight_map": {"a": FIRST, **missing}})
    with pytest.raises(MissingTensorError) as caught:
        open_catalog(sharded)
    message = str(caught.value)
    assert message.startswith(f"{sharded / NAME}: found no data for 'layer.0' in {SECOND}, ")
    assert "'layer.9'" in message
    assert "'layer.10'" not in message
    assert (
        "… (12 in all) · expected every tensor of the index in its shard · download the shards and the index again"
        in message
    )


def test_open_catalog_with_a_name_in_another_shard_than_named_refuses(sharded):
    write(sharded, {"weight_map": {"a": FIRST, "b": SECOND, "c": SECOND}})
    with pytest.raises(CheckpointError) as caught:
        open_catalog(sharded)
    assert f"found 'b' in another shard than named ('b' stands in {FIRST}) · expected 'b' in {SECOND}" in str(
        caught.value
    )


def test_open_catalog_with_one_name_in_two_shards_refuses(sharded):
    save_file({"c": torch.ones(3), "a": torch.full((2,), 9.0)}, sharded / SECOND)
    with pytest.raises(CheckpointError) as caught:
        open_catalog(sharded)
    assert f"tensor 'a' stands in two shards: {FIRST} and {SECOND} · expected each name in exactly one" in str(
        caught.value
    )


def test_open_catalog_with_one_shard_under_two_spellings_is_read_once_or_refused(tmp_path):
    save_file({"a": torch.ones(2), "b": torch.ones(2)}, tmp_path / FIRST)
    write(tmp_path, {"weight_map": {"a": FIRST, "b": f"./{FIRST}"}})
    catalog, message = attempt(open_catalog, tmp_path, refusing=CheckpointError)  # both are right
    assert FIRST in message if catalog is None else len(catalog.shards) == 1


@pytest.mark.parametrize("kind", ["truncated", "empty", "trailing", "noise"])
def test_open_catalog_with_one_broken_shard_names_that_shard(sharded, kind):
    raw = (sharded / SECOND).read_bytes()
    broken = {"truncated": raw[:-1], "empty": b"", "trailing": raw + b"\0", "noise": bytes(range(64))}[kind]
    (sharded / SECOND).write_bytes(broken)
    with pytest.raises(CorruptShardError, match=SECOND):
        open_catalog(sharded)


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
maps = st.dictionaries(
    st.text(max_size=4), anything | st.sampled_from([FIRST, SECOND, "..", "/", "a/b", "."]), max_size=4
)


@examples(200)
@given(content=anything | st.fixed_dictionaries({"weight_map": maps | anything}, optional={"metadata": anything}))
def test_open_catalog_of_any_json_index_is_consistent_or_refused(tmp_path, content):
    hold_to_law(tmp_path, json.dumps(content).encode())


SAMPLE = json.dumps({"metadata": {"total_size": 20}, "weight_map": {"a": FIRST, "c": SECOND}}).encode()


@examples(300)
@given(
    edits=st.lists(st.tuples(st.integers(0, len(SAMPLE) - 1), st.integers(0, 255)), max_size=3),
    cut=st.none() | st.integers(0, 200),
)
def test_open_catalog_of_a_mutated_index_is_consistent_or_refused(tmp_path, edits, cut):
    raw = bytearray(SAMPLE)
    for position, value in edits:
        raw[position] = value
    hold_to_law(tmp_path, bytes(raw[:cut]))


def hold_to_law(directory: Path, raw: bytes) -> None:
    """Check that an index beside two good shards is refused by name, or promises exactly what they hold."""
    if not (directory / FIRST).exists():
        save_file({"a": torch.ones(2)}, directory / FIRST)
        save_file({"c": torch.ones(3)}, directory / SECOND)
    path = write(directory, raw)
    tracemalloc.start()
    try:
        catalog, message = attempt(open_catalog, directory, refusing=CheckpointError)
        if catalog is None:
            assert message is not None
            assert str(directory) in message or "stands in two shards" in message
            assert "expected" in message
        else:
            promised = read_index(path)
            assert {name: catalog.owners[name].path.name for name in promised} == promised
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()
