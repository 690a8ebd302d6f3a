"""Read texts to embed from files and from standard input, one after the other.

Knows files only. Guarantees: one line (or one paragraph, or one file, as asked) is in memory at a time; what cannot be
read is refused by file and line; no two texts share an id.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from lading.embed.rows import Record
from lading.errors import EmbedError, name_list, refusal

SPLITS = ("line", "paragraph", "file")
STDIN = "-"
_JSONL_SUFFIXES = (".jsonl", ".ndjson")
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    r"""Name the sources of texts and how they are cut, and read them with ``records``.

    Files ending in ``.jsonl`` or ``.ndjson`` hold one JSON object per line, and so do all sources once ``text_field``
    is given; all others are plain text. Everything is UTF-8. Texts of white space only are skipped in plain text and
    kept in JSON. Ids are ``<name>:<line where the text begins>``, name being the file's own name, or the path as given
    where two files have the same name.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder, "manifest.txt")
    ...     _ = path.write_text("tea\nsilk\n")
    ...     [(record.id, record.text) for record in Corpus(paths=(str(path),)).records()]
    [('manifest.txt:1', 'tea'), ('manifest.txt:2', 'silk')]
    """

    paths: tuple[str, ...] = (STDIN,)
    """Files in reading order; ``-`` is standard input."""
    split: str = "line"
    """One of ``SPLITS``: what is one text in plain text. Paragraphs are parted by blank lines."""
    text_field: str | None = None
    """The JSON field that holds the text; None: ``text``, in files that are JSON by name."""
    id_field: str | None = None
    """The JSON field that names the text, a string or an integer; ids are remembered, about 100 bytes each.
    None: named by file and line."""
    kept_fields: tuple[str, ...] = ()
    """JSON fields that every object must have, kept beside the text."""

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise EmbedError(
                refusal(
                    "split",
                    found=f"{self.split!r}",
                    expected=f"one of {name_list(SPLITS)}",
                    way_out="choose one of them",
                )
            )
        twice = [path for path, count in Counter(self.paths).items() if count > 1]
        if twice:
            raise EmbedError(
                refusal(
                    "texts",
                    found=f"{name_list(twice)} more than once",
                    expected="every file once, so that ids are unique",
                    way_out="name it once",
                )
            )
        for path in self.paths:
            if path != STDIN and not Path(path).is_file():
                found = "a directory" if Path(path).is_dir() else "nothing"
                raise EmbedError(
                    refusal(
                        str(path),
                        found=f"{found}",
                        expected="a text or JSONL file",
                        way_out="name files, or '-' for stdin",
                    )
                )
        plain = [path for path in self.paths if not self._is_jsonl(path)]
        if plain and (self.id_field is not None or self.kept_fields):
            raise EmbedError(
                refusal(
                    f"{name_list(plain)}",
                    found="plain text with an id field or fields to keep",
                    expected="JSON lines, which have fields",
                    way_out="name the text field too if these are JSON lines, or leave the fields out",
                )
            )

    def records(self) -> Iterator[Record]:
        """Read every text once, in order.

        Raises:
            EmbedError: a line is not UTF-8, not a JSON object with the fields asked for, or an id comes twice.
        """
        seen: set[str] = set()
        names = Counter(Path(path).name for path in self.paths)
        for path in self.paths:
            own_name = Path(path).name
            label = "stdin" if path == STDIN else own_name if names[own_name] == 1 else path
            with nullcontext(sys.stdin.buffer) if path == STDIN else Path(path).open("rb") as stream:
                read = self._read_jsonl if self._is_jsonl(path) else self._read_plain
                for record in read(label, stream):
                    if self.id_field is not None:
                        _refuse_second(seen, str(record.id), label)
                    yield record

    def _is_jsonl(self, path: str) -> bool:
        return self.text_field is not None or Path(path).suffix.lower() in _JSONL_SUFFIXES

    def _read_plain(self, label: str, stream: BinaryIO) -> Iterator[Record]:
        begin, gathered = 1, list[str]()
        for number, line in _lines(label, stream):
            is_blank = not line.strip()
            if self.split == "line" and not is_blank:
                yield Record(text=line, id=f"{label}:{number}")
            elif self.split == "paragraph" and is_blank:
                yield from _joined(label, begin, gathered)
                gathered = []
            elif self.split != "line":
                begin = number if not gathered else begin
                gathered.append(line)
        yield from _joined(label, 1 if self.split == "file" else begin, gathered)

    def _read_jsonl(self, label: str, stream: BinaryIO) -> Iterator[Record]:
        text_field = self.text_field or "text"
        for number, line in _lines(label, stream):
            if not line.strip():
                continue
            place = f"{label}:{number}"
            fields = _parse_object(place, line, [text_field, *self.kept_fields, *filter(None, [self.id_field])])
            text = fields[text_field]
            if not isinstance(text, str):
                raise EmbedError(
                    refusal(
                        f"{place}",
                        found=f"{_kind(text)} in field {text_field!r}",
                        expected="a string",
                        way_out="fix the line or name another field",
                    )
                )
            record_id = place if self.id_field is None else fields[self.id_field]
            if isinstance(record_id, bool) or not isinstance(record_id, (str, int)):
                raise EmbedError(
                    refusal(
                        f"{place}",
                        found=f"{_kind(record_id)} in the id field {self.id_field!r}",
                        expected="a string or an integer",
                        way_out="fix the line or name another field",
                    )
                )
            yield Record(text=text, id=str(record_id), fields={name: fields[name] for name in self.kept_fields})


def _lines(label: str, stream: BinaryIO) -> Iterator[tuple[int, str]]:
    """Decode the lines of a stream, counted from 1, without their ends and without a byte order mark."""
    for number, raw in enumerate(stream, 1):
        line = raw.removeprefix(_BYTE_ORDER_MARK) if number == 1 else raw
        try:
            text = line.decode()
        except UnicodeDecodeError as error:
            raise EmbedError(
                refusal(
                    f"{label}:{number}",
                    found=f"byte 0x{line[error.start]:02x} at {error.start}",
                    expected="UTF-8",
                    way_out="convert the file (iconv -f … -t utf-8)",
                )
            ) from error
        yield number, text.removesuffix("\n").removesuffix("\r")


def _joined(label: str, number: int, lines: Sequence[str]) -> Iterator[Record]:
    text = "\n".join(lines)
    if text.strip():
        yield Record(text=text, id=f"{label}:{number}")


def _parse_object(place: str, line: str, needed: Sequence[str]) -> dict[str, Any]:
    try:
        parsed = json.loads(line)
        if "\\u" in line:  # an escape can name half a character, which no UTF-8 file can hold
            json.dumps(parsed, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        shown = line if len(line) <= 60 else f"{line[:60]}…"
        raise EmbedError(
            refusal(
                f"{place}",
                found=f"{shown!r} ({error})",
                expected="one JSON object on the line",
                way_out="fix the line, or name the file without .jsonl to read it as plain text",
            )
        ) from error
    if not isinstance(parsed, dict):
        raise EmbedError(
            refusal(
                f"{place}", found=f"{_kind(parsed)}", expected="one JSON object on the line", way_out="fix the line"
            )
        )
    missing = [name for name in needed if name not in parsed]
    if missing:
        raise EmbedError(
            refusal(
                f"{place}",
                found=f"the fields {name_list(parsed) or 'none'}",
                expected=f"{name_list(missing)} too",
                way_out="fix the line or name another field",
            )
        )
    return parsed


def _refuse_second(seen: set[str], record_id: str, label: str) -> None:
    if record_id in seen:
        raise EmbedError(
            refusal(
                f"{label}",
                found=f"the id {record_id!r} a second time",
                expected="every id once",
                way_out="remove one of the lines, or leave the id field out to number texts by file and line",
            )
        )
    seen.add(record_id)


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")
