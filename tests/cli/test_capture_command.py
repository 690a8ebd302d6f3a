"""``lading capture``: for each text what chosen modules give, in a store."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

import lading
from lading.cli import main

pytestmark = [pytest.mark.needs("lance"), pytest.mark.filterwarnings("ignore::lading.PlanWarning")]
TEXTS = ("The crew was paid.", "Forty bales of wool were weighed, twice, before the tide.", "No.")


@pytest.fixture
def texts(tmp_path) -> Path:
    path = tmp_path / "texts.txt"
    path.write_text("\n".join(TEXTS), encoding="utf-8")
    return path


def stored(path: Path) -> torch.Tensor:
    import lance

    table = lance.dataset(str(path)).to_table(columns=["text", "vector"])
    rows = dict(zip(table["text"].to_pylist(), table["vector"].to_pylist(), strict=True))
    return torch.tensor([rows[text] for text in TEXTS])


def expected(model: Path, layers: list[int], tokens: str) -> torch.Tensor:
    module, tokenizer = lading.load(model), AutoTokenizer.from_pretrained(model)
    vectors = []
    for text in TEXTS:
        with torch.no_grad():
            states = module(**tokenizer(text, return_tensors="pt"), output_hidden_states=True).hidden_states
        kept = [states[layer + 1][0] for layer in layers]
        vectors.append(torch.cat([each[-1] if tokens == "last" else each.mean(dim=0) for each in kept]))
    return torch.stack(vectors)


@pytest.mark.parametrize("tokens", ["last", "mean"])
def test_capture_stores_what_the_sites_give(model, texts, tmp_path, capsys, tokens):
    out = tmp_path / "states.lance"
    arguments = [str(model), str(texts), "--sites", "encoder.layer.{1,-1}", "--tokens", tokens, "--out", str(out)]
    assert main(["capture", *arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["dimension"] == 2 * 384
    assert torch.allclose(stored(out), expected(model, [1, 5], tokens), atol=1e-5)


def test_capture_from_a_model_in_little_memory_stores_the_same(model, texts, tmp_path, capsys):
    vectors = []
    for number, memory in enumerate(([], ["--memory", "cpu=64MiB"])):
        out = tmp_path / f"{number}.lance"
        assert main(["capture", str(model), str(texts), "--sites", "encoder.layer.3", "--out", str(out), *memory]) == 0
        vectors.append(stored(out))
    assert torch.equal(*vectors)
    assert "weights in cpu=64MiB: fetched" in capsys.readouterr().out


def test_capture_of_an_unknown_site_lists_the_nearest_and_reads_nothing(model, texts, tmp_path, capsys):
    out = tmp_path / "states.lance"
    assert main(["capture", str(model), str(texts), "--sites", "encoder.layers.3", "--out", str(out)]) == 1
    assert "expected a name such as 'encoder.layer.3" in capsys.readouterr().err
    assert not out.exists()
