"""Describe a checkpoint: which tensor stands in which shard, at which bytes.

Holds records only: no file is opened here and no torch imported. A catalog is what the readers of single files
(`header`, `pickled`) and the index produce, and all that binding needs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from lading.checkpoint.dtypes import ElementType
from lading.errors import CheckpointError, name_list


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

    @classmethod
    def of(cls, shards: Iterable[Shard]) -> Catalog:
        """Join shards into a catalog.

        Raises:
            CheckpointError: a name stands in more than one shard, or there is no tensor at all.
        """
        listed = tuple(shards)
        owners: dict[str, Shard] = {}
        for shard in listed:
            for name in shard.tensors:
                if name in owners:
                    raise CheckpointError(
                        f"tensor {name!r} stands in two shards: {owners[name].path.name} and {shard.path.name} · "
                        "expected each name in exactly one · delete the shard that does not belong to this checkpoint"
                    )
                owners[name] = shard
        return cls(shards=listed, owners=MappingProxyType(owners))

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
        """Collect the left-out tied names of all shards: left-out name → stored name."""
        return {alias: name for shard in self.shards for alias, name in shard.aliases.items()}

    def describe(self, limit: int = 3) -> str:
        """Name the shards for a message."""
        return name_list((shard.path.name for shard in self.shards), limit)
