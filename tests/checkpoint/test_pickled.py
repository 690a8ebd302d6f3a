"""Read files of `torch.save` in both layouts without running them; refuse others, in bounded memory and time."""

from __future__ import annotations

import io
import pickle
import struct
import sys
import tracemalloc
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from handmade import attempt, bits, run_python
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

import lading
from lading.checkpoint.catalog import Catalog
from lading.checkpoint.dtypes import ELEMENT_TYPES, element_type
from lading.checkpoint.locate import Source, open_catalog
from lading.checkpoint.mapping import ShardMapping, map_catalog, tensors_of
from lading.checkpoint.pickled import read_pickled
from lading.errors import CheckpointError, CorruptShardError

LAYOUTS = {"zip": True, "legacy": False}
PROTOCOLS = (2, 4, 5)
DTYPES = [
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
    torch.complex64,
    torch.complex128,
]


@pytest.fixture(params=LAYOUTS, ids=str)
def is_zip(request: pytest.FixtureRequest) -> bool:
    return LAYOUTS[request.param]


def save(path: Path, state: Any, *, is_zip: bool = True, protocol: int = 2) -> Path:
    torch.save(state, path, _use_new_zipfile_serialization=is_zip, pickle_protocol=protocol)
    return path


def read(path: Path) -> dict[str, torch.Tensor]:
    shard = read_pickled(path)
    mapping = ShardMapping(shard)
    return {name: mapping.tensor(spec) for name, spec in shard.tensors.items()}


def assert_reads(path: Path, state: dict[str, torch.Tensor]) -> None:
    made = read(path)
    assert set(made) == set(state)
    for name, tensor in state.items():
        assert (made[name].dtype, made[name].shape) == (tensor.dtype, tensor.shape)
        assert bits(made[name]) == bits(tensor)


def plain() -> dict[str, torch.Tensor]:
    return {"weight": torch.arange(12.0).view(3, 4), "bias": torch.arange(3.0), "steps": torch.tensor(7)}


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_read_pickled_of_plain_tensors_gives_what_was_saved(tmp_path, is_zip, protocol):
    assert_reads(save(tmp_path / "a.bin", plain(), is_zip=is_zip, protocol=protocol), plain())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_read_pickled_of_each_dtype_gives_the_same_bits(tmp_path, is_zip, dtype):
    state = {"a": torch.tensor([0, 1, 1, 0, 1]).to(dtype), "zero": torch.ones((), dtype=dtype)}
    assert_reads(save(tmp_path / "a.bin", state, is_zip=is_zip), state)


@pytest.mark.parametrize(
    "dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16, torch.uint32, torch.uint64], ids=str
)
def test_read_pickled_of_newer_dtypes_gives_the_same_bits(tmp_path, dtype):
    state = {"a": torch.tensor([0, 1, 2, 3, 1]).to(dtype)}  # stored untyped, by _rebuild_tensor_v3
    assert_reads(save(tmp_path / "a.bin", state), state)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_read_pickled_of_strided_tied_and_empty_tensors_keeps_views(tmp_path, is_zip, protocol):
    base = torch.arange(24.0).view(4, 6)
    state = {
        "base": base,
        "transposed": base.T,
        "column": base[:, 2],
        "rows": base[1:3],
        "every_other": base[::2, 1::3],
        "expanded": torch.tensor([5.0]).expand(3, 4),
        "tied": base,
        "none": torch.empty(0, 3),
        "scalar": base[2, 3],
    }
    path = save(tmp_path / "a.bin", state, is_zip=is_zip, protocol=protocol)
    assert_reads(path, state)
    shard = read_pickled(path)
    assert shard.tensors["base"].strides is None
    assert shard.tensors["transposed"].strides == (1, 6)
    assert shard.tensors["base"].offset == shard.tensors["tied"].offset
    assert shard.tensors["rows"].offset == shard.tensors["base"].offset + 6 * 4


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_read_pickled_of_a_state_dict_with_parameters_and_its_version_notes(tmp_path, is_zip, protocol):
    net = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    kept = OrderedDict(net.state_dict(keep_vars=True))
    kept._metadata = net.state_dict()._metadata
    assert_reads(save(tmp_path / "a.bin", kept, is_zip=is_zip, protocol=protocol), net.state_dict())
    assert_reads(save(tmp_path / "b.bin", net.state_dict(), is_zip=is_zip, protocol=protocol), net.state_dict())


def test_read_pickled_of_a_parameter_with_attributes_reads_the_tensor(tmp_path, is_zip):
    parameter = nn.Parameter(torch.arange(3.0))
    parameter.note = "kept by _rebuild_parameter_with_state"
    assert_reads(save(tmp_path / "a.bin", {"a": parameter}, is_zip=is_zip), {"a": parameter})


def test_read_pickled_touches_no_torch_and_needs_none(tmp_path, is_zip):
    path = save(tmp_path / "a.bin", plain(), is_zip=is_zip)
    code = """
import sys
from pathlib import Path
from lading.checkpoint.pickled import read_pickled
print(sorted(read_pickled(Path(sys.argv[1])).tensors))
assert "torch" not in sys.modules
"""
    assert run_python(code, path) == "['bias', 'steps', 'weight']\n"


def test_read_pickled_of_an_old_style_storage_view_never_reads_other_bytes(tmp_path):
    """Files of torch < 0.4 may name a window of a storage: read as torch.load does, or refused."""

    class OldPickler(pickle.Pickler):
        def persistent_id(self, value: Any) -> Any:
            return value.pid if isinstance(value, Stub) else None

    class Stub:
        pid = ("storage", torch.FloatStorage, "0", "cpu", 6, ("1", 4, 2))

    class Rebuilt:
        def __reduce__(self) -> Any:
            return torch._utils._rebuild_tensor, (Stub(), 0, (2,), (1,))

    path = tmp_path / "old.bin"
    with path.open("wb") as file:
        for value in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}):
            pickle.dump(value, file, protocol=2)
        OldPickler(file, protocol=2).dump({"a": Rebuilt()})
        pickle.dump(["0"], file, protocol=2)
        file.write(struct.pack("<q", 6) + struct.pack("<6f", *range(6)))
    try:
        made = read(path)
    except CheckpointError:
        return
    assert made["a"].tolist() == [4.0, 5.0]


# What must be refused: named code ------------------------------------------------------------------------------------


class Runs:
    """Unpickled by pickle itself, this makes a file: the sentinel that must never appear."""

    def __init__(self, sentinel: Path, call: Callable[[Path], Any]) -> None:
        self.reduced = call(sentinel)

    def __reduce__(self) -> Any:
        return self.reduced


CALLS: dict[str, Callable[[Path], Any]] = {
    "open": lambda path: (open, (str(path), "w")),
    "os.system": lambda path: (__import__("os").system, (f"touch {path}",)),
    "exec": lambda path: (exec, (f"open({str(path)!r}, 'w')",)),
    "Path.touch": lambda path: (Path.touch, (path,)),
    "torch.load": lambda path: (torch.load, (str(path),)),
    "getattr": lambda path: (getattr, (path, "touch")),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("place", ["value", "key", "beside", "state"])
def test_read_pickled_of_code_refuses_by_its_name_and_never_runs_it(tmp_path, is_zip, call, place):
    sentinel = tmp_path / "sentinel"
    code = Runs(sentinel, CALLS[call])
    state: Any = {
        "value": lambda: {"weight": code},
        "key": lambda: {code: torch.ones(1)},
        "beside": lambda: (plain(), code),
        "state": lambda: with_attribute(plain(), code),
    }[place]()
    path = save(tmp_path / "a.bin", state, is_zip=is_zip)
    with pytest.raises(CheckpointError) as caught:
        read_pickled(path)
    assert not sentinel.exists()
    message = str(caught.value)
    assert message.startswith(f"{path}: found a pickle that names ")
    assert (
        "which lading never runs · expected a dict of plain tensors · save it as safetensors where you trust it"
        in message
    )


def with_attribute(state: dict[str, torch.Tensor], value: Any) -> OrderedDict[str, torch.Tensor]:
    ordered = OrderedDict(state)
    ordered._metadata = value
    return ordered


@pytest.mark.parametrize("is_whole", [True, False], ids=["a whole module", "inside a dict"])
def test_read_pickled_of_a_module_names_its_class(tmp_path, is_zip, is_whole):
    net = nn.Linear(2, 2)
    with pytest.raises(CheckpointError, match=r"names torch\.nn\.modules\.linear\.Linear, which lading never runs"):
        read_pickled(save(tmp_path / "a.bin", net if is_whole else {"model": net}, is_zip=is_zip))


# Pickles written by hand: protocol 2 opcodes, in a zip like torch's --------------------------------------------------


def zipped(path: Path, program: bytes, storage: bytes = bytes(range(24)), **members: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", program)
        archive.writestr("archive/data/0", storage)
        for name, content in members.items():
            archive.writestr(f"archive/{name}", content)
    return path


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def number(value: int) -> bytes:
    raw = value.to_bytes((value.bit_length() + 8) // 8, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw


def storage(kind: str = "FloatStorage", key: bytes = text("0"), count: int = 6) -> bytes:
    """A persistent id: what `persistent_load` is called with."""
    return b"(" + text("storage") + b"ctorch\n" + kind.encode() + b"\n" + key + text("cpu") + number(count) + b"tQ"


def tensor(
    offset: bytes = b"K\x00", shape: bytes = b"K\x06\x85", strides: bytes = b"K\x01\x85", stored: bytes = b""
) -> bytes:
    head = b"ctorch._utils\n_rebuild_tensor_v2\n(" + (stored or storage())
    return head + offset + shape + strides + b"\x89ccollections\nOrderedDict\n)RtR"


def table(value: bytes, name: bytes = text("a")) -> bytes:
    return b"\x80\x02}" + name + value + b"s."


def test_hand_written_pickles_are_what_torch_writes(tmp_path):
    assert read(zipped(tmp_path / "a.bin", table(tensor())))["a"].shape == (6,)


def test_read_pickled_of_state_set_on_a_record_changes_nothing_in_this_process(tmp_path):
    """BUILD, the opcode that sets an object's state, reaches a frozen record's `__setstate__`."""
    before = {name: (element.bits, element.kind, element.torch_name) for name, element in ELEMENT_TYPES.items()}
    state = b"](" + text("F32") + b"K\x01" + text("integer") + text("int8") + b"e"
    poison = b"ctorch\nFloatStorage\n" + state + b"b0"
    path = zipped(tmp_path / "a.bin", b"\x80\x02" + poison + table(tensor())[2:])
    try:
        with suppress(CheckpointError):  # refused, or the state ignored
            read_pickled(path)
        assert {name: (e.bits, e.kind, e.torch_name) for name, e in ELEMENT_TYPES.items()} == before
    finally:
        for name, (width, kind, torch_name) in before.items():
            for field, value in zip(("bits", "kind", "torch_name"), (width, kind, torch_name), strict=True):
                object.__setattr__(ELEMENT_TYPES[name], field, value)
        object.__setattr__(ELEMENT_TYPES["F32"], "name", "F32")


def test_read_pickled_of_state_set_on_a_function_changes_nothing_in_this_process(tmp_path):
    from lading.checkpoint import unpickling

    function = unpickling._rebuild_tensor
    state = b"}" + text("planted") + b"K\x01s" + b"}" + text("__defaults__") + b"(K\x07ts\x86"
    path = zipped(tmp_path / "a.bin", b"\x80\x02ctorch._utils\n_rebuild_tensor\n" + state + b"b0" + table(tensor())[2:])
    try:
        with suppress(CheckpointError):  # refused, or the state ignored
            read_pickled(path)
        assert not hasattr(function, "planted")
        assert function.__defaults__ is None
    finally:
        vars(function).pop("planted", None)
        function.__defaults__ = None


HOSTILE_TABLES: dict[str, bytes] = {
    "state_set_on_a_tensor": table(
        tensor() + b"](" + storage() + b"ctorch\nfloat32\n" + number(-1000) + b"K\x04\x85K\x01\x85eb"
    ),
    "state_set_on_a_storage": table(tensor(stored=storage() + b"](]ctorch\nfloat32\nK\x06eb")),
    "items_replaced": b"\x80\x02ccollections\nOrderedDict\n)R" + b"}" + text("items") + b"K\x01sb.",
    "items_replaced_by_a_function": b"\x80\x02ccollections\nOrderedDict\n)R"
    + b"}"
    + text("items")
    + b"ccollections\nOrderedDict\nsb.",
    "offset_negative": table(tensor(offset=number(-4))),
    "offset_no_number": table(tensor(offset=text("0"))),
    "offset_past_the_storage": table(tensor(offset=b"K\x01")),
    "offset_huge": table(tensor(offset=number(2**70))),
    "size_negative": table(tensor(shape=number(-6) + b"\x85")),
    "size_huge": table(tensor(shape=number(2**40) + b"\x85")),
    "size_past_2_63_of_nothing": table(tensor(shape=b"K\x00" + number(2**70) + b"\x86", strides=b"K\x01K\x01\x86")),
    "size_past_2_63_expanded": table(tensor(shape=number(2**70) + b"\x85", strides=b"K\x00\x85")),
    "size_true": table(tensor(shape=b"\x88\x85")),
    "shape_no_tuple": table(tensor(shape=b"K\x06")),
    "stride_negative": table(tensor(strides=number(-1) + b"\x85")),
    "stride_huge": table(tensor(strides=number(2**40) + b"\x85")),
    "stride_past_2_63_of_one": table(tensor(shape=b"K\x01\x85", strides=number(2**70) + b"\x85")),
    "strides_of_other_length": table(tensor(strides=b"K\x01K\x01\x86")),
    "storage_not_in_the_file": table(tensor(stored=storage(key=text("7")))),
    "storage_key_a_list": table(tensor(stored=storage(key=b"]"))),
    "storage_of_unknown_kind": table(tensor(stored=storage(kind="QUInt8Storage"))),
    "storage_no_tuple": table(b"K\x07Q"),
    "storage_a_string": table(tensor(stored=text("0"))),
    "name_a_number": table(tensor(), name=b"K\x01"),
    "name_a_tensor": table(tensor(), name=tensor()),
    "value_a_number": table(b"K\x01"),
    "value_nested": table(table(tensor())[2:-1]),
    "a_list": b"\x80\x02].",
    "a_number": b"\x80\x02K\x01.",
    "nothing": b"",
    "no_stop": table(tensor())[:-1],
    "stack_underflow": b"\x80\x02R.",
    "unknown_opcode": b"\x80\x02\xff.",
    "unknown_memo": b"\x80\x02h\x07.",
    "unknown_protocol": b"\x80\x63}.",
    "extension": b"\x80\x02\x82\x01.",
    "new_object": b"\x80\x02ccollections\nOrderedDict\n)\x81.",
    "instance": b"(ibuiltins\nlist\n.",
    "import_by_stack": b"\x80\x04" + b"\x8c\x02os" + b"\x8c\x06system\x93" + b"\x8c\x04true\x85R.",
    "ordered_dict_of_pairs": b"\x80\x02ccollections\nOrderedDict\n](K\x01K\x02\x86e\x85R.",
    "bytes_claim": b"\x80\x04\x8e" + struct.pack("<Q", 2**40) + b"x.",
    "text_claim": b"\x80\x04\x8d" + struct.pack("<Q", 2**62) + b"x.",
    "frame_claim": b"\x80\x04\x95" + struct.pack("<Q", 2**40) + b"}.",
    "number_claim": b"\x80\x02\x8b" + struct.pack("<i", 2**31 - 1) + b"\x01.",
    "memo_claim": b"\x80\x02}r" + struct.pack("<I", 2**32 - 1) + text("a") + b"K\x01s.",
}


@pytest.mark.parametrize("case", HOSTILE_TABLES)
def test_read_pickled_of_a_hostile_table_refuses_by_the_files_name_in_little_memory(tmp_path, case):
    path = zipped(tmp_path / "a.bin", HOSTILE_TABLES[case])
    hold_to_law(path)


@pytest.mark.parametrize(
    "case", ["bytes_claim", "text_claim", "frame_claim", "number_claim", "memo_claim", "nothing", "unknown_opcode"]
)
def test_read_pickled_of_a_hostile_legacy_pickle_refuses_in_little_memory(tmp_path, case):
    path = tmp_path / "a.bin"
    path.write_bytes(HOSTILE_TABLES[case])
    hold_to_law(path)


@pytest.mark.parametrize("size", [2**31, 2**33, 2**36])
def test_read_pickled_of_a_legacy_claim_past_the_end_allocates_nothing(tmp_path, size):
    path = tmp_path / "a.bin"
    head = b"".join(pickle.dumps(value, protocol=2) for value in (0x1950A86A20F9469CFC6C, 1001, {}))
    for opcode in (b"\x8e", b"\x8d", b"\x95"):
        path.write_bytes(head + b"\x80\x04" + opcode + struct.pack("<Q", size) + b"x.")
        hold_to_law(path)


def hold_to_law(path: Path, *, at_most: int = 4 << 20, inner_key: str | None = None) -> None:
    """Check that a file is refused by its name, or that its tensors can be made; either way in little memory."""
    tracemalloc.start()
    try:
        shard, message = attempt(read_pickled, path, inner_key, refusing=CheckpointError)
        if shard is not None:
            catalog = Catalog.of([shard])
            made, message = attempt(tensors_of, catalog, map_catalog(catalog), refusing=CheckpointError)
            assert made is None or all(element_type(tensor.dtype) is not None for tensor in made.values())
        if message is not None:
            assert path.name in message
            assert "expected" in message
        assert tracemalloc.get_traced_memory()[1] < at_most
    finally:
        tracemalloc.stop()


HARMLESS = {"frame_claim", "items_replaced", "items_replaced_by_a_function", "memo_claim", "stride_past_2_63_of_one"}
REFUSED_AS_DAMAGED = sorted(
    set(HOSTILE_TABLES) - HARMLESS
)  # a harmless one may be read, as far as `hold_to_law` allows


@pytest.mark.parametrize("case", REFUSED_AS_DAMAGED)
def test_read_pickled_of_a_hostile_table_is_never_accepted(tmp_path, case):
    with pytest.raises(CheckpointError, match=r"a\.bin"):
        read_pickled(zipped(tmp_path / "a.bin", HOSTILE_TABLES[case]))


def test_read_pickled_of_a_tensor_outside_its_storage_names_tensor_found_and_expected(tmp_path):
    with pytest.raises(CorruptShardError) as caught:
        read_pickled(zipped(tmp_path / "a.bin", table(tensor(offset=b"K\x01"))))
    assert "a.bin, tensor 'a': found bytes " in str(caught.value)
    assert "of a 24-byte storage in a file of" in str(caught.value)
    assert "expected what torch.save writes · download or save the file again" in str(caught.value)


BOMB = b"".join(
    [b"\x80\x02)q\x00", *(b"h" + bytes([n]) + b"h" + bytes([n]) + b"\x86q" + bytes([n + 1]) for n in range(60))]
)


@pytest.mark.parametrize("use", ["persistent id", "offset", "size", "name", "value", "reduce"])
def test_read_pickled_of_nested_shared_tuples_ends(tmp_path, use):
    """Sixty tuples, each of the one before twice: whoever writes one out, or hashes it, never ends."""
    leaf = b"h" + bytes([60])
    uses = {
        "persistent id": BOMB + b"0}" + text("a") + leaf + b"Qs.",
        "offset": BOMB + b"0" + table(tensor(offset=leaf))[2:],
        "size": BOMB + b"0" + table(tensor(shape=leaf + b"\x85"))[2:],
        "name": BOMB + b"0" + table(tensor(), name=leaf)[2:],
        "value": BOMB + b"0" + table(leaf)[2:],
        "reduce": BOMB + b"0ccollections\nOrderedDict\n" + leaf + b"\x85R.",
    }
    path = zipped(tmp_path / "a.bin", uses[use])
    code = """
import sys
from pathlib import Path
from lading.checkpoint.pickled import read_pickled
from lading.errors import CheckpointError
try:
    read_pickled(Path(sys.argv[1]))
except CheckpointError as error:
    assert "a.bin" in str(error) and len(str(error)) < 4000, str(error)[:1000]
    print("refused")
"""
    assert run_python(code, path, memory_bytes=500 << 20, cpu_s=4) == "refused\n"


# Damaged containers --------------------------------------------------------------------------------------------------


def test_read_pickled_of_every_truncation_refuses_by_name(tmp_path, is_zip):
    raw = save(tmp_path / "whole.bin", plain(), is_zip=is_zip).read_bytes()
    path = tmp_path / "cut.bin"
    for length in [*range(0, len(raw) - 1, max(1, len(raw) // 150)), len(raw) - 1]:
        path.write_bytes(raw[:length])
        with pytest.raises(CheckpointError, match=r"cut\.bin"):
            read_pickled(path)


@pytest.mark.parametrize("is_padded", [False, True])
def test_read_pickled_of_a_compressed_archive_refuses(tmp_path, is_padded):
    whole = save(tmp_path / "whole.bin", {"a": torch.zeros(1000)})
    path = tmp_path / "a.bin"
    with zipfile.ZipFile(whole) as source, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target:
        for info in source.infolist():
            target.writestr(info.filename, source.read(info))
        if is_padded:
            target.writestr(zipfile.ZipInfo("whole/padding"), bytes(10_000))
    with pytest.raises(CorruptShardError, match=r"a\.bin: found .*(compressed|claims)"):
        read_pickled(path)


@pytest.mark.parametrize("member", ["byteorder", "data.pkl"])
def test_read_pickled_of_a_zip_bomb_allocates_little(tmp_path, member):
    path = tmp_path / "a.bin"
    content = {"data.pkl": table(tensor()), "byteorder": b"little", "data/0": bytes(24)}
    content[member] = content[member] + bytes(64 << 20)  # shrinks to 64 KiB
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, raw in content.items():
            archive.writestr(f"archive/{name}", raw)
    hold_to_law(path)


@pytest.mark.parametrize("member", ["byteorder", "data.pkl"])
def test_read_pickled_of_a_zip_bomb_that_lies_about_its_size_allocates_little(tmp_path, member):
    path = tmp_path / "a.bin"
    content = {"data.pkl": table(tensor()), "byteorder": b"little", "data/0": bytes(24)}
    content[member] = content[member] + bytes(64 << 20)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, raw in content.items():
            archive.writestr(f"archive/{name}", raw)
    raw = bytearray(path.read_bytes())
    truth = struct.pack("<I", len(content[member]))
    assert raw.count(truth) == 2  # its local header and its entry in the directory
    path.write_bytes(bytes(raw).replace(truth, struct.pack("<I", 100)))
    hold_to_law(path)


def test_read_pickled_of_a_member_that_stands_twice_refuses(tmp_path):
    """Which one counts differs between readers of zip archives: ambiguous, so refused."""
    path = zipped(tmp_path / "a.bin", table(tensor()))
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr("archive/data/0", bytes(24))
    with pytest.raises(CheckpointError, match=r"a\.bin"):
        read_pickled(path)


@pytest.mark.parametrize(
    ("members", "says"),
    [
        ({}, "a zip archive of 'readme'"),
        ({"one/data.pkl": b"", "two/data.pkl": b""}, "a zip archive of 'readme', 'one/data.pkl', 'two/data.pkl'"),
        ({"deep/er/data.pkl": b""}, "a zip archive of 'readme', 'deep/er/data.pkl'"),
    ],
)
def test_read_pickled_of_another_zip_archive_says_what_is_in_it(tmp_path, members, says):
    path = tmp_path / "a.bin"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme", b"hello")
        for name, content in members.items():
            archive.writestr(name, content)
    with pytest.raises(
        CorruptShardError, match=rf"a\.bin: found {says} · expected what torch.save writes: one data.pkl"
    ):
        read_pickled(path)


def test_read_pickled_of_big_endian_data_refuses(tmp_path):
    path = zipped(tmp_path / "a.bin", table(tensor()), byteorder=b"big")
    with pytest.raises(CorruptShardError, match=r"a\.bin: found big-endian data"):
        read_pickled(path)


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b"", r"an empty file \(0 bytes\)"),
        (b"version https://git-lfs.github.com/spec/v1\nsize 4\n", "git-lfs pointer"),
        (b"<html>404</html>", "damaged file"),
        (pickle.dumps({"a": 1}, protocol=2), "without torch's magic number"),
        (bytes(4096), "damaged file"),
    ],
)
def test_read_pickled_of_something_else_says_so(tmp_path, raw, says):
    (tmp_path / "a.bin").write_bytes(raw)
    with pytest.raises(CorruptShardError, match=says):
        read_pickled(tmp_path / "a.bin")


def test_read_pickled_of_a_training_checkpoint_says_what_to_save(tmp_path, is_zip):
    path = save(tmp_path / "a.bin", {"state_dict": plain(), "epoch": 3}, is_zip=is_zip)
    with pytest.raises(CheckpointError) as caught:
        read_pickled(path)
    assert "found entries that are no named tensors: 'state_dict', 'epoch'" in str(caught.value)
    assert "pass inner_key='state_dict' to lading.load_into, or --inner-key to lading inspect" in str(caught.value)


# Training checkpoints: a dict of tensors among other things ----------------------------------------------------------


class Settings(dict[str, Any]):
    """A class that no reader knows, with state of its own, as hyper-parameters often are."""

    def __init__(self, **values: Any) -> None:
        super().__init__(**values)
        self.note = "state"


class Monitor(list[Any]):
    """Another one: built by NEWOBJ, filled by APPENDS, then given its state."""


class Slotted:
    """A third: its state is a pair."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value


def training_checkpoint(sentinel: Path | None = None) -> dict[str, Any]:
    """What a trainer saves: optimizer states with numbers as keys, callbacks by class, parameters of any class."""
    net = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    optimizer = torch.optim.Adam(net.parameters())
    net(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    monitor = Monitor([1, torch.ones(2), {"x": {1, 2}}])
    monitor.best = torch.tensor(0.5)
    return {
        "epoch": 3,
        "state_dict": net.state_dict(),
        "optimizer_states": [optimizer.state_dict()],
        "lr_schedulers": [{"base_lrs": [0.1], "last_epoch": 2, "_step_count": 3}],
        "callbacks": {Monitor: monitor, ("pair", 1): frozenset([1, 2]), None: bytearray(b"raw"), 2.5: {1, 2}},
        "hyper_parameters": Settings(
            lr=0.1, path=Path("/data"), shape=torch.Size([2]), dtype=torch.qint8, at=np.float64(1)
        ),
        "slotted": Slotted(complex(1, 2)),
        "ema": {"model": {"state": OrderedDict(plain())}, "decay": 0.9},
        "code": Runs(sentinel, CALLS["open"]) if sentinel is not None else None,
    }


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_read_pickled_of_a_training_checkpoint_gives_the_dict_under_the_inner_key(tmp_path, is_zip, protocol):
    content = training_checkpoint(tmp_path / "sentinel")
    path = save(tmp_path / "last.ckpt", content, is_zip=is_zip, protocol=protocol)
    for key, expected in (("state_dict", content["state_dict"]), ("ema.model.state", plain())):
        shard = read_pickled(path, key)
        mapping = ShardMapping(shard)
        assert set(shard.tensors) == set(expected)
        for name, spec in shard.tensors.items():
            assert bits(mapping.tensor(spec)) == bits(expected[name])
    assert not (tmp_path / "sentinel").exists()


def test_read_pickled_of_a_training_checkpoint_without_an_inner_key_offers_those_there_are(tmp_path, is_zip):
    path = save(tmp_path / "last.ckpt", training_checkpoint(), is_zip=is_zip)
    with pytest.raises(CheckpointError) as caught:
        read_pickled(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: found a pickle that names ")
    assert (
        "which lading never runs · expected a dict of plain tensors · pass inner_key='state_dict' to lading" in message
    )
    assert "dicts of tensors inside are 'state_dict', 'ema.model.state'" in message


@pytest.mark.parametrize(
    ("key", "says"),
    [
        (
            "weights",
            "nothing under inner_key='weights' · expected a dict of plain tensors · pass inner_key='state_dict'",
        ),
        ("ema.model", "entries that are no named tensors: 'state' · "),
        ("ema.model.state.bias", "a pickled TensorRecord"),
        ("epoch.x", "nothing under inner_key='epoch.x'"),
        ("", "nothing under inner_key=''"),
        ("callbacks", r"entries that are no named tensors: '?', '?', '?', '?' (such as "),
        ("hyper_parameters", "a pickled test_pickled.Settings"),
        ("epoch", "a pickled int"),
    ],
)
def test_read_pickled_of_an_inner_key_that_is_no_dict_of_tensors_says_what_it_is(tmp_path, is_zip, key, says):
    path = save(tmp_path / "last.ckpt", training_checkpoint(), is_zip=is_zip)
    with pytest.raises(CheckpointError) as caught:
        read_pickled(path, key)
    assert f"{path}: found {says}" in str(caught.value)


def test_read_pickled_of_foreign_values_in_the_asked_for_dict_names_their_class(tmp_path, is_zip):
    state = {"weight": torch.ones(2), "extra": Settings(a=1)}
    with pytest.raises(
        CheckpointError, match=r"no named tensors: 'extra' \(such as test_pickled\.Settings, which lading"
    ):
        read_pickled(save(tmp_path / "a.ckpt", {"state_dict": state}, is_zip=is_zip), "state_dict")


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("place", ["value", "key", "beside", "state"])
def test_read_pickled_of_code_beside_the_asked_for_dict_never_runs_it(tmp_path, is_zip, call, place):
    sentinel = tmp_path / "sentinel"
    code = Runs(sentinel, CALLS[call])
    state: Any = {
        "value": lambda: {"state_dict": plain(), "more": code},
        "key": lambda: {"state_dict": plain(), code: 1},
        "beside": lambda: {"state_dict": plain(), "more": [(code, {code: code})]},
        "state": lambda: {"state_dict": with_attribute(plain(), code)},
    }[place]()
    path = save(tmp_path / "a.ckpt", state, is_zip=is_zip)
    assert sorted(read_pickled(path, "state_dict").tensors) == ["bias", "steps", "weight"]
    assert not sentinel.exists()


def test_load_into_with_an_inner_key_fills_a_module_and_maps_the_file(tmp_path, is_zip):
    content = training_checkpoint()
    path = save(tmp_path / "last.ckpt", content, is_zip=is_zip)
    with lading.empty():
        net = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    report = lading.load_into(net, path, inner_key="state_dict")
    assert all(torch.equal(value, content["state_dict"][name]) for name, value in net.state_dict().items())
    assert report.num_tensors == len(content["state_dict"])
    assert is_zip is False or report.copied_bytes == 0  # a legacy file aligns nothing


def test_load_into_of_a_training_checkpoint_says_which_inner_key_to_pass(tmp_path):
    save(tmp_path / "last.ckpt", {"state_dict": plain(), "epoch": 1})
    with pytest.raises(CheckpointError, match=r"pass inner_key='state_dict' to lading\.load_into"):
        lading.load_into(nn.Linear(2, 2), tmp_path / "last.ckpt")


def test_load_into_with_an_inner_key_for_safetensors_says_to_leave_it_out(tmp_path):
    save_file(plain(), tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=r"found safetensors, and inner_key='x' · .* · leave inner_key out"):
        lading.load_into(nn.Linear(2, 2), tmp_path / "a.safetensors", inner_key="x")


def test_open_catalog_with_a_key_that_has_dots_takes_the_longest(tmp_path):
    save(
        tmp_path / "a.ckpt",
        {"a.b": {"x": torch.ones(1)}, "a": {"b": {"y": torch.ones(1)}, "b.c": {"z": torch.ones(1)}}},
    )
    for key, name in (("a.b", "x"), ("a.b.c", "z")):
        assert list(open_catalog(Source(path_or_repo_id=str(tmp_path / "a.ckpt"), inner_key=key)).owners) == [name]


FOREIGN_OPCODES: dict[str, bytes] = {
    "bytearray_claim": b"\x80\x05\x96" + struct.pack("<Q", 2**62) + b"x.",
    "bytearray_claim_of_a_gigabyte": b"\x80\x05\x96" + struct.pack("<Q", 2**30) + b"x.",
    "set_of_bombs": b"\x80\x04\x8f(" + b"K\x01" * 5 + b"\x90.",
    "items_for_a_dict": b"\x80\x04}(K\x01\x90.",
    "object_of_a_function": b"\x80\x02ctorch._utils\n_rebuild_tensor\n)\x81.",
    "object_of_a_record": b"\x80\x02ctorch\nFloatStorage\n)\x81.",
    "object_of_nothing": b"\x80\x02(o.",
    "instance_of_a_function": b"(icollections\nOrderedDict\n.",
    "state_for_a_number": b"\x80\x02K\x01}b.",
    "state_for_a_function": b"\x80\x02ccollections\nOrderedDict\n}b.",
    "appended_to_a_dict": b"\x80\x02}K\x01a.",
    "appended_to_a_record": b"\x80\x02ctorch\nFloatStorage\nK\x01a.",
    "buffer": b"\x80\x05\x97.",
    "read_only_buffer": b"\x80\x05\x98.",
    "long_name": b"\x80\x02c" + b"a" * 5000 + b"\n" + b"b" * 5000 + b"\n.",
}


@pytest.mark.parametrize("inner_key", [None, "a", "a.b"])
@pytest.mark.parametrize("case", [*FOREIGN_OPCODES, *HOSTILE_TABLES])
def test_read_pickled_of_a_hostile_pickle_with_an_inner_key_refuses_in_little_memory(tmp_path, case, inner_key):
    program = (FOREIGN_OPCODES | HOSTILE_TABLES)[case]
    hold_to_law(zipped(tmp_path / "a.bin", program), inner_key=inner_key)
    (tmp_path / "b.bin").write_bytes(program)
    hold_to_law(tmp_path / "b.bin", inner_key=inner_key)
    if case in FOREIGN_OPCODES:
        with pytest.raises(CheckpointError) as caught:
            read_pickled(tmp_path / "a.bin", inner_key)
        assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    "use", ["set", "frozenset", "key", "dict", "object", "reduce", "state", "item", "append", "id"]
)
def test_read_pickled_of_shared_tuples_given_to_foreign_objects_ends(tmp_path, use):
    leaf, foreign = b"h" + bytes([60]), b"cno_module\nNoClass\n"
    uses = {
        "set": b"\x8f(" + leaf + b"\x90",
        "frozenset": b"(" + leaf + b"\x91",
        "key": b"}" + leaf + b"K\x01s",
        "dict": b"(" + leaf + b"K\x01d",
        "object": foreign + leaf + b"\x81",
        "reduce": foreign + leaf + b"R",
        "state": foreign + b")R" + leaf + b"b",
        "item": foreign + b")R" + leaf + leaf + b"s",
        "append": foreign + b")R" + leaf + b"a",
        "id": b"(" + foreign + leaf + b"tQ",
    }
    program = BOMB + b"0}" + text("more") + uses[use] + b"s" + text("state_dict") + table(tensor())[2:-1] + b"s."
    path = zipped(tmp_path / "a.bin", program)
    code = """
import sys
from pathlib import Path
from lading.checkpoint.pickled import read_pickled
print(*read_pickled(Path(sys.argv[1]), "state_dict").tensors)
"""
    assert run_python(code, path, memory_bytes=500 << 20, cpu_s=4) == "a\n"


@pytest.mark.parametrize("num_sizes", [200, 255, 256, 100_000])
def test_read_pickled_of_sizes_that_many_tensors_share_takes_no_memory_for_each(tmp_path, num_sizes):
    ones = b"(" + b"K\x01" * num_sizes + b"tq\x01"
    program = (
        b"\x80\x02" + ones + b"0" + storage() + b"q\x02" + b"0" + b"ctorch._utils\n_rebuild_tensor\nq\x03" + b"0}("
    )
    one = b"h\x03(h\x02K\x00h\x01h\x01tR"
    program += b"".join(text(f"t{index}") + one for index in range(4000)) + b"u."
    path = zipped(tmp_path / "a.bin", program)
    hold_to_law(path, at_most=8 << 20)
    if num_sizes <= 255:
        assert len(read_pickled(path).tensors) == 4000
    else:
        with pytest.raises(
            CorruptShardError, match=f"a.bin: found a damaged file .TypeError: {num_sizes} sizes in a tuple"
        ):
            read_pickled(path)


def test_read_pickled_of_dicts_that_hold_themselves_or_each_other_often_ends(tmp_path):
    """What is offered is sought inside: each dict once, however many hold it."""
    many = {f"k{index}": {} for index in range(300)}
    for value in many.values():
        value.update(many)
    many["self"] = many
    path = save(tmp_path / "a.bin", many)
    with pytest.raises(CheckpointError, match="entries that are no named tensors"):
        read_pickled(path)


# Lazily conjugated and negated tensors -------------------------------------------------------------------------------


def test_read_pickled_of_conjugated_and_negated_tensors_gives_the_values_of_torch(tmp_path, is_zip):
    base = torch.tensor([[1 + 2j, 3 - 4j], [5 + 0j, -6j]])
    state = {
        "plain": base,
        "conj": base.conj(),
        "rows": base.conj()[1:],
        "transposed": base.mH,
        "imag": base.clone().conj().imag,
        "both": torch._neg_view(base.conj()),
        "neg": torch._neg_view(torch.arange(3.0)),
        "tied": base.conj(),
        "scalar": base.conj()[0, 1],
        "none": base.conj()[:0],
    }
    path = save(tmp_path / "a.bin", state, is_zip=is_zip)
    expected = torch.load(path)
    catalog = open_catalog(path)
    for copied in (False, True):
        made = tensors_of(catalog, {} if copied else map_catalog(catalog), copy=copied)
        for name, tensor in expected.items():
            assert made[name].dtype == tensor.dtype
            assert torch.equal(made[name], tensor), name
            assert not made[name].is_conj()
            assert not made[name].is_neg()
        assert made["conj"].data_ptr() == made["tied"].data_ptr()
    mapping = ShardMapping(catalog.shards[0])
    if is_zip:
        assert mapping.tensor(catalog["plain"]).data_ptr() == mapping.span.begin + catalog["plain"].offset


def test_load_into_of_a_conjugated_tensor_copies_that_tensor_alone(tmp_path):
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Parameter(torch.zeros(2, dtype=torch.complex64))
            self.b = nn.Parameter(torch.zeros(5))

    state = {"a": torch.tensor([1 + 2j, 3 - 4j]).conj(), "b": torch.arange(5.0)}
    save(tmp_path / "a.bin", state)
    with lading.empty():
        net = Net()
    report = lading.load_into(net, tmp_path / "a.bin")
    assert (report.copied_bytes, report.mapped_bytes) == (16, 20)
    assert net.a.tolist() == [1 - 2j, 3 + 4j]


@pytest.mark.parametrize(
    ("kind", "metadata"),
    [
        ("FloatStorage", b"}" + text("conj") + b"\x88s"),
        ("BoolStorage", b"}" + text("neg") + b"\x88s"),
        ("FloatStorage", text("conj")),
        ("FloatStorage", b"](K\x01e"),
    ],
)
def test_read_pickled_of_lazy_bits_that_torch_refuses_refuses(tmp_path, kind, metadata):
    head = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage(kind)
    program = head + b"K\x00K\x06\x85K\x01\x85\x89ccollections\nOrderedDict\n)R" + metadata + b"tR"
    with pytest.raises(CheckpointError, match=r"a\.bin: found a damaged file"):
        read_pickled(zipped(tmp_path / "a.bin", table(program)))


# Damage again --------------------------------------------------------------------------------------------------------


def test_read_pickled_of_a_legacy_count_past_the_end_refuses(tmp_path):
    path = save(tmp_path / "a.bin", {"a": torch.arange(4.0)}, is_zip=False)
    raw = path.read_bytes()
    count = struct.pack("<q", 4)
    assert raw.endswith(count + struct.pack("<4f", 0, 1, 2, 3))
    for lie in (2**62, 5, 3, 0, -1):
        path.write_bytes(raw[:-24] + struct.pack("<q", lie) + raw[-16:])
        with pytest.raises(CorruptShardError, match=r"a\.bin"):
            read_pickled(path)


def examples(at_least: int) -> settings:
    unfit = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
    return settings(max_examples=max(at_least, settings().max_examples), suppress_health_check=unfit)


def sample(is_zip: bool, protocol: int) -> bytes:
    buffer = io.BytesIO()
    torch.save(
        with_attribute(plain(), {"": {"version": 1}}),
        buffer,
        _use_new_zipfile_serialization=is_zip,
        pickle_protocol=protocol,
    )
    return buffer.getvalue()


SAMPLES = [sample(is_zip, protocol) for is_zip in (True, False) for protocol in PROTOCOLS]
edits = st.lists(st.tuples(st.integers(0, 1 << 16), st.integers(0, 255)), min_size=1, max_size=4)


@examples(400)
@given(which=st.sampled_from(range(len(SAMPLES))), edits=edits, cut=st.none() | st.integers(0, 4096))
def test_read_pickled_of_mutated_bytes_reads_tensors_or_refuses(tmp_path, which, edits, cut):
    raw = bytearray(SAMPLES[which])
    for position, value in edits:
        raw[position % len(raw)] = value
    path = tmp_path / "mutated.bin"
    path.write_bytes(bytes(raw[:cut]))
    hold_to_law(path)


PROGRAM = zipfile.ZipFile(io.BytesIO(SAMPLES[0])).read("archive/data.pkl")


@examples(400)
@given(edits=edits)
def test_read_pickled_of_a_mutated_program_reads_tensors_or_refuses(tmp_path, edits):
    program = bytearray(PROGRAM)
    for position, value in edits:
        program[position % len(program)] = value
    hold_to_law(zipped(tmp_path / "mutated.bin", bytes(program), storage=bytes(48)))


TRAINING = io.BytesIO()
torch.save(training_checkpoint(), TRAINING)
TRAINING_PROGRAM = zipfile.ZipFile(TRAINING).read("archive/data.pkl")


@examples(300)
@given(edits=edits)
def test_read_pickled_of_a_mutated_training_checkpoint_reads_tensors_or_refuses(tmp_path, edits):
    program = bytearray(TRAINING_PROGRAM)
    for position, value in edits:
        program[position % len(program)] = value
    hold_to_law(zipped(tmp_path / "mutated.bin", bytes(program), storage=bytes(48)), inner_key="state_dict")


def test_read_pickled_after_all_mutations_left_no_module_imported_by_a_pickle():
    assert not {"antigravity", "this", "turtle"} & set(sys.modules)
