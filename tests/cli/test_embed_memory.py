"""``lading embed --memory``: the vectors of the resident model, from less memory than its weights take."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import lading
from lading.cli import main

pytestmark = [pytest.mark.needs("lance"), pytest.mark.filterwarnings("ignore::lading.PlanWarning")]


@pytest.fixture
def texts(tmp_path) -> Path:
    path = tmp_path / "texts.txt"
    path.write_text("\n".join(f"Bale {number} of wool, weighed twice." for number in range(40)), encoding="utf-8")
    return path


def test_embed_in_little_memory_gives_the_same_vectors(model, texts, tmp_path, capsys):
    wide, narrow = tmp_path / "wide.lance", tmp_path / "narrow.lance"
    assert main(["embed", "--model", str(model), "--out", str(wide), str(texts)]) == 0
    capsys.readouterr()
    arguments = ["--model", str(model), "--out", str(narrow), "--memory", "cpu=64MiB", "--json", str(texts)]
    assert main(["embed", *arguments]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["residency"]["fetches"] > 0
    assert summary["residency"]["peak_bytes"] <= summary["residency"]["capacity_bytes"] < 64 << 20
    query = lading.Embedder(model).encode("wool")
    found = [[(hit.id, hit.score) for hit in lading.VectorStore(path).search(query, k=10)] for path in (wide, narrow)]
    assert found[0] == found[1]


def test_embed_without_room_says_how_many_bytes_are_missing(model, texts, tmp_path, capsys):
    arguments = ["--model", str(model), "--out", str(tmp_path / "s.lance"), "--memory", "cpu=8MiB", str(texts)]
    assert main(["embed", *arguments]) != 0
    assert "bytes" in capsys.readouterr().err


def test_an_embedder_of_a_loaded_module_is_placed_by_its_loader(model):
    with pytest.raises(lading.EmbedError, match=r"max_memory and a loaded module .* call lading\.offload"):
        lading.Embedder(lading.load(model), max_memory={"cpu": "64MiB"})
