from __future__ import annotations

import io
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lading.embed.corpus import Corpus
from lading.errors import EmbedError


def read(path, **facts):
    return [(record.id, record.text) for record in Corpus(paths=(str(path),), **facts).records()]


@pytest.fixture
def write(tmp_path):
    def write(name, content):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def test_lines_of_a_text_file_are_named_by_file_and_line(write):
    path = write("a.txt", "tea\r\n\n  \n silk ")
    assert read(path) == [("a.txt:1", "tea"), ("a.txt:4", " silk ")]


def test_paragraphs_are_named_by_their_first_line(write):
    path = write("a.txt", "\n\nTea is\na cargo.\n\n \nSilk too.\n")
    assert read(path, split="paragraph") == [("a.txt:3", "Tea is\na cargo."), ("a.txt:7", "Silk too.")]


def test_whole_files_are_one_text(write):
    assert read(write("a.txt", "\ntea\n\nsilk\n"), split="file") == [("a.txt:1", "\ntea\n\nsilk")]
    assert read(write("b.txt", " \n\n"), split="file") == []


def test_byte_order_mark_is_no_part_of_the_text(write):
    assert read(write("a.txt", b"\xef\xbb\xbftea\n")) == [("a.txt:1", "tea")]


@given(st.lists(st.text(st.characters(blacklist_categories=("Cs",), blacklist_characters="\n\r"), min_size=1)))
def test_jsonl_any_texts_come_back_as_they_were(tmp_path_factory, texts):
    path = tmp_path_factory.mktemp("jsonl") / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    assert [text for _, text in read(path)] == texts


def test_jsonl_fields_give_text_id_and_what_is_kept(write):
    path = write("a.jsonl", '{"body": "tea", "n": 5, "lang": "en", "other": 1}\n\n')
    (record,) = Corpus(paths=(str(path),), text_field="body", id_field="n", kept_fields=("lang",)).records()
    assert (record.id, record.text, dict(record.fields)) == ("5", "tea", {"lang": "en"})


def test_jsonl_empty_text_is_kept(write):
    assert read(write("a.jsonl", '{"text": ""}\n')) == [("a.jsonl:1", "")]


def test_files_of_one_name_are_told_apart_by_their_paths(write, monkeypatch, tmp_path):
    write("x/readme.txt", "tea")
    write("y/readme.txt", "silk")
    monkeypatch.chdir(tmp_path)
    records = list(Corpus(paths=("x/readme.txt", "y/readme.txt")).records())
    assert [record.id for record in records] == ["x/readme.txt:1", "y/readme.txt:1"]


def test_standard_input_is_read_as_lines_or_as_json(monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"tea\nsilk\n")))
    assert read("-") == [("stdin:1", "tea"), ("stdin:2", "silk")]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b'{"t": "tea"}\n')))
    assert read("-", text_field="t") == [("stdin:1", "tea")]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{'text': 1}", r"a.jsonl:2: found \"\{'text': 1\}\" \(Expecting .*expected one JSON object"),
        ("[1]", "a.jsonl:2: found a list · expected one JSON object"),
        ("[" * 100_000, "a.jsonl:2: found .*recursion"),
        ('{"id": "b"}', "a.jsonl:2: found the fields 'id' · expected 'text' too"),
        ('{"id": "b", "text": null}', "a.jsonl:2: found null in field 'text' · expected a string"),
        ('{"id": true, "text": ""}', "a.jsonl:2: found a boolean in the id field 'id'"),
        ('{"id": "a", "text": ""}', "a.jsonl: found the id 'a' a second time"),
        ('{"id": "b", "text": "\\ud800"}', "a.jsonl:2: .*surrogates not allowed"),
        (b'{"id": "b", "text": "\xff"}', "a.jsonl:2: found byte 0xff at 21 · expected UTF-8"),
    ],
)
def test_jsonl_bad_line_is_refused_by_file_and_line(write, line, message):
    content = line if isinstance(line, bytes) else line.encode()
    path = write("a.jsonl", b'{"id": "a", "text": "tea"}\n' + content + b"\n")
    records = Corpus(paths=(str(path),), id_field="id").records()
    assert next(records).text == "tea"
    with pytest.raises(EmbedError, match=message):
        next(records)


def test_text_file_that_is_not_utf8_is_refused_by_line(write):
    with pytest.raises(EmbedError, match=r"a.txt:2: found byte 0xe9 at 3 · expected UTF-8 · convert"):
        read(write("a.txt", b"tea\ncaf\xe9\n"))


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"paths": ("nowhere.txt",)}, "nowhere.txt: found nothing"),
        ({"paths": (".",)}, r"\.: found a directory"),
        ({"paths": ("-", "-")}, "found '-' more than once"),
        ({"split": "word"}, "split: found 'word'"),
        ({"kept_fields": ("lang",)}, "'-': found plain text with an id field or fields to keep"),
    ],
)
def test_corpus_that_cannot_be_read_is_refused_at_once(facts, message):
    with pytest.raises(EmbedError, match=message):
        Corpus(**facts)
