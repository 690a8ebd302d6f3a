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

from lading.cli import main


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
