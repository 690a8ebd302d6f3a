"""Call a model with many batches in one of the ways to do so: one by one, or crossing together.

Knows lading and its peers, each under the name of the call that a user would write; measures nothing. The streamed
model is one, called in several ways.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import lading
from offload_contenders import Contender, load_by_device_map, load_in_memory, load_streamed, offload_to_disk

PARTS = 10
"""The model is so many times larger than what of it may be in memory."""
NARROW_TOKENS = 4096
"""Of a crossing that is told how many micro-batches to take."""

_streamed = partial(load_streamed, parts=PARTS)

CONTENDERS = {
    "memory": Contender(title="in memory", load=load_in_memory, is_on_disk=False),
    "convoy": Contender(title="lading.convoy", load=_streamed),
    "narrow": Contender(title=f"lading.convoy, {NARROW_TOKENS:,} tokens a crossing", load=_streamed),
    "prefetch": Contender(title="lading.load alone, batch by batch", load=_streamed),
    "disk_offload": Contender(title="accelerate disk_offload", load=offload_to_disk, needs="accelerate"),
    "device_map": Contender(
        title="transformers device_map, disk", load=partial(load_by_device_map, parts=PARTS), needs="accelerate"
    ),
}
OURS = ("convoy", "narrow", "prefetch")


def cross(name: str, call: Callable[..., Any], batches: Iterable[Any], tokens: int, **constants: Any) -> Iterator[Any]:
    """Begin to call a model, or a method of it, with batches of so many tokens each; gives outputs in order."""
    if name in ("convoy", "narrow"):
        width = max(1, NARROW_TOKENS // tokens) if name == "narrow" else "auto"
        return lading.convoy(call, batches, width=width, **constants)
    return (call(**batch, **constants) for batch in batches)


def loaded(names: Iterable[str], folder: Path, scratch: Path) -> dict[str, Any]:
    """Load what contenders call; those that call the same model in different ways share it."""
    models: dict[Any, Any] = {}
    for name in names:
        load = CONTENDERS[name].load
        if load not in models:
            models[load] = load(folder, scratch).eval()
    return {name: models[CONTENDERS[name].load] for name in names}
