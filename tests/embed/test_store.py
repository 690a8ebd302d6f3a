from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from lading.embed.rows import Row, VectorSource
from lading.embed.store import VectorStore
from lading.errors import LadingError, MissingExtraError, StoreError

lance = pytest.importorskip("lance")

SOURCE = VectorSource(model="boat", pooling="mean", dtype="float32")


def rows(count, *, dimension=4, source=SOURCE, dtype=torch.float32, start=0, **fields):
    for n in range(start, start + count):
        vector = torch.nn.functional.one_hot(torch.tensor(n % dimension), dimension).to(dtype)
        yield Row(id=f"r{n}", text=f"text {n}", vector=vector, source=source, fields=fields)


@pytest.fixture
def store(tmp_path):
    return VectorStore(tmp_path / "a.lance")


def test_extend_commits_each_window_at_once(store):
    assert len(store) == 0
    assert store.extend(rows(10), window_rows=4) == 10
    assert len(store) == 10
    dataset = lance.dataset(str(store.path))
    assert [dataset.checkout_version(n).count_rows() for n in (1, 2, 3)] == [4, 8, 10]
    assert dataset.schema.names == ["id", "text", "vector"]


def test_extend_iterator_that_raises_keeps_the_windows_before(store):
    def failing():
        yield from rows(5)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.extend(failing(), window_rows=2)
    assert len(store) == 4
    assert store.extend(rows(1, start=4)) == 1


def test_extend_killed_process_leaves_committed_windows_readable(tmp_path):
    script = """
        import os, sys, torch
        from lading.embed.rows import Row, VectorSource
        from lading.embed.store import VectorStore
        def rows():
            for n in range(7):
                yield Row(text=str(n), vector=torch.ones(2), source=VectorSource())
            os.kill(os.getpid(), 9)
        VectorStore(sys.argv[1]).extend(rows(), window_rows=3)
    """
    path = tmp_path / "killed.lance"
    source_root = str(Path(sys.modules["lading.embed"].__file__).parents[2])
    environment = os.environ | {"PYTHONPATH": source_root, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", textwrap.dedent(script), str(path)]
    assert subprocess.run(command, env=environment, check=False).returncode == -9
    assert [hit.id for hit in VectorStore(path).search(torch.ones(2), k=10)] == ["0", "1", "2", "3", "4", "5"]


def test_search_vector_gives_the_nearest_first(store):
    store.extend(rows(4, lang="en"))
    hits = store.search(torch.tensor([0.0, 2.0, 1.0, 0.0]), k=2)
    assert [(hit.id, hit.text, hit.fields) for hit in hits] == [
        ("r1", "text 1", {"lang": "en"}),
        ("r2", "text 2", {"lang": "en"}),
    ]
    assert hits[0].score == pytest.approx(2 / 5**0.5, abs=1e-6)


def test_search_matrix_gives_hits_for_each_query(store):
    store.extend(rows(4))
    found = store.search(torch.eye(4).numpy(), k=1)
    assert [[hit.id for hit in hits] for hits in found] == [["r0"], ["r1"], ["r2"], ["r3"]]


@pytest.mark.parametrize(("similarity", "score"), [("dot", 3.0), ("euclidean", -2.0), ("cosine", 1.0)])
def test_search_scores_follow_the_stores_similarity(store, similarity, score):
    store.extend(rows(1, source=VectorSource(similarity=similarity)))
    (hit,) = store.search(torch.tensor([3.0, 0.0, 0.0, 0.0]))
    assert hit.score == pytest.approx(score, abs=1e-5)


def test_source_of_a_store_is_what_its_rows_said(store):
    store.extend(rows(1, source=VectorSource(model="été", pooling="cls+max", dtype="bfloat16", prompt="query: ")))
    assert store.source == VectorSource(model="été", pooling="cls+max", dtype="bfloat16", prompt="query: ")
    assert store.dimension == 4
    facts = lance.dataset(str(store.path)).schema.metadata
    assert facts[b"lading:format"] == b"1"
    assert facts[b"lading:version"]


@pytest.mark.parametrize(
    ("dtype", "stored"), [(torch.float16, "halffloat"), (torch.bfloat16, "float"), (torch.float64, "double")]
)
def test_extend_vectors_of_other_dtypes_are_stored_exactly(store, dtype, stored):
    vector = torch.tensor([1 / 3, -2 / 7], dtype=dtype)
    store.extend([Row(text="", vector=vector, source=SOURCE)])
    table = lance.dataset(str(store.path)).to_table()
    assert str(table.schema.field("vector").type.value_type) == stored
    assert table["vector"].to_pylist()[0] == vector.tolist()


def test_extend_rows_without_ids_are_named_by_row_number(store):
    bare = [Row(text="t", vector=torch.ones(2), source=SOURCE)] * 2
    store.extend(bare)
    store.extend(bare)
    assert sorted(hit.id for hit in store.search(torch.ones(2))) == ["0", "1", "2", "3"]


def test_extend_kept_values_of_any_kind_come_back(store):
    values = {
        "word": ["a", None],
        "count": [1, 2],
        "share": [1, 0.5],
        "flag": [True, None],
        "huge": [2**70, 1],
        "mixed": ["a", 1],
        "list": [[1], {"x": None}],
        "nothing": [None, None],
    }
    vectors = torch.eye(2)
    store.extend(
        Row(text="", vector=vectors[n], source=SOURCE, fields={name: pair[n] for name, pair in values.items()})
        for n in (0, 1)
    )
    for n in (0, 1):
        (hit,) = store.search(vectors[n], k=1)
        assert hit.fields == {name: pair[n] for name, pair in values.items()}
    types = {field.name: str(field.type) for field in lance.dataset(str(store.path)).schema}
    assert (types["word"], types["count"], types["share"], types["flag"]) == ("string", "int64", "double", "bool")


@pytest.mark.parametrize(
    ("others", "message"),
    [
        (rows(1, dimension=3), r"a vector of shape \[3\] in row 'r0' · expected \[4\]"),
        (
            rows(1, source=VectorSource(model="raft")),
            "row 'r0' made otherwise: model 'raft' .expected 'boat'.; pooling",
        ),
        (rows(1, dtype=torch.float16), "float16 vectors · expected float"),
        (rows(1, lang="en"), "the fields 'lang' · expected those of the first rows: 'size'"),
        (rows(1, size="big"), "str values in field 'size' after row 2 · expected int"),
    ],
)
def test_extend_rows_that_do_not_belong_are_refused(store, others, message):
    store.extend(rows(2, size=1))
    with pytest.raises(StoreError, match=message):
        store.extend(others)
    assert len(store) == 2


@pytest.mark.parametrize("name", ["vector", "_distance", "a.b", ""])
def test_extend_field_with_a_name_of_the_store_is_refused(store, name):
    row = Row(text="", vector=torch.ones(2), source=SOURCE, fields={name: 1})
    with pytest.raises(StoreError, match=f"kept fields: found '{name}'"):
        store.extend([row])
    assert not store.exists()


def test_extend_field_that_json_has_no_form_for_is_refused(store):
    row = Row(text="", vector=torch.ones(2), source=SOURCE, fields={"when": object()})
    with pytest.raises(StoreError, match="kept field 'when': found a value that JSON has no form for"):
        store.extend([row])


def test_search_query_of_another_width_is_refused(store):
    store.extend(rows(1))
    with pytest.raises(StoreError, match=r"a query of shape \[3\] · expected \[4\] or .* · embed it .*\(boat\)"):
        store.search(torch.ones(3))
    with pytest.raises(StoreError, match="k = 0"):
        store.search(torch.ones(4), k=0)


def test_open_path_that_is_no_store_is_refused(tmp_path):
    with pytest.raises(StoreError, match="found nothing · expected a vector store"):
        VectorStore(tmp_path / "nowhere").search(torch.ones(1))
    with pytest.raises(StoreError, match="no committed Lance dataset"):
        len(VectorStore(tmp_path))
    import pyarrow

    lance.write_dataset(pyarrow.table({"x": [1]}), str(tmp_path / "foreign"))
    with pytest.raises(StoreError, match="store format None · expected '1'"):
        VectorStore(tmp_path / "foreign").extend(rows(1))


def test_store_without_lance_names_the_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "lance", None)
    with pytest.raises(MissingExtraError, match=r"found no module 'lance' .* pip install 'lading\[store\]'") as caught:
        VectorStore(tmp_path)
    assert isinstance(caught.value, LadingError)
