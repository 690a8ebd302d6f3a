"""Notice a thread that stands still in code that is not ours: it may wait for somebody who waits for it.

Knows threads and their frames, and nothing of what they do. A thread that computes uses a processor; one that waits for
weights stands in this package.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from types import FrameType

_OWN_FILES = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "")  # noqa: PTH100, PTH118, PTH120 - compared with names in frames


class Watch:
    """Notice a thread that stands still in the model's own code. One thread."""

    def __init__(self, patience_s: float) -> None:
        self._patience_s = patience_s
        self._seen: object = None
        self._since_s = 0.0

    def look(self, thread: threading.Thread) -> str | None:
        """Say where a thread has stood still for too long; None while it gets on, or waits for weights."""
        ident = thread.ident
        frame = sys._current_frames().get(ident) if ident is not None else None
        if ident is None or frame is None:
            return None
        used_s = time.clock_gettime(time.pthread_getcpuclockid(ident))
        seen = (ident, used_s, id(frame), frame.f_lasti)
        frame = _beyond_locks(frame)
        now = time.monotonic()
        if seen != self._seen or frame is None or frame.f_code.co_filename.startswith(_OWN_FILES):
            self._seen, self._since_s = seen, now
        if now - self._since_s < self._patience_s or frame is None:
            return None
        return f"{frame.f_code.co_filename}:{frame.f_lineno}"


def _beyond_locks(frame: FrameType | None) -> FrameType | None:
    while frame is not None and frame.f_code.co_filename == threading.__file__:
        frame = frame.f_back
    return frame
