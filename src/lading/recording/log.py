"""Keep what was heard, in order, so that adding to it is one step that needs no lock.

Concurrency: entries are added at the end of a list; what was sorted by site since is guarded by ``_lock``.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch

Row = tuple[str, Any, Any, "int | None"]
"""A site, what was kept, an event to wait for or None, and which call of the model it was in; or a group whose owner's
call ended, with nothing kept."""


class Log:
    """Take entries from any thread; give them by site, or in order."""

    def __init__(self, names: Iterable[str]) -> None:
        self._cells: list[Any] = []  # flat: a tuple for each entry would have the garbage collector look at them all
        self._filed: dict[str, list[tuple[torch.Tensor, Any]]] = {name: [] for name in names}
        self._num_filed = 0
        self._lock = threading.Lock()
        self.names = self._filed.keys()
        self.note: Callable[[Row], None] = self._cells.extend
        """Adds the four cells of an entry."""

    def tensors_of(self, name: str) -> list[torch.Tensor]:
        """Give what one site gave, call by call, when it is there."""
        with self._lock:
            rows = self._rows_from(self._num_filed)
            self._num_filed += len(rows)
            for site, tensor, event, _ in rows:
                if tensor is not None:
                    self._filed[site].append((tensor, event))
            found = list(self._filed[name])
        for _, event in found:
            if event is not None:
                event.synchronize()
        return [tensor for tensor, _ in found]

    def rows(self, names: Collection[str]) -> list[Row]:
        """Give the entries of some sites and groups in order, when their tensors are there."""
        rows = [row for row in self._rows_from(0) if row[0] in names] if names else []
        for _, _, event, _ in rows:
            if event is not None:
                event.synchronize()
        return rows

    def _rows_from(self, first: int) -> list[Row]:
        cells = iter(self._cells[4 * first :])
        return list(zip(cells, cells, cells, cells, strict=True))
