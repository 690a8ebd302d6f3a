"""Keep texts and their vectors in a Lance dataset and find the nearest ones. The only file that imports ``lance``.

Knows no model. Guarantees: each window of rows is one atomic commit, so whatever was committed stays readable when a
run is interrupted or killed; rows of another origin or width than the store's are refused.

The format, version 1. A directory that Lance 1.0 or later reads, with these columns in this order:
``id`` utf8, not null · ``text`` utf8, not null · one column per kept field, in the order of the first row · ``vector``
fixed-size list of float16, float32 or float64, not null (bfloat16 is widened to float32). A kept field's type is set by
the first window: utf8, bool, int64 or float64 where all its values are so or null, else utf8 with field metadata
``lading:encoding = json`` and JSON in it. Schema metadata, all utf8: ``lading:format`` (``1``), ``lading:version`` (the
library that made the store), ``lading:model``, ``lading:pooling``, ``lading:dtype``, ``lading:prompt``,
``lading:similarity``, as in ``VectorSource``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lading.embed.batching import windows
from lading.embed.rows import Hit, Row, VectorSource
from lading.errors import MissingExtraError, StoreError, name_list, refusal

if TYPE_CHECKING:
    from torch import Tensor

_FORMAT = "1"
_OWN_COLUMNS = ("id", "text", "vector")
_LANCE_COLUMNS = ("_distance", "_score", "_rowid", "_rowaddr")
_SOURCE_FACTS = ("model", "sites", "pooling", "dtype", "prompt", "similarity")
_LANCE_METRICS = {"cosine": "cosine", "dot": "dot", "euclidean": "l2"}
_JSON_FIELD = {b"lading:encoding": b"json"}
_TYPE_OF_KIND = {"str": "string", "bool": "bool", "int": "int64", "float": "double"}
_KIND_OF_TYPE = {name: kind for kind, name in _TYPE_OF_KIND.items()}
_INT64_MAX = 2**63 - 1


class VectorStore:
    """Open, fill and search the vectors at a path; nothing is created before the first row.

    Holds nothing but the path: any number of threads and processes may search while one writes. Two writers at once
    would both succeed and both rows would stay.

    Example:
        >>> import tempfile, torch
        >>> tea = Row(text="tea", vector=torch.ones(2), source=VectorSource())
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     store = VectorStore(Path(folder, "cargo.lance"))
        ...     store.extend([tea])
        ...     store.search(torch.ones(2), k=1)[0].text
        1
        'tea'
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Name the store.

        Raises:
            MissingExtraError: ``pylance`` is not installed.
        """
        _import_lance()
        self.path = Path(path)

    def __len__(self) -> int:
        """Count the committed rows; 0 where there is no store yet."""
        return int(self._open().count_rows()) if self.exists() else 0

    def exists(self) -> bool:
        """Tell whether something stands at the path."""
        return self.path.exists()

    @property
    def source(self) -> VectorSource:
        """Read what made the vectors."""
        facts = _facts(self._open())
        return VectorSource(**{name: facts.get(name, "") for name in _SOURCE_FACTS})

    @property
    def dimension(self) -> int:
        """Read the vectors' width."""
        return int(self._open().schema.field("vector").type.list_size)

    def extend(self, rows: Iterable[Row], window_rows: int = 4096) -> int:
        """Append rows and return how many; every ``window_rows`` of them are one atomic commit.

        A row without an id is named by its row number in the store. Ids are not compared with those already there.
        When the iterable raises, the windows before are committed and the current one is not.

        Raises:
            StoreError: the path holds something else, or the rows differ from the store's in width, origin or fields;
                what was committed before stays.
        """
        num_added = 0
        for window in windows(rows, window_rows):
            self._commit(window)
            num_added += len(window)
        return num_added

    def search(self, query: Tensor | np.ndarray[Any, Any], k: int = 5) -> list[Hit] | list[list[Hit]]:
        """Find the ``k`` nearest texts, nearest first, by the store's similarity.

        A vector [dimension] gives one list of hits, a matrix [queries, dimension] a list of hits for each of its rows.

        Raises:
            StoreError: there is no store, or the query has another width.
        """
        if k < 1:
            raise _refused(self.path, f"k = {k}", "at least 1", "ask for one hit or more")
        queries = _to_numpy(query)
        if queries.ndim not in (1, 2) or queries.shape[-1] != self.dimension:
            raise _refused(
                self.path,
                f"a query of shape {list(queries.shape)}",
                f"[{self.dimension}] or [queries, {self.dimension}]",
                f"embed it with the store's own model ({self.source.model or 'unnamed'})",
            )
        if queries.ndim == 1:
            return self._nearest(queries, k)
        return [self._nearest(vector, k) for vector in queries]

    def _nearest(self, vector: np.ndarray[Any, Any], k: int) -> list[Hit]:
        dataset = self._open()
        similarity = self.source.similarity
        fields = [name for name in dataset.schema.names if name not in _OWN_COLUMNS]
        nearest = {"column": "vector", "q": vector, "k": k, "metric": _LANCE_METRICS[similarity]}
        table = dataset.to_table(columns=["id", "text", *fields, "_distance"], nearest=nearest)
        is_json = {name: dataset.schema.field(name).metadata == _JSON_FIELD for name in fields}
        hits = []
        for line in table.to_pylist():
            kept = {name: _from_column(line[name], is_json=is_json[name]) for name in fields}
            score = _score(line["_distance"], similarity)
            hits.append(Hit(id=line["id"], text=line["text"], score=score, fields=kept))
        return hits

    def _commit(self, rows: Sequence[Row]) -> None:
        lance, pyarrow = _import_lance()
        exists = self.exists()
        num_before = len(self)
        vectors = self._stack(rows, self.dimension if exists else len(rows[0].vector))
        source = rows[0].source
        self._check_sources(rows, self.source if exists else source)
        schema = self._open().schema if exists else _make_schema(pyarrow, rows, vectors, source)
        if exists and schema.field("vector").type.value_type != pyarrow.from_numpy_dtype(vectors.dtype):
            raise _refused(
                self.path,
                f"{vectors.dtype} vectors",
                f"{schema.field('vector').type.value_type}",
                "write them to another store",
            )
        strangers = {name for row in rows for name in row.fields} - set(schema.names)
        if strangers:
            known = name_list(name for name in schema.names if name not in _OWN_COLUMNS) or "none"
            way_out = "write them to another store, or leave these fields out"
            raise _refused(
                self.path, f"the fields {name_list(sorted(strangers))}", f"those of the first rows: {known}", way_out
            )
        columns = [self._column(pyarrow, field, rows, vectors, num_before) for field in schema]
        table = pyarrow.Table.from_arrays(columns, schema=schema)
        try:
            lance.write_dataset(table, os.fspath(self.path), mode="append" if exists else "create")
        except OSError as error:
            raise _refused(
                self.path,
                f"a failure to write {len(rows)} rows: {error}",
                f"room for them after the {num_before} committed rows, which stay",
                "make room or choose another place",
            ) from error

    def _stack(self, rows: Sequence[Row], dimension: int) -> np.ndarray[Any, Any]:
        for row in rows:
            if tuple(row.vector.shape) != (dimension,):
                raise _refused(
                    self.path,
                    f"a vector of shape {list(row.vector.shape)} in row {row.id!r}",
                    f"[{dimension}]",
                    "write the vectors of another model to another store",
                )
        return np.stack([_to_numpy(row.vector) for row in rows])

    def _check_sources(self, rows: Sequence[Row], expected: VectorSource) -> None:
        for row in rows:
            differences = [] if row.source is expected else row.source.differences(expected)
            if differences:
                raise _refused(
                    self.path,
                    f"row {row.id!r} made otherwise: {'; '.join(differences)}",
                    "rows that can be compared with those before",
                    "write them to another store",
                )

    def _column(
        self, pyarrow: Any, field: Any, rows: Sequence[Row], vectors: np.ndarray[Any, Any], num_before: int
    ) -> Any:
        if field.name == "vector":
            return pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(vectors.reshape(-1)), vectors.shape[1])
        if field.name == "text":
            return pyarrow.array([row.text for row in rows], field.type)
        if field.name == "id":
            return pyarrow.array([str(num_before + n) if row.id is None else row.id for n, row in enumerate(rows)])
        values = [row.fields.get(field.name) for row in rows]
        if field.metadata == _JSON_FIELD:
            return pyarrow.array([_to_json(field.name, value) for value in values], field.type)
        expected = _KIND_OF_TYPE[str(field.type)]
        found = _kind(values)
        if found not in (None, expected) and (found, expected) != ("int", "float"):
            raise _refused(
                self.path,
                f"{found} values in field {field.name!r} after row {num_before}",
                f"{expected} as in the first rows",
                "make all its values strings, or do not keep it",
            )
        if expected == "float":
            values = [None if value is None else float(value) for value in values]
        return pyarrow.array(values, field.type)

    def _open(self) -> Any:
        lance, _ = _import_lance()
        if not self.exists():
            raise _refused(self.path, "nothing", "a vector store", "write one with 'lading embed'")
        try:
            dataset = lance.dataset(os.fspath(self.path))
        except (ValueError, OSError) as error:
            raise _refused(
                self.path, "no committed Lance dataset", f"a vector store ({error})", "remove it or choose another path"
            ) from error
        found = _facts(dataset).get("format")
        if found != _FORMAT:
            raise _refused(
                self.path,
                f"a Lance dataset of store format {found!r}",
                f"{_FORMAT!r} as lading writes it",
                "choose another path, or read it with the lading that wrote it",
            )
        return dataset


def _facts(dataset: Any) -> dict[str, str]:
    stored = dataset.schema.metadata or {}
    return {key.decode().removeprefix("lading:"): value.decode() for key, value in stored.items()}


def _import_lance() -> tuple[Any, Any]:
    try:
        import lance
        import pyarrow
    except ImportError as error:
        raise MissingExtraError(
            refusal(
                "vector store",
                found=f"no module {error.name!r}",
                expected="pylance and pyarrow",
                way_out="install them with: pip install 'lading[store]'",
            )
        ) from error
    return lance, pyarrow


def _make_schema(pyarrow: Any, rows: Sequence[Row], vectors: np.ndarray[Any, Any], source: VectorSource) -> Any:
    names = list(dict.fromkeys(name for row in rows for name in row.fields))
    clashes = [name for name in names if name in _OWN_COLUMNS + _LANCE_COLUMNS or "." in name or not name]
    if clashes:
        raise _refused(
            "kept fields",
            f"{name_list(clashes)}",
            "names without a dot that are no columns of the store or of Lance",
            "rename the fields",
        )
    columns = [pyarrow.field("id", pyarrow.string(), nullable=False), pyarrow.field("text", pyarrow.string(), False)]
    for name in names:
        kind = _kind([row.fields.get(name) for row in rows])
        if kind is None or kind == "mixed":
            columns.append(pyarrow.field(name, pyarrow.string(), metadata=_JSON_FIELD))
        else:
            columns.append(pyarrow.field(name, pyarrow.type_for_alias(_TYPE_OF_KIND[kind])))
    vector_type = pyarrow.list_(pyarrow.from_numpy_dtype(vectors.dtype), vectors.shape[1])
    columns.append(pyarrow.field("vector", vector_type, nullable=False))
    facts = {name: getattr(source, name) for name in _SOURCE_FACTS} | {"format": _FORMAT, "version": _version()}
    return pyarrow.schema(columns, metadata={f"lading:{name}": fact for name, fact in facts.items()})


def _kind(values: Iterable[Any]) -> str | None:
    """Name the one kind of column that fits all values, ``mixed`` for none, or None where all values are None."""
    present = [value for value in values if value is not None]
    kinds = {type(value).__name__ for value in present}
    if not kinds:
        return None
    if any(isinstance(value, int) and abs(value) > _INT64_MAX for value in present):
        return "mixed"
    kind = "float" if kinds == {"int", "float"} else kinds.pop() if len(kinds) == 1 else "mixed"
    return kind if kind in _TYPE_OF_KIND else "mixed"


def _to_json(name: str, value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except TypeError as error:
        raise _refused(
            f"kept field {name!r}",
            f"a value that JSON has no form for ({error})",
            "a JSON value",
            "make it a string, or do not keep it",
        ) from error


def _from_column(value: Any, *, is_json: bool) -> Any:
    return json.loads(value) if is_json and value is not None else value


def _to_numpy(vectors: Tensor | np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """View vectors as numpy, without a copy where numpy has their dtype (bfloat16 becomes float32)."""
    if isinstance(vectors, np.ndarray):
        return vectors
    detached = vectors.detach().cpu()
    return (detached.float() if "bfloat16" in str(detached.dtype) else detached).numpy()


def _score(distance: float, similarity: str) -> float:
    """Turn Lance's distance (1 − cosine, 1 − dot product, squared length) into a score that is larger when nearer."""
    return -(distance**0.5) if similarity == "euclidean" else 1.0 - distance


def _version() -> str:
    try:
        return metadata.version("lading")
    except metadata.PackageNotFoundError:  # run from a source tree that was never installed
        return "unknown"


def _refused(subject: object, found: str, expected: str, way_out: str) -> StoreError:
    return StoreError(refusal(str(subject), found=found, expected=expected, way_out=way_out))
