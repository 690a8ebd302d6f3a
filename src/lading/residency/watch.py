"""Notice a thread that stands still in code that is not ours: it may wait for somebody who waits for it.

Knows threads and their frames, and nothing of what they do. A thread that computes uses a processor; one that waits for
weights stands in this package.
"""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from types import FrameType

from lading.compat import frame_of

_OWN_FILES = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "")  # noqa: PTH100, PTH118, PTH120 - compared with names in frames


class Watch:
    """Notice a thread that stands still in the model's own code. One thread."""

    def __init__(self, patience_s: float) -> None:
        self._patience_s = patience_s
        self._seen: object = None
        self._since_s = 0.0

    def look(self, thread: threading.Thread) -> str | None:
        """Say where a thread has stood still for too long; None while it gets on, or waits for weights."""
        now = time.monotonic()
        used = _processor_ticks(thread)
        if used is None or (thread, used) != self._seen:  # not begun, ended, or it computes
            self._seen, self._since_s = (thread, used), now
        if now - self._since_s < self._patience_s:
            return None
        frame = _beyond_locks(frame_of(thread.ident or 0))
        if frame is None or frame.f_code.co_filename.startswith(_OWN_FILES):
            self._since_s = now
            return None
        return f"{frame.f_code.co_filename}:{frame.f_lineno}"


def _processor_ticks(thread: threading.Thread) -> int | None:
    """Read how long a thread has computed, in the kernel's ticks (10 ms); None for one that is not there."""
    try:
        text = Path(f"/proc/self/task/{thread.native_id}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()  # behind the name, which may hold anything
    return int(fields[11]) + int(fields[12])


def _beyond_locks(frame: FrameType | None) -> FrameType | None:
    while frame is not None and frame.f_code.co_filename == threading.__file__:
        frame = frame.f_back
    return frame
