"""Decide what a capture listens to, and refuse what it could not hear."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from lading.errors import CaptureError, refusal
from lading.recording.capture import Capture
from lading.recording.compiled import refuse_compiled
from lading.recording.groups import Group
from lading.recording.selection import Selection
from lading.recording.sites import resolve


def open_capture(
    model: nn.Module,
    sites: str | type[nn.Module] | Iterable[str | type[nn.Module]],
    selection: Selection,
    stop_after: str | None = None,
    groups: tuple[Group, ...] = (),
) -> Capture:
    """Make a capture of plain sites and groups.

    Raises:
        CaptureError: a site stands for nothing, or several to stop after, or a compiled model.
    """
    refuse_compiled(model)
    last = resolve(model, stop_after) if stop_after is not None else ()
    if len(last) > 1:
        raise CaptureError(
            refusal("stop_after", found=f"{len(last)} modules", expected="one", way_out="name the last of them")
        )
    return Capture(model, resolve(model, sites), selection, last[0] if last else None, groups)
