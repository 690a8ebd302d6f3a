"""Read indexes of sharded checkpoints, valid, hostile and mutated, and hold them against their shards."""

from __future__ import annotations

import json
import logging
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from handmade import attempt
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

import lading
from lading.checkpoint.catalog import Catalog
from lading.checkpoint.index import read_index
from lading.checkpoint.locate import open_catalog
from lading.checkpoint.mapping import map_catalog, tensors_of
from lading.checkpoint.verify import verify
from lading.errors import CheckpointError, CheckpointNotFoundError, CorruptShardError, MissingTensorError

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
    "shard_absent": ({"weight_map": {"a": "absent.safetensors"}}, r"found 0 of its 1 shards; missing are 'absent\."),
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


def warnings_of(caplog: pytest.LogCaptureFixture, source: Path) -> tuple[Catalog, list[str]]:
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="lading"):
        catalog = open_catalog(source)
    return catalog, [record.getMessage() for record in caplog.records]


def test_open_catalog_with_names_that_no_shard_has_warns_once_and_reads_the_others(sharded, caplog):
    stale = {f"layer.{index}": SECOND for index in range(12)}
    write(sharded, {"weight_map": {"a": FIRST, **stale}})
    catalog, (said,) = warnings_of(caplog, sharded)
    assert sorted(catalog.owners) == ["a", "b", "c"]
    assert (len(catalog), catalog.num_bytes, catalog.notes) == (3, 28, (said,))
    assert said.startswith(f"{sharded / NAME}: found no data for 'layer.0', ")
    assert "'layer.9' … (12 in all) ('layer.0' should stand in " + SECOND in said
    assert "'layer.10'" not in said
    assert " · expected every tensor of the index in its shard · right where these are tied to others" in said


def test_open_catalog_with_a_name_in_another_shard_than_named_warns_and_takes_it_from_there(sharded, caplog):
    write(sharded, {"weight_map": {"a": FIRST, "b": SECOND, "c": SECOND}})
    catalog, (said,) = warnings_of(caplog, sharded)
    assert catalog.owners["b"].path == sharded / FIRST
    assert f"found 'b' in another shard than named ('b' stands in {FIRST}) · expected 'b' in {SECOND}" in said


def test_load_into_with_an_index_that_names_too_much_misses_only_what_the_module_needs(sharded):
    write(sharded, {"weight_map": {"a": FIRST, "b": FIRST, "c": SECOND, "stale": SECOND}})
    with lading.empty():
        net = Holder(a=2, b=2, c=3)
    report = lading.load_into(net, sharded)
    assert (report.num_tensors, report.mapped_bytes, report.missing, report.unexpected) == (3, 28, (), ())
    with lading.empty():
        net = Holder(a=2, b=2, c=3, stale=1)
    with pytest.raises(MissingTensorError, match="no tensor for 'stale'"):
        lading.load_into(net, sharded)


class Holder(nn.Module):
    def __init__(self, **sizes: int) -> None:
        super().__init__()
        for name, size in sizes.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(size)))


def test_open_catalog_with_equal_tensors_of_one_name_in_two_shards_takes_it_once(sharded, caplog):
    """Also one that is longer than what is compared at a time."""
    large = torch.arange(1 << 19, dtype=torch.float32)
    save_file({"a": torch.ones(2), "b": torch.zeros(2), "large": large}, sharded / FIRST)
    save_file({"c": torch.ones(3), "a": torch.ones(2), "large": large}, sharded / SECOND)
    write(sharded, {"weight_map": {"a": SECOND, "b": FIRST, "c": SECOND, "large": FIRST}})
    catalog, (said,) = warnings_of(caplog, sharded)
    assert [spec.name for spec in catalog] == ["a", "b", "large", "c"]
    assert (len(catalog), catalog.num_bytes) == (4, 28 + large.nbytes)
    assert sorted(catalog.owners) == ["a", "b", "c", "large"]
    assert said.startswith(f"{sharded / SECOND}: found 'a', 'large' a second time, with the same bytes as in ")
    assert str(sharded / FIRST) in said
    tensors = tensors_of(catalog, map_catalog(catalog))
    assert torch.equal(tensors["large"], large)
    with lading.empty():
        net = Holder(a=2, b=2, c=3, large=1 << 19)
    assert lading.load_into(net, sharded).mapped_bytes == catalog.num_bytes


@pytest.mark.parametrize("difference", ["values", "the last byte", "shape", "dtype"])
def test_open_catalog_with_different_tensors_of_one_name_in_two_shards_refuses(sharded, difference):
    large = torch.zeros(1 << 19)
    other = large.clone()
    if difference == "values":
        other[0] = 1
    elif difference == "the last byte":
        other.view(torch.uint8)[-1] = 1
    save_file({"a": large, "b": torch.zeros(2)}, sharded / FIRST)
    other = {"shape": other.view(2, -1), "dtype": other.view(torch.int32)}.get(difference, other)
    save_file({"a": other, "b": torch.zeros(2)}, sharded / SECOND)
    with pytest.raises(CheckpointError) as caught:
        open_catalog(sharded)
    assert str(caught.value) == (
        f"{sharded / SECOND}: found 'a' with another dtype, shape or other bytes than in {sharded / FIRST} · expected "
        "each name in one shard · delete the shard that does not belong to this checkpoint"
    )


def test_open_catalog_with_doubled_names_compares_them_in_little_memory(sharded):
    for name in (FIRST, SECOND):
        save_file({"a": torch.zeros(8 << 20)}, sharded / name)
    tracemalloc.start()
    try:
        assert open_catalog(sharded).num_bytes == 32 << 20
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


def test_open_catalog_with_two_links_to_one_shard_takes_its_tensors_once(sharded):
    (sharded / SECOND).unlink()
    (sharded / SECOND).symlink_to(FIRST)
    catalog = open_catalog(sharded)
    assert (sorted(catalog.owners), catalog.num_bytes) == (["a", "b"], 16)


def test_open_catalog_with_a_name_that_one_shard_ties_and_another_holds_takes_the_tensor(sharded):
    save_file({"a": torch.ones(2), "b": torch.zeros(2)}, sharded / FIRST, metadata={"format": "pt", "c": "a"})
    catalog = open_catalog(sharded)
    assert catalog.aliases == {}
    assert catalog["c"].shape == (3,)


def test_open_catalog_without_some_shards_names_the_index_and_all_of_them(tmp_path):
    names = [f"model-{index:05}-of-00014.safetensors" for index in range(1, 15)]
    write(tmp_path, {"weight_map": {f"t{index}": name for index, name in enumerate(names)}})
    for name in names[:2]:
        save_file({name: torch.ones(2)}, tmp_path / name)
    (tmp_path / names[2]).symlink_to(tmp_path / "gone")
    with pytest.raises(CheckpointNotFoundError) as caught:
        open_catalog(tmp_path)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / NAME}: found 2 of its 14 shards; missing are {names[2]!r}, {names[3]!r}, ")
    assert f"{names[11]!r} … (12 in all) (a link to {tmp_path / 'gone'}, which is not there)" in message
    assert names[12] not in message
    assert f" · expected all of them in {tmp_path} · download those from the same revision" in message
    assert isinstance(caught.value, FileNotFoundError)


def test_open_catalog_of_shards_of_one_name_in_two_folders_tells_them_apart(tmp_path):
    for folder, name in (("one", "a"), ("two", "b")):
        (tmp_path / folder).mkdir()
        save_file({name: torch.ones(2)}, tmp_path / folder / "part.safetensors")
    write(tmp_path, {"weight_map": {"a": "one/part.safetensors", "b": "two/part.safetensors"}})
    catalog = open_catalog(tmp_path)
    assert catalog.directory == tmp_path
    assert catalog.describe() == "'one/part.safetensors', 'two/part.safetensors'"
    assert sorted(verify(catalog).sha256) == ["one/part.safetensors", "two/part.safetensors"]


def test_open_catalog_of_a_folder_of_shards_in_one_subfolder_names_them_without_it(tmp_path):
    (tmp_path / "one").mkdir()
    save_file({"a": torch.ones(2)}, tmp_path / "one" / "part.safetensors")
    write(tmp_path, {"weight_map": {"a": "one/part.safetensors"}})
    assert open_catalog(tmp_path).describe() == "'part.safetensors'"


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
    """Check that an index beside two good shards is refused by name, or promises what they hold, or is told apart."""
    if not (directory / FIRST).exists():
        save_file({"a": torch.ones(2)}, directory / FIRST)
        save_file({"c": torch.ones(3)}, directory / SECOND)
    path = write(directory, raw)
    tracemalloc.start()
    try:
        catalog, message = attempt(open_catalog, directory, refusing=CheckpointError)
        if catalog is None:
            assert message is not None
            assert str(directory) in message
            assert "expected" in message
        else:
            promised = read_index(path)
            held = {name: catalog.owners[name].path.name for name in promised if name in catalog}
            assert (held == promised) is not bool(catalog.notes)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()
