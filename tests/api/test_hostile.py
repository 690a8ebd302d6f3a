"""Give `lading.load` and `lading.load_into` every broken and hostile checkpoint that we know.

Each is refused with an error that names the file, the tensor, what was found, what was expected and the way out;
nothing half-loaded comes back; no code of a pickle ever runs.

Each case takes a good checkpoint of a tiny model apart. Sharded ones stand in three files.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM, set_seed

import lading
from lading.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    CorruptShardError,
    MissingTensorError,
    ShapeMismatchError,
)

INDEX = "model.safetensors.index.json"
UP = "model.layers.0.mlp.up_proj.weight"
NORM = "model.norm.weight"
TINY: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 64,
}

# transformers 4.57 under torch 2.13
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama in one file."""
    directory = tmp_path_factory.mktemp("hostile") / "whole"
    set_seed(0)
    LlamaForCausalLM(LlamaConfig(**TINY, max_position_embeddings=32)).save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def sharded(whole: Path) -> Path:
    """The same in several shards."""
    directory = whole.parent / "sharded"
    LlamaForCausalLM.from_pretrained(whole).save_pretrained(directory, max_shard_size="12KB")
    assert len(shards(directory)) >= 3
    return directory


def shards(directory: Path) -> list[Path]:
    return sorted(directory.glob("model-*.safetensors"))


def holder(directory: Path, name: str) -> Path:
    """Give the shard that holds a tensor."""
    if not (directory / INDEX).exists():
        return directory / "model.safetensors"
    return directory / json.loads((directory / INDEX).read_text())["weight_map"][name]


def write_header(path: Path, header: Any, data: bytes, *, length: int | None = None) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)


def edit_header(directory: Path, name: str, change: Callable[[dict[str, Any]], Any]) -> Path:
    """Change the header of the file that holds a tensor; the data stay."""
    path = holder(directory, name)
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    change(header)
    write_header(path, header, raw[8 + length :])
    return path


def edit_tensors(directory: Path, name: str, change: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
    path = holder(directory, name)
    tensors = {key: tensor.clone() for key, tensor in load_file(path).items()}
    change(tensors)
    path.unlink()
    save_file(tensors, path, metadata={"format": "pt"})
    return path


def edit_index(directory: Path, change: Callable[[dict[str, str]], Any]) -> Path:
    path = directory / INDEX
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))
    return path


def put(directory: Path, name: str, content: bytes) -> Path:
    path = holder(directory, name)
    path.write_bytes(content)
    return path


def cut(directory: Path, name: str, change: int) -> Path:
    """Shorten a file, or lengthen it."""
    path = holder(directory, name)
    raw = path.read_bytes()
    path.write_bytes(raw[:change] if change < 0 else raw + bytes(change))
    return path


def to_directory(directory: Path, name: str) -> Path:
    path = holder(directory, name)
    path.unlink()
    path.mkdir()
    return path


def duplicate(directory: Path) -> Path:
    """Store one tensor in a second shard too, with other values."""
    other = next(path for path in shards(directory) if path != holder(directory, NORM))
    tensors = {**load_file(other), NORM: torch.full((16,), 9.0)}
    other.unlink()
    save_file({key: tensor.clone() for key, tensor in tensors.items()}, other, metadata={"format": "pt"})
    return other


def leave(directory: Path) -> Path:
    """Point the index at a file outside of the checkpoint's directory."""
    path = holder(directory, NORM)
    outside = directory.parent / "outside.safetensors"
    shutil.move(path, outside)
    return edit_index(
        directory, lambda names: names.update({k: "../outside.safetensors" for k in names if names[k] == path.name})
    )


def raw_spec(**changes: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda header: header[NORM].update(changes)


def shift_all(header: dict[str, Any]) -> None:
    for key, value in header.items():
        if key != "__metadata__":
            value["data_offsets"] = [offset + 4 for offset in value["data_offsets"]]


def overlap(header: dict[str, Any]) -> None:
    begin, end = header[NORM]["data_offsets"]
    header[NORM]["data_offsets"] = [begin - 4, end - 4]


def transpose(tensors: dict[str, torch.Tensor]) -> None:
    tensors[UP] = tensors[UP].T.contiguous()


@dataclass(frozen=True)
class Case:
    """One way to break a checkpoint, and how it must be refused."""

    break_it: Callable[[Path], Path]
    """Breaks the copy in a directory and gives the file that the message must name."""
    error: type[CheckpointError]
    says: tuple[str, ...]
    """Texts of the message: tensor, found, expected, way out."""
    is_sharded: bool = False
    refused_by: bool | str = False
    """The least strictness that refuses it; less loads, initialising or leaving out what it tells."""


AGAIN = "download or save the file again"
TENSOR = f"tensor '{NORM}'"
SPEC = (TENSOR, AGAIN)
CASES: dict[str, Case] = {
    "truncated": Case(
        lambda d: cut(d, NORM, -3), CorruptShardError, ("tensor 'model.norm.weight'", "truncated file of", AGAIN)
    ),
    "truncated_shard": Case(
        lambda d: cut(d, NORM, -3), CorruptShardError, ("truncated file of", "expected", AGAIN), is_sharded=True
    ),
    "bytes_after_the_end": Case(
        lambda d: cut(d, NORM, 5), CorruptShardError, ("found 5 bytes after the end of the last tensor", AGAIN)
    ),
    "shard_missing": Case(
        lambda d: (path := holder(d, NORM)).unlink() or path,
        CheckpointNotFoundError,
        (INDEX, "found 2 of its 3 shards; missing are", "download those from the same revision"),
        is_sharded=True,
    ),
    "shard_is_a_directory": Case(
        lambda d: to_directory(d, NORM),
        CorruptShardError,
        ("found a directory · expected a regular file · remove it and download the shard again",),
        is_sharded=True,
    ),
    "file_is_a_directory": Case(lambda d: to_directory(d, NORM), CorruptShardError, ("found a directory",)),
    "empty_file": Case(
        lambda d: put(d, NORM, b""), CorruptShardError, ("found an empty file (0 bytes) · expected a checkpoint", AGAIN)
    ),
    "git_lfs_pointer": Case(
        lambda d: put(d, NORM, b"version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 9\n"),
        CorruptShardError,
        ("found a git-lfs pointer of", "expected the file it points to", "git lfs pull"),
    ),
    "git_lfs_pointer_shard": Case(
        lambda d: put(d, NORM, b"version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 9\n"),
        CorruptShardError,
        ("git-lfs pointer", "git lfs pull"),
        is_sharded=True,
    ),
    "header_length_0": Case(
        lambda d: put(d, NORM, bytes(8) + b"{}"), CorruptShardError, ("length of 0 bytes", "at least 2 bytes", AGAIN)
    ),
    "zeros": Case(
        lambda d: put(d, NORM, bytes(64)),
        CorruptShardError,
        ("found zeros, as an unfinished download leaves them", "download the file again"),
    ),
    "header_length_2_62": Case(
        lambda d: put(d, NORM, (2**62).to_bytes(8, "little") + b"{}"),
        CorruptShardError,
        (f"header length of {2**62} bytes", AGAIN),
    ),
    "header_longer_than_the_file": Case(
        lambda d: put(d, NORM, (100).to_bytes(8, "little") + b"{}"),
        CorruptShardError,
        ("header length of 100 bytes", "at most 2 bytes"),
    ),
    "seven_bytes": Case(
        lambda d: put(d, NORM, b"1234567"),
        CorruptShardError,
        ("found a text that begins '1234567'", "download it again"),
    ),
    "not_json": Case(
        lambda d: (write_header(p := holder(d, NORM), b"{oops}", b""), p)[1], CorruptShardError, ("not JSON", AGAIN)
    ),
    "not_utf8": Case(
        lambda d: (write_header(p := holder(d, NORM), b'{"\xff":1}', b""), p)[1],
        CorruptShardError,
        ("not UTF-8", AGAIN),
    ),
    "not_an_object": Case(
        lambda d: (write_header(p := holder(d, NORM), b"[1, 2]", b""), p)[1], CorruptShardError, ("begins with", "'{'")
    ),
    "html_page": Case(
        lambda d: put(d, NORM, b"<!DOCTYPE html><html>Not found</html>"),
        CorruptShardError,
        ("found a page that begins '<!DOCTYPE html>", "download the file again"),
    ),
    "shape_negative": Case(
        lambda d: edit_header(d, NORM, raw_spec(shape=[-16])), CorruptShardError, (*SPEC, "shape [-16]", "integers ≥ 0")
    ),
    "shape_overflowing": Case(
        lambda d: edit_header(d, NORM, raw_spec(shape=[2**40, 2**40])),
        CorruptShardError,
        (*SPEC, "fewer than 2**61 bytes"),
    ),
    "dtype_unknown": Case(
        lambda d: edit_header(d, NORM, raw_spec(dtype="F33")), CorruptShardError, (*SPEC, "dtype 'F33'", "one of BOOL")
    ),
    "offsets_overlapping": Case(
        lambda d: edit_header(d, NORM, overlap), CorruptShardError, ("overlapping offsets", "right after", AGAIN)
    ),
    "offsets_gapped": Case(
        lambda d: edit_header(d, NORM, shift_all),
        CorruptShardError,
        ("gapped offsets", "right after 'the header'", AGAIN),
    ),
    "offsets_contradict_the_shape": Case(
        lambda d: edit_header(d, NORM, raw_spec(shape=[17])),
        CorruptShardError,
        (*SPEC, "64 bytes", "68 bytes for F32 of shape [17]"),
    ),
    "key_twice_in_a_header": Case(
        lambda d: (write_header(p := holder(d, NORM), b'{"a":{},"a":{}}', b""), p)[1],
        CorruptShardError,
        ("'a' twice", AGAIN),
    ),
    "key_in_the_index_but_not_in_its_shard": Case(
        lambda d: edit_tensors(d, NORM, lambda tensors: tensors.pop(NORM)),
        MissingTensorError,
        (f"found no tensor for '{NORM}'", "expected every parameter and persistent buffer of LlamaForCausalLM"),
        is_sharded=True,
        refused_by=True,
    ),
    "key_missing": Case(
        lambda d: edit_tensors(d, NORM, lambda tensors: tensors.pop(NORM)),
        MissingTensorError,
        (
            f"found no tensor for '{NORM}'",
            "expected every parameter and persistent buffer of LlamaForCausalLM",
            "strict=False",
        ),
        refused_by=True,
    ),
    "key_not_in_the_model": Case(
        lambda d: edit_tensors(d, NORM, lambda tensors: tensors.update({"extra.weight": torch.ones(2)})),
        CheckpointError,
        (
            "found names that the model has no place for: 'extra.weight'",
            "expected names of LlamaForCausalLM",
            'strict="exact"',
        ),
        refused_by="exact",
    ),
    "shape_wrong": Case(
        lambda d: edit_tensors(d, NORM, lambda tensors: tensors.update({NORM: torch.ones(15)})),
        ShapeMismatchError,
        (TENSOR, "found shape [15]", "expected shape [16]", "use the checkpoint's own configuration"),
    ),
    "shape_wrong_in_a_shard": Case(
        lambda d: edit_tensors(d, NORM, lambda tensors: tensors.update({NORM: torch.ones(15)})),
        ShapeMismatchError,
        (TENSOR, "found shape [15]", "expected shape [16]"),
        is_sharded=True,
    ),
    "shape_transposed": Case(
        lambda d: edit_tensors(d, UP, transpose),
        ShapeMismatchError,
        (f"tensor '{UP}'", "found shape [16, 32]", "expected shape [32, 16]", "it is transposed"),
    ),
    "integers_for_floats": Case(
        lambda d: edit_tensors(d, NORM, lambda tensors: tensors.update({NORM: torch.ones(16, dtype=torch.int32)})),
        CheckpointError,
        (TENSOR, "found int32 data", "expected float32", "load a checkpoint of this element type"),
    ),
    "integers_for_floats_in_a_shard": Case(
        lambda d: edit_tensors(d, NORM, lambda tensors: tensors.update({NORM: torch.ones(16, dtype=torch.int64)})),
        CheckpointError,
        (TENSOR, "found int64 data", "expected float32"),
        is_sharded=True,
    ),
    "booleans_for_floats": Case(
        lambda d: edit_tensors(d, NORM, lambda tensors: tensors.update({NORM: torch.ones(16, dtype=torch.bool)})),
        CheckpointError,
        (TENSOR, "found bool data", "expected float32"),
    ),
    "small_floats_without_a_scale": Case(
        lambda d: edit_tensors(d, UP, lambda tensors: tensors.update({UP: tensors[UP].to(torch.float8_e4m3fn)})),
        CheckpointError,
        (f"tensor '{UP}'", "found float8_e4m3fn data", "expected float32", "dequantise it"),
    ),
    "same_key_in_two_shards": Case(
        duplicate,
        CheckpointError,
        (f"found '{NORM}' with another dtype, shape or other bytes than in", "expected each name in one", "delete the"),
        is_sharded=True,
    ),
    "index_path_leaves_the_directory": Case(
        leave,
        CheckpointError,
        ("'../outside.safetensors'", "which leaves the checkpoint's directory", "save the index again"),
        is_sharded=True,
    ),
    "index_path_absolute": Case(
        lambda d: edit_index(d, lambda names: names.update({NORM: "/etc/hostname"})),
        CheckpointError,
        (f"shard '/etc/hostname' for tensor '{NORM}'", "expected a file inside it"),
        is_sharded=True,
    ),
    "index_empty": Case(
        lambda d: ((d / INDEX).write_bytes(b""), d / INDEX)[1],
        CorruptShardError,
        ("an empty file (0 bytes)", AGAIN),
        is_sharded=True,
    ),
    "index_without_names": Case(
        lambda d: edit_index(d, lambda names: names.clear()),
        CheckpointError,
        ("weight_map {}", "expected an object of tensor names to shard file names", "save the index again"),
        is_sharded=True,
    ),
    "index_malformed": Case(
        lambda d: ((d / INDEX).write_text('{"weight_map": {'), d / INDEX)[1],
        CheckpointError,
        ("no JSON", "one JSON object"),
        is_sharded=True,
    ),
    "index_is_a_list": Case(
        lambda d: ((d / INDEX).write_text("[]"), d / INDEX)[1],
        CheckpointError,
        ("JSON that is a list, no object", "expected one JSON object"),
        is_sharded=True,
    ),
    "index_is_a_git_lfs_pointer": Case(
        lambda d: ((d / INDEX).write_text("version https://git-lfs.github.com/spec/v1\n"), d / INDEX)[1],
        CorruptShardError,
        ("git-lfs pointer", "git lfs pull"),
        is_sharded=True,
    ),
    "index_names_a_tensor_twice": Case(
        lambda d: ((d / INDEX).write_text('{"weight_map": {"a": "x", "a": "y"}}'), d / INDEX)[1],
        CheckpointError,
        ("the key 'a' twice", "one JSON object"),
        is_sharded=True,
    ),
}


def broken(case: Case, whole: Path, sharded: Path, tmp_path: Path) -> tuple[Path, Path]:
    """Copy a good checkpoint and break it; give the directory and the file that the message must name."""
    directory = tmp_path / "model"
    shutil.copytree(sharded if case.is_sharded else whole, directory)
    return directory, case.break_it(directory)


def check_message(message: str, case: Case, file: Path) -> None:
    assert [text for text in (file.name, "expected", *case.says) if text not in message] == [], message
    assert message.count(" · ") >= 2, f"no way out: {message}"
    assert len(message) < 3000


def test_there_are_at_least_twenty_bad_files():
    assert len(CASES) >= 20


def test_the_good_checkpoints_load(whole, sharded):
    for directory in (whole, sharded):
        assert lading.load(directory).model.norm.weight.shape == (16,)


@pytest.mark.parametrize("name", CASES)
def test_load_of_a_broken_checkpoint_refuses_clearly(whole, sharded, tmp_path, name):
    case = CASES[name]
    directory, file = broken(case, whole, sharded, tmp_path)
    with pytest.raises(case.error) as caught:
        lading.load(directory, strict=case.refused_by or True)
    check_message(str(caught.value), case, file)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.refused_by])
def test_load_without_strict_of_a_broken_checkpoint_refuses_too(whole, sharded, tmp_path, name):
    case = CASES[name]
    directory, file = broken(case, whole, sharded, tmp_path)
    with pytest.raises(case.error) as caught:
        lading.load(directory, strict=False, output_loading_info=True)
    check_message(str(caught.value), case, file)


@pytest.mark.parametrize("name", CASES)
def test_load_into_of_a_broken_checkpoint_refuses_clearly_and_leaves_the_module(whole, sharded, tmp_path, name):
    case = CASES[name]
    directory, file = broken(case, whole, sharded, tmp_path)
    with lading.empty():
        model = LlamaForCausalLM(LlamaConfig(**TINY, max_position_embeddings=32))
    before = {key: id(value) for key, value in [*model.named_parameters(), *model.named_buffers()]}
    with pytest.raises(case.error) as caught:
        lading.load_into(model, directory, strict=case.refused_by)
    check_message(str(caught.value), case, file)
    assert {key: id(value) for key, value in [*model.named_parameters(), *model.named_buffers()]} == before
    assert all(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize(
    "name", ["truncated", "shape_wrong", "integers_for_floats", "same_key_in_two_shards", "key_missing"]
)
@pytest.mark.parametrize(
    "options", [{"copy": True}, {"guard": True}, {"readahead": True}, {"dtype": torch.bfloat16}], ids=str
)
def test_load_with_options_of_a_broken_checkpoint_refuses_alike(whole, sharded, tmp_path, name, options):
    case = CASES[name]
    directory, _ = broken(case, whole, sharded, tmp_path)
    with pytest.raises(case.error):
        lading.load(directory, **options)


@pytest.mark.parametrize("way", ["names too much", "names another shard", "holds one twice"])
def test_load_of_shards_that_their_index_describes_wrongly_is_right_and_warns_once(
    whole, sharded, tmp_path, caplog, way
):
    directory = tmp_path / "model"
    shutil.copytree(sharded, directory)
    other = next(path for path in shards(directory) if path != holder(directory, NORM))
    if way == "names too much":
        edit_index(directory, lambda names: names.update({"lm_head.bias": other.name, "old": other.name}))
    elif way == "names another shard":
        edit_index(directory, lambda names: names.update({NORM: other.name}))
    else:
        tensors = load_file(other) | {NORM: load_file(holder(directory, NORM))[NORM]}
        other.unlink()
        save_file({key: tensor.clone() for key, tensor in tensors.items()}, other, metadata={"format": "pt"})
    with caplog.at_level("WARNING", logger="lading"):
        model, report = lading.load(directory, output_loading_info=True)
    assert [record.name.rpartition(".")[2] for record in caplog.records] == ["locate"]
    good, expected = lading.load(sharded, output_loading_info=True)
    assert report == expected
    assert all(torch.equal(value, good.state_dict()[key]) for key, value in model.state_dict().items())


def test_load_without_strict_tells_what_is_missing_and_left_over(whole, tmp_path, caplog):
    directory = tmp_path / "model"
    shutil.copytree(whole, directory)
    edit_tensors(directory, NORM, lambda tensors: (tensors.pop(NORM), tensors.update({"extra.weight": torch.ones(2)})))
    with caplog.at_level("WARNING", logger="lading"):
        model, report = lading.load(directory, strict=False, output_loading_info=True)
    assert report.missing == (NORM,)
    assert report.unexpected == ("extra.weight",)
    assert f"'{NORM}'" in caplog.text
    assert "'extra.weight'" in caplog.text
    assert model.model.norm.weight.tolist() == [1.0] * 16  # as LlamaRMSNorm makes it
    assert not any(parameter.is_meta for parameter in model.parameters())


def test_load_of_many_missing_names_shows_ten_and_the_total(whole, tmp_path):
    directory = tmp_path / "model"
    shutil.copytree(whole, directory)
    edit_tensors(directory, NORM, lambda tensors: [tensors.pop(key) for key in list(tensors) if "layers." in key])
    with pytest.raises(MissingTensorError, match=r"… \(18 in all\)"):
        lading.load(directory)


def test_load_of_a_checkpoint_for_another_architecture_names_class_and_names(whole, tmp_path):
    directory = tmp_path / "model"
    shutil.copytree(whole, directory)
    BertConfig(**TINY, max_position_embeddings=32, architectures=["BertForMaskedLM"]).save_pretrained(directory)
    with pytest.raises(
        CheckpointError,
        match=r"model\.safetensors.*found no tensor for 'bert.*; left over are 'lm_head.*buffer of BertForMasked",
    ):
        lading.load(directory)


def test_load_of_floats_for_an_integer_buffer_refuses(tmp_path):
    """An integer buffer of the model (`position_ids` counts places) must not be filled from rounded floats."""
    from transformers import ResNetConfig, ResNetModel

    set_seed(0)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic")
    ResNetModel(config).save_pretrained(tmp_path)
    name = next(key for key in load_file(tmp_path / "model.safetensors") if key.endswith("num_batches_tracked"))
    edit_tensors(tmp_path, name, lambda tensors: tensors.update({name: torch.tensor(2.5)}))
    for strict in (True, False):
        with pytest.raises(CheckpointError, match=f"tensor '{name}': found float32 data · expected int64"):
            lading.load(tmp_path, strict=strict)


def test_load_of_data_at_an_odd_offset_gives_the_right_aligned_values(whole, tmp_path):
    directory = tmp_path / "model"
    shutil.copytree(whole, directory)
    path = directory / "model.safetensors"
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    path.write_bytes((length + 1).to_bytes(8, "little") + raw[8 : 8 + length] + b" " + raw[8 + length :])
    model, report = lading.load(directory, output_loading_info=True)
    good = lading.load(whole)
    for key, parameter in model.named_parameters():
        assert torch.equal(parameter, good.get_parameter(key))
        assert parameter.data_ptr() % 4 == 0
    assert report.mapped_bytes == 0
    ids = torch.arange(8)[None]
    assert torch.equal(model(ids).logits, good(ids).logits)


# Configurations ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [
        None,
        b"",
        b"{",
        b"\xff\xfe",
        b"[]",
        b'"llama"',
        b"null",
        b'{"model_type": "no_such_model"}',
        b"{}",
        b'{"model_type": 3}',
    ],
    ids=["absent", "empty", "cut", "not utf-8", "a list", "a string", "null", "unknown", "without a type", "a number"],
)
def test_load_with_a_broken_configuration_names_it(whole, tmp_path, content):
    directory = tmp_path / "model"
    shutil.copytree(whole, directory)
    (directory / "config.json").unlink()
    if content is not None:
        (directory / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        lading.load(directory)
    message = str(caught.value)
    assert message.startswith(f"{directory}, config.json: found ")
    assert "expected a transformers configuration · pass config= or a model_class, or use lading.empty() and" in message


def test_load_with_an_architecture_that_transformers_lacks_says_so(whole, tmp_path):
    directory = tmp_path / "model"
    shutil.copytree(whole, directory)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "architectures": ["LlamaForTeleportation"]}))
    with pytest.raises(CheckpointError) as caught:
        lading.load(directory)
    assert "found architecture 'LlamaForTeleportation' for a LlamaConfig" in str(caught.value)
    assert "expected a model class of transformers · pass model_class=" in str(caught.value)


def test_load_of_nothing_says_what_it_looked_for(tmp_path):
    with pytest.raises(CheckpointNotFoundError, match=r"found an empty directory · expected model\.safetensors or"):
        lading.load(tmp_path)
    with pytest.raises(CheckpointNotFoundError, match="found neither a file nor a directory"):
        lading.load(tmp_path / "absent")
    with pytest.raises(
        CheckpointNotFoundError,
        match="org/no-such-model: found no directory of that name and nothing in the hub's cache",
    ):
        lading.load("org/no-such-model", cache_dir=tmp_path)


# Pickles -------------------------------------------------------------------------------------------------------------


class Runs:
    """Unpickled by pickle itself, this makes a file."""

    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self) -> Any:
        return open, (str(self.sentinel), "w")


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("strict", [True, False])
def test_load_of_a_pickle_with_code_refuses_and_never_runs_it(whole, tmp_path, is_zip, strict):
    directory = tmp_path / "model"
    shutil.copytree(whole, directory)
    state: dict[str, Any] = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    state[NORM] = Runs(tmp_path / "sentinel")
    torch.save(state, directory / "pytorch_model.bin", _use_new_zipfile_serialization=is_zip)
    with pytest.raises(CheckpointError) as caught:
        lading.load(directory, strict=strict)
    message = str(caught.value)
    assert "pytorch_model.bin: found a pickle that names " in message
    assert (
        "open, which lading never runs · expected a dict of plain tensors · save it as safetensors where you trust it"
        in message
    )
    with lading.empty():
        model = LlamaForCausalLM(LlamaConfig(**TINY, max_position_embeddings=32))
    with pytest.raises(CheckpointError, match="which lading never runs"):
        lading.load_into(model, directory / "pytorch_model.bin", strict=strict)
    assert not (tmp_path / "sentinel").exists()


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "legacy"])
def test_load_of_a_truncated_pickle_refuses(whole, tmp_path, is_zip):
    directory = tmp_path / "model"
    shutil.copytree(whole, directory)
    state = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    path = directory / "pytorch_model.bin"
    torch.save(state, path, _use_new_zipfile_serialization=is_zip)
    raw = path.read_bytes()
    for length in (0, 1, 100, len(raw) // 2, len(raw) - 1):
        path.write_bytes(raw[:length])
        with pytest.raises(CorruptShardError, match=r"pytorch_model\.bin"):
            lading.load(directory)


# Files that change after the load ------------------------------------------------------------------------------------

IDS = torch.arange(8)[None]


@pytest.fixture
def mine(whole: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    shutil.copytree(whole, tmp_path / "mine")
    return tmp_path / "mine"


def change_clock(path: Path) -> None:
    """Make sure that two writes within one tick of the file system's clock differ."""
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1_000))


@pytest.mark.parametrize("change", ["truncated", "overwritten"])
def test_guarded_model_raises_before_the_forward_when_the_file_changed_in_place(mine, change):
    model = lading.load(mine, guard=True)
    expected = lading.load(mine, copy=True)(IDS).logits
    assert torch.equal(model(IDS).logits, expected)
    ran: list[str] = []
    model.model.embed_tokens.register_forward_pre_hook(lambda *_: ran.append("touched a weight"))
    path = mine / "model.safetensors"
    size = path.stat().st_size
    with path.open("r+b") as file:
        if change == "truncated":
            file.truncate(100)
        else:
            file.seek(size // 2)
            file.write(bytes(256))
    change_clock(path)
    for call in (lambda: model(IDS), lambda: model.generate(IDS, max_new_tokens=2)):
        with pytest.raises(CorruptShardError) as caught:
            call()
        assert f"{path}: found a file changed in place of {path.stat().st_size} bytes" in str(caught.value)
        assert (
            f"expected the file whose header was read, {size} bytes · load the model again; replace checkpoints by"
            in str(caught.value)
        )
    assert ran == []


@pytest.mark.parametrize("guard", [True, False])
def test_model_whose_file_was_renamed_replaced_or_unlinked_still_runs(mine, guard):
    model = lading.load(mine, guard=guard)
    expected = model(IDS).logits
    path = mine / "model.safetensors"
    path.rename(mine / "moved")
    assert torch.equal(model(IDS).logits, expected)
    save_file({"other": torch.zeros(1 << 12)}, path)
    assert torch.equal(model(IDS).logits, expected)
    (mine / "moved").unlink()
    shutil.rmtree(mine)
    assert torch.equal(model(IDS).logits, expected)


def test_guard_of_sharded_checkpoints_watches_each_shard(sharded, tmp_path):
    shutil.copytree(sharded, tmp_path / "mine")
    for position in range(len(shards(tmp_path / "mine"))):
        model = lading.load(tmp_path / "mine", guard=True)
        model(IDS)
        path = shards(tmp_path / "mine")[position]
        change_clock(path)
        with pytest.raises(CorruptShardError, match=path.name):
            model(IDS)


def test_load_of_a_file_that_changes_between_header_and_mapping_refuses(mine, monkeypatch):
    from lading.api import loading

    real = loading.map_catalog

    def change_first(catalog: Any) -> Any:
        change_clock(mine / "model.safetensors")
        return real(catalog)

    monkeypatch.setattr(loading, "map_catalog", change_first)
    with pytest.raises(CorruptShardError, match="found a file changed in place"):
        lading.load(mine)


def test_load_into_of_a_tied_decoder_with_other_values_refuses(tmp_path):
    """BERT stores its tied decoder once; one that has it twice with other values is ambiguous for `load_into`."""
    set_seed(0)
    model = BertForMaskedLM(BertConfig(**TINY, max_position_embeddings=32))
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    state["cls.predictions.decoder.weight"] += 1
    save_file(state, tmp_path / "model.safetensors")
    with lading.empty():
        blank = BertForMaskedLM(BertConfig(**TINY, max_position_embeddings=32))
        blank.tie_weights()
    assert blank.cls.predictions.decoder.weight is blank.bert.embeddings.word_embeddings.weight
    for strict in (True, False):
        with pytest.raises(
            CheckpointError, match="found different values · expected one value, because the module ties them"
        ):
            lading.load_into(blank, tmp_path, strict=strict)
