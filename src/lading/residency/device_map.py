"""Show where a model's blocks rest, under the name that this ecosystem asks for: ``model.hf_device_map``."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

_NAME = "hf_device_map"
_ABSENT = object()


def show_device_map(model: nn.Module, device_map: Mapping[str, Any]) -> Callable[[], None]:
    """Set ``hf_device_map`` and return what puts back whatever was there. The model is not kept alive by it.

    Nobody may be inside a forward meanwhile.
    """
    before = vars(model).get(_NAME, _ABSENT)
    vars(model)[_NAME] = dict(device_map)
    shown_by = weakref.ref(model)

    def hide() -> None:
        shown = shown_by()
        if shown is None:
            return
        if before is _ABSENT:
            vars(shown).pop(_NAME, None)
        else:
            vars(shown)[_NAME] = before

    return hide
