"""`lading inspect` says what stands in the headers, quickly and without torch."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file, save_model
from torch import nn

from lading.checkpoint.locate import open_catalog
from lading.cli import main
from lading.errors import CheckpointError


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    tensors = {"layer.weight": torch.randn(3, 5), "layer.bias": torch.zeros(3, dtype=torch.bfloat16)}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text('{"tie_word_embeddings": true}')
    return tmp_path


def inspected(capsys, *arguments):
    assert main(["inspect", "--json", *map(str, arguments)]) == 0
    return json.loads(capsys.readouterr().out)


def test_inspect_directory_lists_every_tensor(folder, capsys):
    facts = inspected(capsys, folder)
    assert facts["num_tensors"] == 2
    assert facts["num_bytes"] == 3 * 5 * 4 + 3 * 2
    assert facts["dtypes"] == {"F32": 60, "BF16": 6}
    assert facts["tie_word_embeddings"] is True
    by_name = {tensor["name"]: tensor for tensor in facts["tensors"]}
    assert by_name["layer.weight"]["shape"] == [3, 5]
    assert by_name["layer.weight"]["shard"] == "model.safetensors"
    (shard,) = facts["shards"]
    assert shard["file_bytes"] == (folder / "model.safetensors").stat().st_size
    assert shard["metadata"] == {"format": "pt"}


def test_inspect_as_table_names_tensors_and_sizes(folder, capsys):
    assert main(["inspect", str(folder)]) == 0
    table = capsys.readouterr().out
    assert "2 tensors, 66 B in 1 shard" in table
    assert "tie_word_embeddings in config.json: true" in table
    assert "3×5" in table


def test_inspect_safetensors_aliases_shows_the_tie(tmp_path, capsys):
    save_model(Tied(), str(tmp_path / "tied.safetensors"))
    (tie,) = inspected(capsys, tmp_path / "tied.safetensors")["ties"]
    assert sorted(tie) == ["embed.weight", "head.weight"]


def test_inspect_pickled_shared_storage_shows_the_tie(tmp_path, capsys):
    torch.save(Tied().state_dict(), tmp_path / "pytorch_model.bin")
    facts = inspected(capsys, tmp_path)
    assert facts["ties"] == [["embed.weight", "head.weight"]]
    assert facts["num_bytes"] == 7 * 4 * 4


def test_inspect_verify_hashes_the_file_and_finds_equal_tensors(tmp_path, capsys):
    twin = torch.randn(4, 4)
    save_file({"a": twin, "b": twin.clone(), "c": torch.randn(4, 4)}, tmp_path / "model.safetensors")
    verified = inspected(capsys, tmp_path, "--verify")["verified"]
    data = (tmp_path / "model.safetensors").read_bytes()
    assert verified == {
        "num_bytes": len(data),
        "sha256": {"model.safetensors": hashlib.sha256(data).hexdigest()},
        "equal": [["a", "b"]],
    }


def test_inspect_verify_damaged_archive_is_refused(tmp_path, capsys):
    path = tmp_path / "pytorch_model.bin"
    torch.save({"weight": torch.ones(1000)}, path)
    data = bytearray(path.read_bytes())
    data[data.index(torch.ones(1000).numpy().tobytes()) + 7] ^= 1
    path.write_bytes(data)
    assert main(["inspect", str(path)]) == 0
    assert main(["inspect", str(path), "--verify"]) == 1
    error = capsys.readouterr().err
    assert "CRC-32" in error
    assert "pytorch_model.bin" in error


def test_inspect_verify_blob_that_is_not_its_name_is_refused(tmp_path, capsys):
    blob = tmp_path / "blobs" / ("0" * 64)
    blob.parent.mkdir()
    save_file({"weight": torch.ones(3)}, blob)
    (tmp_path / "model.safetensors").symlink_to(blob)
    assert main(["inspect", str(tmp_path), "--verify"]) == 1
    assert f"expected {'0' * 64}" in capsys.readouterr().err


def test_inspect_nothing_there_says_so_and_exits_with_1(tmp_path, capsys):
    assert main(["inspect", str(tmp_path / "absent")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("lading inspect: ")
    assert "neither a file nor a directory" in error


SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


@pytest.fixture
def sharded(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / SHARDS[0])
    save_file({"b": torch.ones(3)}, tmp_path / SHARDS[1])
    index(tmp_path, {"a": SHARDS[0], "b": SHARDS[1]})
    return tmp_path


def index(folder, weight_map):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def found_fault(capsys, *arguments):
    """Give the facts, and what is said on standard error, of a checkpoint with something wrong."""
    code = main(["inspect", "--json", *map(str, arguments)])
    said = capsys.readouterr()
    facts = json.loads(said.out)
    assert code == bool(facts["faults"]), "what lading.load gets along with is no failure"
    return facts, said.err


def damage(folder, kind):
    if kind == "missing":
        (folder / SHARDS[1]).unlink()
    elif kind == "dangling":
        (folder / SHARDS[1]).unlink()
        (folder / SHARDS[1]).symlink_to("gone")
    elif kind == "corrupt":
        (folder / SHARDS[1]).write_bytes((folder / SHARDS[1]).read_bytes()[:-1])
    elif kind == "another format":
        (folder / SHARDS[1]).write_bytes(b"GGUF" + bytes(100))


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("missing", "found 1 of its 2 shards; missing are 'model-00002-of-00002.safetensors'"),
        ("dangling", "a link to gone, which is not there"),
        ("corrupt", "a truncated file of"),
        ("another format", "found GGUF, the format of llama.cpp"),
    ],
)
def test_inspect_with_one_bad_shard_lists_the_others_then_the_fault(sharded, capsys, kind, says):
    damage(sharded, kind)
    facts, said = found_fault(capsys, sharded)
    assert [tensor["name"] for tensor in facts["tensors"]] == ["a"]
    assert [shard["name"] for shard in facts["shards"]] == SHARDS[:1]
    (fault,) = facts["faults"]
    assert says in fault
    assert facts["notes"] == []
    assert said == f"lading inspect: {fault}\n"
    assert main(["inspect", str(sharded)]) == 1
    shown = capsys.readouterr()
    assert "1 tensors, 8 B in 1 shard" in shown.out
    assert shown.err == said


def test_inspect_with_two_bad_shards_says_both(sharded, capsys):
    damage(sharded, "corrupt")
    (sharded / SHARDS[0]).unlink()
    facts, _ = found_fault(capsys, sharded)
    assert facts["tensors"] == []
    assert len(facts["faults"]) == 2


def test_inspect_of_an_index_that_names_too_much_lists_every_tensor_and_says_so(sharded, capsys):
    index(sharded, {"a": SHARDS[1], "b": SHARDS[1], "stale": SHARDS[1]})
    facts, _ = found_fault(capsys, sharded)
    assert [tensor["name"] for tensor in facts["tensors"]] == ["b"]
    index(sharded, {"a": SHARDS[0], "b": SHARDS[1], "stale": SHARDS[1]})
    facts, said = found_fault(capsys, sharded)
    assert [tensor["name"] for tensor in facts["tensors"]] == ["a", "b"]
    assert (facts["num_tensors"], facts["num_bytes"], facts["faults"]) == (2, 20, [])
    assert "no data for 'stale'" in said


@pytest.mark.parametrize("is_same", [True, False])
def test_inspect_of_a_name_in_two_shards_lists_it_once_and_says_so(sharded, capsys, is_same):
    save_file({"a": torch.full((2,), 1.0 if is_same else 2.0), "b": torch.ones(3)}, sharded / SHARDS[1])
    facts, said = found_fault(capsys, sharded)
    assert [(tensor["name"], tensor["shard"]) for tensor in facts["tensors"]] == [("a", SHARDS[0]), ("b", SHARDS[1])]
    assert facts["num_bytes"] == 20
    assert [len(facts["notes"]), len(facts["faults"])] == ([1, 0] if is_same else [0, 1])
    assert str(sharded / SHARDS[0]) in said
    assert str(sharded / SHARDS[1]) in said


def test_inspect_verify_of_damage_lists_the_tensors_then_the_damage(tmp_path, capsys):
    path = tmp_path / "model.bin"
    torch.save({"weight": torch.ones(1000)}, path)
    data = bytearray(path.read_bytes())
    data[data.index(torch.ones(1000).numpy().tobytes()) + 7] ^= 1
    path.write_bytes(data)
    facts, _ = found_fault(capsys, path, "--verify")
    assert [tensor["name"] for tensor in facts["tensors"]] == ["weight"]
    assert "verified" not in facts
    assert "CRC-32" in facts["faults"][0]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("config.json", b'{"model_type": "llama"}', "found a model's configuration (model_type 'llama')"),
        ("adapter_config.json", b'{"peft_type": "LORA"}', "found an adapter's configuration"),
        ("model.gguf", b"GGUF" + bytes(100), "found GGUF, the format of llama.cpp"),
        ("absent", None, "found neither a file nor a directory"),
        ("model.safetensors", b"x", "found a text that begins 'x'"),
    ],
)
def test_inspect_of_what_is_no_checkpoint_says_what_it_is(tmp_path, capsys, name, content, says):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    facts, said = found_fault(capsys, tmp_path / name)
    assert (facts["num_tensors"], facts["tensors"], facts["shards"]) == (0, [], [])
    assert says in facts["faults"][0]
    assert main(["inspect", str(tmp_path / name)]) == 1
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("", said)


def test_inspect_of_shards_in_folders_shows_where_each_tensor_stands(tmp_path, capsys):
    for folder, name in (("one", "a"), ("two", "b")):
        (tmp_path / folder).mkdir()
        save_file({name: torch.ones(2)}, tmp_path / folder / "part.safetensors")
    index(tmp_path, {"a": "one/part.safetensors", "b": "two/part.safetensors"})
    (tmp_path / "config.json").write_text('{"tie_word_embeddings": false}')
    facts = inspected(capsys, tmp_path, "--verify")
    assert [tensor["shard"] for tensor in facts["tensors"]] == ["one/part.safetensors", "two/part.safetensors"]
    assert sorted(facts["verified"]["sha256"]) == ["one/part.safetensors", "two/part.safetensors"]
    assert (facts["directory"], facts["tie_word_embeddings"]) == (str(tmp_path), False)
    assert facts["verified"]["equal"] == [["a", "b"]]


def test_inspect_lists_element_types_that_torch_has_not(tmp_path, capsys):
    header = {
        "six": {"dtype": "F6_E2M3", "shape": [4], "data_offsets": [0, 3]},
        "four": {"dtype": "F4", "shape": [2, 3], "data_offsets": [3, 6]},
    }
    text = json.dumps(header).encode()
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(6))
    assert inspected(capsys, tmp_path)["dtypes"] == {"F6_E2M3": 3, "F4": 3}
    assert main(["inspect", str(tmp_path)]) == 0
    assert "six   F6_E2M3        3 B  4" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["--inner-key", "state_dict"]])
def test_inspect_of_a_training_checkpoint_asks_for_the_inner_key(tmp_path, capsys, arguments):
    path = tmp_path / "last.ckpt"
    torch.save({"state_dict": {"a": torch.ones(2)}, "hyper_parameters": Tied()}, path)
    if arguments:
        assert [tensor["name"] for tensor in inspected(capsys, path, *arguments)["tensors"]] == ["a"]
    else:
        _, said = found_fault(capsys, path)
        assert "names test_inspect.Tied, which lading never runs" in said
        assert "pass inner_key='state_dict' to lading.load_into, or --inner-key to lading inspect" in said


HOSTILE_NAMES = [
    "\x1b[2J\x1b[31mred",
    "a\nb\rc",
    "\u202egnp.exe",
    "\u2066iso",
    "bell\x07\x08",
    "c1\x9b31m",
    "del\x7f",
    "zero\u200b",
]


def test_inspect_shows_names_and_metadata_without_what_a_terminal_would_obey(tmp_path, capsys):
    tensors = {name: torch.ones(1) for name in HOSTILE_NAMES}
    save_file(
        tensors, tmp_path / "model.safetensors", metadata={"tied\x1b]0;title\x07": HOSTILE_NAMES[0], "x\x7f": "\x1b"}
    )
    for arguments in ([], ["--verify"], ["--json"], ["--json", "--verify"]):
        assert main(["inspect", str(tmp_path), *arguments]) == 0
        shown = capsys.readouterr()
        assert shown.err == ""
        assert all(line.isprintable() for line in shown.out.split("\n"))
    table = inspected(capsys, tmp_path)
    assert {tensor["name"] for tensor in table["tensors"]} == set(HOSTILE_NAMES)
    assert main(["inspect", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert r"\x1b[2J\x1b[31mred = tied\x1b]0;title\x07" in out
    assert r"\u202egnp.exe" in out


@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_inspect_faults_show_names_without_what_a_terminal_would_obey(tmp_path, capsys, name):
    folder = tmp_path / name
    folder.mkdir()
    save_file({name: torch.ones(1)}, folder / SHARDS[0])
    save_file({name: torch.zeros(1)}, folder / SHARDS[1])
    index(folder, {name: SHARDS[0], f"{name}?": SHARDS[1], f"{name}!": f"{name}.safetensors"})
    facts, said = found_fault(capsys, folder)
    assert len(facts["faults"]) == 2
    assert len(facts["notes"]) == 1
    assert all(line.isprintable() for line in said.split("\n"))
    with pytest.raises(CheckpointError) as caught:
        open_catalog(folder)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("arguments", [[], ["--verify", "--json"]])
def test_inspect_imports_neither_torch_nor_transformers(folder, arguments):
    code = (
        "import sys; from lading.cli import main; code = main(sys.argv[1:]); "
        "heavy = {'torch', 'transformers', 'numpy'} & set(sys.modules); sys.exit(str(heavy) if heavy else code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "inspect", str(folder), *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "layer.weight" in done.stdout
