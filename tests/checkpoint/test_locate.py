"""Find checkpoints: a file, a directory, the hub's cache (made by hand, offline), and say clearly what is not there."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from handmade import run_python
from safetensors.torch import save, save_file

from lading.checkpoint.locate import Source, candidates, find_entry, open_catalog, read_shard
from lading.errors import CheckpointNotFoundError, CorruptShardError

REPO = "org/tiny-model"
MAIN, OLD = "a" * 40, "b" * 40


def add_to_cache(
    cache: Path, files: dict[str, bytes], *, commit: str = MAIN, ref: str | None = "main", repo: str = REPO
) -> Path:
    """Lay files out as huggingface_hub does: blobs by hash, snapshots of links to them, refs; give the snapshot."""
    root = cache / f"models--{repo.replace('/', '--')}"
    (root / "blobs").mkdir(parents=True, exist_ok=True)
    (root / "refs").mkdir(exist_ok=True)
    snapshot = root / "snapshots" / commit
    for name, content in files.items():
        blob = root / "blobs" / hashlib.sha256(content).hexdigest()
        blob.write_bytes(content)
        link = snapshot / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(Path("../" * (2 + name.count("/"))) / "blobs" / blob.name)
    if ref:
        (root / "refs" / ref).write_text(commit)
    return snapshot


def shard_of(value: float) -> bytes:
    return save({"a": torch.full((2,), value)})


def value_of(source: Source | str | Path) -> float:
    from lading.checkpoint.mapping import map_catalog, tensors_of

    catalog = open_catalog(source)
    return float(tensors_of(catalog, map_catalog(catalog))["a"][0])


def test_candidates_stand_in_the_order_that_transformers_tries():
    assert candidates() == (
        "model.safetensors",
        "model.safetensors.index.json",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
    )
    assert candidates("fp16")[:2] == ("model.fp16.safetensors", "model.safetensors.index.fp16.json")


def test_find_entry_in_a_directory_prefers_safetensors_and_the_single_file(tmp_path):
    for name in reversed(candidates()):
        (tmp_path / name).write_bytes(b"x")
        entry, reach = find_entry(Source(path_or_repo_id=str(tmp_path)))
        assert entry == tmp_path / name
        assert reach("other") == tmp_path / "other"


def test_open_catalog_of_a_path_object_a_string_and_a_home_path(tmp_path, monkeypatch):
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    monkeypatch.setenv("HOME", str(tmp_path))
    for source in (tmp_path, str(tmp_path), tmp_path / "model.safetensors", "~", "~/model.safetensors"):
        assert len(open_catalog(source)) == 1


def test_open_catalog_of_a_relative_path_that_looks_like_a_repo_id_takes_the_directory(tmp_path, monkeypatch):
    (tmp_path / "org" / "name").mkdir(parents=True)
    save_file({"a": torch.ones(2)}, tmp_path / "org" / "name" / "model.safetensors")
    monkeypatch.chdir(tmp_path)
    assert len(open_catalog("org/name")) == 1


def test_open_catalog_with_subfolder_and_variant_in_a_directory(tmp_path):
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "model.safetensors").write_bytes(shard_of(1))
    (tmp_path / "unet" / "model.fp16.safetensors").write_bytes(shard_of(2))
    (tmp_path / "model.safetensors").write_bytes(shard_of(3))
    assert value_of(Source(path_or_repo_id=str(tmp_path))) == 3
    assert value_of(Source(path_or_repo_id=str(tmp_path), subfolder="unet")) == 1
    assert value_of(Source(path_or_repo_id=str(tmp_path), subfolder="unet", variant="fp16")) == 2


def test_open_catalog_of_a_variant_index_reads_its_shards(tmp_path):
    (tmp_path / "model.fp16-00001-of-00001.safetensors").write_bytes(shard_of(5))
    index = {"weight_map": {"a": "model.fp16-00001-of-00001.safetensors"}}
    (tmp_path / "model.safetensors.index.fp16.json").write_text(json.dumps(index))
    assert value_of(Source(path_or_repo_id=str(tmp_path), variant="fp16")) == 5


def test_read_shard_chooses_the_reader_by_the_name(tmp_path):
    for name in ("a.bin", "a.pt", "a.pth"):
        torch.save({"a": torch.ones(2)}, tmp_path / name)
        assert list(read_shard(tmp_path / name).tensors) == ["a"]
    save_file({"a": torch.ones(2)}, tmp_path / "a.safetensors")
    assert list(read_shard(tmp_path / "a.safetensors").tensors) == ["a"]
    shutil.copy(tmp_path / "a.bin", tmp_path / "b.safetensors")
    with pytest.raises(CorruptShardError, match=r"b\.safetensors: found a header"):
        read_shard(tmp_path / "b.safetensors")


def test_open_catalog_of_a_dangling_link_names_it(tmp_path):
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "gone")
    with pytest.raises(CorruptShardError, match=r"model\.safetensors: found No such file"):
        open_catalog(tmp_path)


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ([], "found no weights · expected model.safetensors or model.safetensors.index.json or pytorch_model.bin"),
        (["other.safetensors", "x.bin"], "found only other.safetensors, x.bin · expected model.safetensors"),
        (
            ["adapter_config.json", "adapter_model.safetensors"],
            r"found an adapter \(adapter_config.json\) without a model",
        ),
        (["llama.gguf"], "found only llama.gguf"),
    ],
)
def test_open_catalog_of_a_directory_without_a_checkpoint_says_what_is_there(tmp_path, files, says):
    for name in files:
        (tmp_path / name).touch()
    with pytest.raises(CheckpointNotFoundError, match=says) as caught:
        open_catalog(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "name the file itself, or check subfolder and variant" in str(caught.value)
    assert isinstance(caught.value, FileNotFoundError)


def test_open_catalog_of_a_missing_subfolder_or_variant_says_so(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(shard_of(1))
    with pytest.raises(CheckpointNotFoundError, match="/unet: found no such directory"):
        open_catalog(Source(path_or_repo_id=str(tmp_path), subfolder="unet"))
    with pytest.raises(
        CheckpointNotFoundError, match=r"found only model\.safetensors · expected model\.fp16\.safetensors"
    ):
        open_catalog(Source(path_or_repo_id=str(tmp_path), variant="fp16"))


@pytest.mark.parametrize(
    "path", ["/nowhere/at/all", "a/b/c", "./none", "../none", "", "what?", "a\0b", "x" * 5000, "/" + "y" * 5000]
)
def test_open_catalog_of_a_path_that_is_not_there_says_so(path):
    with pytest.raises(CheckpointNotFoundError) as caught:
        open_catalog(path)
    assert "expected" in str(caught.value)


# The hub's cache -----------------------------------------------------------------------------------------------------


def test_open_catalog_of_a_repo_id_reads_the_cache_through_its_links(tmp_path):
    snapshot = add_to_cache(tmp_path, {"model.safetensors": shard_of(1)})
    source = Source(path_or_repo_id=REPO, cache_dir=str(tmp_path))
    catalog = open_catalog(source)
    assert catalog.shards[0].path == snapshot / "model.safetensors"
    assert catalog.shards[0].path.is_symlink()
    assert value_of(source) == 1


def test_open_catalog_of_a_revision_takes_branch_tag_or_commit(tmp_path):
    add_to_cache(tmp_path, {"model.safetensors": shard_of(1)})
    add_to_cache(tmp_path, {"model.safetensors": shard_of(2)}, commit=OLD, ref="v1")
    for revision, value in ((None, 1), ("main", 1), ("v1", 2), (OLD, 2), (MAIN, 1)):
        assert value_of(Source(path_or_repo_id=REPO, cache_dir=str(tmp_path), revision=revision)) == value


def test_open_catalog_of_a_sharded_repo_follows_index_and_subfolder(tmp_path):
    index = json.dumps({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}).encode()
    files = {
        "part/model.safetensors.index.json": index,
        "part/one.safetensors": shard_of(7),
        "part/two.safetensors": save({"b": torch.ones(1)}),
    }
    add_to_cache(tmp_path, files)
    source = Source(path_or_repo_id=REPO, cache_dir=str(tmp_path), subfolder="part")
    assert sorted(spec.name for spec in open_catalog(source)) == ["a", "b"]
    assert value_of(source) == 7


def test_open_catalog_of_a_variant_and_of_bin_in_the_cache(tmp_path):
    torch.save({"a": torch.full((2,), 4.0)}, tmp_path / "saved.bin")
    add_to_cache(
        tmp_path, {"pytorch_model.bin": (tmp_path / "saved.bin").read_bytes(), "model.fp16.safetensors": shard_of(5)}
    )
    assert value_of(Source(path_or_repo_id=REPO, cache_dir=str(tmp_path))) == 4
    assert value_of(Source(path_or_repo_id=REPO, cache_dir=str(tmp_path), variant="fp16")) == 5


def test_open_catalog_of_a_repo_with_an_absent_shard_names_it(tmp_path):
    index = json.dumps({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}).encode()
    add_to_cache(tmp_path, {"model.safetensors.index.json": index, "one.safetensors": shard_of(7)})
    with pytest.raises(
        CheckpointNotFoundError, match=r"org/tiny-model: found .*shard 'two.safetensors' missing"
    ) as caught:
        open_catalog(Source(path_or_repo_id=REPO, cache_dir=str(tmp_path)))
    assert "check the name, download the model, or unset HF_HUB_OFFLINE" in str(caught.value)


@pytest.mark.parametrize("is_flagged", [True, False], ids=["local_files_only", "HF_HUB_OFFLINE"])
def test_open_catalog_of_a_repo_that_is_not_in_the_cache_says_so(tmp_path, is_flagged):
    source = Source(path_or_repo_id="org/absent", cache_dir=str(tmp_path), local_files_only=is_flagged)
    with pytest.raises(CheckpointNotFoundError) as caught:
        open_catalog(source)
    message = str(caught.value)
    assert message.startswith(
        "org/absent: found no directory of that name and nothing in the hub's cache or on the hub ("
    )
    assert "expected model.safetensors or " in message


def test_open_catalog_of_a_revision_that_is_not_in_the_cache_names_it(tmp_path):
    add_to_cache(tmp_path, {"model.safetensors": shard_of(1)})
    with pytest.raises(CheckpointNotFoundError, match="org/tiny-model at v9: found"):
        open_catalog(Source(path_or_repo_id=REPO, cache_dir=str(tmp_path), revision="v9"))


@pytest.mark.parametrize("variable", ["HF_HOME", "HF_HUB_CACHE"])
def test_open_catalog_finds_the_cache_by_the_environment(tmp_path, monkeypatch, variable):
    add_to_cache(tmp_path / "hub", {"model.safetensors": shard_of(1)})
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.setenv(variable, str(tmp_path / "hub" if variable == "HF_HUB_CACHE" else tmp_path))
    code = f"from lading.checkpoint.locate import open_catalog; print(len(open_catalog({REPO!r})))"
    assert run_python(code) == "1\n"


def test_open_catalog_of_a_local_path_imports_neither_torch_nor_the_hub(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(shard_of(1))
    code = """
import sys
from lading.checkpoint.locate import open_catalog
print(len(open_catalog(sys.argv[1])))
assert not {"torch", "transformers", "huggingface_hub", "numpy"} & set(sys.modules), sorted(sys.modules)
"""
    assert run_python(code, tmp_path) == "1\n"
