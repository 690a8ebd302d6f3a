"""Views of a mapped file: nothing read before its time, nothing written back, each tensor a storage of its own."""

from __future__ import annotations

import copy
import gc
import hashlib
import io
import os
import pickle
from pathlib import Path

import pytest
import torch
from handmade import bits, encode, open_files, run_python
from safetensors.torch import save_file

from lading.checkpoint.catalog import Catalog
from lading.checkpoint.dtypes import ELEMENT_TYPES, element_type, is_plain_float, require_compatible, torch_dtype
from lading.checkpoint.header import read_header
from lading.checkpoint.locate import open_catalog, read_shard
from lading.checkpoint.mapping import ShardMapping, is_misaligned, map_catalog, packed_shape, tensors_of
from lading.errors import CheckpointError, CorruptShardError

STATE = {
    "weight": torch.arange(64, dtype=torch.float32).view(8, 8),
    "bias": torch.arange(4, dtype=torch.bfloat16),
    "count": torch.tensor(3),
    "none": torch.empty(0, 5),
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    save_file(STATE, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return tmp_path / "model.safetensors"


def mapped(path: Path) -> dict[str, torch.Tensor]:
    mapping = ShardMapping(read_shard(path))
    return {name: mapping.tensor(spec) for name, spec in mapping.shard.tensors.items()}


def test_tensor_is_a_view_of_the_mapping_with_a_storage_of_its_own(path):
    mapping = ShardMapping(read_header(path))
    for name, spec in mapping.shard.tensors.items():
        tensor = mapping.tensor(spec)
        assert torch.equal(tensor, STATE[name])
        assert tensor.untyped_storage().nbytes() == spec.num_bytes
        if spec.num_bytes:
            assert tensor.data_ptr() == mapping.address + spec.offset
        assert not tensor.is_shared()
        assert not tensor.requires_grad


def test_writing_to_a_tensor_never_reaches_the_file_nor_another_mapping(path):
    before = hashlib.sha256(path.read_bytes()).hexdigest()
    first, second = mapped(path), mapped(path)
    first["weight"].zero_()
    first["bias"] += 1
    assert torch.equal(second["weight"], STATE["weight"])
    assert not first["weight"].any()
    del first, second
    gc.collect()
    assert hashlib.sha256(path.read_bytes()).hexdigest() == before


def test_mapping_lives_as_long_as_any_tensor_and_no_longer(path):
    tensors = mapped(path)
    gc.collect()
    assert str(path) in Path("/proc/self/maps").read_text()
    kept = tensors.pop("bias")
    tensors.clear()
    gc.collect()
    assert str(path) in Path("/proc/self/maps").read_text()
    assert torch.equal(kept, STATE["bias"])
    del kept
    gc.collect()
    assert str(path) not in Path("/proc/self/maps").read_text()


def test_mapping_keeps_at_most_one_descriptor_and_gives_it_back(path):
    before = open_files()
    tensors = mapped(path)
    assert open_files().count(str(path)) <= 1  # mmap.mmap duplicates the one that it is given
    del tensors
    assert open_files() == before


def test_renamed_or_unlinked_file_stays_readable(path, tmp_path):
    tensors = mapped(path)
    path.rename(tmp_path / "elsewhere")
    save_file({name: torch.zeros_like(tensor) for name, tensor in STATE.items()}, path)
    assert torch.equal(tensors["weight"], STATE["weight"])
    (tmp_path / "elsewhere").unlink()
    assert torch.equal(tensors["bias"], STATE["bias"])


def test_pickle_and_deepcopy_of_one_tensor_hold_its_bytes_alone(tmp_path):
    state = {"big": torch.zeros(1 << 18), "small": torch.arange(8.0)}
    save_file(state, tmp_path / "model.safetensors")
    tensors = mapped(tmp_path / "model.safetensors")
    buffer = io.BytesIO()
    torch.save(tensors["small"], buffer)
    assert len(buffer.getvalue()) < 4096
    assert len(pickle.dumps(tensors["small"])) < 4096
    copied = copy.deepcopy(tensors["small"])
    assert copied.untyped_storage().nbytes() == 32
    assert copied.data_ptr() != tensors["small"].data_ptr()
    assert torch.equal(pickle.loads(pickle.dumps(tensors["small"])), state["small"])


@pytest.mark.parametrize("first_byte", range(17))
@pytest.mark.parametrize("dtype", ["F32", "F64", "BF16", "C128"])
def test_tensor_at_any_offset_is_right_and_aligned(tmp_path, first_byte, dtype):
    element = ELEMENT_TYPES[dtype]
    expected = torch.arange(1, 4).to(torch_dtype(element))
    header = {
        "pad": {"dtype": "U8", "shape": [first_byte], "data_offsets": [0, first_byte]},
        "a": {"dtype": dtype, "shape": [3], "data_offsets": [first_byte, first_byte + expected.nbytes]},
    }
    raw = encode(header, bytes(first_byte) + bits(expected))
    path = tmp_path / "model.safetensors"
    path.write_bytes(raw)
    shard = read_header(path)
    mapping = ShardMapping(shard)
    made = mapping.tensor(shard.tensors["a"])
    assert bits(made) == bits(expected)
    assert made.data_ptr() % element.alignment_bytes == 0
    is_view = mapping.address <= made.data_ptr() < mapping.address + len(raw)
    assert is_view is not is_misaligned(shard.tensors["a"])
    copied = tensors_of(Catalog.of([shard]), map_catalog(Catalog.of([shard])), copy=True)["a"]
    assert bits(copied) == bits(expected)
    assert copied.data_ptr() % element.alignment_bytes == 0


def test_copies_stand_at_the_same_place_modulo_64_as_in_the_mapping(path):
    catalog = open_catalog(path)
    mappings = map_catalog(catalog)
    views, copies = tensors_of(catalog, mappings), tensors_of(catalog, mappings, copy=True)
    for spec in catalog:
        assert torch.equal(views[spec.name], copies[spec.name])
        if spec.num_bytes:
            assert views[spec.name].data_ptr() % 64 == copies[spec.name].data_ptr() % 64


def test_copies_are_immune_to_an_overwritten_file(path):
    catalog = open_catalog(path)
    copies = tensors_of(catalog, map_catalog(catalog), copy=True)
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
    for name, tensor in copies.items():
        assert torch.equal(tensor, STATE[name])


def test_copies_of_tied_names_of_a_pickled_shard_share_their_bytes(tmp_path):
    shared = torch.arange(6.0)
    torch.save({"a": shared, "b": shared, "c": shared[2:]}, tmp_path / "a.bin")
    catalog = open_catalog(tmp_path / "a.bin")
    copies = tensors_of(catalog, map_catalog(catalog), copy=True)
    assert copies["a"].data_ptr() == copies["b"].data_ptr()
    assert copies["c"].tolist() == [2.0, 3.0, 4.0, 5.0]


def test_copies_of_strided_tensors_keep_their_strides(tmp_path):
    base = torch.arange(12.0).view(3, 4)
    torch.save({"t": base.T, "column": base[:, 1]}, tmp_path / "a.bin")
    catalog = open_catalog(tmp_path / "a.bin")
    for copied in (True, False):
        made = tensors_of(catalog, map_catalog(catalog), copy=copied)
        assert torch.equal(made["t"], base.T)
        assert torch.equal(made["column"], base[:, 1])


@pytest.mark.parametrize("change", ["longer", "shorter", "touched", "replaced", "removed"])
def test_map_of_a_file_that_changed_since_its_header_was_read_refuses(path, change, tmp_path):
    shard = read_header(path)
    raw = path.read_bytes()
    if change == "touched":
        os.utime(path, ns=(0, shard.identity.modified_ns + 1))
    elif change == "removed":
        path.unlink()
    elif change == "replaced":
        (tmp_path / "new").write_bytes(raw)
        (tmp_path / "new").rename(path)
    else:
        path.write_bytes(raw + b"\0" if change == "longer" else raw[:-1])
    with pytest.raises(CorruptShardError, match=r"model\.safetensors: found .* expected .*") as caught:
        ShardMapping(shard)
    if change != "removed":
        assert "load the model again; replace checkpoints by rename, never in place" in str(caught.value)
    with pytest.raises(CorruptShardError):
        tensors_of(Catalog.of([shard]), {}, copy=True)


def test_packed_tensors_halve_their_last_dimension(tmp_path):
    header = {"a": {"dtype": "F4", "shape": [3, 8], "data_offsets": [0, 12]}}
    (tmp_path / "a.safetensors").write_bytes(encode(header, bytes(range(12))))
    catalog = open_catalog(tmp_path / "a.safetensors")
    assert packed_shape(catalog["a"]) == (3, 4)
    for copied in (False, True):
        made = tensors_of(catalog, map_catalog(catalog), copy=copied)["a"]
        assert made.shape == (3, 4)
        assert made.view(torch.uint8).reshape(-1).tolist() == list(range(12))


def test_mapping_larger_than_memory_reserves_nothing(tmp_path):
    """A hole of 1 TiB in a sparse file: mapped, one element read, one written."""
    size = 1 << 40
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.write(encode({"a": {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}}))
        file.truncate(file.tell() + size)
    tensor = mapped(path)["a"]
    assert float(tensor[size // 8]) == 0.0
    tensor[size // 8] = 5.0
    assert float(tensor[size // 8]) == 5.0
    assert path.stat().st_blocks * 512 < 1 << 20


def test_mapping_touches_no_page_of_the_file(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({f"t{index}": torch.zeros(1 << 18) for index in range(8)}, path)
    code = """
import sys
from pathlib import Path
from lading.checkpoint.locate import open_catalog
from lading.checkpoint.mapping import map_catalog, tensors_of
def rss():
    lines = Path("/proc/self/smaps").read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line.endswith(sys.argv[1]))
    return next(int(line.split()[1]) for line in lines[start:] if line.startswith("Rss:"))
catalog = open_catalog(sys.argv[1])
tensors = tensors_of(catalog, map_catalog(catalog))
print(rss())
tensors["t3"].sum()
print(rss() >= 1024)
"""
    assert run_python(code, path) == "0\nTrue\n"


def test_torch_dtype_of_every_element_type_round_trips():
    for element in ELEMENT_TYPES.values():
        dtype = torch_dtype(element)
        assert element_type(dtype) is element
        assert is_plain_float(dtype) is (element.kind == "float")
        if element.bits >= 8:
            assert dtype.itemsize * 8 == element.bits
    assert element_type(torch.qint8) is None


def test_torch_dtype_of_a_type_that_torch_lacks_says_which(monkeypatch):
    monkeypatch.delattr(torch, "float8_e8m0fnu")
    with pytest.raises(
        CheckpointError, match=r"element type F8_E8M0: torch .* has no torch.float8_e8m0fnu .* install a newer torch"
    ):
        torch_dtype(ELEMENT_TYPES["F8_E8M0"])


@pytest.mark.parametrize("found", [torch.int64, torch.bool, torch.float8_e4m3fn, torch.complex64, torch.uint8])
def test_require_compatible_of_other_kinds_names_found_and_expected(found):
    expected = f"m.safetensors, tensor 'a': found {str(found)[6:]} data · expected float32 · load a checkpoint of"
    with pytest.raises(CheckpointError) as caught:
        require_compatible(found, torch.float32, "m.safetensors, tensor 'a'")
    assert str(caught.value).startswith(expected)
    with pytest.raises(CheckpointError):
        require_compatible(torch.float32, found, "x")
    require_compatible(found, found, "x")
    require_compatible(torch.float64, torch.bfloat16, "x")


def test_catalog_counts_shared_bytes_once(tmp_path):
    shared = torch.arange(6.0)
    torch.save({"a": shared, "b": shared, "c": torch.arange(2.0)}, tmp_path / "a.bin")
    assert open_catalog(tmp_path / "a.bin").num_bytes == 24 + 8


def test_readers_import_no_torch():
    code = "import sys, lading, lading.checkpoint.locate; assert 'torch' not in sys.modules; print(1)"
    assert run_python(code) == "1\n"
