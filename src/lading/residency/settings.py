"""Hold what a residency is told besides model and plan."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from lading.placement.budget import Device
from lading.residency.readers import Reader
from lading.residency.transfer import Transfer, transfer_to


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Say how an offloaded model treats files and its callers' tensors. Immutable."""

    offload_folder: Path | None = None
    """Where weights are written that are in no file; None: the system's temporary folder."""
    skip_keys: frozenset[str] = frozenset()
    """Arguments that are not moved between devices, such as caches."""
    io_same_device: bool = True
    """Whether outputs return to the device of the first input."""
    reader: Reader = field(default_factory=Reader)
    """Reads files; one for each residency. Others are for tests."""
    transfers: Callable[[Device], Transfer] = transfer_to
    """Makes the transfer for an accelerator. Others are for tests."""
