"""Read headers of random files, valid and broken: safetensors' own verdict or one clear error, in bounded memory."""

from __future__ import annotations

import json
import os
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from handmade import attempt, bits, encode, open_files, run_python
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize
from safetensors.torch import load, save

from lading.checkpoint.dtypes import ELEMENT_TYPES
from lading.checkpoint.header import MAX_HEADER_BYTES, open_regular, read_header, unique_pairs
from lading.checkpoint.mapping import ShardMapping
from lading.errors import CheckpointError, CheckpointNotFoundError, CorruptShardError

DTYPES = [
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.uint16,
    torch.int32,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.complex64,
]


def examples(at_least: int) -> settings:
    """Run so many examples, more under the profile `full`; they share `tmp_path` and overwrite one file."""
    unfit = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
    return settings(max_examples=max(at_least, settings().max_examples), suppress_health_check=unfit)


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 4), max_size=4))
    seed = draw(st.integers(0, 2**31))
    raw = torch.randint(0, 2 if dtype == torch.bool else 256, (64 * 16,), generator=torch.Generator().manual_seed(seed))
    num_elements = int(torch.Size(shape).numel())
    size = dtype.itemsize
    repeated = raw.to(torch.uint8).repeat(-(-num_elements * size // raw.numel()) or 1)
    return repeated[: num_elements * size].clone().view(dtype).view(shape)


names = st.text(st.characters(exclude_categories=["Cs"]), max_size=12).filter(lambda name: name != "__metadata__")
dictionaries = st.dictionaries(names, tensors(), max_size=6)
metadatas = st.none() | st.dictionaries(
    names, st.text(st.characters(exclude_categories=["Cs"]), max_size=9), min_size=1, max_size=3
)


@examples(100)
@given(state=dictionaries, metadata=metadatas)
def test_read_header_of_any_file_saved_by_safetensors_gives_the_same_tensors(tmp_path, state, metadata):
    path = tmp_path / "model.safetensors"
    path.write_bytes(save(state, metadata=metadata))
    shard = read_header(path)
    assert set(shard.tensors) == set(state)
    assert dict(shard.metadata) == (metadata or {})
    mapping = ShardMapping(shard)
    for name, tensor in state.items():
        made = mapping.tensor(shard.tensors[name])
        assert (made.dtype, made.shape, bits(made)) == (tensor.dtype, tensor.shape, bits(tensor))


def verdict(raw: bytes) -> dict[str, tuple[str, list[int], bytes]] | None:
    """Give what safetensors reads, or None where it refuses."""
    try:
        return {name: (entry["dtype"], entry["shape"], bytes(entry["data"])) for name, entry in deserialize(raw)}
    except SafetensorError:
        return None


def hold_to_verdict(path: Path, raw: bytes) -> None:
    """Check that a file is read exactly as safetensors reads it, and refused by its name where that refuses it."""
    path.write_bytes(raw)
    shard, message = attempt(read_header, path, refusing=CorruptShardError)
    if shard is None:
        assert message is not None
        assert path.name in message
        assert "expected" in message
        is_stricter = " twice · " in message or "and < 2**63" in message  # as the docstring of the reader says
        assert is_stricter or verdict(raw) is None, message
        return
    read = {
        name: (spec.element.name, list(spec.shape), raw[spec.offset : spec.offset + spec.num_bytes])
        for name, spec in shard.tensors.items()
    }
    assert read == verdict(raw)
    mapping = ShardMapping(shard)
    for spec in shard.tensors.values():  # whatever was accepted can be made, or torch has no such tensor
        made, _ = attempt(mapping.tensor, spec, refusing=CheckpointError)
        assert spec.element.bits < 8 if made is None else made.nbytes == spec.num_bytes


SAMPLE = save(
    {
        "layer.weight": torch.arange(6, dtype=torch.float32).view(2, 3),
        "layer.bias": torch.arange(3, dtype=torch.int64),
        "none": torch.empty(0, 2),
        "scalar": torch.tensor(True),
    },
    metadata={"format": "pt"},
)


@examples(300)
@given(
    edits=st.lists(st.tuples(st.integers(0, len(SAMPLE) - 1), st.integers(0, 255)), max_size=4),
    cut=st.none() | st.integers(0, len(SAMPLE)),
    more=st.binary(max_size=4),
)
def test_read_header_of_mutated_bytes_agrees_with_safetensors_or_refuses(tmp_path, edits, cut, more):
    raw = bytearray(SAMPLE)
    for position, value in edits:
        raw[position] = value
    hold_to_verdict(tmp_path / "mutated.safetensors", bytes(raw[:cut]) + more)


@examples(150)
@given(raw=st.binary(max_size=200))
def test_read_header_of_any_bytes_refuses_by_name(tmp_path, raw):
    hold_to_verdict(tmp_path / "noise.safetensors", raw)


sizes = st.integers(-2, 5) | st.sampled_from([2**31, 2**32, 2**62, 2**63, 2**64, 2**70, -(2**63)])
anything = st.recursive(
    st.none() | st.booleans() | sizes | st.floats(allow_nan=True) | st.sampled_from(["", "F32", "F64", "a", "ß"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["a", "dtype", "shape"]), inner, max_size=3)
    ),
    max_leaves=5,
)
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(sorted(ELEMENT_TYPES)) | anything,
        "shape": st.lists(sizes, max_size=4) | anything,
        "data_offsets": st.lists(sizes, min_size=2, max_size=2) | anything,
    }
)
likely_entries = st.builds(
    lambda dtype, shape, begin: {
        "dtype": dtype,
        "shape": shape,
        "data_offsets": [begin, begin + torch.Size(shape).numel() * ELEMENT_TYPES[dtype].bits // 8],
    },
    st.sampled_from(sorted(set(ELEMENT_TYPES) - {"C128"})),
    st.lists(st.integers(0, 3), max_size=3),
    st.integers(0, 8),
)


@examples(300)
@given(
    header=st.dictionaries(
        st.sampled_from(["a", "b", "__metadata__"]), likely_entries | entries | anything, max_size=3
    ),
    data=st.binary(max_size=40),
    fits=st.booleans(),
)
def test_read_header_of_any_json_agrees_with_safetensors_or_refuses(tmp_path, header, data, fits):
    if fits:  # data of the length that the offsets ask for, so that more files pass the last check
        ends = [
            entry["data_offsets"][1]
            for entry in header.values()
            if isinstance(entry, dict)
            and isinstance(entry.get("data_offsets"), list)
            and len(entry["data_offsets"]) == 2
        ]
        length = max([end for end in ends if type(end) is int and 0 <= end < 1000], default=0)
        data = bytes(length)
    raw = encode(header, data)
    if b'"C128"' in raw:  # the peer does not know it
        return
    hold_to_verdict(tmp_path / "model.safetensors", raw)


@examples(60)
@given(
    token=st.sampled_from(
        [
            "0.0",
            "1e0",
            "00",
            "01",
            "+1",
            "NaN",
            "Infinity",
            "0x1",
            "1_0",
            "true",
            "null",
            '"1"',
            "[1]",
            "９",
            " 1 ",
            "\\n1",
            "-0",
            "-0.0",
            "18446744073709551615",
        ]
    ),
    place=st.sampled_from(["shape", "begin", "end"]),
)
def test_read_header_of_odd_numbers_agrees_with_safetensors_or_refuses(tmp_path, token, place):
    put = {"shape": "1", "begin": "0", "end": "1", place: token}
    text = f'{{"a":{{"dtype":"U8","shape":[{put["shape"]}],"data_offsets":[{put["begin"]},{put["end"]}]}}}}'
    hold_to_verdict(tmp_path / "model.safetensors", encode(text.encode(), b"\x01"))


spaces = st.text(" \t\r\n", max_size=3)
ignored = st.recursive(
    st.sampled_from(
        ["null", "true", "1", "-0", "-1.5e3", "NaN", "-Infinity", "1e308", "1e309", "9" * 309, '"ß"', '"\\ud800"']
    )
    | st.just("01"),
    lambda inner: (
        st.lists(inner, max_size=3).map(lambda each: f"[{','.join(each)}]") | inner.map(lambda each: f'{{"x":{each}}}')
    ),
    max_leaves=4,
)


@examples(200)
@given(
    before=spaces,
    after=spaces | st.sampled_from(["\0", "\x0b", "{}", ","]),
    entry=st.sampled_from(
        [
            '{{"dtype":"U8","shape":[1],"data_offsets":[0,1]{}}}',
            '{{"shape":[1],"data_offsets":[0,1],"dtype":{{"U8":null}}{}}}',
            '["U8",[1],[0,1]]{}',
            '[{{"U8":null}},[1],[0,1]]{}',
            '["U8",[1]]{}',
        ]
    ),
    metadata=st.sampled_from(["", "null", "{}", '{"a":"b"}', '{"a":1}', '{"a":"1","a":"2"}', "[]"]),
    value=st.none() | ignored,
    key=st.sampled_from(["stride", "", "dtype ", "ß", "a\\n"]),
)
def test_read_header_of_quirks_agrees_with_safetensors(tmp_path, before, after, entry, metadata, value, key):
    more = "" if value is None or not entry.startswith("{{") else f',"{key}":{value}'
    head = f'"__metadata__":{metadata},' if metadata else ""
    text = f'{before}{{{head}"a":{entry.format(more)}}}{after}'
    hold_to_verdict(tmp_path / "model.safetensors", encode(text.encode(), b"\x01"))


@pytest.mark.parametrize("depth", [1, 124, 125, 126, 200, 5000])
def test_read_header_of_ignored_values_nests_as_deep_as_safetensors(tmp_path, depth):
    for opening, closing in ((b"[", b"]"), (b'{"x":', b"}")):
        value = opening * depth + b"1" + closing * depth
        text = b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1],"x":' + value + b"}}"
        hold_to_verdict(tmp_path / "model.safetensors", encode(text, b"\x01"))


@pytest.mark.parametrize("name", [b"\\ud800", b"\\udfff x", b"\\uDC00\\uD800"])
def test_read_header_of_a_lone_surrogate_refuses_the_file(tmp_path, name):
    text = b'{"' + name + b'":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'
    hold_to_verdict(tmp_path / "model.safetensors", encode(text, b"\x01"))


@pytest.mark.parametrize("length", [2**62, 2**63, 2**64 - 1, 1 << 40, MAX_HEADER_BYTES + 1])
def test_read_header_of_a_huge_claim_allocates_nothing(tmp_path, length):
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.write(encode(b"{}", length=length))
        file.truncate(MAX_HEADER_BYTES + 4096)  # a hole: no disk, but long enough for the last claim
    tracemalloc.start()
    try:
        with pytest.raises(CorruptShardError, match=str(length)):
            read_header(path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_read_header_of_hostile_claims_stays_under_a_hard_limit(tmp_path):
    fine = {"a": {"dtype": "U8", "shape": [2**60], "data_offsets": [0, 2**60]}}
    files = {
        "length": encode(b"{}", length=2**62),
        "shape": encode(fine),
        "digits": encode(b'{"a":' + b"9" * 100_000 + b"}"),
        "offsets": encode(
            b'{"a":{"dtype":"U8","shape":[' + b"9" * 4300 + b'],"data_offsets":[' + b"9" * 4300 + b",0]}}"
        ),
        "sizes": encode({"a": {"dtype": "U8", "shape": [2] * 1_000_000, "data_offsets": [0, 1]}}),
        "nested": encode(b'{"a":' * 100_000),
    }
    for name, raw in files.items():
        (tmp_path / f"{name}.safetensors").write_bytes(raw)
    code = """
import sys
from pathlib import Path
from lading.checkpoint.header import read_header
from lading.errors import CheckpointError, CheckpointNotFoundError, CorruptShardError
assert "torch" not in sys.modules
for path in sorted(Path(sys.argv[1]).glob("*.safetensors")):
    try:
        read_header(path)
    except CorruptShardError as error:
        assert path.name in str(error), error
        print(path.stem)
"""
    assert run_python(code, tmp_path, memory_bytes=400 << 20, cpu_s=60).split() == sorted(files)


def test_read_header_of_many_keys_and_one_twice_ends(tmp_path):
    """A duplicate behind 100,000 other keys: finding it must not cost their square."""
    keys = [f'"k{index}":0' for index in range(100_000)]
    (tmp_path / "model.safetensors").write_bytes(encode(("{" + ",".join([*keys, '"z":0', '"z":0']) + "}").encode()))
    code = """
import sys
from pathlib import Path
from lading.checkpoint.header import read_header
try:
    read_header(Path(sys.argv[1]))
except ValueError as error:
    assert "'z' twice" in str(error), error
    print("refused")
"""
    assert run_python(code, tmp_path / "model.safetensors", cpu_s=8) == "refused\n"


def test_read_header_of_a_missing_file_names_it(tmp_path):
    with pytest.raises(CheckpointNotFoundError, match=r"absent\.safetensors: found no such file · expected a file · "):
        read_header(tmp_path / "absent.safetensors")


def test_read_header_of_a_file_that_cannot_be_opened_says_why(tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "file").touch()
    for path, why in ((tmp_path / "loop", "Too many levels"), (tmp_path / "file" / "inside", "Not a directory")):
        with pytest.raises(CorruptShardError, match=f"{path}: found {why}.* · expected a readable file · download"):
            read_header(path)


def test_read_header_of_a_directory_or_a_pipe_refuses_at_once(tmp_path):
    (tmp_path / "directory").mkdir()
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CorruptShardError, match="directory: found a directory · expected a regular file"):
        read_header(tmp_path / "directory")
    with pytest.raises(CorruptShardError, match="pipe: found a special file · expected a regular file"):
        read_header(tmp_path / "pipe")  # opened without waiting for a writer


def test_read_header_closes_its_descriptor_on_success_and_on_error(tmp_path):
    good, bad = tmp_path / "good.safetensors", tmp_path / "bad.safetensors"
    good.write_bytes(SAMPLE)
    bad.write_bytes(SAMPLE[:20])
    before = open_files()
    read_header(good)
    for path in (bad, tmp_path, tmp_path / "none"):
        with pytest.raises(CheckpointError):
            read_header(path)
    assert open_files() == before


def test_open_regular_gives_a_descriptor_of_the_file(tmp_path):
    (tmp_path / "file").write_bytes(b"content")
    descriptor = open_regular(tmp_path / "file")
    try:
        assert os.pread(descriptor, 7, 0) == b"content"
        assert not os.get_inheritable(descriptor)
    finally:
        os.close(descriptor)


def test_unique_pairs_keeps_order_and_refuses_a_key_twice():
    assert list(unique_pairs([("b", 1), ("a", 2)])) == ["b", "a"]
    with pytest.raises(ValueError, match="the key 'a' twice"):
        json.loads('{"b": {"a": 1, "a": 2}}', object_pairs_hook=unique_pairs)


def test_read_header_orders_specs_by_their_bytes_and_records_the_identity(tmp_path):
    path = tmp_path / "model.safetensors"
    header: dict[str, Any] = {
        "z": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
        "a": {"dtype": "U8", "shape": [2], "data_offsets": [1, 3]},
    }
    raw = encode({"a": header["a"], "z": header["z"]}, b"\x01\x02\x03")
    path.write_bytes(raw)
    shard = read_header(path)
    status = path.stat()
    assert list(shard.tensors) == ["z", "a"]
    assert shard.path == path
    assert (shard.identity.device, shard.identity.inode) == (status.st_dev, status.st_ino)
    assert (shard.identity.num_bytes, shard.identity.modified_ns) == (len(raw), status.st_mtime_ns)
    assert {name: tensor.tolist() for name, tensor in load(raw).items()} == {"z": [1], "a": [2, 3]}
