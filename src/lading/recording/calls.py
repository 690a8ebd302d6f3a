"""Tell inside which calls of modules the running thread is, and what masks they were given.

What a call was given is read from the thread's own stack, from the frames of torch's ``Module._call_impl``: they end
with the call however it ends, also by a KeyboardInterrupt, after which torch runs no hook.

Concurrency: context variables and the calling thread's stack; nothing is shared but ``Call.strays``, which each
capture's own lock guards.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

_CODE = nn.Module._call_impl.__code__


@dataclass(frozen=True, slots=True, kw_only=True)
class Mask:
    """Which tokens of one call count. Immutable."""

    tensor: torch.Tensor
    """[rows, tokens]."""
    num_given: frozenset[int]
    """The lengths of the call's other arguments: fewer than the mask's where a cache holds the tokens before them."""
    is_sure: bool = False
    """Whether it is meant for these tokens; if not, one that leaves none out may be for others."""


@dataclass(slots=True, eq=False)
class Call:
    """One call of a captured model in a listening context."""

    listener: object
    """The capture that it is for."""
    number: int
    """Which one of the capture's calls."""
    given: tuple[nn.Module, tuple[Any, ...], Mapping[str, Any]]
    """The model and its arguments."""
    thread: int = field(default_factory=threading.get_ident)
    heard: set[str] = field(default_factory=set)
    strays: set[str] = field(default_factory=set)
    """Sites that some thread outside every call of the model reached meanwhile."""
    is_stopped: bool = False


CALLS: ContextVar[tuple[Call, ...]] = ContextVar("lading_captured_calls", default=())


def is_inside(module: nn.Module, times: int = 1) -> bool:
    """Say whether the calling thread runs a call of a module, or as many of them inside each other."""
    called = (arguments for arguments in _modules_called() if arguments["self"] is module)
    return next(itertools.islice(called, times - 1, None), None) is not None


def masks_above(path: str, calls: Sequence[Call]) -> tuple[Mask, ...]:
    """Find the mask of the innermost call around the calling hook that was given one of rows and tokens, if any was.

    Models hand layers a mask of four dimensions, and what a mask of two becomes where tokens are merged, as in audio
    encoders, to the part that merged them. So the innermost one of two is the one of the tokens seen there. A thread
    that does a call's work in a copy of its context does not have it on its stack: there the call says it.
    """
    for arguments in _modules_called():
        found = masks_of(arguments["self"], arguments["args"], arguments["kwargs"], path)
        if found:
            return found
    elsewhere = [call for call in calls if call.thread != threading.get_ident()]
    return masks_of(*elsewhere[-1].given, path) if elsewhere else ()


def masks_of(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], path: str) -> tuple[Mask, ...]:
    """Give the mask that a call was given for the tokens at a path below it; none or one."""
    parameters = _parameters(type(module).forward)
    given = {**dict(zip(parameters, args, strict=False)), **kwargs}
    name = "decoder_attention_mask" if "decoder_input_ids" in parameters and _is_decoder(path) else "attention_mask"
    mask = given.get(name)
    if not isinstance(mask, torch.Tensor) or mask.dim() != 2:
        return ()
    others = [value for key, value in given.items() if isinstance(value, torch.Tensor) and not key.endswith("mask")]
    return (Mask(tensor=mask, num_given=frozenset(each.shape[1] for each in others if each.dim() > 1)),)


def _is_decoder(path: str) -> bool:
    """Say whether a path of an encoder-decoder leads to the decoder's tokens; heads see them too."""
    for part in path.split("."):
        if "decoder" in part or "encoder" in part:
            return "decoder" in part
    return True


@functools.lru_cache(maxsize=1024)
def _parameters(forward: Callable[..., Any]) -> tuple[str, ...]:
    try:
        return tuple(inspect.signature(forward).parameters)[1:]
    except (TypeError, ValueError):  # of something that Python cannot look into
        return ()


def _modules_called() -> Iterator[Mapping[str, Any]]:
    """Yield the local variables of torch's calls of modules on this thread's stack, innermost first."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code is _CODE:
            yield frame.f_locals
        frame = frame.f_back  # type: ignore[assignment]
