"""Compare, order and rename tensor names. Knows only strings; guarantees nothing about what they name."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping

Rename = Mapping[str, str] | Callable[[str], str | None]
"""How a checkpoint's names become a module's: a mapping of names or dotted prefixes, or a function (None drops)."""

_DIGITS = re.compile(r"(\d+)")
_FIRST = ("embed", "shared", "wte", "wpe", "patch")
_LAST = ("lm_head", "classifier", "score", "pooler", "cls.", "final")


def natural_key(name: str) -> tuple[tuple[int, str], ...]:
    """Make a sort key under which ``layers.2`` comes before ``layers.10``.

    >>> sorted(["layers.10.w", "layers.2.w"], key=natural_key)
    ['layers.2.w', 'layers.10.w']
    """
    parts = _DIGITS.split(name)
    return tuple((int(part), "") if index % 2 else (-1, part) for index, part in enumerate(parts))


def layer_order_key(name: str) -> tuple[int, tuple[tuple[int, str], ...]]:
    """Make a sort key that guesses execution order from a name alone: embeddings, encoder, layers, decoder, heads.

    A wrong guess costs readahead some use and nothing else.

    >>> sorted(["lm_head.weight", "model.layers.0.w", "model.embed_tokens.weight"], key=layer_order_key)
    ['model.embed_tokens.weight', 'model.layers.0.w', 'lm_head.weight']
    """
    if any(word in name for word in _LAST):
        rank = 4
    elif "layer" not in name and "block" not in name and any(word in name for word in _FIRST):
        rank = 0
    else:
        rank = 3 if "decoder" in name else 1 if "encoder" in name or "vision" in name or "visual" in name else 2
    return rank, natural_key(name)


def nearest(name: str, known: Iterable[str], limit: int = 3) -> list[str]:
    """Find the known names most like ``name``, best first, for an error's way out."""
    return difflib.get_close_matches(name, list(known), n=limit, cutoff=0.6)


def renamed(name: str, rename: Rename | None) -> str | None:
    """Give the module's name for a checkpoint's ``name``; None means that the tensor is left out.

    In a mapping the longest key that is the name itself or a dotted prefix of it wins; an empty key is the prefix of
    every name, an empty value removes the prefix.

    >>> renamed("bert.pooler.weight", {"bert": ""}), renamed("bertha.w", {"bert": ""})
    ('pooler.weight', 'bertha.w')
    >>> renamed("pooler.weight", {"": "bert"})
    'bert.pooler.weight'
    """
    if rename is None:
        return name
    if not isinstance(rename, Mapping):
        return rename(name)
    if name in rename:
        return rename[name]
    prefixes = [prefix for prefix in rename if prefix == "" or name.startswith(prefix.rstrip(".") + ".")]
    if not prefixes:
        return name
    prefix = max(prefixes, key=len)
    rest = name if prefix == "" else name[len(prefix.rstrip(".")) + 1 :]
    target = rename[prefix].rstrip(".")
    return f"{target}.{rest}" if target else rest


def folded(names: Iterable[str]) -> list[str]:
    """Write names that differ in one number as one name: consecutive numbers as a range, others listed.

    Folds the innermost number first; the order is that of `natural_key`.

    >>> folded(["layers.0.w", "layers.1.w", "layers.2.w", "norm.w"])
    ['layers.{0...2}.w', 'norm.w']
    >>> folded(["a.0.b.3", "a.0.b.5", "a.1.b.3", "a.1.b.5"])
    ['a.{0,1}.b.{3,5}']
    """
    rows = [_DIGITS.split(name) for name in sorted(set(names), key=natural_key)]
    for place in range(max(map(len, rows), default=1) - 2, 0, -2):
        groups: dict[tuple[str, ...], list[str]] = {}
        for row in rows:
            number = row[place] if place < len(row) else ""
            groups.setdefault((*row[:place], "", *row[place + 1 :]) if number else tuple(row), []).append(number)
        rows = [
            [*row[:place], _as_range(numbers), *row[place + 1 :]] if numbers[0] else list(row)
            for row, numbers in groups.items()
        ]
    return ["".join(row) for row in rows]


def _as_range(numbers: list[str]) -> str:
    first, last = int(numbers[0]), int(numbers[-1])
    if len(numbers) == 1:
        return numbers[0]
    is_run = len(numbers) > 2 and [int(number) for number in numbers] == list(range(first, last + 1))
    return f"{{{first}...{last}}}" if is_run else f"{{{','.join(numbers)}}}"
