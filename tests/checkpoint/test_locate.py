"""Find checkpoints: a file, a directory, the hub's cache (made by hand, offline), and say clearly what is not there."""

from __future__ import annotations

import bz2
import errno
import gzip
import hashlib
import io
import json
import lzma
import os
import re
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from handmade import run_python
from safetensors.torch import save, save_file

from lading.checkpoint.locate import Source, candidates, find_entry, find_file, open_catalog, read_shard
from lading.checkpoint.mapping import map_catalog, tensors_of
from lading.errors import CheckpointError, CheckpointNotFoundError, CorruptShardError, printable

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


@pytest.mark.parametrize("name", ["a.safetensors", "a.bin", "a.pt", "a.pth", "a.ckpt", "a.gguf", "a.json", "a"])
@pytest.mark.parametrize("kind", ["safetensors", "zip", "legacy", "legacy, pickle protocol 1"])
def test_open_catalog_of_a_file_of_any_name_reads_what_it_is(tmp_path, name, kind):
    path, state = tmp_path / name, {"a": torch.arange(2.0)}
    if kind == "safetensors":
        save_file(state, path)
    else:
        protocol = 1 if kind.endswith("1") else 2
        torch.save(state, path, _use_new_zipfile_serialization=kind == "zip", pickle_protocol=protocol)
    catalog = open_catalog(path)
    assert torch.equal(tensors_of(catalog, map_catalog(catalog))["a"], state["a"])


def test_open_catalog_of_a_model_file_that_is_of_the_other_kind_reads_it(tmp_path):
    torch.save({"a": torch.full((2,), 3.0)}, tmp_path / "model.safetensors")
    assert value_of(tmp_path) == 3


@pytest.mark.parametrize("name", ["index", "weights.safetensors", "my.index.json"])
def test_open_catalog_of_an_index_of_any_name_reads_its_shards(tmp_path, name):
    (tmp_path / "one.safetensors").write_bytes(shard_of(4))
    (tmp_path / name).write_text(json.dumps({"weight_map": {"a": "one.safetensors"}}, indent=2))
    assert value_of(tmp_path / name) == 4


@pytest.mark.parametrize("length", [0x8B1F, 0x4D50, 0x3A0708, 0x12_0108, 0x6867])
def test_open_catalog_of_safetensors_whose_length_looks_like_another_format_reads_it(tmp_path, length):
    """The first bytes of a file of safetensors are a number, and any number may be it: gzip's, ONNX's, …"""
    raw = shard_of(6)
    text = raw[8 : 8 + int.from_bytes(raw[:8], "little")]
    (tmp_path / "model.safetensors").write_bytes(
        length.to_bytes(8, "little") + text.ljust(length) + raw[8 + len(text) :]
    )
    assert value_of(tmp_path) == 6


def numpy_file(**arrays: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.savez(stream, **arrays)
    return stream.getvalue()


def zip_of(**members: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return stream.getvalue()


def tar_of(name: str, content: bytes) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        info = tarfile.TarInfo(name)
        info.size = len(content)
        archive.addfile(info, io.BytesIO(content))
    return stream.getvalue()


FOREIGN: dict[str, tuple[bytes, str, str]] = {
    "gguf": (b"GGUF\x03\0\0\0" + bytes(100), "GGUF, the format of llama.cpp", "gguf_file="),
    "ggml": (b"tjgg\x03\0\0\0" + bytes(100), "GGML, an old format of llama.cpp", "gguf_file="),
    "npz": (numpy_file(a=np.ones(3)), r"a NumPy array \(\.npz\)|a NumPy archive \(\.npz\)", "numpy.load"),
    "npy": (b"\x93NUMPY\x01\0" + bytes(100), r"a NumPy array \(\.npy\)", "numpy.load"),
    "zip": (zip_of(**{"model.safetensors": shard_of(1)}), "a zip archive of 'model.safetensors'", "unpack it"),
    "zip_of_nothing": (zip_of(), ".", "."),
    "hdf5": (b"\x89HDF\r\n\x1a\n" + bytes(100), "HDF5, in which Keras and TensorFlow keep weights", "save_pretrained"),
    "onnx": (b"\x08\x08\x12\x07pytorch" + bytes(100), "an ONNX model", "that it was exported from"),
    "saved_model": (b"\x08\x01\x12\x90\x02" + bytes(100), "a TensorFlow model", "save_pretrained"),
    "tflite": (b"\x1c\0\0\0TFL3" + bytes(100), "a TensorFlow Lite model", "save_pretrained"),
    "flax": (
        b"\x82\xa6params\x81\xa5dense\xc7" + bytes(range(100)),
        "MessagePack, in which Flax keeps",
        "save_pretrained",
    ),
    "gzip": (gzip.compress(shard_of(1)), "a gzip archive", "unpack it"),
    "bzip2": (bz2.compress(shard_of(1)), "a bzip2 archive", "unpack it"),
    "xz": (lzma.compress(shard_of(1)), "an xz archive", "unpack it"),
    "tar": (tar_of("model.safetensors", shard_of(1)), "a tar archive", "unpack it"),
    "parquet": (b"PAR1" + bytes(100), "a Parquet table", "name the model's files"),
    "html": (
        b"\n<!DOCTYPE html><html>Not found</html>",
        "a page that begins '<!DOCTYPE html>",
        "download the file again",
    ),
    "xml": (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "a page that begins '<.xml", "download"),
    "text": (b"Entry not found", "a text that begins 'Entry not found'", "name the checkpoint, or download it again"),
    "long_text": ("über ".encode() * 400, "a text that begins 'über über", "download it again"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\nsize 4\n", "a git-lfs pointer", "git lfs pull"),
    "zeros": (bytes(4096), "zeros, as an unfinished download leaves them", "download the file again"),
    "noise": (
        b"\xfe\xdc\xba\x98\x76\x54\x32\x10" * 9,
        "no known format, whose first bytes are fe dc ba",
        "download it",
    ),
    "few_bytes": (b"\xfe\xdc", "no known format, whose first bytes are fe dc", "download it again"),
    "config": (
        b'{"architectures": ["Llama"], "model_type": "llama"}',
        "a model's configuration",
        "name its directory, /",
    ),
    "config_by_type": (b'\xef\xbb\xbf\n {"model_type": "llama"}', "no JSON object|a model's configuration", "."),
    "adapter": (b'{"peft_type": "LORA"}', r"an adapter's configuration \(peft_type 'LORA'\)", "name its directory"),
    "json": (b'{"vocab": {}}', "weight_map None", "download or save the index again"),
    "json_lines": (b'{"id": 1}\n{"id": 2}\n', "no JSON object", "."),
    "script": (b"torchscript", "a text that begins", "."),
}


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "weights"])
@pytest.mark.parametrize("kind", FOREIGN)
def test_open_catalog_of_another_format_names_it_and_the_way_out(tmp_path, kind, name):
    content, found, way_out = FOREIGN[kind]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"found .*{found}.* · expected ") as caught:
        open_catalog(tmp_path / name)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / name}: found ")
    assert "header length" not in message
    assert re.search(re.escape(way_out) if way_out != "." else way_out, message.rpartition(" · ")[2])


def test_open_catalog_of_torchscript_says_so(tmp_path):
    torch.save({"a": torch.ones(2)}, tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt", "a") as archive:
        archive.writestr("a/constants.pkl", b"")
    with pytest.raises(CheckpointError, match=r"a\.pt: found TorchScript · .* what torch\.jit\.load gives"):
        open_catalog(tmp_path / "a.pt")


def test_open_catalog_of_an_index_with_another_format_as_a_shard_names_the_shard(tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "config.json"}}))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(CheckpointError, match=r"config\.json: found JSON · expected a checkpoint"):
        open_catalog(tmp_path)


def test_open_catalog_of_truncated_safetensors_says_how_long_it_should_be(tmp_path):
    (tmp_path / "a.bin").write_bytes(shard_of(1)[:40])
    with pytest.raises(CorruptShardError, match=r"a\.bin: found a header length of \d+ bytes · expected at most 32"):
        open_catalog(tmp_path / "a.bin")


def test_open_catalog_of_a_dangling_link_names_it_and_where_it_leads(tmp_path):
    link = tmp_path / "model.safetensors"
    link.symlink_to(tmp_path / "gone")
    for source in (tmp_path, link):
        with pytest.raises(CheckpointNotFoundError) as caught:
            open_catalog(source)
        assert str(caught.value).startswith(f"{link}: found a link to {tmp_path / 'gone'}, which is not there · ")


@pytest.mark.parametrize(
    ("code", "kind", "way_out"),
    [
        (errno.EACCES, CheckpointError, r"allow this user to read it \(chmod u\+r\)"),
        (errno.EMFILE, CheckpointError, r"let the process have more of them \(ulimit -n\)"),
        (errno.EIO, CorruptShardError, "download or save the file again"),
    ],
)
def test_open_catalog_of_a_file_that_does_not_open_says_why_and_what_to_do(tmp_path, monkeypatch, code, kind, way_out):
    (tmp_path / "model.safetensors").write_bytes(shard_of(1))
    opened = os.open

    def refuse(path: Any, *arguments: Any, **options: Any) -> int:
        if str(path).endswith("model.safetensors"):
            raise OSError(code, os.strerror(code), str(path))
        return opened(path, *arguments, **options)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(CheckpointError, match=f"model.safetensors: found {os.strerror(code)} · .*{way_out}") as caught:
        open_catalog(tmp_path)
    assert type(caught.value) is kind


def test_open_catalog_of_a_directory_that_may_not_be_read_says_so(tmp_path, monkeypatch):
    def refuse(path: Path) -> bool:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(Path, "is_file", refuse)
    with pytest.raises(CheckpointError, match=f"found Permission denied for {tmp_path} · .*chmod") as caught:
        open_catalog(tmp_path)
    assert not isinstance(caught.value, CheckpointNotFoundError)


def test_read_shard_of_bytes_that_the_disk_does_not_give_says_so(tmp_path, monkeypatch):
    (tmp_path / "model.safetensors").write_bytes(shard_of(1))

    def refuse(*_arguments: Any) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "pread", refuse)
    with pytest.raises(CorruptShardError, match=r"bytes 0 to \d+ unreadable \(Input/output error\) · .*check the disk"):
        read_shard(tmp_path / "model.safetensors")


@pytest.mark.parametrize("name", ["größe 語.safetensors", "a\nb\x1b[31m.safetensors", "spa ce", "\udcff.bin", "%s{}"])
def test_open_catalog_of_odd_file_names_works_and_messages_show_them_printable(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(shard_of(1))
    assert value_of(path) == 1
    path.write_bytes(shard_of(1)[:-1])
    with pytest.raises(CorruptShardError) as caught:
        open_catalog(path)
    assert str(caught.value).isprintable()
    assert printable(name) in str(caught.value)


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ([], "found an empty directory · expected model.safetensors or model.safetensors.index.json or pytorch_model"),
        (["config.json"], "found no weights · expected model.safetensors or"),
        ([f"{index}.bin" for index in range(7)], r"found only 0\.bin, .*, 4\.bin … \(7 in all\)"),
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


def test_open_catalog_of_a_directory_of_another_format_names_the_format(tmp_path):
    (tmp_path / "llama.gguf").write_bytes(FOREIGN["gguf"][0])
    with pytest.raises(CheckpointNotFoundError, match=r"found only llama\.gguf \(GGUF, the format of llama\.cpp\)"):
        open_catalog(tmp_path)


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
        CheckpointNotFoundError, match=r"index\.json: found 1 of its 2 shards; missing are 'two\.safetensors' \("
    ) as caught:
        open_catalog(Source(path_or_repo_id=REPO, cache_dir=str(tmp_path)))
    assert "run `hf download org/tiny-model`, with a network and without HF_HUB_OFFLINE" in str(caught.value)


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


@pytest.mark.parametrize("is_absent", [True, False])
def test_find_file_of_a_hub_that_fails_is_refused_and_not_taken_for_absent(monkeypatch, is_absent):
    from huggingface_hub.errors import LocalEntryNotFoundError

    def answer(*_, **__):
        raise LocalEntryNotFoundError("not in the cache") if is_absent else ConnectionResetError("cut off")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", answer)
    source = Source(path_or_repo_id="org/name")
    if is_absent:
        assert find_file(source, "adapter_config.json") is None
    else:
        with pytest.raises(CheckpointNotFoundError, match="cut off"):
            find_file(source, "adapter_config.json")
