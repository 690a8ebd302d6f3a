"""Read a ``max_memory``: which accelerators, how much host memory, how much disk.

Knows the device names that users write; asks no hardware.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from lading.errors import PlanError, refusal
from lading.units import format_bytes, parse_bytes

Device = int | str
"""An accelerator's index, another device's type such as ``"mps"``, ``"cpu"`` or ``"disk"``: a key of a device map."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """Say what may be used of each device, in bytes. Immutable."""

    accelerators: Mapping[Device, int]
    """In the order of preference."""
    host_bytes: int
    disk_bytes: int | None
    """None: no limit."""

    def sizes(self) -> dict[Device, int | None]:
        """Give the bytes of every device, ``"cpu"`` and ``"disk"`` last; None for no limit."""
        return {**self.accelerators, "cpu": self.host_bytes, "disk": self.disk_bytes}

    def with_device(self, device: Device, size: int) -> Budget:
        """Give one device another size."""
        if device == "cpu":
            return replace(self, host_bytes=size)
        if device == "disk":
            return replace(self, disk_bytes=size)
        return replace(self, accelerators={**self.accelerators, device: size})

    def describe(self) -> str:
        """Write it for a message."""
        return ", ".join(
            f"{device}: {'no limit' if size is None else format_bytes(size)}" for device, size in self.sizes().items()
        )


def device_key(device: object) -> Device:
    """Write a device as a device map does: ``"cuda:1"``, ``torch.device("cuda", 1)`` and ``"1"`` are all 1.

    Raises:
        PlanError: no device has this name.
    """
    if isinstance(device, int) and not isinstance(device, bool) and device >= 0:
        return device
    name = str(device).strip()
    if name.isdecimal():
        return int(name)
    if name == "disk":
        return name
    try:
        parsed = torch.device(name)
        if parsed.type == "meta":
            raise RuntimeError("nothing rests on meta")
    except RuntimeError as error:
        expected = "an accelerator's index such as 0, 'cuda:0', 'mps', 'cpu' or 'disk'"
        raise PlanError(
            refusal("max_memory", found=f"device {device!r}", expected=expected, way_out="rename it")
        ) from error
    if parsed.type in ("cpu", "mps"):
        return parsed.type
    return parsed.index or 0


def budget_of(max_memory: Mapping[object, object]) -> Budget:
    """Read a mapping of devices to sizes, which are integers or texts such as ``"10GiB"``.

    What is not named is not used, but for the disk, which has no limit unless it is named.

    Raises:
        PlanError: a device or a size cannot be read, or a device is named twice.
    """
    sizes: dict[Device, int] = {}
    for device, size in max_memory.items():
        key = device_key(device)
        if key in sizes:
            raise PlanError(
                refusal("max_memory", found=f"device {key!r} twice", expected="once", way_out="drop one of the two")
            )
        try:
            sizes[key] = parse_bytes(size)  # type: ignore[arg-type] # anything else is refused there
        except ValueError as error:
            raise PlanError(
                refusal(
                    f"max_memory of device {key!r}",
                    found=repr(size),
                    expected="bytes, or a size such as '10GiB'",
                    way_out="correct it",
                )
            ) from error
    host, disk = sizes.pop("cpu", 0), sizes.pop("disk", None)
    return Budget(accelerators=sizes, host_bytes=host, disk_bytes=disk)
