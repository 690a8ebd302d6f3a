"""Views of a mapped file: nothing read before its time, nothing written back, each tensor a storage of its own."""

from __future__ import annotations

import copy
import errno
import gc
import hashlib
import io
import json
import logging
import os
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from handmade import bits, encode, open_files, run_python
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import lading
from lading.checkpoint import pages
from lading.checkpoint.catalog import Catalog
from lading.checkpoint.dtypes import ELEMENT_TYPES, element_type, is_plain_float, require_compatible, torch_dtype
from lading.checkpoint.header import read_header
from lading.checkpoint.locate import open_catalog, read_shard
from lading.checkpoint.mapping import ShardMapping, is_misaligned, map_catalog, read_tensor, tensors_of
from lading.errors import CheckpointError, CheckpointNotFoundError, CorruptShardError

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
            assert tensor.data_ptr() == mapping.span.begin + spec.offset
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


def test_mapping_keeps_no_descriptor(path):
    before = open_files()
    tensors = mapped(path)
    assert open_files() == before
    del tensors
    assert open_files() == before


def sharded(folder: Path, num_shards: int) -> Path:
    """Write a checkpoint of many small shards, each of one tensor."""
    names = {f"t{index}": f"model-{index:05}.safetensors" for index in range(num_shards)}
    for index, (name, file_name) in enumerate(names.items()):
        save_file({name: torch.full((2,), float(index))}, folder / file_name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    return folder


def test_mapping_of_many_shards_keeps_no_descriptor_and_unmaps_each_with_its_last_tensor(tmp_path):
    before = open_files()
    catalog = open_catalog(sharded(tmp_path, 96))
    tensors = tensors_of(catalog, map_catalog(catalog))
    assert open_files() == before
    assert mapped_files(tmp_path) == 96
    for index in range(0, 96, 2):
        del tensors[f"t{index}"]
    gc.collect()
    assert mapped_files(tmp_path) == 48
    assert all(float(tensors[f"t{index}"][0]) == index for index in range(1, 96, 2))
    del tensors
    gc.collect()
    assert mapped_files(tmp_path) == 0


def mapped_files(folder: Path) -> int:
    return sum(str(folder) in line for line in Path("/proc/self/maps").read_text().splitlines())


def test_load_into_of_more_shards_than_files_may_be_open_works(tmp_path):
    code = """
import resource, sys
import torch
from lading.checkpoint.locate import open_catalog
from lading.checkpoint.mapping import map_catalog, tensors_of
resource.setrlimit(resource.RLIMIT_NOFILE, (32, 32))
catalog = open_catalog(sys.argv[1])
print(sum(float(tensor[0]) for tensor in tensors_of(catalog, map_catalog(catalog)).values()))
"""
    assert run_python(code, sharded(tmp_path, 64)) == f"{sum(range(64)):.1f}\n"


def test_mapping_outlives_the_interpreter_under_tensors_that_do(path):
    """Tensors that a module of the standard library or C++ keeps are read after all finalizers ran."""
    code = """
import atexit, gc, sys, threading
from pathlib import Path
from lading.checkpoint.locate import read_shard
from lading.checkpoint.mapping import ShardMapping
mapping = ShardMapping(read_shard(Path(sys.argv[1])))
tensor = mapping.tensor(mapping.shard.tensors["weight"])
del mapping
class AtTheEnd:
    def __del__(self, tensor=tensor):
        assert float(tensor.sum()) == 2016.0
        print("read at the end", flush=True)
import builtins
builtins.kept = AtTheEnd()
atexit.register(lambda: print(float(tensor.sum())))
"""
    assert run_python(code, path) == "2016.0\nread at the end\n"


def test_mapping_in_a_forked_child_is_its_own(path):
    tensors = mapped(path)
    child = os.fork()
    if not child:
        tensors["weight"].zero_()
        tensors.clear()
        gc.collect()
        os._exit(str(path) in Path("/proc/self/maps").read_text())
    assert os.waitpid(child, 0)[1] == 0
    assert torch.equal(tensors["weight"], STATE["weight"])


def refusing(code: int, *, after: int = 0) -> Callable[[int, int], Any]:
    """Stand in for the call that maps: refuses, after so many successes."""
    real, calls = pages.map_private, count()

    def refuse(descriptor: int, num_bytes: int) -> Any:
        if next(calls) < after:
            return real(descriptor, num_bytes)
        raise OSError(code, os.strerror(code))

    return refuse


@pytest.mark.parametrize("code", [errno.ENODEV, errno.ENOMEM])
def test_files_that_cannot_be_mapped_are_read_and_one_warning_says_so(tmp_path, monkeypatch, caplog, code):
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for index in range(3):
                self.register_parameter(f"t{index}", nn.Parameter(torch.zeros(2)))

    sharded(tmp_path, 3)
    monkeypatch.setattr(pages, "map_private", refusing(code, after=1))
    with lading.empty():
        net = Net()
    with caplog.at_level(logging.WARNING, logger="lading"):
        report = lading.load_into(net, tmp_path, readahead=True, guard=True)
    (record,) = caplog.records
    said = record.getMessage()
    assert said.startswith(
        f"'{tmp_path}/model-00001.safetensors', '{tmp_path}/model-00002.safetensors': found files that"
    )
    assert (
        f"({os.strerror(code)}) · expected weights that are views of their file · they are read into memory, " in said
    )
    assert (report.mapped_bytes, report.copied_bytes) == (8, 16)
    assert [tensor.tolist() for tensor in net.parameters()] == [[0.0, 0.0], [1.0, 1.0], [2.0, 2.0]]
    assert mapped_files(tmp_path) == 1


def test_one_mapping_of_a_file_that_cannot_be_mapped_reads_what_is_asked_for_and_warns(tmp_path, monkeypatch, caplog):
    shared = torch.arange(6.0)
    torch.save({"a": shared, "b": shared, "none": torch.empty(0, 2)}, tmp_path / "a.bin")
    monkeypatch.setattr(pages, "map_private", refusing(errno.ENODEV))
    with caplog.at_level(logging.WARNING, logger="lading"):
        mapping = ShardMapping(read_shard(tmp_path / "a.bin"))
    assert "No such device" in caplog.text
    made = {name: mapping.tensor(spec) for name, spec in mapping.shard.tensors.items()}
    assert torch.equal(made["a"], shared)
    assert made["a"].data_ptr() == made["b"].data_ptr()
    assert made["none"].shape == (0, 2)
    assert mapping.span.num_bytes == 0


@pytest.mark.parametrize("code", [errno.EACCES, errno.EAGAIN, errno.EPERM])
def test_files_that_the_system_does_not_map_for_other_reasons_are_refused_with_the_way_out(path, monkeypatch, code):
    monkeypatch.setattr(pages, "map_private", refusing(code))
    with pytest.raises(CheckpointError) as caught:
        map_catalog(open_catalog(path))
    assert str(caught.value) == (
        f"{path}: found a file that the system does not map ({os.strerror(code)}) · expected a mapping of "
        f"{path.stat().st_size} bytes · read it into memory with copy=True"
    )
    assert not isinstance(caught.value, OSError)


def test_map_private_without_room_among_the_addresses_gives_the_kernels_reason(path):
    with path.open("rb") as file, pytest.raises(OSError, match="Cannot allocate memory") as caught:
        pages.map_private(file.fileno(), 1 << 62)
    assert caught.value.errno == errno.ENOMEM


def test_load_into_of_a_file_larger_than_the_address_space_reads_what_fits_and_refuses_the_rest(tmp_path):
    size = 8 << 30
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        header = {
            "weight": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
            "large": {"dtype": "U8", "shape": [size], "data_offsets": [8, size + 8]},
        }
        file.write(encode(header, bits(torch.tensor([1.0, 2.0]))))
        file.truncate(file.tell() + size)
    code = """
import sys
from pathlib import Path
from lading.checkpoint.header import read_header
from lading.checkpoint.mapping import ShardMapping
from lading.errors import CheckpointError
mapping = ShardMapping(read_header(Path(sys.argv[1])))
print(mapping.tensor(mapping.shard.tensors["weight"]).tolist())
try:
    mapping.tensor(mapping.shard.tensors["large"])
except CheckpointError as error:
    print("no memory for its 8589934592 bytes" in str(error), "tensor 'large'" in str(error))
"""
    assert run_python(code, path, memory_bytes=6 << 30) == "[1.0, 2.0]\nTrue True\n"


@pytest.mark.parametrize("guard", [False, True])
def test_load_into_with_copy_maps_nothing(path, monkeypatch, guard):
    monkeypatch.setattr(pages, "map_private", refusing(errno.EACCES))
    with lading.empty():
        net = Stated()
    before = open_files()
    report = lading.load_into(net, path, copy=True, readahead=True, guard=guard)
    assert open_files() == before
    assert (report.mapped_bytes, report.copied_bytes) == (0, sum(tensor.nbytes for tensor in STATE.values()))
    assert all(torch.equal(value, STATE[name]) for name, value in net.state_dict().items())


class Stated(nn.Module):
    """Hold what `STATE` names."""

    def __init__(self) -> None:
        super().__init__()
        for name, tensor in STATE.items():
            self.register_buffer(name, torch.zeros_like(tensor))


# Whatever the caller is inside of -------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["mapping", "views", "copies", "read_tensor", "unmapped"])
@pytest.mark.parametrize("inside", ["inference_mode", "device", "default_device", "default_dtype", "no_grad"])
def test_tensors_made_inside_a_mode_of_torch_are_plain_ones_of_the_cpu(tmp_path, monkeypatch, way, inside):
    base = torch.tensor([1 + 2j, 3 - 4j])
    state = {**STATE, "conj": base.conj(), "strided": torch.arange(6.0).view(2, 3).T, "plain": base}
    path = tmp_path / "a.bin"
    torch.save(state, path, _use_new_zipfile_serialization=False)  # where nothing is aligned
    catalog = open_catalog(path)
    if way == "unmapped":
        monkeypatch.setattr(pages, "map_private", refusing(errno.ENODEV))
    mapping = ShardMapping(catalog.shards[0])
    with {
        "inference_mode": torch.inference_mode,
        "device": lambda: torch.device("meta"),
        "default_device": lambda: default_device("meta"),
        "default_dtype": lambda: default_dtype(torch.float16),
        "no_grad": torch.no_grad,
    }[inside]():
        if way == "read_tensor":
            with path.open("rb") as file:
                made = {spec.name: read_tensor(catalog.shards[0], file.fileno(), spec) for spec in catalog}
        elif way == "mapping":
            made = {spec.name: mapping.tensor(spec) for spec in catalog}
        else:
            made = tensors_of(catalog, {path: mapping}, copy=way == "copies")
    for name, tensor in made.items():
        assert (tensor.device.type, tensor.dtype) == ("cpu", state[name].dtype)
        assert not tensor.is_inference()
        assert torch.equal(tensor, state[name])
    parameter = nn.Parameter(made["weight"])
    (parameter * 2).sum().backward()
    assert torch.equal(parameter.grad, torch.full((8, 8), 2.0))


@contextmanager
def default_device(device: str) -> Iterator[None]:
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


# Element types that torch has not ------------------------------------------------------------------------------------


@pytest.fixture
def odd(tmp_path: Path) -> Path:
    header = {
        "six": {"dtype": "F6_E2M3", "shape": [4], "data_offsets": [0, 3]},
        "other_six": {"dtype": "F6_E3M2", "shape": [2, 4], "data_offsets": [3, 9]},
        "half_rows": {"dtype": "F4", "shape": [2, 1], "data_offsets": [9, 10]},
        "four": {"dtype": "F4", "shape": [2, 4], "data_offsets": [10, 14]},
        "weight": {"dtype": "F32", "shape": [2], "data_offsets": [14, 22]},
    }
    (tmp_path / "model.safetensors").write_bytes(encode(header, bytes(range(14)) + bits(torch.tensor([1.0, 2.0]))))
    return tmp_path / "model.safetensors"


@pytest.mark.parametrize("copied", [False, True])
def test_tensors_that_torch_cannot_hold_hold_up_no_others_and_refuse_by_name_when_looked_at(odd, copied):
    catalog = open_catalog(odd)
    made = tensors_of(catalog, map_catalog(catalog), copy=copied)
    assert list(made) == ["six", "other_six", "half_rows", "four", "weight"]
    assert made["weight"].tolist() == [1.0, 2.0]
    with safe_open(odd, framework="pt") as peer:
        theirs = peer.get_tensor("four")
    assert (made["four"].dtype, made["four"].shape, bits(made["four"])) == (theirs.dtype, theirs.shape, bits(theirs))
    for name, says in (
        ("six", "element type F6_E2M3: found no type of 6 bits in torch · expected a type that torch has"),
        ("other_six", "element type F6_E3M2"),
        ("half_rows", "found shape [2, 1] of F4, whose rows end inside a byte"),
    ):
        with pytest.raises(CheckpointError) as caught:
            _ = made[name].shape
        assert f"{odd}, tensor {name!r}" in str(caught.value)
        assert says in str(caught.value)
        assert "leave the tensor out" in str(caught.value)


@pytest.mark.parametrize("copied", [False, True])
def test_load_into_beside_tensors_that_torch_cannot_hold_loads_the_others(odd, copied):
    with lading.empty():
        net = nn.Module()
        net.weight = nn.Parameter(torch.zeros(2))
    lading.load_into(net, odd, strict=False, copy=copied)
    assert net.weight.tolist() == [1.0, 2.0]


def test_load_into_of_a_tensor_that_torch_cannot_hold_refuses_it_by_name(odd):
    with lading.empty():
        net = nn.Module()
        net.six = nn.Parameter(torch.zeros(4))
    with pytest.raises(CheckpointError, match=r"tensor 'six', element type F6_E2M3: found no type of 6 bits in torch"):
        lading.load_into(net, odd, strict=False)


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
    is_view = mapping.span.begin <= made.data_ptr() < mapping.span.begin + len(raw)
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
    kind = CheckpointNotFoundError if change == "removed" else CorruptShardError
    with pytest.raises(kind, match=r"model\.safetensors: found .* expected .*") as caught:
        ShardMapping(shard)
    if change != "removed":
        assert "load the model again; replace checkpoints by rename, never in place" in str(caught.value)
    with pytest.raises(kind):
        tensors_of(Catalog.of([shard]), {}, copy=True)


def test_packed_tensors_halve_their_last_dimension(tmp_path):
    header = {"a": {"dtype": "F4", "shape": [3, 8], "data_offsets": [0, 12]}}
    (tmp_path / "a.safetensors").write_bytes(encode(header, bytes(range(12))))
    catalog = open_catalog(tmp_path / "a.safetensors")
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
        if element.torch_name is None:
            continue
        dtype = torch_dtype(element)
        assert element_type(dtype) is element
        assert is_plain_float(dtype) is (element.kind == "float")
        if element.bits >= 8:
            assert dtype.itemsize * 8 == element.bits
    assert element_type(torch.qint8) is None


def test_torch_dtype_of_a_type_that_torch_lacks_says_which(monkeypatch):
    monkeypatch.delattr(torch, "float8_e8m0fnu")
    with pytest.raises(
        CheckpointError,
        match=r"element type F8_E8M0: found no torch.float8_e8m0fnu in torch .* install a newer torch",
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
