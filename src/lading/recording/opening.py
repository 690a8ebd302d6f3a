"""Decide what a capture listens to, and refuse what it could not hear."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from lading.errors import CaptureError, name_list, refusal
from lading.recording.capture import Capture
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
    compiled = [name for name, module in model.named_modules() if _is_compiled(module)]
    if compiled:
        raise CaptureError(
            refusal(
                type(model).__name__,
                found=f"compiled modules: {name_list(compiled)}",
                expected="modules that run as they are: compiled code ignores hooks",
                way_out="capture on the model that was compiled, before it was",
            )
        )
    last = resolve(model, stop_after) if stop_after is not None else ()
    if len(last) > 1:
        raise CaptureError(
            refusal("stop_after", found=f"{len(last)} modules", expected="one", way_out="name the last of them")
        )
    return Capture(model, resolve(model, sites), selection, last[0] if last else None, groups)


def _is_compiled(module: nn.Module) -> bool:
    return hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None
