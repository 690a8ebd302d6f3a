"""Copy bytes from the host to one accelerator beside its computing: the only file that knows streams and events.

Copies run on a stream of their own, in order. A *mark* is a point on a stream: one stream waits for another's mark
without the host waiting. `Transfer` is all that streaming knows of a device, so that a fake with a clock of its own can
stand for one in tests.
"""

from __future__ import annotations

import logging
import threading
from typing import Any, Protocol

import torch

from lading.errors import ResidencyError, refusal
from lading.placement.budget import Device

_LOG = logging.getLogger(__name__)
Mark = Any
"""A point on a stream; only handed back to the transfer that made it."""


class Transfer(Protocol):
    """Allocate, copy and order work on one device. Any thread; one thread copies at a time."""

    device: torch.device

    def allocate(self, num_bytes: int) -> torch.Tensor:
        """Give uint8 [num_bytes] on the device, aligned for any dtype, which keeps its address."""

    def pin(self, tensor: torch.Tensor) -> bool:
        """Lock a host tensor's pages, so that the device reads them by itself; False where it is refused."""

    def unpin(self, tensor: torch.Tensor) -> None:
        """Undo `pin`."""

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Queue a copy from the host; both uint8 of one length. The host waits only where ``source`` is not pinned."""

    def copied(self) -> Mark:
        """Mark the end of all copies queued so far."""

    def computed(self) -> Mark:
        """Mark the end of all that the calling thread computed so far."""

    def hold_copies(self, mark: Mark) -> None:
        """Let later copies begin only after a mark."""

    def hold_compute(self, mark: Mark) -> None:
        """Let what the calling thread computes from now on begin only after a mark."""

    def wait(self, mark: Mark) -> None:
        """Block the host until a mark is reached."""


class StreamTransfer:
    """Copy to an accelerator through a stream of torch.

    Args:
        device: with its index, such as ``cuda:0``.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.Stream(device=device)
        self._warned = threading.Event()

    def allocate(self, num_bytes: int) -> torch.Tensor:
        """Ask torch's allocator; on failure ask it to give back its unused memory first, and once more."""
        try:
            return torch.empty(num_bytes, dtype=torch.uint8, device=self.device)
        except torch.OutOfMemoryError:
            torch.get_device_module(self.device).empty_cache()
            return torch.empty(num_bytes, dtype=torch.uint8, device=self.device)

    def pin(self, tensor: torch.Tensor) -> bool:
        """Register the pages with the driver: torch's own pinned allocator would round sizes up to powers of two."""
        if self.device.type != "cuda" or not tensor.nbytes:
            return False
        status = torch.cuda.cudart().cudaHostRegister(tensor.data_ptr(), tensor.nbytes, 0)  # type: ignore[no-untyped-call]
        if int(status) and not self._warned.is_set():
            self._warned.set()
            _LOG.warning("host memory cannot be pinned (%s): weights are staged through a small pinned buffer", status)
        return not int(status)

    def unpin(self, tensor: torch.Tensor) -> None:
        """Take the pages off the driver's list."""
        torch.cuda.cudart().cudaHostUnregister(tensor.data_ptr())  # type: ignore[no-untyped-call]

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Queue it on the copying stream."""
        with self._stream:
            target.copy_(source, non_blocking=True)

    def copied(self) -> Mark:
        """Record an event on the copying stream."""
        return self._stream.record_event()

    def computed(self) -> Mark:
        """Record an event on the calling thread's current stream."""
        return torch.accelerator.current_stream(self.device).record_event()

    def hold_copies(self, mark: Mark) -> None:
        """Have the copying stream wait."""
        self._stream.wait_event(mark)

    def hold_compute(self, mark: Mark) -> None:
        """Have the calling thread's current stream wait."""
        torch.accelerator.current_stream(self.device).wait_event(mark)

    def wait(self, mark: Mark) -> None:
        """Wait for the event."""
        mark.synchronize()


def transfer_to(device: Device) -> Transfer:
    """Make the transfer for a device of a plan.

    Raises:
        ResidencyError: this machine has no such device.
    """
    kind = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    count = torch.accelerator.device_count() if kind is not None else 0
    if kind is None or (isinstance(device, int) and device >= count):
        raise ResidencyError(
            refusal(
                f"device {device!r} of the plan",
                found=f"{count} accelerators here",
                expected="the device",
                way_out="plan with the devices that this machine has",
            )
        )
    return StreamTransfer(torch.device(kind.type, device) if isinstance(device, int) else torch.device(kind))
