"""Describe a checkpoint: which tensor stands in which shard, at which bytes.

Holds records only: no file is opened here and no torch imported. A catalog is what the readers of single files
(`header`, `pickled`) and the index produce, and all that binding needs.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from lading.checkpoint.dtypes import ElementType
from lading.errors import name_list


@dataclass(frozen=True, slots=True, kw_only=True)
class FileIdentity:
    """Remember which file was read, to notice another one under its name. Immutable."""

    device: int
    inode: int
    num_bytes: int
    modified_ns: int


class TensorSpec(NamedTuple):
    """Say where one tensor's bytes stand. Immutable; a tuple, because a checkpoint has thousands."""

    name: str
    element: ElementType
    shape: tuple[int, ...]
    """As the file's header has it; for 4-bit elements the number of elements, not of bytes."""
    offset: int
    """Position of the first byte in the shard's file."""
    num_bytes: int
    strides: tuple[int, ...] | None = None
    """In elements; None means contiguous. Only pickled checkpoints have others."""
    is_conj: bool = False
    """The values are the conjugates of what stands in the file. Only in pickled checkpoints."""
    is_neg: bool = False
    """The values are the negatives of what stands in the file. Only in pickled checkpoints."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """Describe one file of a checkpoint. Immutable."""

    path: Path
    identity: FileIdentity
    tensors: Mapping[str, TensorSpec]
    metadata: Mapping[str, str] = field(default_factory=dict)
    """The file's own free text, as written by whoever saved it."""
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Names left out of the file because they are tied: left-out name → name of the tensor in this file."""
    is_pickled: bool = False
    """Whether torch.save wrote it; `tensors` are in the order of the pickle then, else in that of their bytes."""

    @property
    def listing(self) -> tuple[str, ...]:
        """List the names in the order in which the libraries of the format list them: safetensors sorts them."""
        return tuple(self.tensors) if self.is_pickled else tuple(sorted(self.tensors))


@dataclass(frozen=True, slots=True, kw_only=True)
class Catalog:
    """List every tensor of a checkpoint over all its shards. Immutable; iterates in file order.

    Example:
        >>> from lading.checkpoint.locate import open_catalog
        >>> catalog = open_catalog("path/to/model")  # doctest: +SKIP
        >>> catalog["model.norm.weight"].shape       # doctest: +SKIP
        (2048,)
    """

    shards: tuple[Shard, ...]
    owners: Mapping[str, Shard]
    """Tensor name → the shard that holds it."""
    notes: tuple[str, ...] = ()
    """What is amiss with the files and does no harm to their tensors: a message of the house for each kind."""

    @classmethod
    def of(cls, shards: Iterable[Shard], notes: Iterable[str] = ()) -> Catalog:
        """List shards that have no name in common; `lading.checkpoint.joining` makes such of those that have."""
        listed = tuple(shards)
        owners = {name: shard for shard in listed for name in shard.tensors}
        assert len(owners) == sum(len(shard.tensors) for shard in listed), "a name stands in two shards"
        return cls(shards=listed, owners=MappingProxyType(owners), notes=tuple(notes))

    def __getitem__(self, name: str) -> TensorSpec:
        return self.owners[name].tensors[name]

    def __contains__(self, name: object) -> bool:
        return name in self.owners

    def __iter__(self) -> Iterator[TensorSpec]:
        for shard in self.shards:
            yield from shard.tensors.values()

    def __len__(self) -> int:
        return len(self.owners)

    @property
    def num_bytes(self) -> int:
        """Count the bytes of all tensors' data, shared bytes once."""
        return sum(
            num_bytes
            for shard in self.shards
            for num_bytes in {(s.offset, s.num_bytes): s.num_bytes for s in shard.tensors.values()}.values()
        )

    @property
    def aliases(self) -> dict[str, str]:
        """Collect the left-out tied names of all shards: left-out name → stored name. A stored one is not left out."""
        return {
            alias: name for shard in self.shards for alias, name in shard.aliases.items() if alias not in self.owners
        }

    @property
    def directory(self) -> Path:
        """Give the folder that holds all shards, some of them perhaps in folders below it."""
        return Path(os.path.commonpath([shard.path.parent for shard in self.shards]))

    def name_of(self, shard: Shard) -> str:
        """Name a shard by its path inside `directory`: no other shard has the same."""
        return str(shard.path.relative_to(self.directory))

    def describe(self, limit: int = 3) -> str:
        """Name the shards for a message."""
        return name_list(map(self.name_of, self.shards), limit)
