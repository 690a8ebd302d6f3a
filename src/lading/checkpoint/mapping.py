"""Give a checkpoint's bytes to tensors without copying them.

One mapping per shard, private and writable: a write to a tensor goes to a page of the process's own (copy on write) and
never reaches the file. One storage per tensor, so that pickling, copying or sharing one tensor costs that tensor's
bytes. Nothing is touched until somebody reads a tensor. The mapping lives as long as any of its tensors and keeps no
descriptor; renaming or unlinking the file changes nothing, shortening it in place makes later reads die of SIGBUS (see
`guard`).

What cannot be a view is a copy of that tensor alone: data that are not aligned for their type, values that the file
holds conjugated or negated, and every tensor of a file that the kernel does not map.

Whatever the caller's default device, and inside ``torch.inference_mode()`` too, what is made are plain tensors of the
CPU that may be trained.

Thread rule: a `ShardMapping` may be used from any thread.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, cast

import numpy as np
import torch
from tqdm import tqdm

from lading.checkpoint import pages
from lading.checkpoint.catalog import Catalog, FileIdentity, Shard, TensorSpec
from lading.checkpoint.dtypes import torch_dtype
from lading.checkpoint.header import identity_of, open_regular
from lading.errors import CheckpointError, CorruptShardError, name_list, printable, refusal
from lading.units import format_bytes

_LOG = logging.getLogger(__name__)
_READ_INSTEAD = (errno.ENODEV, errno.ENOMEM)
"""Why a file that can be read is not mapped: its file system maps none, or there is no room among the addresses."""


class ShardMapping:
    """Map one shard and make its tensors; where the kernel does not map it, read them, which a warning says.

    Args:
        shard: what its header said; the file must still be the one that was read.
        warns: log it where the file cannot be mapped; False leaves that to the caller.

    Raises:
        CorruptShardError: another file, or another version of it, stands under the name by now.
        CheckpointNotFoundError: no file does.
        CheckpointError: the kernel does not map it, for another reason than those that reading gets around.

    Example:
        >>> mapping = ShardMapping(read_header(path))        # doctest: +SKIP
        >>> mapping.tensor(mapping.shard.tensors["weight"])  # doctest: +SKIP
        tensor([[...
    """

    def __init__(self, shard: Shard, *, warns: bool = True) -> None:
        self.shard = shard
        self.buffer: pages.Mapping | None = None
        """The file's bytes; None where it is not mapped."""
        self.why_unmapped = ""
        self._copies: dict[object, torch.Tensor] = {}  # by place: tied names of a pickled shard share their bytes
        descriptor = _open_unchanged(shard)
        try:
            self.buffer = pages.map_private(descriptor, shard.identity.num_bytes)
        except OSError as error:
            self.why_unmapped = str(error.strerror)
            if error.errno not in _READ_INSTEAD:
                raise CheckpointError(
                    refusal(
                        str(shard.path),
                        found=f"a file that the system does not map ({error.strerror})",
                        expected=f"a mapping of {shard.identity.num_bytes} bytes",
                        way_out="read it into memory with copy=True",
                    )
                ) from error
            if warns:
                _warn_unmapped([self])
        finally:
            os.close(descriptor)

    @property
    def span(self) -> pages.Span:
        """Name the addresses at which the file's bytes stand; none where it is not mapped."""
        return pages.Span(0, 0) if self.buffer is None else pages.Span.of(self.buffer)

    def tensor(self, spec: TensorSpec) -> torch.Tensor:
        """Make a CPU tensor of a spec's values: a view of the file wherever that is possible.

        Returns:
            A tensor of the spec's dtype and shape with a storage of its own size. 4-bit elements, two to a byte, make
            a last dimension of half the length (torch's packed dtypes).

        Raises:
            CheckpointError: torch has no such tensor, or there is no memory for a copy.
        """
        with _as_outside_inference():
            return self._tensor(spec)

    def _tensor(self, spec: TensorSpec) -> torch.Tensor:
        dtype, shape = _form(self.shard, spec)
        if spec.num_bytes == 0:
            return _without_elements(dtype, shape)
        if self.buffer is None or is_copied(spec):
            return self._copied(spec)
        if spec.element.bits < 8:  # torch.frombuffer does not know the small types
            flat = torch.frombuffer(self.buffer, dtype=torch.uint8, count=spec.num_bytes, offset=spec.offset).view(
                dtype
            )
        else:
            count = spec.num_bytes * 8 // spec.element.bits
            flat = torch.frombuffer(self.buffer, dtype=dtype, count=count, offset=spec.offset)
        return flat.view(shape) if spec.strides is None else flat.as_strided(shape, spec.strides)

    def _copied(self, spec: TensorSpec) -> torch.Tensor:
        place = _place(spec)
        if place not in self._copies:
            descriptor = _open_unchanged(self.shard)
            try:
                self._copies.setdefault(place, read_tensor(self.shard, descriptor, spec))
            finally:
                os.close(descriptor)
        return self._copies[place]


def _as_outside_inference() -> AbstractContextManager[Any]:
    """Make tensors in the body that autograd may use, also where the caller is inside ``torch.inference_mode()``."""
    return torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext()


def _warn_unmapped(mappings: Sequence[ShardMapping]) -> None:
    _LOG.warning(
        refusal(
            name_list(str(mapping.shard.path) for mapping in mappings),
            found=f"files that the system does not map ({mappings[0].why_unmapped})",
            expected="weights that are views of their file",
            way_out=f"they are read into memory, {format_bytes(sum(m.shard.identity.num_bytes for m in mappings))}; "
            "copy the files to a local disk, or raise the limit on address space (ulimit -v), to have them mapped",
        )
    )


def _open_unchanged(shard: Shard) -> int:
    descriptor = open_regular(shard.path)
    try:
        check_unchanged(identity_of(descriptor), shard.identity, shard.path)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


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
    """Say whether a spec's first byte stands where torch's kernels must not read its type."""
    return spec.offset % spec.element.alignment_bytes != 0


def is_copied(spec: TensorSpec) -> bool:
    """Say whether a spec's tensor cannot be a view of its file: misaligned, or other values than stand there."""
    return is_misaligned(spec) or spec.is_conj or spec.is_neg


def _place(spec: TensorSpec) -> object:
    return spec._replace(name="")


def _form(shard: Shard, spec: TensorSpec) -> tuple[torch.dtype, tuple[int, ...]]:
    """Give dtype and shape of the torch tensor for a spec; the last dimension is halved for two 4-bit elements a byte.

    Raises:
        CheckpointError: torch has no such type, or a row of packed elements ends inside a byte.
    """
    try:
        dtype = torch_dtype(spec.element)
    except CheckpointError as error:
        raise CheckpointError(printable(f"{shard.path}, tensor {spec.name!r}, {error}")) from error
    if spec.element.bits >= 8:
        return dtype, spec.shape
    if not spec.shape or spec.shape[-1] * spec.element.bits % 8:
        raise CheckpointError(
            refusal(
                f"{shard.path}, tensor {spec.name!r}",
                found=f"shape {list(spec.shape)} of {spec.element.name}, whose rows end inside a byte",
                expected=f"a last dimension that {8 // spec.element.bits} divides, as {dtype} needs",
                way_out="leave the tensor out: let rename give None for its name",
            )
        )
    return dtype, (*spec.shape[:-1], spec.shape[-1] * spec.element.bits // 8)


def _without_elements(dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.empty(0, dtype=dtype, device="cpu").reshape(shape)


def map_catalog(catalog: Catalog) -> dict[Path, ShardMapping]:
    """Map every shard of a checkpoint; shard path → mapping. One warning names all that had to be read instead.

    Raises:
        CheckpointError: as `ShardMapping`.
    """
    mappings = {shard.path: ShardMapping(shard, warns=False) for shard in catalog.shards}
    unmapped = [mapping for mapping in mappings.values() if mapping.buffer is None]
    if unmapped:
        _warn_unmapped(unmapped)
    return mappings


def read_tensor(shard: Shard, descriptor: int, spec: TensorSpec) -> torch.Tensor:
    """Read a spec's bytes from an open shard into memory of their own; nothing of the file stays mapped.

    Raises:
        CorruptShardError: the file ends before the tensor does, or cannot be read.
        CheckpointError: torch has no such tensor, or there is no memory for it.
    """
    with _as_outside_inference():
        dtype, shape = _form(shard, spec)
        if spec.num_bytes == 0:
            return _without_elements(dtype, shape)
        room = _room_like(shard, spec)
        _read_into(memoryview(room.data), shard, descriptor, spec)
        flat = torch.frombuffer(room, dtype=torch.uint8).view(dtype)
        tensor = flat.view(shape) if spec.strides is None else flat.as_strided(shape, spec.strides)
        tensor = tensor.conj_physical() if spec.is_conj else tensor
        return tensor.neg() if spec.is_neg else tensor


def _room_like(shard: Shard, spec: TensorSpec) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Allocate a spec's bytes at the address modulo 64 that they have in the mapping, at 0 if they are misaligned.

    Kernels choose their path by alignment, so another address could change the last bits of a result.
    """
    try:
        room = np.empty(spec.num_bytes + 63, dtype=np.uint8)
    except MemoryError as error:
        raise CheckpointError(
            refusal(
                f"{shard.path}, tensor {spec.name!r}",
                found=f"no memory for its {spec.num_bytes} bytes",
                expected=f"{format_bytes(spec.num_bytes)} of memory to read it into",
                way_out="free memory, or load without copy=True from a file that can be mapped",
            )
        ) from error
    start = ((0 if is_misaligned(spec) else spec.offset) - room.ctypes.data) % 64
    return room[start : start + spec.num_bytes]


def _read_into(view: memoryview, shard: Shard, descriptor: int, spec: TensorSpec) -> None:
    done = 0
    while done < spec.num_bytes:
        try:
            count = os.preadv(descriptor, [view[done:]], spec.offset + done)
            found = f"the end of the file after {done} of its bytes"
        except OSError as error:
            count, found = 0, f"bytes from {spec.offset + done} on unreadable ({error.strerror})"
        if count == 0:
            raise CorruptShardError(
                refusal(
                    f"{shard.path}, tensor {spec.name!r}",
                    found=found,
                    expected=f"{spec.num_bytes} bytes",
                    way_out="download or save the file again",
                )
            )
        done += count


class _Refused:
    """Stand in for a tensor that torch cannot hold, and refuse it, by name, to whoever looks at it."""

    def __init__(self, error: CheckpointError) -> None:
        self._message = str(error)

    def __getattr__(self, attribute: str) -> NoReturn:
        raise CheckpointError(self._message)


def _unless_refused(shard: Shard, spec: TensorSpec, make: Callable[[TensorSpec], torch.Tensor]) -> torch.Tensor:
    try:
        _form(shard, spec)
    except CheckpointError as error:
        return cast("torch.Tensor", _Refused(error))
    return make(spec)


def tensors_of(
    catalog: Catalog, mappings: Mapping[Path, ShardMapping], *, copy: bool = False
) -> dict[str, torch.Tensor]:
    """Make every tensor of a checkpoint, in file order.

    What torch has no tensor for stands in the result too, as an object that raises `CheckpointError` when anything of
    it is asked for: others of the same checkpoint are not held up by it.

    Args:
        catalog: what to make.
        mappings: its shards' mappings; not looked at with ``copy``.
        copy: read the bytes into memory of their own, immune to later changes of the file, instead of viewing them.
            That takes a while: a progress bar shows it on a terminal.

    Raises:
        CheckpointError: as `read_tensor`, where bytes are read.
    """
    tensors: dict[str, torch.Tensor] = {}
    read = {shard.path for shard in catalog.shards if copy or mappings[shard.path].buffer is None}
    total = sum(len(shard.tensors) for shard in catalog.shards if shard.path in read)
    hidden = None if read else True
    with (
        _as_outside_inference(),
        tqdm(total=total, desc="loading", unit="tensor", delay=1, disable=hidden, leave=False) as bar,
    ):
        for shard in catalog.shards:
            if shard.path in read:
                for name, tensor in _read_shard(shard):
                    tensors[name] = tensor
                    bar.update()
            else:
                make = mappings[shard.path]._tensor
                tensors |= {name: _unless_refused(shard, spec, make) for name, spec in shard.tensors.items()}
    return tensors


def _read_shard(shard: Shard) -> Iterator[tuple[str, torch.Tensor]]:
    descriptor = _open_unchanged(shard)
    try:
        shared: dict[object, torch.Tensor] = {}  # tied names of a pickled shard stand on the same bytes
        for spec in shard.tensors.values():
            place = _place(spec)
            if spec.num_bytes == 0 or place not in shared:
                shared[place] = _unless_refused(shard, spec, partial(read_tensor, shard, descriptor))
            yield spec.name, shared[place]
    finally:
        os.close(descriptor)
