"""Refuse compiled code: it ignores hooks, so that a capture would hear nothing of it, or a part."""

from __future__ import annotations

from typing import NoReturn

from torch import nn

from lading.errors import CaptureError, name_list, refusal

_EXPECTED = "modules that run as they are: compiled code ignores hooks"


def refuse_compiled(model: nn.Module) -> None:
    """Let through what runs as it is.

    Raises:
        CaptureError: modules are compiled in place, or stand for what torch.compile made of others.
    """
    reached, seen = [model], {id(model)}
    for module in reached:  # which grows meanwhile; naming them all takes ten times as long
        if is_compiled(module):
            break
        children = [child for child in module._modules.values() if child is not None and id(child) not in seen]
        reached += children
        seen.update(map(id, children))
    else:
        return
    compiled = [name for name, module in model.named_modules() if is_compiled(module)]
    raise CaptureError(
        refusal(
            type(model).__name__,
            found=f"compiled modules: {name_list(compiled)}",
            expected=_EXPECTED,
            way_out="capture on the model that was compiled, before it was",
        )
    )


def is_compiled(module: nn.Module) -> bool:
    """Say whether a module runs compiled code, or stands before one that does."""
    return "_orig_mod" in module._modules or module._compiled_call_impl is not None


def refuse_compiled_call(model: nn.Module) -> NoReturn:
    """Say that what was called is not the model, but what was compiled of it.

    Raises:
        CaptureError: always.
    """
    raise CaptureError(
        refusal(
            f"a capture of {type(model).__name__}",
            found="a call of what torch.compile made of it",
            expected=_EXPECTED,
            way_out="call the model itself",
        )
    )
