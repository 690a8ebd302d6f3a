"""Hold every branch on a version or a platform, so that the rest of the package has none.

Reads versions without importing the packages.
"""

from __future__ import annotations

import gc
import mmap
import os
import sys
import threading
from collections.abc import Callable
from functools import cache
from importlib import metadata
from types import FrameType
from typing import Any

MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)
"""Linux: a private mapping without it is counted as if every page were written, and refused when larger than RAM."""

MADV_POPULATE_READ = getattr(mmap, "MADV_POPULATE_READ", 22)
"""Linux 5.14: fault pages in, and answer EFAULT where a later access would be killed by SIGBUS."""


_COLLECTOR_SWITCH = threading.RLock()  # reentrant: a signal handler may ask while its own thread does


def _renew_switch() -> None:
    global _COLLECTOR_SWITCH  # noqa: PLW0603 - a child's copy may be held by a thread that the child lacks
    _COLLECTOR_SWITCH = threading.RLock()


os.register_at_fork(after_in_child=_renew_switch)


def frame_of(thread_id: int) -> FrameType | None:
    """Give the innermost frame of a thread; None where there is no such thread.

    CPython 3.11 before 3.11.9 holds a lock of the interpreter while it lists the frames of all threads; if the garbage
    collector runs then, and lets another thread start or end, the process stands still for ever (gh-106883). So the
    collector is off meanwhile. Blocks for microseconds; any thread, also in a signal handler.
    """
    if thread_id == threading.get_ident():
        return sys._getframe(1)
    with _COLLECTOR_SWITCH:
        is_on = gc.isenabled()
        try:
            gc.disable()
            return sys._current_frames().get(thread_id)
        finally:
            if is_on:
                gc.enable()


def keep_from_compiling(function: Callable[..., Any]) -> None:
    """Have torch.compile call a function as it is, and whatever it calls: never trace it, never compile it.

    ``torch.compiler.disable`` does the same, at the price of importing the compiler. The mark on the function is what
    the tracer reads; the strategy of its code is what the interpreter's frame hook reads (torch 2.7 and later).
    """
    vars(function).update(_torchdynamo_disable=True, _torchdynamo_disable_msg="lading moves weights here")
    run_uncompiled(function)


def run_uncompiled(function: Callable[..., Any], *, with_callees: bool = True) -> None:
    """Have a function run as it is where Python calls it below compiled code; traces may still go through it."""
    import torch

    frames = torch._C._dynamo.eval_frame
    skip = frames._FrameAction.SKIP
    below = skip if with_callees else frames._FrameAction.DEFAULT
    frames.set_code_exec_strategy(function.__code__, frames._FrameExecStrategy(skip, below))


def compiling_caller() -> Callable[[], object]:
    """Give the question whether something that torch.compile made runs further up on this thread; None: nothing.

    It is one to the thread alone, and a function in C: one in Python would be compiled where the answer is yes.
    """
    import torch

    found: Callable[[], object] = torch._C._dynamo.eval_frame.get_eval_frame_callback
    return found


@cache
def release(distribution: str) -> tuple[int, int] | None:
    """Read the first two numbers of an installed distribution's version; None when it is not installed."""
    loaded = getattr(sys.modules.get(distribution), "__version__", None)
    try:  # what is loaded spares a millisecond of reading metadata
        version = loaded if isinstance(loaded, str) else metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def has_transformers5() -> bool:
    """Say whether transformers 5 or later is installed: its loader has conversions and other private names."""
    return (release("transformers") or (0, 0)) >= (5, 0)


def prefers_model_beside_adapter() -> bool:
    """Say whether transformers loads the whole model beside an adapter before the one that it names: since 5.4."""
    return (release("transformers") or (0, 0)) >= (5, 4)
