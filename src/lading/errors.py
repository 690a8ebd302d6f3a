"""Name every way in which lading refuses, so that callers can catch one and read the way out.

A message is: the subject by its full name · what was found · what was expected, with units · the way out.
This file knows no other file of the package.
"""

from __future__ import annotations

from collections.abc import Iterable


class LadingError(Exception):
    """Catch everything that lading raises on purpose."""


class CheckpointError(LadingError, ValueError):
    """A checkpoint cannot be read or does not fit its model: the message names file, tensor, found and expected."""


class MissingTensorError(CheckpointError, KeyError):
    """A tensor that was promised or is needed is in no shard. All missing names are listed at once."""

    __str__ = Exception.__str__  # KeyError would show the repr of the message


class ShapeMismatchError(CheckpointError):
    """A tensor of the checkpoint has another shape than the parameter or buffer it belongs to."""


class CorruptShardError(CheckpointError, OSError):
    """The bytes of a shard break its format, are cut short, or changed after loading."""


class CheckpointNotFoundError(CheckpointError, FileNotFoundError):
    """There is no checkpoint at the given path, or not in the local hub cache."""


class PlanError(LadingError, ValueError):
    """A model cannot be placed as asked."""


class ResidencyError(LadingError, RuntimeError):
    """An offloaded model cannot do what was asked, or a block cannot be brought to where it runs."""


class CaptureError(LadingError, RuntimeError):
    """What was asked for cannot be captured completely: nothing is returned rather than a part of it."""


class MissingExtraError(LadingError, ImportError):
    """A feature needs an optional dependency: the message names the extra to install."""


class StoreError(LadingError, ValueError):
    """A vector store cannot be read, or refuses rows that do not belong to it."""


def printable(text: str) -> str:
    r"""Write a text that a file chose so that a terminal or a log shows it and obeys nothing in it.

    Whatever ``str.isprintable`` refuses (control characters and with them line ends and escape sequences, half
    surrogates, marks that turn the direction of writing) becomes its escape; everything else stays as it is.

    >>> printable("weight\x1b[2J"), printable("größe")
    ('weight\\x1b[2J', 'größe')
    """
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode("ascii") for each in text)


def refusal(subject: str, *, found: str, expected: str, way_out: str) -> str:
    """Compose a message of the house: the subject by its full name · found · expected · the way out; printable."""
    return printable(f"{subject}: found {found} · expected {expected} · {way_out}")


def name_list(names: Iterable[str], limit: int = 10) -> str:
    """Write names for a message: the first ``limit`` of them, quoted, and the total when there are more.

    >>> name_list(["a", "b"])
    "'a', 'b'"
    >>> name_list(["a", "b", "c"], limit=2)
    "'a', 'b' … (3 in all)"
    """
    listed = list(names)
    shown = ", ".join(repr(name) for name in listed[:limit])
    return shown if len(listed) <= limit else f"{shown} … ({len(listed)} in all)"


class EmbedError(LadingError, ValueError):
    """Texts cannot be read, or a model, tokenizer or prompt cannot embed them: the message names which and why."""
