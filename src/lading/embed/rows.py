"""Name what travels through the embed room: texts in, vectors with their origin out, search results back.

Plain immutable records; knows no model, no file and no store.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """Carry one text to embed.

    >>> Record(text="a cargo", id="manifest.txt:1").id
    'manifest.txt:1'
    """

    text: str
    """What is embedded, without a prompt."""
    id: str | None = None
    """Names the text in a store; None: the store gives it its row number."""
    fields: Mapping[str, Any] = field(default_factory=dict)
    """Values kept beside the vector: JSON values by column name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VectorSource:
    """Say what made a vector: two vectors can be compared only if these facts agree.

    >>> VectorSource(pooling="mean").differences(VectorSource(pooling="cls"))
    ["pooling 'mean' (expected 'cls')"]
    """

    model: str = ""
    """Path or repository of the weights; empty: a module in memory."""
    pooling: str = ""
    """Pooling modes joined by ``+``."""
    dtype: str = ""
    """The dtype the vectors had when computed, as ``float32``."""
    prompt: str = ""
    """What was put before every text."""
    similarity: str = "cosine"
    """How the model wants its vectors compared: ``cosine``, ``dot`` or ``euclidean``."""
    sites: str = ""
    """The modules whose tensors were kept, space between them; empty: the model's last hidden states."""

    def differences(self, expected: VectorSource) -> list[str]:
        """List the facts in which this source differs from the ``expected`` one, each written for a message."""
        return [
            f"{name} {getattr(self, name)!r} (expected {getattr(expected, name)!r})"
            for name in ("model", "sites", "pooling", "dtype", "prompt", "similarity")
            if getattr(self, name) != getattr(expected, name)
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Carry one embedded text to a store."""

    text: str
    vector: Tensor
    """[dimension], on the CPU, in a storage of its own: keeping one row keeps one row's bytes."""
    source: VectorSource
    """Shared by all rows of one stream."""
    id: str | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Hit:
    """Carry one text found by a search."""

    id: str
    text: str
    score: float
    """Nearer is larger: the cosine, the dot product, or the negative distance, as the store's similarity says."""
    fields: Mapping[str, Any] = field(default_factory=dict)
