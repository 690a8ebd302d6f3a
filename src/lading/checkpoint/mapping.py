"""Give a checkpoint's bytes to tensors without copying them.

One mapping per shard, private and writable: a write to a tensor goes to a page of the process's own (copy on write) and
never reaches the file. One storage per tensor, so that pickling, copying or sharing one tensor costs that tensor's
bytes. Nothing is touched until somebody reads a tensor. The mapping lives as long as any of its tensors; renaming or
unlinking the file changes nothing, shortening it in place makes later reads die of SIGBUS (see `guard`).

Thread rule: a `ShardMapping` is immutable and may be used from any thread.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from lading import compat
from lading.checkpoint.catalog import Catalog, FileIdentity, Shard, TensorSpec
from lading.checkpoint.dtypes import torch_dtype
from lading.checkpoint.header import identity_of, open_regular
from lading.errors import CorruptShardError, refusal


class ShardMapping:
    """Map one shard and make its tensors.

    Args:
        shard: what its header said; the file must still be the one that was read.

    Raises:
        CorruptShardError: another file, or another version of it, stands under the name by now.

    Example:
        >>> mapping = ShardMapping(read_header(path))        # doctest: +SKIP
        >>> mapping.tensor(mapping.shard.tensors["weight"])  # doctest: +SKIP
        tensor([[...
    """

    def __init__(self, shard: Shard) -> None:
        self.shard = shard
        descriptor = open_regular(shard.path)
        try:
            check_unchanged(identity_of(descriptor), shard.identity, shard.path)
            self.buffer = mmap.mmap(
                descriptor,
                shard.identity.num_bytes,
                flags=mmap.MAP_PRIVATE | compat.MAP_NORESERVE,
                prot=mmap.PROT_READ | mmap.PROT_WRITE,
            )
        finally:
            os.close(descriptor)

    @property
    def address(self) -> int:
        """Give the memory address at which the mapping begins."""
        return ctypes.addressof(ctypes.c_char.from_buffer(self.buffer))

    def tensor(self, spec: TensorSpec) -> torch.Tensor:
        """Make a CPU tensor over a spec's bytes: a view of the file, or a copy where its data are misaligned.

        Returns:
            A tensor of the spec's dtype and shape with a storage of its own size. 4-bit elements, two to a byte, make
            a last dimension of half the length (torch's packed dtypes).
        """
        bits, dtype = spec.element.bits, torch_dtype(spec.element)
        shape = packed_shape(spec) if bits < 8 else spec.shape
        if spec.num_bytes == 0:
            return torch.empty(shape, dtype=dtype)
        if bits < 8 or is_misaligned(spec):  # torch.frombuffer does not know the small types
            raw = torch.frombuffer(self.buffer, dtype=torch.uint8, count=spec.num_bytes, offset=spec.offset)
            flat = (raw.clone() if is_misaligned(spec) else raw).view(dtype)
        else:
            flat = torch.frombuffer(self.buffer, dtype=dtype, count=spec.num_bytes * 8 // bits, offset=spec.offset)
        return flat.view(shape) if spec.strides is None else flat.as_strided(shape, spec.strides)


def check_unchanged(found: FileIdentity, expected: FileIdentity, path: Path) -> None:
    """Compare two identities of one path.

    Raises:
        CorruptShardError: they differ in file, size or time of change.
    """
    if found != expected:
        what = "another file" if found.inode != expected.inode else "a file changed in place"
        raise CorruptShardError(
            refusal(
                str(path),
                found=f"{what} of {found.num_bytes} bytes",
                expected=f"the file whose header was read, {expected.num_bytes} bytes",
                way_out="load the model again; replace checkpoints by rename, never in place",
            )
        )


def is_misaligned(spec: TensorSpec) -> bool:
    """Say whether a spec's first byte stands where torch's kernels must not read its type, so that it is copied."""
    return spec.offset % spec.element.alignment_bytes != 0


def packed_shape(spec: TensorSpec) -> tuple[int, ...]:
    """Give the shape of the torch tensor for a spec: the last dimension halved for two 4-bit elements a byte."""
    if spec.element.bits >= 8 or not spec.shape:
        return spec.shape
    return (*spec.shape[:-1], spec.shape[-1] * spec.element.bits // 8)


def map_catalog(catalog: Catalog) -> dict[Path, ShardMapping]:
    """Map every shard of a checkpoint; shard path → mapping."""
    return {shard.path: ShardMapping(shard) for shard in catalog.shards}


def read_tensor(shard: Shard, descriptor: int, spec: TensorSpec) -> torch.Tensor:
    """Read a spec's bytes from an open shard into memory of their own; nothing of the file stays mapped.

    Raises:
        CorruptShardError: the file ends before the tensor does.
    """
    raw = _buffer_like(spec)
    view = memoryview(raw.numpy().data)
    done = 0
    while done < spec.num_bytes:
        count = os.preadv(descriptor, [view[done:]], spec.offset + done)
        if count == 0:
            raise CorruptShardError(
                refusal(
                    f"{shard.path}, tensor {spec.name!r}",
                    found=f"the end of the file after {done} of its bytes",
                    expected=f"{spec.num_bytes} bytes",
                    way_out="download or save the file again",
                )
            )
        done += count
    flat = raw.view(torch_dtype(spec.element))
    return flat.view(packed_shape(spec)) if spec.strides is None else flat.as_strided(packed_shape(spec), spec.strides)


def _buffer_like(spec: TensorSpec) -> torch.Tensor:
    """Allocate a spec's bytes at the address modulo 64 that they have in the mapping.

    Kernels choose their path by alignment, so another address could change the last bits of a result.
    """
    if spec.num_bytes == 0 or is_misaligned(spec):
        return torch.empty(spec.num_bytes, dtype=torch.uint8)
    room = np.empty(spec.num_bytes + 63, dtype=np.uint8)
    start = (spec.offset - room.ctypes.data) % 64
    return torch.frombuffer(room, dtype=torch.uint8, count=spec.num_bytes, offset=start)


def tensors_of(
    catalog: Catalog, mappings: Mapping[Path, ShardMapping], *, copy: bool = False
) -> dict[str, torch.Tensor]:
    """Make every tensor of a checkpoint, in file order.

    Args:
        catalog: what to make.
        mappings: its shards' mappings.
        copy: read the bytes into memory of their own, immune to later changes of the file, instead of viewing them.
            That takes a while: a progress bar shows it on a terminal.
    """
    if not copy:
        return {
            name: mappings[shard.path].tensor(spec) for shard in catalog.shards for name, spec in shard.tensors.items()
        }
    tensors: dict[str, torch.Tensor] = {}
    with tqdm(total=len(catalog), desc="loading", unit="tensor", delay=1, disable=None, leave=False) as bar:
        for shard in catalog.shards:
            for name, tensor in _read_shard(shard):
                tensors[name] = tensor
                bar.update()
    return tensors


def _read_shard(shard: Shard) -> Iterator[tuple[str, torch.Tensor]]:
    descriptor = open_regular(shard.path)
    try:
        check_unchanged(identity_of(descriptor), shard.identity, shard.path)
        shared: dict[object, torch.Tensor] = {}  # tied names of a pickled shard stand on the same bytes
        for spec in shard.tensors.values():
            place = (spec.offset, spec.num_bytes, spec.element, spec.shape, spec.strides)
            if spec.num_bytes == 0 or place not in shared:
                shared[place] = read_tensor(shard, descriptor, spec)
            yield spec.name, shared[place]
    finally:
        os.close(descriptor)
