"""The two commands of the first main job, run in this process through the real command line."""

from __future__ import annotations

import fcntl
import io
import json
import os
import pty
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

import lading
from lading.cli import main
from lading.embed.store import VectorStore

lance = pytest.importorskip("lance")
WORDS = [
    "[PAD]",
    "[UNK]",
    "a",
    "cargo",
    "ship",
    "sails",
    "the",
    "of",
    "and",
    "rope",
    "tea",
    "silk",
    "port",
    "night",
    "query",
    ":",
]


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """A random BERT of 16 dimensions with a tokenizer of a few words and two prompts."""
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny") / "model"
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=len(WORDS), max_position_embeddings=32, **sizes)).save_pretrained(folder)
    inner = Tokenizer(models.WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]")
    tokenizer.save_pretrained(folder)
    prompts = {"prompts": {"query": "query : ", "doc": "the "}}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    return folder


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Run a command in an empty directory; give its exit code and what it printed."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments, stdin=b""):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


@pytest.fixture
def embedded(run, tiny_model):
    """A store of three texts."""
    Path("a.txt").write_text("tea and silk\nthe cargo ship sails\nrope\n")
    assert run("embed", "--model", tiny_model, "--out", "a.lance", "a.txt")[0] == 0
    return Path("a.lance")


def test_embed_minilm_stores_the_vectors_of_encode(run, minilm_path):
    texts = ["a cargo ship", "tea " * 300, "silk", "thé 茶"]
    Path("a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    code, out, err = run("embed", "--model", minilm_path, "--out", "a.lance", "a.jsonl", "--batch-tokens", 64)
    assert (code, err) == (0, "")
    assert "4 texts, " in out
    assert "384 dimensions" in out
    table = lance.dataset("a.lance").to_table()
    assert table["id"].to_pylist() == [f"a.jsonl:{n}" for n in (1, 2, 3, 4)]
    vectors = torch.tensor(table["vector"].to_pylist())
    torch.testing.assert_close(vectors, lading.Embedder(minilm_path).encode(texts), rtol=0, atol=1e-6)
    code, out, _ = run("search", "a.lance", "a boat that carries goods", "--k", 1, "--json")
    assert json.loads(out)[0]["text"] == "a cargo ship"


def test_embed_json_summary_says_what_was_done(run, tiny_model):
    Path("a.txt").write_text("tea\nsilk rope\n")
    code, out, _ = run("embed", "--model", tiny_model, "--out", "a.lance", "--json", "a.txt")
    summary = json.loads(out)
    assert code == 0
    assert (summary["texts"], summary["tokens"], summary["dimension"]) == (2, 3, 16)
    assert summary["tokens_per_s"] > 0
    assert summary["peak_memory_bytes"] > 2**20


def test_embed_standard_input_is_read_where_no_file_is_named(run, tiny_model):
    assert run("embed", "--model", tiny_model, "--out", "a.lance", stdin=b"tea\nsilk\n")[0] == 0
    assert run("embed", "--model", tiny_model, "--out", "b.lance", "-", stdin=b"tea\n")[0] == 0
    assert (len(VectorStore("a.lance")), len(VectorStore("b.lance"))) == (2, 1)


def test_embed_json_lines_keep_fields_and_ids(run, tiny_model):
    Path("a.json").write_text('{"body": "tea", "key": "k1", "lang": "en", "year": 1650}\n')
    arguments = ["--text-field", "body", "--id-field", "key", "--keep", "lang", "--keep", "year"]
    assert run("embed", "--model", tiny_model, "--out", "a.lance", "a.json", *arguments)[0] == 0
    _, out, _ = run("search", "a.lance", "tea", "--json")
    (hit,) = json.loads(out)
    assert (hit["id"], hit["text"], hit["fields"]) == ("k1", "tea", {"lang": "en", "year": 1650})
    assert "1. k1 · " in run("search", "a.lance", "tea")[1]
    assert "lang: en · year: 1650" in run("search", "a.lance", "tea")[1]


def test_embed_each_window_is_one_commit_and_a_bad_line_keeps_those_before(run, tiny_model):
    lines = [json.dumps({"text": f"tea {n}"}) for n in range(5)]
    Path("a.jsonl").write_text("\n".join([*lines, "{", ""]))
    code, out, err = run("embed", "--model", tiny_model, "--out", "a.lance", "--window-rows", 2, "a.jsonl")
    assert (code, out) == (1, "")
    assert "a.jsonl:6: found '{'" in err
    assert "4 texts were committed to a.lance before this and stay readable" in err
    assert len(VectorStore("a.lance")) == 4


def test_embed_onto_something_that_exists_is_refused_before_the_model_is_loaded(run, embedded):
    code, _, err = run("embed", "--model", "nowhere", "--out", embedded, "a.txt")
    assert code == 1
    assert "a.lance: found 3 rows already there · expected a new path · choose another --out, or remove this one" in err
    Path("b.lance").write_text("")
    assert "b.lance: found something already there" in run("embed", "--model", "x", "--out", "b.lance", "a.txt")[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.txt"], "nowhere.txt: found nothing · expected a text or JSONL file"),
        (["a.txt", "--keep", "lang"], "'a.txt': found plain text with an id field or fields to keep"),
        (["a.txt", "--window-rows", "0"], "window_rows: found 0"),
        (["empty.txt"], "empty.txt: found no text"),
        (
            ["a.txt", "--prompt-name", "title"],
            "prompt_name: found 'title' · expected one of the model's prompts: 'query'",
        ),
    ],
)
def test_embed_wrong_arguments_are_refused_with_a_way_out(run, tiny_model, arguments, message):
    Path("a.txt").write_text("tea\n")
    Path("empty.txt").write_text("\n\n")
    code, _, err = run("embed", "--model", tiny_model, "--out", "a.lance", *arguments)
    assert code == 1
    assert message in err
    assert not Path("a.lance").exists()


def test_embed_keep_that_swallows_a_file_is_wrong_usage(run, tiny_model, capsys):
    Path("a.jsonl").write_text('{"text": "tea"}\n')
    with pytest.raises(SystemExit, match="2"):
        run("embed", "--model", tiny_model, "--out", "a.lance", "--keep", "lang", "a.jsonl")
    assert "--keep took 'a.jsonl', which is a file: name the texts before --keep" in capsys.readouterr().err


def test_embed_prompt_name_is_recorded_in_the_store(run, tiny_model):
    Path("a.txt").write_text("tea\n")
    assert run("embed", "--model", tiny_model, "--out", "a.lance", "--prompt-name", "doc", "a.txt")[0] == 0
    source = VectorStore("a.lance").source
    assert (source.prompt, source.pooling, source.model) == ("the ", "mean", str(tiny_model))


def test_embed_progress_bar_is_drawn_on_a_terminal_only(tiny_model, tmp_path):
    (tmp_path / "a.txt").write_text("tea\n")
    source_root = Path(lading.__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": str(source_root), "OMP_NUM_THREADS": "1"}
    script = "import sys; from lading.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", script, "embed", "--model", str(tiny_model), "--out", "a.lance", "a.txt"]
    terminal, process_end = pty.openpty()
    fcntl.ioctl(process_end, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
    with os.fdopen(terminal, "rb", buffering=0) as reader:
        process = subprocess.Popen(
            command, cwd=tmp_path, env=environment, stderr=process_end, stdout=subprocess.DEVNULL
        )
        os.close(process_end)
        drawn = b""
        try:
            while part := reader.read(4096):
                drawn += part
        except OSError:
            pass  # the other end was closed: how a pseudo-terminal says that it is done
        assert process.wait() == 0
    assert b"embedding: 1 texts" in drawn


def test_search_prints_the_nearest_texts_in_order(run, embedded):
    code, out, err = run(
        "search", embedded, "the cargo ship sails", "--k", 2, "--model", VectorStore(embedded).source.model
    )
    assert (code, err) == (0, "")
    first, text, second, _ = out.splitlines()
    assert first.startswith(("1. a.txt:", "1. "))
    assert text.startswith("   ")
    assert second.startswith("2. a.txt:")


def test_search_uses_the_query_prompt_where_the_model_has_one(run, embedded, tiny_model):
    expected = lading.Embedder(tiny_model).encode("tea", prompt_name="query")
    scores = [hit.score for hit in VectorStore(embedded).search(expected)]
    _, out, _ = run("search", embedded, "tea", "--json")
    assert [hit["score"] for hit in json.loads(out)] == pytest.approx(scores)
    _, out, _ = run("search", embedded, "tea", "--json", "--prompt-name", "doc")
    assert [hit["score"] for hit in json.loads(out)] != pytest.approx(scores)


def test_search_without_a_store_or_its_model_is_refused(run, tiny_model, embedded, tmp_path):
    code, _, err = run("search", "nowhere.lance", "tea")
    assert code == 1
    assert "nowhere.lance: found nothing · expected a vector store" in err
    moved = tmp_path / "moved"
    moved.symlink_to(tiny_model)
    Path("b.txt").write_text("tea\n")
    copied = tmp_path / "copy"
    copied.mkdir()
    for file in tiny_model.iterdir():
        (copied / file.name).write_bytes(file.read_bytes())
    assert run("embed", "--model", copied, "--out", "b.lance", "b.txt")[0] == 0
    copied.rename(tmp_path / "gone")
    code, _, err = run("search", "b.lance", "tea")
    assert code == 1
    assert "which is no longer there · expected the model that made the vectors · name it: --model" in err
    assert run("search", "b.lance", "tea", "--model", tmp_path / "gone")[0] == 0


def test_search_with_a_model_that_pools_otherwise_is_refused(run, embedded, tiny_model, tmp_path):
    other = tmp_path / "other"
    (other / "1_Pooling").mkdir(parents=True)
    for file in tiny_model.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    (other / "1_Pooling/config.json").write_text('{"pooling_mode": "cls"}')
    modules = [{"type": "sentence_transformers.models.Transformer", "path": ""}]
    modules += [{"type": "sentence_transformers.models.Pooling", "path": "1_Pooling"}]
    (other / "modules.json").write_text(json.dumps(modules))
    code, _, err = run("search", embedded, "tea", "--model", other)
    assert code == 1
    assert "a.lance: found a model with pooling 'cls' (expected 'mean')" in err
