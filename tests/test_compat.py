"""What compat promises about threads and their frames."""

from __future__ import annotations

import gc
import sys
import threading

import pytest

from lading.compat import frame_of


@pytest.mark.parametrize("is_on", [True, False])
def test_frame_of_another_thread_is_asked_with_the_collector_off_and_leaves_it_as_it_was(monkeypatch, is_on):
    """CPython 3.11 before 3.11.9 can stand still for ever if the collector runs meanwhile."""
    seen = []
    ask = sys._current_frames

    def watched():
        seen.append(gc.isenabled())
        return ask()

    monkeypatch.setattr(sys, "_current_frames", watched)
    done = threading.Event()

    def wait_here() -> None:
        done.wait()

    thread = threading.Thread(target=wait_here)
    thread.start()
    was_on = gc.isenabled()
    try:
        (gc.enable if is_on else gc.disable)()
        frame = frame_of(thread.ident)
        assert gc.isenabled() is is_on
    finally:
        (gc.enable if was_on else gc.disable)()
        done.set()
        thread.join()
    names = []
    while frame is not None:
        names.append(frame.f_code.co_name)
        frame = frame.f_back
    assert "wait_here" in names
    assert seen == [False]
    assert frame_of(thread.ident) is None


def test_frame_of_the_own_thread_asks_nobody(monkeypatch):
    monkeypatch.setattr(sys, "_current_frames", lambda: pytest.fail("asked the interpreter"))
    assert frame_of(threading.get_ident()) is sys._getframe()


def test_frames_asked_by_many_threads_at_once_leave_the_collector_on():
    gc.enable()

    def ask() -> None:
        for _ in range(300):
            frame_of(main)

    main = threading.get_ident()
    threads = [threading.Thread(target=ask) for _ in range(8)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert gc.isenabled()
