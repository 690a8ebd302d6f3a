"""Notice, before a forward, that a mapped file was changed in place.

A mapping shows whatever the file holds now: overwritten in place it silently becomes other weights, shortened it kills
the process on the next read. A guard keeps a descriptor of each shard and compares size and time of change before each
forward of the module it watches. Best effort: a change during a forward, or one that restores both values, goes
unnoticed. Renaming or unlinking the file is fine, the descriptor still names the old one: a path would not, which is
why a guard costs one open file a shard, and nothing else in this room keeps any.

Thread rule: immutable after construction; any number of threads may call the module.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn

from lading.checkpoint.catalog import FileIdentity, Shard
from lading.checkpoint.header import identity_of, open_regular
from lading.checkpoint.mapping import check_unchanged


class FileGuard:
    """Check a module's shards before each of its forwards; a forward pre-hook.

    A copy or a pickle of the module has weights of its own, so the guard's copy watches nothing.

    Raises:
        CorruptShardError: when called after a shard changed in place.
    """

    def __init__(self, shards: Iterable[Shard]) -> None:
        self._watched: list[tuple[int, FileIdentity, Path]] = []
        for shard in shards:
            descriptor = open_regular(shard.path)
            self._watched.append((descriptor, shard.identity, shard.path))
            check_unchanged(identity_of(descriptor), shard.identity, shard.path)

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Compare each shard with what was read when the module was loaded."""
        for descriptor, identity, path in self._watched:
            check_unchanged(identity_of(descriptor), identity, path)

    def __reduce__(self) -> tuple[type[FileGuard], tuple[tuple[Shard, ...]]]:
        return FileGuard, ((),)

    def __del__(self) -> None:
        for descriptor, _, _ in getattr(self, "_watched", ()):
            os.close(descriptor)
