"""Find the file behind a tensor: which bytes of which mapping it shows, or none; and give a file to what has none.

A storage counts as backed where its address lies in a private file mapping of this process: so it is for weights that
`lading.load` bound, and for what other loaders map on a CPU. Anything else is *spilled* if it must rest on disk:
written once to a file without a name, which the kernel deletes with the process, and shown again through a mapping.
"""

from __future__ import annotations

import os
import tempfile
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from lading.checkpoint.catalog import FileIdentity
from lading.checkpoint.header import identity_of
from lading.checkpoint.mapping import check_unchanged
from lading.checkpoint.pages import Span, map_private
from lading.errors import CorruptShardError, ResidencyError, refusal
from lading.units import format_bytes

_STEP_BYTES = 64 << 20


class BackingFile:
    """Hold a mapped file open, to read it ahead and to notice that it changed. Immutable but for `close`.

    Args:
        path: what the file is called in messages.
        descriptor: owned from now on; None where the file has no name any more: then it is only mapped.
    """

    def __init__(self, path: Path, descriptor: int | None) -> None:
        self.path = path
        self.descriptor = descriptor
        self._identity: FileIdentity | None = None if descriptor is None else identity_of(descriptor)

    def check(self) -> None:
        """Compare the file with what it was.

        Raises:
            CorruptShardError: it was changed in place.
        """
        if self.descriptor is not None and self._identity is not None:
            check_unchanged(identity_of(self.descriptor), self._identity, self.path)

    def failure(self, offset: int, num_bytes: int, reason: str) -> CorruptShardError:
        """Describe bytes that cannot be read."""
        size = "unknown" if self.descriptor is None else f"{os.fstat(self.descriptor).st_size}"
        return CorruptShardError(
            refusal(
                str(self.path),
                found=f"bytes {offset} to {offset + num_bytes} unreadable ({reason}); the file has {size} bytes",
                expected="the bytes that were mapped when the model was loaded",
                way_out="restore the file and load the model again; replace checkpoints by rename, never in place",
            )
        )

    def close(self) -> None:
        """Give the descriptor back."""
        descriptor, self.descriptor = self.descriptor, None
        if descriptor is not None:
            os.close(descriptor)

    def __del__(self) -> None:
        self.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class Region:
    """Say which bytes of a file stand at which addresses. Immutable."""

    span: Span
    offset: int
    """Of the file's byte at ``span.begin``."""
    file: BackingFile

    def offset_of(self, address: int) -> int:
        """Give the position in the file of the byte at an address."""
        return self.offset + address - self.span.begin


class Regions:
    """List the private file mappings of this process, as they are now. Immutable."""

    def __init__(self) -> None:
        self._files: dict[tuple[str, int], BackingFile] = {}
        self._lines = list(_private_mappings())
        self._begins = [span.begin for span, _, _, _, _ in self._lines]

    def find(self, span: Span) -> Region | None:
        """Find the mapping that holds all bytes of a span; None where there is none."""
        index = bisect_right(self._begins, span.begin) - 1
        if index < 0:
            return None
        whole, offset, device, inode, path = self._lines[index]
        while whole.end < span.end and index + 1 < len(self._lines):  # one mapping may show as several lines
            index += 1
            following, next_offset, next_device, next_inode, _ = self._lines[index]
            if (following.begin, next_device, next_inode) != (whole.end, device, inode):
                return None
            if next_offset != offset + whole.num_bytes:
                return None
            whole = Span(whole.begin, following.end)
        if span.end > whole.end:
            return None
        return Region(span=whole, offset=offset, file=self._file(device, inode, path))

    def _file(self, device: str, inode: int, path: str) -> BackingFile:
        if (device, inode) not in self._files:
            self._files[device, inode] = BackingFile(Path(path), _open_same(path, inode))
        return self._files[device, inode]


def _private_mappings() -> Iterable[tuple[Span, int, str, int, str]]:
    with Path("/proc/self/maps").open(encoding="utf-8", errors="surrogateescape") as lines:
        for line in lines:
            addresses, modes, offset, device, inode, *path = line.rstrip("\n").split(maxsplit=5)
            if inode != "0" and modes[3] == "p" and path:
                begin, end = (int(address, 16) for address in addresses.split("-"))
                yield Span(begin, end), int(offset, 16), device, int(inode), path[0]


def _open_same(path: str, inode: int) -> int | None:
    """Open a mapped file by its name, if that still names it."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    if os.fstat(descriptor).st_ino != inode:
        os.close(descriptor)
        return None
    return descriptor


def storage_span(tensor: torch.Tensor) -> Span:
    """Give the addresses of all bytes of a CPU tensor's storage."""
    storage = tensor.untyped_storage()
    return Span(storage.data_ptr(), storage.data_ptr() + storage.nbytes())


class Spill:
    """Write weights to a file without a name and bind them to it; `restore` takes them back into memory.

    The addresses keep their remainder modulo 64, by which kernels choose their path: results keep their bits.

    Args:
        tensors: parameters on the CPU, whole storages at a time; views of one storage come together.
        folder: where the file is made; None for the system's temporary folder.

    Raises:
        ResidencyError: no room on that disk. The tensors are as before then.
    """

    def __init__(self, tensors: Sequence[nn.Parameter], folder: Path | None) -> None:
        self.region: Region | None = None
        """Where the spilled bytes are now; None where nothing had to be."""
        self._tensors = list(tensors)
        places: dict[int, int] = {}
        end = 0
        for tensor in self._tensors:
            span = storage_span(tensor)
            if span.begin not in places:
                places[span.begin] = end + (span.begin - end) % 64
                end = places[span.begin] + span.num_bytes
        self.num_bytes = end
        if not end:
            return
        descriptor = _nameless_file(folder, end)
        try:
            _write(descriptor, self._tensors, places)
        except BaseException:
            os.close(descriptor)
            raise
        file = BackingFile(Path(folder or tempfile.gettempdir(), "(weights without a file)"), descriptor)
        try:
            mapping = map_private(descriptor, end)
        except OSError as error:
            raise _no_room(folder, end, error) from error
        whole = Span.of(mapping)
        self.region = Region(span=whole, offset=0, file=file)
        shown: dict[int, torch.UntypedStorage] = {}
        for tensor in self._tensors:
            span = storage_span(tensor)
            if span.begin not in shown:
                raw = torch.frombuffer(mapping, dtype=torch.uint8, count=span.num_bytes, offset=places[span.begin])
                shown[span.begin] = raw.untyped_storage()
            _show(tensor, shown[span.begin])

    def restore(self) -> None:
        """Take the weights, as they are by now, back into memory of their own."""
        homes: dict[int, torch.UntypedStorage] = {}
        for tensor in self._tensors:
            shown = tensor.untyped_storage()
            home = homes.setdefault(
                shown.data_ptr(),
                shown.clone(),  # type: ignore[no-untyped-call] # torch
            )
            _show(tensor, home)


def _show(tensor: nn.Parameter, storage: torch.UntypedStorage) -> None:
    """Bind a parameter to other bytes of the same layout; it keeps its identity."""
    empty = torch.empty(0, dtype=tensor.dtype)
    tensor.data = empty.set_(storage, tensor.storage_offset(), tensor.size(), tensor.stride())


def _nameless_file(folder: Path | None, num_bytes: int) -> int:
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            os.posix_fallocate(file.fileno(), 0, num_bytes)
            return os.dup(file.fileno())
    except OSError as error:
        raise _no_room(folder, num_bytes, error) from error


def _no_room(folder: Path | None, num_bytes: int, error: OSError) -> ResidencyError:
    return ResidencyError(
        refusal(
            f"offload_folder {str(folder or tempfile.gettempdir())!r}",
            found=str(error),
            expected=f"room for {format_bytes(num_bytes)} of weights that are in no file",
            way_out="name another folder, or load the model with lading.load, which needs no second copy",
        )
    )


def _write(descriptor: int, tensors: Sequence[nn.Parameter], places: dict[int, int]) -> None:
    total = sum(tensor.nbytes for tensor in tensors)
    done: set[int] = set()
    with tqdm(total=total, desc="spilling", unit="B", unit_scale=True, delay=1, disable=None, leave=False) as bar:
        for tensor in tensors:
            span = storage_span(tensor)
            if span.begin not in done:
                done.add(span.begin)
                raw = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
                view = memoryview(raw.numpy().data)
                while view:
                    offset = places[span.begin] + span.num_bytes - len(view)
                    view = view[os.pwrite(descriptor, view[:_STEP_BYTES], offset) :]
            bar.update(tensor.nbytes)
    os.fdatasync(descriptor)  # pages that are not written yet could not be dropped from the cache
